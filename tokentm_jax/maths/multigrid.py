"""Multigrid: an approximate inverse of linear systems on a grid of pixels in which each couples with eight neighbours.

A stencil [3, 3, h, w] is such a system: the equation of pixel (y, x) has the coefficients [1 + dy, 1 + dx, y, x] of
the pixels (y + dy, x + dx). Every other pixel of every other row is a point of the next, coarser grid, and the pixels
between them are interpolated. The coarse system is P^T A P of the interpolation P, a stencil again, and so on to one
point (Briggs, Henson and McCormick, A Multigrid Tutorial, 2000).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

DAMPING = 0.9  # of Jacobi's iteration; eigenvalues of a Laplacian of eight neighbours over its diagonal end at 4/3


class Level(NamedTuple):
    """A system, and what its part of a cycle needs."""

    stencil: Array
    inverse: Array  # of the diagonal [h, w], damped, 0 where a pixel has no equation


def times(stencil: Float[Array, "3 3 h w"], x: Float[Array, "*b h w"]) -> Float[Array, "*b h w"]:
    """The left side of each pixel's equation."""
    h, w = x.shape[-2:]
    padded = lax.optimization_barrier(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)]))
    terms = (stencil[a, b] * padded[..., a : a + h, b : b + w] for a in range(3) for b in range(3))
    return sum(terms, jnp.zeros_like(x))


def _finer_rows(x: Array, rows: int) -> Array:
    """The interpolation of x [..., H, w] to [..., rows, w]: every other row is one of x, and those between are means
    of their neighbours; the last one may have one neighbour."""
    following = jnp.concatenate([x[..., 1:, :], x[..., -1:, :]], -2)
    pairs = jnp.stack([x, (x + following) / 2], -2)
    return pairs.reshape(*x.shape[:-2], -1, x.shape[-1])[..., :rows, :]


def _coarser_rows(x: Array) -> Array:
    """The transposed interpolation, of x [..., h, w] to [..., (h + 1) // 2, w]."""
    even, odd = x[..., ::2, :], x[..., 1::2, :] / 2
    if x.shape[-2] % 2 == 0:
        odd = odd.at[..., -1, :].multiply(2)
    odd = jnp.pad(odd, [(0, 0)] * (x.ndim - 2) + [(1, 1), (0, 0)])
    return even + odd[..., : even.shape[-2], :] + odd[..., 1 : even.shape[-2] + 1, :]


def _matrix(n: int, dtype: jnp.dtype) -> Array:
    """The interpolation as a matrix [n, coarse]: products with it are faster along columns than slices are."""
    return _finer_rows(jnp.eye((n + 1) // 2, dtype=dtype), n)


def finer(x: Float[Array, "*b H W"], h: int, w: int) -> Float[Array, "*b {h} {w}"]:
    """The interpolation P to a finer grid."""
    return jnp.matmul(_finer_rows(x, h), _matrix(w, x.dtype).T, precision="highest")


def coarser(x: Float[Array, "*b h w"]) -> Float[Array, "*b H W"]:
    """The transposed interpolation P^T to the coarser grid."""
    return _coarser_rows(jnp.matmul(x, _matrix(x.shape[-1], x.dtype), precision="highest"))


def _coarser_stencil(stencil: Array) -> Array:
    """The stencil of P^T A P: along columns, then along rows as columns."""
    half = _collapsed(stencil.swapaxes(0, 1))
    return _collapsed(half.transpose(1, 0, 3, 2)).swapaxes(2, 3)


def _collapsed(stencil: Array) -> Array:
    """P^T A P along the columns of a stencil [3, 3, h, w] whose first offsets are those along columns: [3, 3, h, W].

    Points three apart do not meet in it, so three combs of them tell all coefficients.
    """
    n, place, dtype = stencil.shape[-1], jnp.arange((stencil.shape[-1] + 1) // 2), stencil.dtype
    down = _matrix(n, dtype)
    found = []
    for comb in range(3):
        teeth = jnp.pad(down @ (place % 3 == comb).astype(dtype), 1)  # 0, 1/2, 1: exact in any precision
        x = sum((stencil[b] * teeth[b : b + n] for b in range(3)), jnp.zeros_like(stencil[0]))
        found.append(jnp.matmul(x, down, precision="highest"))
    return jnp.stack([jnp.select([(place + step) % 3 == comb for comb in range(3)], found) for step in (-1, 0, 1)])


def levels(stencil: Float[Array, "3 3 h w"]) -> list[Level]:
    """The system of a stencil and all coarser ones, down to one point.

    The system must be symmetric and positive definite, except for pixels without an equation (zeros).
    """
    found = []
    while True:
        diagonal = stencil[1, 1]
        found.append(Level(stencil, jnp.where(diagonal > 0, DAMPING / jnp.where(diagonal > 0, diagonal, 1), 0)))
        if diagonal.size == 1:
            return found
        stencil = _coarser_stencil(stencil)


def v_cycle(grids: list[Level], right: Float[Array, "*b h w"]) -> Float[Array, "*b h w"]:
    """One damped Jacobi iteration, a correction from the coarser grids, and another iteration.

    The approximate solution is a linear, symmetric and positive function of the right side `right`.
    """
    (stencil, inverse), *below = grids
    x = inverse * right
    if below:
        correction = v_cycle(below, coarser(right - times(stencil, x)))
        x = x + finer(correction, *inverse.shape)
    return x + inverse * (right - times(stencil, x))
