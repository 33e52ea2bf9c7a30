"""From results per image to figures with intervals.

Functions take results per image [n, ...], in NumPy; every number is a `statistic` of their mean, which makes the
bootstrap cheap.
"""

from collections.abc import Callable, Sequence

import chex
import numpy as np
from jaxtyping import Bool, Float, Num

Results = Num[np.ndarray, "n *k"] | Bool[np.ndarray, "n *k"]  # of n images
Statistic = Callable[[np.ndarray], np.ndarray]  # mean over images [..., k] -> value [...]


def mean(average: Float[np.ndarray, "*s k"]) -> Float[np.ndarray, "*s"]:
    """Mean of all features.

    Args:
      average: means over images.

    Returns:
      One number for each leading axis.
    """
    return np.asarray(average.mean(-1))


def magnitude(average: Float[np.ndarray, "*s k"]) -> Float[np.ndarray, "*s"]:
    """Mean of all features, without its sign.

    Args:
      average: means over images.

    Returns:
      One number for each leading axis.
    """
    return np.asarray(np.abs(average.mean(-1)))


def ratio(average: Float[np.ndarray, "*s 2"]) -> Float[np.ndarray, "*s"]:
    """Mean over the images that count.

    Args:
      average: means over images of (value where it counts, else 0; 1 where it counts, else 0).

    Returns:
      One number for each leading axis; 0 where no image counts.
    """
    return np.divide(average[..., 0], average[..., 1], out=np.zeros(average.shape[:-1]), where=average[..., 1] > 0)


def area(average: Float[np.ndarray, "*s k"]) -> Float[np.ndarray, "*s"]:
    """Trapezoid over x = 0, 0.1 ... 0.9, times 100.

    Args:
      average: ten accuracies, as shares, while 0 to 90 % of the pixels are removed.

    Returns:
      The area under the curve in percent, at most 90.
    """
    return np.asarray(10 * (average.sum(-1) - (average[..., 0] + average[..., -1]) / 2))


def unit_area(average: Float[np.ndarray, "*s k"]) -> Float[np.ndarray, "*s"]:
    """Trapezoid over equal steps from 0 to 1.

    Args:
      average: curves of k points.

    Returns:
      The area under each.
    """
    steps = average.shape[-1] - 1
    return np.asarray((average.sum(-1) - (average[..., 0] + average[..., -1]) / 2) / steps)


def bootstrap(
    per_image: Results,
    statistic: Statistic = mean,
    seed: int = 0,
    resamples: int = 1000,
    groups: Sequence[str] | None = None,
) -> tuple[float, float, float]:
    """Value of a statistic with its 95 % interval over images.

    Args:
      per_image: results [n] or [n, k] in an order that does not depend on how they were computed.
      statistic: from the mean over images [..., k] to the value [...].
      seed, resamples: of the random draws of images, with replacement.
      groups: the group of each image, such as the mosaic of a cell: images of a group are not independent, so groups
        are drawn. None: each is its own.

    Returns:
      The value, and the lower and the upper end of the interval.
    """
    per_image = np.asarray(per_image, np.float64)
    per_image = per_image.reshape(len(per_image), -1)
    sums, counts = per_image, np.ones(len(per_image))
    if groups is not None:
        _, own, counts = np.unique(groups, return_inverse=True, return_counts=True)
        sums = np.zeros((len(counts), per_image.shape[1]))
        np.add.at(sums, own, per_image)
    n, random = len(sums), np.random.default_rng(seed)
    draws = (np.bincount(random.integers(n, size=n), minlength=n) for _ in range(resamples))
    values = statistic(np.stack([drawn @ sums / (drawn @ counts) for drawn in draws]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(statistic(per_image.mean(0))), float(low), float(high)


def paired(
    a: Results,
    b: Results,
    statistic: Statistic = mean,
    seed: int = 0,
    resamples: int = 1000,
    groups: Sequence[str] | None = None,
) -> tuple[float, float, float]:
    """Difference `statistic(a) - statistic(b)` with its 95 % interval.

    Args:
      a, b: results of the same images, in the same order.
      statistic, seed, resamples, groups: see `bootstrap`.

    Returns:
      The difference, and the lower and the upper end of the interval.
    """
    chex.assert_equal_shape((a, b))
    k = a.reshape(len(a), -1).shape[1]
    both = np.concatenate([a.reshape(-1, k), b.reshape(-1, k)], 1)
    return bootstrap(both, lambda m: statistic(m[..., :k]) - statistic(m[..., k:]), seed, resamples, groups)
