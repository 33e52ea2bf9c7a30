"""The arithmetic of a Transformer block: linear maps, norms, softmax, non-linearities, rotary positions."""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

PyTree = Any  # of arrays, such as the parameters of a model
AnyArray = Array | np.ndarray


def wide(x: Shaped[Array, "*s"]) -> Float[Array, "*s"]:
    """An array in float32 at least.

    Args:
      x: any array.

    Returns:
      `x`; bfloat16 becomes float32, float64 stays.
    """
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def root(squared: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The square root of numbers; zero, with gradient zero, where they are not positive."""
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def ratio(a: Float[Array, "*s"], b: Float[Array, "*#s"]) -> Float[Array, "*s"]:
    """`a / b`, with a value everywhere.

    Args:
      a: dividends.
      b: divisors that are not negative.

    Returns:
      Ratios; zero where b is zero.
    """
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def linear(
    x: Float[AnyArray, "*b I"], kernel: Float[AnyArray, "I O"], bias: Float[AnyArray, " O"] | None
) -> Float[Array, "*b O"]:
    """Affine map `x @ kernel + bias`, of the type of `x`."""
    rows = x.reshape(-1, x.shape[-1])  # one large matrix product is faster on CPU than a batched one
    y = jnp.matmul(rows, kernel.astype(x.dtype))
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


# The three steps below have custom derivatives, written as tangents: forward mode and higher derivatives work,
# and reverse mode transposes the same lines. It keeps one array of the model's own type for each (the softmax's
# result, the norm's input, GELU's slope), where automatic differentiation keeps several, in float32, and reads them
# again. Measured on DeiT-tiny, CPU: as fast and as small as `custom_vjp`, which refuses forward mode; `jax.checkpoint`
# around the plain steps takes 7 % longer for the backward pass and 20 % for training.
_checkpoint = partial(jax.checkpoint, prevent_cse=False)


def _standardised(x: Array, eps: float) -> tuple[Array, Array]:
    """x over the last axis with mean 0 and variance 1, in float32 at least, and its inverse deviation."""
    centred = wide(x) - wide(x).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred * inverse, inverse


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def norm(
    x: Float[Array, "*b D"], scale: Float[AnyArray, " D"], bias: Float[AnyArray, " D"], eps: float
) -> Float[Array, "*b D"]:
    """LayerNorm over the last axis, computed in float32 at least; of the type of `x`."""
    y, _ = _standardised(x, eps)
    return (y * scale.astype(y.dtype) + bias.astype(y.dtype)).astype(x.dtype)


@norm.defjvp
def _norm_tangent(eps: float, values: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """With y the standardised x: `dy = (dx - mean dx - y mean(y dx)) / deviation`."""

    @_checkpoint
    def tangent(x: Array, scale: Array, *changes: Array) -> Array:
        y, inverse = _standardised(x, eps)
        dx, dscale, dbias = (change.astype(y.dtype) for change in changes)
        dy = inverse * (dx - dx.mean(-1, keepdims=True) - y * (y * dx).mean(-1, keepdims=True))
        return (dy * scale.astype(y.dtype) + y * dscale + dbias).astype(x.dtype)

    x, scale, bias = values
    return norm(x, scale, bias, eps), tangent(x, scale, *tangents)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(scores: Float[Array, "*b Q K"], scale: float) -> Float[Array, "*b Q K"]:
    """Softmax over keys of scores times `scale`, computed in float32 at least; of the type of `scores`."""
    return jax.nn.softmax(wide(scores) * scale, axis=-1).astype(scores.dtype)


@softmax.defjvp
def _softmax_tangent(scale: float, values: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """`dA = scale A (ds - sum_k A ds)`: of the softmax only its result is kept."""
    attention = softmax(values[0], scale)

    @_checkpoint
    def tangent(attention: Array, ds: Array) -> Array:
        a, ds = wide(attention), wide(ds)
        return (a * (ds - (a * ds).sum(-1, keepdims=True)) * scale).astype(attention.dtype)

    return attention, tangent(attention, tangents[0])


def mix(attention: Float[Array, "*b H Q K"], value: Float[Array, "*b H K E"]) -> Float[Array, "*b Q H*E"]:
    """Attention times values, with the heads of each token next to each other."""
    # Without the barrier, XLA makes the transposition a part of the product, at half its speed on a CPU.
    mixed = jnp.swapaxes(jax.lax.optimization_barrier(attention @ value), -3, -2)
    return mixed.reshape(*mixed.shape[:-2], -1)


def mean_of_heads(x: Float[AnyArray, "H ..."]) -> Float[Array, "..."]:
    """The mean over the first axis."""
    return reduce(jnp.add, x) / len(x)  # added one by one: on a CPU, XLA takes 15 times as long to reduce products


@jax.custom_jvp
def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Exact GELU (error function), as in timm: `x Phi(x)`, elementwise."""
    if x.dtype == jnp.float32:  # XLA's erf takes a third of the time of its erfc on a CPU
        return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_tangent(values: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """`d/dx x Phi(x) = Phi(x) + x phi(x)`, for the normal distribution's Phi and its density phi."""
    (x,) = values
    cumulative = 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5
    return gelu(x), (cumulative + x * density) * tangents[0]


@jax.checkpoint
def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Sigmoid approximation of GELU that OpenAI's CLIP models were trained with."""
    return x * jax.nn.sigmoid(x * 1.702)


@jax.checkpoint
def gelu_tanh(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The approximation of GELU by a hyperbolic tangent."""
    return jax.nn.gelu(x, approximate=True)


@jax.checkpoint
def silu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x sigmoid(x)`, the gate of SwiGLU."""
    return x * jax.nn.sigmoid(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def activation(x: Float[Array, "*s"], function: str) -> Float[Array, "*s"]:
    """The elementwise function of this name in `ACTIVATIONS`."""
    return ACTIVATIONS[function](x)


def swapped(x: Float[Array, "*b D"], half: bool) -> Float[Array, "*b D"]:
    """The channels of each pair that rotates together, swapped.

    With `half`, the pairs are i and i + D/2; else 2i and 2i + 1.
    """
    if half:
        return jnp.roll(x, x.shape[-1] // 2, -1)
    return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def rotate(
    x: Float[Array, "*b N D"], cosine: Float[Array, "N D"], sine: Float[Array, "N D"], half: bool
) -> Float[Array, "*b N D"]:
    """Rotary positions: queries or keys, rotated by the angle of their token.

    `sine` has the sign of the channel's rotation; `half` is that of `swapped`.
    """
    return x * cosine.astype(x.dtype) + swapped(x, half) * sine.astype(x.dtype)
