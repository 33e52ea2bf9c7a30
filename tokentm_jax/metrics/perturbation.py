"""Perturbation test and ROAD: accuracy as pixels are removed, the most relevant first or last."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array
from jaxtyping import Bool, Float, Integer, Shaped

from tokentm_jax.maths.perturbation import linear_imputation
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.removal import Fill, removal, stacked, total
from tokentm_jax.metrics.statistics import area
from tokentm_jax.metrics.task import (
    CLEAN,
    PREDICTED,
    TARGET,
    Column,
    Input,
    Plot,
    Predict,
    Seed,
    Subject,
    Table,
    Target,
    Task,
    followed_in,
)

STEPS = 9  # 10 %, 20 % ... 90 % of the pixels
POSITIVE, NEGATIVE = 0, 1  # the most relevant pixels are removed first, or last
Noise = Annotated[float, Ge(0), Le(10)]


def perturbation(
    predict: Predict,
    images: Input,
    maps: Float[AnyArray, "B h w"],
    target: Target,
    labels: Integer[AnyArray, " B"],
    fill: Fill = 0.0,
) -> dict[str, Shaped[Array, "B 2 9"]]:
    """Positive and negative perturbation test: floor(0.1 s H W) pixels are removed, s = 1 ... 9.

    With `noisy_linear` as the `fill` it is ROAD (Rong et al., ICML 2022).

    Args:
      predict, images, maps, target, labels, fill: see `removal`.

    Returns:
      `scores` with the most relevant pixels removed first, and with the least relevant ones.
    """
    pixels = total(images, maps)
    counts = stacked([s * pixels // 10 for s in range(1, STEPS + 1)] * 2)
    positive = jnp.arange(2 * STEPS) < STEPS
    found = removal(predict, images, maps, target, labels, counts, positive, fill)
    return jax.tree.map(lambda a: a.reshape(len(a), 2, STEPS), found)


def noisy_linear(
    images: Float[Array, "B H W C"], removed: Bool[Array, "B H W"], noise: float | Array = 0.01, seed: int | Array = 0
) -> Float[Array, "B H W C"]:
    """ROAD's imputation (Rong et al., ICML 2022): neither values nor sharp edges tell which pixels were removed.

    Args:
      images: of any range.
      removed: the pixels that become the weighted mean of their neighbours (`linear_imputation`), plus noise.
      noise: standard deviation of the Gaussian noise, which is the same for every image.
      seed: of the noise.

    Returns:
      The images with these pixels filled.
    """
    key = jax.random.key(seed)
    grain = noise * jax.random.normal(key, images.shape[1:], images.dtype)
    return jax.vmap(linear_imputation)(images, removed) + jnp.where(removed[..., None], grain, 0)


def _perturbation(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    black = subject.background("black")
    return perturbation(predict, subject.inputs, maps, subject.target, subject.labels, black)


def _road(predict: Predict, subject: Subject, maps: Array, *, noise: Noise = 0.01, seed: Seed = 0) -> dict[str, Array]:
    fill = partial(noisy_linear, noise=noise, seed=seed)
    return perturbation(predict, subject.inputs, maps, subject.target, subject.labels, fill)


# Accuracies start at the clean one; probabilities are those of the predicted class, the most relevant pixels removed
# first.


def _hits(direction: int, explained: str = PREDICTED) -> Callable[[Table], np.ndarray]:
    return lambda table: np.concatenate(
        [table["clean_hit"][:, None], table[f"{explained}_hit"][:, direction]], 1
    )  # [n, 10]


def _aopc(table: Table) -> np.ndarray:
    return followed_in(table, CLEAN)[:, None] - followed_in(table)[:, POSITIVE]


def _lodds(table: Table) -> np.ndarray:
    name = "score" if "clean_score" in table else "log_probability"
    return table[f"predicted_{name}"][:, POSITIVE] - table[f"clean_{name}"][:, None]


def _perturbation_curves(table: Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    titles = {"positive (lower is better)": POSITIVE, "negative (higher is better)": NEGATIVE}
    accuracies = {title: 100 * _hits(direction)(table).mean(0) for title, direction in titles.items()}
    return {title: (10 * np.arange(len(accuracy)), accuracy) for title, accuracy in accuracies.items()}


PERTURBATION = Task(
    _perturbation,
    {
        "positive_auc_predicted": Column(_hits(POSITIVE), area, "lower"),
        "negative_auc_predicted": Column(_hits(NEGATIVE), area, "higher"),
        "positive_auc_target": Column(_hits(POSITIVE, TARGET), area, "lower", explained=TARGET),
        "negative_auc_target": Column(_hits(NEGATIVE, TARGET), area, "higher", explained=TARGET),
        "aopc": Column(_aopc, better="higher", digits=3),
        "lodds": Column(_lodds, better="lower", digits=3),
    },
    Plot("pixels removed [%]", "accuracy [%]", _perturbation_curves),
    needs="labels",
)


ROAD = Task(
    _road,
    {
        "road_positive_auc": Column(_hits(POSITIVE), area, "lower"),
        "road_negative_auc": Column(_hits(NEGATIVE), area, "higher"),
    },
    Plot("pixels imputed [%]", "accuracy [%]", _perturbation_curves),
    needs="labels",
    regular=True,
)
