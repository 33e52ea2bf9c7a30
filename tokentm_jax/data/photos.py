"""Reading photos from untrusted files."""

import contextlib
import ctypes
import glob
import os
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokentm_jax.errors import InputError
from tokentm_jax.files import opened, reason, size_of

# Raster formats whose decoders run no program: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
MAX_FILE = 512 * 2**20  # bytes of one photo's file
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200  # resizing the short side of a narrower strip would make its long side a memory bomb
MEMORY = 2**30  # bytes that decoding takes at a time, in all threads together
PIXEL = 12  # bytes that decoding takes for a pixel, at most: an image of 4, and a decoder's own or the RGB image
_LARGE = MEMORY // 8  # bytes, of which several threads must not keep as many each
_WEBP_PIXEL = 16  # its decoder keeps two canvases
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 258, 262, 322, 323, 339  # tags of TIFF
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STRIP = 2**20  # pixels of a strip that is converted at a time


class _Memory:
    """What threads take of a common memory. Who needs more than is free waits; one alone may take more than there is,
    since the largest photo that is read at all takes little more."""

    def __init__(self) -> None:
        self._taken, self._changed, self._own = 0, threading.Condition(), threading.local()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """What this thread takes within is given back at the end of its outermost turn."""
        outermost = not hasattr(self._own, "taken")
        if outermost:
            self._own.taken = 0
        try:
            yield
        finally:
            if outermost:
                if self._own.taken > _LARGE:
                    _return_free_memory()
                with self._changed:
                    self._taken -= self._own.taken
                    self._changed.notify_all()
                del self._own.taken

    def take(self, amount: int) -> None:
        """Wait for so many bytes, in a turn. Who has some does not wait: two of them could wait for each other."""
        with self._changed:
            if not self._own.taken:
                self._changed.wait_for(lambda: not self._taken or self._taken + amount <= MEMORY)
            self._taken += amount
            self._own.taken += amount
        if amount > _LARGE:
            _return_free_memory()


def _return_free_memory() -> None:
    """Give the system what the C library holds for later: each thread would keep the size of its largest photo."""
    with contextlib.suppress(Exception):  # glibc alone has this
        ctypes.CDLL(None).malloc_trim(0)


decoding = _Memory()  # the one place that says what a batch of decoding may take


class _Quiet:
    """No warnings while any thread is within. The filters belong to the process: threads that each set them back, as
    `warnings.catch_warnings` does, can leave those of another thread."""

    def __init__(self) -> None:
        self._threads, self._lock, self._filters = 0, threading.Lock(), warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._threads:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


def open_photo(path: str | Path) -> Image.Image:
    """A photo as an upright RGB image, whatever its file holds.

    EXIF orientation is applied, transparency is put on white, and of an animation the first frame is taken. Grey
    values of 12 or 16 bits are scaled to 8 bits. Those of 32 bits, integers or floats, have no fixed white: it is 1 or
    255 where no value is larger, else the largest value. Black is 0, or the smallest value where that is negative.

    Raises:
      InputError: the file is missing, not a file, unreadable, empty, larger than `MAX_FILE`, not an image of
        `FORMATS`, damaged, of more than `MAX_PIXELS` pixels (three quarters of that for WebP; checked in the header,
        before anything is decoded), or a strip narrower than 1 : `MAX_ASPECT`.
    """
    with opened(path) as file:
        if size_of(file) > MAX_FILE:
            raise InputError(f"{path} is larger than {MAX_FILE / 2**20:g} MiB")
        return decode(file, str(path))


def check_size(width: int, height: int, name: str, pixel: int = PIXEL) -> None:
    """Raises InputError for a photo that is empty, too large or too narrow; `pixel`: bytes that decoding one takes."""
    largest = MAX_PIXELS * PIXEL // max(pixel, PIXEL)
    if not width or not height:
        raise InputError(f"{name} is {width} x {height} pixels, an empty image")
    if width * height > largest:
        raise InputError(f"{name} is {width} x {height} pixels, more than {largest:,} in all")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{name} is {width} x {height} pixels, too narrow for a photo")


def decode(file: BinaryIO, name: str) -> Image.Image:
    """As `open_photo`, from an open binary file; `name` is what errors call it."""
    if not file.read(1):
        raise InputError(f"{name} is empty")
    file.seek(0)
    with _quiet, decoding.turn():  # no warnings of a damaged tag, or of a size that is still below our limit
        try:
            image = Image.open(file, formats=FORMATS)
            tags = getattr(image, "tag_v2", {})
            tile = tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1)  # decoded whole, however small the photo
        except UnidentifiedImageError:
            file.seek(0)
            if file.read(4) in _TIFF:
                raise InputError(
                    f"{name} is a TIFF of another kind than 8 or 16 bits per channel, or one channel of 32 bits"
                ) from None
            raise InputError(
                f"{name} is not an image in a known format (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM)"
            ) from None
        except Image.DecompressionBombError:
            raise InputError(f"{name} has more than {MAX_PIXELS:,} pixels") from None
        except Exception:
            raise InputError(f"{name} is a damaged image") from None
        width, height = image.size
        pixel = _WEBP_PIXEL if image.format == "WEBP" else PIXEL
        check_size(width, height, name, pixel)
        if tile > MAX_PIXELS:
            raise InputError(f"{name} has tiles of more than {MAX_PIXELS:,} pixels")
        decoding.take(pixel * max(width * height, tile))
        try:
            image.load()
        except Exception:
            raise InputError(f"{name} is damaged or truncated") from None
        with contextlib.suppress(Exception):  # broken metadata does not make a photo unreadable
            image = ImageOps.exif_transpose(image)
        try:
            return _to_rgb(image, tags)
        except Exception:
            raise InputError(f"{name} has colours that cannot be turned into RGB (mode {image.mode})") from None


def _to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """A loaded image as RGB; `tags` are those of a TIFF."""
    wide = image.mode in ("F", "I") or image.mode.startswith("I;16")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # free of its file
    if not wide and not image.has_transparency_data:
        return image.convert("RGB")
    # In strips, since the images and arrays between would take many times the memory of the photo.
    rows = max(1, _STRIP // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    black, white = _black_and_white(image, tags, boxes) if wide else (0.0, 255.0)
    photo = Image.new("RGB", image.size)
    for box in boxes:
        if wide:  # Pillow's own conversion clips at 255
            grey = (_values(image, tags, box) - black) * (255 / (white - black))
            grey = 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey  # Pillow turns only narrower TIFFs around
            part = Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
        else:
            part = image.crop(box).convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")
        photo.paste(part, box)
    return photo


def _sample(tags: Mapping[int, Any]) -> tuple[int, bool]:
    """Bits of a value, and whether it is an unsigned integer; 16 bits for a file that is no TIFF."""
    return tags.get(_BITS, (16,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 1


def _black_and_white(
    image: Image.Image, tags: Mapping[int, Any], boxes: Iterable[tuple[int, int, int, int]]
) -> tuple[float, float]:
    """The values of a grey image of more than 8 bits that are black and white, as `open_photo` states."""
    ends = [(values.min(), values.max()) for values in (_values(image, tags, box) for box in boxes)]
    smallest, largest = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
    bits, unsigned = _sample(tags)
    if image.mode == "F" or bits == 32:
        white = next((white for white in (1.0, 255.0) if largest <= white), largest)
    else:
        white = 2.0 ** (bits if unsigned else bits - 1) - 1
    return min(0.0, smallest), white


def _values(image: Image.Image, tags: Mapping[int, Any], box: tuple[int, int, int, int]) -> np.ndarray:
    """Finite numbers, in a part of a grey image."""
    values = np.asarray(image.crop(box))
    if image.mode == "I" and _sample(tags) == (32, True):  # Pillow has no such mode: large values would be negative
        values = values.view(np.uint32)
    return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)


def find_photos(
    arguments: Iterable[str | Path], suffixes: Collection[str] = SUFFIXES, what: str = "photo"
) -> list[Path]:
    """The photos that command-line arguments name, each once: files, folders (their image files, sorted) and glob
    patterns, in which `**` does not follow links to folders. A missing file is kept, for `open_photo` to complain
    about. Raises InputError for an empty name, and for a folder or a pattern without photos.

    For files of another kind, `suffixes` are theirs, and `what` is what errors call them.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        if not os.fspath(argument):
            raise InputError(f"the name of a {what} is empty")
        try:
            # os.path's questions answer no for a name that no file can have, where pathlib's raise an error.
            if os.path.isdir(argument):
                inside = [path for path in Path(argument).iterdir() if _is_file(path, suffixes)]
            elif not os.path.lexists(argument) and glob.has_magic(str(argument)):
                inside = [path for path in _matches(str(argument)) if _is_file(path, suffixes)]
            else:
                inside = [Path(argument)]
        except (OSError, ValueError) as error:
            raise InputError(f"{argument} cannot be read: {reason(error)}") from None
        if not inside:
            raise InputError(f"no {what}s were found in {argument}")
        found |= dict.fromkeys(sorted(inside))
    if not found:
        raise InputError(f"no {what}s were given")
    return list(found)


def _is_file(path: Path, suffixes: Collection[str]) -> bool:
    return path.suffix.lower() in suffixes and os.path.isfile(path)


def _matches(pattern: str) -> Iterator[Path]:
    """What matches a pattern. `**` does not follow links to folders; hidden names must be asked for by a dot."""
    start = Path(Path(pattern).anchor)
    parts = Path(pattern).relative_to(start).parts
    hidden = any(part.startswith(".") for part in parts)
    for path in start.glob(os.path.join(*parts, *(["*"] if parts[-1] == "**" else []))):
        if hidden or not any(part.startswith(".") for part in path.relative_to(start).parts):
            yield path
