"""The compiled programs of one evaluation: predictions, maps, and from maps to results per example."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax import metrics
from tokentm_jax.configs import BASELINES, DISTANCE, RANDOM, EvaluateConfig, Row
from tokentm_jax.inputs.reader import Reader, nearness
from tokentm_jax.inputs.values import as_maps, looked_up, of
from tokentm_jax.maths.mixed import linear
from tokentm_jax.maths.scores import Question, Versus, question
from tokentm_jax.methods.explain import compiled, compiled_rows
from tokentm_jax.methods.sharing import grouped
from tokentm_jax.methods.table import METHODS
from tokentm_jax.metrics.task import Fields, Subject, Task, record_types
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.models.loading import Model, predict
from tokentm_jax.models.sharding import over_batch
from tokentm_jax.models.vit import init_params

Options = tuple[tuple[str, Any], ...]


@lru_cache(maxsize=16)
def _clean_program(
    module: Any, preprocessing: Reader, counts: Callable[..., Array] | None, options: Options
) -> Callable[..., dict[str, Array]]:
    """(params, batch, question) -> predictions for whole examples; the question is None, or has no target yet.
    `counts` and its options are those of the task."""

    def program(params: Any, batch: Measured, asked: Question | None) -> dict[str, Array]:
        subject = _subject(module, preprocessing, params, batch, batch.labels)
        answers = partial(predict, module, preprocessing, params)
        logits = answers(subject.inputs)
        predicted = logits.argmax(-1).astype(jnp.int32)
        target = predicted if asked is None else asked_of(asked, predicted, batch.others)
        counted = {"counted": counts(answers, subject, logits, **dict(options))} if counts else {}
        found = metrics.scores(logits, target, batch.labels)
        return {"predicted": predicted, "label": batch.labels, **found, **counted}

    return jax.jit(program)


class Measured(NamedTuple):
    """A batch of a data set, and what a task asks of it; None for what it does not use."""

    pixels: Any
    labels: Array
    masks: Array | None = None
    without: Any = None
    others: Array | None = None


def asked_of(asked: Question, classes: Array, others: Array | None) -> Question:
    """A question about classes [B], and not those of the examples without their causes [B], where it asks so."""
    if others is not None and isinstance(asked.score, Versus):
        asked = asked._replace(score=asked.score.of_examples(others))
    return asked._replace(target=classes)


def _measurable(module: Any, reader: Reader, params: Any, pixels: Any) -> Any:
    """A reader's arrays as what is changed: images in [0, 1], and of texts the embeddings, with those of an image."""
    found = reader.unit(pixels)
    return looked_up(reader.normalise(found), module, params) if hasattr(found, "look_up") else found


def _subject(module: Any, reader: Reader, params: Any, batch: Measured, target: metrics.Target) -> Subject:
    """A batch of a data set as what is measured."""
    inputs = _measurable(module, reader, params, batch.pixels)
    without = None if batch.without is None else _measurable(module, reader, params, batch.without)
    grid = module.grid or (1, of(inputs).values.shape[1])
    tiling, blank = getattr(module, "tiling", None), reader.blank(module, params)
    return Subject(
        *(inputs, target, batch.labels, batch.masks, without),
        grid=grid,
        mean=blank,
        tiling=tiling,
        others=batch.others,
    )


def _answers(module: Any, reader: Reader, params: Any, mixed: bool) -> metrics.Predict:
    """What changed inputs are answered by, perhaps in mixed precision."""
    return partial(predict, module.clone(linear=linear) if mixed else module, reader, params)


@lru_cache(maxsize=64)
def _score_program(
    module: Any,
    preprocessing: Reader,
    task: Task,
    options: Options,
    row: tuple[str, Options] | None,
    by_patch: bool,
    mixed: bool,
) -> Callable[..., dict[str, Array]]:
    """(params, batch, target, maps, original, reference, shared, own) -> results per image: everything from map to
    score.

    `original`, `reference` and `shared` are None if the task does not use them. For a task that explains,
    `row` is the method, or None for maps that no image changes, and `own` are its parameters. With `by_patch`, maps
    finer than the patches become means over them. With `mixed` the model answers in mixed precision, but is explained
    as ever.
    """
    explained = None if row is None else compiled(module, {row[0]: dict(row[1])}, preprocessing=None)

    def program(
        params: Any,
        batch: Measured,
        target: metrics.Target,
        maps: Array,
        original: Any,
        reference: Any,
        shared: Any,
        own: Any,
    ) -> dict[str, Array]:
        subject = _subject(module, preprocessing, params, batch, target)

        def ready(maps: Array) -> Array:
            maps = as_maps(jnp.where(jnp.isfinite(maps), maps, 0))
            return metrics.coarsened(maps, subject.grid, subject.tiling) if by_patch else maps

        def explain(images: Array) -> Array:
            if explained is None or row is None:
                return given
            return ready(explained(own, preprocessing.normalise(images), target)[0][row[0]])

        finite, given = jnp.isfinite(maps).all(tuple(range(1, maps.ndim))), ready(maps)
        original = None if original is None else ready(original)
        subject = subject._replace(original=original, reference=reference, shared=shared)
        subject = subject._replace(explain=explain if task.explains else None)
        measured = given if task.raw else preprocessing.to_pixels(given, subject.inputs, module)
        model = _answers(module, preprocessing, params, mixed)
        return {"finite": finite, **task.compute(model, subject, measured, **dict(options))}

    return jax.jit(program)


@lru_cache(maxsize=16)
def _shared_program(
    module: Any, preprocessing: Reader, task: Task, options: Options, mixed: bool
) -> Callable[..., Any]:
    """(params, batch, target) -> what the task needs of the images, and no map changes."""
    shared = task.shared
    assert shared is not None

    def program(params: Any, batch: Measured, target: metrics.Target) -> Any:
        subject = _subject(module, preprocessing, params, batch, target)
        model = _answers(module, preprocessing, params, mixed)
        return shared(model, subject, **dict(options))

    return jax.jit(program)


class Programs:
    """The compiled programs of one evaluation, and where their arrays go. `pixels` are uint8 [B, H, W, C]."""

    def __init__(self, config: EvaluateConfig, vit: Model) -> None:
        self.config, self.vit = config, vit
        self._model: Any = (vit.module, vit.preprocessing)
        self.asked = None if config.score is None else question(vit.score(config.score))
        self.task = TASKS[config.task]
        self._options = self.task.check(config.task, config.options)
        self._fresh: Any = None  # random parameters
        devices, batch = jax.devices(), config.batch_size
        self._sharding = None
        if len(devices) > 1 and batch % len(devices) == 0:
            self._sharding = over_batch(devices)

    def clean(self, batch: Measured) -> dict[str, Array]:
        """Predictions for whole examples, and what is followed of the predicted class."""
        options = tuple(sorted(self._options["counts"].items()))
        program = _clean_program(*self._model, self.task.counts, options)
        return program(self.vit.params, batch, self.asked)

    def target(self, classes: Array, others: Array | None) -> metrics.Target:
        """What is explained, and followed: the classes [B], or the config's score of them."""
        return classes if self.asked is None else asked_of(self.asked, classes, others)

    def place(self, array: Any) -> Array:
        """An array with a leading batch axis, on all devices if they divide the batch."""
        return jax.device_put(array, self._sharding)

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows in order, those together whose maps one pass can give: of one model, perhaps with random blocks."""
        found: list[list[Row]] = []
        for random_blocks in dict.fromkeys(row.random_blocks for row in rows):
            own = {row.name: row for row in rows if row.random_blocks == random_blocks}
            known = {name: row for name, row in own.items() if row.method not in BASELINES}
            members = {name: METHODS[row.method].member(name, row.options) for name, row in known.items()}
            found += [[own[name] for name in names] for names in grouped(members)]
            found += [[row] for name, row in own.items() if name not in known]
        return found

    def maps(
        self, rows: Sequence[Row], keys: Sequence[str], pixels: Array, target: metrics.Target
    ) -> dict[str, tuple[Array, Array | None]]:
        """The maps of a batch by one of the `groups` of rows and, for a task that compares them, those without random
        blocks."""
        seed, compares = self.config.seed, self.task.against_original
        row = rows[0]
        if row.method == DISTANCE:
            texts: Any = pixels
            return {row.name: (self.place(nearness(texts.mask)), None)}
        if row.method == RANDOM:
            reader, of_pixels = self.vit.preprocessing, bool(row.options.get("pixels"))
            noise = [reader.noise(keys, s, self.vit.module, pixels, of_pixels) for s in (seed, seed + 1)]
            return {row.name: (self.place(noise[0]), self.place(noise[1]) if compares else None)}
        own = {each.name: (each.method, each.options) for each in rows}
        program = compiled_rows(self.vit.module, own, preprocessing=self.vit.preprocessing)
        maps = program(self._params(row), pixels, target)[0]
        original = program(self.vit.params, pixels, target)[0] if compares else dict.fromkeys(own)
        return {name: (maps[name], original[name]) for name in own}

    def _params(self, row: Row) -> Any:
        if row.random_blocks is None:
            return self.vit.params
        if self._fresh is None:
            self._fresh = init_params(self.vit.module, jax.random.key(self.config.seed))
        return randomised(self.vit.params, self._fresh, row.random_blocks)  # made again: all of them may not fit

    def score(self, row: Row, batch: Measured, target: metrics.Target, *others: Any) -> dict[str, Array]:
        """Results per image of the row's maps; `others` are maps, original, reference and what is shared."""
        explained, own = None, None
        if self.task.explains and row.method not in BASELINES:
            suited = METHODS[row.method].suited(row.options, self.vit.preprocessing)
            explained, own = (row.method, tuple(sorted(suited.items()))), self._params(row)
        options = tuple(sorted(self._options["compute"].items()))
        mixed = self.config.mixed_precision
        program = _score_program(*self._model, self.task, options, explained, row.by_patch, mixed)
        return program(self.vit.params, batch, target, *others, own)

    def shared(self, batch: Measured, target: metrics.Target) -> Any:
        """What the task's `shared` gives for a batch, None where it has none."""
        if self.task.shared is None:
            return None
        options = tuple(sorted(self._options["shared"].items()))
        program = _shared_program(*self._model, self.task, options, self.config.mixed_precision)
        return program(self.vit.params, batch, target)

    def _reference(self) -> Callable[..., Any]:
        methods = {self.task.reference: self._options["reference"]}
        return compiled(self.vit.module, methods, details=("standard_error",), preprocessing=self.vit.preprocessing)

    def reference_fields(self) -> Fields:
        """The types in the records of the maps of the task's `reference`."""
        pixels = self.vit.preprocessing.batch(1)
        classes = jax.ShapeDtypeStruct((1,), jnp.int32)
        maps, _ = jax.eval_shape(self._reference(), self.vit.params, pixels, classes)
        found = jax.eval_shape(as_maps, maps[self.task.reference])
        return record_types(dict.fromkeys(("map", "standard_error"), found))

    def reference(self, pixels: Array, target: metrics.Target) -> dict[str, Array]:
        """Maps of the task's `reference`, and their standard errors: each [B, h, w]."""
        maps, errors = self._reference()(self.vit.params, pixels, target)
        return jax.tree.map(as_maps, {"map": maps[self.task.reference], **errors})


@jax.jit
def randomised(params: Any, fresh: Any, blocks: Array | int) -> Any:
    """Parameters with the head, and the last `blocks` blocks, taken from `fresh`."""
    heads = {name: value for name, value in fresh.items() if name.startswith("head")}

    def mix(old: Array, new: Array) -> Array:
        depth = len(old)
        last = jnp.arange(depth) >= depth - blocks
        return jnp.where(last.reshape(depth, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)

    return {**params, **heads, "blocks": jax.tree.map(mix, params["blocks"], fresh["blocks"])}
