"""Perturbation: what replaces removed pixels, which patches are shown, and the value of each patch from the answers.

A coalition is a mask [n] over the patches: 1 where a patch is shown, 0 where it is removed. The model's value of a
coalition is a number, so an explanation is a list of coalitions [S, n] and an estimate from their values [S]. The
estimates are written for one sample; the coalitions depend on no sample.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key, Shaped

from tokentm_jax.maths.multigrid import levels, times, v_cycle

Grid = tuple[int, int]
EXACT = jax.lax.Precision.HIGHEST  # differences of values are small beside the values

# ---- what replaces removed pixels -----------------------------------------------------------------------------------


def blur(images: Float[Array, "B H W C"], sigma: float = 5.0) -> Float[Array, "B H W C"]:
    """Gaussian blur, with the border pixels repeated outside.

    Args:
      images: the images.
      sigma: standard deviation, in pixels.

    Returns:
      Blurred images.
    """
    radius = round(3 * sigma)
    taps = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
    kernel = jnp.asarray([tap / sum(taps) for tap in taps], images.dtype)
    for axis in (1, 2):
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.moveaxis(jnp.pad(images, padding, mode="edge"), axis, -1)
        rows = padded.reshape(-1, 1, padded.shape[-1])
        smooth = jax.lax.conv_general_dilated(rows, kernel[None, None], (1,), "VALID")
        images = jnp.moveaxis(smooth.reshape(*padded.shape[:-1], -1), -1, axis)
    return images


def linear_imputation(
    image: Float[Array, "H W C"], removed: Shaped[Array, "H W"], tolerance: float = 1e-4, iterations: int = 100
) -> Float[Array, "H W C"]:
    """Each removed pixel becomes the weighted mean of its eight neighbours.

        (sum_j w_ij) x_i = sum_j w_ij x_j,   w = 1/6 beside, 1/12 diagonally, j inside the image

    for removed i, which is a sparse linear system, symmetric and positive definite while a pixel is left; conjugate
    gradients with a multigrid cycle solve it to `tolerance` (relative residual), or end after `iterations`. ROAD's
    imputation before its noise (Rong et al., ICML 2022).
    """
    colours = jnp.moveaxis(image, -1, 0)
    inside = removed.astype(image.dtype)
    weights = jnp.asarray([[1, 2, 1], [2, 0, 2], [1, 2, 1]], image.dtype)[..., None, None] / 12
    weights = weights * _around(jnp.ones_like(inside))
    system = -inside * weights * _around(inside)
    system = system.at[1, 1].set(inside * weights.sum((0, 1)))
    known = (1 - inside) * colours
    seen = inside * times(weights, known)
    mean = known.sum((1, 2), keepdims=True) / jnp.maximum((1 - inside).sum(), 1)
    cycle = partial(v_cycle, levels(system))
    solved, _ = jax.scipy.sparse.linalg.cg(
        partial(times, system), seen, inside * mean, tol=tolerance, maxiter=iterations, M=cycle
    )
    return jnp.moveaxis(known + inside * solved, 0, -1)


def _around(x: Array) -> Array:
    """[3, 3, H, W]: at [1 + dy, 1 + dx, y, x] is x[y + dy, x + dx] of x [H, W], zero outside."""
    (h, w), padded = x.shape, jnp.pad(x, 1)
    return jnp.stack([jnp.stack([padded[a : a + h, b : b + w] for b in range(3)]) for a in range(3)])


# ---- coalitions -----------------------------------------------------------------------------------------------------


def windows(grid: Grid, size: int, stride: int) -> Bool[Array, "S n"]:
    """Square windows over the whole grid, true inside; size and stride are in patches.

    The last window of a row or column ends at the border, so every patch is in one where `stride <= size`.
    """

    def along(length: int) -> Array:
        last = length - size
        first = jnp.asarray([*range(0, last, stride), last])[:, None]
        place = jnp.arange(length)
        return (first <= place) & (place < first + size)

    rows, columns = along(grid[0]), along(grid[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, grid[0] * grid[1])


def smooth_masks(
    key: Key[Array, ""], grid: Grid, samples: int, cells: int, keep: float
) -> Float[Array, "{samples} n"]:
    """Random smooth masks of RISE (Petsiuk et al., BMVC 2018) over the patches, in [0, 1].

    `cells` x `cells` bits, each 1 with probability `keep`, are made bilinearly a little larger than the grid, and
    cropped at random, at most by a cell. (As published, but a pixel there is a patch here.)
    """
    (gh, gw), (high, wide) = grid, (-(-side // cells) for side in grid)
    bits, top, left = jax.random.split(key, 3)
    low = jax.random.bernoulli(bits, keep, (samples, cells, cells)).astype(jnp.float32)
    large = jax.image.resize(low, (samples, (cells + 1) * high, (cells + 1) * wide), "bilinear")
    corner = (jax.random.randint(k, (samples,), 0, most) for k, most in ((top, high), (left, wide)))
    return jax.vmap(lambda mask, y, x: jax.lax.dynamic_slice(mask, (y, x), (gh, gw)).ravel())(large, *corner)


def path(rank: Int[Array, " n"]) -> Bool[Array, "n-1 n"]:
    """The coalitions of the first 1, 2 ... n - 1 patches, by the rank of each patch, from 0."""
    return rank < jnp.arange(1, len(rank), dtype=rank.dtype)[:, None]


def kernel_coalitions(key: Key[Array, ""], patches: int, samples: int) -> Bool[Array, "{samples} {patches}"]:
    """Coalitions drawn by Shapley's kernel, of sizes s with probability ~ 1 / (s (n - s))."""
    sizes = jnp.arange(1, patches)
    frequency = 1 / (sizes * (patches - sizes)).astype(jnp.float32)
    first, second = jax.random.split(key)
    size = jax.random.choice(first, sizes, (samples, 1), p=frequency / frequency.sum())
    return jax.random.uniform(second, (samples, patches)).argsort(-1) < size


def half_of_coalitions(patches: int) -> tuple[Bool[Array, "S {patches}"], Float[Array, " S"]]:
    """One of every coalition and its complement, without the empty and the full one.

    Returns the 2^(n-1) - 1 coalitions, and the weight of each by Shapley's kernel, 1 / (C(n, s) s (n - s)).
    """
    masks = (jnp.arange(1, 2 ** (patches - 1))[:, None] >> jnp.arange(patches)) & 1 == 1
    by_size = [1 / (math.comb(patches, s) * s * (patches - s)) for s in range(1, patches)]
    return masks, jnp.asarray(by_size, jnp.float32)[masks.sum(-1) - 1]


# ---- estimates for one sample ---------------------------------------------------------------------------------------


def mean_by_patch(masks: Shaped[Array, "S n"], values: Float[Array, " S"]) -> Float[Array, " n"]:
    """Mean of the values over the masks that hold a patch: `sum_s m_sj v_s / sum_s m_sj`.

    It is zero for a patch that no mask holds.
    """
    masks = masks.astype(values.dtype)
    total = masks.sum(0)
    return jnp.dot(values, masks, precision=EXACT) / jnp.where(total > 0, total, 1)


def marginals(values: Float[Array, " m"], rank: Int[Array, " n"]) -> Float[Array, " n"]:
    """The difference that each patch makes when its turn comes, from the values of the first 0 ... n patches."""
    return (values[1:] - values[:-1])[rank]


def inverted(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a symmetric, positive definite matrix, by Gauss-Jordan elimination without pivots.

    No library is called: on several CPU devices, calls of LAPACK can wait for each other for ever.
    """

    def eliminated(k: Array, a: Array) -> Array:
        pivot, row, column = a[k, k], a[k], a[:, k]
        a = a - jnp.outer(column, row / pivot)
        return a.at[k].set(row / pivot).at[:, k].set(-column / pivot).at[k, k].set(1 / pivot)

    return jax.lax.fori_loop(0, len(matrix), eliminated, matrix)


def kernel_shap(
    masks: Bool[Array, "m n"],
    weights: Float[Array, " m"],
    values: Float[Array, "m 2"],
    empty: Float[Array, ""],
    full: Float[Array, ""],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """KernelSHAP (Lundberg & Lee, NeurIPS 2017): Shapley values as a constrained weighted least-squares fit.

        min_phi sum_z w(z) (v(z) - v(0) - z . phi)^2   with   1 . phi = v(1) - v(0)

    Coalitions come in pairs, each with its complement (Covert & Lee, AISTATS 2021), which halve the noise.

    Args:
      masks: one coalition of every pair, true where a patch is shown.
      weights: of the pairs: those of the kernel for all coalitions, or ones for coalitions drawn by it.
      values: of the coalition and of its complement.
      empty, full: the values of no patch and of all.

    Returns:
      The values, which sum to `full - empty`, and their standard errors over pairs that were drawn: with
      A = E z zᵀ and the projection P = A⁻¹ - A⁻¹11ᵀA⁻¹ / (1ᵀA⁻¹1), those of the mean of P z (v(z) - v(0) - z . phi).
    """
    count, patches = masks.shape
    both = jnp.stack([masks, ~masks], 1).astype(values.dtype)  # [m, 2, n]
    share = (weights / weights.sum() / 2).astype(values.dtype)
    gain = values - empty
    moment = jnp.einsum("m,mki,mkj->ij", share, both, both, precision=EXACT)
    inverse = inverted(moment)
    reach = inverse.sum(1) / inverse.sum()
    projection = inverse - inverse.sum() * jnp.outer(reach, reach)
    target = jnp.einsum("m,mki,mk->i", share, both, gain, precision=EXACT)
    phi = jnp.dot(projection, target, precision=EXACT) + reach * (full - empty)
    residual = gain - jnp.einsum("mki,i->mk", both, phi, precision=EXACT)
    pulls = jnp.einsum("m,mki,mk,ij->mj", share, both, residual, projection, precision=EXACT)
    freedom = count / max(count - patches + 1, 1)
    return phi, jnp.sqrt(freedom * jnp.square(pulls).sum(0))
