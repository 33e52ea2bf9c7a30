"""SaCo (Wu et al., CVPR 2024): whether more salient groups of pixels cost the class more."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.metrics.removal import MOST, confidence, rank_pixels
from tokentm_jax.metrics.task import Column, Predict, Subject, Target, Task
from tokentm_jax.validation import checked

GROUPS = 10  # of pixels


def group_drops(
    predict: Predict, images: Array, maps: Array, target: Target, groups: int = GROUPS
) -> dict[str, Array]:
    """What `saco` needs: salience [B, groups] of equally large groups of pixels, the most relevant first, and the
    drop of what is followed when a group is set to the image's mean colour.

    Raises InputError for `groups` that are not from 2 (a pair) to the number of pixels, and 1000 at most.
    """
    _, h, w = maps.shape
    groups = checked("groups", Annotated[int, Ge(2), Le(min(h * w, MOST))], groups)
    # 64 bits are not at hand; h * w * groups stays below 2^31 up to 14,000 x 14,000 pixels.
    group = rank_pixels(maps) * groups // (h * w)
    fill = images.mean((1, 2), keepdims=True)

    def step(k: Array) -> tuple[Array, Array]:
        inside = group == k
        salience = jnp.where(inside, maps, 0).sum((1, 2))
        return salience, confidence(predict, jnp.where(inside[..., None], fill, images), target)

    salience, without = jax.lax.map(step, jnp.arange(groups, dtype=jnp.int32))
    return {"salience": salience.T, "drop": (confidence(predict, images, target) - without).T}


def saco(salience: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """Salience-guided faithfulness coefficient (Wu et al., CVPR 2024) in [-1, 1], from arrays [n, groups] -> [n].

    Every pair i < j of groups (i the more salient) counts by its difference of salience, positively where the drops
    of confidence agree (drop_i >= drop_j); divided by the sum of the differences. A constant map has 0.
    Raises InputError for fewer than two groups.
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
    return group_drops(predict, subject.images, maps, subject.target, groups)


SACO = Task(
    _saco,
    {
        "saco": Column(
            lambda table: saco(table["predicted_salience"], table["predicted_drop"]),
            better="higher",
            digits=3,
        )
    },
)
