"""Is it simple to read? How few pixels or patches carry the relevance of maps [B, h, w]."""

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.maths.maps import shares
from tokentm_jax.metrics.task import Column, Predict, Subject, Task


def _shares(maps: Array) -> Array:
    """Absolute values as shares of their sum: [B, n]; equal ones for a map of zeros."""
    found = jnp.abs(shares(maps)).reshape(len(maps), -1)
    return jnp.where(found.any(1, keepdims=True), found, 1 / found.shape[1])


def gini(maps: Array) -> Array:
    """Gini index of the absolute values (sparseness; Chalasani et al., ICML 2020) -> [B], from 0 for equal ones to
    1 - 1/n for a single one.

        1 - 2 sum_k share_(k) (n - k + 1/2) / n,   shares sorted from the least, k = 1 ... n
    """
    shares = jnp.sort(_shares(maps), axis=1)
    n = shares.shape[1]
    weights = (n - jnp.arange(1, n + 1, dtype=shares.dtype) + 0.5) / n
    return 1 - 2 * (shares * weights).sum(1)


def entropy(maps: Array) -> Array:
    """Entropy in nats of the absolute values as a distribution (complexity; Bhatt et al., IJCAI 2020) -> [B], from 0
    for a single one to ln n for equal ones."""
    return jax.scipy.special.entr(_shares(maps)).sum(1)


def _complexity(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    return {"gini": gini(maps), "entropy": entropy(maps)}


COMPLEXITY = Task(
    _complexity,
    {
        "gini": Column(lambda table: table["predicted_gini"], digits=3),
        "entropy": Column(lambda table: table["predicted_entropy"], digits=3),
    },
    raw=True,
)
