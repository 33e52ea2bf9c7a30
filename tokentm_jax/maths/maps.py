"""Images and maps: pixels to numbers; rows over tokens to token maps, to pixels, and several maps to one."""

from collections.abc import Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.maths.primitives import wide


def unit(pixels: Array) -> Array:
    """Pixels, uint8 -> float32 in [0, 1], of the same shape."""
    return pixels.astype(jnp.float32) / 255


def token_map(module: Any, rows: Array) -> Array:
    """Rows over tokens [B, N] -> maps over the patch grid [B, gh, gw]; the prefix tokens are left out."""
    return rows[:, module.prefix :].reshape(-1, *module.grid)


def min_max(maps: Array) -> Array:
    """Each map of [B, H, W] scaled to [0, 1]; a constant map becomes zeros, and one that is not finite NaN."""
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    spread = high > low
    scaled = (maps - low) / jnp.where(spread, high - low, 1)
    scaled = jnp.where(spread, jnp.clip(scaled, 0, 1), 0)  # rounding may leave the interval by a hair
    return jnp.where(jnp.isfinite(low) & jnp.isfinite(high), scaled, jnp.nan)


def to_pixels(maps: Array, size: tuple[int, int]) -> Array:
    """Token maps [B, gh, gw] -> pixel maps [B, H, W] in [0, 1].

    Bilinear with half-pixel centres and no antialiasing (`align_corners=False`), then min-max per image. Pixel maps
    of the same size are only rescaled. A constant map becomes zeros; one with a value that is not finite becomes NaN,
    and the others of its batch stay what they are.
    """
    chex.assert_rank(maps, 3)
    return min_max(jax.image.resize(wide(maps), (maps.shape[0], *size), "bilinear", antialias=False))


def combine(maps: Sequence[Array], how: Literal["product", "mean"] = "product") -> Array:
    """Product or mean of several methods' maps, each scaled to [0, 1] first.

    Maps [B, h, w] of different grids are brought to the largest one. Raises InputError for no maps or another `how`.
    """
    if not maps or how not in ("product", "mean"):
        raise InputError(f"combine needs one map at least and how='product' or 'mean', got {len(maps)} and {how!r}")
    size = (max(m.shape[1] for m in maps), max(m.shape[2] for m in maps))
    stacked = jnp.stack([to_pixels(m, size) for m in maps])
    return stacked.prod(0) if how == "product" else stacked.mean(0)
