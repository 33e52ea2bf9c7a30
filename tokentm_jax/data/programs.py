"""Images for known programs: models with weights written by hand, whose effects have a closed form.

An image has 4 x 4 patches of one colour each: pure red, green or blue, or black, which is the patch without content.
With r, g, b in [0, 1] of a patch, the explained score is

    copy     10 (r - b) of the patch `COPIED`, up to the sign of the class: only this patch has an effect
    count    10 times the sum of r - b over all patches, likewise: each patch has its own share
    compare  5 if the patches `PAIR` have the same colour, -5 if not: without one of two equal patches it falls by 10

An image is a function of (program, index) and is never stored.
"""

from collections.abc import Mapping

import numpy as np

GRID, PATCH = 4, 4  # patches of a side, and pixels of a patch
IMAGES = 1000  # of a program
COPIED, PAIR = 6, (5, 10)  # numbers of patches, from 0
PROGRAMS: Mapping[str, tuple[str, str]] = {  # the names of the classes
    "copy": ("red", "blue"),
    "count": ("red", "blue"),
    "compare": ("same", "different"),
}


def image(program: str, index: int) -> tuple[np.ndarray, int]:
    """An image, uint8 [16, 16, 3], and the number of its class."""
    random = np.random.default_rng([*program.encode(), index])
    kinds = random.integers(4, size=GRID * GRID)  # 3: black
    levels = np.where(program == "compare", 255, random.integers(80, 256, GRID * GRID))
    label = int(random.integers(2))
    if program == "copy":
        kinds[COPIED] = 2 * label
    if program == "compare":
        kinds[list(PAIR)] = random.permutation(3)[[0, label]]
    colours = (np.arange(3) == kinds[:, None]) * levels[:, None]
    if program == "count":
        label = int(colours[:, 0].sum() < colours[:, 2].sum())
    square = colours.reshape(GRID, GRID, 3).astype(np.uint8)
    return square.repeat(PATCH, 0).repeat(PATCH, 1), label


def patches() -> np.ndarray:
    """The number of the patch at each pixel, from 1 on: uint8 [16, 16]."""
    numbers = np.arange(1, GRID * GRID + 1, dtype=np.uint8).reshape(GRID, GRID)
    return numbers.repeat(PATCH, 0).repeat(PATCH, 1)
