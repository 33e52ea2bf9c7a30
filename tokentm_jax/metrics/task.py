"""What a task is: a metric of every image, the columns that a table shows of it, and its plot."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.texts import Texts
from tokentm_jax.inputs.values import Inputs, of
from tokentm_jax.maths.maps import Tiling
from tokentm_jax.maths.primitives import AnyArray, PyTree
from tokentm_jax.maths.scores import Channel, Question
from tokentm_jax.methods.table import METHODS
from tokentm_jax.metrics.statistics import Statistic, mean, ratio
from tokentm_jax.validation import check_options, lists_of, options_of

CLEAN = "clean"  # of whole images
PREDICTED, TARGET = "predicted", "target"  # of the explanation of this class
LARGEST_SEED = 2**31 - 2  # the random row uses the next one too

Input = AnyArray | Inputs  # images [B, H, W, C] in [0, 1], or another modality's inputs such as `Texts`
Predict = Callable[[Input], Array]  # such inputs -> logits [B, classes]
Target = AnyArray | Question
Table = Mapping[str, np.ndarray]  # results per image [n, ...]: "clean_...", "predicted_..." and "target_..."
Fields = Mapping[str, Any]  # annotations of the arrays in a file of records, as lists; see `lists_of`

# Options that several tasks have.
Background = Literal["mean", "black", "blur"]
Steps = Annotated[int, Ge(1), Le(1000)]  # each is a forward pass
Samples = Annotated[int, Ge(1), Le(1000)]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED)]


class Subject(NamedTuple):
    """A batch that is measured: its inputs, what is explained, the label of each, and what a task asks for."""

    inputs: Input
    target: Target  # classes [B], or the `Question` whose score is explained and followed
    labels: Array  # [B]
    masks: Array | None = None  # [B, H, W], where the task needs them; for "parts", the number of the part of a pixel
    without: Any = None  # the inputs without any part, for a task that needs "parts"
    original: Array | None = None  # maps [B, gh, gw] without `Row.random_blocks`, for a task `against_original`
    reference: Array | None = None  # maps [B, h, w] of the task's `reference`
    shared: PyTree = None  # what the task's `shared` gave
    explain: Callable[[Input], Array] | None = None  # images -> maps by the row's method, for a task that `explains`
    grid: tuple[int, int] = (1, 1)  # of the model's patches
    mean: AnyArray | Sequence[float] = (0.5, 0.5, 0.5)  # colour of the model's data, or embedding [D] of its mask
    tiling: Tiling | None = None  # of the model's patches, where it has them
    others: Array | None = None  # [B], the classes of `without`, -1 where unknown

    def background(self, fill: Background) -> Array:
        """What replaces removed pixels, [C] or [B, H, W, C], or word pieces, [D]."""
        return of(self.inputs).background(fill, self.mean)

    @property
    def removable(self) -> Array | None:
        """Which places [B, h, w] of a map can be removed; None: all."""
        return of(self.inputs).removable


@dataclasses.dataclass(frozen=True)
class Column:
    """One number of a table: a statistic of the mean over images of what `values` makes of the results per image.

    Args:
      values: table -> results per image, [n] or [n, ...].
      statistic: mean over images [..., k] -> number [...].
      better: which number is the better one, None where neither is.
      digits: after the decimal point, where the number is shown.
      explained: of the explanations of which class it is.
    """

    values: Callable[[Table], np.ndarray]
    statistic: Statistic = mean
    better: Literal["higher", "lower"] | None = None
    digits: int = 2
    explained: str = PREDICTED


FINITE_MAPS = Column(  # of every task
    lambda table: 100.0 * table[next(name for name in table if name.endswith("_finite"))], better="higher"
)


def among(
    name: str,
    counts: str,
    scale: float = 1.0,
    better: Literal["higher", "lower"] = "higher",
    digits: int = 3,
    explained: str = PREDICTED,
) -> Column:
    """The mean of the results `name`, times `scale`, over the images that the results `counts` mark; 0 without any."""

    def values(table: Table) -> np.ndarray:
        counted = table[f"{explained}_{counts}"]
        return np.stack([scale * counted * table[f"{explained}_{name}"], counted], 1)

    return Column(values, ratio, better, digits, explained)


class Plot(NamedTuple):
    """What is drawn of a task: for every row one curve in each panel."""

    x_label: str
    y_label: str
    curves: Callable[[Table], dict[str, tuple[np.ndarray, np.ndarray]]]  # title of a panel: x and y of the curve

    def y_of(self, score: str | None) -> str:
        """The label of y where this score is followed instead of the probability."""
        return self.y_label if score is None else self.y_label.replace("probability", score)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A kind of table: what is computed per image on the device, and what is reported of all images.

    `compute(predict, subject, maps, *, options)` gives arrays [B, ...]; `predict` gives logits for images in [0, 1],
    and `maps` are pixel maps [B, H, W] in [0, 1]. Its keyword-only arguments are the options of the task. The shapes
    of its arrays behind B depend on nothing but these.
    """

    compute: Callable[..., dict[str, Array]]
    columns: Mapping[str, Column]
    plot: Plot | None = None  # None: the first column with its interval
    needs: Literal["", "labels", "masks", "parts"] = ""
    regular: bool | None = None  # True: only for images; False: only for inputs whose parts are no grid, such as texts
    raw: bool = False  # `maps` are as the method gives them, [B, gh, gw] or [B, H, W], and not pixel maps in [0, 1]
    against_original: bool = False  # `subject.original` are the maps without `random_blocks`
    reference: str = ""  # a method whose maps, made once for every image and kept in the run, are `subject.reference`
    shared: Callable[..., PyTree] | None = None  # (predict, subject, *, options) -> `subject.shared`, for all rows
    explains: bool = False  # `subject.explain` is there
    # (predict, subject, logits, *, options) -> which images it is of, where `logits` are of the images; None: all.
    counts: Callable[..., Array] | None = None

    @property
    def explained(self) -> tuple[str, ...]:
        """The classes whose explanations are wanted: "predicted", perhaps "target" too."""
        return tuple(dict.fromkeys(column.explained for column in self.columns.values()))

    def check(self, name: str, options: Mapping[str, object]) -> dict[str, dict[str, Any]]:
        """The options of each part, and of the reference, as plain values that meet their annotations.

        Raises InputError for an unknown option, or one that does not meet its annotation.
        """
        known = {
            "compute": options_of(self.compute),
            "shared": options_of(self.shared) if self.shared else {},
            "reference": METHODS[self.reference].known() if self.reference else {},
            "counts": options_of(self.counts) if self.counts else {},
        }
        every = {key: value for own in known.values() for key, value in own.items()}
        values = check_options(f"the task {name!r}", every, options)
        found = {part: {key: value for key, value in values.items() if key in own} for part, own in known.items()}
        if self.reference:
            METHODS[self.reference].bind(self.reference, found["reference"])
        return found

    def records(self, name: str, options: Mapping[str, object], scored: bool = False) -> Fields:
        """The annotations of what is recorded per image: the arrays of `compute`, with a score if one is followed
        instead of the probability, and whether the map was finite. No model is needed: they are the shapes for images
        of `SIDE` pixels, each of them a patch.

        Raises InputError as `check`, and for anything but arrays whose first axis is the batch.
        """
        own, batch = self.check(name, options), 2
        inputs, maps, masks = _example(batch, self.regular is not False)
        classes = jax.ShapeDtypeStruct((batch,), jnp.int32)

        def predict(inputs: Any) -> Array:
            numbers = of(inputs).values
            return numbers.reshape(batch, -1, numbers.shape[-1]).mean(1)

        def compute(inputs: Any, classes: Array, masks: Array, maps: Array) -> Any:
            target = Question(Channel(0)) if scored else classes
            grid = (maps.shape[1], maps.shape[2])
            subject = Subject(inputs, target, classes, masks, inputs, maps, maps, explain=lambda _: maps, grid=grid)
            if self.shared is not None:
                subject = subject._replace(shared=self.shared(predict, subject, **own["shared"]))
            return self.compute(predict, subject, maps, **own["compute"])

        found = jax.eval_shape(compute, inputs, classes, masks, maps)
        if not isinstance(found, dict) or any(array.shape[:1] != (batch,) for array in found.values()):
            raise InputError(f"the task {name!r} must return a dict of arrays [B, ...], got {found}")
        return record_types({"finite": jax.ShapeDtypeStruct((batch,), bool), **found})

    def measure(self, table: Table) -> dict[str, np.ndarray]:
        """Results per image of every column whose explanations the table has."""
        there = {name.partition("_")[0] for name in table}
        return {name: column.values(table) for name, column in self.columns.items() if column.explained in there}


# ---- the results per image: their types, as they are in the records ------------------------------------------------

SIDE = 32  # so that an image has more patches than the most steps or groups that an option may ask for
LARGEST = 3.5e38  # of float32


def _example(batch: int, regular: bool) -> tuple[Any, Any, Any]:
    """Shapes and types of images, maps and masks whose patches are pixels; or of texts, maps and ratings."""

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    if regular:
        return array(SIDE, SIDE, 3), array(SIDE, SIDE), array(SIDE, SIDE, dtype=bool)
    flags, types = array(SIDE, dtype=bool), array(SIDE, dtype=jnp.int32)
    return Texts(array(SIDE, 1), flags, types, flags), array(1, SIDE), array(SIDE, 2)


Number = Annotated[float, Ge(-LARGEST), Le(LARGEST)]
LogProbability = Annotated[float, Ge(-LARGEST), Le(1e-3)]


def record_types(arrays: Mapping[str, Any]) -> Fields:
    """The annotations of arrays [B, ...], or of their shapes, in a file of records."""

    def number(name: str, dtype: Any) -> Any:
        if jnp.issubdtype(dtype, jnp.bool):
            return bool
        if jnp.issubdtype(dtype, jnp.integer):
            return Annotated[int, Ge(int(jnp.iinfo(dtype).min)), Le(int(jnp.iinfo(dtype).max))]
        return LogProbability if name == "log_probability" else Number

    return {name: lists_of(number(name, array.dtype), *array.shape[1:]) for name, array in arrays.items()}


def followed_in(table: Table, of: str = PREDICTED) -> np.ndarray:
    """The probability of the class, or the score that is followed instead, from the arrays of whole images or of an
    explanation."""
    score = table.get(f"{of}_score")
    return np.exp(table[f"{of}_log_probability"]) if score is None else score
