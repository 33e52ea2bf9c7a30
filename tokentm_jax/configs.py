"""The config of an evaluation, and ready lists of its rows."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le, Len

from tokentm_jax.data.sources import VADER, Half
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.inputs.reader import PROFILES
from tokentm_jax.maths.variants import READINGS as READINGS
from tokentm_jax.maths.weights import WEIGHTS
from tokentm_jax.methods.table import METHODS, PIXELS
from tokentm_jax.metrics.task import CLEAN, LARGEST_SEED
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.validation import Name, Text, check_fields, check_options, checked

RANDOM = "random"  # a row of every table
RANDOM_OPTIONS = {"pixels": bool}  # noise at every pixel, to measure maps of pixels by; else at every patch


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
    *(Row(f"weights={name}", "tokentm", {"weights": name}) for name in WEIGHTS),
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
        "channel:NUMBER"; see `Model.score`.
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


def eraser_config(
    name: str, model: str, data: str, rows: Sequence[Row], ratings: Sequence[int] | None = None, **options: Any
) -> EvaluateConfig:
    """The config that `TextEvaluateConfig` was: ERASER's metrics by deletion, or agreement with people for `ratings`.

    Each of the four tables of texts is a task of its own now: "eraser" with the fill "delete" or "mask",
    "leave_one_out", and "people".
    """
    if ratings is None:
        return EvaluateConfig(name, "eraser", data, rows, model, **options)
    signs = ",".join(map(str, ratings))
    return EvaluateConfig(name, "people", f"{VADER}{data}", rows, model, options={"signs": signs}, **options)


def check(config: EvaluateConfig) -> EvaluateConfig:
    """The config, every field as its annotation says. Raises InputError for another type, or a task, profile, method,
    option or number that does not exist."""
    config = check_fields(config, "the evaluation")
    if config.task not in TASKS:
        known = suggest("task", config.task, TASKS)
        raise InputError(f"{known}; a task of yours must be in tokentm_jax.metrics.TASKS (--task FILE.py adds it)")
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
