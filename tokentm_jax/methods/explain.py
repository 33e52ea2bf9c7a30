"""The two entry points: `explain` for photos and a loaded model, `explain_fn` for pipelines."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from tokentm_jax.errors import InputError, suggest
from tokentm_jax.methods.table import METHODS

if TYPE_CHECKING:
    from tokentm_jax.models.loading import LoadedViT


def explain_fn(module: Any, method: str = "tokentm", *, details: bool = False, **options: Any) -> Callable[..., Any]:
    """A pure function `(params, inputs, target=None) -> maps` to `jit`, `vmap`, differentiate or shard.

    Args:
      module: the ViT (or any module that `tokentm_jax.models.capture` can read).
      method: a name of `METHODS`.
      details: return `(maps, details)`, with `logits`, `target` and what else the method reports.
      **options: the method's options.

    Returns:
      A function of parameters, normalised images [B, H, W, 3] and an optional class per sample [B] (default: the
      predicted class), giving token maps [B, gh, gw], or pixel maps [B, H, W] for the methods that say so.

      A compiled function can refuse nothing, so a sample without a true map has NaN in all of it, and the others are
      as without it: where a pixel is NaN or infinite, where the logits are, or where the class is one that the model
      does not have (negative ones too). In the details the floats are NaN for such a sample; the logits, and the
      classes, stay what they are where only the class is wrong.

    Raises:
      InputError: no such method or option.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise suggest("method", method, METHODS)
    bound = METHODS[method].bind(method, options)

    def explain_inputs(params: Any, inputs: Array, target: Array | None = None) -> Any:
        readable = jnp.isfinite(inputs).all((1, 2, 3))
        # Zeros go through in place of what cannot be read: no NaN is left to meet a zero in a derivative.
        maps, found = bound(module, params, jnp.where(readable[:, None, None, None], inputs, 0), target)
        logits, chosen = found["logits"], found["target"]
        seen = readable & jnp.isfinite(logits).all(-1)
        true = seen & (chosen >= 0) & (chosen < logits.shape[-1])
        if not details:
            return _nan_unless(true, maps)
        marked = {name: _nan_unless(true, array) for name, array in found.items()}
        return _nan_unless(true, maps), {**marked, "logits": _nan_unless(seen, logits)}

    def placed(params: Any, inputs: Array, target: Array | None = None) -> Any:
        sharding = jax.typeof(inputs).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return explain_inputs(params, inputs, target)
        # The compiler places what is inside; all results have the batch's axis first, and are placed like it.
        inside = jax.sharding.auto_axes(explain_inputs, out_sharding=PartitionSpec(sharding.spec[0]))
        return inside(params, inputs, target)

    return placed


def _nan_unless(true: Array, array: Array) -> Array:
    """The samples of `array` [B, ...] where `true` [B], and NaN for the others; whole numbers stay."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jnp.where(true.reshape(-1, *(1,) * (array.ndim - 1)), array, jnp.nan)


@lru_cache(maxsize=128)
def _compiled(module: Any, method: str, details: bool, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(explain_fn(module, method, details=details, **dict(options)))


def explain(
    vit: "LoadedViT",
    images: Any,
    method: str = "tokentm",
    target: Any = None,
    *,
    details: bool = False,
    **options: Any,
) -> Any:
    """Heatmaps of a batch of photos.

    Args:
      vit: from `tokentm_jax.load`.
      images: array [B, H, W, 3] in [0, 1], as `vit.read` gives them; normalisation is inside.
      method: a name of `METHODS`.
      target: a class for all samples, or one per sample [B]; None for each sample's predicted class.
      details: return `(maps, details)`, with `logits`, `target` and what else the method reports.
      **options: the method's options, for example `ffn=False`.

    Returns:
      Token maps [B, gh, gw] or pixel maps [B, H, W], not rescaled; `to_pixels` makes pixels in [0, 1] of them.

    Raises:
      InputError: images that `Preprocessing.checked` refuses, a class that the model does not have, no such method
        or option.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise suggest("method", method, METHODS)
    chosen = METHODS[method].check(method, options)
    inputs = vit.preprocessing.normalise(vit.preprocessing.checked(images))
    if target is not None:
        target = np.asarray(target)
        classes = vit.module.num_classes
        if target.dtype.kind not in "iu" or target.shape not in ((), (inputs.shape[0],)):
            raise InputError(f"target must be one class or one per sample ({inputs.shape[0]}), as whole numbers")
        if target.size and not (target.min() >= 0 and target.max() < classes):
            raise InputError(f"target must be a class from 0 to {classes - 1}, got {target.tolist()}")
        target = np.broadcast_to(target, inputs.shape[:1])
    return _compiled(vit.module, method, details, tuple(sorted(chosen.items())))(vit.params, inputs, target)
