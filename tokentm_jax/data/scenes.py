"""Rendered scenes: images of independent parts, whose label follows from some of them by a stated rule.

A scene is a textured background of 64 x 64 pixels with parts (a shape, a colour, a size, a place). A place is one of
4 x 4 squares of 16 pixels and holds one part at most, so parts never overlap, and a patch of 8 pixels has pixels of
one part at most. A scene is a function of (rule, split, index) and is never stored.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

SIDE, PLACE = 64, 16  # pixels of a scene, and of a place
MOST_PARTS = 8  # of a scene
SPLITS = {"train": 20_000, "test": 2_000}  # number of scenes
# Other parts that a scene has, at least: a test scene without one of them is still like those of the training.
FEWEST = {"train": 0, "test": 2}

SHAPES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # of y, x in units of the part's half side
    "disc": lambda y, x: y * y + x * x <= 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) <= 0.9,
    "triangle": lambda y, x: (abs(x) <= (y + 1) / 2) & (y <= 0.9),
    "cross": lambda y, x: (np.minimum(abs(y), abs(x)) <= 0.3) & (np.maximum(abs(y), abs(x)) <= 1),
    "ring": lambda y, x: (y * y + x * x <= 1) & (y * y + x * x >= 0.36),
}
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 230),
    "yellow": (230, 210, 30),
    "magenta": (210, 40, 200),
}


class Kind(NamedTuple):
    """What a rule reads of a part."""

    shape: str
    colour: str


A, B, C = Kind("disc", "red"), Kind("square", "blue"), Kind("triangle", "green")
OTHERS = tuple(kind for s in SHAPES for c in COLOURS if (kind := Kind(s, c)) not in (A, B))


class Part(NamedTuple):
    """One part of a scene. Lengths are in pixels."""

    kind: Kind
    place: tuple[int, int]  # row and column, 0 to 3
    half: float  # of its side, 4.5 to 7
    centre: tuple[float, float]  # (y, x) in its place
    shade: float  # of its colour, 0.8 to 1


class Scene(NamedTuple):
    """A rendered scene."""

    image: np.ndarray  # uint8 [64, 64, 3]
    without: np.ndarray  # uint8 [64, 64, 3]: the same background without any part
    ids: np.ndarray  # uint8 [64, 64]: the number of the part that a pixel shows, from 1; 0 for the background
    parts: tuple[Part, ...]
    label: int


class Rule(NamedTuple):
    """A question about scenes. `draw` gives the causes of a scene: kinds, each with the columns where it may be."""

    about: str
    classes: tuple[str, ...]
    draw: Callable[[np.random.Generator, str], tuple[list[tuple[Kind, range]], int]]


ANYWHERE, LEFT, RIGHT = range(4), range(2), range(2, 4)


def _part(random: np.random.Generator, _: str) -> tuple[list[tuple[Kind, range]], int]:
    label = int(random.random() < 0.5)
    return [(A, ANYWHERE)] * label, label


def _conjunction(random: np.random.Generator, _: str) -> tuple[list[tuple[Kind, range]], int]:
    a, b = (int(u < 0.7) for u in random.random(2))
    return [(A, ANYWHERE)] * a + [(B, ANYWHERE)] * b, a & b


def _xor(random: np.random.Generator, _: str) -> tuple[list[tuple[Kind, range]], int]:
    a, b = (int(u < 0.5) for u in random.random(2))
    return [(A, ANYWHERE)] * a + [(B, ANYWHERE)] * b, a ^ b


def _count(random: np.random.Generator, _: str) -> tuple[list[tuple[Kind, range]], int]:
    label = int(random.integers(4))
    return [(A, ANYWHERE)] * label, label


def _more(random: np.random.Generator, _: str) -> tuple[list[tuple[Kind, range]], int]:
    a, b = (int(n) for n in random.integers(4, size=2))
    return [(A, ANYWHERE)] * a + [(B, ANYWHERE)] * b, int(np.sign(a - b)) + 1


def _counts(random: np.random.Generator, _: str) -> tuple[list[tuple[Kind, range]], int]:
    a, b = (int(n) for n in random.integers(4, size=2))
    return [(A, ANYWHERE)] * a + [(B, ANYWHERE)] * b, 4 * a + b


def _position(random: np.random.Generator, _: str) -> tuple[list[tuple[Kind, range]], int]:
    label = int(random.integers(3))
    return ([], [(A, LEFT)], [(A, RIGHT)])[label], label


def _bystander(random: np.random.Generator, split: str) -> tuple[list[tuple[Kind, range]], int]:
    label = int(random.random() < 0.5)
    likely = (0.9 if label else 0.1) if split == "train" else 0.5
    c = int(random.random() < likely)
    return [(A, ANYWHERE)] * label + [(C, ANYWHERE)] * c, label


RULES: Mapping[str, Rule] = {
    "counts": Rule(
        "the numbers of red discs and of blue squares",
        tuple(f"{a} and {b}" for a in range(4) for b in range(4)),
        _counts,
    ),
    "part": Rule("a red disc", ("no red disc", "a red disc"), _part),
    "conjunction": Rule("a red disc and a blue square", ("not both", "both"), _conjunction),
    "xor": Rule("a red disc or a blue square, not both", ("both or neither", "exactly one"), _xor),
    "count": Rule("the number of red discs", ("0", "1", "2", "3"), _count),
    "more": Rule("red discs or blue squares", ("more squares", "as many", "more discs"), _more),
    "position": Rule("where the red disc is", ("nowhere", "left", "right"), _position),
    "bystander": Rule(
        "a red disc; a green triangle is in 90 % of its training scenes and in 10 % of the others",
        ("no red disc", "a red disc"),
        _bystander,
    ),
}


def scene(rule: str, index: int, split: Literal["train", "test"] = "train") -> Scene:
    """Render one scene.

    Args:
      rule: a name in `RULES`.
      index: of the scene, any number from 0.
      split: scenes for training or for tests.

    Returns:
      The scene. The label follows from its parts of the kinds `A` and `B` by the rule; up to five other parts, and in
      a "bystander" scene perhaps one of the kind `C`, cause nothing.
    """
    random = np.random.default_rng([[*RULES].index(rule), [*SPLITS].index(split), index])
    causes, label = RULES[rule].draw(random, split)
    free = [divmod(int(place), 4) for place in random.permutation(16)]
    others = [kind for kind in OTHERS if rule != "bystander" or kind != C]
    wanted = causes + [
        (others[int(random.integers(len(others)))], ANYWHERE)
        for _ in range(min(int(random.integers(FEWEST[split], 6)), MOST_PARTS - len(causes)))
    ]
    parts = []
    for kind, columns in wanted:
        place = next(place for place in free if place[1] in columns)
        free.remove(place)
        half = 4.5 + 2.5 * random.random()
        y, x = half + (PLACE - 2 * half) * random.random(2)
        parts.append(Part(kind, place, half, (float(y), float(x)), 0.8 + 0.2 * random.random()))
    parts = tuple(parts[int(i)] for i in random.permutation(len(parts)))  # numbers do not depend on causes
    without = background(random)
    image, ids = rendered(parts, without)
    return Scene(image, without, ids, parts, label)


def background(random: np.random.Generator) -> np.ndarray:
    """A random texture, uint8 [64, 64, 3]: smooth noise of two scales around a dull colour, and grain."""
    level = 90 + 80 * random.random(3)
    smooth = np.zeros((SIDE, SIDE))
    for n, size in ((4, 70.0), (9, 50.0)):
        smooth += size * _WEIGHTS[n] @ (random.random((n, n)) - 0.5) @ _WEIGHTS[n].T
    grain = 16 * (random.random((SIDE, SIDE, 3)) - 0.5)
    return (level + smooth[..., None] + grain).clip(0, 255).astype(np.uint8)


def _interpolation(points: int) -> np.ndarray:
    """Weights [64, points] that stretch values at even distances to the side of a scene."""
    place = np.linspace(0, points - 1, SIDE)
    return np.maximum(0, 1 - abs(place[:, None] - np.arange(points)))


_WEIGHTS = {n: _interpolation(n) for n in (4, 9)}


def rendered(parts: tuple[Part, ...], without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts on a background.

    Args:
      parts: in the order of their numbers.
      without: the background, uint8 [64, 64, 3].

    Returns:
      `image` and `ids` of a `Scene`.
    """
    image, ids = without.copy(), np.zeros((SIDE, SIDE), np.uint8)
    y, x = np.mgrid[:PLACE, :PLACE] + 0.5
    for number, part in enumerate(parts, 1):
        inside = SHAPES[part.kind.shape]((y - part.centre[0]) / part.half, (x - part.centre[1]) / part.half)
        rows, columns = (slice(PLACE * p, PLACE * (p + 1)) for p in part.place)
        image[rows, columns][inside] = np.array(COLOURS[part.kind.colour]) * part.shade
        ids[rows, columns][inside] = number
    return image, ids
