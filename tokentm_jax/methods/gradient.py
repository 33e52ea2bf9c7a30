"""Methods that differentiate the score with respect to the input. They work on any model.

Each function is `(model, params, inputs, target, **options) -> (pixel maps [B, H, W], details)`.
"""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le, Lt
from jax import Array

from tokentm_jax.inputs.values import input_map, seen, values, with_values
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.scores import explained
from tokentm_jax.programs.model import Model

MOST = 100_000  # passes

Explanation = tuple[Array, dict[str, Array]]


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


def input_gradient(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Largest absolute gradient over the channels (Simonyan et al., 2013)."""
    gradient, _, details = _gradient(model, params, inputs, target)
    return input_map(seen(inputs), jnp.abs(gradient).max(-1)), details


def gradient_x_input(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Gradient times normalised input, summed over the channels (Shrikumar et al., 2016); signed."""
    gradient, _, details = _gradient(model, params, inputs, target)
    return input_map(seen(inputs), (gradient * values(inputs).astype(gradient.dtype)).sum(-1)), details


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
