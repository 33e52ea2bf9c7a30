"""Other properties of tokens in TokenTM's transformation weight, for `TokenTM(weights=...)`.

A weight is a pure function of one sample's original tokens x [N, D] and of what a layer makes of them, x~ [N, D],
that gives w [N]. It may take more, under these names:

    gradient   [N, D] of the score at the output tokens of the block: the direction in which the class grows
    seen       [N] bool, which tokens are not padding; None for all
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from tokentm_jax.maths.primitives import ratio
from tokentm_jax.maths.tokentm import cosine, length, necc


def entropy(original: Float[Array, "N D"], transformed: Float[Array, "N D"]) -> Float[Array, " N"]:
    """`exp H(x~) / exp H(x)`: the change of the effective number of channels, where H is the entropy of the shares
    `x_d^2 / ||x||^2` (Roy & Vetterli, EUSIPCO 2007, call exp H the effective rank).

    Args:
      original: tokens x.
      transformed: tokens x~.

    Returns:
      Weights.
    """

    def effective(x: Array) -> Array:
        shares = ratio(jnp.square(x), jnp.square(x).sum(-1, keepdims=True))
        logarithm = jnp.log(jnp.where(shares > 0, shares, 1))
        return jnp.exp(-(shares * logarithm).sum(-1))

    return effective(transformed) / effective(original)


def alignment(
    original: Float[Array, "N D"],
    transformed: Float[Array, "N D"],
    gradient: Float[Array, "N D"],
    seen: Bool[Array, " N"] | None = None,
) -> Float[Array, " N"]:
    """`L(x~) / L(x)` times NECC of x~ with the class's direction instead of the original token.

    Args:
      original: tokens x.
      transformed: tokens x~.
      gradient: of the score at the output tokens of the block.
      seen: which tokens are not padding; None for all.

    Returns:
      Weights.
    """
    lengths = ratio(length(transformed), length(original))
    # Only its direction counts, and the squares of a small gradient would be zero.
    gradient = ratio(gradient, jnp.abs(gradient).max(-1, keepdims=True))
    return lengths * necc(cosine(gradient, transformed), seen)


def distance_from_mean(
    original: Float[Array, "N D"], transformed: Float[Array, "N D"], seen: Bool[Array, " N"] | None = None
) -> Float[Array, " N"]:
    """`L(x~ - mean x~) / L(x - mean x)`: the change of a token's distance from the mean token.

    Args:
      original: tokens x.
      transformed: tokens x~.
      seen: which tokens are not padding; None for all.

    Returns:
      Weights.
    """
    there = None if seen is None else seen[:, None]

    def distance(x: Array) -> Array:
        return length(x - x.mean(0, where=there))

    return ratio(distance(transformed), distance(original))


WEIGHTS: dict[str, Callable[..., Any]] = {w.__name__: w for w in (entropy, alignment, distance_from_mean)}
