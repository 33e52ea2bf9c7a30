"""Photos: how one becomes the input of a model, and the picture on which a map is shown."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokentm_jax.data.photos import MAX_PIXELS, SUFFIXES, decode, open_photo
from tokentm_jax.data.sources import kind_of
from tokentm_jax.errors import InputError

__all__ = ["SUFFIXES", "decode"]
KIND = "photo"
FRAME = "Photo"  # what the picture under a map is called


def opened(path: str | Path) -> Image.Image:
    """The content of a file. Raises InputError."""
    return open_photo(path)


def example() -> bytes:
    """A file."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


def fit(image: Image.Image, preprocessing: Any) -> np.ndarray:
    """The photo as the model receives it: uint8 [H, W, 3]. Raises InputError for a model of other channels.

    The photo is resized so that it covers `size / crop_pct`, keeping its proportions (unless it is to be squashed to
    these), and its centre is cut out, with the rounding of timm's evaluation transform (its resize to a target that is
    not square is always bilinear; here it is the preprocessing's own).
    """
    if len(preprocessing.mean) != 3:
        raise InputError(f"a photo has 3 channels, and the model takes images of {len(preprocessing.mean)}")
    height, width = preprocessing.size
    scaled = _scaled(image, preprocessing)
    left, top = _corner(scaled, preprocessing)
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    return np.asarray(image.resize(scaled, resample).crop((left, top, left + width, top + height)))


def view(image: Image.Image, preprocessing: Any, side: int = 448, profile: str = "default") -> np.ndarray:
    """The same part of the photo as `fitted`, from the original pixels and for display: uint8 [h, w, 3], long side
    `side` pixels, so that a model of 32 pixels is shown on a sharp photo."""
    if not isinstance(image, Image.Image):
        raise InputError(f"this is a {kind_of(image)}, and the model takes photos")
    height, width = preprocessing.size
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if profile == "reference":
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    scaled = _scaled(image, preprocessing)
    left, top = _corner(scaled, preprocessing)
    x, y = image.width / scaled[0], image.height / scaled[1]
    box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box))


def from_array(array: np.ndarray) -> Image.Image:
    """The content of an array [H, W, 3] of uint8, or of floats in [0, 1]. Raises InputError for others."""
    known = array.dtype == np.uint8 or array.dtype.kind == "f"
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size or not known:
        shape = f"{list(array.shape)} {array.dtype}"
        raise InputError(f"a photo must be a path or an array [H, W, 3] of uint8 or floats, got {shape}")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= -0.5 and array.max() <= 1.5):
            raise InputError("a photo of floating-point numbers must be in [0, 1]")
        array = (array.clip(0, 1) * 255).round()
    return Image.fromarray(array.astype(np.uint8))


def pictured(image: np.ndarray, side: int) -> np.ndarray:
    """What the model receives, float32 [H, W, 3], as a picture whose long side has `side` pixels."""
    height, width = (max(1, round(length * side / max(image.shape))) for length in image.shape[:2])
    levels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC))


def _scaled(image: Image.Image, preprocessing: Any) -> tuple[int, int]:
    """(width, height) of the whole photo after the resize."""
    height, width = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.size)
    if preprocessing.crop_mode == "squash":
        scaled = (width, height)
    elif height == width:
        short, long = sorted(image.size)
        long = int(width * long / short)
        scaled = (width, long) if image.width <= image.height else (long, width)
    else:
        ratio = min(image.width / width, image.height / height)
        scaled = round(image.width / ratio), round(image.height / ratio)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise InputError(
            f"a photo of {image.width} x {image.height} pixels is too narrow for a model of {width} pixels"
        )
    return scaled


def _corner(scaled: tuple[int, int], preprocessing: Any) -> tuple[int, int]:
    """(left, top) of the centre crop in the resized photo."""
    height, width = preprocessing.size
    return round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)


def fitted(image: Any, preprocessing: Any, name: str, profile: str = "default") -> np.ndarray:
    """As `fit`; with the profile "reference", squashed to the model's size, bilinear."""
    if not isinstance(image, Image.Image):
        raise InputError(f"{name} is a {kind_of(image)}, and the model takes photos")
    if profile != "reference":
        return fit(image, preprocessing)
    return np.asarray(image.resize(preprocessing.size[::-1], Image.Resampling.BILINEAR))


def fitted_mask(mask: np.ndarray, preprocessing: Any, profile: str) -> np.ndarray:
    """A mask bool [h, w] of a photo, cut as the photo is, by nearest neighbour: bool [H, W]."""
    picture = Image.fromarray(mask.astype(np.uint8))
    if profile == "reference":
        return np.asarray(picture.resize(preprocessing.size[::-1], Image.Resampling.NEAREST)) > 0
    return fit(picture, dataclasses.replace(preprocessing, interpolation="nearest")) > 0


def notice(image: Any, preprocessing: Any, name: str) -> str | None:
    """What of a sample the model does not get, as a sentence: nothing."""
    return None


def shown(heatmap: np.ndarray, preprocessing: Any, tiling: Any, squares: bool) -> np.ndarray:
    """A map as it lies on the picture."""
    return heatmap


def scales(preprocessing: Any) -> None:
    """The axes of the picture: none."""
