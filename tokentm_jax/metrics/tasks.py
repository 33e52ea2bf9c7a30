"""What an evaluation is: its rows, its config, and the tasks that it can be of."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Len, Lt
from jax import Array

from tokentm_jax import metrics
from tokentm_jax.data.sources import PROFILES, Half
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.maths.maps import Tiling
from tokentm_jax.maths.tokentm import READINGS, WEIGHT_NAMES
from tokentm_jax.methods.table import METHODS, PIXELS
from tokentm_jax.validation import Name, Text, check_fields, check_options, checked, lists_of, options_of

PREDICTED, TARGET = "predicted", "target"
RANDOM, CLEAN = "random", "clean"  # the rows that every table has
RANDOM_OPTIONS = {"pixels": bool}  # noise at every pixel, to measure maps of pixels by; else at every patch
LARGEST_SEED = 2**31 - 2  # the random row has the one after it too


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a method with its options, perhaps on a model whose head and last blocks are random.

    With `by_patch`, maps of pixels become their means over the model's patches before anything is measured: where
    pixels are removed in the order of a map, scattered ones cost the model more than patches, whichever they are.
    """

    name: Text
    method: str
    options: Mapping[str, bool | int | float | str | None] = dataclasses.field(default_factory=dict)
    random_blocks: Annotated[int, Ge(0)] | None = None  # for the sanity check: 0 is the head alone
    by_patch: bool = False

    @property
    def class_specific(self) -> bool:
        """Whether its maps depend on the class that is explained."""
        return self.method != RANDOM and METHODS[self.method].looks_at_class(self.options)


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


_EACH = {"heads": "each"}
READING_ROWS = (
    Row("tokentm", "tokentm"),
    Row("heads=each", "tokentm", _EACH),
    Row("transformed=linear", "tokentm", {"transformed": "linear"}),
    Row("heads=each, transformed=linear", "tokentm", {**_EACH, "transformed": "linear"}),
    Row("direction=softmax", "tokentm", {"direction": "softmax"}),
    Row("heads=each, direction=softmax", "tokentm", {**_EACH, "direction": "softmax"}),
    Row("heads=each, direction=none", "tokentm", {**_EACH, "direction": "none"}),
    Row("transformed=stream", "tokentm", {"transformed": "stream"}),
    Row("ffn_transformed=stream", "tokentm", {"ffn_transformed": "stream"}),
    Row("attention=means", "tokentm", {"attention": "means"}),
    *(Row(name, "tokentm", reading) for name, reading in READINGS.items()),
    Row("decompv, attention=gradient", "tokentm", {**READINGS["decompv"], "attention": "gradient"}),
    Row("gae", "gae"),
)


_OF_RULES = "tokentm,attn_lrp,conservative_lrp,legrad"  # whose members were found first, without LibraGrad's
_MIX = {
    "mix": {},
    "mix of 3": {"methods": "libra_tokentm,libra_full_grad,legrad"},
    "mix of 3, GAE": {"methods": "libra_gae,libra_full_grad,legrad"},
    "mix of 3, ranks": {"methods": "libra_tokentm,libra_full_grad,legrad", "normalisation": "rank"},
    "mix of 2": {"methods": "libra_tokentm,libra_full_grad"},
    "mix of 2, AttCAT": {"methods": "libra_tokentm,libra_attcat"},
    "mix with AttnLRP": {"methods": "tokentm,attn_lrp,libra_full_grad,legrad", "gradient": "attn_lrp"},
    "mix of rules": {"methods": _OF_RULES},
    "mix of rules, shared": {"methods": _OF_RULES, "gradient": "conservative_lrp"},
    "mix of rules, ranks": {"methods": _OF_RULES, "normalisation": "rank"},
    "mix of rules, sums": {"methods": _OF_RULES, "normalisation": "sum"},
    "mix of 3 rules, shared": {"methods": "tokentm,attn_lrp,legrad", "gradient": "attn_lrp"},
    "mix of one pass": {"methods": "libra_tokentm,conservative_lrp,legrad"},
}
MIX_ROWS = (
    *(Row(name, "tokentm_mix", options) for name, options in _MIX.items()),
    *rows("tokentm", "gae", "attn_lrp", "conservative_lrp", "legrad", "beyond_intuition"),
    *rows("res_lrp", "libra_full_grad", "libra_attcat", "libra_tokentm", "libra_gae", "libra_grad_cam"),
)


WEIGHT_ROWS = (
    *rows("tokentm"),
    *(Row(f"weights={name}", "tokentm", {"weights": name}) for name in WEIGHT_NAMES),
    Row("length alone", "tokentm", {"direction": "none"}),
    *rows("gae"),
)
# Methods that make sense of words: all but those that want a grid, in the order of the table.
TEXT_ROWS = (
    *(row for row in rows(*METHODS) if row.method not in ("rise", "kernel_shap", "combination")),
    Row("tokentm: norms=False", "tokentm", {"norms": False}),
)


# Maps of pixels, as they are and as their means over patches, with noise of either kind.
PIXEL_ROWS = (
    *rows("tokentm", "libra_full_grad"),
    *(
        Row(f"{name} by patch" if by_patch else name, name, by_patch=by_patch)
        for name, method in METHODS.items()
        if method.output == PIXELS
        for by_patch in (False, True)
    ),
    Row("random pixels", RANDOM, {"pixels": True}),
)


def depth_rows(depth: int) -> tuple[Row, ...]:
    """TokenTM over the first 1, 2 ... `depth` blocks."""
    depth = checked("the depth", Annotated[int, Ge(1)], depth)
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
      half: the examples at "even" or at "odd" places alone, see `tokentm_jax.data.sources.open_source`.
      names: the examples alone whose names match this pattern, see there.
      score: what is explained, and followed in place of the class's probability: "log_probability", "versus:CLASS",
        "channel:NUMBER"; see `LoadedViT.score`.
      label_map: the model's class (name, wnid or number) of classes that the data set names otherwise, or the file of
        such a map, see `tokentm_jax.data.labels.read_label_map`.
      mixed_precision: what the model says of changed images is computed by `tokentm_jax.maths.mixed`, faster. Maps and
        predictions are not; whole images that answers are compared with are.
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
    half: Half | None = None
    names: Text | None = None
    seed: Annotated[int, Ge(0), Le(LARGEST_SEED)] = 0
    score: Text | None = None
    label_map: Mapping[str, str | int] | str | None = None
    mixed_precision: bool = False

    @property
    def explained(self) -> tuple[str, ...]:
        """The classes whose explanations are wanted, see `Task.explained`; one where the score looks at no class."""
        explained = TASKS[self.task].explained
        return explained[:1] if self.score is not None and self.score.startswith("channel") else explained


def check(config: EvaluateConfig) -> EvaluateConfig:
    """The config, every field as its annotation says. Raises InputError for another type, or a task, profile, method,
    option or number that does not exist."""
    config = check_fields(config, "the evaluation")
    if config.task not in TASKS:
        raise suggest("task", config.task, TASKS)
    if config.profile not in PROFILES:
        raise suggest("profile", config.profile, PROFILES)
    TASKS[config.task].check(config.task, config.options)
    check_rows(config.name, config.rows)
    return config


def check_rows(table: str, rows: Sequence[Row]) -> None:
    """InputError for a method, a member of one or an option that does not exist, or rows of one name."""
    for row in rows:
        if row.method == RANDOM:
            check_options(RANDOM, RANDOM_OPTIONS, row.options)
        else:
            if row.method not in METHODS:
                raise suggest("method", row.method, [*METHODS, RANDOM])
            METHODS[row.method].bind(row.method, dict(row.options))
            METHODS[row.method].looks_at_class(row.options)  # of a combination, this asks its members
    names = [row.name for row in rows]
    others = [row.name for row in rows if row.method != RANDOM or row.options.get("pixels")]
    if len(set(names)) < len(names) or CLEAN in names or RANDOM in others:
        own = f"none is called {CLEAN!r}, and no other method {RANDOM!r}"
        raise InputError(f"the rows of {table} must have names of their own; {own}")


def select(config: Any, methods: Iterable[str]) -> Any:
    """The config with those of its rows that are named, or else the methods of that name."""
    own = {row.name: row for row in config.rows}
    chosen = []
    for name in dict.fromkeys(methods):
        if name not in own and name not in METHODS and name != RANDOM:
            raise suggest("method", name, [*own, *METHODS, RANDOM])
        chosen.append(own.get(name, Row(name, name)))
    return dataclasses.replace(config, rows=chosen)


# ---- what a task is ------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """A batch on the device: images in [0, 1], what is explained and the label of each, and what a task asks for."""

    images: Array  # [B, H, W, C]
    target: metrics.Target  # classes [B], or the `Question` whose score is explained and followed
    labels: Array  # [B]
    masks: Array | None = None  # [B, H, W], where the task needs them
    original: Array | None = None  # maps [B, gh, gw] without `Row.random_blocks`, for a task `against_original`
    reference: Array | None = None  # maps [B, h, w] of the task's `reference`
    shared: Any = None  # what the task's `shared` gave
    explain: Callable[[Array], Array] | None = None  # images -> maps by the row's method, for a task that `explains`
    grid: tuple[int, int] = (1, 1)  # of the model's patches
    mean: Sequence[float] = (0.5, 0.5, 0.5)  # the mean colour of the model's data
    tiling: Tiling | None = None  # of the model's patches, where it has them


Table = Mapping[str, np.ndarray]  # results per image [n, ...]: "clean_...", "predicted_..." and "target_..."
Fields = Mapping[str, Any]  # annotations of the arrays of a file of records, as lists; see `lists_of`


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure of a table: a statistic of the mean over images of what `values` makes of the results per image.

    Args:
      values: table -> results per image, [n] or [n, ...].
      statistic: mean over images [..., k] -> figure [...].
      better: which figure is the better one, None where neither is.
      digits: after the decimal point, where the figure is shown.
      explained: of the explanations of which class it is.
    """

    values: Callable[[Table], np.ndarray]
    statistic: metrics.Statistic = metrics.mean
    better: Literal["higher", "lower"] | None = None
    digits: int = 2
    explained: str = PREDICTED


FINITE_MAPS = Column(lambda table: 100.0 * table["predicted_finite"], better="higher")  # of every task


class Plot(NamedTuple):
    """What is drawn of a task: for every row one curve in each panel."""

    x_label: str
    y_label: str
    curves: Callable[[Table], dict[str, tuple[np.ndarray, np.ndarray]]]  # title of a panel: x and y of the curve

    def y_of(self, score: str | None) -> str:
        """The label of y where this score is followed in place of the probability."""
        return self.y_label if score is None else self.y_label.replace("probability", score)


class Task(NamedTuple):
    """A kind of table: what is computed per image on the device, and what is said about all images.

    `compute(predict, inputs, maps, *, options)` gives arrays [B, ...]; `predict` gives logits for images in [0, 1],
    and `maps` are pixel maps [B, H, W] in [0, 1]. Its keyword-only arguments are the options of the task.
    """

    compute: Callable[..., dict[str, Array]]
    columns: Mapping[str, Column]
    fields: Callable[..., Fields]  # (scored, **options) -> the annotations of what `compute` gives
    plot: Plot | None = None  # None: the first column with its interval
    needs: Literal["", "labels", "masks"] = ""
    raw: bool = False  # `maps` are as the method gives them, [B, gh, gw] or [B, H, W], and not pixel maps in [0, 1]
    against_original: bool = False  # `inputs.original` are the maps without `random_blocks`
    reference: str = ""  # a method whose maps, made once for every image and kept in the run, are `inputs.reference`
    shared: Callable[..., Any] | None = None  # (predict, inputs, *, options) -> `inputs.shared`, once for all rows
    explains: bool = False  # `inputs.explain` is there

    @property
    def explained(self) -> tuple[str, ...]:
        """The classes whose explanations are wanted: "predicted", perhaps "target" too."""
        return tuple(dict.fromkeys(column.explained for column in self.columns.values()))

    def _own(self) -> dict[str, dict[str, Any]]:
        return {"compute": options_of(self.compute), "shared": options_of(self.shared) if self.shared else {}}

    def check(self, name: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The options of `compute`, of `shared` and of the reference, as plain values that meet their annotations.

        Raises InputError for an unknown option, or one that is not what its annotation says.
        """
        known = {**self._own(), "reference": METHODS[self.reference].known() if self.reference else {}}
        every = {**known["compute"], **known["shared"], **known["reference"]}
        values = check_options(f"the task {name!r}", every, options)
        found = {part: {key: value for key, value in values.items() if key in own} for part, own in known.items()}
        if self.reference:
            METHODS[self.reference].bind(self.reference, found["reference"])
        return found

    def records(self, options: Mapping[str, Any], scored: bool = False) -> Fields:
        """What stands in the files of records: what `compute` gives, with a score if one is followed in place of the
        probability, and whether the map was finite."""
        own = {name: options[name] for part in self._own().values() for name in part if name in options}
        return {**self.fields(scored, **own), "finite": lists_of(bool)}

    def measure(self, table: Table) -> dict[str, np.ndarray]:
        """Results per image of every column whose explanations the table has."""
        there = {name.partition("_")[0] for name in table}
        return {name: column.values(table) for name, column in self.columns.items() if column.explained in there}


# ---- the results per image: their shapes, as they stand in the records ---------------------------------------------

LARGEST = 3.5e38  # of float32
Number = Annotated[float, Ge(-LARGEST), Le(LARGEST)]
LogProbability = Annotated[float, Ge(-LARGEST), Le(1e-3)]
Count = Annotated[int, Ge(0), Le(2**31 - 1)]


def _followed_fields(scored: bool, *shape: int) -> Fields:
    return {"score": lists_of(Number, *shape)} if scored else {"log_probability": lists_of(LogProbability, *shape)}


def clean_fields(scored: bool = False) -> Fields:
    """What is recorded of whole images."""
    label = lists_of(Annotated[int, Ge(-1), Le(2**31 - 1)])
    return {"predicted": lists_of(Count), "label": label, **_followed_fields(scored), "hit": lists_of(bool)}


def _followed(table: Table, of: str = PREDICTED) -> np.ndarray:
    """The probability of the class, or the score that is followed in its place."""
    score = table.get(f"{of}_score")
    return np.exp(table[f"{of}_log_probability"]) if score is None else score


# ---- options that several tasks have -------------------------------------------------------------------------------

Fill = Literal["black", "blur"]
AnyFill = Literal["mean", "black", "blur"]
STEPS = 20
REMOVALS = 50
Steps = Annotated[int, Ge(1), Le(1000)]  # each is a forward pass
Groups = Annotated[int, Ge(2), Le(1000)]
Samples = Annotated[int, Ge(1), Le(1000)]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED)]
Noise = Annotated[float, Ge(0), Le(10)]
Radius = Annotated[float, Gt(0), Le(1)]
Share = Annotated[float, Gt(0), Lt(1)]


def _background(inputs: Inputs, fill: AnyFill) -> Array:
    """What stands in for removed pixels, [C] or [B, H, W, C]."""
    if fill == "blur":
        return metrics.blur(inputs.images)
    return jnp.asarray(inputs.mean if fill == "mean" else (0.0,) * len(inputs.mean), inputs.images.dtype)


# ---- perturbation --------------------------------------------------------------------------------------------------
# Accuracies start at the clean one; probabilities are those of the predicted class, the most relevant pixels removed
# first.

POSITIVE, NEGATIVE = 0, 1  # the most relevant pixels go first, or last


def _curve_fields(scored: bool, **_: Any) -> Fields:
    return {**_followed_fields(scored, 2, metrics.STEPS), "hit": lists_of(bool, 2, metrics.STEPS)}


def _perturbation(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    return metrics.perturbation(predict, inputs.images, maps, inputs.target, inputs.labels)


def _hits(direction: int, explained: str = PREDICTED) -> Callable[[Table], np.ndarray]:
    return lambda table: np.concatenate(
        [table["clean_hit"][:, None], table[f"{explained}_hit"][:, direction]], 1
    )  # [n, 10]


def _aopc(table: Table) -> np.ndarray:
    return _followed(table, CLEAN)[:, None] - _followed(table)[:, POSITIVE]


def _lodds(table: Table) -> np.ndarray:
    name = "score" if "clean_score" in table else "log_probability"
    return table[f"predicted_{name}"][:, POSITIVE] - table[f"clean_{name}"][:, None]


def _perturbation_curves(table: Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    titles = {"positive (lower is better)": POSITIVE, "negative (higher is better)": NEGATIVE}
    accuracies = {title: 100 * _hits(direction)(table).mean(0) for title, direction in titles.items()}
    return {title: (10 * np.arange(len(accuracy)), accuracy) for title, accuracy in accuracies.items()}


# ---- segmentation --------------------------------------------------------------------------------------------------


def _segmentation(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    assert inputs.masks is not None
    return metrics.segmentation(maps, inputs.masks)


def _counts(table: Table) -> np.ndarray:
    return table["predicted_counts"]


def _segmentation_curves(table: Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    precision, recall = metrics.precision_recall(table["predicted_histogram"])
    return {"foreground, pooled pixels": (recall, precision)}


# ---- insertion and deletion ----------------------------------------------------------------------------------------


def _insertion(
    predict: metrics.Predict, inputs: Inputs, maps: Array, *, fill: Fill = "black", steps: Steps = STEPS
) -> dict[str, Array]:
    background = metrics.blur(inputs.images) if fill == "blur" else 0.0
    return metrics.insertion_deletion(predict, inputs.images, maps, inputs.target, background, steps)


def _two_curves(scored: bool, steps: int = STEPS, **_: Any) -> Fields:
    return _followed_fields(scored, 2, steps + 1)


def _probability_curves(*titles: str) -> Callable[[Table], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Of the two directions of `_two_curves`, with their titles."""

    def curves(table: Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        means = _followed(table).mean(0)
        return {title: (np.linspace(0, 100, len(mean)), mean) for title, mean in zip(titles, means, strict=True)}

    return curves


# ---- SaCo ----------------------------------------------------------------------------------------------------------


def _saco(
    predict: metrics.Predict, inputs: Inputs, maps: Array, *, groups: Groups = metrics.GROUPS
) -> dict[str, Array]:
    return metrics.group_drops(predict, inputs.images, maps, inputs.target, groups)


def _saco_fields(scored: bool, groups: int = metrics.GROUPS) -> Fields:
    return {"salience": lists_of(Number, groups), "drop": lists_of(Number, groups)}


# ---- the sanity check ----------------------------------------------------------------------------------------------


def _sanity(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    assert inputs.original is not None
    return {"similarity": metrics.rank_correlation(maps, inputs.original)}


# ---- symmetric relevance gain, and ROAD -----------------------------------------------------------------------------


def _srg(
    predict: metrics.Predict, inputs: Inputs, maps: Array, *, fill: AnyFill = "mean", steps: Steps = STEPS
) -> dict[str, Array]:
    maps = metrics.by_patch(maps, inputs.grid, inputs.tiling)
    background = _background(inputs, fill)
    return metrics.patch_removal(predict, inputs.images, maps, inputs.target, background, steps, inputs.tiling)


def _road(
    predict: metrics.Predict, inputs: Inputs, maps: Array, *, noise: Noise = 0.01, seed: Seed = 0
) -> dict[str, Array]:
    fill = partial(metrics.noisy_linear, noise=noise, seed=seed)
    return metrics.perturbation(predict, inputs.images, maps, inputs.target, inputs.labels, fill)


# ---- max-sensitivity, infidelity, complexity ------------------------------------------------------------------------


def _sensitivity(
    predict: metrics.Predict,
    inputs: Inputs,
    maps: Array,
    *,
    radius: Radius = 0.02,
    samples: Samples = 10,
    seed: Seed = 0,
) -> dict[str, Array]:
    assert inputs.explain is not None
    return {"sensitivity": metrics.max_sensitivity(inputs.explain, inputs.images, maps, radius, samples, seed)}


def _removals(
    predict: metrics.Predict,
    inputs: Inputs,
    *,
    fill: AnyFill = "mean",
    samples: Samples = REMOVALS,
    share: Share = 0.1,
    seed: Seed = 0,
) -> tuple[Array, Array]:
    removed = metrics.removed_patches(inputs.grid, samples, share, seed)
    background = _background(inputs, fill)
    return removed, metrics.removal_drops(predict, inputs.images, removed, inputs.target, background, inputs.tiling)


def _infidelity(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    removed, drop = inputs.shared
    maps = metrics.by_patch(maps, inputs.grid, inputs.tiling)
    return {"relevance": metrics.removed_relevance(maps, removed), "drop": drop}


def _infidelity_fields(scored: bool, samples: int = REMOVALS, **_: Any) -> Fields:
    return {"relevance": lists_of(Number, samples), "drop": lists_of(Number, samples)}


def _complexity(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    return {"gini": metrics.gini(maps), "entropy": metrics.entropy(maps)}


# ---- agreement with the Shapley values of the patches ---------------------------------------------------------------


def _agreement(predict: metrics.Predict, inputs: Inputs, maps: Array) -> dict[str, Array]:
    assert inputs.reference is not None
    _, gh, gw = inputs.reference.shape
    maps = metrics.by_patch(maps, (gh, gw), inputs.tiling)
    return {"agreement": metrics.rank_correlation(maps, inputs.reference)}


# ---- the table of tasks --------------------------------------------------------------------------------------------

TASKS: dict[str, Task] = {
    "perturbation": Task(
        _perturbation,
        {
            "positive_auc_predicted": Column(_hits(POSITIVE), metrics.area, "lower"),
            "negative_auc_predicted": Column(_hits(NEGATIVE), metrics.area, "higher"),
            "positive_auc_target": Column(_hits(POSITIVE, TARGET), metrics.area, "lower", explained=TARGET),
            "negative_auc_target": Column(_hits(NEGATIVE, TARGET), metrics.area, "higher", explained=TARGET),
            "aopc": Column(_aopc, better="higher", digits=3),
            "lodds": Column(_lodds, better="lower", digits=3),
        },
        _curve_fields,
        Plot("pixels removed [%]", "accuracy [%]", _perturbation_curves),
        needs="labels",
    ),
    "segmentation": Task(
        _segmentation,
        {
            "pixel_accuracy": Column(_counts, metrics.pixel_accuracy, "higher"),
            "mean_iou": Column(_counts, metrics.mean_iou, "higher"),
            "map_two_channel": Column(lambda table: 100 * table["predicted_map_two_channel"], better="higher"),
            "map": Column(lambda table: 100 * table["predicted_average_precision"], better="higher"),
            "mean_f1": Column(lambda table: 100 * metrics.f1(_counts(table)), better="higher"),
            "pointing_game": Column(lambda table: 100 * table["predicted_pointing"], better="higher"),
        },
        lambda *_: {
            "counts": lists_of(Count, 4),
            "average_precision": lists_of(Number),
            "map_two_channel": lists_of(Number),
            "histogram": lists_of(Count, 2, metrics.THRESHOLDS),
            "pointing": lists_of(bool),
        },
        Plot("recall", "precision", _segmentation_curves),
        needs="masks",
    ),
    "insertion": Task(
        _insertion,
        {
            "insertion_auc": Column(lambda table: 100 * _followed(table)[:, 0], metrics.unit_area, "higher"),
            "deletion_auc": Column(lambda table: 100 * _followed(table)[:, 1], metrics.unit_area, "lower"),
        },
        _two_curves,
        Plot(
            "pixels changed [%]",
            "probability",
            _probability_curves("insertion (higher is better)", "deletion (lower is better)"),
        ),
    ),
    "saco": Task(
        _saco,
        {
            "saco": Column(
                lambda table: metrics.saco(table["predicted_salience"], table["predicted_drop"]),
                better="higher",
                digits=3,
            )
        },
        _saco_fields,
    ),
    "sanity": Task(
        _sanity,
        {"similarity": Column(lambda table: table["predicted_similarity"], metrics.magnitude, "lower", digits=3)},
        lambda *_: {"similarity": lists_of(Number)},
        raw=True,
        against_original=True,
    ),
    "srg": Task(
        _srg,
        {"srg": Column(lambda table: metrics.gain(_followed(table)), better="higher", digits=3)},
        _two_curves,
        Plot(
            "patches removed [%]",
            "probability",
            _probability_curves("most relevant first (lower is better)", "least relevant first (higher is better)"),
        ),
        raw=True,
    ),
    "road": Task(
        _road,
        {
            "road_positive_auc": Column(_hits(POSITIVE), metrics.area, "lower"),
            "road_negative_auc": Column(_hits(NEGATIVE), metrics.area, "higher"),
        },
        _curve_fields,
        Plot("pixels imputed [%]", "accuracy [%]", _perturbation_curves),
        needs="labels",
    ),
    "sensitivity": Task(
        _sensitivity,
        {"max_sensitivity": Column(lambda table: table["predicted_sensitivity"], better="lower", digits=3)},
        lambda *_, **__: {"sensitivity": lists_of(Number)},
        raw=True,
        explains=True,
    ),
    "infidelity": Task(
        _infidelity,
        {
            "infidelity": Column(
                lambda table: metrics.infidelity(table["predicted_relevance"], table["predicted_drop"]),
                better="lower",
                digits=4,
            )
        },
        _infidelity_fields,
        raw=True,
        shared=_removals,
    ),
    "complexity": Task(
        _complexity,
        {
            "gini": Column(lambda table: table["predicted_gini"], digits=3),
            "entropy": Column(lambda table: table["predicted_entropy"], digits=3),
        },
        lambda *_: {"gini": lists_of(Number), "entropy": lists_of(Number)},
        raw=True,
    ),
    "shapley": Task(
        _agreement,
        {"shapley_agreement": Column(lambda table: table["predicted_agreement"], better="higher", digits=3)},
        lambda *_: {"agreement": lists_of(Number)},
        raw=True,
        reference="shapley",
    ),
}
