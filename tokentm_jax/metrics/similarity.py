"""Rank correlation with other maps: of the model with random parameters, or the Shapley values of the patches."""

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.metrics.removal import by_patch
from tokentm_jax.metrics.statistics import magnitude
from tokentm_jax.metrics.task import Column, Predict, Subject, Task


def rank_correlation(a: Array, b: Array) -> Array:
    """Spearman's correlation of maps [B, ...] -> [B], equal values sharing their mean rank; 0 for a constant map."""

    def ranks(values: Array) -> Array:
        ordered = jnp.sort(values)
        low, high = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
        return (low + high).astype(jnp.float32) / 2

    def one(x: Array, y: Array) -> Array:
        x, y = (r - r.mean() for r in (ranks(x.ravel()), ranks(y.ravel())))
        norm = jnp.sqrt(jnp.square(x).sum() * jnp.square(y).sum())
        return jnp.where(norm > 0, (x * y).sum() / jnp.where(norm > 0, norm, 1), 0)

    return jax.vmap(one)(a, b)


def _sanity(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    assert subject.original is not None
    return {"similarity": rank_correlation(maps, subject.original)}


def _agreement(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    assert subject.reference is not None
    _, gh, gw = subject.reference.shape
    maps = by_patch(maps, (gh, gw), subject.tiling)
    return {"agreement": rank_correlation(maps, subject.reference)}


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
