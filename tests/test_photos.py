"""Untrusted photos, and the crop that a model sees."""

import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokentm_jax.data import photos
from tokentm_jax.data.photos import decode, find_photos, open_photo
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.images import IMAGENET, Preprocessing
from tokentm_jax.inputs.photos import fit, view

SMALL = Preprocessing((8, 8), 1.0, "bilinear", **IMAGENET)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def ramp(mode_dtype, top, shape=(4, 5)):
    """Values from 0 to `top`."""
    return np.linspace(0, top, shape[0] * shape[1]).reshape(shape).astype(mode_dtype)


def png_header(width, height):
    """A PNG that states a size and holds no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "pgm", "webp", "jpg"])
def test_grey_in_every_format(tmp_path, suffix):
    grey = Image.fromarray(ramp(np.uint8, 255))
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(suffix, {})
    photo = open_photo(saved(tmp_path / f"a.{suffix}", grey, **options))
    assert photo.mode == "RGB"
    difference = np.asarray(photo).astype(int) - ramp(np.uint8, 255)[..., None]
    assert np.abs(difference).max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, name):
    values = ramp(np.uint16, 65535)
    photo = open_photo(saved(tmp_path / name, Image.fromarray(values)))
    np.testing.assert_array_equal(np.asarray(photo)[..., 0], np.round(values / 257))


@pytest.mark.parametrize(("dtype", "top"), [(np.int32, 65535), (np.float32, 1.0), (np.float32, 300.0)])
def test_wide_tiff(tmp_path, dtype, top):
    values = ramp(dtype, top)
    photo = open_photo(saved(tmp_path / "a.tiff", Image.fromarray(values)))
    np.testing.assert_allclose(np.asarray(photo)[..., 1], values / top * 255, atol=0.51)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 65535), (np.float32, 1.0)])
def test_tiff_whose_zero_is_white(tmp_path, dtype, top):
    values, path = ramp(dtype, top), tmp_path / "a.tiff"
    Image.fromarray(values).save(path, tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
    np.testing.assert_allclose(np.asarray(open_photo(path))[..., 1], 255 - values / top * 255, atol=0.51)


def tiff(values, bits, sample, order="<"):
    """An uncompressed TIFF of one strip and one or three channels, written by hand."""
    height, width, *channels = values.shape
    (count,) = channels or [1]
    tags = {256: [width], 257: [height], 258: [bits] * count, 259: [1], 262: [2 if count == 3 else 1], 273: [1024],
            277: [count], 278: [height], 279: [values.nbytes], 284: [1], 339: [sample] * count}  # fmt: skip
    table, far = struct.pack(f"{order}H", len(tags)), b""
    for tag, numbers in tags.items():
        content = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(content) > 4:  # behind the table
            content, far = struct.pack(f"{order}I", 512 + len(far)), far + content
        table += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + content
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    return (head + table).ljust(512, b"\0") + far.ljust(512, b"\0") + pixels


WIDE = [  # type, SampleFormat, byte order, the values that are black and white, and the smallest and largest ones
    ("uint8", 1, "<", (0, 255), (0, 200)),
    ("uint16", 1, "<", (0, 65535), (0, 60000)),
    ("uint16", 1, ">", (0, 65535), (0, 60000)),
    ("int16", 2, "<", (0, 32767), (0, 30000)),
    ("int16", 2, ">", (-20000, 32767), (-20000, 30000)),
    ("uint32", 1, "<", (0, 255), (0, 240)),  # a photo of 8 bits in a wider type: not black
    ("uint32", 1, "<", (0, 2**32 - 1), (0, 2**32 - 1)),  # beyond int32, which Pillow takes it for
    ("int32", 2, "<", (0, 255), (0, 255)),
    ("int32", 2, "<", (0, 1), (0, 1)),
    ("int32", 2, "<", (0, 4000), (0, 4000)),
    ("int32", 2, ">", (0, 2**31 - 1), (0, 2**31 - 1)),
    ("int32", 2, "<", (-1000, 3000), (-1000, 3000)),
    ("float32", 3, "<", (0, 1), (0, 0.5)),
    ("float32", 3, ">", (0, 255), (0, 200)),
    ("float32", 3, "<", (-1, 1), (-1, 1)),
    ("float32", 3, "<", (0, 9e5), (0, 9e5)),
]


@pytest.mark.parametrize(("kind", "sample", "order", "scale", "ends"), WIDE)
def test_every_depth_of_a_grey_tiff(tmp_path, kind, sample, order, scale, ends):
    values = np.linspace(*ends, 20).reshape(4, 5).astype(kind)
    (tmp_path / "a.tif").write_bytes(tiff(values, values.itemsize * 8, sample, order))
    black, white = scale
    expected = (values.astype(np.float64) - black) / (white - black) * 255
    np.testing.assert_allclose(np.asarray(open_photo(tmp_path / "a.tif"))[..., 2], expected, atol=0.51)


def test_a_grey_tiff_of_12_bits(tmp_path):
    packed = np.frombuffer(bytes([0xFF, 0xF8, 0x00] * 8), np.uint8).reshape(4, 6)  # 4095 and 2048, four in a row
    content = tiff(packed, 12, 1).replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4))
    (tmp_path / "a.tif").write_bytes(content)
    assert np.asarray(open_photo(tmp_path / "a.tif"))[..., 0].tolist() == [[255, 128] * 2] * 4


def test_tiffs_in_colour(tmp_path):
    values = np.random.default_rng(0).random((4, 5, 3))
    (tmp_path / "a.tif").write_bytes(tiff((values * 65535).astype(np.uint16), 16, 1))
    np.testing.assert_allclose(np.asarray(open_photo(tmp_path / "a.tif")), values * 255, atol=1)
    for kind, sample in (("float32", 3), ("uint32", 1), ("float64", 3)):
        content = tiff((values * 255).astype(kind), np.dtype(kind).itemsize * 8, sample)
        (tmp_path / "a.tif").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.tif is a TIFF of another kind than 8 or 16 bits per channel"):
            open_photo(tmp_path / "a.tif")


def test_conversion_in_strips_is_that_of_the_whole(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    pictures = {
        "f.tif": Image.fromarray(random.normal(0.4, 0.5, (23, 17)).astype(np.float32)),
        "i.png": Image.fromarray(random.integers(0, 65536, (23, 17), np.uint16)),
        "a.png": Image.fromarray(random.integers(0, 256, (23, 17, 4), np.uint8)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        whole = open_photo(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(photos, "_STRIP", 40)
            np.testing.assert_array_equal(open_photo(tmp_path / name), whole)
    expected = Image.alpha_composite(Image.new("RGBA", (17, 23), "white"), pictures["a.png"]).convert("RGB")
    np.testing.assert_array_equal(whole, expected)


def test_transparency_is_put_on_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3], rgba[1, 0, 3] = 255, 51
    expected = [[[200, 0, 0]] * 2, [[244, 204, 204], [255, 255, 255]]]
    photo = open_photo(saved(tmp_path / "rgba.png", Image.fromarray(rgba)))
    np.testing.assert_array_equal(np.asarray(photo), expected)
    grey = open_photo(saved(tmp_path / "la.png", Image.fromarray(rgba).convert("LA")))
    assert np.asarray(grey)[1, 1].tolist() == [255] * 3
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    photo = open_photo(saved(tmp_path / "p.png", palette, transparency=1))
    assert np.asarray(photo).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    photo = open_photo(saved(tmp_path / "key.png", keyed, transparency=(1, 2, 3)))
    assert np.asarray(photo).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_cmyk_and_black_and_white(tmp_path):
    cmyk = open_photo(saved(tmp_path / "c.tiff", Image.new("CMYK", (4, 4), (0, 255, 255, 0))))
    assert np.asarray(cmyk)[0, 0].tolist() == [255, 0, 0]
    black = open_photo(saved(tmp_path / "b.png", Image.new("1", (4, 4), 1)))
    assert np.asarray(black)[0, 0].tolist() == [255, 255, 255]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.asarray(open_photo(path))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    stored = {  # what a camera held that way has written
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(np.asarray(open_photo(path)), upright)


def jpeg_bytes():
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is text", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"%PDF-1.7\n", "not an image in a known format"),
        (jpeg_bytes()[:600], "damaged"),
        (jpeg_bytes()[:12], "damaged|not an image"),
        (png_header(50_000, 50_000), "pixels"),
        (png_header(12_000, 9_000), "12000 x 9000 pixels, more than 100,000,000"),
        (png_header(90_000, 3), "too narrow"),
        (png_header(20, 20), "damaged or truncated"),
        (b"P6 99999999 99999999 255\n", "pixels"),
    ],
)
def test_what_is_not_a_photo(tmp_path, content, message):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        open_photo(path)
    assert "photo.jpg" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_and_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in [
        (tmp_path / "missing.png", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.png", "is not a regular file"),
        ("nul\0.png", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            open_photo(path)


def test_limits_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.write(png_header(8, 8))
        file.truncate(photos.MAX_FILE + 1)  # takes no room on the disk
    with pytest.raises(InputError, match=r"huge\.png is larger than 512 MiB"):
        open_photo(path)
    # A small photo in one enormous tile, of which a decoder would make room for all.
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32_000, 323: 32_000, 324: 200, 325: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes((b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0") + zlib.compress(b"x"))
    with pytest.raises(InputError, match="tiles of more than 100,000,000"):
        open_photo(path)
    monkeypatch.setattr(photos, "MAX_PIXELS", 100)
    for suffix, allowed in (("png", 100), ("webp", 75)):  # whose decoder takes more
        Image.new("RGB", (19, 4)).save(tmp_path / f"a.{suffix}")
        if allowed == 100:
            assert open_photo(tmp_path / "a.png").size == (19, 4)
        else:
            with pytest.raises(InputError, match="more than 75 in all"):
                open_photo(tmp_path / "a.webp")


def test_threads_leave_the_warnings_alone(monkeypatch):
    """The first to begin is the first to end: it must not set back what the other one found, nor the other its own."""
    first, second = (io.BytesIO(jpeg_bytes()) for _ in range(2))
    begun, both, ended, read = (*(threading.Event() for _ in range(3)), Image.open)

    def slow(file, **options):
        (begun if file is first else both).set()
        assert (both if file is first else ended).wait(30)
        return read(file, **options)

    monkeypatch.setattr(Image, "open", slow)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(decode, first, "a.jpg")
        assert begun.wait(30)
        other = pool.submit(decode, second, "b.jpg")
        assert one.result().size == (64, 64)
        ended.set()
        assert other.result().size == (64, 64)
    assert warnings.filters == before


def test_every_truncation_is_an_input_error(tmp_path):
    content, path = jpeg_bytes(), tmp_path / "a.jpg"
    for length in range(1, len(content) - 200, 97):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            open_photo(path)


def test_the_crop_is_the_references(shared):
    """The goldens' pixels were made by a bicubic resize to 256 and a centre crop: exactly these."""
    golden = np.load(shared / "goldens/deit_tiny.npz")
    preprocessing = Preprocessing((224, 224), 0.875, "bicubic", **IMAGENET)
    paths = [shared / "data/imagenet_sample" / str(name) for name in golden["name"]]
    images = preprocessing.read(paths)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(np.round(images * 255), golden["pixels"])


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (24, 8)])
@pytest.mark.parametrize("photo_size", [(31, 17), (17, 31), (8, 8), (3, 200)])
def test_the_crop_is_centred_and_covered(size, photo_size):
    """A linear ramp stays one under bilinear resizing: its value in the middle is that of the photo's middle."""
    width, height = photo_size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    photo = Image.fromarray((np.stack([x / width, y / height, x * 0 + 1], -1) * 255).round().astype(np.uint8))
    preprocessing = Preprocessing(size, 0.8, "bilinear", **IMAGENET)
    for picture in (fit(photo, preprocessing), view(photo, preprocessing, 96)):
        assert (picture[..., 2] == 255).all()  # nothing beyond the photo's edge
        # a crop is placed on whole pixels of the resized photo
        assert np.abs(picture[..., :2].mean((0, 1)) - 127.5).max() < 13
    assert fit(photo, preprocessing).shape == (*size, 3)


@pytest.mark.parametrize(("crop_pct", "scaled", "corner"), [(1.0, (30, 20), (0, 0)), (0.8, (37, 25), (4, 2))])
def test_squashing_is_a_resize_of_both_sides(tmp_path, crop_pct, scaled, corner):
    """As timm's transform of crop_mode "squash" does it, with Pillow's own resize: equal to the last bit."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    whole = np.asarray(Image.fromarray(noise).resize(scaled, Image.Resampling.BICUBIC), np.float32) / 255
    expected = whole[corner[1] : corner[1] + 20, corner[0] : corner[0] + 30]
    preprocessing = Preprocessing((20, 30), crop_pct, crop_mode="squash", **IMAGENET)
    np.testing.assert_array_equal(preprocessing.read(tmp_path / "noise.png")[0], expected)


def test_view_shows_the_same_part_sharply():
    noise = np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC)
    preprocessing = Preprocessing((32, 32), 0.9, "bicubic", **IMAGENET)
    large = view(photo, preprocessing, 448)
    assert large.shape == (448, 448, 3)
    small = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.BICUBIC))
    seen = fit(photo, preprocessing)
    assert np.corrcoef(small.ravel(), seen.ravel())[0, 1] > 0.97
    assert large.std() > 1.5 * seen.std()  # detail that 32 pixels cannot show


def test_find_photos(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "c[1].png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()

    def names(*arguments):
        return [path.name for path in find_photos(arguments)]

    assert names(tmp_path) == ["a.JPG", "b.png", "c[1].png"]
    assert names(tmp_path / "*.png", tmp_path / "b.png") == ["b.png", "c[1].png"]
    assert names(tmp_path / "c[1].png") == ["c[1].png"]
    assert names(tmp_path / "missing.png", tmp_path / "notes.txt") == ["missing.png", "notes.txt"]
    for nothing in (tmp_path / "empty", tmp_path / "*.gif"):
        with pytest.raises(InputError, match="no photos"):
            find_photos([nothing])
    with pytest.raises(InputError, match="no photos"):
        find_photos([])
    with pytest.raises(InputError, match="is empty"):  # not the current folder
        find_photos([""])


def test_odd_names_among_photos(tmp_path):
    """Each is kept, for `open_photo` to say what is wrong with it; the others are found."""
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "pipe.png")
    odd = [tmp_path / "self.png", "nul\0.png", "x" * 300 + ".png", tmp_path / "pipe.png", "nul\0*.png"]
    for name in odd[:4]:
        assert find_photos([name]) == [Path(name)]
        with pytest.raises(InputError):
            open_photo(name)
    assert find_photos([tmp_path]) == [tmp_path / "a.png"]
    for name in (odd[4], "x" * 300 + "*.png"):
        with pytest.raises(InputError):
            find_photos([name])


def test_patterns_end_at_loops_of_links(tmp_path, monkeypatch):
    for name in ("a.png", "one/b.png", "one/two/c.png", ".hidden/d.png", "o[n]e/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for place in ("loop", "one/loop", "one/two/loop"):
        for i in range(3):  # a tree of 3 to the power of 40 folders
            (tmp_path / f"{place}{i}").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    everything = ["a.png", "o[n]e/e.png", "one/b.png", "one/two/c.png"]
    for pattern, expected in (
        ("**/*.png", everything),
        ("**", everything),
        ("./**/*.png", everything),
        (f"{tmp_path}/**/*.png", [f"{tmp_path}/{name}" for name in everything]),
        ("one/**/*.png", ["one/b.png", "one/two/c.png"]),
        ("**/two/*.png", ["one/two/c.png"]),
        ("o*/**/**/c.png", ["one/two/c.png"]),
        ("loop0/*.png", ["loop0/a.png"]),  # a link that is named is followed
    ):
        assert [str(path) for path in find_photos([pattern])] == expected
