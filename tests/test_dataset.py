"""A data set's maps: what is stored, what is found damaged, what is refused, and how it is read back."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax.cli.main import main
from tokentm_jax.configs import EvaluateConfig, rows
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.batches import batches
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.runs import dataset as job
from tokentm_jax.runs import evaluate as evaluation
from tokentm_jax.runs.dataset import DatasetConfig, explain_dataset
from tokentm_jax.runs.store import ANSWER, Store, decode, encode, open_maps, scaled

COUNT = 10  # with one that is damaged
CONFIG = DatasetConfig(("gae", "input_gradient"), dtype="float32", batch_size=2, chunk_size=4)


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    lines = ["file,class_index"]
    for i in range(COUNT):
        Image.fromarray(random.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(path / f"{i:02}-é.png")
        lines.append(f"{i:02}-é.png,{i % 5}")
    (path / "05-é.png").write_bytes(b"nothing")
    (path / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(folder):
    return open_source(folder)


@pytest.fixture(scope="module")
def whole(vit, source, tmp_path_factory):
    """A store that was written without interruption."""
    out = tmp_path_factory.mktemp("whole") / "maps"
    assert explain_dataset(CONFIG, vit, source, str(out)) == (3, 3, [])
    return out


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_the_store_holds_what_the_library_computes(whole, vit, source, folder):
    """The oracle explains all images at once, without batches, chunks or a store."""
    found = open_maps(whole)
    good = [i for i in range(COUNT) if i != 5]
    (batch,) = batches(source, vit.preprocessing, len(good), indices=good)
    images = batch.inputs.astype(np.float32) / 255
    logits = np.asarray(vit.logits(images))
    np.testing.assert_allclose(found.logits[good], logits, rtol=1e-4, atol=1e-5)
    assert found.prediction[good].tolist() == found.target[good].tolist() == logits.argmax(-1).tolist()
    for method, shape in (("gae", (2, 3)), ("input_gradient", (16, 24))):
        assert found.maps[method].shape == (COUNT, *shape) and found.maps[method].dtype == np.float32
        expected = np.asarray(tm.explain(vit, images, method))
        np.testing.assert_allclose(found.read(method, good), expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
    assert found.keys == source.keys and len(found) == COUNT and found.missing == 0
    assert found.label[good].tolist() == [i % 5 for i in good]
    assert list(found.skipped) == ["05-é.png"] and "05-é.png" in found.skipped["05-é.png"]
    assert found.status[:].tolist() == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert np.isnan(found.maps["gae"][5]).all() and np.isnan(found.logits[5]).all() and found.target[5] == -1
    made = found.provenance
    assert made["data"]["identity"] == source.identity and made["model"]["identity"] == vit.described()["identity"]
    assert {"jax", "tokentm_jax"} <= set(made["versions"]) and "0x" not in json.dumps(made)
    assert "10 examples, 9 done, 1 skipped, complete" in repr(found)
    for file in whole.rglob("zarr.json"):  # what a reader of zarr v3 needs, and a checksum on every chunk
        description = json.loads(file.read_text())
        assert description["zarr_format"] == 3
        if description["node_type"] == "array":
            assert description["codecs"][-1]["name"] == "crc32c" and description["shape"][0] == COUNT
        else:
            assert description["node_type"] == "group"


def test_arrays_are_indexed_like_numpys(whole):
    array = open_maps(whole).maps["input_gradient"]
    everything = np.asarray(array)
    for index in (3, -1, slice(2, 9, 3), [7, 0, 7], np.arange(COUNT) % 2 == 0, (slice(1, 3), 4), (2, 3, 4), ...):
        np.testing.assert_array_equal(array[index], everything[index])
    np.testing.assert_array_equal(array[2, ..., 1], everything[2, ..., 1])
    with pytest.raises(IndexError):
        array[COUNT]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_an_interrupted_job_goes_on(whole, vit, source, tmp_path, processes):
    """Stopped after its first batches, then finished by another number of processes, one after the other."""

    def stop(done, total, skipped):
        assert total == COUNT
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain_dataset(CONFIG, vit, source, str(tmp_path / "maps"), stop)
    partly = open_maps(tmp_path / "maps")
    assert partly.missing == 2 and "2 of 3 chunks missing" in repr(partly) and partly.keys[4:] == ("",) * 6
    before, seen = times(tmp_path / "maps"), []
    for process in range(processes):
        report = lambda *progress: seen.append(progress)  # noqa: E731
        explain_dataset(CONFIG, vit, source, str(tmp_path / "maps"), report, process=process, processes=processes)
    assert content(tmp_path / "maps") == content(whole)
    assert times(tmp_path / "maps").items() >= before.items()
    if processes == 1:
        assert seen == [(4, 10, 0), (6, 10, 1), (8, 10, 1), (10, 10, 1)]


def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])


def cut(file):
    file.write_bytes(file.read_bytes()[:9])


def empty(file):
    file.write_bytes(b"")


def lose(file):
    file.unlink()


def swap(file):
    """Chunk 0 takes the place of chunk 1: the file's own checksum is right."""
    place = list(file.parts)
    place[place.index("c") + 1] = "0"
    shutil.copy(Path(*place), file)


def wait_forever(file):
    file.unlink()
    os.mkfifo(file)


def occupy(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "files"),
    [
        (flip, ["maps/gae/c/0/0/0"]),
        (flip, ["logits/c/2/0"]),  # the last chunk is not full
        (cut, ["key/c/2/0", "status/c/0"]),
        (empty, ["label/c/1"]),
        (lose, ["scale/gae/c/1", "reason/c/0/0"]),
        (lose, ["maps/gae/c/0/0/0"]),
        (lose, ["checksum/c/1/0"]),
        (swap, ["maps/gae/c/1/0/0"]),
        (swap, ["logits/c/1/0", "key/c/1/0"]),
        (swap, ["checksum/c/1/0"]),
        (swap, ["status/c/1"]),
        (wait_forever, ["maps/gae/c/0/0/0", "target/c/2"]),
    ],
)
def test_damage_is_told_where_it_is_read_and_computed_again(whole, vit, source, tmp_path, damage, files):
    out, good = tmp_path / "maps", open_maps(whole)
    shutil.copytree(whole, out)
    before = times(out)
    chunks = {int(file.split("/c/")[1].split("/")[0]) for file in files}
    for file in files:
        damage(out / file)
    found = open_maps(out)
    arrays = {"maps/gae": found.maps["gae"], "scale/gae": found.scale["gae"]}
    arrays |= {name: getattr(found, name) for name in ("logits", "key", "label", "target", "reason", "status")}
    for file in files:
        name, chunk = file.split("/c/")[0], int(file.split("/c/")[1].split("/")[0])
        row = min(4 * chunk + 1, COUNT - 1)
        with pytest.raises(InputError) as caught:
            arrays.get(name, found.prediction)[row]
        where = name if name != "checksum" or damage is lose else "prediction"
        assert f"{where} cannot be read (" in str(caught.value) and f"/c/{chunk}" in str(caught.value)
        assert "run the same `tokentm dataset` command again, and it is computed again" in str(caught.value)
        if name.startswith(("maps", "scale")):
            with pytest.raises(InputError, match="run the same"):
                found.read("gae")
    others = [i for i in range(COUNT) if i // 4 not in chunks]  # what is whole is read all the same
    np.testing.assert_array_equal(found.read("gae", others), good.read("gae", others))
    np.testing.assert_array_equal(found.logits[others], good.logits[others])
    assert explain_dataset(CONFIG, vit, source, str(out)) == (3, len(chunks), sorted(chunks))
    assert content(out) == content(whole)
    kept = {n: t for n, t in before.items() if "/c/" not in n or int(n.split("/c/")[1].split("/")[0]) not in chunks}
    assert times(out).items() >= kept.items()


def test_what_is_not_done_has_fill_values(whole, tmp_path):
    """A part of `status` that is lost says that nothing is done: nothing of it counts as data."""
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    (out / "status/c/1").unlink()
    found, good = open_maps(out), open_maps(whole)
    assert found.missing == 1 and "1 of 3 chunks missing" in repr(found)
    assert found.keys == (*good.keys[:4], "", "", "", "", *good.keys[8:]) and found.skipped == {}
    assert np.isnan(found.read("gae")[4:8]).all() and np.isnan(found.logits[6]).all() and found.target[7] == -1
    np.testing.assert_array_equal(found.read("gae", [9, 5, 1])[[0, 2]], good.read("gae", [9, 1]))
    assert found.find("gae", {}, [(good.keys[4], None), (good.keys[8], None)])[0] == [1]
    for name in ("maps/gae", "scale/gae", "logits", "checksum"):  # no file of what is not done is looked for
        shutil.rmtree(out / name / "c/1", ignore_errors=True)
        (out / name / "c/1").unlink(missing_ok=True)
    assert np.isnan(found.read("gae")[4:8]).all()


def test_an_array_that_is_not_what_the_provenance_says_is_refused(whole, vit, source, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    big = [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "zstd"}, {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [2, 2, 3]}}
    for name, change in (
        ("maps/gae", {"data_type": "int32", "fill_value": 0}),
        ("maps/gae", {"shape": [COUNT, 3, 2]}),
        ("maps/gae", {"codecs": big}),
        ("maps/gae", {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}),
        ("maps/gae", {"chunk_grid": grid}),
        ("maps/gae", {"chunk_key_encoding": {"name": "v2"}}),
        ("label", {"fill_value": 0}),
        ("status", {"shape": [COUNT + 1]}),
        ("scale/gae", b""),
        ("logits", b"{"),
        ("logits", b"[" * 3_000_000),
        ("key", None),
        ("reason", wait_forever),
        ("target", occupy),
    ):
        file = out / name / "zarr.json"
        before = file.read_bytes()
        if isinstance(change, dict):
            file.write_text(json.dumps({**json.loads(before), **change}))
        elif isinstance(change, bytes):
            file.write_bytes(change)
        else:
            (change or lose)(file)
        with pytest.raises(InputError, match=f"{name}/zarr.json cannot be read .*run the same `tokentm dataset`"):
            open_maps(out)
        if change is not None:
            with pytest.raises(InputError, match=f"{name}/zarr.json is damaged .*: remove that file, and the same"):
                explain_dataset(CONFIG, vit, source, str(out))
        file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
        assert explain_dataset(CONFIG, vit, source, str(out)) == (3, 0, [])  # it is mended as the sentence says
        assert content(out) == content(whole)
    shutil.copytree(out / "maps/gae", out / "maps/lrp")
    with pytest.raises(InputError, match=r"maps/lrp/zarr\.json is no part of this store"):
        explain_dataset(CONFIG, vit, source, str(out))
    shutil.rmtree(out / "maps")
    (out / "maps").touch()
    with pytest.raises(InputError, match=r"maps/gae/zarr\.json cannot be read .*Not a directory"):
        open_maps(out)


def test_a_provenance_is_not_taken_on_trust(whole, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    root = json.loads((out / "zarr.json").read_text())
    made = root["attributes"]["tokentm"]
    shapes = made["shapes"]
    for change, sentence in (
        ({"format": None}, "has the layout 1, and this version has 2: make it again"),
        ({"format": 3}, "has the layout 3"),
        ({"format": [[]]}, "has the layout of another kind"),
        ({"chunk_size": 0}, "'chunk_size' must be greater than or equal to 1, got 0"),
        ({"chunk_size": 320_000_000_000}, "'chunk_size' must be less than or equal to 65536"),
        ({"batch_size": "2"}, "'batch_size' must be a valid integer"),
        ({"examples": -1}, "'examples' must be greater"),
        ({"examples": 10**15}, "'examples' must be less"),
        ({"methods": ["../../x", "gae"]}, "'methods'.0. is wrong .*pattern"),
        ({"methods": "gae"}, "'methods' must be a valid list"),
        ({"methods": []}, "'methods' is wrong"),
        ({"methods": ["gae", "gae"]}, "'shapes' must be those of"),
        ({"dtype": "object"}, "'dtype' must be 'float32' or 'float16'"),
        ({"options": {"a": [1]}}, "'options'.'a'"),
        ({"model": []}, "'model.name' is missing"),
        ({"model": {"name": 1, "identity": ""}}, "'model.name' must be a valid string"),
        ({"versions": None}, "'versions' is missing"),
        (
            {"shapes": {**shapes, "maps/lrp": [2, 3]}},
            "'shapes' must be those of maps/gae, maps/input_gradient, logits",
        ),
        ({"shapes": {**shapes, "maps/gae": [2]}}, "'shapes' must be those of"),
        ({"shapes": {**shapes, "maps/gae": [2, 0]}}, "'shapes'"),
        (
            {"shapes": {**shapes, "maps/gae": [2**30, 2**30]}},
            "a chunk of 4 examples takes .* MiB of memory.*store less",
        ),
        (
            {"shapes": {**shapes, "maps/gae": [512, 512]}, "chunk_size": 1024},
            "a chunk of 1024 examples takes 1026 MiB of memory, and 512 MiB is the limit; .* size of at most 511",
        ),
        ({"shapes": {**shapes, "maps/gae": [2, 4]}}, "maps/gae/zarr.json cannot be read .*shape"),
        ({"examples": 9}, "cannot be read .*shape"),
        ({"dtype": "float16"}, "cannot be read .*data_type"),
        ({"methods": ["gae", "lrp"], "shapes": {**shapes, "maps/lrp": [2, 3]}}, "'shapes' must be those of"),
    ):
        changed = {name: value for name, value in {**made, **change}.items() if value is not None}
        (out / "zarr.json").write_text(json.dumps({**root, "attributes": {"tokentm": changed}}))
        with pytest.raises(InputError, match=sentence):
            open_maps(out)
    large = {**made, "shapes": {**shapes, "maps/gae": [512, 512]}}
    stores = {size: Store(f"memory://{size}", {**large, "chunk_size": size}) for size in (4, 128, 500)}
    assert [store.at_a_time * size for size, store in stores.items()] == [4 * 254, 128 * 6, 500]  # at most 1 GiB
    deep = b'{"attributes": {"tokentm": ' + b"[" * 10**6
    for bad, sentence in (
        (b"", "holds no maps of `tokentm dataset`"),
        (b"{", "zarr.json is not valid JSON"),
        (b"null", "its zarr.json has something else"),
        (b'{"attributes": {"tokentm": [1]}}', "its zarr.json has something else"),
        (b"\xff\xfe", "zarr.json is not valid JSON"),
        (deep, "zarr.json is not valid JSON .*recursion"),
        (deep[:27] + b"[" * 900 + b"]" * 900 + b"}}", "has something else"),
        (b" " * (2**24 + 1), "zarr.json is larger than 16 MiB"),
    ):
        (out / "zarr.json").write_bytes(bad)
        with pytest.raises(InputError, match=sentence):
            open_maps(out)
    for change, sentence in ((wait_forever, "zarr.json is not a regular file"), (occupy, "zarr.json is a folder")):
        change(out / "zarr.json")
        with pytest.raises(InputError, match=sentence):
            open_maps(out)
        (out / "zarr.json").rename(tmp_path / change.__name__)
        (out / "zarr.json").touch()


def test_where_a_store_can_be(whole, folder, tmp_path):
    made = json.loads((whole / "zarr.json").read_text())["attributes"]["tokentm"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, sentence in (
        ("", "a store of maps must be a name that a file can have, got ''"),
        (
            "http://localhost:1/maps",
            "unsupported URL scheme: a store is a folder, or a URL of gs://, s3://, memory://",
        ),
        ("https://localhost:1/maps", "unsupported URL scheme"),
        (f"file://{tmp_path}/a.zip|zip:", "unsupported URL scheme"),
        ("gs://x", "cannot be opened: .*bucket name"),
        ("s3://", "s3: names no store: a URL is written as s3://BUCKET/NAME"),
        (Path("s3://bucket/maps"), "s3:/bucket/maps names no store: a URL is written as s3://BUCKET/NAME"),
        ("memory://nothing", "holds no maps; `tokentm dataset` makes them"),
        (tmp_path, "holds no maps"),
        (tmp_path / "absent/maps", "holds no maps"),
        (folder / "labels.csv", "labels.csv is a file"),
        (folder / "labels.csv" / "maps", "cannot be opened: Not a directory"),
        ("/dev/null", "is a file"),
        (f"{tmp_path}/a\0b", "a store of maps must be a name that a file can have, got"),
        (f"{tmp_path}/{'n' * 300}", "cannot be opened: File name too long"),
        (tmp_path / "loop", "cannot be opened: Too many levels of symbolic links"),
    ):
        with pytest.raises(InputError, match=sentence):
            open_maps(path)
        if "no maps" not in sentence:  # what can be made
            with pytest.raises(InputError, match=sentence):
                Store(path, made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop"]


def test_a_store_that_never_answers(tmp_path):
    """A server that takes the connection and says nothing, in a process of its own: that must end, too."""
    code = (
        "import tokentm_jax as tm\n"
        "try: tm.open_maps('gs://some-bucket/maps')\n"
        "except tm.InputError as error: print(error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        servers = {"TENSORSTORE_GCS_HTTP_URL": f"http://{where}", "GCE_METADATA_ROOT": where, "HOME": str(tmp_path)}
        servers["TOKENTM_STORE_WAIT"] = "1"
        job = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **servers}, capture_output=True, text=True, timeout=60
        )
    said = (
        "the store gs://some-bucket/maps cannot be read: no answer in 1 s; the environment variable TOKENTM_STORE_WAIT"
    )
    assert job.returncode == 0 and job.stdout.startswith(said) and job.stdout.count("\n") == 1


def test_how_long_a_store_may_take_to_answer(whole, monkeypatch):
    assert ANSWER < 10
    for given in ("soon", "0", "-1", "nan", "1e9"):
        monkeypatch.setenv("TOKENTM_STORE_WAIT", given)
        with pytest.raises(InputError, match=f"TOKENTM_STORE_WAIT must be a number of seconds .*, got '{given}'"):
            open_maps(whole)
    for given in ("", "30"):
        monkeypatch.setenv("TOKENTM_STORE_WAIT", given)
        assert len(open_maps(whole)) == 10


def test_leftovers_of_killed_writers_go(whole, vit, source, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    (out / "status/c/1").rename(out / "status/c/1.__lock")
    for name in ("logits/c/0/0.__lock", "label/zarr.json.__lock", "zarr.json.__lock"):
        (out / name).write_bytes(b"half")
    assert explain_dataset(CONFIG, vit, source, str(out)) == (3, 1, [])
    assert content(out) == content(whole)


def test_only_the_same_job_goes_on(whole, vit, source, folder, tmp_path):
    before = times(whole)
    other = dataclasses.replace(vit, params=jax.tree.map(lambda a: a * 1.5, vit.params))
    changed = dataclasses.replace(source, identify=lambda: "other")
    for what, model, data in (
        (r"model tiny \(.*\), and this command has tiny \(", other, source),
        (r"data the folder .* \(.*\), and this command has .* \(other\)", vit, changed),
        ("examples 10, and this command has 4", vit, open_source(folder, limit=4)),
        ("keys .*, and this command has", vit, dataclasses.replace(source, keys=source.keys[::-1])),
    ):
        with pytest.raises(InputError, match=f"was made with {what}.*choose another --out"):
            explain_dataset(CONFIG, model, data, str(whole))
    for what, change in (
        (r'methods \["gae", "input_gradient"\], and this command has \["gae"\];', {"methods": ["gae"]}),
        ("target predicted", {"target": "label"}),
        ("dtype float32", {"dtype": "float16"}),
        ("profile default", {"profile": "reference"}),
        ("batch_size 2", {"batch_size": 4}),
        ("chunk_size 4", {"chunk_size": 8}),
    ):
        with pytest.raises(InputError, match=f"was made with {what}.*choose another --out"):
            explain_dataset(dataclasses.replace(CONFIG, **change), vit, source, str(whole))
    assert times(whole) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    for out, sentence in (
        (folder, "is not empty and holds no maps"),
        (folder / "labels.csv", "is a file"),
        (tmp_path / "other", "holds no maps of `tokentm dataset`"),
        ("nonsense://maps", "unsupported URL scheme"),
        (whole / "maps", "zarr.json has something else"),  # a group, but no root
    ):
        names = sorted(p.name for p in folder.iterdir())
        with pytest.raises(InputError, match=sentence):
            explain_dataset(CONFIG, vit, source, str(out))
        assert sorted(p.name for p in folder.iterdir()) == names


def test_bad_settings_are_named_before_anything_is_written(vit, source, tmp_path):
    unlabelled = dataclasses.replace(source, labelled=False)
    for sentence, change, data in (
        ("unknown method 'gea'; did you mean 'gae'", {"methods": ["gea"]}, source),
        ("must be different ones, got gae,gae", {"methods": ["gae", "gae"]}, source),
        ("must be different ones, got none", {"methods": []}, source),
        ("unknown option 'fnf' of the method 'gae'", {"methods": ["gae"], "options": {"fnf": 1}}, source),
        ("unknown dtype 'float61'; did you mean 'float16'", {"dtype": "float61"}, source),
        ("unknown target", {"target": "x"}, source),
        ("a multiple of the batch size, got 5 and 2", {"chunk_size": 5}, source),
        ("'chunk_size' must be less than or equal to 65536", {"chunk_size": 320_000_000_000}, source),
        ("'chunk_size' must be greater", {"chunk_size": 0}, source),
        ("'chunk_size' must be a valid integer, got 4.0", {"chunk_size": 4.0}, source),
        ("'batch_size' must be less than or equal to 4096", {"batch_size": 5000, "chunk_size": 5000}, source),
        ("'batch_size' must be greater than or equal to 1, got 0", {"batch_size": 0}, source),
        ("'methods' ", {"methods": "gae"}, source),
        ("'options' must be", {"options": ["fnf"]}, source),
        ("has no labels to explain", {"target": "label"}, unlabelled),
    ):
        with pytest.raises(InputError, match=sentence):
            explain_dataset(dataclasses.replace(CONFIG, **change), vit, data, str(tmp_path / "maps"))
    assert not (tmp_path / "maps").exists()
    assert DatasetConfig(batch_size=48).chunk == 288 and DatasetConfig(batch_size=300).chunk == 300


def test_a_disk_that_cannot_be_written(whole, vit, source, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    for file in out.rglob("c/1*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (out / "scale/gae/c/1").mkdir()  # stands where the file is to be written
    before = times(out)
    with pytest.raises(InputError, match=r"cannot be written: .*; what was finished is kept, and the same command"):
        explain_dataset(CONFIG, vit, source, str(out))
    (out / "scale/gae/c/1").rmdir()
    assert explain_dataset(CONFIG, vit, source, str(out)) == (3, 1, [])
    assert content(out) == content(whole) and times(out).items() >= before.items()


def test_no_map_is_damaged_without_a_word(vit, source, monkeypatch):
    """Maps far outside float16's range keep their digits; those that are not finite are skipped with a reason."""
    factors = jnp.array([[1e9], [3e-12], [0.0], [jnp.nan]])

    def program(maps_of):
        def fake(params, pixels, target):
            logits = jnp.ones((len(pixels), vit.module.num_classes))
            return {"gae": maps_of(pixels)}, {"logits": logits, "target": jnp.zeros(len(pixels), jnp.int32)}

        return lambda config, vit: jax.jit(fake)

    def times_factors(pixels):
        values = pixels.reshape(len(pixels), -1)[:, :6].astype(jnp.float32) + 1
        return (values * factors[: len(pixels)]).reshape(-1, 2, 3)

    monkeypatch.setattr(job, "_program", program(times_factors))
    config = DatasetConfig(("gae",), batch_size=4, chunk_size=4)
    four = dataclasses.replace(source, keys=source.keys[:4])
    explain_dataset(config, vit, four, "memory://range")
    found = open_maps("memory://range")
    (batch,) = batches(four, vit.preprocessing, 4)
    exact = (batch.inputs.reshape(4, -1)[:, :6].astype(np.float64) + 1).reshape(4, 2, 3)
    maps = found.read("gae")
    assert found.maps["gae"].dtype == np.float16
    np.testing.assert_allclose(maps[0], exact[0] * 1e9, rtol=2**-11)
    np.testing.assert_allclose(maps[1], exact[1] * 3e-12, rtol=2**-11)
    assert (maps[2] == 0).all() and np.isnan(maps[3]).all()
    assert found.skipped == {"03-é.png": "gae gives no finite map"}
    monkeypatch.setattr(job, "_program", program(lambda pixels: jnp.ones((len(pixels), 2, 3))))
    assert explain_dataset(config, vit, four, "memory://range") == (1, 0, [])
    assert explain_dataset(config, vit, four, "memory://range", retry_skipped=True) == (1, 1, [])
    again = open_maps("memory://range")
    assert again.skipped == {} and (again.read("gae") == 1).all()


def test_scaling_rounds_at_most_once():
    random = np.random.default_rng(0)
    maps = (random.normal(size=(200, 3, 4)) * 10.0 ** random.integers(-37, 38, (200, 1, 1))).astype(np.float32)
    stored, scale = scaled(maps, "float16")
    assert stored.dtype == np.float16 and (np.frexp(scale)[0] == 0.5).all()
    largest = np.abs(maps).max((1, 2), keepdims=True)
    error = np.abs(stored.astype(np.float64) * scale[:, None, None] - maps)
    assert (error <= np.maximum(np.abs(maps) * 2.0**-11, largest * 2.0**-25)).all()
    stored, scale = scaled(maps, "float32")
    assert (stored == maps).all() and (scale == 1).all()


def test_texts_keep_any_file_name():
    names = ["a/b.png", "é" * 40, "bad\udcff.png", ""]
    assert decode(encode(names, 100)) == names
    assert decode(encode(["é" * 40], 21))[0][:10] == "é" * 10


def test_labels_are_explained_where_the_model_knows_them(vit, source):
    config = DatasetConfig(("gae",), target="label", batch_size=2, chunk_size=4)
    some = dataclasses.replace(source, keys=source.keys[:4])
    more = lambda key: source.read(key)._replace(label=7 if key == source.keys[1] else 3)  # noqa: E731
    explain_dataset(config, vit, dataclasses.replace(some, read=more), "memory://labels")
    found = open_maps("memory://labels")
    assert found.target[:].tolist() == found.label[:].tolist() == [3, -1, 3, 3]
    assert found.skipped == {source.keys[1]: "its label is no class of the model"}
    named = dataclasses.replace(some, class_names=tuple("abcde"))
    with pytest.raises(InputError, match="5 classes, tiny has 5"):
        explain_dataset(config, vit, named, "memory://named")
    config = dataclasses.replace(config, target="predicted")
    with pytest.warns(UserWarning, match="does not know 5 of its 5 classes: 'a', 'b'"):
        explain_dataset(config, vit, named, "memory://named")
    assert (open_maps("memory://named").label[:] == -1).all()


def test_an_evaluation_takes_maps_from_a_store(whole, vit, source, folder, tmp_path, monkeypatch):
    config = EvaluateConfig("tiny", "saco", str(folder), rows("gae", "rollout"), options={"groups": 3}, batch_size=2)
    plain = evaluation.evaluate(config, vit, source, tmp_path / "plain")
    computed = []
    maps = evaluation.Programs.maps

    def counted(self, row, keys, *arrays):
        computed.append(row.name)
        return maps(self, row, keys, *arrays)

    monkeypatch.setattr(evaluation.Programs, "maps", counted)
    stored = open_maps(whole)
    taken = evaluation.evaluate(config, vit, source, tmp_path / "taken", maps=[stored])
    assert taken["rows"] == plain["rows"]
    assert set(computed) == {"rollout", "random"}
    assert [made["store"] for made in taken["run"]["maps"]] == [str(whole)] and "maps" not in plain["run"]
    key, target = stored.keys[1], int(stored.target[1])
    wanted = [("05-é.png", None), (key, target + 1), (key, target), ("elsewhere", None), (key, None)]
    places, found = stored.find("gae", {}, wanted)
    assert places == [2, 4] and (found == stored.maps["gae"][[1, 1]]).all()
    assert stored.find("gae", {"first_block": 0}, wanted)[0] == stored.find("rollout", {}, wanted)[0] == []
    # A store that lacks some: those are computed, and the others are taken.
    computed.clear()
    few = dataclasses.replace(stored)
    few.__dict__["_places"] = {k: v for k, v in stored._places.items() if k != key}
    partly = evaluation.evaluate(config, vit, source, tmp_path / "partly", maps=[few])
    assert partly["rows"] == plain["rows"] and computed.count("gae") == 1
    computed.clear()  # another store has it
    both = evaluation.evaluate(config, vit, source, tmp_path / "both", maps=[few, stored])
    assert both["rows"] == plain["rows"] and "gae" not in computed
    finer = {**stored.provenance, "shapes": {**stored.provenance["shapes"], "maps/gae": [4, 6]}}
    Store(tmp_path / "finer", finer)
    with pytest.raises(InputError, match=r"finer holds maps \[4, 6\] of 'gae', expected \[2, 3\] for tiny"):
        evaluation.evaluate(config, vit, source, tmp_path / "other", maps=[open_maps(tmp_path / "finer")])
    with pytest.raises(InputError, match="with the profile 'default', not 'reference'"):
        changed = dataclasses.replace(config, profile="reference")
        evaluation.evaluate(changed, vit, source, tmp_path / "other", maps=[stored])
    with pytest.raises(InputError, match="holds maps of tiny, not of tiny as it is here"):
        other = dataclasses.replace(vit, params=jax.tree.map(lambda a: a * 1.5, vit.params))
        evaluation.evaluate(config, other, source, tmp_path / "other", maps=[stored])
    assert not (tmp_path / "other").exists()


def test_the_commands(vit, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors", vit.module, vit.params, vit.preprocessing)

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code and "Traceback" not in result.output, result.output
        return result

    command = ("dataset", folder, "--checkpoint", checkpoint, "--out", "maps", "--methods", "gae")
    command = (*command, "--batch-size", 2, "--chunk-size", 4, "--dtype", "float32")
    result = run(*command)
    assert "10 examples, 9 done, 1 skipped, complete" in result.stdout
    assert "10 of 10 images" in result.stderr and "images/s" in result.stderr and "05-é.png" in result.stderr
    (tmp_path / "maps/logits/c/1/0").unlink()
    assert "Damaged and computed again: chunk 1" in run(*command).stderr
    for more, sentence in (
        (("--dtype", "float16"), "maps was made with dtype float32"),
        (("--methods", "gea"), "did you mean 'gae'"),
        (("--process", 1), "go with --coordinator HOST:PORT"),
        (("--coordinator", "here:1", "--processes", 2, "--process", 2), "--process from 0 to N - 1"),
    ):
        result = run(*command, *more, code=2)
        assert result.stderr.count("\n") == 1 and sentence in result.stderr
    assert "nothing does not exist" in run("dataset", "nothing", "--out", "maps", code=2).stderr
    recipe = tmp_path / "saco.py"
    recipe.write_text(
        "from tokentm_jax.configs import EvaluateConfig, rows\n"
        f"config = EvaluateConfig('saco', 'saco', {str(folder)!r}, rows('gae'), checkpoint={str(checkpoint)!r},"
        " options={'groups': 3}, batch_size=2)"
    )
    run("evaluate", recipe, "--maps", "maps", "--out", "results")
    lost = tmp_path / "maps/maps/gae/c/1/0/0"
    lost.rename(tmp_path / "lost")
    result = run("evaluate", recipe, "--maps", "maps", "--out", "none", code=2)
    assert f"gae cannot be read ({lost} does not exist): run the same `tokentm dataset`" in result.stderr
    (tmp_path / "lost").rename(lost)
    assert json.loads((tmp_path / "results/results.json").read_text())["run"]["maps"][0]["dtype"] == "float32"
    assert "holds no maps; `tokentm dataset` makes them" in run("evaluate", recipe, "--maps", "none", code=2).stderr
