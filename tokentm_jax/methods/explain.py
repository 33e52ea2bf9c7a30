"""The entry points: `explain` for photos and a loaded model, `explain_fn` for pipelines, `compiled` for runs."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from tokentm_jax.data.preprocessing import Preprocessing
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.maths.maps import unit
from tokentm_jax.methods.attention import Explanation
from tokentm_jax.methods.table import METHODS, Method

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
      A function of parameters, normalised images [B, H, W, 3] and an optional class per sample [B] (the predicted
      class where None), giving token maps [B, gh, gw], or pixel maps [B, H, W] for the methods that say so.

      A compiled function can refuse nothing, so a sample without a true map has NaN in all of it, and the others are
      as without it: where a pixel is NaN or infinite, where the logits are, or where the class is one that the model
      does not have (negative ones too). In the details the floats are NaN for such a sample; the logits, and the
      classes, stay what they are where only the class is wrong.

    Raises:
      InputError: no such method or option.
    """
    return _explainer(module, _method(method).bind(method, options), details)


def _method(name: Any) -> Method:
    """A row of the table. Raises InputError for a name that is none."""
    if not isinstance(name, str) or name not in METHODS:
        raise suggest("method", name, METHODS)
    return METHODS[name]


def _explainer(module: Any, bound: Callable[..., Explanation], details: bool) -> Callable[..., Any]:
    """What `explain_fn` returns, of a method with its options."""

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


def compiled(
    module: Any,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    details: Sequence[str] | None = (),
    preprocessing: Preprocessing | None = None,
) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    """The one compiled program that explains by these methods, from a cache that all of the package shares.

    Args:
      module: as for `explain_fn`.
      methods: names of `METHODS`, and the options of each.
      details: names of the details that are wanted, of the first method; None for all that it reports.
      preprocessing: where given, the program takes pixels uint8 [B, H, W, 3] and makes the model's input of them.

    Returns:
      A function `(params, inputs, target)` that gives each method's maps, by name, and the details. Without a target,
      every method explains the class that the first one found to be predicted.

    Raises:
      InputError: no such method or option.
    """
    rows = [(name, _method(name), options) for name, options in methods.items()]
    if preprocessing is not None:
        rows = [(name, row, row.suited(options, preprocessing)) for name, row, options in rows]
    checked = tuple((name, row, tuple(sorted(row.check(name, options).items()))) for name, row, options in rows)
    return _compiled(module, checked, None if details is None else tuple(details), preprocessing)


@lru_cache(maxsize=128)
def _compiled(
    module: Any,
    methods: tuple[tuple[str, Method, tuple[tuple[str, Any], ...]], ...],
    details: tuple[str, ...] | None,
    preprocessing: Preprocessing | None,
) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    explainers = {name: _explainer(module, row.bind(name, dict(options)), True) for name, row, options in methods}

    def program(params: Any, inputs: Array, target: Array | None) -> tuple[dict[str, Array], dict[str, Array]]:
        if preprocessing is not None:
            inputs = preprocessing.normalise(unit(inputs))
        maps: dict[str, Array] = {}
        reported: dict[str, Array] = {}
        for name, explainer in explainers.items():
            maps[name], found = explainer(params, inputs, target)
            reported, target = reported or found, found["target"]
        return maps, reported if details is None else {name: reported[name] for name in details}

    return jax.jit(program)


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
    suited = _method(method).suited(options, vit.preprocessing)
    program = compiled(vit.module, {method: suited}, details=None if details else ())
    inputs = vit.preprocessing.normalise(vit.preprocessing.checked(images))
    if target is not None:
        target = np.asarray(target)
        classes = vit.module.num_classes
        if target.dtype.kind not in "iu" or target.shape not in ((), (inputs.shape[0],)):
            raise InputError(f"target must be one class or one per sample ({inputs.shape[0]}), as whole numbers")
        if target.size and not (target.min() >= 0 and target.max() < classes):
            raise InputError(f"target must be a class from 0 to {classes - 1}, got {target.tolist()}")
        target = np.broadcast_to(target, inputs.shape[:1])
    maps, found = program(vit.params, inputs, target)
    return (maps[method], found) if details else maps[method]
