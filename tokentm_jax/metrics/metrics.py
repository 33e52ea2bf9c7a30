"""How faithful heatmaps are: the definitions, as functions of arrays.

Functions for the device take a batch and give results per image: maps are pixel maps [B, H, W] in [0, 1], images
[B, H, W, 3] are in [0, 1], and `predict` gives logits [B, classes] for such images. Functions for the data set
(NumPy) take results per image [n, ...]; every number is a `statistic` of their mean, which makes bootstrap cheap.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.validation import checked

Predict = Callable[[Array], Array]
Statistic = Callable[[np.ndarray], np.ndarray]  # mean over images [..., k] -> value [...]

STEPS = 9  # 10 %, 20 % ... 90 % of the pixels
THRESHOLDS = 50  # of the precision-recall curve
GROUPS = 10  # of pixels, for SaCo
MOST = 1000  # groups, or steps of insertion: each is a forward pass


# ---- removing pixels ------------------------------------------------------------------------------------------------


def rank_pixels(maps: Array) -> Array:
    """Rank of every pixel of maps [B, H, W], as int32 of that shape: 0 is the most relevant; of equal values, the
    one with the lower index comes first."""
    chex.assert_rank(maps, 3)
    order = jnp.argsort(maps.reshape(len(maps), -1), axis=1, descending=True, stable=True).astype(jnp.int32)
    places = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=jnp.int32), order.shape)
    put = jax.vmap(lambda o, p: jnp.zeros_like(p).at[o].set(p, unique_indices=True))
    return put(order, places).reshape(maps.shape)


def perturb(
    images: Array, ranks: Array, count: Array | int, positive: Array | bool, fill: Array | float = 0.0
) -> Array:
    """Images [B, H, W, C] with `count` pixels set to `fill`: the first by rank [B, H, W] (positive) or the last."""
    pixels = ranks.shape[1] * ranks.shape[2]
    removed = jnp.where(positive, ranks < count, ranks >= pixels - count)
    return jnp.where(removed[..., None], jnp.asarray(fill, images.dtype), images)


def scores(logits: Array, classes: Array, labels: Array) -> dict[str, Array]:
    """Per image: log-probability of `classes` [B], and whether the top-1 class is the label [B]."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    chosen = jnp.take_along_axis(log_probability, classes[:, None], 1)[:, 0]
    return {"log_probability": chosen, "hit": logits.argmax(-1) == labels}


def removal(
    predict: Predict,
    images: Array,
    maps: Array,
    classes: Array,
    labels: Array,
    counts: Array,
    positive: Array,
    fill: Array | float = 0.0,
) -> dict[str, Array]:
    """`scores` after removing `counts` [S] pixels in the given directions [S]: arrays [B, S].

    One forward pass of the whole batch after the other, so that memory does not grow with S.
    """
    ranks = rank_pixels(maps)

    def step(way: tuple[Array, Array]) -> dict[str, Array]:
        return scores(predict(perturb(images, ranks, *way, fill)), classes, labels)

    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), jax.lax.map(step, (counts, positive)))


def perturbation(predict: Predict, images: Array, maps: Array, classes: Array, labels: Array) -> dict[str, Array]:
    """Positive and negative perturbation test: `scores` [B, 2, 9] with floor(0.1 s H W) pixels black, s = 1 ... 9."""
    pixels = maps.shape[1] * maps.shape[2]
    counts = jnp.asarray([s * pixels // 10 for s in range(1, STEPS + 1)] * 2, jnp.int32)
    positive = jnp.arange(2 * STEPS) < STEPS
    found = removal(predict, images, maps, classes, labels, counts, positive)
    return jax.tree.map(lambda a: a.reshape(len(a), 2, STEPS), found)


def insertion_deletion(
    predict: Predict, images: Array, maps: Array, classes: Array, fill: Array | float = 0.0, steps: int = 20
) -> dict[str, Array]:
    """Log-probability [B, 2, steps + 1] while the pixels, the most relevant first, are put on `fill` (insertion), and
    are replaced by it (deletion). Insertion of k pixels is removal of all but k from the other end.

    Raises InputError for `steps` that are not from 1 to the number of pixels, and 1000 at most.
    """
    pixels = maps.shape[1] * maps.shape[2]
    steps = checked("steps", Annotated[int, Ge(1), Le(min(pixels, MOST))], steps)
    shown = [s * pixels // steps for s in range(steps + 1)]
    counts = jnp.asarray([pixels - k for k in shown] + shown, jnp.int32)
    positive = jnp.arange(len(counts)) > steps
    found = removal(predict, images, maps, classes, jnp.full_like(classes, -1), counts, positive, fill)
    return {"log_probability": found["log_probability"].reshape(-1, 2, steps + 1)}


def blur(images: Array, sigma: float = 5.0) -> Array:
    """Gaussian blur of images [B, H, W, C], `sigma` in pixels, with the border pixels repeated outside."""
    radius = round(3 * sigma)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = jnp.asarray(taps / taps.sum(), images.dtype)
    for axis in (1, 2):
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.moveaxis(jnp.pad(images, padding, mode="edge"), axis, -1)
        rows = padded.reshape(-1, 1, padded.shape[-1])
        smooth = jax.lax.conv_general_dilated(rows, kernel[None, None], (1,), "VALID")
        images = jnp.moveaxis(smooth.reshape(*padded.shape[:-1], -1), -1, axis)
    return images


def group_drops(
    predict: Predict, images: Array, maps: Array, classes: Array, groups: int = GROUPS
) -> dict[str, Array]:
    """What `saco` needs: salience [B, groups] of equally large groups of pixels, the most relevant first, and the
    drop of the class's probability when a group is set to the image's mean colour.

    Raises InputError for `groups` that are not from 2 (a pair) to the number of pixels, and 1000 at most.
    """
    _, h, w = maps.shape
    groups = checked("groups", Annotated[int, Ge(2), Le(min(h * w, MOST))], groups)
    # 64 bits are not at hand; h * w * groups stays below 2^31 up to 14,000 x 14,000 pixels.
    group = rank_pixels(maps) * groups // (h * w)
    fill = images.mean((1, 2), keepdims=True)
    nobody = jnp.full_like(classes, -1)

    def probability(images: Array) -> Array:
        return jnp.exp(scores(predict(images), classes, nobody)["log_probability"])

    def step(k: Array) -> tuple[Array, Array]:
        inside = group == k
        salience = jnp.where(inside, maps, 0).sum((1, 2))
        return salience, probability(jnp.where(inside[..., None], fill, images))

    salience, without = jax.lax.map(step, jnp.arange(groups, dtype=jnp.int32))
    return {"salience": salience.T, "drop": (probability(images) - without).T}


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


# ---- localisation ---------------------------------------------------------------------------------------------------


def average_precision(values: Array, positive: Array) -> Array:
    """Area under the precision-recall steps of values [B, M] for positives [B, M] -> [B]; equal values are one step.

    AP = sum_t (recall_t - recall_(t-1)) precision_t,   t over the distinct values; 0 without positives
    """
    order = jnp.argsort(values, axis=1, descending=True, stable=True)
    sorted_values = jnp.take_along_axis(values, order, 1)
    found = jnp.cumsum(jnp.take_along_axis(positive, order, 1).astype(jnp.int32), axis=1)
    last = jnp.pad(sorted_values[:, 1:] != sorted_values[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    at_steps = jax.lax.cummax(jnp.where(last, found, 0), axis=1)
    new = found - jnp.pad(at_steps[:, :-1], ((0, 0), (1, 0)))
    precision = found.astype(jnp.float32) / jnp.arange(1, values.shape[1] + 1, dtype=jnp.float32)
    area = jnp.where(last, new.astype(jnp.float32) * precision, 0).sum(1)
    return area / jnp.maximum(found[:, -1], 1).astype(jnp.float32)


def segmentation(maps: Array, masks: Array) -> dict[str, Array]:
    """How well maps [B, H, W] find the foreground of masks [B, H, W] (bool), per image.

    Returns:
      counts [B, 4]: pixels that are true foreground, false foreground, false background, true background, with
      foreground = above the map's own mean (ties are background); average_precision [B] of the foreground;
      map_two_channel [B]: the same of the channels [1 - M, M] against the one-hot mask; histogram [B, 2, 50]: pixels
      of foreground and background per interval of the map's values; pointing [B]: whether the maximum (the first) is
      in the mask.
    """
    chex.assert_equal_shape((maps, masks))
    found = maps > maps.mean((1, 2), keepdims=True)
    pairs = (found & masks, found & ~masks, ~found & masks, ~found & ~masks)
    values, truth = maps.reshape(len(maps), -1), masks.reshape(len(maps), -1)
    bins = jnp.clip((values * THRESHOLDS).astype(jnp.int32), 0, THRESHOLDS - 1)
    count = jax.vmap(lambda b, t: jnp.zeros((2, THRESHOLDS), jnp.int32).at[1 - t.astype(jnp.int32), b].add(1))
    best = values.argmax(1)
    return {
        "counts": jnp.stack([pair.sum((1, 2), dtype=jnp.int32) for pair in pairs], 1),
        "average_precision": average_precision(values, truth),
        "map_two_channel": average_precision(
            jnp.concatenate([1 - values, values], 1), jnp.concatenate([~truth, truth], 1)
        ),
        "histogram": count(bins, truth),
        "pointing": jnp.take_along_axis(truth, best[:, None], 1)[:, 0],
    }


def rank_correlation(a: Array, b: Array) -> Array:
    """Spearman's correlation of maps [B, ...] -> [B], equal values sharing their mean rank; 0 for a constant map."""

    def ranks(values: Array) -> Array:
        ordered = jnp.sort(values)
        low, high = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
        return (low + high).astype(jnp.float32) / 2

    def one(x: Array, y: Array) -> Array:
        x, y = (r - r.mean() for r in (ranks(x.ravel()), ranks(y.ravel())))
        norm = jnp.sqrt(jnp.square(x).sum() * jnp.square(y).sum())
        return jnp.where(norm > 0, (x * y).sum() / jnp.where(norm > 0, norm, 1), 0)

    return jax.vmap(one)(a, b)


def random_map(key: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """The baseline: noise [h, w] in [0, 1) that depends on the example's name only, float32."""
    digest = hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16])).random(shape, np.float32)


# ---- from results per image to numbers ------------------------------------------------------------------------------


def mean(average: np.ndarray) -> np.ndarray:
    """Mean of all features."""
    return average.mean(-1)


def area(average: np.ndarray) -> np.ndarray:
    """Trapezoid over x = 0, 0.1 ... 0.9, times 100: AUC in percent, at most 90, of accuracies [..., 10]."""
    return 10 * (average.sum(-1) - (average[..., 0] + average[..., -1]) / 2)


def unit_area(average: np.ndarray) -> np.ndarray:
    """Trapezoid over equal steps from 0 to 1 of curves [..., k]."""
    steps = average.shape[-1] - 1
    return (average.sum(-1) - (average[..., 0] + average[..., -1]) / 2) / steps


def pixel_accuracy(average: np.ndarray) -> np.ndarray:
    """Share of pixels that are right, pooled over the data set, from `counts` [..., 4], in percent."""
    return 100 * (average[..., 0] + average[..., 3]) / average.sum(-1)


def mean_iou(average: np.ndarray) -> np.ndarray:
    """Mean of the pooled intersection over union of foreground and background, from `counts` [..., 4], in percent."""
    right, wrong = average[..., [0, 3]], average[..., [1, 2]].sum(-1, keepdims=True)
    return 100 * (right / np.maximum(right + wrong, 1e-12)).mean(-1)


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of the foreground per image, from `counts` [n, 4] -> [n]; 0 where nothing is found and nothing is there."""
    wrong = counts[:, 1] + counts[:, 2]
    return 2 * counts[:, 0] / np.maximum(2 * counts[:, 0] + wrong, 1)


def precision_recall(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall [50] at every lower edge of the intervals, pooled, from `histogram` [n, 2, 50]."""
    above = histogram.sum(0, dtype=np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    return above[0] / np.maximum(above.sum(0), 1), above[0] / np.maximum(above[0, :1], 1)


def bootstrap(
    per_image: np.ndarray, statistic: Statistic = mean, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
    """Value of a statistic with its 95 % interval over images.

    Args:
      per_image: results [n] or [n, k] in an order that does not depend on how they were computed.
      statistic: from the mean over images [..., k] to the value [...].
    """
    per_image = np.asarray(per_image, np.float64)
    per_image = per_image.reshape(len(per_image), -1)
    n = len(per_image)
    random = np.random.default_rng(seed)
    draws = (np.bincount(random.integers(n, size=n), minlength=n) @ per_image / n for _ in range(resamples))
    values = statistic(np.stack(list(draws)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(statistic(per_image.mean(0))), float(low), float(high)


def paired(
    a: np.ndarray, b: np.ndarray, statistic: Statistic = mean, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
    """Difference `statistic(a) - statistic(b)` with its 95 % interval, for results of the same images [n, k]."""
    chex.assert_equal_shape((a, b))
    k = a.reshape(len(a), -1).shape[1]
    both = np.concatenate([a.reshape(-1, k), b.reshape(-1, k)], 1)
    return bootstrap(both, lambda m: statistic(m[..., :k]) - statistic(m[..., k:]), seed, resamples)


Measures = dict[str, tuple[Any, Statistic]]  # metric: (results per image, statistic)
