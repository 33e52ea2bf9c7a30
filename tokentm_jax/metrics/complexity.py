"""Is it simple to read? How few pixels or patches carry the relevance of maps [B, h, w]."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from tokentm_jax.maths.maps import shares
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.task import Column, Predict, Subject, Task


def _shares(maps: AnyArray, where: AnyArray | None) -> tuple[Array, Array]:
    """Absolute values as shares of their sum, equal ones for a map of zeros: [B, n]; and how many count: [B, 1]."""
    counted = jnp.ones(maps.shape, bool) if where is None else where
    found = jnp.abs(shares(jnp.where(counted, maps, 0))).reshape(len(maps), -1)
    counted = counted.reshape(len(maps), -1)
    count = counted.sum(1, keepdims=True)
    equal = jnp.where(counted, 1 / jnp.maximum(count, 1).astype(found.dtype), 0)
    return jnp.where(found.any(1, keepdims=True), found, equal), count


def gini(maps: Float[AnyArray, "B h w"], where: Bool[AnyArray, "B h w"] | None = None) -> Float[Array, " B"]:
    """Gini index of the absolute values (sparseness; Chalasani et al., ICML 2020).

        1 - 2 sum_k share_(k) (n - k + 1/2) / n,   shares sorted from the least, k = 1 ... n

    Args:
      maps: of any scale.
      where: which n values count; None: all.

    Returns:
      From 0 for equal values to 1 - 1/n for a single one.
    """
    found, count = _shares(maps, where)
    shares, n = jnp.sort(found, axis=1), found.shape[1]
    weights = (n - jnp.arange(1, n + 1, dtype=shares.dtype) + 0.5) / jnp.maximum(count, 1).astype(shares.dtype)
    return 1 - 2 * (shares * weights).sum(1)


def entropy(maps: Float[AnyArray, "B h w"], where: Bool[AnyArray, "B h w"] | None = None) -> Float[Array, " B"]:
    """Entropy of the absolute values as a distribution (complexity; Bhatt et al., IJCAI 2020).

    Args:
      maps: of any scale.
      where: which n values count; None: all.

    Returns:
      In nats, from 0 for a single value to ln n for equal ones.
    """
    return jax.scipy.special.entr(_shares(maps, where)[0]).sum(1)


def _complexity(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    return {"gini": gini(maps, subject.removable), "entropy": entropy(maps, subject.removable)}


COMPLEXITY = Task(
    _complexity,
    {
        "gini": Column(lambda table: table["predicted_gini"], digits=3),
        "entropy": Column(lambda table: table["predicted_entropy"], digits=3),
    },
    raw=True,
)
