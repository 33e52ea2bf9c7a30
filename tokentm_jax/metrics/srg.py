"""Symmetric relevance gain (Bluecher et al., TMLR 2024): the probability as patches are removed from either end."""

from typing import Annotated

import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array
from jaxtyping import Float

from tokentm_jax.maths.maps import Tiling
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.removal import Fill, by_patch, most, no_labels, plotted, removal, stacked, total, two_curves
from tokentm_jax.metrics.statistics import unit_area
from tokentm_jax.metrics.task import (
    Background,
    Column,
    Input,
    Plot,
    Predict,
    Steps,
    Subject,
    Target,
    Task,
    followed_in,
)
from tokentm_jax.validation import checked


def patch_removal(
    predict: Predict,
    images: Input,
    maps: Float[AnyArray, "B gh gw"],
    target: Target,
    fill: Fill,
    steps: int = 20,
    tiling: Tiling | None = None,
) -> dict[str, Float[Array, "B 2 {steps}+1"]]:
    """What `srg` needs: curves while patches are removed, from none to all.

    Args:
      predict, images, target, fill, tiling: see `removal`.
      maps: of patches.
      steps: of each curve.

    Returns:
      `log_probability` or `score`, with the most relevant patches removed first, and with the least relevant ones.

    Raises:
      InputError: `steps` that are not from 1 to the number of patches, and 1000 at most.
    """
    patches = total(images, maps)
    steps = checked("steps", Annotated[int, Ge(1), Le(most(patches))], steps)
    counts = stacked([s * patches // steps for s in range(steps + 1)] * 2)
    positive = jnp.arange(2 * steps + 2) <= steps
    return two_curves(removal(predict, images, maps, target, no_labels(images), counts, positive, fill, tiling))


def srg(log_probability: Float[np.ndarray, "n 2 k"]) -> Float[np.ndarray, " n"]:
    """Symmetric relevance gain (Bluecher et al., TMLR 2024): area between the two curves of `patch_removal`.

    A map and its negative have opposite gains, except for ties.

    Args:
      log_probability: from `patch_removal`.

    Returns:
      The mean probability while the least relevant patches are removed first, less that while the most relevant ones
      are: in [-1, 1].
    """
    return gain(np.exp(log_probability))


def gain(curves: Float[np.ndarray, "n 2 k"]) -> Float[np.ndarray, " n"]:
    """`srg` of what was followed.

    Args:
      curves: of the probability or of a score.

    Returns:
      The gain of each image.
    """
    most, least = unit_area(curves).T
    return least - most


def _srg(
    predict: Predict, subject: Subject, maps: Array, *, fill: Background = "mean", steps: Steps = 20
) -> dict[str, Array]:
    maps = by_patch(maps, subject.grid, subject.tiling)
    background = subject.background(fill)
    return patch_removal(predict, subject.inputs, maps, subject.target, background, steps, subject.tiling)


SRG = Task(
    _srg,
    {"srg": Column(lambda table: gain(followed_in(table)), better="higher", digits=3)},
    Plot(
        "patches removed [%]",
        "probability",
        plotted("most relevant first (lower is better)", "least relevant first (higher is better)"),
    ),
    raw=True,
)
