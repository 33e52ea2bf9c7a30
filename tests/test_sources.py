"""Sources of examples for evaluations, and the batches made of them."""

import dataclasses
import io
import itertools
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tokentm_jax.data.preprocessing import HALF, Preprocessing
from tokentm_jax.data.sources import Example, batches, open_source, prepare
from tokentm_jax.errors import InputError

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


def test_class_folders_in_a_folder_and_a_zip(folder, archive):
    for source in (open_source(folder), open_source(str(archive))):
        assert source.keys == ("ant/0.png", "ant/1.png", "ant/2.png", "dog/0.png", "dog/1.png", "dog/2.png")
        assert source.class_names == ("ant", "dog") and source.labelled and not source.masked
        example = source[4]
        assert (example.key, example.label, example.mask) == ("dog/1.png", 1, None)
        assert example.image.size == (9, 5) and example.image.getpixel((0, 0)) == (1, 1, 1)
    # Other content is another data set; a part of it is not.
    assert open_source(folder).identity == open_source(folder, limit=2).identity
    (folder / "ant/0.png").write_bytes(png(0, (40, 50)))
    assert open_source(folder).identity != open_source(archive).identity


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
        ("file,class_index\n", "holds no examples"),
    ):
        table.write_text(content)
        with pytest.raises(InputError, match=message):
            open_source(folder)


def test_imagenet_segmentation_layout(tmp_path):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((5, 8), (7, 6))]
    masks = [(random.random(i.shape[:2]) < 0.5).astype(np.uint8) for i in images]
    source = open_source(mat(tmp_path / "a.mat", images, masks))
    assert len(source) == 2 and source.masked and not source.labelled
    for example, image, mask in zip(source, images, masks, strict=True):
        np.testing.assert_array_equal(example.image, image)
        np.testing.assert_array_equal(example.mask, mask)
    # A mask of another size is a corrupt record: named and skipped.
    source = open_source(mat(tmp_path / "b.mat", images, [masks[0], masks[1][:-1]]))
    skipped = {}
    (batch,) = batches(source, MODEL, 4, skipped=skipped)
    assert batch.keys == ("00000",) and "00001" in skipped and "differ in size" in skipped["00001"]
    (tmp_path / "c.mat").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match="not laid out like"):
        open_source(tmp_path / "c.mat")


def test_the_sample_of_segmentations(shared):
    source = open_source(shared / "data/segmentation_a.mat")
    example = source[0]
    assert len(source) == 33 and example.image.size == (586, 640) and example.mask.shape == (640, 586)
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
        assert source[1].label == 1 and source[1].image.getpixel((0, 0)) == (1, 1, 1)
        with pytest.raises(InputError, match=r"record 0000003 .* cannot be read"):
            source[3]
        with pytest.raises(InputError, match="cannot be read"):
            open_source("tfds:tiny:nosplit")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match="run `tfds build mnist --file_format=array_record` once"):
        open_source("tfds:mnist:test")


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.zip").write_bytes(b"no zip")
    for spec, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "empty", "no images in class folders"),
        (tmp_path / "file.zip", "no folder, zip of class folders"),
        ("tfds:cifar10", "tfds:NAME:SPLIT"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(spec)
    with pytest.raises(InputError, match="at least 1"):
        open_source(tmp_path, limit=0)


def test_batches_keep_order_and_are_full(folder):
    source = open_source(folder)
    found = list(batches(source, MODEL, 4))
    assert [batch.keys for batch in found] == [source.keys[:4], source.keys[4:]]
    for batch in found:
        assert batch.images.shape == (4, 4, 6, 3) and batch.images.dtype == np.uint8 and batch.masks is None
    assert found[0].images[:, 0, 0, 0].tolist() == [10, 11, 12, 0]
    assert found[1].images[:, 0, 0, 0].tolist() == [1, 2, 2, 2]
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
                pixels, cut = prepare(example, dataclasses.replace(MODEL, size=size, crop_pct=0.8), profile)
                assert pixels.shape == (*size, 3) and cut.shape == size and cut.dtype == bool
                # Nearest and bilinear differ at the edge only.
                assert ((pixels[..., 0] > 127) != cut).mean() < 0.1
                if profile == "reference":
                    assert abs(cut.mean() - mask.mean()) < 0.06
    with pytest.raises(InputError, match="differ in size"):
        prepare(Example("x", photo(0, (5, 5)), None, np.zeros((5, 4), bool)), MODEL, "default")
