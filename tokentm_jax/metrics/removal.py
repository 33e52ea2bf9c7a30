"""The model's answers as pixels or patches are removed, the most relevant first or last.

Functions take a batch and give results per image: maps are pixel maps [B, H, W] in [0, 1], images [B, H, W, 3] are in
[0, 1], and `predict` gives logits [B, classes] for such images. What is followed is the probability of the class
`target` [B], or the score of a `Question` (`tokentm_jax.maths.scores`), which need be no probability.
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
    """Rank of every pixel of maps [B, H, W], as int32 of that shape: 0 is the most relevant; of equal values, the
    one with the lower index comes first. Places that are not `removable` [B, H, W] come last."""
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
    """Images [B, H, W, C] with `count` pixels set to `fill`: the first by rank (positive) or the last.

    `ranks` are those of pixels [B, H, W], or of patches [B, gh, gw]: then `count` patches are removed, which divide
    the image or are placed by `tiling` (`tokentm_jax.maths.maps.spread`). `fill` is a value, an array that fits the
    images, or a function `(images, removed [B, H, W]) -> images`. Of `Texts`, word pieces are removed.
    """
    removed = jnp.where(positive, ranks < count, ranks >= total(images, ranks) - count)
    removable = of(images).removable
    return of(images).without(removed if removable is None else removed & removable, fill, tiling)


def scores(
    logits: Float[Array, "B classes"], target: Target, labels: Integer[AnyArray, " B"]
) -> dict[str, Shaped[Array, " B"]]:
    """Per image: the log-probability of the class, or the score of a question; and whether the top-1 class is the
    label [B]."""
    if isinstance(target, Question):
        followed = {"score": wide(explained(logits, target)[0])}
    else:
        followed = {"log_probability": log_probability(logits, target)}
    return {**followed, "hit": logits.argmax(-1) == labels}


def followed(found: dict[str, Any]) -> Any:
    """The probability of the class, or the score, of what `scores` found."""
    return found["score"] if "score" in found else jnp.exp(found["log_probability"])


def confidence(predict: Predict, images: Input, target: Target) -> Float[Array, " B"]:
    """What is followed, the probability of the class or the score of a question, for images [B, H, W, C]: [B]."""
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
    """`scores` after removing `counts` [S], or [S, B, 1, 1], of pixels or patches, in the given directions [S]
    (`perturb`): arrays [B, S].

    One forward pass of the whole batch after the other, so that memory does not grow with S.
    """
    ranks = rank_pixels(maps, of(images).removable)

    def step(way: tuple[Array, Array]) -> dict[str, Array]:
        return scores(predict(perturb(images, ranks, *way, fill, tiling)), target, labels)

    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), jax.lax.map(step, (counts, positive)))


def by_patch(
    maps: Float[AnyArray, "B h w"], grid: tuple[int, int], tiling: Tiling | None = None
) -> Float[Array, "B gh gw"]:
    """Means of maps [B, h, w] over the patches of a grid: [B, gh, gw]; one value a patch stays as it is.

    Of patches that overlap (`tiling`, for pixel maps), over the pixels that `maths.maps.spread` gives them. Maps of
    neither pixels nor these patches divide the image evenly.
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
    """Maps [B, h, w] as they are, or where they have more values than a grid has patches, their means (`by_patch`)."""
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
