"""Questions about rendered scenes, with answers by a rule and the parts that cause each word of an answer.

A scene is as in `scenes`, with one to five parts of two sizes. A question names some parts by what sets them apart
from all others. Scene, question and answer are a function of (split, index) and are never stored.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tokentm_jax.data.scenes import COLOURS, PLACE, SHAPES, Kind, Part, Scene, background, rendered

VERSION = 1  # of what is drawn; another one has other questions
MOST_PARTS = 5
SPLITS = {"train": 100_000, "test": 2_000}  # number of scenes
SIZES: Mapping[str, tuple[float, float]] = {"small": (4.0, 4.8), "large": (6.4, 7.0)}  # half of a side, in pixels
NOUNS: Mapping[str, str] = {shape: {"disc": "circle"}.get(shape, shape) for shape in SHAPES}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIDES = (("top", "bottom"), ("left", "right"))
ASKED = ("colour", "shape", "place", "number")
_OF_QUESTIONS = ("what", "colour", "is", "the", "shape", "where", "how", "many", "shapes", "are", "there", "?")
_PLURALS = tuple(f"{noun}{'es' if noun.endswith('s') else 's'}" for noun in NOUNS.values())
_OF_ANSWERS = (*NUMBERS, *SIDES[0], *SIDES[1])
WORDS = (*_OF_QUESTIONS, *SIZES, *COLOURS, *NOUNS.values(), *_PLURALS, *_OF_ANSWERS)  # of all questions and answers


class Asked(NamedTuple):
    """A question about a scene."""

    scene: Scene
    about: str  # one of `ASKED`
    question: str
    answer: tuple[str, ...]  # its words
    causes: tuple[tuple[int, ...], ...]  # for each word, the numbers of the parts that it follows from


def size_of(part: Part) -> str:
    """The word for the size of a part."""
    return next(word for word, (_, most) in SIZES.items() if part.half <= most)


def drawn(index: int, split: Literal["train", "test"] = "train") -> Scene:
    """Render the scene of this number, without a question."""
    random = np.random.default_rng([VERSION, [*SPLITS].index(split), index])
    places = random.permutation(16)[: int(random.integers(1, MOST_PARTS + 1))]
    shapes, colours = (random.integers(len(names), size=len(places)) for names in (SHAPES, COLOURS))
    parts = []
    for place, shape, colour in zip(places, shapes, colours, strict=True):
        low, high = SIZES[("small", "large")[int(random.integers(2))]]
        half = low + (high - low) * random.random()
        y, x = half + (PLACE - 2 * half) * random.random(2)
        kind = Kind([*SHAPES][shape], [*COLOURS][colour])
        parts.append(Part(kind, divmod(int(place), 4), half, (float(y), float(x)), 0.8 + 0.2 * random.random()))
    without = background(random)
    image, ids = rendered(tuple(parts), without)
    return Scene(image, without, ids, tuple(parts), 0)


def asked(
    index: int, split: Literal["train", "test"] = "train", about: str | None = None, scene: Scene | None = None
) -> Asked:
    """A question about a scene, with its answer.

    Args:
      index: of the scene, any number from 0.
      split: scenes for training or for tests.
      about: one of `ASKED`; None: by the index, in turn, so that even and odd indices have all of them.
      scene: the scene, where it is known.

    Returns:
      The question. A question about a kind of part that the scene lacks has the answer "zero", which nothing causes.
    """
    about = ASKED[index // 2 % len(ASKED)] if about is None else about
    scene = drawn(index, split) if scene is None else scene
    random = np.random.default_rng([VERSION, [*SPLITS].index(split), index, ASKED.index(about)])
    return _ABOUT[about](scene, random)


def _named(scene: Scene, random: np.random.Generator, ways: Sequence[str]) -> tuple[int, str] | None:
    """The index of a part that one of these ways to name it sets apart, and the name. None: there is no such part."""
    for index in map(int, random.permutation(len(scene.parts))):
        for way in map(int, random.permutation(len(ways))):
            names = [_name(part, ways[way]) for part in scene.parts]
            if names.count(names[index]) == 1:
                return index, names[index]
    return None


def _name(part: Part, way: str) -> str:
    words = {"size": size_of(part), "colour": part.kind.colour, "shape": NOUNS[part.kind.shape]}
    return " ".join(words.get(word, word) for word in way.split())


def _colour(scene: Scene, random: np.random.Generator) -> Asked:
    found = _named(scene, random, ("shape", "size shape"))
    if found is None:
        return _number(scene, random)
    index, name = found
    colour = scene.parts[index].kind.colour
    return Asked(scene, "colour", f"What colour is the {name}?", (colour,), ((index + 1,),))


def _shape(scene: Scene, random: np.random.Generator) -> Asked:
    """The answer is a shape, after its colour where the question does not have it."""
    found = _named(scene, random, ("colour", "size colour", "size"))
    if found is None:
        return _number(scene, random)
    index, name = found
    kind = scene.parts[index].kind
    words = (NOUNS[kind.shape],) if kind.colour in name.split() else (kind.colour, NOUNS[kind.shape])
    return Asked(scene, "shape", f"What is the {name} shape?", words, ((index + 1,),) * len(words))


def _place(scene: Scene, random: np.random.Generator) -> Asked:
    found = _named(scene, random, ("colour shape", "size colour shape"))
    if found is None:
        return _number(scene, random)
    index, name = found
    words = tuple(SIDES[axis][place // 2] for axis, place in enumerate(scene.parts[index].place))
    return Asked(scene, "place", f"Where is the {name}?", words, ((index + 1,),) * 2)


def _number(scene: Scene, random: np.random.Generator) -> Asked:
    way = ("colour shapes", "shape", "size shapes", "shapes")[int(random.choice(4, p=(0.4, 0.35, 0.2, 0.05)))]
    like = scene.parts[int(random.integers(len(scene.parts)))]
    if random.random() < 0.25:  # perhaps a kind that the scene lacks
        kind = Kind([*SHAPES][int(random.integers(len(SHAPES)))], [*COLOURS][int(random.integers(len(COLOURS)))])
        like = like._replace(kind=kind)
    name = _name(like, way)
    found = tuple(number for number, part in enumerate(scene.parts, 1) if _name(part, way) == name)
    plural = name if name.endswith("shapes") else f"{name}{'es' if name.endswith('s') else 's'}"
    return Asked(scene, "number", f"How many {plural} are there?", (NUMBERS[len(found)],), (found,))


_ABOUT: Mapping[str, Callable[[Scene, np.random.Generator], Asked]] = {
    "colour": _colour, "shape": _shape, "place": _place, "number": _number,
}  # fmt: skip
