"""Shards of every kind, the explainer as one object, and what stores of many shards cost to open."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax.cli.main import main
from tokentm_jax.data.examples import Example
from tokentm_jax.data.shards import find_shards, slices
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.decoding import Setup, decode_all, submit
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.job import begin, run_shard
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import open_maps, read_manifest, write_manifest

ROWS = 5  # of a shard
TEXTS = Path(__file__).parent / "goldens/texts/distilbert"


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(1)


@pytest.fixture(scope="module")
def explainer(vit):
    return Explainer(vit, methods=("gae",), dtype="float32", batch_size=2)


def encoded(i, kind="PNG", size=(30, 24)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, numbers, **more):
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            members = {f"a/{i:03}.png": encoded(i), f"a/{i:03}.cls": str(i % 5).encode(), f"a/{i:03}.pyd": b"never"}
            for name, content in {**members, **more}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_parquet(path, numbers):
    """As `datasets` writes images."""
    images = [{"bytes": encoded(i), "path": None} for i in numbers]
    pq.write_table(pa.table({"image": images, "label": [i % 5 for i in numbers]}), path)


def write_array_record(path, numbers):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for i in numbers:
        writer.write(encoded(i))
    writer.close()


WRITERS = {"tar": write_tar, "parquet": write_parquet, "array_record": write_array_record}


@pytest.fixture(scope="module")
def expected(vit):
    """Maps by the library of all images at once."""
    images = [np.asarray(Image.open(io.BytesIO(encoded(i)))) for i in range(2 * ROWS)]
    found = [vit.preprocessing.sample(Example(str(i), Image.fromarray(image))) for i, image in enumerate(images)]
    return np.asarray(tm.explain(vit, np.stack(found), "gae"))


@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_are_shards(kind, explainer, expected, tmp_path):
    for i in range(2):
        WRITERS[kind](tmp_path / f"x-{i:02}.{kind}", range(i * ROWS, (i + 1) * ROWS))
    shards = find_shards(str(tmp_path / f"x-{{00..01}}.{kind}"))
    assert shards == find_shards(str(tmp_path / f"x-*.{kind}"))
    assert [(shard.index, shard.kind, shard.rows) for shard in shards] == [(0, kind, -1), (1, kind, -1)]
    out = tmp_path / "maps"
    outcome = explain_dataset(explainer, str(tmp_path / f"x-*.{kind}"), str(out))
    assert outcome[:3] == (2, 2, []) and "reading and decoding" in outcome.limits
    found = open_maps(out)
    assert len(found) == 2 * ROWS and found.missing == 0 and not found.skipped
    np.testing.assert_allclose(found.read("gae"), expected, rtol=1e-4, atol=1e-6)
    labels = [-1] * 10 if kind == "array_record" else [i % 5 for i in range(10)]
    assert found.label[:].tolist() == labels
    key = {"tar": "a/007", "parquet": "x-01.parquet/0000002", "array_record": "x-01.array_record/0000002"}[kind]
    assert found.keys[7] == key
    # One file is another data set, and a changed one is refused by whoever reads it.
    with pytest.raises(InputError, match=r"was made with data .*x-\*.*, and this command has .*x-00"):
        explain_dataset(explainer, str(tmp_path / f"x-00.{kind}"), str(out))
    for part in out.glob("shards/*/*1-5-0.parquet"):
        part.unlink()
    WRITERS[kind](tmp_path / f"x-01.{kind}", range(3))
    with pytest.raises(InputError, match=r"has changed since the store was begun: .* were '.*' and are '.*'"):
        explain_dataset(explainer, str(tmp_path / f"x-*.{kind}"), str(out))
    assert open_maps(out).missing == 1 and not list(out.rglob("*.part"))


def test_records_of_tensorflow(explainer, expected, tmp_path):
    protocol = pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "x.array_record-00000-of-00001"), "group_size:1")
    for i in range(3):
        example = protocol.Example()
        example.features.feature["image"].bytes_list.value.append(encoded(i))
        example.features.feature["label"].int64_list.value.append(i)
        writer.write(example.SerializeToString())
    writer.write(b"\xff\xff\xff")
    writer.close()
    explain_dataset(explainer, str(tmp_path / "x.array_record-*"), str(tmp_path / "maps"))
    found = open_maps(tmp_path / "maps")
    np.testing.assert_allclose(found.read("gae")[:3], expected[:3], rtol=1e-4, atol=1e-6)
    assert found.label[:].tolist() == [0, 1, 2, -1]
    assert list(found.skipped.values()) == [
        f"{found.keys[3]} is no encoded image, and no tf.train.Example with an image"
    ]


def test_a_source_in_slices(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    source = open_source(tmp_path)
    found = slices(source, 2, str(tmp_path))
    assert [shard[:6] for shard in found] == [
        (0, str(tmp_path), "slice", 0, 2, -1),
        (1, str(tmp_path), "slice", 2, 2, -1),
        (2, str(tmp_path), "slice", 4, 1, -1),
    ]
    os.utime(tmp_path / "3.png", (1, 1))
    again = slices(open_source(tmp_path), 2, str(tmp_path))
    assert [a.identity == b.identity for a, b in zip(found, again, strict=True)] == [True, False, True]


def test_shards_that_are_none(tmp_path):
    write_tar(tmp_path / "x-0.tar", range(2))
    (tmp_path / "folder.tar").mkdir()
    for spec, sentence in (
        (tmp_path / "x-{0..2}.tar", r"x-1.tar does not exist \(2 of the 3 shards"),
        (tmp_path / "x-{2..0}.tar", "must name between 1 and 10,000,000 shards"),
        (tmp_path / "x-{0..99999999999}.tar", "must name between 1 and 10,000,000 shards"),
        (tmp_path / "y-*.tar", "names no file"),
        (tmp_path / "y.tar", "cannot be read: "),
        (tmp_path / "folder.tar", "names no file"),
        (tmp_path / "x.zip", "names no shards: their names end with .tar, .parquet or .array_record"),
        ("ftp://nowhere/x.tar", "unsupported URL scheme"),
        ("s3://", "names no shard"),
    ):
        with pytest.raises(InputError, match=sentence):
            find_shards(str(spec))


def test_damaged_and_hostile_files(explainer, tmp_path):
    """What can be read is explained; the rest is one skipped example with the reason."""
    write_tar(tmp_path / "a.tar", range(4))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: content.index(b"a/002.png") + 700])
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    write_tar(tmp_path / "c.tar", [0], **{"../../x.png": encoded(1), "b.txt": b"text", "c.json": b"{}"})
    explain_dataset(explainer, str(tmp_path / "*.tar"), str(tmp_path / "maps"))
    found = open_maps(tmp_path / "maps")
    assert [part.name for part in sorted((tmp_path / "maps/shards/00000").iterdir())] == [
        "00000000-3-1.parquet",
        "00000001-1-1.parquet",
        "00000002-4-2.parquet",
    ]
    reasons = list(found.skipped.values())
    assert reasons[0].startswith("a.tar is damaged after 2 examples: ")
    assert reasons[1].startswith("b.tar is damaged after 0 examples: ")
    assert reasons[2:] == ["b is a text, and the model takes photos", "c of c.tar has no image, sound or text"]
    assert not (tmp_path.parent.parent / "x.png").exists() and "../../x" in found.keys
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"it has no column named image, .*; it has picture"):
        explain_dataset(explainer, str(tmp_path / "d.parquet"), str(tmp_path / "none"))


# ---- the explainer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return write_checkpoint(path, vit.module, vit.params, vit.preprocessing, list("abcde"))


def test_an_explainer_is_a_function_that_pickles(vit, checkpoint, expected):
    explainer = Explainer(checkpoint=checkpoint, methods=["gae"], batch_size=4)
    images = [encoded(i) for i in range(2 * ROWS)]
    found = explainer(
        {"image": images, "label": ["b", 2, "nothing", *[None] * 7], "key": [f"k{i}" for i in range(10)]}
    )
    content = pickle.dumps(explainer)  # after it was loaded
    assert len(content) < 1000 and pickle.loads(content) == explainer
    again = pickle.loads(content)({"image": np.array(images, object)})
    np.testing.assert_array_equal(again["maps/gae"], found["maps/gae"])
    own = found["maps/gae"].astype(np.float32) * found["scale/gae"][:, None, None]
    np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-6)
    exact = dataclasses.replace(explainer, dtype="float32")({"image": images})
    np.testing.assert_allclose(exact["maps/gae"], expected, rtol=1e-5, atol=1e-7)
    assert found["label"].tolist() == [1, 2, *[-1] * 8] and found["key"][3] == "k3"
    assert (found["status"] == 1).all() and (found["prediction"] == found["logits"].argmax(1)).all()
    for i in (0, 7):  # by itself, or in a batch of another size
        one = explainer({"image": images[i : i + 1]})
        np.testing.assert_array_equal(one["maps/gae"][0], found["maps/gae"][i])
        np.testing.assert_array_equal(one["logits"][0], found["logits"][i])
    arrays = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images[:3]])
    np.testing.assert_array_equal(explainer({"image": arrays})["maps/gae"], found["maps/gae"][:3])
    mixed = explainer({"image": [images[0], b"nothing", np.zeros((4, 4), np.uint8)]})
    assert mixed["status"].tolist() == [1, 2, 2] and "known format" in mixed["reason"][1]
    assert np.isnan(mixed["maps/gae"][1:]).all() and mixed["target"][1] == -1
    nothing = explainer({"image": [b"nothing"]})
    assert {name: array.shape[1:] for name, array in nothing.items()} == {n: a.shape[1:] for n, a in found.items()}


def test_batches_that_are_none(explainer):
    for batch, sentence in (
        ({}, "must be a mapping with one of the columns image, text, audio"),
        (5, "must be a mapping"),
        ({"image": []}, "the batch is empty"),
        ({"image": [b"x"], "text": ["x"]}, "one of the columns"),
        ({"image": [b"x"], "label": [1, 2]}, "has 1 rows of 'image' and 2 of 'label'"),
    ):
        with pytest.raises(InputError, match=sentence):
            explainer(batch)


def test_logits_that_are_kept(explainer, expected, tmp_path):
    write_tar(tmp_path / "x.tar", range(ROWS))
    stores = {}
    for kept in ("all", "top5", "none"):
        explain_dataset(dataclasses.replace(explainer, logits=kept), str(tmp_path / "x.tar"), str(tmp_path / kept))
        stores[kept] = open_maps(tmp_path / kept)
        np.testing.assert_allclose(stores[kept].read("gae"), expected[:ROWS], rtol=1e-4, atol=1e-6)
    logits = stores["all"].logits[:]
    classes, best = (stores["top5"].columns[name][:] for name in ("classes/top5", "logits/top5"))
    assert classes.dtype == np.int32 and (np.diff(best) <= 0).all()
    np.testing.assert_array_equal(np.take_along_axis(logits, classes, 1), best)
    for kept in ("top5", "none"):
        with pytest.raises(InputError, match=f"was made with --logits {kept}: it does not have all logits"):
            stores[kept].logits[0]
    assert stores["none"].prediction[:].tolist() == logits.argmax(1).tolist()


def test_one_shard_by_itself_has_the_same_bytes(explainer, checkpoint, tmp_path):
    """As an engine runs it: with a fresh copy of the explainer, without the list of shards."""
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", range(i * ROWS, (i + 1) * ROWS))
        (tmp_path / "photos" / f"class{i}").mkdir(parents=True)
        (tmp_path / "photos" / f"class{i}" / "0.png").write_bytes(encoded(i))
    explainer = Explainer(checkpoint=checkpoint, methods=("gae",), batch_size=2)
    for spec in (str(tmp_path / "*.tar"), str(tmp_path / "photos")):
        with pytest.warns(UserWarning) if spec.endswith("photos") else contextlib.nullcontext():
            whole, one = tmp_path / f"whole-{len(spec)}", tmp_path / f"one-{len(spec)}"
            explain_dataset(explainer, spec, str(whole), shard_size=2)
            store, *_ = begin(explainer, spec, str(one), shard_size=2)
        for shard in reversed(store.shards):
            part = run_shard(pickle.loads(pickle.dumps(explainer)), pickle.loads(pickle.dumps(shard)), str(one))
            assert part.index == shard.index
        files = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
        assert files == {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"was made with dtype float16, and this command has float32"):
        run_shard(dataclasses.replace(explainer, dtype="float32"), store.shards[0], str(one))


def test_reading_across_shards_opens_only_what_is_needed(explainer, tmp_path):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", range(i * ROWS, (i + 1) * ROWS))
    explain_dataset(explainer, str(tmp_path / "*.tar"), str(tmp_path / "maps"))
    everything = open_maps(tmp_path / "maps").read("gae")
    for shard in (0, 3):
        (tmp_path / f"maps/shards/00000/0000000{shard}-5-0.parquet").write_bytes(b"damaged")
    found = open_maps(tmp_path / "maps")
    np.testing.assert_array_equal(found.read("gae", [14, 5, 9, 10]), everything[[14, 5, 9, 10]])
    np.testing.assert_array_equal(found.read("gae", slice(5, 15, 4)), everything[5:15:4])
    with pytest.raises(InputError, match="00000003-5-0"):
        found.read("gae", 15)


def test_export(explainer, tmp_path, monkeypatch):
    """Files with the method's own values of what is finished, and the layout of `datasets`."""
    (tmp_path / "photos").mkdir()
    for i in range(12):
        (tmp_path / f"photos/{i:02}.png").write_bytes(b"none" if i == 11 else encoded(i))
    out, photos = tmp_path / "maps", str(tmp_path / "photos")
    explain_dataset(dataclasses.replace(explainer, dtype="float16"), photos, str(out), shard_size=4)
    (out / "shards/00000/00000001-4-0.parquet").unlink()
    found = open_maps(out)
    done = np.flatnonzero(found.status[:])
    assert len(found) == 12 and len(done) == 8
    row = sum(int(np.prod(array.shape[1:])) * 4 for array in found.columns.values())
    monkeypatch.setattr("tokentm_jax.runs.export.LARGEST_FILE", 3 * row)
    for to, files in (
        ("parquet", [f"{i:05}.parquet" for i in range(4)]),
        ("huggingface", ["README.md", *(f"data/train-{i:05}.parquet" for i in range(4))]),
    ):
        assert tm.export_maps(out, tmp_path / to, to) == 4
        assert sorted(str(p.relative_to(tmp_path / to)) for p in (tmp_path / to).rglob("*.*")) == sorted(files)
        table = pa.concat_tables(pq.read_table(tmp_path / to / file) for file in files if file != "README.md")
        own = np.array(table["gae"].to_pylist(), np.float32)
        np.testing.assert_array_equal(own, found.read("gae", done))
        np.testing.assert_array_equal(np.array(table["logits"].to_pylist(), np.float32), found.logits[done])
        for name in ("key", "label", "prediction", "target", "status", "reason"):
            assert table[name].to_pylist() == found.columns[name][done].tolist()
        assert table["status"].to_pylist() == [*[1] * 7, 2]
    header, text = (tmp_path / "huggingface/README.md").read_text().split("---\n")[1:]
    assert "".join(header.split()) == "configs:-config_name:defaultdata_files:-split:trainpath:data/*.parquet"
    assert f"Maps of tiny on the folder {photos}, by gae" in text
    for name, to, sentence in (
        ("parquet", "parquet", "parquet is not empty; choose another --out"),
        ("other", "csv", "unknown format 'csv'"),
        ("maps/tokentm.json", "parquet", "is a file"),
    ):
        with pytest.raises(InputError, match=sentence):
            tm.export_maps(out, tmp_path / name, to)
    (out / "shards/00000/00000002-4-1.parquet").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"00000002-4-1\.parquet cannot be read"):
        tm.export_maps(out, tmp_path / "partly")
    assert not list((tmp_path / "partly").iterdir())
    result = CliRunner().invoke(main, ["export", str(out), "--out", str(tmp_path / "partly")])
    assert result.exit_code == 2 and "00000002-4-1.parquet cannot be read" in result.output


@pytest.mark.slow
def test_texts_are_padded_to_a_length(vit, tmp_path):
    """In shards to the most that the model takes, unless a length is given; longer texts are skipped."""
    pytest.importorskip("tokenizers")
    model, texts = tm.load(TEXTS), ["a funny film", "dull", "word " * 20]
    pq.write_table(pa.table({"text": texts, "label": [1, 0, 1]}), tmp_path / "x.parquet")
    explainer = Explainer(model, methods=["gae"], dtype="float32", batch_size=2)
    for length, maps in ((None, model.preprocessing.length), (16, 16)):
        out = tmp_path / f"maps-{length}"
        explain_dataset(dataclasses.replace(explainer, length=length), str(tmp_path / "x.parquet"), str(out))
        found = open_maps(out)
        assert found.maps["gae"].shape == (3, 1, maps)
        for i, text in enumerate(texts[:2]):
            own = tm.explain(model, model.read(text), "gae")[0]
            np.testing.assert_allclose(found.read("gae", i)[0, :16], own[:16], rtol=1e-4, atol=1e-6)
        reasons = [] if length is None else ["x.parquet/0000002 has more than 16 tokens"]
        assert [*found.skipped.values()] == reasons and found.label[:2].tolist() == [1, 0]
    batches = [texts[0], texts[1], texts[1], texts[2], " ", " "]  # of two lengths, and without any
    found = explainer({"text": batches})
    assert found["maps/gae"].shape == (6, 1, 24) and found["status"].tolist() == [1, 1, 1, 1, 2, 2]
    for i, text in enumerate(batches):
        own = np.full(24, np.nan) if i > 3 else np.pad(tm.explain(model, model.read(text), "gae")[0], (0, 8))[:24]
        np.testing.assert_allclose(found["maps/gae"][i, 0], own, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"was made with length 16, and this command has 20"):
        explain_dataset(dataclasses.replace(explainer, length=20), str(tmp_path / "x.parquet"), str(out))
    for own, sentence in (
        (dataclasses.replace(explainer, length=10_000), r"takes at most \d+ tokens, and the length is 10000"),
        (Explainer(vit, length=16), "a length is for texts, and tiny takes photos"),
    ):
        with pytest.raises(InputError, match=sentence):
            own({"text": ["x"]})


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_decoding_in_other_processes(vit, tmp_path):
    """The same pixels and reasons; a decoder that crashes loses its example only."""
    setup = Setup(vit.preprocessing, "default", None)
    (tmp_path / "p.png").write_bytes(encoded(1))
    given = [Example("a", encoded(0)), Example("b", tmp_path / "p.png"), Example("c", b"x"), Example("d", tmp_path)]
    given.append(Example("e", InputError("not there")))
    here, there = decode_all(setup, given), submit(setup, given, True).result()
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [isinstance(found, str) for found in there] == [False, False, True, True, True] and there[4] == "not there"
    crash = Crash(vit.preprocessing)
    found = submit(Setup(crash, "default", None), given[:3], True).result()
    assert found[0] == "a: its decoder crashed" and not isinstance(found[1], str)


@dataclasses.dataclass(frozen=True)
class Crash:
    """A reader whose decoder ends its process."""

    reader: object

    def levels(self, example, profile):
        if example.key == "a":
            os._exit(3)
        return self.reader.levels(example, profile)


def test_drafts_of_jpegs(vit):
    """Pixels are nearly the same, and the option is part of what is computed."""
    y, x = np.mgrid[:400, :600]
    smooth = np.stack([128 + 100 * np.sin(x / 40), 128 + 100 * np.cos(y / 30), (x + y) / 5], 2).clip(0, 255)
    file = io.BytesIO()
    Image.fromarray(smooth.astype(np.uint8)).save(file, "JPEG", quality=95)
    found = {}
    for decoding in ("exact", "draft"):
        setup = Explainer(vit, methods=["gae"], decoding=decoding).setup
        (found[decoding],) = decode_all(setup, [Example("a.jpg", file.getvalue())])
    difference = np.abs(found["exact"].astype(int) - found["draft"])
    assert 0 < difference.max() < 20 and difference.mean() < 3


# ---- a billion images -----------------------------------------------------------------------------------------------

START = """
import json, sys, time
began = time.process_time()
from tokentm_jax.runs.job import begin
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.store import open_maps
import jax
jax.local_devices()
imported = time.process_time() - began
explainer = Explainer(checkpoint=sys.argv[1], methods=["gae"])
store, *_ = begin(explainer, sys.argv[2], sys.argv[3])
todo = [shard for shard in store.shards if shard.index not in store.parts]
seconds = time.process_time() - began
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**10  # not that of its parent
memory = peak()
maps = open_maps(sys.argv[3])
opened = time.process_time() - began - seconds
print(json.dumps([len(store.shards), len(todo), len(maps), imported, seconds, opened, memory, peak() - memory]))
"""


def test_a_billion_rows_are_read_where_they_are_indexed(explainer, tmp_path):
    """A real part, and 100,000 shards that are not done yet."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        (tmp_path / f"photos/{i}.png").write_bytes(encoded(i))
    out, photos = tmp_path / "maps", str(tmp_path / "photos")
    explain_dataset(explainer, photos, str(out), shard_size=4)
    expected, place = open_maps(out).read("gae"), Place(out)
    (first,) = read_manifest(place) or ()
    more = [first._replace(index=i, first=4 + 10_000 * (i - 1), rows=10_000) for i in range(1, 100_001)]
    write_manifest(place, [first, *more])
    made = json.loads((out / "tokentm.json").read_text())
    (out / "tokentm.json").write_text(json.dumps({**made, "shards": 100_001}))
    found = open_maps(out)
    tracemalloc.start()
    assert len(found) == 10**9 + 4 and found.missing == 100_000
    assert "1000000004 examples, 4 done, 0 skipped, 100000 of 100001 shards missing" in repr(found)
    maps = found.read("gae", [3, 10**9, 0, 5 * 10**8])
    np.testing.assert_array_equal(maps[[0, 2]], expected[[3, 0]])
    assert np.isnan(maps[[1, 3]]).all() and found.key[-1] == "" and found.maps["gae"][2:5, 0].shape == (3, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.slow
def test_a_billion_images(checkpoint, tmp_path):
    """100,000 shards of 10,000 images: sparse files for the input, and empty files with the names of parts.

    Seconds are those of this process only, whatever else the machine does.
    """
    count, rows = 100_000, 10_000
    (tmp_path / "in").mkdir()
    for i in range(count):
        with open(tmp_path / f"in/{i:06}.tar", "wb") as file:
            file.truncate(1_100_000_000)
    arguments = [sys.executable, "-c", START, str(checkpoint), str(tmp_path / "in/*.tar"), str(tmp_path / "maps")]

    def start():
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shards, todo, examples, imported, seconds, opened, memory, more = json.loads(done.stdout)
        print(f"{todo} of {shards} shards to do: {seconds:.1f} s ({imported:.1f} s of imports), {memory:.0f} MiB")
        print(f"open_maps: {opened:.1f} s, {more:.0f} MiB more")
        assert shards == count and seconds < 10 and memory < 500 and opened < 10 and more < 100
        return todo, examples

    assert start() == (count, 0)
    for i in range(count // 100 * 99):
        part = tmp_path / f"maps/shards/{i // 1000:05}/{i:08}-{rows}-{i % 3}.parquet"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    assert start() == (count // 100, count // 100 * 99 * rows)
