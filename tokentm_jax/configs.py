"""The config of an evaluation, and ready lists of its rows."""

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
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
DISTANCE = "distance"  # of texts: the last tokens are the most relevant ones
# Rows that are no methods, with their options. `pixels`: noise at every pixel, to compare with maps of pixels.
BASELINES: Mapping[str, Mapping[str, Any]] = {RANDOM: {"pixels": bool}, DISTANCE: {}}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a method with its options, perhaps on a model whose head and last blocks are random.

    With `by_patch`, maps of pixels are averaged over the model's patches before they are measured. Reason: if pixels
    are removed in the order of a map, scattered pixels reduce the score more than patches, whatever they show.
    """

    name: Text
    method: str
    options: Mapping[str, bool | int | float | str | None] = dataclasses.field(default_factory=dict)
    random_blocks: Annotated[int, Ge(0)] | None = None  # for the sanity check: 0 is only the head
    by_patch: bool = False

    @property
    def class_specific(self) -> bool:
        """Whether its maps depend on the class that is explained."""
        return self.method not in BASELINES and METHODS[self.method].looks_at_class(self.options)


def rows(*methods: str) -> tuple[Row, ...]:
    """One row per method with its default options.

    Args:
      methods: names.

    Returns:
      The rows, in this order.
    """
    return tuple(Row(method, method) for method in methods)


_LISTS: dict[str, list[Any]] = tomllib.loads(Path(__file__).with_name("rows.toml").read_text(encoding="utf-8"))
# In PAPER_ROWS, Transformer Attribution and rollout leave out the first block, as in the published evaluation.
PAPER_ROWS, COMPONENT_ROWS, CHOICE_ROWS, _READING_ROWS, MIX_ROWS = (
    tuple(Row(*row) for row in own) for own in _LISTS.values()
)
READING_ROWS = (
    *_READING_ROWS,
    *(Row(name, "tokentm", reading) for name, reading in READINGS.items()),
    Row("decompv, attention=gradient", "tokentm", {**READINGS["decompv"], "attention": "gradient"}),
    *rows("gae"),
)
WEIGHT_ROWS = (
    *rows("tokentm"),
    *(Row(f"weights={name}", "tokentm", {"weights": name}) for name in WEIGHTS),
    Row("length alone", "tokentm", {"direction": "none"}),
    *rows("gae"),
)
# Methods of a few passes, for what is known to cause an answer.
CAUSE_ROWS = rows(
    "tokentm_mix",
    "tokentm",
    "gae",
    "libra_tokentm",
    "libra_gae",
    "libra_attcat",
    "libra_full_grad",
    "legrad",
    "conservative_lrp",
    "attn_lrp",
    "res_lrp",
    "grad_cam_tokens",
    "transformer_attribution",
    "attcat",
    "rollout",
)
# Methods for texts: all except those that need a grid, in the order of the table.
TEXT_ROWS = (
    *(row for row in rows(*METHODS) if row.method not in ("rise", "kernel_shap", "combination")),
    Row("tokentm: norms=False", "tokentm", {"norms": False}),
)


# Maps of pixels, unchanged and averaged over patches, with both kinds of noise.
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
    """TokenTM over the first 1, 2 ... blocks.

    Args:
      depth: blocks of the model.

    Returns:
      One row for each number of blocks.
    """
    depth = checked("the depth", Annotated[int, Ge(1)], depth)
    return tuple(Row(f"blocks 1-{end}", "tokentm", {"end_block": end}) for end in range(1, depth + 1))


def sanity_rows(depth: int, *methods: str) -> tuple[Row, ...]:
    """Each method on a model with a random head, then also a random last block, and so on to the first block.

    Args:
      depth: blocks of the model.
      methods: names.

    Returns:
      `depth + 1` rows for each method.
    """
    names = ["head", *(f"{k} blocks" if k > 1 else "1 block" for k in range(1, depth + 1))]
    return tuple(Row(f"{m}: random {name}", m, {}, k) for m in methods for k, name in enumerate(names))


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The config of one table.

    Args:
      name: of the output folder; not a path.
      task: a name of `TASKS`.
      data: see `tokentm_jax.data.sources.open_source`.
      model: with `checkpoint`, see `tokentm_jax.load`.
      rows: the methods; a `random` row is added.
      profile: how images are prepared: "default" (as the model specifies) or "reference" (squashed, bilinear).
      options: of the task, such as `{"fill": "blur"}` for "insertion".
      paper: published numbers by (row, metric), shown next to the measured ones.
      limit: number of examples, drawn by `seed`.
      half: use only the examples at "even" or "odd" positions, see `tokentm_jax.data.sources.open_source`.
      names: use only the examples whose names match this pattern, see `open_source`.
      score: the explained number, which is also measured instead of the class's probability: "log_probability",
        "margin", "versus:CLASS", "channel:NUMBER"; see `Model.score`.
      label_map: the model's class (name, wnid or number) for classes with other names in the data set, or the file of
        such a map, see `tokentm_jax.data.labels.read_label_map`.
      mixed_precision: compute outputs for changed images, and for the whole images that they are compared with, faster
        by `tokentm_jax.maths.mixed`. Maps and predictions are not affected.
    """

    name: Name
    task: str
    data: str
    rows: Annotated[Sequence[Row], Len(1)]
    model: Text | None = None
    checkpoint: Text | None = None
    profile: str = "default"
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
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
        """The explained classes, see `Task.explained`; only one if the score does not depend on a class."""
        explained = TASKS[self.task].explained
        return explained[:1] if self.score is not None and self.score.startswith("channel") else explained


def eraser_config(
    name: str, model: str, data: str, rows: Sequence[Row], ratings: Sequence[int] | None = None, **options: Any
) -> EvaluateConfig:
    """The former `TextEvaluateConfig`: ERASER's metrics by deletion, or agreement with people for `ratings`.

    The four tables of texts are now tasks: "eraser" with the fill "delete" or "mask", "leave_one_out", and "people".
    """
    if ratings is None:
        return EvaluateConfig(name, "eraser", data, rows, model, **options)
    signs = ",".join(map(str, ratings))
    return EvaluateConfig(name, "people", f"{VADER}{data}", rows, model, options={"signs": signs}, **options)


def check(config: EvaluateConfig) -> EvaluateConfig:
    """The config with checked fields.

    Raises InputError for a wrong type or number, or an unknown task, profile, method or option.
    """
    config = check_fields(config, "the evaluation")
    if config.task not in TASKS:
        known = suggest("task", config.task, TASKS)
        raise InputError(f"{known}; a custom task must be in tokentm_jax.metrics.TASKS (--task FILE.py adds it)")
    if config.profile not in PROFILES:
        raise suggest("profile", config.profile, PROFILES)
    TASKS[config.task].check(config.task, config.options)
    check_rows(config.name, config.rows)
    return config


def check_rows(table: str, rows: Sequence[Row]) -> None:
    """InputError for an unknown method, member or option, or rows with the same name."""
    for row in rows:
        if row.method in BASELINES:
            check_options(row.method, BASELINES[row.method], row.options)
        else:
            if row.method not in METHODS:
                raise suggest("method", row.method, [*METHODS, *BASELINES])
            METHODS[row.method].bind(row.method, dict(row.options))
            METHODS[row.method].looks_at_class(row.options)  # checks the members of a combination
    names = [row.name for row in rows]
    others = [row.name for row in rows if row.method != RANDOM or row.options.get("pixels")]
    if len(set(names)) < len(names) or CLEAN in names or RANDOM in others:
        reserved = f"{CLEAN!r} is reserved, and so is {RANDOM!r} for other methods"
        raise InputError(f"the rows of {table} must have different names; {reserved}")


def select(config: Any, methods: Iterable[str]) -> Any:
    """The config with its rows of these names, or else the methods of these names."""
    own = {row.name: row for row in config.rows}
    chosen = []
    for name in dict.fromkeys(methods):
        if name not in own and name not in METHODS and name not in BASELINES:
            raise suggest("method", name, [*own, *METHODS, *BASELINES])
        chosen.append(own.get(name, Row(name, name)))
    return dataclasses.replace(config, rows=chosen)
