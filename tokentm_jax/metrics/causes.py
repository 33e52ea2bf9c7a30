"""Known causes: relevance against a truth that is known, a mask of the cause or the measured effect of each part."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from jax import Array
from jaxtyping import Bool, Float, Shaped

from tokentm_jax.inputs.values import of
from tokentm_jax.maths.maps import ranks, spread
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.maths.scores import explained, log_probability
from tokentm_jax.metrics.removal import by_patch
from tokentm_jax.metrics.similarity import linear_correlation, rank_correlation
from tokentm_jax.metrics.statistics import ratio
from tokentm_jax.metrics.task import TARGET, Background, Column, Input, Predict, Subject, Table, Target, Task, among

# ---- a mask of the cause --------------------------------------------------------------------------------------------


def patches_of(inside: Float[AnyArray, "B gh gw"]) -> Bool[Array, "B gh gw"]:
    """The patches of a cause.

    Args:
      inside: the share of each patch that the cause covers.

    Returns:
      True where it covers half as much as of its best covered patch, or more: most of a patch for a large cause, and
      at least one patch for a cause that is smaller than a patch.
    """
    inside = jnp.asarray(inside)
    most = inside.max((1, 2), keepdims=True)
    return (inside >= most / 2) & (inside > 0)


def pointing(
    maps: Float[AnyArray, "B gh gw"],
    inside: Float[AnyArray, "B gh gw"],
    where: Bool[AnyArray, "B gh gw"] | None = None,
) -> dict[str, Float[Array, " B"]]:
    """How well maps point at a cause.

    Args:
      maps: of patches or tokens, as a method gives them; values above zero are relevance for the class.
      inside: the share of each patch that the cause covers.
      where: which values count, such as the word pieces of a text; None: all.

    Returns:
      For each map, `share` of the positive relevance that is inside (0 without any); `auc`, the area under the ROC
      curve of the cause's patches (`patches_of`): the probability that a patch inside has more relevance than one
      outside, where equal ones count half; `hit`, 1 where the largest value is inside. A chance map has the share of
      the image that the cause covers, and an `auc` of 0.5.
    """
    counted = jnp.ones_like(maps, bool) if where is None else jnp.asarray(where)
    positive = jnp.where(counted, jax.nn.relu(maps), 0)
    total = positive.sum((1, 2))
    share = jnp.where(total > 0, (positive * inside).sum((1, 2)) / jnp.where(total > 0, total, 1), 0)
    truth = patches_of(inside)
    best = jnp.where(counted, maps, -jnp.inf).reshape(len(maps), -1).argmax(1)
    hit = jnp.take_along_axis(truth.reshape(len(maps), -1), best[:, None], 1)[:, 0]
    return {"share": share, "auc": auc(maps, truth, counted), "hit": hit.astype(maps.dtype)}


def auc(
    values: Float[AnyArray, "B h w"], positive: Bool[AnyArray, "B h w"], where: Bool[AnyArray, "B h w"] | None = None
) -> Float[Array, " B"]:
    """Area under the ROC curve (Mann & Whitney, 1947).

    Args:
      values: larger ones are taken for positive first.
      positive: which are.
      where: which values count; None: all.

    Returns:
      The probability that a positive value is larger than another one, where equal ones count half; 0.5 where there
      is no such pair.
    """
    positive = jnp.asarray(positive)
    counted = jnp.ones_like(positive) if where is None else jnp.asarray(where)
    axes, number = (1, 2), values.dtype
    found = positive & counted
    inside, count = found.sum(axes).astype(number), counted.sum(axes).astype(number)
    below = jnp.where(found, ranks(jnp.asarray(values), counted), 0).sum(axes) * count
    pairs = inside * (count - inside)
    return jnp.where(pairs > 0, (below - inside * inside / 2) / jnp.where(pairs > 0, pairs, 1), 0.5)


# ---- parts with a measured effect -----------------------------------------------------------------------------------


def part_relevance(
    maps: Float[AnyArray, "B gh gw"], masks: Shaped[AnyArray, "B H W"], parts: int
) -> Float[Array, "B {parts}"]:
    """Relevance of each part.

    Args:
      maps: of patches.
      masks: the number of the part that a pixel shows, from 1; 0 for none.
      parts: the highest number.

    Returns:
      The sum over the patches that show some of the part.
    """
    _, gh, gw = maps.shape

    def one(part: Array) -> Array:
        shown = by_patch((numbers == part).astype(maps.dtype), (gh, gw)) > 0
        return jnp.where(shown, maps, 0).sum((1, 2))

    numbers = jnp.asarray(masks).astype(jnp.int32)
    return jax.lax.map(one, jnp.arange(1, parts + 1, dtype=jnp.int32)).T


def part_drops(
    predict: Predict,
    images: Input,
    without: Input,
    masks: Shaped[AnyArray, "#B H W"],
    target: Target,
    parts: int,
) -> Float[Array, "B {parts}"]:
    """The truth: how much the explained score drops when a part is rendered away.

    Args:
      predict, images, target: see `removal`. The explained score is the logit of a class, or a `Question`'s score.
      without: the same images without any part.
      masks: the number of the part that a pixel shows, from 1; 0 for none. [1, H, W]: the same for all images.
      parts: the highest number.

    Returns:
      One drop for each part, negative where the score rises without it; 0 for a number that no pixel has.
    """

    def score(images: Array) -> Array:
        return explained(predict(images), target)[0]

    pixels, empty = of(images).values, of(without).values
    numbers = jnp.asarray(masks).astype(jnp.int32)

    def left(part: Array) -> Array:
        return score(jnp.where((numbers == part)[..., None], empty, pixels))

    return (score(pixels) - jax.lax.map(left, jnp.arange(1, parts + 1, dtype=jnp.int32))).T


def effects(
    relevance: Float[AnyArray, "B K"],
    drops: Float[AnyArray, "B K"],
    present: Bool[AnyArray, "B K"],
    least: float | Array,
) -> dict[str, Shaped[Array, " B"]]:
    """Whether the relevance of parts follows their measured effects.

    Args:
      relevance: of each of K parts.
      drops: of the explained score without the part.
      present: which parts an image has.
      least: a part has an effect if its drop is this large, up or down.

    Returns:
      For each image:

      - `rank_correlation` (Spearman's) and `linear_correlation` (Pearson's) of the relevance and the drops. Parts
        without an effect have small drops in a random order, which only the ranks notice;
      - `without_effect`: the share of the parts' absolute relevance that is on parts without an effect;
      - `contrast`: the probability that a part for the class (a positive drop) has more relevance than one against it
        (a negative drop), where equal ones count half;
      - `caused`, whether a part has an effect: else the others say nothing; and `opposed`, whether an image has parts
        for and parts against the class: else `contrast` says nothing.
    """
    relevance, drops, present = (jnp.asarray(array) for array in (relevance, drops, present))
    effect = present & (jnp.abs(drops) >= least)
    size = jnp.where(present, jnp.abs(relevance), 0)
    total = size.sum(1)
    wasted = jnp.where(effect, 0, size).sum(1) / jnp.where(total > 0, total, 1)
    opposed = (effect & (drops > 0)).any(1) & (effect & (drops < 0)).any(1)
    return {
        "rank_correlation": rank_correlation(relevance, drops, present),
        "linear_correlation": linear_correlation(relevance, drops, present),
        "without_effect": jnp.where(total > 0, wasted, 1),
        "contrast": auc(relevance[:, None], (drops > 0)[:, None], effect[:, None]),
        "caused": effect.any(1),
        "opposed": opposed,
    }


# ---- the tasks ------------------------------------------------------------------------------------------------------

Probability = Annotated[float, Ge(0), Lt(1)]


def _sure(predict: Predict, subject: Subject, logits: Array, *, probability: Probability = 0.0) -> Array:
    """Only examples that give the class this `probability` or more count."""
    return jnp.exp(log_probability(logits, subject.labels)) >= probability


def _pointing(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    masks, words = subject.masks, subject.removable
    assert masks is not None
    if words is None:
        inside = by_patch(masks.astype(bool).astype(maps.dtype), subject.grid, subject.tiling)
        maps = by_patch(maps, subject.grid, subject.tiling)
    else:  # word pieces, each with the number of its word (-1: it does not count) and the share of it that is marked
        words = words & (masks[:, None, :, 0] >= 0)
        inside = jnp.where(words, masks[:, None, :, 1], 0)
    return {**pointing(maps, inside, words), "marked": (inside > 0).any((1, 2))}


def _drops(predict: Predict, subject: Subject, *, parts: Annotated[int, Ge(1), Le(100)] = 8) -> Array:
    assert subject.masks is not None and subject.without is not None
    return part_drops(predict, subject.inputs, subject.without, subject.masks, subject.target, parts)


def _patch_drops(predict: Predict, subject: Subject, *, fill: Background = "mean") -> Array:
    """`part_drops` where each patch is a part."""
    pixels = of(subject.inputs).values
    gh, gw = subject.grid
    patches = jnp.arange(1, gh * gw + 1, dtype=jnp.int32).reshape(1, gh, gw)
    numbers = spread(patches, (pixels.shape[1], pixels.shape[2]), subject.tiling)
    return part_drops(predict, pixels, subject.background(fill), numbers, subject.target, gh * gw)


def _deletion(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    relevance = by_patch(maps, subject.grid, subject.tiling).reshape(subject.shared.shape)
    every = jnp.ones(relevance.shape, bool)
    return {
        "rank_correlation": rank_correlation(relevance, subject.shared),
        "linear_correlation": linear_correlation(relevance, subject.shared, every),
    }


def _effects(
    predict: Predict, subject: Subject, maps: Array, *, least: Annotated[float, Gt(0)] = 1.0
) -> dict[str, Array]:
    masks, drops = subject.masks, subject.shared
    assert masks is not None
    parts = drops.shape[1]
    relevance = part_relevance(by_patch(maps, subject.grid, subject.tiling), masks, parts)
    numbers = jnp.arange(1, parts + 1, dtype=jnp.int32)
    present = (masks.astype(jnp.int32)[:, None] == numbers[:, None, None]).any((2, 3))
    return {**effects(relevance, drops, present, least), "drop": drops, "relevance": relevance}


LEAST_SIZE = 1e-6  # of relevance compared with the drops: what is smaller is rounding


def _unexplained(table: Table) -> np.ndarray:
    """The share of the squared drops that no positive multiple of the relevance gives, and which images count."""
    relevance, drops = (table[f"predicted_{name}"].astype(np.float64) for name in ("relevance", "drop"))
    both, sizes = (relevance * drops).sum(1).clip(0), [np.square(a).sum(1) for a in (relevance, drops)]
    size = np.where(sizes[0] > LEAST_SIZE**2 * sizes[1], sizes[0] * sizes[1], 0)
    error = 1 - np.divide(both * both, size, out=np.zeros(len(size)), where=size > 0)
    counted = table["predicted_caused"]
    return np.stack([counted * error, counted], 1)


POINTING = Task(
    _pointing,
    {
        "share": among("share", "marked", explained=TARGET),
        "auc": among("auc", "marked", explained=TARGET),
        "hit": among("hit", "marked", 100.0, digits=1, explained=TARGET),
    },
    needs="masks",
    raw=True,
    counts=_sure,
)
EFFECTS = Task(
    _effects,
    {
        "rank_correlation": among("rank_correlation", "caused"),
        "linear_correlation": among("linear_correlation", "caused"),
        "without_effect": among("without_effect", "caused", better="lower"),
        "contrast": among("contrast", "opposed"),
        "error": Column(_unexplained, ratio, "lower", digits=3),
        "counted": Column(lambda table: 100.0 * table["predicted_caused"], digits=1),
    },
    needs="parts",
    regular=True,
    raw=True,
    shared=_drops,
)
DELETION = Task(
    _deletion,
    {
        "rank_correlation": Column(lambda table: table["predicted_rank_correlation"], better="higher", digits=3),
        "linear_correlation": Column(lambda table: table["predicted_linear_correlation"], better="higher", digits=3),
    },
    regular=True,
    raw=True,
    shared=_patch_drops,
)
