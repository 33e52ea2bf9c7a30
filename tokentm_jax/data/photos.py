"""Reading photos from files that nobody has checked, and cutting them to what a model sees."""

import contextlib
import glob
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokentm_jax.errors import InputError

if TYPE_CHECKING:
    from tokentm_jax.data.preprocessing import Preprocessing

# Raster formats whose decoders run no program: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200  # resizing the short side of a narrower strip would make its long side a memory bomb


def open_photo(path: str | Path) -> Image.Image:
    """A photo as an upright RGB image, whatever its file holds.

    EXIF orientation is applied, transparency is put on white, 16-bit values are scaled to 8 bits, and of an
    animation the first frame is taken.

    Raises:
      InputError: the file is missing, not a file, unreadable, empty, not an image of `FORMATS`, damaged, of more
        than `MAX_PIXELS` pixels (checked in the header, before anything is decoded), or a strip narrower than
        1 : `MAX_ASPECT`.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a photo")
        if path.exists() and not path.is_file():  # opening a pipe could wait for ever
            raise InputError(f"{path} is not a regular file")
        with path.open("rb") as file:
            return decode(file, str(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def decode(file: BinaryIO, name: str) -> Image.Image:
    """As `open_photo`, from an open binary file; `name` is what errors call it."""
    if not file.read(1):
        raise InputError(f"{name} is empty")
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a damaged tag, or of a size that is still below our limit
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise InputError(
                f"{name} is not an image in a known format (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM)"
            ) from None
        except Image.DecompressionBombError:
            raise InputError(f"{name} has more than {MAX_PIXELS:,} pixels") from None
        except Exception:
            raise InputError(f"{name} is a damaged image") from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(f"{name} is {width} x {height} pixels, more than {MAX_PIXELS:,} in all")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise InputError(f"{name} is {width} x {height} pixels, too narrow for a photo")
        try:
            image.load()
        except Exception:
            raise InputError(f"{name} is damaged or truncated") from None
        with contextlib.suppress(Exception):  # broken metadata does not make a photo unreadable
            image = ImageOps.exif_transpose(image)
        try:
            return _to_rgb(image)
        except Exception:
            raise InputError(f"{name} has colours that cannot be turned into RGB (mode {image.mode})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # free of its file
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        # Pillow's own conversion clips at 255. Integers beyond 16 bits and floats have no fixed white.
        white = 1.0 if image.mode == "F" else 65535.0
        values = values.clip(0) * (255 / max(white, values.max(initial=0)))
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, preprocessing: "Preprocessing") -> np.ndarray:
    """The photo as the model sees it: uint8 [H, W, 3] of `preprocessing.size`.

    The photo is resized so that it covers `size / crop_pct`, keeping its proportions, and its centre is cut out,
    with the rounding of timm's evaluation transform (its resize to a target that is not square is always bilinear;
    here it is the preprocessing's own).
    """
    height, width = preprocessing.size
    scaled = _scaled(image, preprocessing)
    left, top = _corner(scaled, preprocessing)
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    return np.asarray(image.resize(scaled, resample).crop((left, top, left + width, top + height)))


def view(image: Image.Image, preprocessing: "Preprocessing", side: int = 448) -> np.ndarray:
    """The same part of the photo as `fit`, from the original pixels and for display: uint8 [h, w, 3], long side
    `side` pixels, so that a model of 32 pixels is shown on a sharp photo."""
    height, width = preprocessing.size
    scaled = _scaled(image, preprocessing)
    left, top = _corner(scaled, preprocessing)
    x, y = image.width / scaled[0], image.height / scaled[1]
    box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box))


def _scaled(image: Image.Image, preprocessing: "Preprocessing") -> tuple[int, int]:
    """(width, height) of the whole photo after the resize."""
    height, width = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.size)
    if height == width:
        short, long = sorted(image.size)
        long = int(width * long / short)
        scaled = (width, long) if image.width <= image.height else (long, width)
    else:
        ratio = min(image.width / width, image.height / height)
        scaled = round(image.width / ratio), round(image.height / ratio)
    if scaled[0] * scaled[1] > 4 * MAX_PIXELS:
        raise InputError(
            f"a photo of {image.width} x {image.height} pixels is too narrow for a model of {width} pixels"
        )
    return scaled


def _corner(scaled: tuple[int, int], preprocessing: "Preprocessing") -> tuple[int, int]:
    """(left, top) of the centre crop in the resized photo."""
    height, width = preprocessing.size
    return round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)


def read_photos(paths: Iterable[str | Path], preprocessing: "Preprocessing") -> np.ndarray:
    """Photos as the model sees them: float32 [B, H, W, 3] in [0, 1], not normalised. Raises InputError."""
    pixels = [fit(open_photo(path), preprocessing) for path in paths]
    if not pixels:
        raise InputError("no photos were given")
    return np.stack(pixels).astype(np.float32) / 255


def find_photos(arguments: Iterable[str | Path]) -> list[Path]:
    """The photos that command-line arguments name, each once: files, folders (their image files, sorted) and glob
    patterns. A missing file is kept, for `open_photo` to complain about. Raises InputError for a folder or a
    pattern without photos."""
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()]
        elif not path.exists() and glob.has_magic(str(argument)):
            matches = map(Path, glob.iglob(str(argument), recursive=True))
            inside = [p for p in matches if p.suffix.lower() in SUFFIXES and p.is_file()]
        else:
            inside = [path]
        if not inside:
            raise InputError(f"no photos were found in {argument}")
        found |= dict.fromkeys(sorted(inside))
    if not found:
        raise InputError("no photos were given")
    return list(found)
