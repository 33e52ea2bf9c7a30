"""Mixed precision: the products of linear maps read bfloat16 and sum in float32; all else is as ever.

Matrix units (AMX of recent Intel processors, tensor cores, TPUs) multiply bfloat16 several times as fast as float32:
a forward pass of DeiT-tiny takes 0.56 of the time on two CPU cores with AMX, a step of its training 0.63. Weights,
gradients and sums stay float32, whose range bfloat16 shares, so no loss needs to be scaled.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from tokentm_jax.maths import primitives
from tokentm_jax.maths.primitives import AnyArray

_product = partial(jnp.dot, preferred_element_type=jnp.float32)


def _transposed(x: Array) -> Array:
    """[m, k] -> [k, m], moved in memory: XLA's kernel for AMX reads no transposed operand (jax 0.10). By way of pairs
    and behind a barrier, or XLA would make it part of the product again."""
    m, k = x.shape
    return jax.lax.optimization_barrier(x.reshape(m, k // 2, 2).transpose(1, 2, 0).reshape(k, m))


@jax.custom_vjp
def _rows_by_kernel(rows: Array, kernel: Array) -> Array:
    return _forward(rows, kernel)[0]


def _forward(rows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    x, w = rows.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return _product(x, w), (x, w)


def _backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    (x, w), g = kept, cotangent.astype(jnp.bfloat16)
    of_rows = _product(g, _transposed(w))
    if x.shape[1] <= g.shape[1]:  # the narrower of the two is transposed
        return of_rows, _product(_transposed(x), g)
    return of_rows, jax.lax.optimization_barrier(_product(_transposed(g), x)).T


_rows_by_kernel.defvjp(_forward, _backward)


def linear(
    x: Float[AnyArray, "*b I"], kernel: Float[AnyArray, "I O"], bias: Float[AnyArray, " O"] | None
) -> Float[Array, "*b O"]:
    """`primitives.linear` of float32, with products of bfloat16.

    Other types, and maps with an odd number of inputs or outputs, are computed by `primitives.linear`.
    """
    if x.dtype != jnp.float32 or kernel.shape[0] % 2 or kernel.shape[1] % 2:
        return primitives.linear(x, kernel, bias)
    y = _rows_by_kernel(x.reshape(-1, x.shape[-1]), kernel.astype(jnp.float32))
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.reshape(*x.shape[:-1], -1)
