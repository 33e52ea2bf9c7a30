"""Evaluations: methods x examples -> results per image -> numbers with intervals, resumable at every batch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax import metrics
from tokentm_jax.configs import RANDOM, EvaluateConfig, Row, check
from tokentm_jax.data.labels import read_label_map
from tokentm_jax.data.sources import Source, open_source
from tokentm_jax.errors import InputError
from tokentm_jax.files import reason, require_ours, write_json, write_text
from tokentm_jax.identity import claimed, digest, environment, write_figure
from tokentm_jax.inputs.batches import batches
from tokentm_jax.inputs.reader import Reader
from tokentm_jax.inputs.values import looked_up, of
from tokentm_jax.maths.mixed import linear
from tokentm_jax.maths.scores import Question, Versus, question
from tokentm_jax.methods.explain import compiled
from tokentm_jax.methods.table import METHODS
from tokentm_jax.metrics.task import CLEAN, PREDICTED, TARGET, Fields, Subject, Task, record_types
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.models.classes import translation
from tokentm_jax.models.loading import Model, predict
from tokentm_jax.models.sharding import over_batch
from tokentm_jax.models.vit import init_params
from tokentm_jax.runs.records import EXAMPLES, KEPT, Records, clean_fields, record_file
from tokentm_jax.runs.report import draw, fields_of, markdown, summarise, with_kept_rows
from tokentm_jax.runs.store import Maps


@lru_cache(maxsize=16)
def _clean_program(module: Any, preprocessing: Reader) -> Callable[..., dict[str, Array]]:
    """(params, pixels, labels, question) -> what the model says of whole images; the question is None, or has no
    target yet."""

    def program(params: Any, pixels: Array, labels: Array, asked: Question | None) -> dict[str, Array]:
        logits = predict(module, preprocessing, params, preprocessing.unit(pixels))
        predicted = logits.argmax(-1).astype(jnp.int32)
        target = predicted if asked is None else asked._replace(target=predicted)
        return {"predicted": predicted, "label": labels, **metrics.scores(logits, target, labels)}

    return jax.jit(program)


def _subject(module: Any, reader: Reader, params: Any, batch: Any, target: metrics.Target, labels: Array) -> Subject:
    """A batch of a data set as what is measured."""
    inputs = looked_up(reader.unit(batch), module, params)
    grid = module.grid or (1, of(inputs).values.shape[1])
    blank = reader.blank(module, params)
    return Subject(inputs, target, labels, grid=grid, mean=blank, tiling=getattr(module, "tiling", None))


Options = tuple[tuple[str, Any], ...]


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
    """(params, pixels, target, labels, masks, maps, original, reference, shared, own) -> results per image: everything
    from map to score.

    Masks, `original`, `reference` and `shared` are None where the task has no use for them. For a task that explains,
    `row` is the method, or None for maps that no image changes, and `own` are its parameters. With `by_patch`, maps
    finer than the patches become means over them. With `mixed` the model answers in mixed precision, but is explained
    as ever.
    """
    explained = None if row is None else compiled(module, {row[0]: dict(row[1])}, preprocessing=None)

    def program(
        params: Any,
        pixels: Array,
        target: metrics.Target,
        labels: Array,
        masks: Any,
        maps: Array,
        original: Any,
        reference: Any,
        shared: Any,
        own: Any,
    ) -> dict[str, Array]:
        subject = _subject(module, preprocessing, params, pixels, target, labels)

        def ready(maps: Array) -> Array:
            maps = jnp.where(jnp.isfinite(maps), maps, 0).reshape(len(maps), -1, maps.shape[-1])
            return metrics.coarsened(maps, subject.grid, subject.tiling) if by_patch else maps

        def explain(images: Array) -> Array:
            if explained is None or row is None:
                return given
            return ready(explained(own, preprocessing.normalise(images), target)[0][row[0]])

        finite, given = jnp.isfinite(maps).all(tuple(range(1, maps.ndim))), ready(maps)
        original = None if original is None else ready(original)
        subject = subject._replace(masks=masks, original=original, reference=reference, shared=shared)
        subject = subject._replace(explain=explain if task.explains else None)
        measured = given if task.raw else preprocessing.to_pixels(given, subject.inputs, module)
        model = partial(predict, module.clone(linear=linear) if mixed else module, preprocessing, params)
        return {"finite": finite, **task.compute(model, subject, measured, **dict(options))}

    return jax.jit(program)


@lru_cache(maxsize=16)
def _shared_program(
    module: Any, preprocessing: Reader, task: Task, options: Options, mixed: bool
) -> Callable[..., Any]:
    """(params, pixels, target, labels) -> what the task needs of the images, and no map changes."""
    shared = task.shared
    assert shared is not None

    def program(params: Any, pixels: Array, target: metrics.Target, labels: Array) -> Any:
        subject = _subject(module, preprocessing, params, pixels, target, labels)
        model = partial(predict, module.clone(linear=linear) if mixed else module, preprocessing, params)
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

    def clean(self, pixels: Array, labels: Array) -> dict[str, Array]:
        """What the model says of whole images, and what is followed of the predicted class."""
        return _clean_program(*self._model)(self.vit.params, pixels, labels, self.asked)

    def target(self, classes: Array) -> metrics.Target:
        """What is explained, and followed: the classes [B], or the config's score of them."""
        return classes if self.asked is None else self.asked._replace(target=classes)

    def place(self, array: Any) -> Array:
        """An array with a leading batch axis, on all devices if they divide the batch."""
        return jax.device_put(array, self._sharding)

    def maps(self, row: Row, keys: Sequence[str], pixels: Array, classes: Array) -> tuple[Array, Array | None]:
        """The row's maps of a batch and, for a task that compares them, those without random blocks."""
        seed, compares = self.config.seed, self.task.against_original
        if row.method == RANDOM:
            reader, of_pixels = self.vit.preprocessing, bool(row.options.get("pixels"))
            noise = [reader.noise(keys, s, self.vit.module, pixels, of_pixels) for s in (seed, seed + 1)]
            return self.place(noise[0]), self.place(noise[1]) if compares else None
        program = compiled(self.vit.module, {row.method: row.options}, preprocessing=self.vit.preprocessing)
        target = self.target(classes)
        maps = program(self._params(row), pixels, target)[0][row.method]
        return maps, program(self.vit.params, pixels, target)[0][row.method] if compares else None

    def _params(self, row: Row) -> Any:
        if row.random_blocks is None:
            return self.vit.params
        if self._fresh is None:
            self._fresh = init_params(self.vit.module, jax.random.key(self.config.seed))
        return randomised(self.vit.params, self._fresh, row.random_blocks)  # made anew: all of them may not fit

    def score(self, row: Row, pixels: Array, classes: Array, *others: Any) -> dict[str, Array]:
        """Results per image of the row's maps; `others` are labels, masks, maps, original, reference and what
        is shared."""
        explained, own = None, None
        if self.task.explains and row.method != RANDOM:
            suited = METHODS[row.method].suited(row.options, self.vit.preprocessing)
            explained, own = (row.method, tuple(sorted(suited.items()))), self._params(row)
        options = tuple(sorted(self._options["compute"].items()))
        mixed = self.config.mixed_precision
        program = _score_program(*self._model, self.task, options, explained, row.by_patch, mixed)
        return program(self.vit.params, pixels, self.target(classes), *others, own)

    def shared(self, pixels: Array, classes: Array, labels: Array) -> Any:
        """What the task's `shared` gives for a batch, None where it has none."""
        if self.task.shared is None:
            return None
        options = tuple(sorted(self._options["shared"].items()))
        program = _shared_program(*self._model, self.task, options, self.config.mixed_precision)
        return program(self.vit.params, pixels, self.target(classes), labels)

    def _reference(self) -> Callable[..., Any]:
        methods = {self.task.reference: self._options["reference"]}
        return compiled(self.vit.module, methods, details=("standard_error",), preprocessing=self.vit.preprocessing)

    def reference_fields(self) -> Fields:
        """What stands in the records of the maps of the task's `reference`."""
        pixels = self.vit.preprocessing.batch(1)
        classes = jax.ShapeDtypeStruct((1,), jnp.int32)
        maps, _ = jax.eval_shape(self._reference(), self.vit.params, pixels, classes)
        shape = (1, 1, *maps[self.task.reference].shape[1:])[-2:]
        return record_types(dict.fromkeys(("map", "standard_error"), jax.ShapeDtypeStruct((1, *shape), jnp.float32)))

    def reference(self, pixels: Array, classes: Array) -> dict[str, Array]:
        """Maps of the task's `reference`, and their standard errors: each [B, h, w]."""
        maps, errors = self._reference()(self.vit.params, pixels, self.target(classes))
        found = {"map": maps[self.task.reference], **errors}
        return {name: a.reshape(len(a), -1, a.shape[-1]) for name, a in found.items()}


class Job(NamedTuple):
    """An example with a class to explain."""

    key: str
    explained: str
    index: int
    label: int
    explained_class: int


Report = Callable[[int, int, Callable[[], list[dict[str, Any]]]], None]


RESULTS = ("results.json", "results.md", "curves.png")


def examples(config: EvaluateConfig) -> Source:
    """The data that an evaluation is of. InputError as for `open_source`."""
    seed = None if config.limit is None else config.seed
    return open_source(config.data, limit=config.limit, seed=seed, half=config.half, names=config.names)


def evaluate(
    config: EvaluateConfig,
    vit: Model,
    source: Source,
    out: Path,
    report: Report | None = None,
    maps: Sequence[Maps] = (),
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run an evaluation to its end, or from where `out` stopped on; returns the content of `results.json`.

    Rows that an earlier run left in `out`, and that the config does not have, stay in the results.

    Args:
      config: what to compute on `vit` and `source`, which stand for its `model`, `checkpoint`, `data`, `limit`,
        `half` and `names`.
      out: a folder, for the results and, in `records`, the results per image of every finished batch.
      report: called after every batch with (done, total, a function that gives the rows so far).
      maps: stores of this model and data set that maps are taken from; those that none has are computed.
      overwrite: also replace files in `out` that this program did not write.

    Raises:
      InputError: a config, data set, model and maps that do not go together, a full disk, or an `out` that holds
        another evaluation, one by other versions or on another device, files of others, or a run that is going on.
    """
    config = check(config)
    config = dataclasses.replace(config, label_map=read_label_map(config.label_map))
    if not any(row.method == RANDOM and not row.options.get("pixels") for row in config.rows):
        config = dataclasses.replace(config, rows=(*config.rows, Row(RANDOM, RANDOM)))
    task = TASKS[config.task]
    if task.needs and not {"labels": source.labelled, "masks": source.masked}[task.needs]:
        without = ", ".join(name for name, other in TASKS.items() if not other.needs)
        raise InputError(
            f"{source.name} has no {task.needs}, which the task {config.task!r} needs; tasks without: {without}"
        )
    regular = vit.preprocessing.regular
    if task.regular not in (None, regular):
        raise InputError(f"the task {config.task!r} is not for {vit.preprocessing.kind}s, which {vit.name} takes")
    for row in config.rows:
        if row.by_patch and not regular:
            raise InputError(f"by_patch is for maps of pixels, and {row.name!r} has it for {vit.preprocessing.kind}s")
        if row.random_blocks is not None and not 0 <= row.random_blocks <= vit.module.depth:
            raise InputError(f"random_blocks of {row.name!r} must be from 0 to {vit.module.depth} for {vit.name}")
    if config.mixed_precision and not hasattr(vit.module, "linear"):
        raise InputError(
            f"mixed_precision needs a module with the field 'linear', as tm.ViT has, and {vit.name} has none"
        )
    vit.require_classes() if config.score is None else vit.score(config.score)
    translate = translation(vit, source, config.label_map)
    run = describe(config, vit, source)
    if maps or task.reference:  # which have one shape
        vit = dataclasses.replace(vit, preprocessing=vit.preprocessing.fixed(source))
    if maps:
        run["maps"] = [_check_maps(store, run, config, vit) for store in maps]
    with claimed(out, _terms(run), (*RESULTS, "records"), overwrite):
        return _evaluate(config, vit, source, out, translate, run, report, maps, overwrite)


def _terms(run: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on. Not the rows, which have files of their own; nor the limit, the half and
    the batch size: an image's results do not depend on the others, and smaller batches mend a lack of memory."""
    config, made = run["config"], {name: run[name] for name in ("data", "model", "classes", "versions", "device")}
    names = ("task", "profile", "options", "seed", "score", "label_map", "mixed_precision")
    same = {name: config[name] for name in names if name in config}
    rounded = any(store["dtype"] == "float16" for store in run.get("maps", ()))  # not mixed with exact maps
    return {**same, "maps": "float16" if rounded else "exact", **made}


def _evaluate(
    config: EvaluateConfig,
    vit: Model,
    source: Source,
    out: Path,
    translate: np.ndarray | None,
    run: dict[str, Any],
    report: Report | None,
    maps: Sequence[Maps],
    overwrite: bool,
) -> dict[str, Any]:
    """`evaluate` in a folder that is held."""
    task = TASKS[config.task]
    for name in RESULTS:
        require_ours(out / name, overwrite)
    whole = with_kept_rows(config, out)
    try:
        (out / "records").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{out / 'records'} cannot be written: {reason(error)}") from None
    programs, fields, skipped = Programs(config, vit), fields_of(config), {}
    clean = _predictions(programs, source, translate, out, skipped)
    jobs = _jobs(config, source, clean, programs.asked)
    if not jobs:
        raise InputError(f"{source.name} has no image that can be read: {next(iter(skipped.values()), 'it is empty')}")
    keys = [job.key for job in jobs if job.explained == PREDICTED]
    records = {row.name: Records(record_file(out, row), fields) for row in whole.rows}
    references = None
    if task.reference:
        references = Records(out / "records" / "reference.jsonl", programs.reference_fields())

    # Groups do not depend on what is done already, so an interrupted run computes the very same batches.
    size = config.batch_size
    groups = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    groups = [group for group in groups if any(_open(row, records[row.name], group) for row in config.rows)]
    indices = [job.index for group in groups for job in group]
    stream = batches(source, vit.preprocessing, size, config.profile, indices=indices, skipped=skipped)
    for number, (group, batch) in enumerate(zip(groups, stream, strict=True)):
        group = [job for job in group if job.key in batch.keys]  # a file may have gone in the meantime
        if not group:
            continue
        full = group + group[-1:] * (size - len(group))
        pixels, masks = programs.place(batch.inputs), None
        if task.needs == "masks":
            masks = programs.place(batch.masks)
        classes = programs.place(np.array([job.explained_class for job in full], np.int32))
        labels = programs.place(np.array([job.label for job in full], np.int32))
        reference = None
        if references is not None:
            reference = _kept_reference(programs, references, group, full, pixels, classes)
        shared = programs.shared(pixels, classes, labels)
        for row in config.rows:
            places = _open(row, records[row.name], group)
            if places:
                taken, stored = _stored(maps, config, row, group, places)
                if len(taken) < len(places):
                    heatmaps, original = programs.maps(row, [job.key for job in full], pixels, classes)
                else:
                    heatmaps, original = np.zeros((size, *stored.shape[1:]), np.float32), None
                if taken:
                    heatmaps = np.array(heatmaps)
                    heatmaps[taken] = stored
                    heatmaps = programs.place(heatmaps)
                found = programs.score(row, pixels, classes, labels, masks, heatmaps, original, reference, shared)
                found = {name: np.asarray(array)[places] for name, array in found.items()}
                _require_finite(found, [group[i].key for i in places], f"{vit.name} on changed images ({row.name})")
                records[row.name].append([(group[i].key, group[i].explained) for i in places], found)
        if report is not None:
            report(number + 1, len(groups), lambda: summarise(config, clean, records, keys, final=False))

    run["skipped"] = {"count": len(skipped), "examples": dict(sorted(skipped.items())[:20])}
    run["config"] |= {name: settings_of(whole)[name] for name in ("rows", "paper")}
    results = {"rows": summarise(whole, clean, records, keys), "run": run}
    write_json(out / EXAMPLES, keys, KEPT, overwrite=True)  # a list has no mark, and the folder is claimed
    write_json(out / "results.json", results, KEPT, overwrite=overwrite)
    write_text(out / "results.md", markdown(results), KEPT, overwrite=overwrite)
    write_figure(draw(whole, clean, records, keys), out / "curves.png", KEPT, overwrite=overwrite)
    return results


def _kept_reference(
    programs: Programs, kept: Records, group: Sequence[Job], full: Sequence[Job], pixels: Array, classes: Array
) -> Array:
    """The reference's maps of the jobs [B, h, w], from the records, where those that were missing are put first."""
    missing = [i for i, job in enumerate(group) if (job.key, job.explained) not in kept.places]
    if missing:
        found = {name: np.asarray(array)[missing] for name, array in programs.reference(pixels, classes).items()}
        _require_finite(found, [group[i].key for i in missing], f"{programs.vit.name} ({programs.task.reference})")
        kept.append([(group[i].key, group[i].explained) for i in missing], found)
    maps = kept.take("map", [(job.key, job.explained) for job in full])
    return programs.place(maps.astype(np.float32))


def _require_finite(found: Mapping[str, np.ndarray], keys: Sequence[str], what: str) -> None:
    """Raises InputError that names the first example for which a number is not finite."""
    for array in found.values():
        finite = np.isfinite(array.astype(np.float64)).reshape(len(keys), -1).all(1)
        if not finite.all():
            raise InputError(f"{what} gives no finite numbers for {keys[int(finite.argmin())]}")


def _predictions(
    programs: Programs, source: Source, translate: np.ndarray | None, out: Path, skipped: dict[str, str]
) -> Records:
    """The model's own predictions: they say which classes there are to explain."""
    vit, config = programs.vit, programs.config
    clean = Records(out / "records" / "clean.jsonl", clean_fields(programs.asked is not None), (CLEAN,))
    indices = [i for i, key in enumerate(source.keys) if (key, CLEAN) not in clean.places]
    stream = batches(source, vit.preprocessing, config.batch_size, config.profile, indices=indices, skipped=skipped)
    for batch in stream:
        count = len(batch.keys)
        if not count:
            continue
        labels = batch.labels if translate is None else translate[batch.labels]
        for key, label in zip(batch.keys, labels, strict=False):
            if label >= vit.module.num_classes or (label < 0 and source.labelled):
                classes = f"{vit.name} has classes 0 to {vit.module.num_classes - 1}"
                raise InputError(f"{source.name}: {key} has the label {label}, and {classes}")
        found = programs.clean(programs.place(batch.inputs), programs.place(labels))
        fields = {name: np.asarray(array)[:count] for name, array in found.items()}
        _require_finite(fields, batch.keys, vit.name)
        clean.append([(key, CLEAN) for key in batch.keys], fields)
    return clean


def _jobs(config: EvaluateConfig, source: Source, clean: Records, asked: Question | None) -> list[Job]:
    """All predicted classes, then, if wanted, the targets that are other classes.

    No class is compared with itself: an image of which one is the other class of a `Versus` is left out of every row.
    """
    good = [i for i, key in enumerate(source.keys) if (key, CLEAN) in clean.places]
    if not good:
        return []
    own = [(source.keys[i], CLEAN) for i in good]
    predicted, labels = clean.take("predicted", own).tolist(), clean.take("label", own).tolist()
    targets = TARGET in config.explained and any(row.class_specific for row in config.rows)
    examples = list(zip(good, predicted, labels, strict=True))
    if asked is not None and isinstance(asked.score, Versus):
        other = asked.score.other
        examples = [(i, c, y) for i, c, y in examples if other not in ((c, y) if targets else (c,))]
    if not examples:
        raise InputError(
            f"the score {config.score!r} leaves out the images of its class, and {source.name} has no other"
        )
    if source.sizes is not None:
        sizes = source.sizes
        examples.sort(key=lambda example: sizes[example[0]])
    jobs = [Job(source.keys[i], PREDICTED, i, y, c) for i, c, y in examples]
    if targets:
        jobs += [Job(source.keys[i], TARGET, i, y, y) for i, c, y in examples if c != y]
    return jobs


def _open(row: Row, records: Records, group: Sequence[Job]) -> list[int]:
    """Places of the jobs that the row still has to do."""
    return [
        i
        for i, job in enumerate(group)
        if (job.key, job.explained) not in records.places and (job.explained == PREDICTED or row.class_specific)
    ]


def _check_maps(maps: Maps, run: Mapping[str, Any], config: EvaluateConfig, vit: Model) -> dict[str, Any]:
    """What the results say of stored maps. InputError for those of another model, data set, profile or shape."""
    made = maps.provenance
    for what in ("model", "data"):
        if made[what]["identity"] != run[what]["identity"]:
            raise InputError(
                f"{maps.path} holds maps of {made[what]['name']}, not of {run[what]['name']} as it is here"
            )
    if made["profile"] != run["config"]["profile"]:
        raise InputError(
            f"{maps.path} was made with the profile {made['profile']!r}, not {run['config']['profile']!r}"
        )
    if made.get("score") != config.score:
        raise InputError(f"{maps.path} was made with the score {made.get('score')!r}, not {config.score!r}")
    inputs, classes = vit.preprocessing.batch(1), jax.ShapeDtypeStruct((1,), jnp.int32)
    for row in config.rows:
        if maps.has(row.method, row.options):
            program = compiled(vit.module, {row.method: row.options}, preprocessing=vit.preprocessing)
            shape = jax.eval_shape(program, vit.params, inputs, classes)[0][row.method].shape
            expected = [1, *shape[1:]][-2:]
            if [*maps.maps[row.method].shape[1:]] != expected:
                found = f"holds maps {list(maps.maps[row.method].shape[1:])} of {row.method!r}"
                raise InputError(f"{maps.path} {found}, expected {expected} for {vit.name}")
    return {"store": maps.path, **{name: made[name] for name in ("methods", "options", "target", "dtype", "versions")}}


def _stored(
    maps: Sequence[Maps], config: EvaluateConfig, row: Row, group: Sequence[Job], places: Sequence[int]
) -> tuple[list[int], np.ndarray]:
    """Those places of the group whose maps are stored, and these maps [k, h, w]."""
    taken: list[int] = []
    parts: list[np.ndarray] = []
    own = row.random_blocks is not None or TASKS[config.task].against_original  # are made anew
    for store in () if own else maps:
        missing = [i for i in places if i not in taken]
        if missing and store.has(row.method, row.options):
            jobs = [group[i] for i in missing]
            wanted = [(job.key, job.explained_class if row.class_specific else None) for job in jobs]
            found, stored = store.find(row.method, row.options, wanted)
            taken += [missing[i] for i in found]
            parts.append(stored)
    return taken, np.concatenate(parts) if taken else np.empty((0, 1, 1), np.float32)


@jax.jit
def randomised(params: Any, fresh: Any, blocks: Array | int) -> Any:
    """Parameters with the head, and the last `blocks` blocks, taken from `fresh`."""
    heads = {name: value for name, value in fresh.items() if name.startswith("head")}

    def mix(old: Array, new: Array) -> Array:
        depth = len(old)
        last = jnp.arange(depth) >= depth - blocks
        return jnp.where(last.reshape(depth, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)

    return {**params, **heads, "blocks": jax.tree.map(mix, params["blocks"], fresh["blocks"])}


def describe(config: EvaluateConfig, vit: Model, source: Source) -> dict[str, Any]:
    """The `run` object of the results. It has no times, so that equal runs give equal files."""
    return {
        **environment(),
        "seed": config.seed,
        "config": settings_of(config),
        "data": {"name": source.name, "identity": source.identity, "examples": len(source)},
        "model": vit.described(),
        "classes": digest(vit.class_names, vit.wnids),
    }


def settings_of(config: EvaluateConfig) -> dict[str, Any]:
    """The config as JSON."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings["rows"] = [dataclasses.asdict(row) for row in config.rows]
    settings["paper"] = [[row, metric, value] for (row, metric), value in config.paper.items()]
    settings["options"] = dict(config.options)
    return settings
