"""`Explainer`: a model with its methods as one object that pickles, for data sets and for engines of others."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from annotated_types import Ge, Interval

from tokentm_jax.data.examples import Example
from tokentm_jax.data.labels import read_label_map
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.identity import digest
from tokentm_jax.inputs.decoding import Setup, submit
from tokentm_jax.inputs.reader import PROFILES
from tokentm_jax.inputs.values import as_maps
from tokentm_jax.maths.scores import question
from tokentm_jax.methods.explain import compiled
from tokentm_jax.methods.table import METHODS
from tokentm_jax.models.classes import candidates
from tokentm_jax.models.loading import Model, load, require_loaded
from tokentm_jax.validation import check_fields

OPEN, DONE, SKIPPED = 0, 1, 2  # the status of an example
TARGETS = ("predicted", "label")
DTYPES = ("float32", "float16")  # of the maps
LOGITS = ("all", "top5", "none")
DECODING = ("exact", "draft")
BatchSize = Annotated[int, Interval(ge=1, le=4096)]
TOP = 5
Layout = Mapping[str, tuple[tuple[int, ...], str]]  # column -> (shape for one example, type)
COLUMNS = ("image", "text", "audio")  # of the examples in a batch
REASON = 200  # characters of a reason
FILL: dict[str, Any] = {"float16": np.nan, "float32": np.nan, "int32": -1, "uint8": 0, "string": ""}  # where not done


@dataclasses.dataclass(frozen=True)
class Explainer:
    """Explains batches of arrays: what Ray Data's `map_batches`, Beam and Grain take as it is.

    It pickles to a few hundred bytes where the model is a name or a path. The model is loaded at the first call, and
    kept with its compiled program in this process.

    Args:
      model, checkpoint, img_size, class_names: as for `load`; or `model` is a `Model`.
      methods: names of `METHODS`.
      options: of the methods; each must know all of them.
      target: which class is explained, "predicted" or "label".
      score: what is explained: None for the logit of the class, or see `Model.score`.
      dtype: of the maps, "float16" (each divided by a power of two, its scale) or "float32".
      profile: how images are prepared: "default" (as the model specifies) or "reference" (squashed, bilinear).
      logits: "all", the five largest ("top5") or "none" of them.
      decoding: "exact", or "draft": JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the model needs no more.
      batch_size: examples computed at a time, on one device; from 1 to 4096. A batch with fewer is filled up.
      label_map: the model's class (name, wnid or number) of classes that the data names otherwise, or the file of
        such a map, see `read_label_map`.
      mixed_precision: compute in mixed precision, see `Model.mixed`: faster on processors that multiply bfloat16.
      length: tokens that texts are padded to, and longer ones are skipped; None: as the longest of the batch needs.

    Raises:
      InputError: a method, option, name or number that does not exist.

    Examples:
        >>> import numpy as np, tokentm_jax as tm
        >>> explainer = tm.Explainer(methods=["gae"])
        >>> found = explainer({"image": np.zeros((2, 40, 40, 3), np.uint8)})
        >>> found["maps/gae"].shape, found["scale/gae"].shape, found["logits"].shape
        ((2, 8, 8), (2,), (2, 10))
    """

    model: Model | str | os.PathLike[str] | None = None
    checkpoint: str | os.PathLike[str] | None = None
    img_size: int | None = None
    class_names: Sequence[str] | str | os.PathLike[str] | None = None
    methods: Sequence[str] = ("tokentm",)
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    target: str = "predicted"
    score: str | None = None
    dtype: str = "float16"
    profile: str = "default"
    logits: str = "all"
    decoding: str = "exact"
    batch_size: BatchSize = 32
    label_map: Mapping[str, str | int] | str | None = None
    length: Annotated[int, Ge(1)] | None = None
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "the settings")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(f"the methods must be different ones, got {','.join(self.methods) or 'none'}")
        for method in self.methods:
            if method not in METHODS:
                raise suggest("method", method, METHODS)
            METHODS[method].bind(method, dict(self.options))
        for kind, value, known in (
            ("target", self.target, TARGETS),
            ("dtype", self.dtype, DTYPES),
            ("profile", self.profile, PROFILES),
            ("choice of logits", self.logits, LOGITS),
            ("decoding", self.decoding, DECODING),
        ):
            if value not in known:
                raise suggest(kind, value, known)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    # ---- the model, loaded when it is needed ----

    @functools.cached_property
    def loaded(self) -> Model:
        """The model, with a reader whose batches have one shape. Raises InputError as `load`."""
        vit = self.model
        if vit is None or isinstance(vit, str | os.PathLike):
            names = (
                self.class_names if isinstance(self.class_names, str | os.PathLike | None) else (*self.class_names,)
            )
            files = [each for each in (vit, self.checkpoint, names) if isinstance(each, str | os.PathLike)]
            vit = _loaded(vit, self.checkpoint, self.img_size, names, tuple(map(_stamp, files)))
        require_loaded(vit)
        if self.score is None:
            vit.require_classes()
        vit = vit.mixed() if self.mixed_precision else vit
        if self.length is None:
            return vit
        reader: Any = vit.preprocessing
        if not hasattr(reader, "padded"):
            raise InputError(f"a length is for texts, and {vit.name} takes {reader.kind}s")
        if self.length > reader.length:
            raise InputError(f"{vit.name} takes at most {reader.length} tokens, and the length is {self.length}")
        return dataclasses.replace(vit, preprocessing=dataclasses.replace(reader, padded=self.length))

    @functools.cached_property
    def setup(self) -> Setup:
        """How examples are decoded."""
        reader, least = self.loaded.preprocessing, None
        if self.decoding == "draft":
            least = -(-max(reader.size) * 1000 // int(1000 * getattr(reader, "crop_pct", 1)))
        return Setup(reader, self.profile, least)

    @functools.cached_property
    def labels(self) -> "_Labels":
        """From classes of the data to classes of the model."""
        return _Labels(self.loaded, read_label_map(self.label_map) or {})

    @functools.cached_property
    def _params(self) -> list[Any]:
        return [jax.device_put(self.loaded.params, device) for device in jax.local_devices()]

    @functools.cached_property
    def program(self) -> Any:
        """(params, inputs, target) -> maps, and logits and target; the logits are those of the first method's pass."""
        methods = {name: self.options for name in self.methods}
        vit = self.loaded
        return compiled(vit.module, methods, details=("logits", "target"), preprocessing=vit.preprocessing)

    def layout(self) -> Layout:
        """The columns of the results. Compiles nothing. InputError for a method that cannot explain the model."""
        vit = self.loaded
        found, _ = jax.eval_shape(self.program, vit.params, vit.preprocessing.batch(1), self._asked(None))
        shapes = {method: jax.eval_shape(as_maps, found[method]).shape[1:] for method in self.methods}
        return layout(shapes, self.dtype, self.logits, vit.module.num_classes)

    def described(self) -> dict[str, Any]:
        """What is computed, as JSON, with an identity of the model instead of its path. Reads all parameters."""
        left_out = {"model", "checkpoint", "img_size", "class_names"}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        described = {"model": self.loaded.described(), **fields, "methods": list(self.methods)}
        described |= {"options": dict(self.options), "label_map": read_label_map(self.label_map)}
        return {**described, "classes": digest(self.loaded.class_names, self.loaded.wnids)}

    # ---- batches ----

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Explain a batch of any size.

        Args:
          batch: arrays or lists by name: "image" (encoded files, or uint8 [B, H, W, 3], or [H, W, 3] of any sizes),
            "audio" (encoded files) or "text" (strings); and, if there are, "key" (names) and "label" (numbers or
            names of classes).

        Returns:
          Arrays [B, ...] by name: "maps/<method>" (of texts [B, 1, N]) and "scale/<method>", whose product are the
          method's maps, "logits" (or "classes/top5" and "logits/top5"), "prediction", "target" and "label" (-1: none),
          "key", "status" (1 done, 2 skipped) and "reason". An example that cannot be read is skipped.

        Raises:
          InputError: a batch without any of these columns, or that does not fit the model.
        """
        examples = _examples(batch)
        if not examples:
            raise InputError("the batch is empty")
        ready = [future.result()[0] for future in [submit(self.setup, [example], False) for example in examples]]
        size = self.batch_size
        starts = range(0, len(examples), size)
        found = [self.start(examples[i : i + size], ready[i : i + size]).columns() for i in starts]
        for name in [f"maps/{method}" for method in self.methods]:  # those of texts may have several lengths
            longest = max(columns[name].shape[-1] for columns in found)
            for columns in found:
                maps = columns[name]
                columns[name] = np.pad(maps, ((0, 0), (0, 0), (0, longest - maps.shape[-1])))
                columns[name][columns["status"] == SKIPPED] = np.nan
        return {name: np.concatenate([columns[name] for columns in found]) for name in found[0]}

    def start(self, examples: Sequence[Example], ready: Sequence[object], device: int = 0) -> "Started":
        """Begin to compute on a device; `ready` are results of `decode_all` for at most `batch_size` examples."""
        labels = np.array([self.labels[example.label] for example in examples], np.int32)
        reasons = [found if isinstance(found, str) else "" for found in ready]
        good = [i for i, reason in enumerate(reasons) if not reason]
        maps: dict[str, Any] = {}
        details: dict[str, Any] = {}
        if good:
            filled = [*good, *[good[-1]] * (self.batch_size - len(good))]  # batches have one shape
            inputs = self.loaded.preprocessing.stacked([ready[i] for i in filled])
            target = np.maximum(labels[filled], 0) if self.target == "label" else None  # unknown ones are skipped
            place = jax.local_devices()[device]
            maps, details = self.program(self._params[device], *jax.device_put((inputs, self._asked(target)), place))
            maps = {name: as_maps(found) for name, found in maps.items()}
            for array in jax.tree.leaves((maps, details)):
                array.copy_to_host_async()
        return Started(self, [example.key for example in examples], labels, reasons, good, maps, details)

    def _asked(self, classes: np.ndarray | None) -> Any:
        """What is explained: the classes [B], None for the predicted ones, or the score of them."""
        if self.score is None:
            return classes
        asked = question(self.loaded.score(self.score))
        return asked._replace(target=classes) if asked.score.of_class else asked


class Started(NamedTuple):
    """A batch that a device computes; `columns` waits for it."""

    explainer: Explainer
    keys: list[str]
    labels: np.ndarray
    reasons: list[str]
    good: list[int]  # places of the examples that could be read
    maps: dict[str, Any]
    details: dict[str, Any]

    def columns(self) -> dict[str, np.ndarray]:
        """The results by column, one row an example."""
        explainer, reasons, count = self.explainer, [*self.reasons], len(self.keys)
        found = {name: np.asarray(array)[: len(self.good)] for name, array in self.maps.items()}
        logits = np.asarray(self.details["logits"], np.float32)[: len(self.good)] if self.good else None
        checked = {"": logits, **found} if logits is not None else {}
        for name, array in checked.items():
            finite = np.isfinite(array.astype(np.float32)).reshape(len(self.good), -1).all(1)
            why = f"{name} gives no finite map" if name else "the model gives no finite logits"
            for i in np.flatnonzero(~finite):
                reasons[self.good[i]] = reasons[self.good[i]] or why
        if explainer.target == "label":
            for i in self.good:
                if self.labels[i] < 0:
                    reasons[i] = "its label is no class of the model"
        taken = [i for i, place in enumerate(self.good) if not reasons[place]]  # of what was computed
        rows = [self.good[i] for i in taken]  # in the batch
        shapes = {name: array.shape[1:] for name, array in found.items()}
        outputs = explainer.loaded.module.num_classes
        form = layout(shapes, explainer.dtype, explainer.logits, outputs) if shapes else explainer.layout()
        columns = {
            name: np.full((count, *shape), FILL[kind], numpy_type(kind)) for name, (shape, kind) in form.items()
        }
        if logits is not None:
            values = {"prediction": logits.argmax(-1), "target": self.details["target"]}
            if explainer.logits == "all":
                values["logits"] = logits
            elif explainer.logits == "top5":
                best = np.argsort(-logits, kind="stable", axis=1)[:, :TOP]
                values |= {"classes/top5": best, "logits/top5": np.take_along_axis(logits, best, 1)}
            for method, array in found.items():
                values[f"maps/{method}"], values[f"scale/{method}"] = scaled(array, explainer.dtype)
            for name, array in values.items():
                columns[name][rows] = -1 if array is None else np.asarray(array)[taken]
            columns["label"][rows] = self.labels[rows]
        columns["key"][:], columns["reason"][:] = self.keys, [reason[:REASON] for reason in reasons]
        columns["status"][:] = SKIPPED
        columns["status"][rows] = DONE
        return columns


def numpy_type(kind: str) -> Any:
    """NumPy's type of a column."""
    return np.dtype(object if kind == "string" else kind)


def layout(maps: Mapping[str, tuple[int, ...]], dtype: str, logits: str, outputs: int) -> Layout:
    """The columns of results, by the shapes of the maps."""
    few = (min(TOP, outputs),)
    kept: dict[str, Layout] = {
        "all": {"logits": ((outputs,), "float32")},
        "top5": {"classes/top5": (few, "int32"), "logits/top5": (few, "float32")},
        "none": {},
    }
    plain = {
        "key": "string",
        "status": "uint8",
        "reason": "string",
        "label": "int32",
        "prediction": "int32",
        "target": "int32",
    }
    return {
        **{name: ((), kind) for name, kind in plain.items()},
        **{f"maps/{method}": (tuple(shape), dtype) for method, shape in maps.items()},
        **{f"scale/{method}": ((), "float32") for method in maps},
        **kept[logits],
    }


def scaled(maps: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Maps [n, h, w] -> what is stored of them and the scale [n] to multiply it with.

    float32 is stored as it is. For float16, whose range some methods leave by orders of magnitude, each map is divided
    by the power of two that brings its largest value into [1, 2); which rounds nothing.
    """
    maps = maps.astype(np.float32)
    largest = np.abs(maps).max((1, 2), initial=0)
    scale = np.ones_like(largest)
    if dtype == "float16":
        good = np.isfinite(largest) & (largest > 0)
        scale[good] = np.ldexp(np.float32(1), np.frexp(largest[good])[1] - 1)
    return (maps / scale[:, None, None]).astype(dtype), scale


class _Labels(dict[Any, int]):
    """A class of the data, by name or number -> the model's class, -1 where there is none or more than one."""

    def __init__(self, vit: Model, label_map: Mapping[str, str | int]) -> None:
        super().__init__({None: -1})
        self._vit, self._map = vit, label_map

    def __missing__(self, label: int | str) -> int:
        if not isinstance(label, str):
            found = [int(label)] if 0 <= label < self._vit.module.num_classes else []
        elif label in self._map:
            found = [self._vit.class_index(self._map[label])]
        else:
            found = candidates(self._vit, [label])[label]
        self[label] = found[0] if len(found) == 1 else -1
        return self[label]


def _examples(batch: Mapping[str, Any]) -> list[Example]:
    """The rows of a batch. Raises InputError."""
    given = [name for name in COLUMNS if isinstance(batch, Mapping) and name in batch]
    if len(given) != 1:
        raise InputError(f"a batch must be a mapping with one of the columns {', '.join(COLUMNS)}")
    contents = list(batch[given[0]])
    count = len(contents)
    columns = {name: batch.get(name, default) for name, default in (("key", [""] * count), ("label", [None] * count))}
    for name, column in columns.items():
        if len(column) != count:
            raise InputError(f"the batch has {count} rows of {given[0]!r} and {len(column)} of {name!r}")
    labels = [each.item() if isinstance(each, np.generic) else each for each in columns["label"]]
    contents = [each.item() if isinstance(each, np.bytes_ | np.str_) else each for each in contents]
    keys = [str(key) for key in columns["key"]]
    return [Example(*row) for row in zip(keys, contents, labels, strict=True)]


@functools.lru_cache(maxsize=4)
def _loaded(model: Any, checkpoint: Any, img_size: Any, class_names: Any, stamps: tuple[Any, ...]) -> Model:
    """`load`, once in a process, which may unpickle an explainer for every batch. `stamps` are of the files."""
    return load(model, checkpoint, img_size=img_size, class_names=class_names)


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """The size of a file and the time of its last change; zeros for a name."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns
