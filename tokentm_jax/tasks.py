"""What an evaluation is: its rows, its config, and the tasks that it can be of."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from tokentm_jax import metrics
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.methods import METHODS
from tokentm_jax.metrics import Measures
from tokentm_jax.sources import PROFILES

PREDICTED, TARGET = "predicted", "target"
RANDOM, CLEAN = "random", "clean"  # the rows that every table has


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a method with its options, perhaps on a model whose head and last blocks are random."""

    name: str
    method: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random_blocks: int | None = None  # for the sanity check: 0 is the head alone

    @property
    def class_specific(self) -> bool:
        plain = self.options.get("attention") == "plain"  # TokenTM without gradients
        return self.method != RANDOM and METHODS[self.method].class_specific and not plain


def rows(*methods: str) -> tuple[Row, ...]:
    """One row per method with its default options."""
    return tuple(Row(method, method) for method in methods)


PAPER_ROWS = (
    *rows("tokentm", "transformer_attribution", "gae", "attcat", "conservative_lrp", "lrp", "partial_lrp"),
    Row("rollout", "rollout", {"first_block": 1}),  # as the published evaluation: first block left out
    *rows("raw_attention", "grad_cam"),
)
_OFF = {"length": False, "direction": "none", "initialise": False, "ffn": False}
COMPONENT_ROWS = (
    Row("off", "tokentm", _OFF),
    Row("+ length", "tokentm", {**_OFF, "length": True}),
    Row("+ NECC", "tokentm", {**_OFF, "length": True, "direction": "necc"}),
    Row("+ aggregation", "tokentm"),
)
CHOICE_ROWS = (
    Row("tokentm", "tokentm"),
    Row("original=normalised", "tokentm", {"original": "normalised"}),
    Row("attention=plain", "tokentm", {"attention": "plain"}),
    Row("ffn=False", "tokentm", {"ffn": False}),
    Row("initialise=False", "tokentm", {"initialise": False}),
    Row("direction=cosine", "tokentm", {"direction": "cosine"}),
    Row("length=False", "tokentm", {"length": False}),
    Row("direction=none", "tokentm", {"direction": "none"}),
    Row("only initialise", "tokentm", {**_OFF, "initialise": True}),
    Row("first block left out", "tokentm", {"first_block": 1}),
    Row("gae", "gae"),
    Row("gae: first block left out", "gae", {"first_block": 1}),
)


def depth_rows(depth: int) -> tuple[Row, ...]:
    """TokenTM over the first 1, 2 ... `depth` blocks."""
    return tuple(Row(f"blocks 1-{end}", "tokentm", {"end_block": end}) for end in range(1, depth + 1))


def sanity_rows(depth: int, *methods: str) -> tuple[Row, ...]:
    """Each method on a model with random head, then random last block too, and so on down to the first."""
    names = ["head", *(f"{k} blocks" if k > 1 else "1 block" for k in range(1, depth + 1))]
    return tuple(Row(f"{m}: random {name}", m, {}, k) for m in methods for k, name in enumerate(names))


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """One table.

    Args:
      name: of the output folder.
      task: a name of `TASKS`.
      data: see `tokentm_jax.sources.open_source`.
      model: with `checkpoint`, see `tokentm_jax.load`.
      rows: the methods; a `random` row is added.
      profile: how images are prepared: "default" (as the model says) or "reference" (squashed, bilinear).
      options: of the task, such as `{"fill": "blur"}` for "insertion".
      paper: published figures by (row, metric), shown beside one's own.
      limit: so many examples, drawn by `seed`.
      label_map: the model's class (name, wnid or number) of classes that the data set names otherwise, or the file of
        such a map, see `tokentm_jax.labels.read_label_map`.
    """

    name: str
    task: str
    data: str
    rows: Sequence[Row]
    model: str | None = None
    checkpoint: str | None = None
    profile: str = "default"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0
    label_map: Mapping[str, str | int] | str | None = None


def check(config: EvaluateConfig) -> None:
    """Raises InputError for a task, profile, method, option or number that does not exist."""
    if config.task not in TASKS:
        raise suggest("task", config.task, TASKS)
    if config.profile not in PROFILES:
        raise suggest("profile", config.profile, PROFILES)
    for name in config.options:
        if name not in TASKS[config.task].options:
            raise suggest(f"option of the task {config.task!r}", name, TASKS[config.task].options)
    if config.options.get("fill", "black") not in ("black", "blur"):
        raise InputError(f"the option 'fill' must be black or blur, got {config.options['fill']!r}")
    if config.batch_size < 1:
        raise InputError(f"the batch size must be at least 1, got {config.batch_size}")
    for row in config.rows:
        if row.method != RANDOM:
            if row.method not in METHODS:
                raise suggest("method", row.method, [*METHODS, RANDOM])
            METHODS[row.method].bind(row.method, dict(row.options))
    names = [row.name for row in config.rows]
    if len(set(names)) < len(names) or CLEAN in names:
        raise InputError(f"the rows of {config.name} must have names of their own, and none is called {CLEAN!r}")


def select(config: EvaluateConfig, methods: Iterable[str]) -> EvaluateConfig:
    """The config with those of its rows that are named, or else the methods of that name."""
    own = {row.name: row for row in config.rows}
    chosen = []
    for name in dict.fromkeys(methods):
        if name not in own and name not in METHODS and name != RANDOM:
            raise suggest("method", name, [*own, *METHODS, RANDOM])
        chosen.append(own.get(name, Row(name, name)))
    return dataclasses.replace(config, rows=chosen)


class Inputs(NamedTuple):
    """A batch on the device: images in [0, 1], the explained class and the label of each, perhaps masks."""

    images: Array  # [B, H, W, 3]
    classes: Array  # [B]
    labels: Array  # [B]
    masks: Array | None  # [B, H, W]


class Task(NamedTuple):
    """A kind of table: what is computed per image on the device, and what is said about all images."""

    compute: Callable[..., dict[str, Array]]  # (predict, inputs, pixel maps, **options) -> arrays [B, ...]
    measure: Callable[[Mapping[str, np.ndarray]], Measures]
    explained: tuple[str, ...] = (PREDICTED,)
    options: tuple[str, ...] = ()
    needs: str = ""  # "labels" or "masks"


def _perturbation(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    return metrics.perturbation(predict, inputs.images, maps, inputs.classes, inputs.labels)


def _perturbation_measures(table: Mapping[str, np.ndarray]) -> Measures:
    """Accuracies start at the clean one; probabilities are those of the predicted class, the most relevant pixels
    removed first."""
    measures: Measures = {}
    for explained in [e for e in (PREDICTED, TARGET) if f"{e}_hit" in table]:
        for d, direction in enumerate(("positive", "negative")):
            curve = np.concatenate([table["clean_hit"][:, None], table[f"{explained}_hit"][:, d]], 1)
            measures[f"{direction}_auc_{explained}"] = (curve, metrics.area)
    clean, removed = table["clean_log_probability"][:, None], table["predicted_log_probability"][:, 0]
    measures["aopc"] = (np.exp(clean) - np.exp(removed), metrics.mean)
    measures["lodds"] = (removed - clean, metrics.mean)
    return measures


def _segmentation(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    assert inputs.masks is not None
    return metrics.segmentation(maps, inputs.masks)


def _segmentation_measures(table: Mapping[str, np.ndarray]) -> Measures:
    counts = table["predicted_counts"]
    return {
        "pixel_accuracy": (counts, metrics.pixel_accuracy),
        "mean_iou": (counts, metrics.mean_iou),
        "map_two_channel": (100 * table["predicted_map_two_channel"], metrics.mean),
        "map": (100 * table["predicted_average_precision"], metrics.mean),
        "mean_f1": (100 * metrics.f1(counts), metrics.mean),
        "pointing_game": (100 * table["predicted_pointing"], metrics.mean),
    }


def _insertion(
    predict: metrics.Predict, inputs: Inputs, maps: Array, fill: str = "black", steps: int = 20
) -> dict[str, Array]:
    background = metrics.blur(inputs.images) if fill == "blur" else 0.0
    return metrics.insertion_deletion(predict, inputs.images, maps, inputs.classes, background, steps)


def _insertion_measures(table: Mapping[str, np.ndarray]) -> Measures:
    curves = 100 * np.exp(table["predicted_log_probability"])
    return {
        "insertion_auc": (curves[:, 0], metrics.unit_area),
        "deletion_auc": (curves[:, 1], metrics.unit_area),
    }


def _saco(predict: metrics.Predict, inputs: Inputs, maps: Array, groups: int = metrics.GROUPS) -> dict[str, Array]:
    return metrics.group_drops(predict, inputs.images, maps, inputs.classes, groups)


def _saco_measures(table: Mapping[str, np.ndarray]) -> Measures:
    return {"saco": (metrics.saco(table["predicted_salience"], table["predicted_drop"]), metrics.mean)}


def _sanity(predict: metrics.Predict, inputs: Inputs, maps: Array, original: Array) -> dict[str, Array]:
    return {"similarity": metrics.rank_correlation(maps, original)}


def _sanity_measures(table: Mapping[str, np.ndarray]) -> Measures:
    return {"similarity": (table["predicted_similarity"], metrics.mean)}


TASKS: dict[str, Task] = {
    "perturbation": Task(_perturbation, _perturbation_measures, (PREDICTED, TARGET), needs="labels"),
    "segmentation": Task(_segmentation, _segmentation_measures, needs="masks"),
    "insertion": Task(_insertion, _insertion_measures, options=("fill", "steps")),
    "saco": Task(_saco, _saco_measures, options=("groups",)),
    "sanity": Task(_sanity, _sanity_measures),
}
