"""Evaluations: methods x examples -> results per image -> numbers with intervals, resumable at every batch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.configs import DISTANCE, RANDOM, EvaluateConfig, Row, check
from tokentm_jax.data.examples import Source
from tokentm_jax.data.labels import read_label_map
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.files import reason, require_ours, write_json, write_text
from tokentm_jax.identity import claimed, digest, environment, write_figure
from tokentm_jax.inputs.batches import Batch, batches
from tokentm_jax.inputs.values import as_maps
from tokentm_jax.maths.scores import Question, Versus
from tokentm_jax.methods.explain import compiled
from tokentm_jax.metrics.task import CLEAN, PREDICTED, TARGET, Target
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.models.classes import translation
from tokentm_jax.models.generation import next_words
from tokentm_jax.models.loading import AGAINST, Model, load
from tokentm_jax.runs.maps import Maps
from tokentm_jax.runs.programs import Measured, Programs
from tokentm_jax.runs.records import EXAMPLES, KEPT, Records, clean_fields, record_file
from tokentm_jax.runs.report import draw, fields_of, markdown, summarise, with_kept_rows


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
    vit: Model | None = None,
    source: Source | None = None,
    out: str | Path | None = None,
    report: Report | None = None,
    maps: Sequence[Maps] = (),
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run an evaluation to its end, or from where `out` stopped on.

    Rows that an earlier run left in `out`, and that the config does not have, stay in the results.

    Args:
      config: what to compute.
      vit: the model; None for the config's `model` and `checkpoint`.
      source: the data; None for the config's `data`, `limit`, `half` and `names`.
      out: a folder for the results and, in `records`, the results per image of every finished batch; None for
        `runs/NAME`.
      report: called after every batch with (done, total, a function that gives the rows so far).
      maps: stores of this model and data set that maps are taken from; those that none has are computed.
      overwrite: also replace files in `out` that this program did not write.

    Returns:
      The content of `results.json`.

    Raises:
      InputError: a config, data set, model and maps that do not go together, a full disk, or an `out` that holds
        another evaluation, one by other versions or on another device, files of others, or a run that is going on.
    """
    config = check(config)
    source = examples(config) if source is None else source
    vit = next_words(load(config.model, config.checkpoint) if vit is None else vit)
    out = Path("runs", config.name) if out is None else Path(out)
    config = dataclasses.replace(config, label_map=read_label_map(config.label_map))
    if not any(row.method == RANDOM and not row.options.get("pixels") for row in config.rows):
        config = dataclasses.replace(config, rows=(*config.rows, Row(RANDOM, RANDOM)))
    task = TASKS[config.task]
    present = {"labels": source.labelled, "masks": source.masked, "parts": source.parts}
    for needs in filter(None, (task.needs, "labels" if TARGET in task.explained else "")):
        if not present[needs]:
            without = ", ".join(name for name, other in TASKS.items() if not other.needs)
            raise InputError(
                f"{source.name} has no {needs}, which the task {config.task!r} needs; tasks without: {without}"
            )
    regular = vit.preprocessing.regular
    if task.regular not in (None, regular):
        raise InputError(f"the task {config.task!r} is not for {vit.preprocessing.kind}s, which {vit.name} takes")
    for row in config.rows:
        if row.by_patch and not regular:
            raise InputError(f"by_patch is for maps of pixels, and {row.name!r} has it for {vit.preprocessing.kind}s")
        if row.method == DISTANCE and regular:
            raise InputError(f"{row.name!r} is for texts, and {vit.name} takes {vit.preprocessing.kind}s")
        if row.random_blocks is not None and not 0 <= row.random_blocks <= vit.module.depth:
            raise InputError(f"random_blocks of {row.name!r} must be from 0 to {vit.module.depth} for {vit.name}")
    if config.mixed_precision and not hasattr(vit.module, "linear"):
        raise InputError(
            f"mixed_precision needs a module with the field 'linear', as tm.models.ViT has, and {vit.name} has none"
        )
    vit.require_classes() if config.score is None else vit.score(config.score)
    translate = translation(vit, source, config.label_map)
    run = describe(config, vit, source)
    if maps or task.reference:  # which have one shape
        vit = dataclasses.replace(vit, preprocessing=vit.preprocessing.fixed(source))
    if maps:
        run["maps"] = [_check_maps(store, run, config, vit, source) for store in maps]
    with claimed(out, _terms(run), (*RESULTS, "records"), overwrite):
        return _evaluate(config, vit, source, out, translate, run, report, maps, overwrite)


def _terms(run: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to resume. Not the rows, which have separate files; nor the limit, the half and
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
    keys, jobs = _jobs(config, source, clean, programs.asked)
    if not jobs:
        raise InputError(f"{source.name} has no image that can be read: {next(iter(skipped.values()), 'it is empty')}")
    records = {row.name: Records(record_file(out, row), fields) for row in whole.rows}
    references = None
    if task.reference:
        references = Records(out / "records" / "reference.jsonl", programs.reference_fields())

    # Groups do not depend on what is done already, so an interrupted run computes the very same batches.
    size = config.batch_size
    groups = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    groups = [group for group in groups if any(_open(config, row, records[row.name], group) for row in config.rows)]
    together = _together(programs, config, records, groups, maps)
    indices = [job.index for group in groups for job in group]
    stream = batches(source, vit.preprocessing, size, config.profile, indices=indices, skipped=skipped)
    for number, (group, batch) in enumerate(zip(groups, stream, strict=True)):
        group = [job for job in group if job.key in batch.keys]  # a file may have gone in the meantime
        if not group:
            continue
        full = group + group[-1:] * (size - len(group))
        classes = programs.place(np.array([job.explained_class for job in full], np.int32))
        measured = Measured(
            programs.place(batch.inputs), programs.place(np.array([job.label for job in full], np.int32))
        )
        if task.needs in ("masks", "parts"):
            measured = measured._replace(masks=programs.place(batch.masks))
        if task.needs == "parts" or config.score == AGAINST:
            measured = _with_causes(programs, measured, batch, translate)
        target = programs.target(classes, measured.others)
        reference = None
        if references is not None:
            reference = _kept_reference(programs, references, group, full, measured.pixels, target)
        shared = programs.shared(measured, target)
        computed: dict[str, tuple[Array, Array | None]] = {}
        for row in config.rows:
            places = _open(config, row, records[row.name], group)
            if places:
                taken, stored = _stored(maps, config, row, group, places)
                if len(taken) < len(places):
                    if row.name not in computed:
                        keys_of_full = [job.key for job in full]
                        computed |= _computed(programs, together, row, keys_of_full, measured.pixels, target)
                    heatmaps, original = computed.pop(row.name)
                else:
                    heatmaps, original = np.zeros((size, *stored.shape[1:]), np.float32), None
                if taken:
                    heatmaps = np.array(heatmaps)
                    heatmaps[taken] = stored
                    heatmaps = programs.place(heatmaps)
                found = programs.score(row, measured, target, heatmaps, original, reference, shared)
                found = {name: np.asarray(array)[places] for name, array in found.items()}
                _require_finite(found, [group[i].key for i in places], f"{vit.name} on changed images ({row.name})")
                records[row.name].append([(group[i].key, group[i].explained) for i in places], found)
        if report is not None:
            report(
                number + 1, len(groups), lambda: summarise(config, clean, records, keys, source.grouped, final=False)
            )

    run["skipped"] = {"count": len(skipped), "examples": dict(sorted(skipped.items())[:20])}
    run["config"] |= {name: settings_of(whole)[name] for name in ("rows", "paper")}
    results = {"rows": summarise(whole, clean, records, keys, source.grouped), "run": run}
    write_json(out / EXAMPLES, keys, KEPT, overwrite=True)  # a list has no mark, and the folder is claimed
    write_json(out / "results.json", results, KEPT, overwrite=overwrite)
    write_text(out / "results.md", markdown(results), KEPT, overwrite=overwrite)
    figure = draw(whole, clean, records, keys, source.grouped, vit.preprocessing.kind)
    write_figure(figure, out / "curves.png", KEPT, overwrite=overwrite)
    return results


def _with_causes(programs: Programs, measured: Measured, batch: Batch, translate: np.ndarray | None) -> Measured:
    """A batch with its examples without their causes, and the classes of these."""
    others = batch.others
    assert others is not None
    if translate is not None:
        others = np.where(others < 0, -1, translate[others]).astype(np.int32)
    if programs.config.score == AGAINST and (others < 0).any():
        raise InputError(f"the score {AGAINST!r} needs the classes that examples have without their causes")
    return measured._replace(without=programs.place(batch.without), others=programs.place(others))


def _together(
    programs: Programs,
    config: EvaluateConfig,
    records: Mapping[str, Records],
    groups: Sequence[Sequence[Job]],
    maps: Sequence[Maps],
) -> dict[str, list[Row]]:
    """By name, the rows that are explained with each row: those that have something to do and no stored maps, and can
    share its pass."""
    rows = [
        row
        for row in config.rows
        if any(_open(config, row, records[row.name], group) for group in groups)
        and not any(store.has(row.method, row.options) for store in maps)
    ]
    found = {row.name: [row] for row in config.rows}
    return found | {row.name: group for group in programs.groups(rows) for row in group}


def _computed(
    programs: Programs, together: dict[str, list[Row]], row: Row, keys: Sequence[str], pixels: Array, target: Target
) -> dict[str, tuple[Array, Array | None]]:
    """The maps of a row and of those with it. If these have an error, each is explained by itself from then on."""
    group = together[row.name]
    try:
        return programs.maps(group, keys, pixels, target)
    except InputError:
        if len(group) == 1:
            raise
    together |= {each.name: [each] for each in group}
    return programs.maps([row], keys, pixels, target)


def _kept_reference(
    programs: Programs, kept: Records, group: Sequence[Job], full: Sequence[Job], pixels: Array, target: Target
) -> Array:
    """The reference's maps of the jobs [B, h, w], from the records, where those that were missing are put first."""
    missing = [i for i, job in enumerate(group) if (job.key, job.explained) not in kept.places]
    if missing:
        found = {name: np.asarray(array)[missing] for name, array in programs.reference(pixels, target).items()}
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
    clean = Records(out / "records" / "clean.jsonl", clean_fields(config), (CLEAN,))
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
        measured = Measured(programs.place(batch.inputs), programs.place(labels))
        if programs.task.needs == "parts" or config.score == AGAINST:
            measured = _with_causes(programs, measured, batch, translate)
        found = programs.clean(measured)
        fields = {name: np.asarray(array)[:count] for name, array in found.items()}
        _require_finite(fields, batch.keys, vit.name)
        clean.append([(key, CLEAN) for key in batch.keys], fields)
    return clean


def _jobs(
    config: EvaluateConfig, source: Source, clean: Records, asked: Question | None
) -> tuple[list[str], list[Job]]:
    """The keys of the examples, and what is explained of those that count: all predicted classes, then, if wanted, the
    targets that are other classes.

    No class is compared with itself: an image of which one is the other class of a `Versus` is left out of every row.
    """
    good = [i for i, key in enumerate(source.keys) if (key, CLEAN) in clean.places]
    if not good:
        return [], []
    own = [(source.keys[i], CLEAN) for i in good]
    predicted, labels = clean.take("predicted", own).tolist(), clean.take("label", own).tolist()
    targets = TARGET in config.explained and any(row.class_specific for row in config.rows)
    examples = list(zip(good, predicted, labels, strict=True))
    if asked is not None and isinstance(asked.score, Versus) and asked.score.other is not None:
        other = asked.score.other
        examples = [(i, c, y) for i, c, y in examples if other not in ((c, y) if targets else (c,))]
    if not examples:
        raise InputError(
            f"the score {config.score!r} leaves out the images of its class, and {source.name} has no other"
        )
    if source.sizes is not None:
        sizes = source.sizes
        examples.sort(key=lambda example: sizes[example[0]])
    keys = [source.keys[i] for i, _, _ in examples]
    if TASKS[config.task].counts:
        counted = clean.take("counted", [(key, CLEAN) for key in keys])
        examples = [example for example, counts in zip(examples, counted, strict=True) if counts]
        if not examples:
            raise InputError(f"no image of {source.name} counts by the options of the task {config.task!r}")
    jobs = [Job(source.keys[i], PREDICTED, i, y, c) for i, c, y in examples]
    if targets:
        jobs += [Job(source.keys[i], TARGET, i, y, y) for i, c, y in examples if c != y]
    return keys, jobs


def _open(config: EvaluateConfig, row: Row, records: Records, group: Sequence[Job]) -> list[int]:
    """Places of the jobs that the row still has to do."""

    def wanted(job: Job) -> bool:
        if job.explained == PREDICTED and (not row.class_specific or job.explained_class == job.label):
            return True  # one explanation is both
        return job.explained in config.explained and row.class_specific

    return [i for i, job in enumerate(group) if wanted(job) and (job.key, job.explained) not in records.places]


def _check_maps(
    maps: Maps, run: Mapping[str, Any], config: EvaluateConfig, vit: Model, source: Source
) -> dict[str, Any]:
    """What the results say of stored maps. InputError for those of another model, data set, profile or shape."""
    made = maps.provenance
    for what, known in (("model", ()), ("data", (source.stamped(),))):
        if made[what]["identity"] not in (run[what]["identity"], *known):
            raise InputError(
                f"{maps.path} holds maps of {made[what]['name']}, not of {run[what]['name']} as it is here"
            )
    if made["profile"] != run["config"]["profile"]:
        raise InputError(
            f"{maps.path} was made with the profile {made['profile']!r}, not {run['config']['profile']!r}"
        )
    if made.get("mixed_precision"):
        raise InputError(f"{maps.path} was made in mixed precision, and evaluations explain in float32")
    if made.get("score") != config.score:
        raise InputError(f"{maps.path} was made with the score {made.get('score')!r}, not {config.score!r}")
    inputs, classes = vit.preprocessing.batch(1), jax.ShapeDtypeStruct((1,), jnp.int32)
    for row in config.rows:
        if maps.has(row.method, row.options):
            program = compiled(vit.module, {row.method: row.options}, preprocessing=vit.preprocessing)
            found = jax.eval_shape(program, vit.params, inputs, classes)[0][row.method]
            expected = [*jax.eval_shape(as_maps, found).shape[1:]]
            if [*maps.maps[row.method].shape[1:]] != expected:
                held = f"holds maps {list(maps.maps[row.method].shape[1:])} of {row.method!r}"
                raise InputError(f"{maps.path} {held}, expected {expected} for {vit.name}")
    return {"store": maps.path, **{name: made[name] for name in ("methods", "options", "target", "dtype", "versions")}}


def _stored(
    maps: Sequence[Maps], config: EvaluateConfig, row: Row, group: Sequence[Job], places: Sequence[int]
) -> tuple[list[int], np.ndarray]:
    """Those places of the group whose maps are stored, and these maps [k, h, w]."""
    taken: list[int] = []
    parts: list[np.ndarray] = []
    own = row.random_blocks is not None or TASKS[config.task].against_original  # are computed again
    for store in () if own else maps:
        missing = [i for i in places if i not in taken]
        if missing and store.has(row.method, row.options):
            jobs = [group[i] for i in missing]
            wanted = [(job.key, job.explained_class if row.class_specific else None) for job in jobs]
            found, stored = store.find(row.method, row.options, wanted)
            taken += [missing[i] for i in found]
            parts.append(stored)
    return taken, np.concatenate(parts) if taken else np.empty((0, 1, 1), np.float32)


def describe(config: EvaluateConfig, vit: Model, source: Source) -> dict[str, Any]:
    """The `run` object of the results. It has no times, so that equal runs give equal files."""
    return {
        **environment(),
        "seed": config.seed,
        "config": settings_of(config),
        "data": {
            **{"name": source.name, "identity": source.identity, "examples": len(source)},
            **({"grouped": True} if source.grouped else {}),
        },
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
