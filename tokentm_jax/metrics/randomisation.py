"""Does it depend on what was learned? Likeness of maps before and after parameters become random."""

import jax
import jax.numpy as jnp
from jax import Array


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
