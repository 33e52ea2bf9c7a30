"""What an evaluation is: its rows, its config, and the tasks that it can be of."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le, Len
from jax import Array

from tokentm_jax import metrics
from tokentm_jax.data.sources import PROFILES
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.methods.table import METHODS
from tokentm_jax.metrics import Measures
from tokentm_jax.validation import Name, check_fields, check_options, lists_of, options_of

PREDICTED, TARGET = "predicted", "target"
RANDOM, CLEAN = "random", "clean"  # the rows that every table has
LARGEST_SEED = 2**31 - 2  # the random row has the one after it too

Text = Annotated[str, Len(1, 1000)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a method with its options, perhaps on a model whose head and last blocks are random."""

    name: Text
    method: str
    options: Mapping[str, bool | int | float | str | None] = dataclasses.field(default_factory=dict)
    random_blocks: Annotated[int, Ge(0)] | None = None  # for the sanity check: 0 is the head alone

    @property
    def class_specific(self) -> bool:
        plain = self.options.get("attention") == "plain"  # TokenTM without gradients
        return self.method != RANDOM and METHODS[self.method].class_specific and not plain


def rows(*methods: str) -> tuple[Row, ...]:
    """One row per method with its default options."""
    return tuple(Row(method, method) for method in methods)


# As the published evaluation: Transformer Attribution and rollout leave out the first block.
PAPER_ROWS = (
    *rows("tokentm"),
    Row("transformer_attribution", "transformer_attribution", {"first_block": 1}),
    *rows("gae", "attcat", "conservative_lrp", "lrp", "partial_lrp"),
    Row("rollout", "rollout", {"first_block": 1}),
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
      name: of the output folder; no path.
      task: a name of `TASKS`.
      data: see `tokentm_jax.data.sources.open_source`.
      model: with `checkpoint`, see `tokentm_jax.load`.
      rows: the methods; a `random` row is added.
      profile: how images are prepared: "default" (as the model says) or "reference" (squashed, bilinear).
      options: of the task, such as `{"fill": "blur"}` for "insertion".
      paper: published figures by (row, metric), shown beside one's own.
      limit: so many examples, drawn by `seed`.
      label_map: the model's class (name, wnid or number) of classes that the data set names otherwise, or the file of
        such a map, see `tokentm_jax.data.labels.read_label_map`.
    """

    name: Name
    task: str
    data: str
    rows: Annotated[Sequence[Row], Len(1)]
    model: Text | None = None
    checkpoint: Text | None = None
    profile: str = "default"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    batch_size: Annotated[int, Ge(1), Le(4096)] = 16
    limit: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0), Le(LARGEST_SEED)] = 0
    label_map: Mapping[str, str | int] | str | None = None


def check(config: EvaluateConfig) -> EvaluateConfig:
    """The config, every field as its annotation says. Raises InputError for another type, or a task, profile, method,
    option or number that does not exist."""
    config = check_fields(config, "the evaluation")
    if config.task not in TASKS:
        raise suggest("task", config.task, TASKS)
    if config.profile not in PROFILES:
        raise suggest("profile", config.profile, PROFILES)
    check_options(f"the task {config.task!r}", options_of(TASKS[config.task].compute), config.options)
    for row in config.rows:
        if row.method == RANDOM and row.options:
            raise suggest(f"option of {RANDOM}", next(iter(row.options)), [])
        if row.method != RANDOM:
            if row.method not in METHODS:
                raise suggest("method", row.method, [*METHODS, RANDOM])
            METHODS[row.method].bind(row.method, dict(row.options))
    names = [row.name for row in config.rows]
    others = [row.name for row in config.rows if row.method != RANDOM]
    if len(set(names)) < len(names) or CLEAN in names or RANDOM in others:
        own = f"none is called {CLEAN!r}, and no other method {RANDOM!r}"
        raise InputError(f"the rows of {config.name} must have names of their own; {own}")
    return config


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


Fields = Mapping[str, Any]  # annotations of the arrays of a file of records, as lists; see `lists_of`


class Task(NamedTuple):
    """A kind of table: what is computed per image on the device, and what is said about all images."""

    compute: Callable[..., dict[str, Array]]  # (predict, inputs, pixel maps, *, options) -> arrays [B, ...]
    measure: Callable[[Mapping[str, np.ndarray]], Measures]
    fields: Callable[..., Fields]  # (**options) -> what stands in the records
    explained: tuple[str, ...] = (PREDICTED,)
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


Fill = Literal["black", "blur"]
STEPS = 20
Steps = Annotated[int, Ge(1), Le(1000)]  # each is a forward pass
Groups = Annotated[int, Ge(2), Le(1000)]


def _insertion(
    predict: metrics.Predict, inputs: Inputs, maps: Array, *, fill: Fill = "black", steps: Steps = STEPS
) -> dict[str, Array]:
    background = metrics.blur(inputs.images) if fill == "blur" else 0.0
    return metrics.insertion_deletion(predict, inputs.images, maps, inputs.classes, background, steps)


def _insertion_measures(table: Mapping[str, np.ndarray]) -> Measures:
    curves = 100 * np.exp(table["predicted_log_probability"])
    return {
        "insertion_auc": (curves[:, 0], metrics.unit_area),
        "deletion_auc": (curves[:, 1], metrics.unit_area),
    }


def _saco(
    predict: metrics.Predict, inputs: Inputs, maps: Array, *, groups: Groups = metrics.GROUPS
) -> dict[str, Array]:
    return metrics.group_drops(predict, inputs.images, maps, inputs.classes, groups)


def _saco_measures(table: Mapping[str, np.ndarray]) -> Measures:
    return {"saco": (metrics.saco(table["predicted_salience"], table["predicted_drop"]), metrics.mean)}


def _sanity(predict: metrics.Predict, inputs: Inputs, maps: Array, original: Array) -> dict[str, Array]:
    return {"similarity": metrics.rank_correlation(maps, original)}


def _sanity_measures(table: Mapping[str, np.ndarray]) -> Measures:
    return {"similarity": (table["predicted_similarity"], metrics.mean)}


# ---- the tasks, and the shapes of their results per image ----------------------------------------------------------

LARGEST = 3.5e38  # of float32
Number = Annotated[float, Ge(-LARGEST), Le(LARGEST)]
LogProbability = Annotated[float, Ge(-LARGEST), Le(1e-3)]
Count = Annotated[int, Ge(0), Le(2**31 - 1)]
FINITE: Fields = {"finite": lists_of(bool)}  # whether the map was
CLEAN_FIELDS: Fields = {
    "predicted": lists_of(Count),
    "label": lists_of(Annotated[int, Ge(-1), Le(2**31 - 1)]),
    "log_probability": lists_of(LogProbability),
    "hit": lists_of(bool),
}


def _saco_fields(groups: int = metrics.GROUPS) -> Fields:
    return {"salience": lists_of(Number, groups), "drop": lists_of(Number, groups), **FINITE}


def _insertion_fields(fill: str = "black", steps: int = STEPS) -> Fields:
    return {"log_probability": lists_of(LogProbability, 2, steps + 1), **FINITE}


TASKS: dict[str, Task] = {
    "perturbation": Task(
        _perturbation,
        _perturbation_measures,
        lambda: {
            "log_probability": lists_of(LogProbability, 2, metrics.STEPS),
            "hit": lists_of(bool, 2, metrics.STEPS),
            **FINITE,
        },
        (PREDICTED, TARGET),
        needs="labels",
    ),
    "segmentation": Task(
        _segmentation,
        _segmentation_measures,
        lambda: {
            "counts": lists_of(Count, 4),
            "average_precision": lists_of(Number),
            "map_two_channel": lists_of(Number),
            "histogram": lists_of(Count, 2, metrics.THRESHOLDS),
            "pointing": lists_of(bool),
            **FINITE,
        },
        needs="masks",
    ),
    "insertion": Task(_insertion, _insertion_measures, _insertion_fields),
    "saco": Task(_saco, _saco_measures, _saco_fields),
    "sanity": Task(_sanity, _sanity_measures, lambda: {"similarity": lists_of(Number), **FINITE}),
}
