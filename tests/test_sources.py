"""Sources of examples for evaluations, and the batches made of them."""

import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tokentm_jax import data, inputs
from tokentm_jax.data import photos
from tokentm_jax.data.examples import Example
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.batches import batches
from tokentm_jax.inputs.images import HALF, Preprocessing
from tokentm_jax.inputs.photos import fit

MODEL = Preprocessing((4, 6), crop_pct=1.0, interpolation="bilinear", **HALF)


def photo(value, size=(4, 6)):
    """An image of one grey value; size is (height, width)."""
    return Image.fromarray(np.full((*size, 3), value, np.uint8))


def png(value, size=(4, 6)):
    stream = io.BytesIO()
    photo(value, size).save(stream, "PNG")
    return stream.getvalue()


ENTRIES = {f"{c}/{i}.png": png(10 * k + i, (4 + i, 9)) for k, c in enumerate(("dog", "ant")) for i in range(3)}


@pytest.fixture
def folder(tmp_path):
    for name, content in ENTRIES.items():
        file = tmp_path / "classes" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "classes"


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "classes.zip", "w") as stream:
        for name, content in (ENTRIES | {"__MACOSX/ant/._0.png": b"x", "README.txt": b"x"}).items():
            stream.writestr(name, content)
    return tmp_path / "classes.zip"


def mat(path, images, masks):
    """A file laid out like gtsegs_ijcv.mat."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        reference = h5py.special_dtype(ref=h5py.Reference)
        for name, arrays in (("img", images), ("gt", masks)):
            table = file.create_dataset(f"value/{name}", (len(arrays), 1), reference)
            for i, array in enumerate(arrays):
                stored = file.create_dataset(f"refs/{name}{i}", data=np.asarray(array).T)  # MATLAB's order
                if name == "gt":
                    cell = file.create_dataset(f"refs/cell{i}", (1, 1), reference)
                    cell[0, 0] = stored.ref
                    stored = cell
                table[i, 0] = stored.ref
    return path


def test_the_halves_share_nothing_and_are_all(tmp_path):
    """Whatever the limit, an image is in the same half."""
    for name in "abcde":
        (tmp_path / "x").mkdir(exist_ok=True)
        photo(0).save(tmp_path / "x" / f"{name}.png")
    everything = open_source(tmp_path).keys
    even, odd = (open_source(tmp_path, half=half).keys for half in ("even", "odd"))
    assert (even, odd) == (everything[::2], everything[1::2])
    assert set(open_source(tmp_path, limit=2, seed=3, half="odd").keys) == set(odd)
    for name in "bcde":
        (tmp_path / "x" / f"{name}.png").unlink()
    with pytest.raises(InputError, match="none at an odd position"):
        open_source(tmp_path, half="odd")
    with pytest.raises(InputError, match="the half must be 'even' or 'odd'"):
        open_source(tmp_path, half="both")


def test_class_folders_in_a_folder_and_a_zip(folder, archive):
    for source in (open_source(folder), open_source(str(archive))):
        assert source.keys == ("ant/0.png", "ant/1.png", "ant/2.png", "dog/0.png", "dog/1.png", "dog/2.png")
        assert source.class_names == ("ant", "dog") and source.labelled and not source.masked
        example = source[4]
        assert (example.key, example.label, example.mask) == ("dog/1.png", 1, None)
        assert example.content.size == (9, 5) and example.content.getpixel((0, 0)) == (1, 1, 1)
    assert open_source(folder).identity == open_source(folder, limit=2).identity != open_source(archive).identity


def test_the_identity_is_of_the_content(folder, archive, tmp_path):
    """Other content of the same size, in the middle or at the end, is another data set, whatever its kind."""

    def change(path, middle=False):
        content = bytearray(path.read_bytes())
        content[len(content) // 2 if middle else -1] ^= 1
        path.write_bytes(content)

    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "a.png").write_bytes(png(1))
    (listed / "labels.csv").write_text("file,class_index\na.png,7\nmissing.png,1\n")
    large = mat(tmp_path / "a.mat", [np.zeros((1000, 1200, 3), np.uint8)], [np.zeros((1000, 1200), np.uint8)])
    for spec, file, middle in (
        (folder, folder / "ant/0.png", False),
        (listed, listed / "a.png", False),
        (listed, listed / "labels.csv", False),
        (large, large, True),  # more than 1 MiB from both ends
    ):
        before = open_source(spec)
        assert before.identity == open_source(spec).identity and len(before.identity) == 16
        change(file, middle) if file.name != "labels.csv" else file.write_text(file.read_text().replace("7", "8"))
        assert open_source(spec).identity != before.identity, file
    before = open_source(archive).identity
    with zipfile.ZipFile(archive, "a") as stream:
        stream.writestr("ant/3.png", png(3))
    assert open_source(archive).identity != before


def test_limit_and_seed(folder):
    assert open_source(folder, limit=2).keys == ("ant/0.png", "dog/0.png")
    drawn = [open_source(folder, limit=k, seed=0).keys for k in (1, 2, 4, 6, 99)]
    assert all(larger[: len(smaller)] == smaller for smaller, larger in itertools.pairwise(drawn))
    assert sorted(drawn[-1]) == list(open_source(folder).keys) != list(drawn[-1])
    assert open_source(folder, limit=4, seed=1).keys != drawn[2]


def test_a_csv_of_labels(folder):
    table = folder / "labels.csv"
    table.write_text("file,class_index\ndog/1.png,7\nant/2.png,0\n")
    source = open_source(folder)
    assert source.keys == ("dog/1.png", "ant/2.png") and source.class_names is None
    assert [source[i].label for i in range(2)] == [7, 0]
    for content, message in (
        ("file,label\na.png,0\n", "columns 'file' and 'class_index'"),
        ("file,class_index\na.png,cat\n", "columns 'file' and 'class_index'"),
        ("file,class_index\n../a.png,1\n", "leaves the folder"),
        ("file,class_index\n", "has no examples"),
        ("", "it has nothing"),
        ("file,class_index\na.png,1_0\n", "line 2 has 'a.png,1_0'"),
        ("file,class_index\na.png,١\n", "line 2 has"),
        ("file,class_index\na.png,-1\n", "line 2 has"),
        ("file,class_index\na.png,2147483648\n", "line 2 has"),
        ("file,class_index\na.png,1\nb.png\n", "line 3 has 'b.png'"),
        ("file,class_index\na.png,1,2\n", "line 2 has 'a.png,1,2'"),
        ("file,class_index\na.png,1\n./a.png,2\n", "line 3 gives './a.png' the class 2, it was 1"),
        ("file,class_index\na.png,0\n" + "x" * 200_000, "line 3: field larger than"),
        ('file,class_index\n"a.png,0\n', "is not a CSV file"),
        (b"file,class_index\n\xff.png,0\n", "is not UTF-8 text"),
    ):
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=message) as error:
            open_source(folder)
        assert str(table) in str(error.value) or "no examples" in message
    # A byte-order mark, other columns, zeros before a number and the same row twice do no harm; a missing file is
    # skipped.
    table.write_text("\ufeffclass_index,x,file\n007,,dog/1.png\n1,,none.png\n7,,dog/1.png\n")
    source, skipped = open_source(folder), {}
    (batch,) = batches(source, MODEL, 2, skipped=skipped)
    assert (batch.keys, batch.labels.tolist()) == (("dog/1.png",), [7, 7]) and "none.png does not exist" in str(
        skipped
    )
    table.unlink()
    table.symlink_to(table)
    with pytest.raises(InputError, match=r"labels\.csv cannot be read"):
        open_source(folder)
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(InputError, match=r"labels\.csv is not a regular file"):
        open_source(folder)


def test_imagenet_segmentation_layout(tmp_path):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((5, 8), (7, 6))]
    masks = [(random.random(i.shape[:2]) < 0.5).astype(np.uint8) for i in images]
    source = open_source(mat(tmp_path / "a.mat", images, masks))
    assert len(source) == 2 and source.masked and not source.labelled
    for example, image, mask in zip(source, images, masks, strict=True):
        np.testing.assert_array_equal(example.content, image)
        np.testing.assert_array_equal(example.mask, mask)
    # A mask of another size is a corrupt record: named and skipped.
    source = open_source(mat(tmp_path / "b.mat", images, [masks[0], masks[1][:-1]]))
    skipped = {}
    (batch,) = batches(source, MODEL, 4, skipped=skipped)
    assert batch.keys == ("00000",) and "00001" in skipped and "differ in size" in skipped["00001"]
    (tmp_path / "c.mat").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match="does not have the layout of"):
        open_source(tmp_path / "c.mat")


def hostile(path, change):
    """A file of one record, and what `change(file, h5py)` makes of it."""
    h5py = pytest.importorskip("h5py")
    mat(path, [np.zeros((4, 6, 3), np.uint8)], [np.ones((4, 6), np.uint8)])
    with h5py.File(path, "r+") as file:
        change(file, h5py)
    return path


def put(kind, *arguments, **options):
    """Replaces the record's image or mask by another dataset."""

    def change(file, h5py):
        shape = dict(zip(("shape", "dtype"), arguments, strict=False))
        made = file.create_dataset("refs/other", **(shape | options))
        file[f"value/{kind}"][0, 0] = made.ref

    return change


def itself(file, h5py):
    cell = file["refs/cell0"]
    cell[0, 0] = cell.ref


def group(file, h5py):
    file["value/img"][0, 0] = file.create_group("refs/group").ref


def virtual(file, h5py):
    layout = h5py.VirtualLayout((3, 6, 4), np.uint8)
    layout[:] = h5py.VirtualSource("other.mat", "x", (3, 6, 4))
    file["value/img"][0, 0] = file.create_virtual_dataset("refs/virtual", layout).ref


def empty_space(file, h5py):
    file["value/img"][0, 0] = file.create_dataset("refs/null", data=h5py.Empty("u1")).ref


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (itself, "is not one .W, H. of numbers"),
        (group, "has no values"),
        (virtual, "in another file"),
        (empty_space, "has no values"),
        (put("img", (3, 6, 4), np.uint8, external="/etc/passwd"), "in another file"),
        (put("img", (3, 25_000, 25_000), np.uint8, fillvalue=1), "more than 300,000,000 values"),
        (
            put("img", (3, 4, 6), np.uint8, maxshape=(3, None, None), chunks=(3, 20_000, 20_000)),
            "more than 300,000,000",
        ),
        (put("img", (3, 0, 4), np.uint8), "has no values"),
        (put("img", (3, 3000, 4), np.uint8), "differ in size"),
        (put("img", (3, 6, 4), np.float32), "no image"),
        (put("gt", (25_000, 25_000), np.float64, fillvalue=1), "more than 100,000,000 values"),
        (put("gt", (6, 0), np.uint8), "has no values"),
        (put("gt", (6, 4), "S3"), "of numbers"),
        (put("gt", (6, 4), np.complex64), "of numbers"),
        (put("gt", (6, 4), np.float32, fillvalue=np.nan), "not finite"),
        (put("gt", (6, 4, 1), np.uint8), "of numbers"),
    ],
)
def test_hostile_records_of_a_mat_file(tmp_path, change, message):
    """Each is an error of that record, before anything large is read; no other file is opened."""
    source = open_source(hostile(tmp_path / "a.mat", change))
    with pytest.raises(InputError, match=f"record 00000 of .*{message}"):
        source[0]


def test_hostile_tables_of_a_mat_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    hostile(tmp_path / "other.mat", lambda file, _: None)

    def replace(name, link):
        def change(file, _):
            del file[name]
            file[name] = link

        return change

    def table(*shape):
        def change(file, _):
            del file["value/img"], file["value/gt"]
            for name in ("img", "gt"):
                file.create_dataset(f"value/{name}", shape, h5py.special_dtype(ref=h5py.Reference))

        return change

    for number, (change, message) in enumerate(
        (
            (replace("value", h5py.ExternalLink("other.mat", "value")), "value is a link"),
            (replace("value/img", h5py.ExternalLink("/dev/zero", "x")), "img is a link"),
            (replace("value", h5py.SoftLink("/value")), "value is a link"),
            (replace("value/gt", h5py.SoftLink("/value/gt")), "gt is a link"),
            (table(10**9, 1), "more than 10,000,000 values"),
            (table(0, 1), "no values"),
            (lambda file, _: file["value"].pop("gt"), "does not have the layout of"),
        )
    ):
        path = hostile(tmp_path / f"{number}.mat", change)
        with pytest.raises(InputError, match=message) as error:
            open_source(path)
        assert str(path) in str(error.value)


def test_records_are_read_by_threads(tmp_path):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(40)]
    source = open_source(mat(tmp_path / "a.mat", images, [i[..., 0] > 99 for i in images]))
    with ThreadPoolExecutor(8) as pool:
        for example, image in zip(pool.map(source.__getitem__, range(40)), images, strict=True):
            np.testing.assert_array_equal(example.content, image)
            np.testing.assert_array_equal(example.mask, image[..., 0] > 99)


def test_the_sample_of_segmentations(shared):
    source = open_source(shared / "data/segmentation_a.mat")
    example = source[0]
    assert len(source) == 33 and example.content.size == (586, 640) and example.mask.shape == (640, 586)
    assert 0.02 < example.mask.mean() < 1


def test_tfds(monkeypatch, tmp_path):
    """Preparing one needs TensorFlow: the builder is a stand-in with the same interface."""
    tfds = pytest.importorskip("tensorflow_datasets")
    examples = [{"image": np.full((5, 5, 1), i, np.uint8), "label": i % 2} for i in range(3)] + [{}]
    features = {"image": None, "label": SimpleNamespace(names=["even", "odd"])}
    builder = SimpleNamespace(
        info=SimpleNamespace(features=features, version="1.0.0"),
        is_prepared=lambda: True,
        as_data_source=lambda split: {"test": examples}[split],
    )
    with monkeypatch.context() as patch:
        patch.setattr(tfds, "builder", lambda name, **_: builder)
        source = open_source("tfds:tiny:test")
        assert source.class_names == ("even", "odd") and len(source) == 4
        assert source[1].label == 1 and source[1].content.getpixel((0, 0)) == (1, 1, 1)
        with pytest.raises(InputError, match=r"record 0000003 .* cannot be read"):
            source[3]
        with pytest.raises(InputError, match="cannot be read"):
            open_source("tfds:tiny:nosplit")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match="run `tfds build mnist --file_format=array_record` once"):
        open_source("tfds:mnist:test")


def prepared(path, images, names):
    """A data set as `tfds build` writes it; returns its builder."""
    tfds = pytest.importorskip("tensorflow_datasets")
    writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2 as protocol

    folder = path / "tiny/1.0.0"
    folder.mkdir(parents=True)
    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=names)
    tfds.features.FeaturesDict({"image": image, "label": label}).save_config(folder)
    records = writer(str(folder / "tiny-test.array_record-00000-of-00001"), "group_size:1")
    for number, content in enumerate(images):
        example = protocol.Example()
        example.features.feature["image"].bytes_list.value.append(content)
        example.features.feature["label"].int64_list.value.append(number % len(names))
        records.write(example.SerializeToString())
    records.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "test", "shardLengths": [str(len(images))], "numBytes": "1", "filepathTemplate": template}
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return tfds.builder_from_directory(folder)


def test_tfds_files(monkeypatch, tmp_path):
    """Real ones: an image is decoded by the one reader with its limits, and the identity is of the content."""
    tfds = pytest.importorskip("tensorflow_datasets")
    contents = [png(1, (4, 5)), png(2, (30, 30)), b"no image"]
    identities = []
    for number, names in enumerate((["odd", "even"], ["0", "1"])):
        contents[0] = png(number, (4, 5))
        builder = prepared(tmp_path / str(number), contents, names)
        monkeypatch.setattr(tfds, "builder", lambda name, builder=builder, **_: builder)
        source, part = open_source("tfds:tiny:test"), open_source("tfds:tiny:test[:2]")
        assert (len(source), len(part), source.class_names, source.named) == (3, 2, tuple(names), number == 0)
        assert source[0].content.getpixel((4, 3)) == (number,) * 3 and [source[i].label for i in range(2)] == [0, 1]
        identities += [source.identity, part.identity]
    assert len(set(identities)) == 4
    with pytest.raises(InputError, match=r"record 0000002 .* not an image in a known format"):
        source[2]
    monkeypatch.setattr(photos, "MAX_PIXELS", 100)
    assert source[0].label == 0
    with pytest.raises(InputError, match=r"record 0000001 .* 30 x 30 pixels, more than 100"):
        source[1]


def test_images_that_tfds_has_decoded_are_bounded(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    large = np.broadcast_to(np.uint8(0), (25_000, 25_000, 3))
    records = [{"image": large, "label": 0}, {"image": np.zeros((0, 4, 3), np.uint8), "label": 0}]
    records += [{"image": np.zeros((4, 4, 3), np.uint8), "label": 2**40}]
    builder = SimpleNamespace(
        info=SimpleNamespace(features={"image": None, "label": SimpleNamespace(names=["a"])}, version="1.0.0"),
        is_prepared=lambda: True,
        as_data_source=lambda split: records,
    )
    monkeypatch.setattr(tfds, "builder", lambda name, **_: builder)
    source = open_source("tfds:tiny:test")
    assert len(source.identity) == 16  # a builder that does not tell its files
    for i, message in enumerate(("more than 100,000,000", "empty image", "its label is 1099511627776")):
        with pytest.raises(InputError, match=f"record 000000{i} .*{message}"):
            source[i]


def test_hostile_zips(tmp_path):
    """An entry that cannot be read is an error of that entry; a directory that cannot be, of the file."""

    def made(name, change=None, **entries):
        with zipfile.ZipFile(tmp_path / name, "w") as stream:
            for key in ("ant/0.png", "ant/é.png"):
                stream.writestr(key, png(1))
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content if change is None else change(content))
        return tmp_path / name

    def directory(offset, value):
        """Sets a byte of the directory's first entry."""

        def change(content):
            place = content.index(b"PK\x01\x02") + offset
            return content[:place] + bytes([value]) + content[place + 1 :]

        return change

    for change, message in (
        (directory(6, 99), "version 9.9"),
        (lambda content: content.replace("é".encode(), b"\xc3("), "codec can't decode"),
        (lambda content: content[:-30], "not a folder, zip of class folders"),
    ):
        path = made("bad.zip", change)
        with pytest.raises(InputError, match=message) as error:
            open_source(path)
        assert str(path) in str(error.value)
    for change, message in (
        (directory(8, 1), "ant/0.png cannot be read from the zip file: .*encrypted"),
        (directory(10, 97), "neither stored nor deflated"),
        (directory(10, zipfile.ZIP_BZIP2), "neither stored nor deflated"),  # would not be bounded
        (directory(16, 1), "ant/0.png cannot be read from the zip file"),
    ):
        source, skipped = open_source(made("entry.zip", change)), {}
        (batch,) = batches(source, MODEL, 2, skipped=skipped)
        assert batch.keys == ("ant/é.png",) and re.search(message, skipped["ant/0.png"]), skipped
    assert open_source(made("nameless.zip", lambda c: c.replace(b"ant/0.png", b"\0" * 9))).keys == ("ant/é.png",)
    # Of two entries of a name the last counts, as for every program that unpacks.
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "two.zip", "w") as stream:
        for value in (1, 2):
            stream.writestr("a/x.png", png(value))
    source = open_source(tmp_path / "two.zip")
    assert source.keys == ("a/x.png",) and source[0].content.getpixel((0, 0)) == (2, 2, 2)


def test_a_zip_bomb_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources, "MAX_ENTRY", 10_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("a/bomb.png", bytes(50_000_000))
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace((50_000_000).to_bytes(4, "little"), (9).to_bytes(4, "little")))
    with pytest.raises(InputError, match=r"a/bomb\.png"):
        open_source(tmp_path / "a.zip")[0]


def test_odd_things_in_a_folder(folder):
    """Loops of links end, and what cannot be read is an error of its own."""
    (folder / "ant/loop").symlink_to(folder, target_is_directory=True)
    (folder / "dog/up").symlink_to("..")
    (folder / "ant/self.png").symlink_to("self.png")
    (folder / "ant/nowhere.png").symlink_to("gone.png")
    os.mkfifo(folder / "ant/pipe.png")
    source, skipped = open_source(folder), {}
    assert set(source.keys) == {*ENTRIES, "ant/self.png", "ant/nowhere.png", "ant/pipe.png"}
    found = [key for batch in batches(source, MODEL, 4, skipped=skipped) for key in batch.keys]
    assert set(found) == set(ENTRIES) and len(source.identity) == 16
    for name, message in (("self", "cannot be read"), ("nowhere", "does not exist"), ("pipe", "not a regular file")):
        assert message in skipped[f"ant/{name}.png"]


def test_numbers_are_checked_once(folder):
    for options in ({"limit": 0}, {"limit": True}, {"limit": 1.5}, {"seed": -1}, {"limit": "3"}):
        with pytest.raises(InputError, match=f"the {next(iter(options))} must be"):
            open_source(folder, **options)
    with pytest.raises(InputError, match="the batch size must be"):
        next(batches(open_source(folder), MODEL, 0))


def test_decoding_shares_its_memory(tmp_path, monkeypatch):
    """However many threads, no more photos are decoded and cut at a time than the memory allows."""
    (tmp_path / "a").mkdir()
    for i in range(12):
        photo(i, (40, 50)).save(tmp_path / f"a/{i:02}.png")
    running, most, lock = 0, 0, threading.Lock()

    def slow(*arguments):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return fit(*arguments)

    monkeypatch.setattr(inputs.photos, "fit", slow)
    for memory, allowed in ((2**30, inputs.batches.WORKERS), (2 * 40 * 50 * photos.PIXEL, 2), (1, 1)):
        most = 0
        monkeypatch.setattr(photos, "MEMORY", memory)
        keys = [key for batch in batches(open_source(tmp_path), MODEL, 5) for key in batch.keys]
        assert len(keys) == 12 and most <= allowed and (allowed < 4 or most > 1)


@pytest.mark.slow
def test_the_largest_photos_take_a_gigabyte(tmp_path):
    """Float TIFFs just below the limit of pixels, which took 2.5 GB each in four threads, in a process of its own."""
    (tmp_path / "a").mkdir()
    Image.new("F", (9990, 9990), 0.5).save(tmp_path / "a/0.tif", compression="tiff_deflate")
    Image.new("RGBA", (9990, 9990), (1, 2, 3, 4)).save(tmp_path / "a/1.png")
    for i in range(2, 4):
        (tmp_path / f"a/{i}.tif").symlink_to("0.tif")
    program = (
        "import sys\n"
        "from tokentm_jax.inputs.images import HALF, Preprocessing\n"
        "from tokentm_jax.data.sources import open_source\n"
        "from tokentm_jax.inputs.batches import batches\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 2**20\n"
        "before = peak()\n"
        "found = list(batches(open_source(sys.argv[1]), Preprocessing((32, 32), **HALF), 4))\n"
        "print(len(found[0].keys), peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    count, gigabytes = done.stdout.split()
    assert int(count) == 4 and float(gigabytes) < 1.2


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.zip").write_bytes(b"no zip")
    for spec, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "empty", "no images and no recordings"),
        (tmp_path / "file.zip", "not a folder, zip of class folders"),
        ("tfds:cifar10", "tfds:NAME:SPLIT"),
        ("", "is empty"),
        ("nul\0.zip", "NUL"),
        ("x" * 300, "cannot be read"),
        ("/dev/zero", "not a regular file"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(spec)
    with pytest.raises(InputError, match="greater than or equal to 1"):
        open_source(tmp_path, limit=0)


def test_batches_keep_order_and_are_full(folder):
    source = open_source(folder)
    found = list(batches(source, MODEL, 4))
    assert [batch.keys for batch in found] == [source.keys[:4], source.keys[4:]]
    for batch in found:
        assert batch.inputs.shape == (4, 4, 6, 3) and batch.inputs.dtype == np.uint8 and batch.masks is None
    assert found[0].inputs[:, 0, 0, 0].tolist() == [10, 11, 12, 0]
    assert found[1].inputs[:, 0, 0, 0].tolist() == [1, 2, 2, 2]
    assert found[1].labels.tolist() == [1, 1, 1, 1]
    (some,) = batches(source, MODEL, 4, indices=[5, 0])
    assert some.keys == ("dog/2.png", "ant/0.png")
    assert list(batches(source, MODEL, 4, indices=[])) == []
    with pytest.raises(InputError, match="did you mean 'reference'"):
        next(batches(source, MODEL, 4, "referense"))


def test_corrupt_records_are_named_and_skipped(folder):
    (folder / "ant/1.png").write_bytes(b"\x89PNG no more")
    source, skipped = open_source(folder), {}
    found = list(batches(source, MODEL, 2, skipped=skipped))
    assert [len(batch.keys) for batch in found] == [1, 2, 2]
    assert list(skipped) == ["ant/1.png"] and "ant/1.png" in skipped["ant/1.png"]
    for name in ENTRIES:
        (folder / name).write_bytes(b"")
    assert [batch.keys for batch in batches(open_source(folder), MODEL, 3)] == [(), ()]


def test_a_mask_is_cut_like_its_image():
    """The image is its own mask, in white: both profiles must keep them together, whatever the shapes."""
    for height, width in ((40, 40), (30, 70), (70, 30)):
        mask = np.zeros((height, width), bool)
        mask[5 : height // 2, width // 3 : -8] = True
        example = Example("x", Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, 2)), None, mask)
        for profile in ("default", "reference"):
            for size in ((16, 16), (12, 20)):
                pixels, cut = dataclasses.replace(MODEL, size=size, crop_pct=0.8).levels(example, profile)
                assert pixels.shape == (*size, 3) and cut.shape == size and cut.dtype == bool
                # Nearest and bilinear differ at the edge only.
                assert ((pixels[..., 0] > 127) != cut).mean() < 0.1
                if profile == "reference":
                    assert abs(cut.mean() - mask.mean()) < 0.06
    with pytest.raises(InputError, match="differ in size"):
        MODEL.levels(Example("x", photo(0, (5, 5)), None, np.zeros((5, 4), bool)), "default")
