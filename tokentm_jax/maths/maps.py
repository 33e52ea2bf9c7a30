"""Images and maps: pixels to numbers; token maps to pixels, and several maps to one."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.errors import InputError, suggest
from tokentm_jax.maths.primitives import wide

LARGEST_SIDE = 32768  # pixels of a map


class Tiling(NamedTuple):
    """How patches lie on an image, in pixels (vertical, horizontal): their sides, and how far apart two begin."""

    patch: tuple[int, int]
    stride: tuple[int, int]

    def grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        """How many patches lie on an image of this size."""
        down, across = ((side - p) // s + 1 for side, p, s in zip(size, self.patch, self.stride, strict=True))
        return down, across

    def place(self, axis: int, count: int, pixels: Array) -> Array:
        """Where pixels are along an axis of `count` patches, in patches: 0 at the centre of the first; inside it."""
        patch, stride = self.patch[axis], self.stride[axis]
        return jnp.clip((pixels - (patch - 1) / 2) / stride, 0, count - 1)

    def cells(self, axis: int, count: int, side: int) -> list[int]:
        """The patch whose centre is nearest to each of `side` pixels along an axis; of two, the later one."""
        patch, stride = self.patch[axis], self.stride[axis]
        return [min(max((2 * y - patch + 1 + stride) // (2 * stride), 0), count - 1) for y in range(side)]


def unit(pixels: Array) -> Array:
    """Pixels, uint8 -> float32 in [0, 1], of the same shape."""
    return pixels.astype(jnp.float32) / 255


def spread(values: Array, size: tuple[int, int], tiling: Tiling | None = None) -> Array:
    """Values of patches [B, gh, gw] -> of pixels [B, H, W], each with that of its patch.

    The patches divide the image; or, where they overlap (`tiling`), a pixel is of the patch with the nearest centre.
    """
    _, gh, gw = values.shape
    if tiling is None or tiling.patch == tiling.stride:
        return values.repeat(size[0] // gh, 1).repeat(size[1] // gw, 2)
    for axis, (count, side) in enumerate(zip((gh, gw), size, strict=True)):
        cells = jnp.asarray(tiling.cells(axis, count, side), jnp.int32)
        values = jnp.take(values, cells, axis + 1, mode="clip")
    return values


def _in_range(maps: Array) -> Array:
    """Maps [B, H, W] whose differences and sums are finite: those with very large values times a power of two, which
    normalised maps do not show."""
    largest = jnp.abs(maps).max((1, 2), keepdims=True)
    return maps * jnp.where(largest > 2.0**64, jnp.asarray(2.0**-64, maps.dtype), 1)


def min_max(maps: Array, where: Array | None = None) -> Array:
    """Each map of [B, H, W] scaled to [0, 1] by its values `where` True, or all; a constant map becomes zeros, and one
    that is not finite NaN."""
    maps = _in_range(maps)
    low = maps.min((1, 2), keepdims=True, where=where, initial=None if where is None else jnp.inf)
    high = maps.max((1, 2), keepdims=True, where=where, initial=None if where is None else -jnp.inf)
    spread = high > low
    scaled = (maps - low) / jnp.where(spread, high - low, 1)
    scaled = jnp.where(spread, jnp.clip(scaled, 0, 1), 0)  # rounding may leave the interval by a hair
    return jnp.where(jnp.isfinite(low) & jnp.isfinite(high), scaled, jnp.nan)


def _check_maps(maps: Any) -> None:
    if getattr(maps, "ndim", None) != 3 or 0 in maps.shape or not jnp.issubdtype(maps.dtype, jnp.number):
        found = f"{maps.dtype} {list(maps.shape)}" if hasattr(maps, "shape") else type(maps).__name__
        raise InputError(f"maps must be an array of numbers [B, height, width] that is not empty, got {found}")


def to_pixels(maps: Array, size: tuple[int, int], tiling: Tiling | None = None) -> Array:
    """Token maps [B, gh, gw] -> pixel maps [B, H, W] in [0, 1].

    Bilinear with half-pixel centres and no antialiasing (`align_corners=False`), then min-max per image. Pixel maps
    of the same size are only rescaled. A constant map becomes zeros; one with a value that is not finite becomes NaN,
    and the others of its batch stay what they are. The patches divide the image, or lie as `tiling` says (`ViT.tiling`
    is that of a model): where they overlap, a value stands at the centre of its patch.

    Raises InputError for maps or a size of another form.
    """
    _check_maps(maps)
    whole = isinstance(size, tuple | list) and len(size) == 2 and all(hasattr(s, "__index__") for s in size)
    if not whole or not all(1 <= s <= LARGEST_SIDE for s in size):
        raise InputError(f"the size must be (height, width), each from 1 to {LARGEST_SIDE} pixels, got {size!r:.80}")
    return min_max(resized(_in_range(wide(maps)), size, tiling))


def resized(maps: Array, size: tuple[int, int], tiling: Tiling | None = None) -> Array:
    """As `to_pixels`, with the values as they are. Maps of another grid than that of the `tiling` divide the image."""
    maps = wide(maps)
    if tiling is None or tiling.patch == tiling.stride or maps.shape[1:] != tiling.grid(size):
        return jax.image.resize(maps, (maps.shape[0], *size), "bilinear", antialias=False)
    for axis, side in enumerate(size):
        count = maps.shape[axis + 1]
        places = tiling.place(axis, count, jnp.arange(side, dtype=maps.dtype))
        weights = jax.nn.relu(1 - jnp.abs(places[:, None] - jnp.arange(count, dtype=maps.dtype)))
        maps = jnp.moveaxis(jnp.tensordot(maps, weights, ((axis + 1,), (1,)), precision="highest"), -1, axis + 1)
    return maps


def ranks(maps: Array, where: Array | None = None) -> Array:
    """The share of a map's values (those `where` True) that are below each, equal ones counted half: [B, H, W], in
    (0, 1)."""
    flat = maps.reshape(maps.shape[0], -1)
    counted = jnp.ones_like(flat, bool) if where is None else where.reshape(flat.shape)

    def one(values: Array, counted: Array) -> Array:
        count = counted.sum()
        order = jnp.sort(jnp.where(counted, values, jnp.inf))
        below, up_to = (jnp.searchsorted(order, values, side) for side in ("left", "right"))
        return (below + jnp.minimum(up_to, count)).astype(values.dtype) / (2 * count).astype(values.dtype)

    found = jnp.where(jnp.isfinite(flat).all(-1, keepdims=True), jax.vmap(one)(flat, counted), jnp.nan)
    return found.reshape(maps.shape)


def shares(maps: Array, where: Array | None = None) -> Array:
    """Each map of [B, H, W] over the sum of its absolute values (those `where` True); a map of zeros stays one."""
    maps = _in_range(maps)
    total = jnp.abs(maps).sum((1, 2), keepdims=True, where=where)
    return maps / jnp.where(total == 0, 1, total)


Normalisation = Literal["min_max", "rank", "sum"]
NORMALISATIONS: dict[str, Callable[..., Array]] = {"min_max": min_max, "rank": ranks, "sum": shares}


def combine(
    maps: Sequence[Array],
    how: Literal["product", "mean"] = "product",
    normalisation: Normalisation = "min_max",
    weights: Sequence[float] | None = None,
    where: Array | None = None,
) -> Array:
    """Product or mean of several methods' maps, each normalised first.

    Args:
      maps: each [B, h, w]; those of different grids are brought to the largest one.
      how: "product", or "mean".
      normalisation: "min_max" scales each map to [0, 1]; "rank" takes ranks among the map's values, in (0, 1); "sum"
        divides by the sum of absolute values.
      weights: of the mean, one for each of `maps`; None for equal ones.
      where: which values count when a map is normalised, for maps of one grid, [B, h, w]; None for all.

    Raises InputError for no maps, or for another choice or number of weights.
    """
    if not isinstance(maps, Sequence) or isinstance(maps, str) or not maps:
        raise InputError(f"combine needs a list of one map at least, got a {type(maps).__name__}")
    for each in maps:
        _check_maps(each)
    if how not in ("product", "mean") or len({each.shape[0] for each in maps}) > 1:
        counts = ", ".join(str(each.shape[0]) for each in maps)
        raise InputError(f"combine needs how='product' or 'mean' and maps of one batch, got {how!r} and {counts} maps")
    if not isinstance(normalisation, str) or normalisation not in NORMALISATIONS:
        raise suggest("normalisation", normalisation, NORMALISATIONS)
    chosen: Any = [1.0] * len(maps) if weights is None else weights
    chosen = chosen.tolist() if hasattr(chosen, "tolist") else chosen
    listed = isinstance(chosen, list | tuple) and len(chosen) == len(maps)
    if not listed or not all(isinstance(w, Real) and 0 <= float(w) < math.inf for w in chosen) or not sum(chosen):
        raise InputError(
            f"combine needs a weight of at least 0 for each of {len(maps)} maps, not all 0, got {chosen!r:.200}"
        )
    size = (max(m.shape[1] for m in maps), max(m.shape[2] for m in maps))
    normalise = NORMALISATIONS[normalisation]
    stacked = jnp.stack([normalise(resized(m, size), where) for m in maps])
    if how == "product":
        return stacked.prod(0)
    return jnp.tensordot(jnp.asarray(chosen, stacked.dtype) / sum(chosen), stacked, 1)
