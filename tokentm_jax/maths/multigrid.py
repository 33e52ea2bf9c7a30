"""Multigrid: an approximate inverse of linear systems on a grid of pixels in which each couples with eight neighbours.

A stencil [3, 3, h, w] is such a system: the equation of pixel (y, x) has the coefficients [1 + dy, 1 + dx, y, x] of
the pixels (y + dy, x + dx). Every other pixel of every other row is a point of the next, coarser grid, and the pixels
between them are interpolated. The coarse system is P^T A P of the interpolation P, a stencil again, and so on to a
few points (Briggs, Henson and McCormick, A Multigrid Tutorial, 2000).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

DAMPING = 0.9  # of Jacobi's iteration; eigenvalues of a Laplacian of eight neighbours over its diagonal end at 4/3
FEW = 64  # points of a grid whose system is inverted as a matrix


class Level(NamedTuple):
    """A system, and the way to the next one, if there is one."""

    stencil: Array
    inverse: Array  # of the diagonal [h, w], damped, 0 where a pixel has no equation; at the last level of all [n, n]
    down: tuple[Array, Array] | None  # rows [h, coarse h] and columns [w, coarse w] of the interpolation


def times(stencil: Array, x: Array) -> Array:
    """The system's left side for x [..., h, w]."""
    h, w = x.shape[-2:]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)])
    terms = (stencil[a, b] * padded[..., a : a + h, b : b + w] for a in range(3) for b in range(3))
    return sum(terms, jnp.zeros_like(x))


def _along_both(x: Array, rows: Array, columns: Array) -> Array:
    """x [..., h, w] by rows [h, H] and columns [w, W]: [..., H, W]."""
    x = jnp.matmul(x, columns, precision="highest")
    return jnp.matmul(x.swapaxes(-1, -2), rows, precision="highest").swapaxes(-1, -2)


def _interpolation(n: int, dtype: jnp.dtype) -> Array:
    """[n, coarse]: every other value is a coarse one, and those between are means of their two neighbours."""
    fine, coarse = jnp.arange(n)[:, None], jnp.arange((n + 1) // 2)
    weights = jnp.maximum(1 - abs(fine - 2 * coarse).astype(dtype) / 2, 0)
    return weights / weights.sum(1, keepdims=True)  # the last one may have one neighbour


def _coarser(stencil: Array, rows: Array, columns: Array) -> Array:
    """The stencil of P^T A P. Points three apart do not meet in it, so combs of them tell all coefficients in nine
    products."""
    h, w = rows.shape[1], columns.shape[1]
    teeth = jnp.eye(3, dtype=stencil.dtype)
    y, x = jnp.arange(h) % 3, jnp.arange(w) % 3
    combs = jnp.einsum("ya,xb->abyx", rows @ teeth[y], columns @ teeth[x])  # 0, 1/4, 1/2, 1: exact in any precision
    found = _along_both(times(stencil, combs), rows, columns).reshape(9, h, w)
    step = jnp.arange(-1, 2)
    comb = 3 * ((y + step[:, None]) % 3)[:, None, :, None] + ((x + step[:, None]) % 3)[None, :, None, :]
    return jnp.take_along_axis(found, comb.reshape(9, h, w), 0).reshape(3, 3, h, w)


def levels(stencil: Array) -> list[Level]:
    """The systems from that of a stencil, symmetric and positive definite but for pixels without any equation (zeros),
    down to a few points."""
    found = []
    while (points := math.prod(stencil.shape[2:])) > FEW:
        diagonal = stencil[1, 1]
        inverse = jnp.where(diagonal > 0, DAMPING / jnp.where(diagonal > 0, diagonal, 1), 0)
        rows, columns = (_interpolation(n, stencil.dtype) for n in diagonal.shape)
        found.append(Level(stencil, inverse, (rows, columns)))
        stencil = _coarser(stencil, rows, columns)
    units = jnp.eye(points, dtype=stencil.dtype).reshape(points, *stencil.shape[2:])
    matrix = times(stencil, units).reshape(points, points)
    return [*found, Level(stencil, jnp.linalg.pinv(matrix, hermitian=True), None)]


def v_cycle(grids: list[Level], right: Array) -> Array:
    """About the solution of the first level's system for its right side [..., h, w]: linear, symmetric and positive.

    One damped Jacobi iteration, a correction from the coarser grids, and another iteration.
    """
    (stencil, inverse, down), *coarser = grids
    if down is None:
        return jnp.matmul(right.reshape(-1, len(inverse)), inverse, precision="highest").reshape(right.shape)
    rows, columns = down
    x = inverse * right
    correction = v_cycle(coarser, _along_both(right - times(stencil, x), rows, columns))
    x = x + _along_both(correction, rows.T, columns.T)
    return x + inverse * (right - times(stencil, x))
