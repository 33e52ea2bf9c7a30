"""The model's answers as pixels or patches are removed, the most relevant first or last.

Functions take a batch and give results per image. What is followed is the probability of the class, or the score of
a `Question` (`tokentm_jax.maths.scores`), which need be no probability.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Integer, Shaped

from tokentm_jax.inputs.values import of
from tokentm_jax.maths.maps import Tiling
from tokentm_jax.maths.primitives import AnyArray, wide
from tokentm_jax.maths.scores import Question, explained, log_probability
from tokentm_jax.metrics.task import Input, Predict, Table, Target, followed_in

Fill = Array | float | Callable[[Array, Array], Array]  # what replaces removed pixels, see `perturb`
MOST = 1000  # steps, or groups of pixels: each is a forward pass


def rank_pixels(
    maps: Float[AnyArray, "B h w"], removable: Bool[AnyArray, "B h w"] | None = None
) -> Int[Array, "B h w"]:
    """Rank of every pixel.

    Args:
      maps: of pixels or patches.
      removable: places that count; the others come last. None: all.

    Returns:
      0 for the most relevant; of equal values, the one with the lower index comes first.
    """
    chex.assert_rank(maps, 3)
    values = maps if removable is None else jnp.where(removable, maps, -jnp.inf)
    order = jnp.argsort(values.reshape(len(maps), -1), axis=1, descending=True, stable=True).astype(jnp.int32)
    places = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=jnp.int32), order.shape)
    put = jax.vmap(lambda o, p: jnp.zeros_like(p).at[o].set(p, unique_indices=True))
    return put(order, places).reshape(maps.shape)


def total(inputs: Input, maps: Shaped[AnyArray, "B h w"]) -> int | Int[Array, "B 1 1"]:
    """How many places of maps [B, h, w] can be removed: a number, or [B, 1, 1] where samples differ."""
    removable = of(inputs).removable
    if removable is None:
        return maps.shape[1] * maps.shape[2]
    return removable.sum((1, 2), keepdims=True, dtype=jnp.int32)


def most(pixels: int | Int[AnyArray, "B 1 1"]) -> int:
    """The most steps for that many `total` places, each a forward pass; samples that differ may repeat a step."""
    return min(pixels, MOST) if isinstance(pixels, int) else MOST


def stacked(counts: Sequence[int | Int[AnyArray, "B 1 1"]]) -> Int[Array, "S ..."]:
    """Counts, each a number or [B, 1, 1], as an array [S] or [S, B, 1, 1]."""
    return jnp.stack([jnp.asarray(count, jnp.int32) for count in counts])


def perturb(
    images: Input,
    ranks: Int[AnyArray, "B h w"],
    count: Int[AnyArray, "..."] | int,
    positive: Bool[AnyArray, ""] | bool,
    fill: Fill = 0.0,
    tiling: Tiling | None = None,
) -> Input:
    """Images of which pixels are removed; of `Texts`, word pieces.

    Args:
      images: in [0, 1], or texts.
      ranks: of pixels [B, H, W], or of patches [B, gh, gw], which are then removed as a whole.
      count: how many, [] or [B, 1, 1].
      positive: the first by rank, or the last.
      fill: what replaces them: a value, an array that fits the images, or a function `(images, removed [B, H, W]) ->
        images`.
      tiling: of patches that do not divide the image (`tokentm_jax.maths.maps.spread`).

    Returns:
      The changed images.
    """
    removed = jnp.where(positive, ranks < count, ranks >= total(images, ranks) - count)
    removable = of(images).removable
    return of(images).without(removed if removable is None else removed & removable, fill, tiling)


def scores(
    logits: Float[Array, "B classes"], target: Target, labels: Integer[AnyArray, " B"]
) -> dict[str, Shaped[Array, " B"]]:
    """What is followed of each image.

    Args:
      logits: of the model.
      target: classes [B], or a `Question`.
      labels: -1 where unknown.

    Returns:
      `log_probability` of the class, or the `score` of the question; and `hit`, whether the top-1 class is the label.
    """
    if isinstance(target, Question):
        followed = {"score": wide(explained(logits, target)[0])}
    else:
        followed = {"log_probability": log_probability(logits, target)}
    return {**followed, "hit": logits.argmax(-1) == labels}


def followed(found: dict[str, Any]) -> Any:
    """The probability of the class, or the score, of what `scores` found."""
    return found["score"] if "score" in found else jnp.exp(found["log_probability"])


def confidence(predict: Predict, images: Input, target: Target) -> Float[Array, " B"]:
    """What is followed.

    Args:
      predict, images, target: see `removal`.

    Returns:
      The probability of the class, or the score of the question.
    """
    return followed(scores(predict(images), target, no_labels(images)))


def no_labels(images: Input) -> Int[Array, " B"]:
    """Labels of images that have none."""
    return jnp.full(len(of(images).values), -1)


def removal(
    predict: Predict,
    images: Input,
    maps: Float[AnyArray, "B h w"],
    target: Target,
    labels: Integer[AnyArray, " B"],
    counts: Int[AnyArray, "S ..."],
    positive: Bool[AnyArray, " S"],
    fill: Fill = 0.0,
    tiling: Tiling | None = None,
) -> dict[str, Shaped[Array, "B S"]]:
    """`scores` after each of S removals, one forward pass of the whole batch after the other.

    Args:
      predict: from images in [0, 1] to logits [B, classes].
      images: in [0, 1], or texts.
      maps: of pixels or patches.
      target: classes [B], whose probability is followed, or a `Question`, whose score is.
      labels: -1 where unknown.
      counts: how many pixels or patches are removed, [S] or [S, B, 1, 1].
      positive: the most relevant first, or the least.
      fill, tiling: see `perturb`.

    Returns:
      `scores` after each removal. Memory does not grow with S.
    """
    ranks = rank_pixels(maps, of(images).removable)

    def step(way: tuple[Array, Array]) -> dict[str, Array]:
        return scores(predict(perturb(images, ranks, *way, fill, tiling)), target, labels)

    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), jax.lax.map(step, (counts, positive)))


def by_patch(
    maps: Float[AnyArray, "B h w"], grid: tuple[int, int], tiling: Tiling | None = None
) -> Float[Array, "B gh gw"]:
    """Means of maps over the patches of a grid.

    Args:
      maps: of pixels; of these patches, which stay as they are; or of others, which divide the image evenly.
      grid: (gh, gw).
      tiling: of patches that overlap, which have the pixels that `maths.maps.spread` gives them.

    Returns:
      One mean a patch.
    """
    maps = jnp.asarray(maps)
    if tiling is not None and tiling.patch != tiling.stride and tiling.grid(maps.shape[1:]) == grid:
        for axis, count in enumerate(grid):
            cells = jnp.asarray(tiling.cells(axis, count, maps.shape[axis + 1]), jnp.int32)
            inside = (cells[:, None] == jnp.arange(count, dtype=jnp.int32)).astype(maps.dtype)
            maps = jnp.tensordot(maps, inside / inside.sum(0), ((axis + 1,), (0,)), precision="highest")
            maps = jnp.moveaxis(maps, -1, axis + 1)
        return maps
    for axis, (side, wanted) in enumerate(zip(maps.shape[1:], grid, strict=True), 1):
        least = math.lcm(side, wanted)
        fine = jnp.moveaxis(maps.repeat(least // side, axis), axis, -1)
        maps = jnp.moveaxis(fine.reshape(*fine.shape[:-1], wanted, -1).mean(-1), -1, axis)
    return maps


def coarsened(
    maps: Float[AnyArray, "B h w"], grid: tuple[int, int], tiling: Tiling | None = None
) -> Float[Array, "B _ _"]:
    """Maps with no more values than a grid has patches.

    Args:
      maps, grid, tiling: see `by_patch`.

    Returns:
      The maps as they are, or their means (`by_patch`).
    """
    finer = maps.shape[1] * maps.shape[2] > math.prod(grid)
    return by_patch(maps, grid, tiling) if finer else jnp.asarray(maps)


def two_curves(found: dict[str, Shaped[Array, "B S"]]) -> dict[str, Float[Array, "B 2 k"]]:
    """What is followed along two curves one after the other, from `removal` [B, 2 k]: [B, 2, k]."""
    return {name: a.reshape(len(a), 2, -1) for name, a in found.items() if name != "hit"}


def plotted(*titles: str) -> Callable[[Table], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The `curves` of a `Plot` from `two_curves`, with their titles."""

    def curves(table: Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        means = followed_in(table).mean(0)
        return {title: (np.linspace(0, 100, len(mean)), mean) for title, mean in zip(titles, means, strict=True)}

    return curves
