"""Data sets whose causes are known: rendered scenes with the numbers of their parts, and mosaics of photos."""

from typing import Any

import numpy as np
from PIL import Image

from tokentm_jax.data.scenes import RULES, SPLITS, scene
from tokentm_jax.data.sources import Example, Source, kind_of, open_source
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.identity import digest

VERSION = 1  # of what is drawn and rendered; another one has other pixels
MOST_CELLS = 4  # of a side of a mosaic


def open_causes(spec: str) -> Source:
    """The data set of "scenes:RULE:SPLIT" or "mosaic:K:DATA"; see `open_source`. Raises InputError."""
    return _scenes(spec) if spec.startswith("scenes:") else _mosaics(spec)


def _scenes(spec: str) -> Source:
    """Rendered scenes: with a mask of the numbers of their parts, and without these."""
    _, rule, split = [*spec.split(":"), "", ""][:3]
    if rule not in RULES:
        raise suggest("rule", rule, RULES)
    if split not in SPLITS or spec.count(":") > 2:
        raise InputError(f"rendered scenes are given as scenes:RULE:train or scenes:RULE:test, got {spec[:100]!r}")

    def read(key: str) -> Example:
        found = scene(rule, int(key), "train" if split == "train" else "test")
        image, without = Image.fromarray(found.image), Image.fromarray(found.without)
        return Example(key, image, found.label, found.ids, without)

    identity = digest("scenes", VERSION, rule, split, SPLITS[split])
    keys = tuple(f"{index:05d}" for index in range(SPLITS[split]))
    names = RULES[rule].classes
    return Source(spec, lambda: identity, keys, read, names, masked=True, parts=True, stamp=lambda _: identity)


def _mosaics(spec: str) -> Source:
    """Mosaics of k x k photos of different classes. An example is a cell of one: its class, and a mask of the cell.

    Mosaics of even numbers have photos at even positions of the data, others those at odd positions, and their cells
    alternate: so the halves of `open_source` have no photo in common.
    """
    _, side, data = [*spec.split(":", 2), "", ""][:3]
    if side not in [str(k) for k in range(2, MOST_CELLS + 1)] or not data:
        raise InputError(f"mosaics of k x k photos are given as mosaic:K:DATA, K from 2 to 4, got {spec[:100]!r}")
    k, inner = int(side), open_source(data)
    if not inner.labelled:
        raise InputError(f"{inner.name} has no labels, which mosaics need")
    photos: tuple[dict[Any, list[str]], ...] = ({}, {})
    for position, key in enumerate(inner.keys):
        photos[position % 2].setdefault(inner.encoded(key).label, []).append(key)
    fewest = min(map(len, photos))
    if fewest < k * k:
        raise InputError(f"mosaics of {k} x {k} photos need {2 * k * k} photos of different classes in {inner.name}")

    def chosen(number: int) -> list[str]:
        random = np.random.default_rng([VERSION, k, number])
        classes = photos[number % 2]
        order = random.permutation(len(classes))[: k * k]
        lists = [[*classes.values()][int(place)] for place in order]
        return [keys[int(random.integers(len(keys)))] for keys in lists]

    def read(key: str) -> Example:
        number, cell = map(int, key.split("/"))
        examples = [inner.read(name) for name in chosen(number)]
        for example in examples:
            if (kind := kind_of(example.content)) != "photo":
                raise InputError(f"{example.key} is a {kind}, and mosaics are of photos")
        length = min(min(example.content.size) for example in examples)
        picture, mask = Image.new("RGB", (k * length, k * length)), np.zeros((k * length, k * length), bool)
        for place, example in enumerate(examples):
            row, column = (length * i for i in divmod(place, k))
            picture.paste(_square(example.content, length), (column, row))
            if place == cell:
                mask[row : row + length, column : column + length] = True
        return Example(key, picture, examples[cell].label, mask)

    pairs = len(inner) // (2 * k * k)
    keys = tuple(f"{2 * n + odd:05d}/{cell}" for n in range(pairs) for cell in range(k * k) for odd in (0, 1))
    made = digest("mosaic", VERSION, k)
    return Source(
        f"{k} x {k} mosaics of {inner.name}",
        lambda: digest(made, inner.identity),
        keys,
        read,
        inner.class_names,
        masked=True,
        named=inner.named,
        stamp=lambda _: digest(made, inner.stamped()),
    )


def _square(photo: Image.Image, side: int) -> Image.Image:
    """The central square of a photo."""
    width, height = photo.size
    length = min(width, height)
    left, top = (width - length) // 2, (height - length) // 2
    return photo.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + length, top + length))
