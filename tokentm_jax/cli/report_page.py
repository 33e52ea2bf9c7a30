"""The content of the page of `tokentm report`, and how it is written.

The page is a list of photos, each with a small picture and a few facts; those that are explained also have their maps
and curves, as JSON in a separate element that is read when the photo is looked at.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tokentm_jax.cli.figure import colour_tables
from tokentm_jax.cli.heatmaps import softmax
from tokentm_jax.cli.report_details import LARGE, Json, Photos, details_of, packed_map, panel_of, shares
from tokentm_jax.cli.templates import render
from tokentm_jax.cli.terminal import complain, running_work
from tokentm_jax.configs import BASELINES, Row
from tokentm_jax.data.examples import Example, Source
from tokentm_jax.data.labels import IMAGENET_1K
from tokentm_jax.data.shards import kind_of_shards
from tokentm_jax.data.sources import open_source, spread
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import write_text
from tokentm_jax.identity import digest
from tokentm_jax.methods.table import METHODS
from tokentm_jax.methods.titles import title_of
from tokentm_jax.metrics.task import CLEAN, PREDICTED
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.models.checkpoint import read_description
from tokentm_jax.models.loading import Model, load, read_class_names, shipped
from tokentm_jax.runs.evaluate import examples
from tokentm_jax.runs.explainer import DONE
from tokentm_jax.runs.records import table_of
from tokentm_jax.runs.report import Finished, open_finished
from tokentm_jax.runs.store import open_maps

MANY = 300  # photos, from which on their pictures are small
SMALL, THUMB = 96, 160  # pixels of their longer side
BATCH = 8


class Page(NamedTuple):
    """The content of a page. A photo is (facts for the list, what is read when it is looked at or None)."""

    title: str
    about: str
    photos: list[tuple[Json, Json | None]]
    methods: list[str]  # of which those are shown that have a map
    names: Sequence[str] | None  # of classes
    kind: str
    notices: Sequence[str]
    figures: Json | None = None  # of a run: its table, curves, and the results that photos are sorted by
    score: str = ""  # what maps explain that are of no class


# ---- the three kinds of pages ---------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """By key what the list shows of an example, the details of those that are explained, the panels of texts, and why
    others cannot be read."""

    listed: dict[str, Json]
    details: dict[str, Json]
    texts: dict[str, Any]
    failed: dict[str, str]

    def notices(self) -> list[str]:
        """A sentence about pictures that are not there."""
        count, first = len(self.failed) + len(self.listed), next(iter(self.failed.values()), "")
        return [f"{len(self.failed)} of {count} pictures are not available: {first}"] if self.failed else []

    def photos(self, facts: Mapping[str, Json]) -> list[tuple[Json, Json | None]]:
        """Those of a page, from their `facts` in its order."""
        shown = {key: {"name": printable(key), **self.listed.get(key, {"thumb": None})} for key in facts}
        return [(shown[key] | own, self.details.get(key)) for key, own in facts.items()]


def see(
    keys: Sequence[str],
    read: Callable[[str], Example],
    reader: Any,
    photos: Photos | None = None,
    labels: Mapping[str, int] = MappingProxyType({}),
    profile: str = "default",
    usual: int = THUMB,
) -> Seen:
    """Read all examples, and explain those that have `labels`."""
    seen, side, size = Seen({}, {}, {}, {}), usual if len(keys) <= MANY else SMALL, min(BATCH, len(labels))
    ordered = sorted(keys, key=lambda key: key not in labels)
    with running_work("Images", "images") as report:
        for start in range(0, len(ordered), BATCH):
            group: dict[str, tuple[Any, Any]] = {}  # of those that are explained, levels and panel
            for key in ordered[start : start + BATCH]:
                try:
                    example = read(key)
                    panel = panel_of(example.content, key, reader, profile)
                    if photos is not None and key in labels:
                        group[key] = reader.levels(example, profile)[0], panel
                except InputError as error:
                    seen.failed[key] = str(error)
                    continue
                seen.listed[key] = panel.listed(side)
                if panel.axes == 1:
                    seen.texts[key] = panel
            if photos is not None and group:
                known = [*group, *[[*group][-1]] * (size - len(group))]  # another shape would be compiled again
                levels, panels = zip(*(group[key] for key in known), strict=True)
                found = photos.explain(reader.stacked(levels), np.array([labels[key] for key in known]), panels)
                seen.details.update(zip(known, found, strict=True))
            report(min(start + BATCH, len(ordered)), len(ordered), len(seen.failed))
    return seen


def photos_page(photos: Photos, given: Mapping[str, Any], limit: int | None) -> Page:
    """A page about photos, recordings or texts by their names. Raises InputError where none can be read."""
    vit, reader = photos.vit, photos.vit.preprocessing
    names = spread(list(given), limit)
    unknown = dict.fromkeys(names, -1)
    seen = see(names, lambda name: Example(name, reader.opened(given[name])), reader, photos, unknown)
    if not seen.details:
        for error in seen.failed.values():
            complain(error)
        raise InputError(f"none of the {reader.kind}s can be read")
    best = {name: details["probabilities"][0] for name, details in seen.details.items()}
    page = seen.photos({name: {"label": -1, "predicted": c, "probability": p} for name, (c, p) in best.items()})
    if not any(details["maps"] for details in seen.details.values()):
        raise InputError("no method can explain this model")
    about = f"{vit.name}, {len(page)} {reader.kind}{'s' if len(page) > 1 else ''}"
    methods, notices = [row.name for row in photos.rows], [*seen.failed.values()]
    return Page("What does the model look at?", about, page, methods, vit.class_names, reader.kind, notices)


class Given(NamedTuple):
    """What the command line says about a finished run or store."""

    model: str | None
    checkpoint: Path | None
    classes: Path | None
    methods: Sequence[str] | None
    data: str | None
    limit: int | None

    def load(self, model: str | None = None, checkpoint: Any = None) -> Model:
        """The model that is named, or this one. Raises InputError."""
        named = self.model is not None or self.checkpoint is not None
        checkpoint = self.checkpoint if named else checkpoint
        return load(self.model or model, checkpoint, class_names=self.classes)


def run_page(out: Path, given: Given, best: int) -> Page:
    """A page about a finished evaluation.

    Raises InputError for a folder without one, or methods that it does not have. Where its model or its photos are not
    there any more, the page reports it, and shows the rest.
    """
    run = open_finished(out)
    config, notices = run.config, []
    if given.methods is not None:
        known = {row.name: row for row in config.rows}
        for name in given.methods:
            if name not in known:
                raise InputError(f"{out} has no row {name!r}; it has {', '.join(known)}")
        config = dataclasses.replace(config, rows=tuple(row for row in config.rows if row.name in given.methods))
    vit, source = None, None
    try:
        vit = given.load(config.model, config.checkpoint)
    except InputError as error:
        notices.append(f"Nothing is explained again: the model is not available: {error}")
    try:
        source = examples(dataclasses.replace(config, data=given.data or config.data))
        if set(run.keys) - set(source.keys):
            raise InputError(f"{source.name} has other examples than the run")
    except InputError as error:
        source = None
        notices.append(f"No pictures: the data is not available: {error}")
    figures, values = _figures(run, config.rows)
    keys = list(spread(sorted(run.keys), given.limit))
    own = [(key, CLEAN) for key in keys]
    labels, predicted = (run.clean.take(name, own).tolist() for name in ("label", "predicted"))
    explained = [row for row in config.rows if row.method not in BASELINES and row.random_blocks is None]
    seen, reader = Seen({}, {}, {}, {}), None if vit is None else vit.preprocessing
    if source is not None:
        photos = None if vit is None else Photos(vit, explained, 1, strict=False, score=config.score)
        chosen = _extremes(values, figures["sortable"], keys, best) if photos is not None and explained else []
        known = {key: y for key, y in zip(keys, labels, strict=True) if key in chosen}
        seen = see(keys, source.read, reader, photos, known, config.profile)
    facts: dict[str, Json] = {}
    for key, y, p in zip(keys, labels, predicted, strict=True):
        facts[key] = {"predicted": p, "label": y, "results": {row: of.get(key, {}) for row, of in values.items()}}
    page = seen.photos(facts)
    notices += seen.notices()
    if any(own["probabilities"][0][0] != facts[key]["predicted"] for key, own in seen.details.items()):
        name = vit.name if vit else ""
        notices.append(f"The maps are of another model than the run's: {name} answers otherwise.")
    kind = "photo" if reader is None else reader.kind
    about = f"{config.task} of {len(run.keys)} {kind}s of {Path(config.data).name or config.data}"
    about += "" if vit is None else f", {vit.name}"
    about += "" if config.score is None else f", asked for {config.score}"
    names, methods = None if vit is None else vit.class_names, [row.name for row in explained]
    return Page(config.name, about, page, methods, names, kind, notices, figures)


def _figures(run: Finished, shown: Sequence[Row]) -> tuple[Json, dict[str, dict[str, dict[str, float]]]]:
    """The table and the curves of a run, and by row, example and metric the result of every image."""
    task, names = TASKS[run.config.task], [row.name for row in shown]
    cells = [entry for entry in run.figures if entry["method"] in (*names, CLEAN)]
    values: dict[str, dict[str, dict[str, float]]] = {}
    panels: dict[str, dict[str, list[list[float]]]] = {}  # title -> row -> x and y
    for row in shown:
        records = run.records(row)
        done, found = run.measured(row, records)
        values[row.name] = {key: {} for key in done}
        for metric, per_image in found.items():
            column = task.columns[metric]
            own = column.statistic(np.asarray(per_image, np.float64).reshape(len(done), *per_image.shape[1:] or (1,)))
            for key, value in zip(done, np.asarray(own, np.float64), strict=True):
                if np.isfinite(value):
                    values[row.name][key][metric] = round(float(value), 5)
        done, table = table_of(row, (PREDICTED,), run.clean, records, run.keys)
        for title, curve in (task.plot.curves(table) if done and task.plot is not None else {}).items():
            panels.setdefault(title, {})[row.name] = [np.asarray(a, np.float64).round(4).tolist() for a in curve]
    columns = {
        name: {"better": column.better, "digits": column.digits}
        for name, column in task.columns.items()
        if any(entry["metric"] == name for entry in cells)
    }
    labels = {} if task.plot is None else {"x": task.plot.x_label, "y": task.plot.y_of(run.config.score)}
    curves = [{"title": title, **labels, "rows": of_rows} for title, of_rows in panels.items()]
    first = next(iter(values.values()), {}).values()
    different = {name: len({own[name] for own in first if name in own}) for name in columns}
    sortable = sorted((name for name in columns if different[name]), key=lambda name: -different[name])
    return {"cells": cells, "columns": columns, "rows": names, "curves": curves, "sortable": sortable}, values


def _extremes(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], metrics_: Sequence[str], keys: Sequence[str], best: int
) -> list[str]:
    """The examples of the least and the greatest results of every row, by the first metric: the most informative one
    images apart."""
    if not metrics_ or not best:
        return []
    found: dict[str, None] = {}
    for own in values.values():
        order = sorted((key for key in keys if metrics_[0] in own.get(key, {})), key=lambda k: own[k][metrics_[0]])
        found |= dict.fromkeys([*order[:best], *order[-best:]])
    return list(found)


def store_page(path: str, given: Given) -> Page:
    """A page about a store of maps; with its model, on what that one receives. Raises InputError as `open_maps`, for
    methods that it does not have, for another model, and for texts without one."""
    stored = open_maps(path)
    made, notices = stored.provenance, []
    kept = list(given.methods or stored.maps)
    for name in kept:
        if name not in stored.maps:
            raise InputError(f"{path} has no maps by {name!r}; it has {', '.join(stored.maps)}")
    done = np.flatnonzero(stored.status[:] == DONE)
    if not len(done):
        raise InputError(f"{path} has no finished example")
    places = np.array(spread(done.tolist(), given.limit))
    source, vit = None, None
    preprocessing = made["model"].get("preprocessing", {})
    if given.model is not None or given.checkpoint is not None:
        vit = given.load()
        if vit.preprocessing.to_dict() != preprocessing:
            raise InputError(f"{vit.name} prepares its inputs in another way than the model of {path}")
    elif "tokenizer" in preprocessing:
        raise InputError(f"{path} has maps of texts, whose words need their model: name it with --model")
    data = given.data or re.sub(r"^the (folder|zip file) ", "", made["data"]["name"])
    try:
        if kind_of_shards(data) is not None:
            raise InputError(f"a report reads no pictures from shards, such as {data}")
        source = open_source(data)
    except InputError as error:
        notices.append(f"No pictures: the data is not available: {error}")
    keys = [stored.keys[place] for place in places]
    probabilities = softmax(stored.logits[places]) if "logits" in stored.columns else None
    if probabilities is None:
        notices.append(f"No probabilities: the store was made with --logits {made['logits']}.")
    labels, predicted, target = (a[places].tolist() for a in (stored.label, stored.prediction, stored.target))
    maps = {name: stored.read(name, places) for name in kept}
    seen, reader = Seen({}, {}, {}, {}), None if vit is None else vit.preprocessing
    if source is not None:
        there = {*source.keys}
        seen = see([key for key in keys if key in there], source.read, reader, usual=LARGE)
    facts: dict[str, Json] = {}
    for i, key in enumerate(keys):
        text = seen.texts.get(key)
        own = None if probabilities is None else probabilities[i]
        best = [predicted[i]] if own is None else np.argsort(-own, kind="stable")[:5]
        if "classes/top5" in stored.columns:
            best = stored.columns["classes/top5"][places[i]]
        details = details_of(maps[kept[0]].shape[1:], shares(own, best), shares(own, [target[i]]))
        seen.details[key] = details
        details |= {} if text is None else text.page(0)
        for name in kept:
            heatmap = maps[name][i] if text is None else text.values(maps[name][i, 0])
            if vit is not None:
                heatmap = vit.preprocessing.shown(heatmap, vit.module, True)
            details["maps"][name] = {target[i]: packed_map(heatmap)}
        facts[key] = {"label": labels[i], "predicted": predicted[i]}
        facts[key] |= {} if own is None else {"probability": float(own.max())}
    page = seen.photos(facts)
    count = None if probabilities is None else probabilities.shape[1]
    names = _names_of_store(made, source, given.classes, count) if vit is None else vit.class_names
    kind = "photo" if reader is None else reader.kind
    about = f"{made['model']['name']}, {len(page)} {kind}s of {Path(made['data']['name']).name}"
    notices += seen.notices()
    score = str(made.get("score") or "no class")
    return Page(Path(path).name or path, about, page, kept, names, kind, notices, score=score)


def _names_of_store(
    made: Mapping[str, Any], source: Source | None, given: Path | None, count: int | None
) -> Sequence[str] | None:
    """The class names of a store: those that are given, or, by its checksum of them, the data set's, a shipped model's
    or ImageNet's. None where they are not known."""
    if given is not None:
        return read_class_names(given, count)[0]
    known: list[tuple[Sequence[str] | None, Sequence[str] | None]] = [read_class_names(IMAGENET_1K, 1000)]
    if (file := shipped().get(made["model"]["name"])) is not None:
        description = read_description(file)
        known.append((description["class_names"] if description else None, None))
    if source is not None:
        known.append((source.class_names, None))
    return next((names for names, wnids in known if digest(names, wnids) == made.get("classes")), None)


# ---- the page itself ------------------------------------------------------------------------------------------------


def write_page(out: Path, page: Page, overwrite: bool = False) -> None:
    """Write the page with `files.replace`, and print its notices. Raises InputError."""
    for notice in page.notices:
        complain(notice)
    details = [own for _, own in page.photos if own is not None]
    maps = [item for own in details for item in own["maps"].items()]
    methods = [name for name in page.methods if any(name in own["maps"] for own in details)]
    mentioned = {listed[key] for listed, _ in page.photos for key in ("label", "predicted")} - {-1}
    mentioned |= {c for own in details for c in (*own["classes"], *(c for c, _ in own["probabilities"]))}
    settings = {
        "methods": methods,
        "signed": sorted({name for name, found in maps if any(one["low"] < 0 for one in found.values())}),
        "classes": {c: printable(_class_name(page, c)) for c in mentioned},
        "colours": colour_tables(),
        "figures": page.figures,
        "photos": [listed | {"details": own is not None} for listed, own in page.photos],
        "kind": page.kind,
        "titles": {name: _title(name) for name in methods if name in METHODS},
    }
    page = page._replace(about=printable(page.about))
    write_text(out, render("report.html.j2", page=page, settings=settings), overwrite=overwrite)


def _class_name(page: Page, index: int) -> str:
    if index < 0:
        return page.score
    return page.names[index] if page.names and index < len(page.names) else f"class {index}"


def _title(method: str) -> Json:
    title, row = title_of(method), METHODS[method]
    return {"title": title.name, "note": f"{title.sentence} {row.paper} {row.year}; on the command line: {method}."}
