"""`.mat` files in the layout of `gtsegs_ijcv.mat`, which is HDF5.

`value/img` and `value/gt` have references to images [3, W, H] and, twice, to masks [W, H].
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokentm_jax.data import photos
from tokentm_jax.data.photos import PIXEL, check_size, decoding
from tokentm_jax.errors import InputError, require
from tokentm_jax.files import errors_as

MAX_RECORDS = 10**7


def open_mat(path: Path) -> tuple[int, Callable[[int], tuple[Image.Image, np.ndarray]]]:
    """The number of records of a file, and what reads the image and the mask of one. Raises InputError."""
    h5py = require("h5py", "data", str(path))

    def is_reference(dataset: Any) -> bool:
        return h5py.check_ref_dtype(dataset.dtype) is h5py.Reference

    def inside(parent: Any, name: str) -> Any:
        if not isinstance(parent.get(name, getlink=True), h5py.HardLink):  # other links can lead to any file
            raise InputError(f"{name} is a link")
        return parent[name]

    def values(dataset: Any, most: int) -> Any:
        """The dataset, if it has at most `most` values in this file. No value is read."""
        if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or not math.prod(dataset.shape):
            raise InputError("it has no values")
        if dataset.is_virtual or dataset.external:
            raise InputError("its values are in another file")
        if max(math.prod(dataset.shape), math.prod(dataset.chunks or (1,))) > most:
            raise InputError(f"it has more than {most:,} values")
        return dataset

    layout = "does not have the layout of gtsegs_ijcv.mat (HDF5 with references in value/img, value/gt)"
    with errors_as(f"{path} {layout}"):
        file: Any = h5py.File(path, "r")
        tables = [values(inside(inside(file, "value"), name), MAX_RECORDS) for name in ("img", "gt")]
        if not all(is_reference(table) for table in tables):
            raise InputError("value/img and value/gt must be object references")
        images, masks = (np.asarray(table).ravel() for table in tables)
        if len(images) != len(masks):
            raise InputError(f"{len(images)} images and {len(masks)} masks")
    lock = threading.Lock()

    def read_mask(record: int) -> np.ndarray:
        mask = values(file[masks[record]], photos.MAX_PIXELS)
        for _ in range(2):  # a cell holds the mask, or a cell with the mask; a cell may even hold itself
            if is_reference(mask):
                mask = values(file[mask[(0,) * mask.ndim]], photos.MAX_PIXELS)
        if mask.dtype.kind not in "buif" or mask.dtype.itemsize > 8 or mask.ndim != 2:
            raise InputError(f"its mask {list(mask.shape)} of type {mask.dtype} is not one [W, H] of numbers")
        decoding.take(PIXEL * mask.size)
        found = mask[()]
        if not np.isfinite(found).all():
            raise InputError("its mask has numbers that are not finite")
        return np.ascontiguousarray(found.T > 0)

    def read_pixels(record: int, mask: np.ndarray) -> Image.Image:
        pixels = values(file[images[record]], 3 * photos.MAX_PIXELS)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
            raise InputError("it has no image [3, W, H] of type uint8")
        if mask.T.shape != pixels.shape[1:]:
            raise InputError(f"image {pixels.shape[1:]} and mask {mask.T.shape} differ in size")
        check_size(pixels.shape[1], pixels.shape[2], "its image")
        return Image.fromarray(np.ascontiguousarray(pixels[()].transpose(2, 1, 0)))

    def read(record: int) -> tuple[Image.Image, np.ndarray]:
        with errors_as(f"record {record:05d} of {path} cannot be read"), decoding.turn(), lock:
            mask = read_mask(record)
            return read_pixels(record, mask), mask

    return len(images), read
