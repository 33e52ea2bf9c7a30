"""Does it lie on the object? Pixel maps [B, H, W] in [0, 1] against masks, and the figures of these."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Num, Shaped

from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.task import Column, Plot, Predict, Subject, Table, Task

THRESHOLDS = 50  # of the precision-recall curve


def average_precision(values: Float[AnyArray, "B M"], positive: Bool[AnyArray, "B M"]) -> Float[Array, " B"]:
    """Area under the precision-recall steps.

        AP = sum_t (recall_t - recall_(t-1)) precision_t,   t over the distinct values

    Args:
      values: larger ones are taken for positive first; equal ones are one step.
      positive: which are.

    Returns:
      The area in [0, 1]; 0 without positives.
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


def segmentation(maps: Float[AnyArray, "B H W"], masks: Bool[AnyArray, "B H W"]) -> dict[str, Shaped[Array, "B ..."]]:
    """How well maps find the foreground.

    Args:
      maps: of pixels, in [0, 1].
      masks: true in the foreground.

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
    count = jax.vmap(lambda b, t: jnp.zeros((2, THRESHOLDS), jnp.uint32).at[1 - t.astype(jnp.int32), b].add(1))
    best = values.argmax(1)
    return {
        "counts": jnp.stack([pair.sum((1, 2), dtype=jnp.uint32) for pair in pairs], 1),
        "average_precision": average_precision(values, truth),
        "map_two_channel": average_precision(
            jnp.concatenate([1 - values, values], 1), jnp.concatenate([~truth, truth], 1)
        ),
        "histogram": count(bins, truth),
        "pointing": jnp.take_along_axis(truth, best[:, None], 1)[:, 0],
    }


def pixel_accuracy(average: Num[np.ndarray, "*s 4"]) -> Float[np.ndarray, "*s"]:
    """Share of pixels that are right, pooled over the data set.

    Args:
      average: mean of `counts`.

    Returns:
      In percent; NaN of no pixels.
    """
    total = average.sum(-1)
    return np.asarray(100 * (average[..., 0] + average[..., 3]) / np.where(total > 0, total, np.nan))


def mean_iou(average: Num[np.ndarray, "*s 4"]) -> Float[np.ndarray, "*s"]:
    """Mean of the pooled intersection over union of foreground and background.

    Args:
      average: mean of `counts`.

    Returns:
      In percent. A class that is neither there nor found has the IoU 0; of no pixel at all it is NaN.
    """
    right, wrong = average[..., [0, 3]], average[..., [1, 2]].sum(-1, keepdims=True)
    found = 100 * (right / np.maximum(right + wrong, 1e-12)).mean(-1)
    return np.where(average.sum(-1) > 0, found, np.nan)


def f1(counts: Num[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """F1 of the foreground per image.

    Args:
      counts: from `segmentation`.

    Returns:
      In [0, 1]; 0 where nothing is found and nothing is there.
    """
    wrong = counts[:, 1] + counts[:, 2]
    return 2 * counts[:, 0] / np.maximum(2 * counts[:, 0] + wrong, 1)


def precision_recall(histogram: Num[np.ndarray, "n 2 50"]) -> tuple[Float[np.ndarray, "50"], Float[np.ndarray, "50"]]:
    """Pooled precision and recall.

    Args:
      histogram: from `segmentation`.

    Returns:
      Both at every lower edge of the intervals, in [0, 1].
    """
    above = histogram.sum(0, dtype=np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    return above[0] / np.maximum(above.sum(0), 1), above[0] / np.maximum(above[0, :1], 1)


def _segmentation(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    assert subject.masks is not None
    return segmentation(maps, subject.masks.astype(bool))


def _counts(table: Table) -> np.ndarray:
    return table["predicted_counts"]


def _segmentation_curves(table: Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    precision, recall = precision_recall(table["predicted_histogram"])
    return {"foreground, pooled pixels": (recall, precision)}


SEGMENTATION = Task(
    _segmentation,
    {
        "pixel_accuracy": Column(_counts, pixel_accuracy, "higher"),
        "mean_iou": Column(_counts, mean_iou, "higher"),
        "map_two_channel": Column(lambda table: 100 * table["predicted_map_two_channel"], better="higher"),
        "map": Column(lambda table: 100 * table["predicted_average_precision"], better="higher"),
        "mean_f1": Column(lambda table: 100 * f1(_counts(table)), better="higher"),
        "pointing_game": Column(lambda table: 100 * table["predicted_pointing"], better="higher"),
    },
    Plot("recall", "precision", _segmentation_curves),
    needs="masks",
    regular=True,
)
