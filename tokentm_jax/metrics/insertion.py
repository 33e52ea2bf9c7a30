"""Insertion and deletion (Petsiuk et al., BMVC 2018): the probability as pixels appear and as they are removed."""

from typing import Annotated, Literal

import jax.numpy as jnp
from annotated_types import Ge, Le
from jax import Array
from jaxtyping import Float

from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.removal import Fill, most, no_labels, plotted, removal, stacked, total, two_curves
from tokentm_jax.metrics.statistics import unit_area
from tokentm_jax.metrics.task import Column, Input, Plot, Predict, Steps, Subject, Target, Task, followed_in
from tokentm_jax.validation import checked


def insertion_deletion(
    predict: Predict,
    images: Input,
    maps: Float[AnyArray, "B h w"],
    target: Target,
    fill: Fill = 0.0,
    steps: int = 20,
    nearest: bool = False,
) -> dict[str, Float[Array, "B 2 {steps}+1"]]:
    """Curves while the pixels, the most relevant first, are put on `fill` (insertion), and replaced by it (deletion).

    Insertion of k pixels is removal of all but k from the other end.

    Args:
      predict, images, target, fill: see `removal`.
      maps: of pixels.
      steps: of each curve.
      nearest: of n pixels s n / steps are changed in step s, rounded down, or to the nearest number (a half up).

    Returns:
      The insertion curve and the deletion curve, as `log_probability` or `score`.

    Raises:
      InputError: `steps` that are not from 1 to the number of pixels, and 1000 at most.
    """
    pixels = total(images, maps)
    steps = checked("steps", Annotated[int, Ge(1), Le(most(pixels))], steps)
    shown = [(s * pixels + (steps // 2 if nearest else 0)) // steps for s in range(steps + 1)]
    counts = stacked([pixels - k for k in shown] + shown)
    positive = jnp.arange(len(counts)) > steps
    return two_curves(removal(predict, images, maps, target, no_labels(images), counts, positive, fill))


def _insertion(
    predict: Predict, subject: Subject, maps: Array, *, fill: Literal["black", "blur"] = "black", steps: Steps = 20
) -> dict[str, Array]:
    return insertion_deletion(predict, subject.inputs, maps, subject.target, subject.background(fill), steps)


INSERTION = Task(
    _insertion,
    {
        "insertion_auc": Column(lambda table: 100 * followed_in(table)[:, 0], unit_area, "higher"),
        "deletion_auc": Column(lambda table: 100 * followed_in(table)[:, 1], unit_area, "lower"),
    },
    Plot("pixels changed [%]", "probability", plotted("insertion (higher is better)", "deletion (lower is better)")),
)
