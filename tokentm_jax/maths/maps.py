"""Images and maps: pixels to numbers; token maps to pixels, and several maps to one."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Gt, Le
from jax import Array
from jaxtyping import Bool, Float, Num, Shaped, UInt8

from tokentm_jax.errors import InputError, suggest
from tokentm_jax.maths.primitives import AnyArray, wide
from tokentm_jax.validation import checked

LARGEST_SIDE = 32768  # pixels of a map


class Tiling(NamedTuple):
    """How patches lie on an image, in pixels (vertical, horizontal): their sides, and how far apart two begin."""

    patch: tuple[int, int]
    stride: tuple[int, int]

    def grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        """How many patches lie on an image of this size."""
        down, across = ((side - p) // s + 1 for side, p, s in zip(size, self.patch, self.stride, strict=True))
        return down, across

    def place(self, axis: int, count: int, pixels: Float[Array, " y"]) -> Float[Array, " y"]:
        """Where pixels are along an axis of `count` patches, in patches: 0 at the centre of the first; inside it."""
        patch, stride = self.patch[axis], self.stride[axis]
        return jnp.clip((pixels - (patch - 1) / 2) / stride, 0, count - 1)

    def cells(self, axis: int, count: int, side: int) -> list[int]:
        """The patch whose centre is nearest to each of `side` pixels along an axis; of two, the later one."""
        patch, stride = self.patch[axis], self.stride[axis]
        return [min(max((2 * y - patch + 1 + stride) // (2 * stride), 0), count - 1) for y in range(side)]


def unit(pixels: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
    """Pixels from 0 to 255 as float32 in [0, 1]."""
    return pixels.astype(jnp.float32) / 255


def spread(
    values: Shaped[Array, "B gh gw"], size: tuple[int, int], tiling: Tiling | None = None
) -> Shaped[Array, "B h w"]:
    """Every pixel gets the value of its patch.

    Patches without a `tiling` divide the image. Of patches that overlap, a pixel has the one with the nearest centre.
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


def min_max(maps: Float[Array, "B h w"], where: Bool[Array, "B h w"] | None = None) -> Float[Array, "B h w"]:
    """Each map scaled to [0, 1], by the minimum and the maximum of its values `where` (None: of all).

    A constant map becomes zeros, and a map with a value that is not finite becomes NaN.
    """
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


def to_pixels(
    maps: Num[AnyArray, "B gh gw"], size: tuple[int, int], tiling: Tiling | None = None
) -> Float[Array, "B h w"]:
    """Token maps to pixel maps in [0, 1].

    Bilinear with half-pixel centres and no antialiasing (`align_corners=False`), then min-max per image. Pixel maps
    of the same size are only rescaled.

    Args:
      maps: token maps.
      size: (h, w) in pixels.
      tiling: of patches that overlap, such as `ViT.tiling`: a value is at the centre of its patch. None: the patches
        divide the image.

    Returns:
      Pixel maps. A constant map becomes zeros; a map with a value that is not finite becomes NaN, and does not change
      the other maps of its batch.

    Raises:
      InputError: maps or a size of another form.
    """
    _check_maps(maps)
    whole = isinstance(size, tuple | list) and len(size) == 2 and all(hasattr(s, "__index__") for s in size)
    if not whole or not all(1 <= s <= LARGEST_SIDE for s in size):
        raise InputError(f"the size must be (height, width), each from 1 to {LARGEST_SIDE} pixels, got {size!r:.80}")
    return min_max(resized(_in_range(wide(jnp.asarray(maps))), size, tiling))


def resized(
    maps: Num[AnyArray, "B gh gw"], size: tuple[int, int], tiling: Tiling | None = None
) -> Float[Array, "B h w"]:
    """As `to_pixels`, without the min-max. Maps of another grid than that of the `tiling` divide the image."""
    maps = wide(jnp.asarray(maps))
    if tiling is None or tiling.patch == tiling.stride or maps.shape[1:] != tiling.grid(size):
        return jax.image.resize(maps, (maps.shape[0], *size), "bilinear", antialias=False)
    for axis, side in enumerate(size):
        count = maps.shape[axis + 1]
        places = tiling.place(axis, count, jnp.arange(side, dtype=maps.dtype))
        weights = jax.nn.relu(1 - jnp.abs(places[:, None] - jnp.arange(count, dtype=maps.dtype)))
        maps = jnp.moveaxis(jnp.tensordot(maps, weights, ((axis + 1,), (1,)), precision="highest"), -1, axis + 1)
    return maps


def ranks(maps: Float[Array, "B h w"], where: Bool[Array, "B h w"] | None = None) -> Float[Array, "B h w"]:
    """The share of a map's values that are below each value, in (0, 1); equal ones count half.

    Only the values `where` count (None: all). A map with a value that is not finite becomes NaN.
    """
    flat = maps.reshape(maps.shape[0], -1)
    counted = jnp.ones_like(flat, bool) if where is None else where.reshape(flat.shape)

    def one(values: Array, counted: Array) -> Array:
        count = counted.sum()
        order = jnp.sort(jnp.where(counted, values, jnp.inf))
        below, up_to = (jnp.searchsorted(order, values, side) for side in ("left", "right"))
        return (below + jnp.minimum(up_to, count)).astype(values.dtype) / (2 * count).astype(values.dtype)

    found = jnp.where(jnp.isfinite(flat).all(-1, keepdims=True), jax.vmap(one)(flat, counted), jnp.nan)
    return found.reshape(maps.shape)


def shares(maps: Float[Array, "B h w"], where: Bool[Array, "B h w"] | None = None) -> Float[Array, "B h w"]:
    """Each map over the sum of its absolute values `where` (None: of all); a map of zeros stays zero."""
    maps = _in_range(maps)
    total = jnp.abs(maps).sum((1, 2), keepdims=True, where=where)
    return maps / jnp.where(total == 0, 1, total)


Normalisation = Literal["min_max", "rank", "sum"]
Power = Annotated[float, Gt(0), Le(100)]
NORMALISATIONS: dict[str, Callable[..., Array]] = {
    "min_max": min_max,
    "rank": ranks,
    "sum": shares,
}


def combine(
    maps: Sequence[Num[AnyArray, "B _ _"]],
    how: Literal["product", "mean"] = "product",
    normalisation: Normalisation = "min_max",
    weights: Sequence[int | float] | None = None,
    where: Bool[Array, "B h w"] | None = None,
    power: int | float = 1,
) -> Float[Array, "B h w"]:
    """Product or mean of several methods' maps, each normalised first.

    Args:
      maps: of one batch; those of different grids are resized to the largest one.
      how: "product", or "mean".
      normalisation: "min_max" scales each map to [0, 1]; "rank" takes ranks among the map's values, in (0, 1);
        "sum" divides by the sum of absolute values.
      weights: of the mean, one for each of `maps`; None for equal ones.
      where: which values count when a map is normalised, for maps of one grid; None for all.
      power: the result, scaled to [0, 1], to this power; the order of the values stays. 1 leaves it as it is.

    Returns:
      One map for each of the batch.

    Raises:
      InputError: no maps, an unknown choice, a power that is not positive, or another number of weights.
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
    power = checked("power", Power, power)
    size = (max(m.shape[1] for m in maps), max(m.shape[2] for m in maps))
    normalise = NORMALISATIONS[normalisation]
    stacked = jnp.stack([normalise(resized(m, size), where) for m in maps])
    share = jnp.asarray(chosen, stacked.dtype) / sum(chosen)
    combined = stacked.prod(0) if how == "product" else jnp.tensordot(share, stacked, 1)
    return combined if power == 1 else min_max(combined, where) ** power
