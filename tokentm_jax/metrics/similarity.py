"""Rank correlation with other maps: of the model with random parameters, or the Shapley values of the patches."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Num

from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.removal import by_patch
from tokentm_jax.metrics.statistics import magnitude
from tokentm_jax.metrics.task import Column, Predict, Subject, Task


def rank_correlation(
    a: Num[AnyArray, " B *s"], b: Num[AnyArray, " B *s"], where: Bool[AnyArray, "..."] | None = None
) -> Float[Array, " B"]:
    """Spearman's correlation of each pair of maps.

    Args:
      a, b: maps. Equal values share their mean rank.
      where: which values count; None: all.

    Returns:
      The correlation in [-1, 1]; 0 for a constant map.
    """
    counted = jnp.ones(a.shape, bool) if where is None else jnp.broadcast_to(where, a.shape)

    def ranks(values: AnyArray, counted: Array) -> Array:
        ordered = jnp.sort(jnp.where(counted, values, jnp.inf))
        low, high = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
        found = (low + jnp.minimum(high, counted.sum())).astype(jnp.float32) / 2
        return jnp.where(counted, found - found.mean(where=counted), 0)

    def one(x: AnyArray, y: AnyArray, counted: Array) -> Array:
        return _correlation(*(ranks(values.ravel(), counted.ravel()) for values in (x, y)))

    return jax.vmap(one)(a, b, counted)


def linear_correlation(
    a: Float[AnyArray, "B K"], b: Float[AnyArray, "B K"], where: Bool[AnyArray, "B K"]
) -> Float[Array, " B"]:
    """Pearson's correlation of each pair of rows.

    Args:
      a, b: numbers.
      where: which numbers count.

    Returns:
      The correlation in [-1, 1]; 0 for a constant row.
    """
    a, b = (jnp.where(where, x - x.mean(1, where=where, keepdims=True), 0) for x in (a, b))
    return _correlation(a, b)


def _correlation(x: Array, y: Array) -> Array:
    """Of numbers along the last axis, whose mean is zero."""
    norm = jnp.sqrt(jnp.square(x).sum(-1) * jnp.square(y).sum(-1))
    return jnp.where(norm > 0, (x * y).sum(-1) / jnp.where(norm > 0, norm, 1), 0)


def _sanity(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    assert subject.original is not None
    return {"similarity": rank_correlation(maps, subject.original, subject.removable)}


def _agreement(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    assert subject.reference is not None
    _, gh, gw = subject.reference.shape
    maps = by_patch(maps, (gh, gw), subject.tiling)
    return {"agreement": rank_correlation(maps, subject.reference, subject.removable)}


SANITY = Task(
    _sanity,
    {"similarity": Column(lambda table: table["predicted_similarity"], magnitude, "lower", digits=3)},
    raw=True,
    against_original=True,
)


SHAPLEY = Task(
    _agreement,
    {"shapley_agreement": Column(lambda table: table["predicted_agreement"], better="higher", digits=3)},
    raw=True,
    reference="shapley",
)
