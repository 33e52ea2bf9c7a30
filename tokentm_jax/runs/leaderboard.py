"""Leaderboards: many methods by many metrics, what a map costs, and which methods are best.

A leaderboard is a folder of ordinary evaluations, one for each metric, and resumes as they do. The folder also has the
maps that several of them need, and at the end the table, its numbers and the picture.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Gt, Len
from typing_extensions import TypedDict

from tokentm_jax import configs
from tokentm_jax.configs import BASELINES, RANDOM, EvaluateConfig, Row
from tokentm_jax.data.examples import Source
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.files import ours, read_json, require_ours, write_json, write_text
from tokentm_jax.identity import claimed, digest, environment, write_figure
from tokentm_jax.methods.explain import compiled
from tokentm_jax.methods.sharing import grouped
from tokentm_jax.methods.table import METHODS
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.models.loading import Model, load
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.evaluate import Report, evaluate, examples
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.maps import Maps
from tokentm_jax.runs.records import KEPT, record_file
from tokentm_jax.runs.report import Finished, open_finished
from tokentm_jax.runs.standings import LONG, draw, markdown, mean_ranks, pareto, standings
from tokentm_jax.runs.store import open_maps
from tokentm_jax.validation import Name, check_fields, checked

RESULTS = ("leaderboard.json", "leaderboard.md", "leaderboard.png")
MAPS = "maps"
ROUNDS, ENOUGH = 6, 2.0  # calls of a method whose speed is measured, and seconds after which it is not called again


@dataclasses.dataclass(frozen=True)
class LeaderboardConfig:
    """Evaluations of one model that become one table.

    Args:
      name: of the output folder; no path.
      runs: the evaluations, whose names are their folders within that one. A row of one name is one method with the
        same options in all of them.
      faithfulness: the name of a run, and the metric of it that the picture shows against the cost.
    """

    name: Name
    runs: Annotated[Sequence[EvaluateConfig], Len(1)]
    faithfulness: tuple[str, str]

    @property
    def rows(self) -> dict[str, Row]:
        """The methods by name, without `random`."""
        rows: dict[str, Row] = {}
        for row in (row for run in self.runs for row in run.rows if row.method not in BASELINES):
            rows.setdefault(row.name, row)
        return rows


def check(config: LeaderboardConfig) -> LeaderboardConfig:
    """The config, every field of the type of its annotation, and every run as `configs.check` does.

    Raises InputError for one of these, runs of one name or of different models, runs with a score, a row of noise
    but `random`, a row that is not the same in all of them, or a faithfulness that none of them measures.
    """
    config = check_fields(config, "the leaderboard")
    config = dataclasses.replace(config, runs=[configs.check(run) for run in config.runs])
    names = [run.name for run in config.runs]
    if len(set(names)) < len(names) or {*names} & {*RESULTS, MAPS}:
        raise InputError(f"the runs of {config.name} must have different names, none of them {MAPS!r}")
    if any(run.score is not None for run in config.runs):
        raise InputError(f"the runs of {config.name} rank explanations of a class: leave out the field 'score'")
    if len({(run.model, run.checkpoint) for run in config.runs}) > 1:
        raise InputError(f"the runs of {config.name} must be of one model")
    for run in config.runs:
        for row in run.rows:
            if row.method in BASELINES and row.name != RANDOM:
                raise InputError(f"the row {row.name!r} is no method and not ranked: leave it out ('random' stays)")
            if not _same(row, config.rows.get(row.name, row)):
                raise InputError(f"the row {row.name!r} must be the same method with the same options in every run")
    shown, metric = config.faithfulness
    columns = {run.name: TASKS[run.task].columns for run in config.runs}
    if shown not in columns:
        raise suggest("run", shown, columns, of="the field 'faithfulness'")
    if metric not in columns[shown] or columns[shown][metric].better is None:
        raise suggest("metric", metric, [n for n, c in columns[shown].items() if c.better], of="'faithfulness'")
    return config


def select(
    config: LeaderboardConfig, methods: Collection[str] | None = None, runs: Collection[str] | None = None
) -> LeaderboardConfig:
    """The config with those of its rows and runs that are named, less runs without a row. None: all of them.

    Raises InputError for no such row or run, and where the run of `faithfulness` is left out.
    """
    known = {run.name: run for run in config.runs}
    for kind, chosen, there in (("row", methods, config.rows), ("run", runs, known)):
        for name in chosen or ():
            if name not in there:
                raise suggest(kind, name, there, of=config.name)
    shown = config.faithfulness[0]
    if runs is not None and shown in known and shown not in runs:
        raise InputError(
            f"the runs must have {shown!r} among them, which 'faithfulness' of {config.name} is a column of"
        )
    kept = [run for run in config.runs if runs is None or run.name in runs]
    if methods is not None:
        kept = [dataclasses.replace(run, rows=[row for row in run.rows if row.name in methods]) for run in kept]
    return dataclasses.replace(config, runs=[run for run in kept if run.rows])


Watch = Callable[[str], AbstractContextManager[Report | None]]


def leaderboard(
    config: LeaderboardConfig,
    vit: Model | None = None,
    out: str | Path | None = None,
    maps: Sequence[Maps] = (),
    watch: Watch = lambda _: nullcontext(),
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run a leaderboard to its end, or from where `out` stopped on.

    Methods that an earlier run left in `out`, and that the config does not have, stay in the table.

    Args:
      config: what to compute.
      vit: the model; None for the `model` and `checkpoint` of the runs.
      out: a folder for the table, the picture, a folder of every run, and the maps that several runs need; None for
        `runs/NAME`.
      maps: stores that maps are taken from, too; each is of the data and the profile of at least one run.
      watch: gives a context for the part of that name, and in it what to call after every batch, as in `evaluate`.
      overwrite: also replace files in `out` that this program did not write.

    Returns:
      The content of `leaderboard.json`.

    Raises:
      InputError: as `check` and `evaluate` do, and for stores that are of no run.
    """
    config = check(config)
    vit = load(config.runs[0].model, config.runs[0].checkpoint) if vit is None else vit
    out = Path("runs", config.name) if out is None else Path(out)
    sources = {run.name: examples(run) for run in config.runs}
    given: dict[str, list[Maps]] = {run.name: [] for run in config.runs}
    for store in maps:
        data = store.provenance["data"]
        used = [
            run.name
            for run in config.runs
            if store.provenance["profile"] == run.profile
            and data["identity"] in (sources[run.name].stamped(), sources[run.name].identity)
        ]
        if not used:
            raise InputError(f"{store.path} holds maps of {data['name']} that no run of {config.name} has a use for")
        for name in used:
            given[name].append(store)
    made = {"kind": "leaderboard", "model": vit.described(), **environment()}
    with claimed(out, made, (*RESULTS, MAPS, *sources), overwrite):
        for name in RESULTS:
            require_ours(out / name, overwrite)
        stores = _shared_maps(config, vit, sources, given, out, watch)
        results: dict[str, Mapping[str, Any]] = {}
        for number, run in enumerate(config.runs, 1):
            with watch(f"{run.name} ({number} of {len(config.runs)})") as report:
                results[run.name] = evaluate(run, vit, sources[run.name], out / run.name, report, stores[run.name])
        finished = {run.name: open_finished(out / run.name) for run in config.runs}
        whole = _whole(config, finished)
        with watch("speed") as report:
            speeds = _speeds_before(out)  # of rows that only earlier runs had
            measured = {name: row for name, row in whole.rows.items() if name in config.rows or name not in speeds}
            speeds |= images_per_second(vit, measured, config.runs[0].batch_size, report)
        figures = standings({run.name: finished[run.name]._replace(config=run) for run in whole.runs}, results)
        described = _described(config, made, results)
        found = {"rows": figures, "methods": _methods(whole, figures, speeds), "run": described}
        write_json(out / RESULTS[0], found, KEPT, overwrite=overwrite)
        write_text(out / RESULTS[1], markdown(found), KEPT, overwrite=overwrite)
        write_figure(draw(found), out / RESULTS[2], KEPT, overwrite=overwrite)
    return found


def _whole(config: LeaderboardConfig, finished: Mapping[str, Finished]) -> LeaderboardConfig:
    """The config with the rows that earlier runs left, except other methods under the name of one of its rows."""
    named = dict(config.rows)
    runs = []
    for run in config.runs:
        rows = finished[run.name].config.rows
        kept = [row for row in rows if row.method == RANDOM or _same(row, named.setdefault(row.name, row))]
        runs.append(dataclasses.replace(run, rows=kept))
    return dataclasses.replace(config, runs=runs)


class _Speed(TypedDict):
    name: str
    images_per_second: Annotated[float, Gt(0)]


class _Before(TypedDict):
    methods: list[_Speed]


def _speeds_before(out: Path) -> dict[str, float]:
    """Images per second of the methods in the table that is there."""
    path = out / RESULTS[0]
    before = checked(str(path), _Before, read_json(path))["methods"] if ours(path) else []
    return {method["name"]: method["images_per_second"] for method in before}


def _same(a: Row, b: Row) -> bool:
    return (a.method, dict(a.options), a.by_patch) == (b.method, dict(b.options), b.by_patch)


# ---- maps that several runs need ------------------------------------------------------------------------------------


def _shared_maps(
    config: LeaderboardConfig,
    vit: Model,
    sources: Mapping[str, Source],
    given: Mapping[str, Sequence[Maps]],
    out: Path,
    watch: Watch,
) -> dict[str, list[Maps]]:
    """The stores of every run: those that are given, and a store of each method and data set that several runs ask
    for maps of. Maps are not rounded, and an image is explained once, for the run that has the most images."""
    stores = {name: [*own] for name, own in given.items()}
    asking: dict[tuple[Any, ...], list[EvaluateConfig]] = {}
    for run in config.runs:
        for row in () if TASKS[run.task].against_original else run.rows:
            there = any(store.has(row.method, row.options) for store in given[run.name])
            if not there and row.method not in BASELINES and row.random_blocks is None:
                asking.setdefault((row.name, run.data, run.half, run.profile, run.seed), []).append(run)
    needed: dict[tuple[Any, ...], dict[str, list[EvaluateConfig]]] = {}  # rows with equal options, of equal data
    for (name, *data), runs in asking.items():
        if len(runs) > 1:
            largest = max(runs, key=lambda run: len(sources[run.name]))
            key = (*data, largest.name, *sorted(config.rows[name].options.items()))
            needed.setdefault(key, {})[name] = runs
    parts: list[tuple[EvaluateConfig, _Part, list[EvaluateConfig]]] = []
    for own in needed.values():
        largest = max(next(iter(own.values())), key=lambda run: len(sources[run.name]))
        for part in _parts(out, [config.rows[name] for name in own], largest, sources[largest.name]):
            using = [run for row in part.rows for run in own[row.name]]
            parts.append((largest, part, [run for i, run in enumerate(using) if run not in using[:i]]))
    for number, (largest, part, runs) in enumerate(parts, 1):
        explainer = Explainer(
            vit,
            methods=part.methods,
            options=part.rows[0].options,
            dtype="float32",
            profile=largest.profile,
            batch_size=largest.batch_size,
        )
        with watch(f"maps of {', '.join(row.name for row in part.rows)} ({number} of {len(parts)})") as report:
            filled = _filled(part.place, explainer, sources[largest.name], report)
        for run in runs:
            stores[run.name] += filled
    return stores


class _Part(NamedTuple):
    """The maps of some rows with equal options, which are in stores together."""

    place: Path
    methods: tuple[str, ...]
    rows: Sequence[Row]


def _parts(out: Path, rows: Sequence[Row], run: EvaluateConfig, source: Source) -> list[_Part]:
    """The rows by their stores: those that an earlier run began, and else one for each group that can share a pass."""
    ending, options = digest(run.profile, source.identity)[:8], rows[0].options
    parts: list[_Part] = []
    for path in sorted((out / MAPS).glob(f"*-{ending}-0")):
        store = open_maps(path)
        there = {row.name for part in parts for row in part.rows}
        own = [row for row in rows if row.name not in there and store.has(row.method, options)]
        if own:
            parts.append(_Part(path.with_name(path.name[: -len("-0")]), tuple(store.maps), own))
    begun = {row.name for part in parts for row in part.rows}
    members = {row.method: METHODS[row.method].member(row.method, options) for row in rows if row.name not in begun}
    for methods in grouped(members):
        own = [row for row in rows if row.name not in begun and row.method in methods]
        parts.append(_Part(out / MAPS / f"{record_file(out, own[0]).stem}-{ending}", tuple(methods), own))
    return sorted(parts, key=lambda part: rows.index(part.rows[0]))


def _filled(place: Path, explainer: Explainer, source: Source, report: Report | None) -> list[Maps]:
    """Stores that together have the maps of all images: "`place`-0", and so on. A store keeps the images and the batch
    size that it was begun with; with a larger limit the next one has the images that are in none so far."""

    def counted(done: int, total: int, skipped: int) -> None:
        if report is not None and done:  # that of an evaluation has no call before the first batch
            report(done, total, list)

    filled: list[Maps] = []
    keys = source.keys
    while keys:
        path = place.with_name(f"{place.name}-{len(filled)}")
        earlier = (path / "zarr.json").exists()  # of version 0.1; what it lacks, the evaluations compute
        made = open_maps(path).provenance if earlier or (path / "tokentm.json").exists() else None
        last = made is None or (made["keys"], made["batch_size"]) == (digest(*keys), explainer.batch_size)
        if last and not earlier:
            part = dataclasses.replace(source, identify=lambda: source.identity, keys=keys)
            explain_dataset(explainer, part, str(path), counted, shard_size=explainer.batch_size)
        filled.append(open_maps(path))
        there = {*filled[-1].keys}
        keys = () if last else tuple(key for key in keys if key not in there)
    return filled


# ---- speed ----------------------------------------------------------------------------------------------------------


def images_per_second(
    vit: Model, rows: Mapping[str, Row], batch_size: int, report: Report | None = None
) -> dict[str, float]:
    """How many images each method explains per second, compiled and warm, on one device.

    The methods take turns, so that whatever else the machine does slows all of them. The figure is that of the median
    call. One whose single image shows that a batch would take minutes has the figure of that image.
    """
    batches: dict[str, Callable[[], float]] = {}
    seconds: dict[str, list[float]] = {}  # per image
    for call in range(1 + ROUNDS):
        for number, (name, row) in enumerate(rows.items(), 1):
            if call == 0:
                alone = _timed(vit, row, 1)()
                seconds[name] = [alone] if alone * batch_size > LONG else []
                if not seconds[name]:
                    batches[name] = _timed(vit, row, batch_size)
            elif name in batches and sum(seconds[name]) * batch_size < ENOUGH:
                seconds[name].append(batches[name]() / batch_size)
            if report is not None:
                report(call * len(rows) + number, (1 + ROUNDS) * len(rows), list)
    return {name: 1 / median(times[1:] or times) for name, times in seconds.items()}


def _timed(vit: Model, row: Row, size: int) -> Callable[[], float]:
    """The method compiled for `size` images: explains them, and returns the seconds that it took."""
    inputs = (vit.params, jax.tree.map(jnp.asarray, vit.preprocessing.dummy(size)), jnp.zeros(size, jnp.int32))
    explain = compiled(vit.module, {row.method: row.options}, preprocessing=vit.preprocessing)
    program = explain.lower(*inputs).compile()  # pyright: ignore[reportFunctionMemberAccess]

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        return time.perf_counter() - start

    return call


def _methods(
    config: LeaderboardConfig, figures: Sequence[Mapping[str, Any]], speeds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The facts of every method next to its numbers; the best mean rank comes first."""
    ranks = mean_ranks(figures)
    shown = {f["method"]: f for f in figures if (f["run"], f["metric"]) == tuple(config.faithfulness)}
    names = [name for name in config.rows if name in shown]
    sign = -1 if any(figure["better"] == "lower" for figure in shown.values()) else 1
    cost = np.array([1 / speeds[name] for name in names])
    front = pareto(cost, sign * np.array([shown[name]["value"] for name in names]))
    on_front = {name for name, is_on in zip(names, front, strict=True) if is_on}
    methods = [
        {
            **{field: getattr(row, field) for field in ("name", "method", "by_patch")},
            "options": dict(row.options),
            "passes": METHODS[row.method].passes,
            "images_per_second": speeds[name],
            "mean_rank": ranks.get(name),
            "pareto": name in on_front,
        }
        for name, row in config.rows.items()
    ]
    return sorted(methods, key=lambda method: (method["mean_rank"] is None, method["mean_rank"]))


def _described(
    config: LeaderboardConfig, made: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    runs = []
    for run in config.runs:
        made_by = results[run.name]["run"]
        entry = {"name": run.name, "task": run.task, "options": dict(run.options), "data": made_by["data"]}
        runs.append({**entry, "skipped": made_by["skipped"]["count"], "mixed_precision": run.mixed_precision})
    size = config.runs[0].batch_size
    return {"name": config.name, "faithfulness": list(config.faithfulness), "batch_size": size, "runs": runs, **made}
