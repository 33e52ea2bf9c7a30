"""The multigrid cycle against dense matrices in float64, and how fast conjugate gradients are with it."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokentm_jax.maths.multigrid import levels, times, v_cycle
from tokentm_jax.maths.perturbation import linear_imputation

OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def random_stencil(h, w, seed=0):
    """A symmetric, diagonally dominant system, a third of whose pixels have no equation."""
    rng = np.random.default_rng(seed)
    inside = rng.random((h, w)) < 2 / 3
    stencil = np.zeros((3, 3, h, w), np.float32)
    for y, x in np.argwhere(inside):
        for dy, dx in OFFSETS[5:]:  # each pair once
            near = (y + dy, x + dx)
            if 0 <= near[0] < h and 0 <= near[1] < w and inside[near]:
                stencil[1 + dy, 1 + dx, y, x] = stencil[1 - dy, 1 - dx, *near] = -rng.random()
    stencil[1, 1] = np.where(inside, -stencil.sum((0, 1)) + 0.1 * rng.random((h, w)), 0)
    return stencil


def dense(stencil):
    _, _, h, w = stencil.shape
    matrix = np.zeros((h, w, h, w))
    for y, x in np.ndindex(h, w):
        for dy, dx in OFFSETS:
            if 0 <= y + dy < h and 0 <= x + dx < w:
                matrix[y, x, y + dy, x + dx] = stencil[1 + dy, 1 + dx, y, x]
    return matrix.reshape(h * w, h * w)


def interpolation(n):
    matrix = np.zeros((n, (n + 1) // 2))
    for i in range(n):
        near = {i // 2, min((i + 1) // 2, matrix.shape[1] - 1)}
        for j in near:
            matrix[i, j] = 1 / len(near)
    return matrix


def test_coarser_systems_are_those_of_the_interpolation():
    stencil = random_stencil(13, 24)
    matrix = dense(stencil)
    x = np.random.default_rng(1).normal(size=(2, 13, 24)).astype(np.float32)
    found, grids = jax.jit(lambda stencil, x: (times(stencil, x), levels(stencil)))(stencil, x)
    np.testing.assert_allclose(found.reshape(2, -1), x.reshape(2, -1) @ matrix.T, atol=1e-5)
    assert [grid.stencil.shape[2:] for grid in grids] == [(13, 24), (7, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    for fine, coarse in pairwise(grids):
        p = np.kron(*map(interpolation, fine.stencil.shape[2:]))
        matrix = p.T @ matrix @ p
        np.testing.assert_allclose(dense(np.asarray(coarse.stencil)), matrix, atol=1e-4)


def test_the_cycle_is_symmetric_and_close_to_the_inverse():
    stencil = random_stencil(13, 24, seed=3)
    inside = np.flatnonzero(stencil[1, 1])
    units = jnp.eye(13 * 24).reshape(-1, 13, 24)
    found = jax.jit(lambda stencil: v_cycle(levels(stencil), units))(stencil)
    cycle = np.asarray(found).reshape(312, 312).T[np.ix_(inside, inside)]
    np.testing.assert_allclose(cycle, cycle.T, atol=1e-4)
    product = np.linalg.eigvals(cycle.astype(np.float64) @ dense(stencil)[np.ix_(inside, inside)])
    np.testing.assert_allclose(product.imag, 0, atol=1e-6)
    assert product.real.min() > 0.3
    assert product.real.max() < 1.5


@pytest.mark.slow
def test_few_iterations_fill_nine_tenths_of_an_image():
    """Plain conjugate gradients are 0.1 and more away after as many."""
    side = 64
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((side, side, 3)), jnp.float32)
    coarse = rng.random((side // 16, side // 16), np.float32)
    map_ = np.asarray(jax.image.resize(coarse, (side, side), "linear"))
    removed = jnp.asarray(map_ < np.quantile(map_, 0.9))
    fill = jax.jit(linear_imputation, static_argnums=(2, 3))
    exact, found = (fill(image, removed, 1e-6, iterations) for iterations in (100, 7))
    np.testing.assert_allclose(found, exact, atol=2e-4)


@pytest.mark.slow
def test_no_library_is_called():
    """Calls of LAPACK on several CPU devices can wait for each other for ever."""
    images, removed = jnp.zeros((2, 24, 24, 3)), jnp.zeros((2, 24, 24), bool)
    text = jax.jit(jax.vmap(linear_imputation)).lower(images, removed).as_text()
    assert "while" in text and "custom_call" not in text
