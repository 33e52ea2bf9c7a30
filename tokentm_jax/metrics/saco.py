"""SaCo (Wu et al., CVPR 2024): whether more salient groups of pixels cost the class more."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array
from jaxtyping import Float, Num

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.values import of
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.removal import MOST, confidence, rank_pixels, total
from tokentm_jax.metrics.task import Column, Input, Predict, Subject, Target, Task
from tokentm_jax.validation import checked

GROUPS = 10  # of pixels


def group_drops(
    predict: Predict,
    images: Input,
    maps: Float[AnyArray, "B h w"],
    target: Target,
    groups: int = GROUPS,
    fill: Array | None = None,
) -> dict[str, Float[Array, "B {groups}"]]:
    """What `saco` needs, of equally large groups of pixels, the most relevant first.

    Args:
      predict, images, target: see `removal`.
      maps: of pixels.
      groups: how many.
      fill: what a group is set to; None: the image's mean colour.

    Returns:
      The `salience` of each group, and the `drop` of what is followed without it.

    Raises:
      InputError: `groups` that are not from 2 (a pair) to the number of pixels, and 1000 at most.
    """
    _, h, w = maps.shape
    groups = checked("groups", Annotated[int, Ge(2), Le(min(h * w, MOST))], groups)
    # 64 bits are not at hand; h * w * groups stays below 2^31 up to 14,000 x 14,000 pixels.
    removable = of(images).removable
    group = rank_pixels(maps, removable) * groups // total(images, maps)
    if removable is not None:
        group = jnp.where(removable, group, groups)
    fill = of(images).values.mean((1, 2), keepdims=True) if fill is None else fill

    def step(k: Array) -> tuple[Array, Array]:
        inside = group == k
        salience = jnp.where(inside, maps, 0).sum((1, 2))
        return salience, confidence(predict, of(images).without(inside, fill), target)

    salience, without = jax.lax.map(step, jnp.arange(groups, dtype=jnp.int32))
    return {"salience": salience.T, "drop": (confidence(predict, images, target) - without).T}


def saco(salience: Num[np.ndarray, "n groups"], drop: Num[np.ndarray, "n groups"]) -> Float[np.ndarray, " n"]:
    """Salience-guided faithfulness coefficient (Wu et al., CVPR 2024).

    Every pair i < j of groups (i the more salient) counts by its difference of salience, positively where the drops
    of confidence agree (drop_i >= drop_j); divided by the sum of the differences.

    Args:
      salience, drop: of each group, from `group_drops`.

    Returns:
      The coefficient of each image in [-1, 1]; 0 for a constant map.

    Raises:
      InputError: fewer than two groups.
    """
    if salience.ndim != 2 or salience.shape[1] < 2 or salience.shape != drop.shape:
        shapes = f"{list(salience.shape)} and {list(drop.shape)}"
        raise InputError(f"saco needs salience and drop [n, groups] of two groups at least, got {shapes}")
    i, j = np.triu_indices(salience.shape[1], 1)
    weight = salience[:, i] - salience[:, j]
    signed = np.where(drop[:, i] >= drop[:, j], weight, -weight).sum(1)
    total = np.abs(weight).sum(1)
    return np.divide(signed, total, out=np.zeros(len(total)), where=total > 0)


def _saco(
    predict: Predict, subject: Subject, maps: Array, *, groups: Annotated[int, Ge(2), Le(MOST)] = GROUPS
) -> dict[str, Array]:
    fill = None if subject.removable is None else subject.background("mean")
    return group_drops(predict, subject.inputs, maps, subject.target, groups, fill)


SACO = Task(
    _saco,
    {
        "saco": Column(
            lambda table: saco(table["predicted_salience"], table["predicted_drop"]), better="higher", digits=3
        )
    },
)
