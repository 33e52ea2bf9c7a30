"""Max-sensitivity: whether maps stay when images change little."""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Gt, Le
from jax import Array
from jaxtyping import Float

from tokentm_jax.inputs.values import values, with_values
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.task import Column, Input, Predict, Samples, Seed, Subject, Task

Radius = Annotated[float, Gt(0), Le(1)]


def max_sensitivity(
    explain: Callable[[Input], Array],
    images: Input,
    maps: Float[AnyArray, "B h w"],
    radius: float,
    samples: int,
    seed: int | Array = 0,
) -> Float[Array, " B"]:
    """Largest relative change of maps over random images nearby (Yeh et al., NeurIPS 2019).

        max_s ||E(x + d_s) - E(x)|| / ||E(x)||,   d_s uniform in [-radius, radius], the same for every image

    Args:
      explain: from images to maps, for the class that was explained.
      images: in [0, 1].
      maps: of them, of any scale, since the change is relative.
      radius: of the change of each pixel's value.
      samples: how many random images.
      seed: of them.

    Returns:
      The change; of a map of zeros 0 where it stays, and 1 where it does not, as of a map that becomes zeros.
    """

    numbers = values(images)

    def change(key: Array) -> Array:
        step = jax.random.uniform(key, numbers.shape[1:], numbers.dtype, -radius, radius)
        return jnp.sqrt(jnp.square(explain(with_values(images, numbers + step)) - maps).sum((1, 2)))

    largest = jax.lax.map(change, jax.random.split(jax.random.key(seed), samples)).max(0)
    size = jnp.sqrt(jnp.square(maps).sum((1, 2)))
    return jnp.where(size > 0, largest / jnp.where(size > 0, size, 1), jnp.sign(largest))


def _sensitivity(
    predict: Predict, subject: Subject, maps: Array, *, radius: Radius = 0.02, samples: Samples = 10, seed: Seed = 0
) -> dict[str, Array]:
    assert subject.explain is not None
    return {"sensitivity": max_sensitivity(subject.explain, subject.inputs, maps, radius, samples, seed)}


SENSITIVITY = Task(
    _sensitivity,
    {"max_sensitivity": Column(lambda table: table["predicted_sensitivity"], better="lower", digits=3)},
    raw=True,
    explains=True,
)
