"""Methods that differentiate the score with respect to the input. They work on any model.

Each function is `(model, params, inputs, target, **options) -> (pixel maps [B, H, W], details)`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le, Lt
from jax import Array
from jax.core import Tracer
from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.values import input_map, seen, values, with_values
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.scores import explained
from tokentm_jax.methods.sharing import Details, Explanation, Share
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.one_pass import Pass, Wanted

MOST = 100_000  # passes


@dataclasses.dataclass(frozen=True, eq=False)
class References:
    """Normalised inputs [R, ...] as an option: equal if their numbers are, so that programs are compiled once."""

    values: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, References) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.values.shape, self.values.tobytes()))


def _references(given: Any) -> References | None:
    if given is None or isinstance(given, References):
        return given
    if hasattr(given, "__array__") and not isinstance(given, Tracer):
        array = np.asarray(given)
        if array.ndim > 1 and len(array) and jnp.issubdtype(array.dtype, jnp.floating) and np.isfinite(array).all():
            return References(array)
    raise PydanticCustomError("references", "Input should be an array of finite numbers, one reference first")


def with_normalised(options: Mapping[str, Any], preprocessing: Any) -> Mapping[str, Any]:
    """Options of Expected Gradients with references as the model's input, from images as users have them."""
    given = options.get("references")
    if given is None or isinstance(given, References):
        return options
    return {**options, "references": preprocessing.normalise(preprocessing.checked(given))}


def _gradient(model: Model, params: Any, inputs: Any, target: Any) -> tuple[Array, Array, dict[str, Array]]:
    """Gradient of each sample's score at its input [B, H, W, 3], that score [B], and the details."""

    def score(numbers: Array) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        logits = model.apply({"params": params}, with_values(inputs, numbers))
        own, details = explained(logits, target)
        return own.sum(), (own, details)

    gradient, (own, details) = jax.grad(score, has_aux=True)(values(inputs))
    return wide(gradient), own, details


def _summed(
    model: Model, params: Any, inputs: Any, target: Any, point: Callable[[Array], Array], over: Array
) -> Array:
    """The sum of the gradients at `point(each)`, for each of `over`."""

    def add(total: Array, each: Array) -> tuple[Array, None]:
        return total + _gradient(model, params, with_values(inputs, point(each)), target)[0], None

    return jax.lax.scan(add, jnp.zeros_like(wide(values(inputs))), over)[0]


def _largest(inputs: Any, gradient: Array) -> Array:
    return input_map(seen(inputs), jnp.abs(gradient).max(-1))


def _times_input(inputs: Any, gradient: Array) -> Array:
    return input_map(seen(inputs), (gradient * values(inputs).astype(gradient.dtype)).sum(-1))


def _share(read: Callable[[Any, Array], Array]) -> Share:
    """A map of the input's gradient as a part of one pass."""

    def explain(model: Model, inputs: Any, done: Pass, details: Details) -> Explanation:
        return read(inputs, wide(done.input_grads)), details

    return Share(Wanted(input_grads=True), explain)


def input_gradient_share() -> Share:
    """The gradient of the input as a part of one pass."""
    return _share(_largest)


def gradient_x_input_share() -> Share:
    """Gradient times input as a part of one pass."""
    return _share(_times_input)


def input_gradient(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Largest absolute gradient over the channels (Simonyan et al., 2013)."""
    gradient, _, details = _gradient(model, params, inputs, target)
    return _largest(inputs, gradient), details


def gradient_x_input(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Gradient times normalised input, summed over the channels (Shrikumar et al., 2016); signed."""
    gradient, _, details = _gradient(model, params, inputs, target)
    return _times_input(inputs, gradient), details


def smooth_grad(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    samples: Annotated[int, Ge(1), Le(MOST)] = 25,
    noise: Annotated[float, Ge(0)] = 0.15,
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0,
) -> Explanation:
    """SmoothGrad (Smilkov et al., 2017): the mean gradient over noisy inputs, largest absolute value over channels.

    The standard deviation is `noise` times the range of each image. All images get the same noise, so a map does not
    depend on the batch.
    """
    _, _, details = _gradient(model, params, inputs, target)
    x, mask = values(inputs), seen(inputs)
    # The padding of a text does not count: the first token replaces it.
    present = x if mask is None else jnp.where(mask[..., None], x, x[:, :1])
    axes = tuple(range(1, x.ndim))
    deviation = noise * (present.max(axes, keepdims=True) - present.min(axes, keepdims=True))
    noisy = lambda key: x + deviation * jax.random.normal(key, (1, *x.shape[1:]), x.dtype)  # noqa: E731
    keys = jax.random.split(jax.random.key(seed), samples)
    total = _summed(model, params, inputs, details["target"], noisy, keys)
    return input_map(mask, jnp.abs(total / samples).max(-1)), details


def integrated_gradients(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    steps: Annotated[int, Ge(1), Le(MOST)] = 32,
    baseline: float = 0.0,
) -> Explanation:
    """Integrated Gradients (Sundararajan et al., ICML 2017), midpoint rule, summed over channels; signed.

    `baseline` is the value of every pixel of the normalised baseline image (0 is the data's mean colour).
    `details["completeness_gap"]` [B] is the sum of the map minus the change of the logit: zero for enough steps.
    """
    _, own, details = _gradient(model, params, inputs, target)
    x = values(inputs)
    base = jnp.full_like(x, baseline)
    between = lambda share: base + share.astype(x.dtype) * (x - base)  # noqa: E731
    shares = (jnp.arange(steps, dtype=jnp.float32) + 0.5) / steps
    total = _summed(model, params, inputs, details["target"], between, shares)
    maps = input_map(seen(inputs), ((x - base).astype(total.dtype) * total / steps).sum(-1))
    at_base = explained(model.apply({"params": params}, with_values(inputs, base)), details["target"])[0]
    return maps, {**details, "completeness_gap": maps.sum((1, 2)) - (own - at_base)}


def expected_gradients(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    samples: Annotated[int, Ge(2), Le(MOST)] = 50,
    references: Annotated[Any, PlainValidator(_references)] = None,
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0,
) -> Explanation:
    """Expected Gradients (Erion et al., 2021): Integrated Gradients in the mean over references; signed.

    Each of `samples` draws a reference r and a share s in [0, 1), the same for all inputs, and gives `(x - r)` times
    the gradient at `r + s (x - r)`, summed over channels. `references` are images [R, H, W, C]; None: the input in one
    colour, which is that of one of its pixels. `details["standard_error"]` [B, H, W] is that of the mean.
    """
    details = explained(model.apply({"params": params}, inputs), target)[1]
    x, mask = values(inputs), seen(inputs)
    given = None if references is None else jnp.asarray(references.values, x.dtype)
    if given is not None and given.shape[1:] != x.shape[1:]:
        raise InputError(
            f"option 'references' must be [R, {', '.join(map(str, x.shape[1:]))}], got {list(given.shape)}"
        )
    flat = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, pixels or tokens, C]
    present = jnp.full(x.shape[0], flat.shape[1], jnp.float32) if mask is None else mask.sum(1, dtype=jnp.float32)

    def reference(key: Array) -> Array:
        if given is not None:
            return given[jax.random.randint(key, (), 0, len(given))][None]
        place = (jax.random.uniform(key, dtype=jnp.float32) * present).astype(jnp.int32)
        colour = jnp.take_along_axis(flat, place[:, None, None], 1, mode="clip")
        return jnp.broadcast_to(colour.reshape(-1, *(1,) * (x.ndim - 2), x.shape[-1]), x.shape)

    def draw(carried: tuple[Array, Array], turn: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (mean, spread), (number, key) = carried, turn
        first, second = jax.random.split(key)
        start = reference(first)
        away = x - start
        point = start + jax.random.uniform(second, dtype=x.dtype) * away
        slope = _gradient(model, params, with_values(inputs, point), details["target"])[0]
        change = (away.astype(slope.dtype) * slope).sum(-1) - mean  # by Welford's recursion
        mean = mean + change / number
        return (mean, spread + jnp.square(change) * (1 - 1 / number)), None

    zeros = jnp.zeros_like(wide(x[..., 0]))
    turns = jnp.arange(1, samples + 1, dtype=zeros.dtype), jax.random.split(jax.random.key(seed), samples)
    mean, spread = jax.lax.scan(draw, (zeros, zeros), turns)[0]
    error = jnp.sqrt(spread / (samples * (samples - 1)))
    return input_map(mask, mean), {**details, "standard_error": input_map(mask, error)}
