"""Data sets from zips, folders and TensorFlow Datasets."""

import io
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from models.training.data import load_dataset
from tokentm_jax.errors import InputError


def png(value, size=(4, 6)):
    """A PNG of one grey value; size is (height, width)."""
    stream = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def zipped(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


ENTRIES = {f"{label}/{i}.png": png(10 * k + i) for k, label in enumerate(("dog", "ant", "cat")) for i in range(4)}


def check(data):
    assert data.class_names == ("ant", "cat", "dog")
    assert data.images.shape == (12, 4, 6, 3) and data.images.dtype == np.uint8
    assert data.labels.dtype == np.int32
    assert data.images[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 0, 1, 2, 3]
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_zip_and_a_folder_are_the_same(tmp_path):
    extra = {"__MACOSX/ant/._0.png": b"x", "ant/.hidden.png": b"x", "README.txt": b"x", "loose.png": b"x"}
    check(load_dataset(zipped(tmp_path / "a.zip", ENTRIES | extra)))
    check(load_dataset(str(zipped(tmp_path / "b.zip", {f"train/{k}": v for k, v in ENTRIES.items()}))))
    for name, content in (ENTRIES | extra).items():
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    check(load_dataset(tmp_path / "folder"))


def test_a_limit_takes_from_every_class(tmp_path):
    data = load_dataset(zipped(tmp_path / "a.zip", ENTRIES), limit=6)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    check(load_dataset(tmp_path / "a.zip", limit=99))
    with pytest.raises(InputError, match="greater than or equal to 1"):
        load_dataset(tmp_path / "a.zip", limit=0)


def test_names_of_a_zip_write_nothing(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    entries = {"../../evil/1.png": png(1), "/absolute/1.png": png(2), "..\\..\\win/1.png": png(3), "../1.png": png(4)}
    data = load_dataset(zipped(inside / "a.zip", entries))
    assert set(data.class_names) >= {"evil", "absolute"} and ".." not in data.class_names
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "inside"]


def test_bad_images_are_named_and_skipped(tmp_path):
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    bomb += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 9) + b"IDAT"
    bad = {"ant/cut.png": png(5)[:45], "ant/text.png": b"text", "cat/bomb.png": bomb, "dog/empty.png": b""}
    bad["dog/large.png"] = bytes(65 * 2**20)
    with pytest.warns(UserWarning, match="5 images of .* skipped: .*bomb.png has more than 100,000,000 p") as caught:
        data = load_dataset(zipped(tmp_path / "a.zip", ENTRIES | bad))
    check(data)
    assert all(name.split("/")[1] in str(caught[0].message) for name in bad)
    with warnings.catch_warnings(), pytest.raises(InputError, match="no image that can be read"):
        warnings.simplefilter("ignore")
        load_dataset(zipped(tmp_path / "b.zip", bad))


def test_a_damaged_entry(tmp_path):
    path = zipped(tmp_path / "a.zip", ENTRIES)
    content = bytearray(path.read_bytes())
    content[content.index(b"dog/0.png") + 30] ^= 0xFF  # inside the first entry's data
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="1 images .*dog/0.png"):
        assert len(load_dataset(path).labels) == 11


def test_what_is_not_a_data_set(tmp_path):
    text = tmp_path / "a.zip"
    text.write_text("no zip")
    empty = zipped(tmp_path / "empty.zip", {"readme.txt": b"x"})
    sizes = zipped(tmp_path / "sizes.zip", {"a/1.png": png(1), "b/2.png": png(2, (5, 5))})
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed/labels.csv").write_text("file,class_index\na.png,0\n")
    for spec, message in [
        (tmp_path / "listed", "no names of classes"),
        (tmp_path / "missing", "does not exist"),
        (text, "not a folder, zip of class folders"),
        (empty, "no images and no recordings"),
        (sizes, r"differing size \(6 x 4 and 5 x 5 pixels\)"),
        ("tfds:cifar10", "tfds:NAME:SPLIT"),
    ]:
        with pytest.raises(InputError, match=message):
            load_dataset(spec)


def test_tfds_not_prepared(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match="run `tfds build mnist --file_format=array_record` once"):
        load_dataset("tfds:mnist:test")
    with pytest.raises(InputError, match="no data set 'nosuchdata'"):
        load_dataset("tfds:nosuchdata:test")


def test_tfds_prepared(monkeypatch):
    """Preparing one needs TensorFlow: the builder is a stand-in with the same interface."""
    tfds = pytest.importorskip("tensorflow_datasets")
    examples = [{"image": np.full((5, 5, 1), i, np.uint8), "label": i % 2} for i in range(6)]
    features = {"image": None, "label": SimpleNamespace(names=["even", "odd"])}
    builder = SimpleNamespace(
        info=SimpleNamespace(features=features, version="1.0.0"),
        is_prepared=lambda: True,
        as_data_source=lambda split: {"train": examples}[split],
    )
    monkeypatch.setattr(tfds, "builder", lambda name, **_: builder)
    data = load_dataset("tfds:tiny:train", limit=3)
    assert data.images.shape == (3, 5, 5, 3)
    assert data.labels.tolist() == [0, 0, 0] and data.class_names == ("even", "odd")
    with pytest.raises(InputError, match="cannot be read"):
        load_dataset("tfds:tiny:nosplit")
