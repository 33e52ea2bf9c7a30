"""Inputs of a model as the methods see them: one interface for every modality.

A function of images takes an array [B, H, W, C] (`Images` is its interface); other modalities are pytrees with the
same members, such as `Texts`. Axes: B batch, N tokens of the longest sample, D width of an embedding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.maths.maps import spread
from tokentm_jax.maths.perturbation import blur
from tokentm_jax.maths.primitives import wide

# The parts [n] that are shown (bool, or a share) -> all samples' inputs, the rest hidden.
Hide = Callable[[Array], Any]


@runtime_checkable
class Inputs(Protocol):
    """What a modality has. A pytree whose arrays have the samples first."""

    regular: bool  # whether the parts are a grid, the same in every sample

    # The array of numbers that is differentiated, [B, ...].
    @property
    def values(self) -> Array: ...
    # Which tokens [B, N] are present; None: all.
    @property
    def mask(self) -> Any: ...
    # Which places [B, h, w] of a map can be removed; None: all.
    @property
    def removable(self) -> Any: ...
    # The model's input with other numbers.
    def with_values(self, numbers: Array) -> Any: ...
    # The model's input with places `removed` [B, h, w] of a map replaced by `fill`: a value, an array that fits the
    # values, or a function `(inputs, removed) -> inputs`.
    def without(self, removed: Array, fill: Any, tiling: Any = None) -> Any: ...
    # The `fill` of that name, "mean", "black" or "blur"; `mean` is the reader's `blank`.
    def background(self, fill: str, mean: Any) -> Any: ...
    # The grid (gh, gw) of the parts that can be hidden, and how a coalition of them is shown. `options` are those of
    # `methods.perturbation.Removal`. Raises InputError for options that do not fit.
    def parts(self, model: Any, params: Any, options: Any) -> tuple[tuple[int, int], Hide]: ...
    # Which tokens [B, N] are left where the parts `kept` [n] are.
    def remaining(self, kept: Array) -> Array: ...


class Images(NamedTuple):
    """Normalised images [B, H, W, C], or another array [B, ...]."""

    values: Any

    regular = True
    mask = None
    removable = None

    def with_values(self, numbers: Array) -> Array:
        return numbers

    def without(self, removed: Array, fill: Any, tiling: Any = None) -> Any:
        """Pixels are replaced; `removed` may be of patches, which divide the image or are placed by `tiling`."""
        images = self.values
        if removed.shape[1:] != images.shape[1:3]:
            removed = spread(removed, (images.shape[1], images.shape[2]), tiling)
        if callable(fill):
            return fill(images, removed)
        return jnp.where(removed[..., None], jnp.asarray(fill, images.dtype), images)

    def background(self, fill: str, mean: Any) -> Array:
        """The mean colour [C], black [C], or the images blurred [B, H, W, C]."""
        if fill == "blur":
            return blur(self.values)
        return jnp.asarray(mean if fill == "mean" else (0.0,) * len(mean), self.values.dtype)

    def parts(self, model: Any, params: Any, options: Any) -> tuple[tuple[int, int], Hide]:
        """Squares of pixels; of patches that overlap, the pixels that are nearest to the centre of the patch."""
        images = self.values
        if images.ndim != 4:
            raise Unfit(f"this method removes squares of images [B, H, W, C], and the inputs are {list(images.shape)}")
        size = images.shape[1:3]
        gh, gw = _grid(model, size, options.patch)
        tiling = model.tiling if options.patch is None else None
        background = jnp.zeros((), images.dtype)
        if options.fill == "black":
            if len(options.black) != images.shape[-1]:
                raise InputError(f"option 'black' must have a number for each of {images.shape[-1]} channels")
            background = jnp.asarray(options.black, images.dtype)
        elif options.fill == "blur":
            background = blur(images)

        def hide(kept: Array) -> Array:
            shown = spread(kept.reshape(1, gh, gw).astype(images.dtype), size, tiling)[0, ..., None]
            return images * shown + background * (1 - shown)

        return (gh, gw), hide

    def remaining(self, kept: Array) -> Array:
        return jnp.broadcast_to(kept, (self.values.shape[0], *kept.shape))


def _grid(model: Any, size: tuple[int, int], patch: int | None) -> tuple[int, int]:
    height, width = size
    if patch is not None:
        if height % patch or width % patch:
            raise InputError(f"option 'patch' must divide the image of {height} x {width} pixels, got {patch}")
        return height // patch, width // patch
    try:
        grid = model.grid
    except Unfit:
        grid = None
    if grid is None:
        raise InputError(f"{model.source.name} has no 'grid' of patches: give the option 'patch', their side")
    return grid


def of(inputs: Any) -> Inputs:
    """The interface of a model's inputs: an array is `Images`."""
    return inputs if hasattr(inputs, "with_values") else Images(inputs)


def values(inputs: Any) -> Array:
    """The array of numbers that is differentiated: images [B, H, W, C], or embeddings [B, N, D]."""
    return of(inputs).values


def with_values(inputs: Any, numbers: Array) -> Any:
    """The same inputs with other numbers."""
    return of(inputs).with_values(numbers)


def seen(inputs: Any) -> Array | None:
    """Which tokens [B, N] are present; None: all of them."""
    return of(inputs).mask


def looked_up(inputs: Any, module: Any, params: Any) -> Any:
    """What is differentiated, of what the module takes: numbers of word pieces become embeddings."""
    return inputs.look_up(module, params) if hasattr(inputs, "look_up") else inputs


def read_out(module: Any, mask: Array | None, like: Array) -> Array:
    """r0 [B, N]: how the head reads each sample's tokens; of the type of `like` [B, ...] and placed as that is."""
    kind = wide(like).dtype
    known = module.readout if mask is None else module.reads(mask)
    return jnp.zeros_like(like.reshape(like.shape[0], -1)[:, :1], kind) + jnp.asarray(known, kind)


def token_map(module: Any, rows: Array) -> Array:
    """Rows over tokens [B, N] -> maps over the patch grid [B, gh, gw], or [B, 1, N] for texts; the prefix tokens are
    left out."""
    return rows[:, module.prefix :].reshape(-1, *(module.grid or (1, rows.shape[1])))


def as_maps(found: Array) -> Array:
    """Maps [B, h, w] as they are, and scores of tokens [B, N], as users get them, as maps [B, 1, N]."""
    return found.reshape(found.shape[0], -1, found.shape[-1])


def input_map(mask: Array | None, numbers: Array) -> Array:
    """Numbers at the pixels of images [B, H, W], as they are, or at the tokens of texts [B, N] -> [B, 1, N]."""
    return numbers if mask is None else numbers[:, None]


def check_inputs(inputs: Any) -> None:
    """Raises InputError for anything but an array of floating-point numbers with samples, or another modality's
    inputs."""
    if hasattr(inputs, "look_up"):
        return
    array = values(inputs)
    if getattr(array, "ndim", 0) < 2 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        found = f"{array.dtype} {list(array.shape)}" if hasattr(array, "shape") else type(array).__name__
        raise InputError(f"inputs must be an array of floating-point numbers [B, H, W, C], got {found}")


def readable(inputs: Any) -> tuple[Array, Any]:
    """Which samples [B] hold only finite numbers, and the inputs with zeros instead of the others."""
    array = values(inputs)
    fine = jnp.isfinite(array).all(tuple(range(1, array.ndim)))
    return fine, with_values(inputs, jnp.where(fine.reshape(-1, *(1,) * (array.ndim - 1)), array, 0))


def mean_of_seen(x: Array, mask: Array | None, axis: int = -1) -> Array:
    """Mean over the tokens that are present, which are along `axis` of x; the mask is [N], or None for all."""
    if mask is None:
        return x.mean(axis)
    return x.mean(axis, where=mask.reshape(-1, *(1,) * (-axis - 1)))
