"""A data set's maps: what is stored, what is found damaged, what is refused, and how it is read back."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
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
from tokentm_jax.runs import evaluate as evaluation
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.explainer import Explainer, scaled
from tokentm_jax.runs.job import begin
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import PartWriter, open_maps

COUNT = 10  # with one that is damaged
SIZE = 4
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(1)


@pytest.fixture(scope="module")
def explainer(vit):
    return Explainer(vit, methods=("gae", "input_gradient"), dtype="float32", batch_size=2)


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
def whole(explainer, source, tmp_path_factory):
    """A store that was written without interruption."""
    out = tmp_path_factory.mktemp("whole") / "maps"
    assert filled(explainer, source, out) == (3, 3, [])
    return out


def filled(explainer, source, out, *arguments, **named):
    """`explain_dataset` in shards of four images, without the sentence about its speed."""
    return explain_dataset(explainer, source, str(out), *arguments, shard_size=SIZE, **named)[:3]


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_the_store_holds_what_the_library_computes(whole, vit, source):
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
    assert made["data"]["identity"] == source.stamped() and made["model"]["identity"] == vit.described()["identity"]
    assert {"jax", "tokentm_jax"} <= set(made["versions"]) and "0x" not in json.dumps(made)
    assert "10 examples, 9 done, 1 skipped, complete" in repr(found)
    assert sorted(content(whole)) == [
        "keys.parquet",
        "manifest.parquet",
        "shards/00000/00000000-4-0.parquet",
        "shards/00000/00000001-4-1.parquet",
        "shards/00000/00000002-2-0.parquet",
        "tokentm.json",
    ]
    table = pq.read_table(whole / "shards/00000/00000001-4-1.parquet")  # what any reader of Parquet needs
    assert table["key"].to_pylist() == list(source.keys[4:8]) and table["label"].to_pylist() == [4, -1, 1, 2]
    flat = np.array(table["maps/gae"].combine_chunks().storage.to_pylist(), np.float32)
    np.testing.assert_array_equal(flat, found.maps["gae"][4:8].reshape(4, 6))
    for file in (whole / "shards").rglob("*.parquet"):
        column = pq.ParquetFile(file).metadata.row_group(0).column(0)
        assert column.compression == "ZSTD" and not column.is_stats_set


def test_arrays_are_indexed_like_numpys(whole):
    array = open_maps(whole).maps["input_gradient"]
    everything = np.asarray(array)
    for index in (3, -1, slice(2, 9, 3), [7, 0, 7], np.arange(COUNT) % 2 == 0, (slice(1, 3), 4), (2, 3, 4), ...):
        np.testing.assert_array_equal(array[index], everything[index])
    np.testing.assert_array_equal(array[2, ..., 1], everything[2, ..., 1])
    with pytest.raises(IndexError):
        array[COUNT]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_an_interrupted_job_goes_on(whole, explainer, source, tmp_path, processes):
    """Stopped after its first batches, then finished by another number of processes, one after the other."""

    def stop(done, total, skipped):
        assert total == COUNT
        if done >= 8:
            raise KeyboardInterrupt

    out = tmp_path / "maps"
    with pytest.raises(KeyboardInterrupt):
        filled(explainer, source, out, stop)
    partly = open_maps(out)
    assert 1 <= partly.missing <= 2 and f"{partly.missing} of 3 shards missing" in repr(partly)
    first = 4 * (3 - partly.missing)
    assert partly.keys[first:] == ("",) * (COUNT - first) and not list(out.rglob("*.part"))
    before, seen = times(out), []
    for process in range(processes):
        report = lambda *progress: seen.append(progress)  # noqa: E731
        filled(explainer, source, out, report, process=process, processes=processes)
    assert content(out) == content(whole)
    assert times(out).items() >= before.items()
    if processes == 1:
        assert seen[0] == (first, 10, 0) and seen[-1] == (10, 10, int(first == 4))
    explain_dataset(explainer, source, str(out))  # the size of shards is that of the store
    with pytest.raises(InputError, match="was made with shard_size 4, and this command has 8"):
        explain_dataset(explainer, source, str(out), shard_size=8)


def test_a_part_without_one_of_its_batches_never_appears(explainer, source, tmp_path, monkeypatch):
    """The disk is full for the first batch of a shard, and no longer for the second one."""
    monkeypatch.setattr("tokentm_jax.runs.store.GROUP", 2)
    store, explainer, _ = begin(explainer, source, str(tmp_path / "maps"), shard_size=4)
    columns = explainer({"image": np.zeros((2, 16, 24, 3), np.uint8)})
    writer = PartWriter(store, store.shards[0])
    with monkeypatch.context() as patched:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
        with pytest.raises(InputError, match="No space left"):
            writer.write(columns)
    for call in (lambda: writer.write(columns), writer.finish):
        with pytest.raises(InputError, match="shard 0 lacks a batch that could not be written"):
            call()
    assert not [*(tmp_path / "maps/shards").rglob("*.*")]


def part(folder, shard):
    return next((folder / "shards/00000").glob(f"{shard:08}-*.parquet"))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:900])


def empty(file):
    file.write_bytes(b"")


def swap(file):
    """The part of another shard."""
    shutil.copy(next(other for other in sorted(file.parent.iterdir()) if other != file), file)


def wait_forever(file):
    file.unlink()
    os.mkfifo(file)


def occupy(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "shards"),
    [(flip, [0]), (flip, [2]), (cut, [1, 2]), (empty, [1]), (swap, [1]), (swap, [0]), (wait_forever, [0, 2])],
)
def test_damage_is_told_where_it_is_read_and_computed_again(whole, explainer, source, tmp_path, damage, shards):
    out, good = tmp_path / "maps", open_maps(whole)
    shutil.copytree(whole, out)
    before = times(out)
    for shard in shards:
        damage(part(out, shard))
    found = open_maps(out)
    for shard in shards:
        row = 4 * shard + 1
        sentence = (
            rf"{part(out, shard)} cannot be read \(.*\): run the same `tokentm dataset` command again with --verify"
        )
        with pytest.raises(InputError, match=sentence):
            [column[row] for column in found.columns.values()]
        with pytest.raises(InputError, match="and it is computed again"):
            [(found.read(method, [row]), found.logits[row]) for method in found.maps]
    others = [i for i in range(COUNT) if i // 4 not in shards]  # what is whole is read all the same
    np.testing.assert_array_equal(found.read("gae", others), good.read("gae", others))
    np.testing.assert_array_equal(found.logits[others], good.logits[others])
    assert filled(explainer, source, out) == (3, 0, [])  # parts are not read to resume
    assert filled(explainer, source, out, verify=True) == (3, len(shards), sorted(shards))
    assert content(out) == content(whole)
    kept = {name: time for name, time in before.items() if not any(f"/{shard:08}-" in name for shard in shards)}
    assert times(out).items() >= kept.items()


def test_no_bit_of_a_part_changes_silently(whole, tmp_path):
    """Each byte of a part altered, one at a time: an error, or the same values."""
    out, good = tmp_path / "maps", open_maps(whole)
    shutil.copytree(whole, out)
    file = part(out, 2)
    before, told = file.read_bytes(), 0
    expected = {name: column[8:10] for name, column in good.columns.items()}
    for place in range(0, len(before), 13):
        file.write_bytes(before[:place] + bytes([before[place] ^ (1 << place % 8)]) + before[place + 1 :])
        try:
            found = open_maps(out)
            for name, column in found.columns.items():
                np.testing.assert_array_equal(column[8:10], expected[name], err_msg=f"{name}, byte {place}")
        except InputError:
            told += 1
    assert told > 0.8 * len(range(0, len(before), 13))


def test_what_is_not_done_has_fill_values(whole, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    part(out, 1).unlink()
    found, good = open_maps(out), open_maps(whole)
    assert found.missing == 1 and "1 of 3 shards missing" in repr(found)
    assert found.keys == (*good.keys[:4], "", "", "", "", *good.keys[8:]) and found.skipped == {}
    assert np.isnan(found.read("gae")[4:8]).all() and np.isnan(found.logits[6]).all() and found.target[7] == -1
    np.testing.assert_array_equal(found.read("gae", [9, 5, 1])[[0, 2]], good.read("gae", [9, 1]))
    assert found.find("gae", {}, [(good.keys[4], None), (good.keys[8], None)])[0] == [1]


def test_strangers_files_are_not_touched(whole, explainer, source, tmp_path):
    for name in ("0.parquet", "00000/00000001-4.parquet", "00001/00000001-4-1.parquet", "00000/00000007-4-0.parquet"):
        out = tmp_path / name.replace("/", "-")
        shutil.copytree(whole, out)
        stranger = out / "shards" / name
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("mine")
        with pytest.raises(InputError, match=f"{name} is no part of this store; remove it, or choose another --out"):
            filled(explainer, source, out)
        assert stranger.read_text() == "mine"
    (tmp_path / "manifest.parquet").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no maps; choose another --out"):
        filled(explainer, source, tmp_path)
    assert (tmp_path / "manifest.parquet").read_text() == "mine"
    with pytest.raises(InputError, match=r"is a zarr store .*, which is read only; choose another --out"):
        filled(explainer, source, GOLDENS / "zarr_store")


def change(folder, edit):
    """Edit tokentm.json."""
    file = folder / "tokentm.json"
    made = json.loads(file.read_text())
    edit(made)
    file.write_text(json.dumps(made))


def test_a_provenance_is_not_taken_on_trust(whole, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    file = out / "tokentm.json"
    before = file.read_bytes()
    made = json.loads(before)
    columns = made["columns"]
    for changed, sentence in (
        ({"format": None}, "holds no maps of `tokentm dataset`: its tokentm.json has something else"),
        ({"format": 4}, "has the layout 4, and this version has 3: make it again"),
        ({"format": [[]]}, "has the layout of another kind"),
        ({"batch_size": "2"}, "'batch_size' must be a valid integer"),
        ({"shards": -1}, "'shards' must be greater"),
        ({"shards": 4}, "manifest.parquet is missing, or of another store"),
        ({"methods": ["../../x", "gae"]}, "'methods'.0. is wrong .*pattern"),
        ({"methods": "gae"}, "'methods' must be a valid list"),
        ({"methods": []}, "'methods' is wrong"),
        ({"methods": ["gae", "gae"]}, "'columns' must be those of"),
        ({"dtype": "object"}, "'dtype' must be 'float32' or 'float16'"),
        ({"logits": "some"}, "'logits' must be 'all', 'top5' or 'none'"),
        ({"logits": "none"}, "'columns' must be those of"),
        ({"options": {"a": [1]}}, "'options'.'a'"),
        ({"model": []}, "'model.name' is missing"),
        ({"model": {"name": 1, "identity": ""}}, "'model.name' must be a valid string"),
        ({"versions": None}, "'versions' is missing"),
        ({"columns": {**columns, "maps/lrp": columns["maps/gae"]}}, "'columns' must be those of"),
        ({"columns": {**columns, "maps/gae": {"shape": [2], "dtype": "float32"}}}, "'columns' must be those of"),
        ({"columns": {**columns, "maps/gae": {"shape": [2, 0], "dtype": "float32"}}}, "'columns'"),
        ({"columns": {**columns, "maps/gae": {"shape": [2, 3]}}}, "'columns'.* lacks 'dtype'"),
        ({"methods": ["gae", "lrp"]}, "'columns' must be those of"),
    ):
        edited = {name: value for name, value in {**made, **changed}.items() if value is not None}
        file.write_text(json.dumps(edited))
        with pytest.raises(InputError, match=sentence):
            open_maps(out)
    for changed in (
        {"columns": {**columns, "maps/gae": {"shape": [2, 4], "dtype": "float32"}}},
        {"explainer": "another"},
    ):
        file.write_text(json.dumps({**made, **changed}))
        with pytest.raises(
            InputError, match=r"cannot be read \((its columns are not|it is the part of another shard)"
        ):
            open_maps(out).maps["gae"][0]
    for bad, sentence in (
        (b"", "tokentm.json is not valid JSON"),
        (b"{", "tokentm.json is not valid JSON"),
        (b"null", "its tokentm.json has something else"),
        (b"\xff\xfe", "tokentm.json is not valid JSON"),
        (b"[" * 10**6, "tokentm.json is not valid JSON.*recursion"),
        (b" " * (2**24 + 1), "tokentm.json is larger than 16 MiB"),
    ):
        file.write_bytes(bad)
        with pytest.raises(InputError, match=sentence):
            open_maps(out)
    for edit, sentence in ((wait_forever, "tokentm.json is not a regular file"), (occupy, "tokentm.json is a folder")):
        edit(file)
        with pytest.raises(InputError, match=sentence):
            open_maps(out)
        file.rename(tmp_path / edit.__name__)
        file.touch()
    file.write_bytes(before)
    for damage in (flip, cut, empty, wait_forever):
        manifest = out / "manifest.parquet"
        damage(manifest)
        with pytest.raises(InputError, match=r"manifest\.parquet"):
            open_maps(out).status[:]
        manifest.unlink()
        shutil.copy(whole / "manifest.parquet", manifest)


def test_a_manifest_that_is_lost_is_made_again(whole, explainer, source, tmp_path):
    """As after a kill between the files of a start."""
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    for names in (("manifest.parquet", "keys.parquet"), ("manifest.parquet",)):
        for name in names:
            (out / name).unlink()
        assert filled(explainer, source, out) == (3, 0, [])
        assert content(out) == content(whole)


def test_where_a_store_can_be(folder, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, sentence in (
        ("", "a store of maps must be a name that a file can have, got ''"),
        ("ftp://localhost:1/maps", "unsupported URL scheme: a store is a path, or a URL of s3://, gs://"),
        (f"simplecache::file://{tmp_path}/a", "unsupported URL scheme"),
        ("gs://x", "cannot be (opened|read): "),
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
        if "no maps" not in sentence and path != "gs://x":  # what can be made
            with pytest.raises(InputError, match=sentence):
                Place(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop"]


def test_leftovers_of_killed_writers_go(whole, explainer, source, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    part(out, 1).rename(out / "shards/00000/.00000001.0123.part")
    (out / ".manifest.parquet.0123.part").write_bytes(b"half")
    (out / "manifest.parquet").unlink()
    assert filled(explainer, source, out) == (3, 1, [])
    assert content(out) == content(whole)


def test_a_store_of_a_version_without_mixed_precision_goes_on(whole, explainer, source, tmp_path):
    shutil.copytree(whole, out := tmp_path / "maps")
    made = json.loads((out / "tokentm.json").read_text())
    assert made.pop("mixed_precision") is False
    (out / "tokentm.json").write_text(json.dumps(made))
    assert filled(explainer, source, out) == (3, 0, [])
    with pytest.raises(InputError, match="was made with mixed_precision false"):
        filled(dataclasses.replace(explainer, mixed_precision=True), source, out)


def test_only_the_same_job_goes_on(whole, vit, explainer, source, folder, tmp_path):
    before = times(whole)
    other = dataclasses.replace(vit, params=jax.tree.map(lambda a: a * 1.5, vit.params))
    changed = dataclasses.replace(source, stamp=lambda keys: "other")
    for what, model, data in (
        (r"model tiny \(.*\), and this command has tiny \(", other, source),
        (r"data the folder .* \(.*\), and this command has .* \(other\)", vit, changed),
        ("examples 10, and this command has 4", vit, open_source(folder, limit=4)),
        ("keys .*, and this command has", vit, dataclasses.replace(source, keys=source.keys[::-1])),
    ):
        with pytest.raises(InputError, match=f"was made with {what}.*choose another --out"):
            filled(dataclasses.replace(explainer, model=model), data, whole)
    for what, change in (
        (r'methods \["gae", "input_gradient"\], and this command has \["gae"\];', {"methods": ["gae"]}),
        ("target predicted", {"target": "label"}),
        ("dtype float32", {"dtype": "float16"}),
        ("profile default", {"profile": "reference"}),
        ("batch_size 2", {"batch_size": 4}),
        ("logits all", {"logits": "top5"}),
        ("decoding exact", {"decoding": "draft"}),
        ("mixed_precision false", {"mixed_precision": True}),
    ):
        with pytest.raises(InputError, match=f"was made with {what}.*choose another --out"):
            filled(dataclasses.replace(explainer, **change), source, whole)
    assert times(whole) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokentm.json").write_text("{}")
    for out, sentence in (
        (folder, "is not empty and holds no maps"),
        (folder / "labels.csv", "is a file"),
        (tmp_path / "other", "holds no maps of `tokentm dataset`"),
        ("nonsense://maps", "unsupported URL scheme"),
        (whole / "shards", "is not empty and holds no maps"),
    ):
        names = sorted(p.name for p in folder.iterdir())
        with pytest.raises(InputError, match=sentence):
            filled(explainer, source, out)
        assert sorted(p.name for p in folder.iterdir()) == names


def test_photos_that_change_are_detected(explainer, folder, tmp_path):
    """At a start of one process, which lists them; else by the shard that has them."""
    photos, out = tmp_path / "photos", tmp_path / "maps"
    shutil.copytree(folder, photos)
    filled(explainer, str(photos), out, process=0, processes=3)
    assert open_maps(out).missing == 2
    shutil.copy(photos / "08-é.png", photos / "09-é.png")
    with pytest.raises(InputError, match=r"was made with data .*choose another --out"):
        filled(explainer, str(photos), out)
    filled(explainer, str(photos), out, process=1, processes=3)
    with pytest.raises(InputError, match=r"photos has changed since the store was begun; choose another --out"):
        filled(explainer, str(photos), out, process=2, processes=3)
    with pytest.raises(InputError, match=f"was made with data {photos}, and this command has {folder}"):
        filled(explainer, str(folder), out, process=2, processes=3)


def test_bad_settings_are_named_before_anything_is_written(explainer, source, tmp_path):
    unlabelled = dataclasses.replace(source, labelled=False)
    for sentence, change, size, data in (
        ("unknown method 'gea'; did you mean 'gae'", {"methods": ["gea"]}, 4, source),
        ("must be different ones, got gae,gae", {"methods": ["gae", "gae"]}, 4, source),
        ("must be different ones, got none", {"methods": []}, 4, source),
        ("unknown option 'fnf' of the method 'gae'", {"methods": ["gae"], "options": {"fnf": 1}}, 4, source),
        ("unknown dtype 'float61'; did you mean 'float16'", {"dtype": "float61"}, 4, source),
        ("unknown target", {"target": "x"}, 4, source),
        ("unknown choice of logits 'top'", {"logits": "top"}, 4, source),
        ("unknown decoding", {"decoding": "fast"}, 4, source),
        ("a multiple of the batch size up to 1048576, got 5 and 2", {}, 5, source),
        ("a multiple of the batch size up to 1048576, got 320000000000", {}, 320_000_000_000, source),
        ("a multiple of the batch size up to 1048576, got 0", {}, 0, source),
        ("'batch_size' must be less than or equal to 4096", {"batch_size": 5000}, 5000, source),
        ("'batch_size' must be greater than or equal to 1, got 0", {"batch_size": 0}, 4, source),
        ("'methods' ", {"methods": "gae"}, 4, source),
        ("'options' must be", {"options": ["fnf"]}, 4, source),
        ("has no labels to explain", {"target": "label"}, 4, unlabelled),
        ("'model' must be an instance of Model or a valid string", {"model": 3}, 4, source),
    ):
        with pytest.raises(InputError, match=sentence):
            changed = dataclasses.replace(explainer, **change)
            explain_dataset(changed, data, str(tmp_path / "maps"), shard_size=size)
    assert not (tmp_path / "maps").exists()


def test_a_disk_that_cannot_be_written(whole, explainer, source, tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    file = part(out, 1)
    file.unlink()
    before = times(out)
    shutil.move(out / "shards", tmp_path / "shards")
    (out / "shards").touch()  # stands where the folder is to be made
    with pytest.raises(InputError, match=r"Not a directory"):
        filled(explainer, source, out)
    (out / "shards").unlink()
    shutil.move(tmp_path / "shards", out / "shards")
    file.mkdir()  # stands where the part is to be moved
    (file / "mine").touch()
    with pytest.raises(
        InputError, match=r"no part of this store|cannot be written: .*; what was finished is kept, and"
    ):
        filled(explainer, source, out)
    shutil.rmtree(file)
    assert filled(explainer, source, out) == (3, 1, [])
    assert content(out) == content(whole) and times(out).items() >= before.items()


def test_no_map_is_damaged_without_a_word(vit, source, monkeypatch):
    """Maps far outside float16's range keep their digits; those that are not finite are skipped with a reason."""
    factors = jnp.array([[1e9], [3e-12], [0.0], [jnp.nan]])

    def program(maps_of):
        def fake(params, pixels, target):
            logits = jnp.ones((len(pixels), vit.module.num_classes))
            return {"gae": maps_of(pixels)}, {"logits": logits, "target": jnp.zeros(len(pixels), jnp.int32)}

        return property(lambda self: jax.jit(fake))

    def times_factors(pixels):
        values = pixels.reshape(len(pixels), -1)[:, :6].astype(jnp.float32) + 1
        return (values * factors[: len(pixels)]).reshape(-1, 2, 3)

    monkeypatch.setattr(Explainer, "program", program(times_factors))
    explainer = Explainer(vit, methods=("gae",), batch_size=4)
    four = dataclasses.replace(source, keys=source.keys[:4])
    filled(explainer, four, "memory://range")
    found = open_maps("memory://range")
    (batch,) = batches(four, vit.preprocessing, 4)
    exact = (batch.inputs.reshape(4, -1)[:, :6].astype(np.float64) + 1).reshape(4, 2, 3)
    maps = found.read("gae")
    assert found.maps["gae"].dtype == np.float16
    np.testing.assert_allclose(maps[0], exact[0] * 1e9, rtol=2**-11)
    np.testing.assert_allclose(maps[1], exact[1] * 3e-12, rtol=2**-11)
    assert (maps[2] == 0).all() and np.isnan(maps[3]).all()
    assert found.skipped == {"03-é.png": "gae gives no finite map"}
    monkeypatch.setattr(Explainer, "program", program(lambda pixels: jnp.ones((len(pixels), 2, 3))))
    assert filled(explainer, four, "memory://range") == (1, 0, [])
    assert filled(explainer, four, "memory://range", retry_skipped=True) == (1, 1, [])
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


def test_keys_keep_any_file_name(vit, folder, tmp_path):
    names = ["a b.png", "é" * 40 + ".png", "bad\udcff.png"]
    for name in names:
        shutil.copy(folder / "00-é.png", tmp_path / name)
    source = open_source(tmp_path)
    explain_dataset(Explainer(vit, methods=["rollout"]), source, str(tmp_path / "maps"))
    assert open_maps(tmp_path / "maps").keys == source.keys == tuple(sorted(names))


def test_labels_are_explained_where_the_model_knows_them(vit, source):
    explainer = Explainer(vit, methods=("gae",), target="label", batch_size=2)
    more = lambda key: source.read(key)._replace(label=7 if key == source.keys[1] else 3)  # noqa: E731
    filled(explainer, dataclasses.replace(source, keys=source.keys[:4], fetch=more), "memory://labels")
    found = open_maps("memory://labels")
    assert found.target[:].tolist() == found.label[:].tolist() == [3, -1, 3, 3]
    assert found.skipped == {source.keys[1]: "its label is no class of the model"}
    named = dataclasses.replace(source, keys=source.keys[:4], class_names=tuple("abcde"))
    with pytest.raises(InputError, match="5 classes, tiny has 5"):
        filled(explainer, named, "memory://named")
    explainer = dataclasses.replace(explainer, target="predicted")
    with pytest.warns(UserWarning, match="does not know 5 of its 5 classes: 'a', 'b'"):
        filled(explainer, named, "memory://named")
    assert (open_maps("memory://named").label[:] == -1).all()


def test_an_evaluation_takes_maps_from_a_store(whole, vit, source, folder, tmp_path, monkeypatch):
    config = EvaluateConfig("tiny", "saco", str(folder), rows("gae", "rollout"), options={"groups": 3}, batch_size=2)
    plain = evaluation.evaluate(config, vit, source, tmp_path / "plain")
    computed = []
    maps = evaluation.Programs.maps

    def counted(self, rows, keys, *arrays):
        computed.extend(row.name for row in rows)
        return maps(self, rows, keys, *arrays)

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
    shutil.copytree(whole, tmp_path / "finer")
    change(tmp_path / "finer", lambda made: made["columns"]["maps/gae"].update(shape=[4, 6]))
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
    assert "This run waited for " in result.stderr and "This run" not in run(*command).stderr
    cut(part(tmp_path / "maps", 1))
    assert "Damaged and computed again: shard 1" in run(*command, "--verify").stderr
    for more, sentence in (
        (("--dtype", "float16"), "maps was made with dtype float32"),
        (("--methods", "gea"), "did you mean 'gae'"),
        (("--process", 1), "--processes N and --process I are now --shard I/N"),
        (("--processes", 2, "--process", 2), "--shard must be I/N with I from 0 to N - 1, got '2/2'"),
        (("--shard", "1"), "--shard must be I/N"),
        (("--shard", "auto"), "--shard auto found no array of jobs"),
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
    damaged = part(tmp_path / "maps", 1)
    before = damaged.read_bytes()
    cut(damaged)
    result = run("evaluate", recipe, "--maps", "maps", "--out", "none", code=2)
    assert f"{damaged.relative_to(tmp_path)} cannot be read (" in result.stderr and "--verify" in result.stderr
    damaged.write_bytes(before)
    assert json.loads((tmp_path / "results/results.json").read_text())["run"]["maps"][0]["dtype"] == "float32"
    assert "holds no maps; `tokentm dataset` makes them" in run("evaluate", recipe, "--maps", "none", code=2).stderr
