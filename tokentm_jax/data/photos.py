"""Reading photos from untrusted files."""

import contextlib
import ctypes
import glob
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokentm_jax.errors import InputError
from tokentm_jax.files import errors_as, opened, size_of

# Raster formats whose decoders run no program: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
MAX_FILE = 512 * 2**20  # bytes of one photo's file
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200  # a narrower strip, resized by its short side, would fill the memory
MEMORY = 2**30  # bytes for decoding in all threads together
PIXEL = 12  # largest number of bytes to decode a pixel: an image of 4, and the decoder's copy or the RGB image
_LARGE = MEMORY // 8  # bytes; several threads must not keep this much each
_WEBP_PIXEL = 16  # its decoder stores two canvases
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 258, 262, 322, 323, 339  # tags of TIFF
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STRIP = 2**20  # pixels that are converted at a time
Box = tuple[int, int, int, int]


class _Memory:
    """Memory that threads share. A thread waits for free memory; a single one may take more than all of it."""

    def __init__(self) -> None:
        self._taken, self._changed, self._own = 0, threading.Condition(), threading.local()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A context whose memory is given back at the end of the thread's outermost turn."""
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
        """Wait for `amount` bytes, in a turn. A thread that has some does not wait, to avoid a deadlock."""
        with self._changed:
            if not self._own.taken:
                self._changed.wait_for(lambda: not self._taken or self._taken + amount <= MEMORY)
            self._taken += amount
            self._own.taken += amount
        if amount > _LARGE:
            _return_free_memory()


def _return_free_memory() -> None:
    """Return unused memory of the C library to the system. Else each thread keeps the size of its largest photo."""
    with contextlib.suppress(Exception):  # only glibc has this
        ctypes.CDLL(None).malloc_trim(0)


decoding = _Memory()  # limits the memory of all decoding


class _Quiet:
    """No warnings while any thread is inside. Filters belong to the process: threads would restore each other's."""

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


def open_photo(path: str | Path, least: int | None = None) -> Image.Image:
    """A photo as an upright RGB image.

    EXIF orientation is applied, transparent parts become white, and only the first frame of an animation is read. Grey
    values of 12 or 16 bits are scaled to 8 bits. For 32 bits, integers or floats, white is 1 or 255 if no value is
    larger, else the largest value. Black is 0, or the smallest value if that is negative.

    Raises InputError for a file that cannot be read, is larger than `MAX_FILE`, or is not an image of `FORMATS`, and
    as `check_size`, before decoding.
    """
    with opened(path) as file:
        if size_of(file) > MAX_FILE:
            raise InputError(f"{path} is larger than {MAX_FILE / 2**20:g} MiB")
        return decode(file, str(path), least)


def check_size(width: int, height: int, name: str, pixel: int = PIXEL) -> None:
    """Raises InputError for a photo that is empty, too large or too narrow; `pixel`: bytes to decode a pixel."""
    largest = MAX_PIXELS * PIXEL // max(pixel, PIXEL)
    if not width or not height:
        raise InputError(f"{name} is {width} x {height} pixels, an empty image")
    if width * height > largest:
        raise InputError(f"{name} is {width} x {height} pixels, more than {largest:,} in all")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{name} is {width} x {height} pixels, too narrow for a photo")


def decode(file: BinaryIO, name: str, least: int | None = None) -> Image.Image:
    """As `open_photo`, from an open binary file; `name` is its name in errors.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its short side keeps `least` pixels, which is faster.
    """
    if not file.read(1):
        raise InputError(f"{name} is empty")
    file.seek(0)
    with _quiet, decoding.turn():  # no warnings about a damaged tag, or a size below our limit
        try:
            image = Image.open(file, formats=FORMATS)
            tags = getattr(image, "tag_v2", {})
            tile = tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1)  # decoded whole, even for a small photo
        except UnidentifiedImageError:
            file.seek(0)
            if file.read(4) in _TIFF:
                kinds = "8 or 16 bits per channel, or one channel of 32 bits"
                raise InputError(f"{name} is a TIFF of another kind than {kinds}") from None
            known = "JPEG, PNG, WebP, BMP, GIF, TIFF, PPM"
            raise InputError(f"{name} is not an image in a known format ({known})") from None
        except Image.DecompressionBombError:
            raise InputError(f"{name} has more than {MAX_PIXELS:,} pixels") from None
        except Exception:
            raise InputError(f"{name} is a damaged image") from None
        width, height = image.size
        pixel = _WEBP_PIXEL if image.format == "WEBP" else PIXEL
        check_size(width, height, name, pixel)
        if tile > MAX_PIXELS:
            raise InputError(f"{name} has tiles of more than {MAX_PIXELS:,} pixels")
        if least is not None and image.format == "JPEG" and least < min(width, height):
            side = min(width, height)
            image.draft(None, (-(-width * least // side), -(-height * least // side)))
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
            raise InputError(f"{name} has colours that cannot be converted to RGB (mode {image.mode})") from None


def _to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """A loaded image as RGB; `tags` are of a TIFF."""
    wide = image.mode in ("F", "I") or image.mode.startswith("I;16")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # without a reference to its file
    if not wide and not image.has_transparency_data:
        return image.convert("RGB")
    # In strips, because intermediate images and arrays need many times the memory of the photo.
    rows = max(1, _STRIP // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    eight_bits = _eight_bits(image, tags, boxes) if wide else None
    photo = Image.new("RGB", image.size)
    for box in boxes:
        if eight_bits is not None:  # Pillow's own conversion clips at 255
            part = eight_bits(box).convert("RGB")
        else:
            part = image.crop(box).convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")
        photo.paste(part, box)
    return photo


def _eight_bits(image: Image.Image, tags: Mapping[int, Any], boxes: Sequence[Box]) -> Callable[[Box], Image.Image]:
    """A function from a part of a grey image of more than 8 bits to an image of 8 bits, as `open_photo` states."""
    bits, unsigned = tags.get(_BITS, (16,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 1  # 16 for others than TIFF

    def values(box: Box) -> np.ndarray:
        found = np.asarray(image.crop(box))
        if image.mode == "I" and bits == 32 and unsigned:  # Pillow has no such mode: large values would be negative
            found = found.view(np.uint32)
        return np.nan_to_num(found.astype(np.float64), posinf=0, neginf=0)

    ends = [(float(part.min()), float(part.max())) for part in map(values, boxes)]
    black, largest = min(0.0, *(low for low, _ in ends)), max(high for _, high in ends)
    white = 2.0 ** (bits if unsigned else bits - 1) - 1
    if image.mode == "F" or bits == 32:
        white = next((white for white in (1.0, 255.0) if largest <= white), largest)

    def scaled(box: Box) -> Image.Image:
        grey = (values(box) - black) * (255 / (white - black))
        grey = 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey  # Pillow inverts only narrower TIFFs
        return Image.fromarray(grey.round().astype(np.uint8))

    return scaled


def find_photos(
    arguments: Iterable[str | Path], suffixes: Collection[str] = SUFFIXES, what: str = "photo"
) -> list[Path]:
    """The photos of command-line arguments, each once: files, folders (their image files, sorted) and glob patterns.

    In a pattern `**` does not follow links to folders. A missing file is kept, and `open_photo` raises for it.
    For files of another kind, `suffixes` are theirs, and `what` is their name in errors.
    Raises InputError for an empty name, and for a folder or a pattern without photos.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        if not os.fspath(argument):
            raise InputError(f"the name of a {what} is empty")
        # For an invalid name, functions of os.path return False, and those of pathlib raise an error.
        with errors_as(f"{argument} cannot be read", (OSError, ValueError)):
            if os.path.isdir(argument):
                inside = [path for path in Path(argument).iterdir() if _is_file(path, suffixes)]
            elif not os.path.lexists(argument) and glob.has_magic(str(argument)):
                inside = [path for path in _matches(str(argument)) if _is_file(path, suffixes)]
            else:
                inside = [Path(argument)]
        if not inside:
            raise InputError(f"no {what}s were found in {argument}")
        found |= dict.fromkeys(sorted(inside))
    if not found:
        raise InputError(f"no {what}s were given")
    return list(found)


def _is_file(path: Path, suffixes: Collection[str]) -> bool:
    return path.suffix.lower() in suffixes and os.path.isfile(path)


def _matches(pattern: str) -> Iterator[Path]:
    """Paths that match a pattern. `**` does not follow links to folders; hidden names need a dot in the pattern."""
    start = Path(Path(pattern).anchor)
    parts = Path(pattern).relative_to(start).parts
    hidden = any(part.startswith(".") for part in parts)
    for path in start.glob(os.path.join(*parts, *(["*"] if parts[-1] == "**" else []))):
        if hidden or not any(part.startswith(".") for part in path.relative_to(start).parts):
            yield path
