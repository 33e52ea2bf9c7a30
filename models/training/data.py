"""Labelled images for training, in memory."""

import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokentm_jax.data.audio import Recording
from tokentm_jax.data.examples import Example
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.identity import digest
from tokentm_jax.inputs.images import Preprocessing

MAX_MEMORY = 16 * 2**30  # bytes of all decoded images


class Data(NamedTuple):
    """A data set that fits in memory: images uint8 [n, H, W, C], labels int32 [n], one name per class."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def identity(self) -> str:
        """Of all bytes, and of what they are called."""
        state = hashlib.sha256(digest(self.class_names, self.images.shape, self.labels.tolist()).encode())
        for image in self.images:
            state.update(image.tobytes())
        return state.hexdigest()[:16]


def load_dataset(
    spec: str | Path,
    limit: int | None = None,
    names: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> Data:
    """Read a data set of equally large images, or of recordings.

    Args:
      spec: a data set with names of classes, see `tokentm_jax.data.sources.open_source`.
      limit: take so many images, spread evenly over the whole set.
      names: take those that match a pattern alone, see there.
      preprocessing: makes spectrograms of recordings; photos are taken as they are.

    Returns:
      The images, their labels and the class names. Images that cannot be read are left out with a warning that
      counts and names them.

    Raises:
      InputError: what `open_source` raises, no names of classes, no readable image, images of differing size, more
        than `MAX_MEMORY` bytes of them.
    """
    source = open_source(spec, limit=limit, names=names)
    if source.class_names is None:
        raise InputError(f"{source.name} has no names of classes, which training needs: take class folders")
    images: np.ndarray = np.empty((0, 1, 1, 3), np.uint8)
    labels, bad = [], []
    for index in range(len(source)):
        try:
            example = source[index]
            image = _array(example, preprocessing)
        except InputError as error:
            bad.append(str(error))
            continue
        first, size = (f"{array.shape[-2]} x {array.shape[-3]}" for array in (images, image))
        if not labels:
            if len(source) * image.nbytes > MAX_MEMORY:
                size = f"{len(source)} images of {size} pixels"
                raise InputError(f"{source.name} has {size}, too many for the memory; use a limit or smaller images")
            images = np.empty((len(source), *image.shape), np.uint8)
        elif size != first:
            raise InputError(f"{source.name} has images of differing size ({first} and {size} pixels)")
        images[len(labels)] = image
        labels.append(example.label)
    if bad:
        shown = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
        warnings.warn(f"{len(bad)} images of {source.name} were skipped: {shown}", stacklevel=2)
    if not labels:
        raise InputError(f"{source.name} has no image that can be read")
    return Data(images[: len(labels)], np.array(labels, np.int32), source.class_names)


def _array(example: Example, preprocessing: Preprocessing | None) -> np.ndarray:
    if not isinstance(example.content, Recording):
        return np.asarray(example.content)
    if preprocessing is None:
        raise InputError(f"{example.key} is a recording: it needs to be said how it becomes a spectrogram")
    return preprocessing.levels(example)[0]
