"""Labelled sentences: files with one sentence, a tab and the number of its class on each line."""

import os
from typing import NamedTuple

import numpy as np

from tokentm_jax.data.labels import number
from tokentm_jax.data.sources import spread
from tokentm_jax.errors import InputError
from tokentm_jax.files import read_text
from tokentm_jax.identity import digest

LARGEST = 256 * 2**20  # bytes


class Sentences(NamedTuple):
    """Sentences with their classes, int32 [n]; `identity` tells these and their order from others."""

    texts: tuple[str, ...]
    labels: np.ndarray
    identity: str


def read_sentences(path: str | os.PathLike[str], classes: int, limit: int | None = None) -> Sentences:
    """The sentences of a `.tsv` file without a header, such as SST-2's.

    Args:
      path: of the file, in UTF-8.
      classes: how many there are; labels are from 0 on.
      limit: take so many, spread evenly over the file.

    Raises:
      InputError: no such file, a line of another form, a label that there is not, no line at all.
    """
    texts, labels = [], []
    for place, line in enumerate(read_text(path, LARGEST, "the sentences").split("\n"), 1):
        if not line.strip():
            continue
        text, tab, label = line.rstrip("\r").rpartition("\t")
        index = number(label.strip())
        if not tab or not text.strip() or index is None or not 0 <= index < classes:
            raise InputError(
                f"{path}: line {place} must be a sentence, a tab and a class from 0 to {classes - 1}, got {line!r:.80}"
            )
        texts.append(text.strip())
        labels.append(index)
    if not texts:
        raise InputError(f"{path} holds no sentence")
    chosen = spread(range(len(texts)), limit)
    texts = tuple(texts[i] for i in chosen)
    found = np.array([labels[i] for i in chosen], np.int32)
    return Sentences(texts, found, digest(texts, found.tolist()))
