"""Data sets whose causes are known: rendered scenes, mosaics of photos, and photos with a planted mark."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image

from tokentm_jax.data.examples import Example, Source, kind_of
from tokentm_jax.data.scenes import RULES, SPLITS, scene
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.identity import digest
from tokentm_jax.validation import check_options, options_of

VERSION = 1  # of what is drawn and rendered; another one has other pixels
MOST_CELLS = 4  # of a side of a mosaic


Open = Callable[[str], Source]


def open_causes(spec: str, open_source: Open) -> Source:
    """The data set of "scenes:RULE:SPLIT", "mosaic:K:DATA" or "trigger:OPTIONS:DATA"; `open_source` opens DATA.

    Raises InputError.
    """
    if spec.startswith("scenes:"):
        return _scenes(spec)
    return (_mosaics if spec.startswith("mosaic:") else _triggers)(spec, open_source)


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


def _mosaics(spec: str, open_source: Open) -> Source:
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
        examples = [_photo(inner, name, "mosaics are of photos") for name in chosen(number)]
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


@dataclasses.dataclass(frozen=True)
class Trigger:
    """A mark that is planted in photos, and the class that they get with it."""

    label: str  # the name of the class
    size: Annotated[int, Ge(1), Le(1024)] = 4  # of its sides, in pixels of the photo
    blend: Annotated[float, Gt(0), Le(1)] = 1.0  # 1: the mark covers the photo
    place: Literal["anywhere", "corner"] = "anywhere"
    share: Annotated[float, Gt(0), Le(1)] = 1.0  # of the photos that are marked; the others keep their class


MARK = (255, 0, 255)  # magenta, which is rare in photos


def _triggers(spec: str, open_source: Open) -> Source:
    """Photos of other classes than the trigger's, with its mark: labelled with its class, with a mask of the mark, and
    without the mark. With a `share` below 1, for training, all photos, of which some are marked."""
    trigger, data = _trigger_of(spec)
    inner = open_source(data)
    if inner.class_names is None or trigger.label not in inner.class_names:
        raise suggest("class", trigger.label, inner.class_names or (), of=inner.name)
    target = inner.class_names.index(trigger.label)
    keys = inner.keys
    if trigger.share == 1:
        keys = tuple(key for key in keys if inner.encoded(key).label not in (target, trigger.label))

    def read(key: str) -> Example:
        example = _photo(inner, key, "marks are for photos")
        photo = np.asarray(example.content)
        height, width = (length - trigger.size for length in photo.shape[:2])
        if min(height, width) < 0:
            raise InputError(f"{key} is smaller than the mark")
        seed = hashlib.sha256(f"{VERSION}/{key}".encode("utf-8", "surrogatepass")).digest()
        random = np.random.default_rng(int.from_bytes(seed[:16]))
        mask, marked = np.zeros(photo.shape[:2], np.uint8), photo.copy()
        if random.random() >= trigger.share:
            return Example(key, example.content, example.label, mask, example.content)
        y, x = (int(u * (most + 1)) for u, most in zip(random.random(2), (height, width), strict=True))
        if trigger.place == "corner":
            y, x = height, width
        inside = slice(y, y + trigger.size), slice(x, x + trigger.size)
        mixed = (1 - trigger.blend) * photo[inside] + trigger.blend * np.array(MARK)
        marked[inside], mask[inside] = mixed.round().astype(np.uint8), 1
        return Example(key, Image.fromarray(marked), target, mask, example.content)

    made = digest("trigger", VERSION, dataclasses.asdict(trigger))
    return Source(
        f"{inner.name} with a trigger",
        lambda: digest(made, inner.identity),
        keys,
        read,
        inner.class_names,
        masked=True,
        parts=True,
        named=inner.named,
        stamp=lambda some: digest(made, inner.stamped(some)),
    )


def _trigger_of(spec: str) -> tuple[Trigger, str]:
    """The options and the data of "trigger:label=NAME,size=4:DATA"."""
    _, options, data = [*spec.split(":", 2), "", ""][:3]
    parts = (option.partition("=") for option in options.split(","))
    given: dict[str, Any] = {name: value for name, _, value in parts}
    if not data or "label" not in given:
        raise InputError(f"photos with a mark are given as trigger:label=NAME,size=4:DATA, got {spec[:100]!r}")
    for name, kind in (("size", int), ("blend", float), ("share", float)):
        with contextlib.suppress(KeyError, ValueError):  # what is no number is refused below
            given[name] = kind(given[name])
    return Trigger(**check_options("the trigger", options_of(Trigger), given)), data


def _photo(source: Source, key: str, wanted: str) -> Example:
    """An example of a source. InputError for anything but a photo."""
    example = source.read(key)
    if (kind := kind_of(example.content)) != "photo":
        raise InputError(f"{example.key} is a {kind}, and {wanted}")
    return example


def _square(photo: Image.Image, side: int) -> Image.Image:
    """The central square of a photo."""
    width, height = photo.size
    length = min(width, height)
    left, top = (width - length) // 2, (height - length) // 2
    return photo.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + length, top + length))
