"""Is it faithful? What the model says when pixels go, the most relevant first or last.

Functions take a batch and give results per image: maps are pixel maps [B, H, W] in [0, 1], images [B, H, W, 3] are in
[0, 1], and `predict` gives logits [B, classes] for such images. What is followed while pixels go is the probability of
the class `target` [B], or the score of a `Question` (`tokentm_jax.maths.scores`), which need be no probability.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Annotated, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.maths.maps import Tiling, spread
from tokentm_jax.maths.perturbation import linear_imputation
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.scores import Question, explained, log_probability
from tokentm_jax.metrics.statistics import unit_area
from tokentm_jax.validation import checked

Predict = Callable[[Array], Array]
Target = Array | Question
Fill = Array | float | Callable[[Array, Array], Array]  # what stands in for removed pixels, see `perturb`
STEPS = 9  # 10 %, 20 % ... 90 % of the pixels
GROUPS = 10  # of pixels, for SaCo
MOST = 1000  # groups, or steps of insertion: each is a forward pass


def rank_pixels(maps: Array) -> Array:
    """Rank of every pixel of maps [B, H, W], as int32 of that shape: 0 is the most relevant; of equal values, the
    one with the lower index comes first."""
    chex.assert_rank(maps, 3)
    order = jnp.argsort(maps.reshape(len(maps), -1), axis=1, descending=True, stable=True).astype(jnp.int32)
    places = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=jnp.int32), order.shape)
    put = jax.vmap(lambda o, p: jnp.zeros_like(p).at[o].set(p, unique_indices=True))
    return put(order, places).reshape(maps.shape)


def perturb(
    images: Array,
    ranks: Array,
    count: Array | int,
    positive: Array | bool,
    fill: Fill = 0.0,
    tiling: Tiling | None = None,
) -> Array:
    """Images [B, H, W, C] with `count` pixels set to `fill`: the first by rank (positive) or the last.

    `ranks` are those of pixels [B, H, W], or of patches [B, gh, gw]: then `count` patches go, which divide the image
    or lie as `tiling` says (`tokentm_jax.maths.maps.spread`). `fill` is a value, an array that fits the images, or a
    function `(images, removed [B, H, W]) -> images`.
    """
    _, gh, gw = ranks.shape
    removed = jnp.where(positive, ranks < count, ranks >= gh * gw - count)
    if ranks.shape[1:] != images.shape[1:3]:
        removed = spread(removed, (images.shape[1], images.shape[2]), tiling)
    if callable(fill):
        return fill(images, removed)
    return jnp.where(removed[..., None], jnp.asarray(fill, images.dtype), images)


def scores(logits: Array, target: Target, labels: Array) -> dict[str, Array]:
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


def confidence(predict: Predict, images: Array, target: Target) -> Array:
    """What is followed, the probability of the class or the score of a question, for images [B, H, W, C]: [B]."""
    return followed(scores(predict(images), target, _nobody(images)))


def _nobody(images: Array) -> Array:
    return jnp.full(len(images), -1)


def removal(
    predict: Predict,
    images: Array,
    maps: Array,
    target: Target,
    labels: Array,
    counts: Array,
    positive: Array,
    fill: Fill = 0.0,
    tiling: Tiling | None = None,
) -> dict[str, Array]:
    """`scores` after removing `counts` [S] pixels, or patches, in the given directions [S] (`perturb`): arrays [B, S].

    One forward pass of the whole batch after the other, so that memory does not grow with S.
    """
    ranks = rank_pixels(maps)

    def step(way: tuple[Array, Array]) -> dict[str, Array]:
        return scores(predict(perturb(images, ranks, *way, fill, tiling)), target, labels)

    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), jax.lax.map(step, (counts, positive)))


def perturbation(
    predict: Predict, images: Array, maps: Array, target: Target, labels: Array, fill: Fill = 0.0
) -> dict[str, Array]:
    """Positive and negative perturbation test: `scores` [B, 2, 9] with floor(0.1 s H W) pixels black, s = 1 ... 9.

    With `noisy_linear` as the `fill` it is ROAD (Rong et al., ICML 2022).
    """
    pixels = maps.shape[1] * maps.shape[2]
    counts = jnp.asarray([s * pixels // 10 for s in range(1, STEPS + 1)] * 2, jnp.int32)
    positive = jnp.arange(2 * STEPS) < STEPS
    found = removal(predict, images, maps, target, labels, counts, positive, fill)
    return jax.tree.map(lambda a: a.reshape(len(a), 2, STEPS), found)


def noisy_linear(images: Array, removed: Array, noise: float = 0.01, seed: int = 0) -> Array:
    """ROAD's imputation (Rong et al., ICML 2022) of the `removed` pixels [B, H, W] of images [B, H, W, C].

    Each is the weighted mean of its neighbours (`linear_imputation`), plus Gaussian noise of that deviation, the same
    for every image: neither the values nor sharp edges tell the model which pixels were removed.
    """
    key = jax.random.key(seed)
    grain = noise * jax.random.normal(key, images.shape[1:], images.dtype)
    return jax.vmap(linear_imputation)(images, removed) + jnp.where(removed[..., None], grain, 0)


def by_patch(maps: Array, grid: tuple[int, int], tiling: Tiling | None = None) -> Array:
    """Means of maps [B, h, w] over the patches of a grid: [B, gh, gw]; one value a patch stays as it is.

    Of patches that overlap (`tiling`, for pixel maps), over the pixels that `maths.maps.spread` gives them. Maps of
    neither pixels nor these patches divide the image evenly.
    """
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


def coarsened(maps: Array, grid: tuple[int, int], tiling: Tiling | None = None) -> Array:
    """Maps [B, h, w] as they are, or where they have more values than a grid has patches, their means (`by_patch`)."""
    finer = maps.shape[1] * maps.shape[2] > math.prod(grid)
    return by_patch(maps, grid, tiling) if finer else maps


def patch_removal(
    predict: Predict,
    images: Array,
    maps: Array,
    target: Target,
    fill: Fill,
    steps: int = 20,
    tiling: Tiling | None = None,
) -> dict[str, Array]:
    """What `srg` needs: log-probability, or score, [B, 2, steps + 1] while patches are removed, the most relevant ones
    first, and the least relevant ones first, from none to all. Maps are [B, gh, gw]; for `tiling` see `perturb`.

    Raises InputError for `steps` that are not from 1 to the number of patches, and 1000 at most.
    """
    patches = maps.shape[1] * maps.shape[2]
    steps = checked("steps", Annotated[int, Ge(1), Le(min(patches, MOST))], steps)
    counts = jnp.asarray([s * patches // steps for s in range(steps + 1)] * 2, jnp.int32)
    positive = jnp.arange(2 * steps + 2) <= steps
    return _two_curves(removal(predict, images, maps, target, _nobody(images), counts, positive, fill, tiling))


def _two_curves(found: dict[str, Array]) -> dict[str, Array]:
    return {name: a.reshape(len(a), 2, -1) for name, a in found.items() if name != "hit"}


def srg(log_probability: np.ndarray) -> np.ndarray:
    """Symmetric relevance gain (Bluecher et al., TMLR 2024): area between the two curves of `patch_removal`.

    From [n, 2, k] to [n], in [-1, 1]: the mean probability while the least relevant patches go first, less that while
    the most relevant ones do. A map and its negative have opposite gains, but for ties.
    """
    return gain(np.exp(log_probability))


def gain(curves: np.ndarray) -> np.ndarray:
    """`srg` of what was followed, a probability or a score: [n, 2, k] -> [n]."""
    most, least = unit_area(curves).T
    return least - most


def insertion_deletion(
    predict: Predict, images: Array, maps: Array, target: Target, fill: Fill = 0.0, steps: int = 20
) -> dict[str, Array]:
    """Log-probability, or score, [B, 2, steps + 1] while the pixels, the most relevant first, are put on `fill`
    (insertion), and are replaced by it (deletion). Insertion of k pixels is removal of all but k from the other end.

    Raises InputError for `steps` that are not from 1 to the number of pixels, and 1000 at most.
    """
    pixels = maps.shape[1] * maps.shape[2]
    steps = checked("steps", Annotated[int, Ge(1), Le(min(pixels, MOST))], steps)
    shown = [s * pixels // steps for s in range(steps + 1)]
    counts = jnp.asarray([pixels - k for k in shown] + shown, jnp.int32)
    positive = jnp.arange(len(counts)) > steps
    return _two_curves(removal(predict, images, maps, target, _nobody(images), counts, positive, fill))


def group_drops(
    predict: Predict, images: Array, maps: Array, target: Target, groups: int = GROUPS
) -> dict[str, Array]:
    """What `saco` needs: salience [B, groups] of equally large groups of pixels, the most relevant first, and the
    drop of what is followed when a group is set to the image's mean colour.

    Raises InputError for `groups` that are not from 2 (a pair) to the number of pixels, and 1000 at most.
    """
    _, h, w = maps.shape
    groups = checked("groups", Annotated[int, Ge(2), Le(min(h * w, MOST))], groups)
    # 64 bits are not at hand; h * w * groups stays below 2^31 up to 14,000 x 14,000 pixels.
    group = rank_pixels(maps) * groups // (h * w)
    fill = images.mean((1, 2), keepdims=True)

    def step(k: Array) -> tuple[Array, Array]:
        inside = group == k
        salience = jnp.where(inside, maps, 0).sum((1, 2))
        return salience, confidence(predict, jnp.where(inside[..., None], fill, images), target)

    salience, without = jax.lax.map(step, jnp.arange(groups, dtype=jnp.int32))
    return {"salience": salience.T, "drop": (confidence(predict, images, target) - without).T}


def saco(salience: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """Salience-guided faithfulness coefficient (Wu et al., CVPR 2024) in [-1, 1], from arrays [n, groups] -> [n].

    Every pair i < j of groups (i the more salient) counts by its difference of salience, positively where the drops
    of confidence agree (drop_i >= drop_j); divided by the sum of the differences. A constant map has 0.
    Raises InputError for fewer than two groups.
    """
    if salience.ndim != 2 or salience.shape[1] < 2 or salience.shape != drop.shape:
        shapes = f"{list(salience.shape)} and {list(drop.shape)}"
        raise InputError(f"saco needs salience and drop [n, groups] of two groups at least, got {shapes}")
    i, j = np.triu_indices(salience.shape[1], 1)
    weight = salience[:, i] - salience[:, j]
    signed = np.where(drop[:, i] >= drop[:, j], weight, -weight).sum(1)
    total = np.abs(weight).sum(1)
    return np.divide(signed, total, out=np.zeros(len(total)), where=total > 0)


def random_map(key: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """The baseline: noise [h, w] in [0, 1) that depends on the example's name only, float32."""
    digest = hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16])).random(shape, np.float32)
