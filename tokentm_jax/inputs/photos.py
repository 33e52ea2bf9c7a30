"""Photos: how one becomes the input of a model, and the picture on which a map is shown."""

import dataclasses
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from tokentm_jax.data.photos import MAX_PIXELS, SUFFIXES, decode
from tokentm_jax.data.photos import open_photo as opened
from tokentm_jax.errors import InputError

__all__ = ["SUFFIXES", "decode", "opened"]
KIND = "photo"
FRAME = "Photo"  # what the picture under a map is called


def example() -> bytes:
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
    scaled, (left, top) = _placed(image, preprocessing)
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    return np.asarray(image.resize(scaled, resample).crop((left, top, left + width, top + height)))


def fit_mask(image: Image.Image, mask: np.ndarray, preprocessing: Any, name: str) -> np.ndarray:
    """The mask [h, w] of a photo, as the model receives it: [H, W]. Raises InputError for a mask of another size."""
    if mask.shape != image.size[::-1]:
        raise InputError(f"{name}: image and mask differ in size")
    nearest = dataclasses.replace(preprocessing, interpolation="nearest")
    return fit(Image.fromarray(mask.astype(np.uint8)), nearest).astype(mask.dtype)


def view(image: Image.Image, preprocessing: Any, side: int = 448) -> np.ndarray:
    """The same part of the photo as `fit`, from the original pixels and for display: uint8 [h, w, 3], long side
    `side` pixels, so that a model of 32 pixels is shown on a sharp photo."""
    height, width = preprocessing.size
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    scaled, (left, top) = _placed(image, preprocessing)
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


def _placed(image: Image.Image, preprocessing: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of the whole photo after the resize, and (left, top) of the centre crop in it."""
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
    height, width = preprocessing.size
    return scaled, (round((scaled[0] - width) / 2), round((scaled[1] - height) / 2))
