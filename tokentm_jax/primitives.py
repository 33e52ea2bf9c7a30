"""The primitives a ViT block is made of.

The model calls every arithmetic step that an explanation method may want to treat in its own way through a
`Primitives` tuple. `PLAIN` is ordinary arithmetic with ordinary derivatives. A relevance-propagation method is
another tuple with the same forward results and another backward pass; the model itself is never written twice.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def wide(x: Array) -> Array:
    """`x` in float32 at least: bfloat16 becomes float32, float64 stays."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def linear(x: Array, kernel: Array, bias: Array | None) -> Array:
    """Affine map `x @ kernel + bias`: x [..., I], kernel [I, O], bias [O] or None -> [..., O]."""
    rows = x.reshape(-1, x.shape[-1])  # one large matrix product is faster on CPU than a batched one
    y = rows @ kernel.astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def product(equation: str, a: Array, b: Array) -> Array:
    """Product of two activations, written as an einsum: query with key, attention with value."""
    return jnp.einsum(equation, a, b)


def add(a: Array, b: Array) -> Array:
    """Residual sum; also the sum of tokens and position embeddings."""
    return a + b


def fork(x: Array) -> tuple[Array, Array]:
    """One value used twice: by the residual stream and by a branch."""
    return x, x


@partial(jax.checkpoint, static_argnums=3)  # cheaper to compute again in the backward pass than to store
def norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """LayerNorm over the last axis, computed in float32 at least."""
    centred = wide(x) - wide(x).mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps)
    return (y * scale.astype(y.dtype) + bias.astype(y.dtype)).astype(x.dtype)


def softmax(scores: Array, scale: float) -> Array:
    """Softmax over keys of the scaled scores [..., Q, K], computed in float32 at least."""
    return jax.nn.softmax(wide(scores) * scale, axis=-1).astype(scores.dtype)


@jax.checkpoint
def gelu(x: Array) -> Array:
    """Exact GELU (error function), as in timm."""
    return jax.nn.gelu(x, approximate=False)


@jax.checkpoint
def quick_gelu(x: Array) -> Array:
    """Sigmoid approximation of GELU that OpenAI's CLIP models were trained with."""
    return x * jax.nn.sigmoid(x * 1.702)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu}


def activation(x: Array, function: str) -> Array:
    """Elementwise non-linearity of the FFN, one of `ACTIVATIONS`."""
    return ACTIVATIONS[function](x)


class Primitives(NamedTuple):
    """How a model computes, and differentiates, each kind of step."""

    embed: Callable[[Array, Array, Array | None], Array] = linear
    linear: Callable[[Array, Array, Array | None], Array] = linear
    product: Callable[[str, Array, Array], Array] = product
    add: Callable[[Array, Array], Array] = add
    fork: Callable[[Array], tuple[Array, Array]] = fork
    norm: Callable[[Array, Array, Array, float], Array] = norm
    softmax: Callable[[Array, float], Array] = softmax
    activation: Callable[[Array, str], Array] = activation


PLAIN = Primitives()
