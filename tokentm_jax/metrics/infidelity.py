"""Infidelity: whether relevance predicts what the removal of random patches costs."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Gt, Lt
from jax import Array
from jaxtyping import Bool, Float, Num

from tokentm_jax.maths.maps import Tiling
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.removal import Fill, by_patch, confidence, perturb, rank_pixels
from tokentm_jax.metrics.task import Background, Column, Input, Predict, Samples, Seed, Subject, Target, Task

REMOVALS = 50
Share = Annotated[float, Gt(0), Lt(1)]


def random_removals(
    predict: Predict,
    images: Input,
    maps: Float[AnyArray, "B gh gw"],
    target: Target,
    fill: Fill,
    samples: int,
    share: float,
    seed: int | Array = 0,
    tiling: Tiling | None = None,
) -> dict[str, Float[Array, "B {samples}"]]:
    """What `infidelity` needs: the relevance of random patches, and what their removal costs.

    The drops are of no map: `removed_patches`, `removed_relevance` and `removal_drops` are the parts of this, for many
    maps of the same images.

    Args:
      predict, images, target, fill, tiling: see `removal`.
      maps: of patches.
      samples: how often patches are removed, the same ones in every image.
      share: of the patches, one at least, that is removed each time.
      seed: of the random choice.

    Returns:
      `relevance`, the sum over the removed patches, and `drop` of what is followed.
    """
    removed = removed_patches((maps.shape[1], maps.shape[2]), samples, share, seed)
    drop = removal_drops(predict, images, removed, target, fill, tiling)
    return {"relevance": removed_relevance(maps, removed), "drop": drop}


def removed_patches(
    grid: tuple[int, int], samples: int, share: float, seed: int | Array = 0
) -> Bool[Array, "{samples} gh gw"]:
    """Random patches of a grid.

    Args:
      grid: (gh, gw).
      samples: how often patches are chosen.
      share: of the patches, one at least, that is chosen each time.
      seed: of the random choice.

    Returns:
      True for the patches that are removed.
    """
    patches = math.prod(grid)
    places = lambda key: jax.random.permutation(key, jnp.arange(patches))  # noqa: E731
    order = jax.vmap(places)(jax.random.split(jax.random.key(seed), samples))
    return order.reshape(samples, *grid) < max(1, round(share * patches))


def removed_parts(
    removable: Bool[AnyArray, "B h w"], samples: int, share: float, seed: int | Array = 0
) -> Bool[Array, "{samples} B h w"]:
    """As `removed_patches`, among the places that are `removable` [B, h, w]: bool [samples, B, h, w]. The same order
    of places for every sample."""

    def one(key: Array) -> Array:
        noise = jnp.broadcast_to(jax.random.uniform(key, removable.shape[1:]), removable.shape)
        counts = removable.sum((1, 2), keepdims=True, dtype=jnp.int32)
        counts = jnp.round(share * counts.astype(noise.dtype)).astype(jnp.int32)
        return (rank_pixels(noise, removable) < jnp.maximum(counts, 1)) & removable

    return jax.lax.map(one, jax.random.split(jax.random.key(seed), samples))


def removed_relevance(maps: Float[AnyArray, "B gh gw"], removed: Bool[AnyArray, "S ..."]) -> Float[Array, "B S"]:
    """Sums of maps over the patches that are removed.

    Args:
      maps: of patches.
      removed: patches [S, gh, gw], or [S, B, gh, gw] where samples differ.

    Returns:
      One sum for each sample and each of S removals.
    """
    return jax.lax.map(lambda patches: jnp.where(patches, maps, 0).sum((1, 2)), removed).T


def removal_drops(
    predict: Predict,
    images: Input,
    removed: Bool[AnyArray, "S ..."],
    target: Target,
    fill: Fill,
    tiling: Tiling | None = None,
) -> Float[Array, "B S"]:
    """How much what is followed drops where patches are removed.

    Args:
      predict, images, target, fill, tiling: see `removal`.
      removed: patches [S, gh, gw], or [S, B, gh, gw] where samples differ.

    Returns:
      One drop for each sample and each of S removals.
    """

    def left(patches: Array) -> Array:
        ranks = jnp.where(patches, 0, 1).reshape(-1, *patches.shape[-2:])
        return confidence(predict, perturb(images, ranks, 1, True, fill, tiling), target)

    return (confidence(predict, images, target) - jax.lax.map(left, removed)).T


def infidelity(relevance: Num[np.ndarray, "n S"], drop: Num[np.ndarray, "n S"]) -> Float[np.ndarray, " n"]:
    """Infidelity (Yeh et al., NeurIPS 2019) with the best scale of each map.

        min_beta mean_s (beta relevance_s - drop_s)^2

    The scale makes maps of all methods comparable, as in the paper's figures.

    Args:
      relevance: of what was removed, for n images and S removals.
      drop: of what is followed.

    Returns:
      The mean squared error of each image.
    """
    relevance, drop = relevance.astype(np.float64), drop.astype(np.float64)
    size = np.square(relevance).sum(1)
    scale = np.divide((relevance * drop).sum(1), size, out=np.zeros(len(size)), where=size > 0)
    return np.square(scale[:, None] * relevance - drop).mean(1)


def _removals(
    predict: Predict,
    subject: Subject,
    *,
    fill: Background = "mean",
    samples: Samples = REMOVALS,
    share: Share = 0.1,
    seed: Seed = 0,
) -> tuple[Array, Array]:
    if subject.removable is None:
        removed = removed_patches(subject.grid, samples, share, seed)
    else:
        removed = removed_parts(subject.removable, samples, share, seed)
    background = subject.background(fill)
    return removed, removal_drops(predict, subject.inputs, removed, subject.target, background, subject.tiling)


def _infidelity(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    removed, drop = subject.shared
    maps = by_patch(maps, subject.grid, subject.tiling)
    return {"relevance": removed_relevance(maps, removed), "drop": drop}


INFIDELITY = Task(
    _infidelity,
    {
        "infidelity": Column(
            lambda table: infidelity(table["predicted_relevance"], table["predicted_drop"]), better="lower", digits=4
        )
    },
    raw=True,
    shared=_removals,
)
