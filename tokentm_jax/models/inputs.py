"""What goes into a model, as the methods see it: normalised images [B, H, W, C], or `Texts`.

Whatever a method must know of the difference is said here; everything else is the same for both. Axes: B batch,
N tokens (of the longest text), D width of the word embeddings.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.maths.primitives import wide


class Tokens(NamedTuple):
    """Texts as numbers of word pieces, padded behind to one length. NumPy or JAX arrays."""

    ids: Any  # [B, N] int32
    mask: Any  # [B, N] bool: a token of the text, and not padding
    types: Any  # [B, N] int32: of which of two texts
    special: Any  # [B, N] bool: a mark such as [CLS], or padding; no part of a word


class Texts(NamedTuple):
    """Texts as the input of a model: what is differentiated is the embedding of each word piece."""

    embeddings: Array  # [B, N, D]; position and type are added inside the model
    mask: Array  # the others as in `Tokens`
    types: Array
    special: Array


Inputs = Array | Texts


def values(inputs: Any) -> Array:
    """The array of numbers that is differentiated: images [B, H, W, C], or embeddings [B, N, D]."""
    return inputs.embeddings if isinstance(inputs, Texts) else inputs


def with_values(inputs: Any, numbers: Array) -> Any:
    """The same inputs with other numbers."""
    return inputs._replace(embeddings=numbers) if isinstance(inputs, Texts) else numbers


def seen(inputs: Any) -> Array | None:
    """Which tokens [B, N] are there; None: all of them."""
    return inputs.mask if isinstance(inputs, Texts) else None


def read_out(module: Any, mask: Array | None, like: Array) -> Array:
    """r0 [B, N]: how the head reads each sample's tokens; of the type of `like` [B, ...] and placed as that is."""
    kind = wide(like).dtype
    known = module.readout if mask is None else module.reads(mask)
    return jnp.zeros_like(like.reshape(like.shape[0], -1)[:, :1], kind) + jnp.asarray(known, kind)


def token_map(module: Any, rows: Array) -> Array:
    """Rows over tokens [B, N] -> maps over the patch grid [B, gh, gw], or [B, 1, N] for texts; the prefix tokens are
    left out."""
    grid = (1, rows.shape[1]) if module.grid is None else module.grid
    return rows[:, module.prefix :].reshape(-1, *grid)


def input_map(mask: Array | None, numbers: Array) -> Array:
    """Numbers at the pixels of images [B, H, W], as they are, or at the tokens of texts [B, N] -> [B, 1, N]."""
    return numbers if mask is None else numbers[:, None]


def check_inputs(inputs: Any) -> None:
    """Raises InputError for anything but an array of floating-point numbers with samples, or `Texts`."""
    array = values(inputs)
    if getattr(array, "ndim", 0) < 2 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        found = f"{array.dtype} {list(array.shape)}" if hasattr(array, "shape") else type(array).__name__
        raise InputError(f"inputs must be an array of floating-point numbers [B, H, W, C], got {found}")


def readable(inputs: Any) -> tuple[Array, Any]:
    """Which samples [B] hold numbers alone, and the inputs with zeros in place of the others."""
    array = values(inputs)
    fine = jnp.isfinite(array).all(tuple(range(1, array.ndim)))
    return fine, with_values(inputs, jnp.where(fine.reshape(-1, *(1,) * (array.ndim - 1)), array, 0))


def mean_of_seen(x: Array, mask: Array | None, axis: int = -1) -> Array:
    """Mean over the tokens that are there, which stand along `axis` of x; the mask is [N], or None for all."""
    if mask is None:
        return x.mean(axis)
    return x.mean(axis, where=mask.reshape(-1, *(1,) * (-axis - 1)))
