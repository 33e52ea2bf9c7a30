"""The content of the page of `tokentm report`, and how it is written.

The page is a list of photos, each with a small picture and a few facts; those that are explained also have their maps
and curves, as JSON in a separate element that is read when the photo is looked at. Maps are numbers: colours are
put on them by the page.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from tokentm_jax import metrics
from tokentm_jax.cli.figure import colour_tables
from tokentm_jax.cli.heatmaps import softmax
from tokentm_jax.cli.templates import render
from tokentm_jax.cli.terminal import complain, memory_errors, running_images
from tokentm_jax.configs import RANDOM, Row
from tokentm_jax.data.labels import IMAGENET_1K
from tokentm_jax.data.sources import Example, Source, kind_of, open_source, spread
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import write_text
from tokentm_jax.identity import digest
from tokentm_jax.inputs.pictures import Panel, as_base64
from tokentm_jax.inputs.values import looked_up
from tokentm_jax.methods.by_block import Layer, by_block
from tokentm_jax.methods.explain import explain
from tokentm_jax.methods.table import METHODS
from tokentm_jax.methods.titles import title_of
from tokentm_jax.metrics.task import CLEAN, PREDICTED
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.models.checkpoint import read_description
from tokentm_jax.models.loading import Model, load, predict, read_class_names, shipped
from tokentm_jax.runs.evaluate import examples
from tokentm_jax.runs.records import table_of
from tokentm_jax.runs.report import Finished, open_finished
from tokentm_jax.runs.store import DONE, open_maps

MANY = 300  # photos, from which on their pictures are small
SIDES = {"small": 96, "thumb": 160, "large": 384}  # pixels, of the longer side
LARGEST_MAP = 112  # values along a side of a map on the page; maps of more are averaged
BATCH = 8
Json = dict[str, Any]


class Page(NamedTuple):
    """The content of a page. A photo is (facts for the list, what is read when it is looked at or None)."""

    title: str
    about: str
    photos: list[tuple[Json, Json | None]]
    methods: list[str]
    classes: Mapping[int, str]  # the names of those that the page mentions
    figures: Json | None = None  # of a run: its table, curves, and the results that photos are sorted by
    notices: Sequence[str] = ()
    kind: str = "photo"


# ---- numbers and pictures as text -----------------------------------------------------------------------------------


def packed(array: Any) -> Json:
    """Numbers [..., h, w] as base64 of 16 bits each, between the least and the greatest."""
    array = np.nan_to_num(np.asarray(array, np.float64), posinf=0, neginf=0)
    low, high = float(array.min()), float(array.max())
    levels = np.round((array - low) / ((high - low) or 1) * 65535).astype("<u2")
    return {"shape": array.shape, "low": low, "high": high, "data": as_base64(levels.tobytes())}


def packed_map(heatmap: np.ndarray) -> Json:
    """One map [h, w], of at most `LARGEST_MAP` values along a side."""
    scale = LARGEST_MAP / max(heatmap.shape)
    if scale < 1 and len(heatmap) > 1:  # words are not averaged
        size = (round(heatmap.shape[1] * scale), round(heatmap.shape[0] * scale))
        finite = np.nan_to_num(heatmap.astype(np.float32), posinf=0, neginf=0)
        heatmap = np.asarray(Image.fromarray(finite).resize(size, Image.Resampling.BOX))
    return packed(heatmap)


def panel_of(content: Any, name: str, reader: Any, profile: str = "default") -> Any:
    """What maps of an example are shown on; the whole photo where no model is known."""
    side = SIDES["large"]
    if reader is not None:
        return reader.panel(content, name, side, profile)
    if not isinstance(content, Image.Image):
        raise InputError(f"without the model, a report shows photos, and this is a {kind_of(content)}")
    content.thumbnail((side, side))
    return Panel(np.asarray(content.convert("RGB")), name)


# ---- explanations ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _programs(module: Any, preprocessing: Any) -> tuple[Any, Any]:
    """Compiled: the curves of maps, and TokenTM block by block."""

    def curves(params: Any, given: Any, maps: Array, target: Array) -> Array:
        inputs = looked_up(given, module, params)
        rows = jnp.nan_to_num(maps).reshape(len(maps), -1, maps.shape[-1])  # of texts [B, 1, N]
        model = partial(predict, module, preprocessing, params)
        pixels = preprocessing.to_pixels(rows, inputs, module)
        found = metrics.perturbation(model, inputs, pixels, target, jnp.full(len(maps), -1))
        return jnp.nan_to_num(jnp.exp(found["log_probability"]))  # [B, 2, 9]

    def blocks(params: Any, images: Array, target: Array) -> Any:
        return by_block(module, params, preprocessing.normalise(images), target)

    return jax.jit(curves), jax.jit(blocks)


class Photos(NamedTuple):
    """What is explained of photos: by which methods, and for which classes."""

    vit: Model
    rows: Sequence[Row]
    top: int  # number of the most probable classes
    target: int | None = None  # a class beside them
    strict: bool = True  # a method that cannot explain this model is an error; else it is left out
    score: str | None = None  # of a run, instead of the class: only of the predicted one, and without curves

    def explain(self, levels: Any, labels: np.ndarray, panels: Sequence[Any]) -> list[Json]:
        """What the page shows of a batch of the reader's `levels` with labels [B], -1 where unknown."""
        vit = self.vit
        numbers = vit.preprocessing.unit(levels)
        logits = np.asarray(vit.logits(numbers), np.float64)
        if not np.isfinite(logits).all():
            raise InputError(f"{vit.name} gives no finite numbers for these photos")
        probabilities = softmax(logits)
        order = np.argsort(-probabilities, axis=-1, kind="stable").astype(np.int32)
        predicted = order[:, 0]
        asked = [order[:, k] for k in range(min(self.top, order.shape[1]))]
        asked += [] if self.target is None else [np.full_like(predicted, self.target)]
        known = (labels >= 0) & (labels < logits.shape[1])
        asked += [np.where(known, labels, predicted).astype(np.int32)] if known.any() and self.score is None else []
        found: list[Json] = [
            {
                "size": list(vit.preprocessing.size),
                "probabilities": [[int(c), float(probabilities[i, c])] for c in order[i, :5]],
                "classes": list(dict.fromkeys(int(classes[i]) for classes in asked)),
                "maps": {},
                "pixels": [],  # the rows whose maps are of pixels
                "curves": {},
                "blocks": {},
            }
            for i in range(len(labels))
        ]
        for entry, own in zip(found, probabilities, strict=True):
            entry["probability"] = {c: float(own[c]) for c in entry["classes"]}
        asked = [asked[k] for k in range(len(asked)) if not any((asked[k] == own).all() for own in asked[:k])]
        for row in self.rows:
            self._add(row, numbers, asked, found, panels)
        for classes in asked if self.score is None and panels[0].axes == 2 else ():
            self._add_blocks(numbers, classes, found)
        return found

    def _compiled(self) -> tuple[Any, Any]:
        module: Any = self.vit.module
        return _programs(module, self.vit.preprocessing)

    def _add(
        self, row: Row, images: Any, asked: Sequence[np.ndarray], found: list[Json], panels: Sequence[Any]
    ) -> None:
        """The maps of one method for every class that is asked for, and their curves."""
        program, options = self._compiled()[0], dict[str, Any](row.options)
        score = None if self.score is None else self.vit.score(self.score)
        vit: Any = self.vit
        module: Any = vit.module
        maps: Any = None
        for classes in asked:
            if maps is None or row.class_specific:
                try:
                    with memory_errors():
                        maps = explain(vit, images, row.method, classes, score=score, **options)
                        if row.by_patch:
                            maps = metrics.coarsened(maps, module.grid, getattr(module, "tiling", None))
                        maps = np.asarray(maps, np.float32)
                except InputError as error:
                    if self.strict:
                        raise
                    complain(f"{row.name} is left out: {error}")
                    return
                for i, entry in enumerate(found):
                    own = str(classes[i]) if row.class_specific else "every"
                    shown = vit.preprocessing.shown(maps[i], module, True)
                    entry["maps"].setdefault(row.name, {})[own] = packed_map(panels[i].values(shown))
            if score is not None:
                continue
            curves = np.asarray(program(self.vit.params, images, maps, classes), np.float64).round(5)
            for i, entry in enumerate(found):
                entry["curves"].setdefault(row.name, {})[str(classes[i])] = curves[i].tolist()
        for entry in found if panels[0].axes == 2 and maps.shape[1:] == vit.preprocessing.size else ():
            entry["pixels"].append(row.name)

    def _add_blocks(self, images: np.ndarray, classes: np.ndarray, found: list[Json]) -> None:
        try:
            blocks = self._compiled()[1](self.vit.params, images, classes)
        except InputError:  # a model that does not show its blocks
            return
        names = {"contribution": blocks.contribution}
        for layer, values in (("attention", blocks.attention), ("FFN", blocks.ffn)):
            names |= {f"{layer}: {name}": getattr(values, name) for name in Layer._fields}
        for i, entry in enumerate(found):
            shown = {name: self.vit.preprocessing.shown(a[i], self.vit.module, True) for name, a in names.items()}
            entry["blocks"][int(classes[i])] = {name: packed(array) for name, array in shown.items()}


def _batched(items: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), BATCH):
        yield list(items[start : start + BATCH])


class _Look(NamedTuple):
    """One photo, recording or text as the model and as people see it."""

    name: str
    image: Any  # the reader's `levels`
    panel: Any
    label: int


def _listed(name: str, panel: Any, side: int, label: int = -1, **facts: Any) -> Json:
    """The facts of a photo in the list."""
    small = {"thumb": None} if panel is None else panel.listed(side)
    return {"name": printable(name), **small, "label": label, **facts}


def _explained(photos: Photos, looks: Sequence[_Look], size: int) -> list[Json]:
    """The photos' explanations; a batch is filled up to `size`, for another shape would be compiled again."""
    full = [*looks, *[looks[-1]] * (size - len(looks))]
    levels = photos.vit.preprocessing.stacked([look.image for look in full])
    found = photos.explain(levels, np.array([look.label for look in full]), [look.panel for look in full])
    for entry, look in zip(found, looks, strict=False):
        entry |= look.panel.page(SIDES["large"])
    return found[: len(looks)]


def _names(photos: Sequence[tuple[Json, Json | None]], names: Sequence[str] | None) -> dict[int, str]:
    """The names of all classes that the photos mention, or their numbers where these are not known."""
    found = {listed[key] for listed, _ in photos for key in ("label", "predicted") if listed.get(key, -1) >= 0}
    for _, details in photos:
        if details is not None:
            found |= {c for c, _ in details["probabilities"]} | set(details["classes"])
    return {c: printable(names[c]) if names and c < len(names) else f"class {c}" for c in found if c >= 0}


# ---- the three kinds of pages ---------------------------------------------------------------------------------------


def photos_page(photos: Photos, given: Mapping[str, Any], limit: int | None) -> Page:
    """A page about photos, recordings or texts by their names. Raises InputError where none can be read."""
    vit = photos.vit
    reader = vit.preprocessing
    paths = spread(list(given), limit)
    side = SIDES["thumb" if len(paths) <= MANY else "small"]
    notices: list[str] = []
    page: list[tuple[Json, Json | None]] = []
    with running_images() as report:
        for group in _batched(paths):
            looks = []
            for path in group:
                try:
                    example = Example(path, reader.opened(given[path]))
                    looks.append(_Look(path, reader.levels(example)[0], panel_of(example.content, path, reader), -1))
                except InputError as error:
                    complain(str(error))
                    notices.append(str(error))
            found = _explained(photos, looks, min(BATCH, len(paths))) if looks else []
            for look, entry in zip(looks, found, strict=True):
                top, probability = entry["probabilities"][0]
                listed = _listed(look.name, look.panel, side, predicted=top, probability=probability)
                page.append((listed, entry))
            report(len(page) + len(notices), len(paths), len(notices))
    if not page:
        raise InputError(f"none of the {reader.kind}s can be read")
    kept = [row.name for row in photos.rows if any(details and row.name in details["maps"] for _, details in page)]
    if not kept:
        raise InputError("no method can explain this model")
    about = f"{vit.name}, {len(page)} {reader.kind}{'s' if len(page) > 1 else ''}"
    names = _names(page, vit.class_names)
    return Page("What does the model look at?", about, page, kept, names, None, notices, reader.kind)


def run_page(
    out: Path,
    model: str | None,
    checkpoint: Path | None,
    class_names: Path | None,
    methods: Sequence[str] | None,
    data: str | None,
    limit: int | None,
    best: int,
) -> Page:
    """A page about a finished evaluation.

    Raises InputError for a folder without one, or methods that it does not have. Where its model or its photos are not
    there any more, the page reports it, and shows the rest.
    """
    run = open_finished(out)
    config, notices = run.config, []
    if methods is not None:
        unknown = [name for name in methods if name not in [row.name for row in config.rows]]
        if unknown:
            raise InputError(f"{out} has no row {unknown[0]!r}; it has {', '.join(row.name for row in config.rows)}")
        config = dataclasses.replace(config, rows=tuple(row for row in config.rows if row.name in methods))
    vit, source = None, None
    try:
        own = checkpoint if checkpoint is not None or model is not None else config.checkpoint
        vit = load(config.model if model is None else model, own, class_names=class_names)
    except InputError as error:
        notices.append(f"Nothing is explained again: the model is not available: {error}")
    try:
        source = examples(dataclasses.replace(config, data=data or config.data))
        if set(run.keys) - set(source.keys):
            raise InputError(f"{source.name} has other examples than the run")
    except InputError as error:
        source = None
        notices.append(f"No pictures: the data is not available: {error}")
    for notice in notices:
        complain(notice)
    figures, values = _figures(run, config.rows)
    keys = list(spread(sorted(run.keys), limit))
    chosen = _extremes(values, figures["sortable"], keys, best)
    explained = [row for row in config.rows if row.method != RANDOM and row.random_blocks is None]
    photos = None
    if vit is not None and source is not None and explained:
        photos = Photos(vit, explained, 1, strict=False, score=config.score)
    page = _run_photos(run, source, photos, keys, chosen, values, notices)
    if any(details and details["probabilities"][0][0] != facts["predicted"] for facts, details in page):
        notices.append(f"The maps are of another model than the run's: {vit.name if vit else ''} answers otherwise.")
        complain(notices[-1])
    shown = [row.name for row in explained if any(d and row.name in d["maps"] for _, d in page)]
    about = f"{config.task} of {len(run.keys)} images of {Path(config.data).name or config.data}"
    about += "" if vit is None else f", {vit.name}"
    about += "" if config.score is None else f", asked for {config.score}"
    return Page(
        config.name,
        printable(about),
        page,
        shown,
        _names(page, None if vit is None else vit.class_names),
        figures,
        notices,
        "photo" if vit is None else vit.preprocessing.kind,
    )


def _run_photos(
    run: Finished,
    source: Source | None,
    photos: Photos | None,
    keys: Sequence[str],
    chosen: Sequence[str],
    values: Mapping[str, Mapping[str, Mapping[str, float]]],
    notices: list[str],
) -> list[tuple[Json, Json | None]]:
    own = [(key, CLEAN) for key in keys]
    labels, predicted = (run.clean.take(name, own).tolist() for name in ("label", "predicted"))
    facts = {
        key: {"predicted": p, "label": y, "results": {row: found.get(key, {}) for row, found in values.items()}}
        for key, p, y in zip(keys, predicted, labels, strict=True)
    }
    side = SIDES["thumb" if len(keys) <= MANY else "small"]
    profile, preprocessing = run.config.profile, None if photos is None else photos.vit.preprocessing
    pictures: dict[str, Json | None] = dict.fromkeys(keys)
    details: dict[str, Json] = {}
    failed: dict[str, str] = {}

    def look(key: str, source: Source) -> _Look | None:
        try:
            example = source.read(key)
            panel = panel_of(example.content, key, preprocessing, profile)
            pictures[key] = panel.listed(side)
            if photos is None or key not in chosen:
                return None
            image, _ = photos.vit.preprocessing.levels(example, profile)
        except InputError as error:
            failed[key] = str(error)
            return None
        return _Look(key, image, panel, facts[key]["label"])

    if source is not None:
        with running_images() as report:
            for group in _batched(chosen):
                looks = [seen for seen in (look(key, source) for key in group) if seen is not None]
                if photos is not None and looks:
                    found = _explained(photos, looks, min(BATCH, len(chosen)))
                    details |= zip((one.name for one in looks), found, strict=True)
                report(len(details), len(chosen), len(failed))
        with running_images() as report:
            for number, key in enumerate(keys, 1):
                if pictures[key] is None and key not in failed:
                    look(key, source)
                report(number, len(keys), len(failed))
    if failed:
        notices.append(f"{len(failed)} of {len(keys)} pictures are not available: {next(iter(failed.values()))}")
        complain(notices[-1])
    listed = {key: {"name": printable(key), **(pictures[key] or {"thumb": None}), **facts[key]} for key in keys}
    return [(listed[key], details.get(key)) for key in keys]


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


def store_page(
    path: str, class_names: Path | None, methods: Sequence[str] | None, data: str | None, limit: int | None
) -> Page:
    """A page about a store of maps. Raises InputError as `open_maps`, and for methods that it does not have."""
    stored = open_maps(path)
    made, notices = stored.provenance, []
    kept = list(methods or stored.maps)
    for name in kept:
        if name not in stored.maps:
            raise InputError(f"{path} has no maps by {name!r}; it has {', '.join(stored.maps)}")
    done = np.flatnonzero(stored.status[:] == DONE)
    if not len(done):
        raise InputError(f"{path} has no finished example")
    places = np.array(spread(done.tolist(), limit))
    source = None
    try:
        source = open_source(data or re.sub(r"^the (folder|zip file) ", "", made["data"]["name"]))
    except InputError as error:
        notices.append(f"No pictures: the data is not available: {error}")
        complain(notices[-1])
    names = _names_of_store(made, source, class_names, stored.logits[:1].shape[1])
    side = SIDES["large" if len(places) <= MANY else "small"]
    logits = np.asarray(stored.logits[places], np.float64)
    probabilities = softmax(logits)
    label, predicted, target = (np.asarray(a[places]) for a in (stored.label, stored.prediction, stored.target))
    maps = {name: stored.read(name, places) for name in kept}
    if any(found.ndim != 3 for found in maps.values()):
        raise InputError(f"{path} has maps of texts, whose words need their model: give the texts to tokentm report")
    known, failed = set() if source is None else set(source.keys), []
    page: list[tuple[Json, Json | None]] = []
    with running_images() as report:
        for i, place in enumerate(places):
            key, panel = stored.keys[place], None
            if source is not None and key in known:
                try:
                    panel = panel_of(source.read(key).content, key, None)
                except InputError as error:
                    failed.append(str(error))
            order = np.argsort(-probabilities[i], kind="stable")[:5]
            details = {
                "size": list(maps[kept[0]].shape[1:]),
                "probabilities": [[int(c), float(probabilities[i, c])] for c in order],
                "classes": [int(target[i])],  # -1: a score that is of no class
                "probability": {int(target[i]): float(probabilities[i, target[i]])} if target[i] >= 0 else {},
                "maps": {name: {int(target[i]): packed_map(maps[name][i])} for name in kept},
                "curves": {},
                "blocks": {},
            }
            facts = {"predicted": int(predicted[i]), "probability": float(probabilities[i].max())}
            page.append((_listed(key, panel, side, int(label[i]), **facts), details))
            report(i + 1, len(places), len(failed))
    if failed:
        notices.append(f"{len(failed)} of {len(places)} pictures are not available: {failed[0]}")
        complain(notices[-1])
    about = f"{made['model']['name']}, {len(page)} images of {Path(made['data']['name']).name}"
    unnamed = printable(str(made.get("score") or "no class"))
    classes = _names(page, names) | ({-1: unnamed} if (target < 0).any() else {})
    return Page(Path(path).name or path, printable(about), page, kept, classes, None, notices)


def _names_of_store(
    made: Mapping[str, Any], source: Source | None, given: Path | None, count: int
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
    """Write the page with `files.replace`. Raises InputError."""
    maps = [item for _, details in page.photos if details is not None for item in details["maps"].items()]
    settings = {
        "methods": page.methods,
        "signed": sorted({name for name, found in maps if any(one["low"] < 0 for one in found.values())}),
        "classes": page.classes,
        "colours": colour_tables(),
        "figures": page.figures,
        "photos": [listed | {"details": details is not None} for listed, details in page.photos],
        "kind": page.kind,
        "titles": {name: _title(name) for name in page.methods if name in METHODS},
    }
    write_text(out, render("report.html.j2", page=page, settings=settings), overwrite=overwrite)


def _title(method: str) -> Json:
    title, row = title_of(method), METHODS[method]
    return {"title": title.name, "note": f"{title.sentence} {row.paper} {row.year}; on the command line: {method}."}
