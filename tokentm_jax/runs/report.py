"""From results per image to numbers with intervals, tables, curves and comparisons."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired

import numpy as np
from typing_extensions import TypedDict

from tokentm_jax import metrics
from tokentm_jax.configs import RANDOM, EvaluateConfig, Row, check
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.files import generator, ours, read_json
from tokentm_jax.metrics.task import CLEAN, FINITE_MAPS, Column, Fields
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.runs.records import EXAMPLES, Records, clean_fields, record_file, table_of
from tokentm_jax.validation import check_fields, checked, read_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


def summarise(
    config: EvaluateConfig,
    clean: Records,
    records: Mapping[str, Records],
    keys: Sequence[str],
    grouped: bool = False,
    final: bool = True,
) -> list[dict[str, Any]]:
    """The rows of `results.json`; `grouped` as in `Source`. Before the end: values without intervals, and without the
    targets, of which only the images with another prediction come last."""
    task = TASKS[config.task]
    rows: list[dict[str, Any]] = []
    measured: dict[str, Measured] = {}

    def add(row: str, metric: str, per_image: np.ndarray, statistic: metrics.Statistic, of: Sequence[str]) -> None:
        times, groups = 1000 if final else 1, groups_of(of, grouped)
        value, low, high = metrics.bootstrap(per_image, statistic, config.seed, times, groups)
        entry = {"method": row, "metric": metric, "value": value, "low": low, "high": high, "images": len(per_image)}
        if (row, metric) in config.paper:
            entry["paper"] = config.paper[row, metric]
        rows.append(entry)

    own = sorted((key, CLEAN) for key in keys)
    if (clean.take("label", own) >= 0).all():
        add(CLEAN, "accuracy", 100.0 * clean.take("hit", own), metrics.mean, sorted(keys))
    if task.counts:
        add(CLEAN, "counted", 100.0 * clean.take("counted", own), metrics.mean, sorted(keys))
    for row in config.rows:
        explained = config.explained if final else config.explained[:1]
        done, table = table_of(row, explained, clean, records[row.name], keys)
        measured[row.name] = done, task.measure(table) if done else {}
        for metric, per_image in measured[row.name][1].items():
            add(row.name, metric, per_image, task.columns[metric].statistic, done)
        if done and not (finite := FINITE_MAPS.values(table)).all():
            add(row.name, "finite_maps", finite, FINITE_MAPS.statistic, done)
    noise = {row.name for row in config.rows if row.method == RANDOM}
    if final and len(config.rows) - len(noise) > 1:
        for metric, column in task.columns.items():
            own = [entry for entry in rows if entry["metric"] == metric and entry["method"] not in noise]
            found = standing(own, measured, column, config.seed, grouped)
            for entry in own:
                entry |= {"mark": found[entry["method"]]["mark"]} if entry["method"] in found else {}
    return rows


def groups_of(keys: Sequence[str], grouped: bool) -> list[str] | None:
    """The group of each example of data that are `grouped`, as `metrics.bootstrap` takes them."""
    return [key.rpartition("/")[0] for key in keys] if grouped else None


def standing(
    figures: Sequence[Mapping[str, Any]],
    measured: Mapping[str, "Measured"],
    column: Column,
    seed: int,
    grouped: bool = False,
) -> dict[str, dict[str, Any]]:
    """How methods stand by one metric, from their figures (without noise) and all results per image.

    By method, `mark`: `BEST`, or `LEVEL` where the 95 % interval of the paired difference to the best includes zero,
    or None; and `behind`, that difference. Empty where no direction is better.
    """
    if column.better is None or not figures:
        return {}
    sign = -1 if column.better == "lower" else 1
    best = max(figures, key=lambda figure: sign * figure["value"])["method"]
    found: dict[str, dict[str, Any]] = {best: {"mark": BEST}}
    for figure in figures:
        if (name := figure["method"]) != best:
            behind = difference(measured[name], measured[best], figure["metric"], column.statistic, seed, grouped)
            level = behind and behind["low"] <= 0 <= behind["high"]
            found[name] = {"mark": LEVEL if level else None, "behind": behind}
    return found


ARROWS = {"higher": "↑", "lower": "↓", None: ""}
BEST, LEVEL = "best", "level"
STYLES = {BEST: "**{}**", LEVEL: "*{}*", None: "{}"}
LEGEND = (
    "Arrows show which direction is better. In each column **bold** is the best method, and *slanted* are those that "
    "tie with it: the 95 % interval of their paired difference to it includes zero."
)


def markdown(results: Mapping[str, Any]) -> str:
    """`results.md`: a line per method, with intervals; published numbers in separate columns."""
    run, rows = results["run"], results["rows"]
    config, images = run["config"], plural_of(run)
    drawn = "the groups of " * run["data"].get("grouped", False) + images
    clean = [row for row in rows if row["method"] == CLEAN]
    others = [row for row in rows if row["method"] != CLEAN]
    known = TASKS[config["task"]].columns
    columns = list(dict.fromkeys(row["metric"] for row in others))

    def marked(row: Mapping[str, Any]) -> str:
        return STYLES[row.get("mark")].format(_cell(row, known.get(row["metric"], FINITE_MAPS).digits))

    cells = {(row["method"], row["metric"]): marked(row) for row in others}
    heads = {c: f"{c.replace('_', ' ')} {ARROWS[known.get(c, FINITE_MAPS).better]}".strip() for c in columns}
    for row in others:
        if "paper" in row:
            heads[f"paper: {row['metric']}"] = f"paper: {row['metric']}".replace("_", " ")
            cells[row["method"], f"paper: {row['metric']}"] = f"{row['paper']:g}"
    score = config.get("score")
    asked = "" if score is None else f"Explained, and followed instead of the probability: {in_table(score)}. "
    lines = [
        f"# {config['name']}",
        "",
        f"{run['model']['name']} on {run['data']['name']}: {run['data']['examples']} {images}, profile "
        f"{config['profile']}, seed {run['seed']}, {run['skipped']['count']} skipped. "
        f"{asked}In brackets: 95 % intervals over {drawn}.",
        *(f"Clean {row['metric']}: {_cell(row)} %." for row in clean),
        *([LEGEND] if any(row.get("mark") for row in others) else []),
        "",
        f"| method | {' | '.join(heads.values())} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    count = {row["method"]: row["images"] for row in others}
    for name in count:
        fewer = f" ({count[name]} {images})" if count[name] < max(count.values()) else ""
        lines.append(f"| {in_table(name)}{fewer} | {' | '.join(cells.get((name, c), '') for c in heads)} |")
    return document(lines)


def plural_of(run: Mapping[str, Any]) -> str:
    """What tables call the examples of a run."""
    preprocessing = run["model"].get("preprocessing", {})
    return "texts" if "tokenizer" in preprocessing else "recordings" if "audio" in preprocessing else "images"


def in_table(name: str) -> str:
    """A name within a cell of a Markdown table."""
    return " ".join(name.split()).replace("|", "\\|")


def document(lines: Sequence[str]) -> str:
    """The text of the lines with the mark by which `files.ours` knows it; a path in them may not be UTF-8."""
    return "\n".join([*lines, "", f"<!-- {generator()} -->", ""]).encode("utf-8", "replace").decode()


def _cell(row: Mapping[str, Any], digits: int = 2) -> str:
    return f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def draw(
    config: EvaluateConfig,
    clean: Records,
    records: Mapping[str, Records],
    keys: Sequence[str],
    grouped: bool = False,
    kind: str = "photo",
) -> "MatplotlibFigure":
    """The picture `curves.png`: the task's plot with a curve per row, or its first column with an interval per row."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    task = TASKS[config.task]
    shown = config.explained[:1]
    every = {row.name: table_of(row, shown, clean, records[row.name], keys) for row in config.rows}
    tables = {name: table for name, (_, table) in every.items() if table}
    many = len(config.rows) > 12
    colours = colormaps["viridis" if many else "tab10"]
    figure = Figure(layout="constrained", dpi=120)
    if task.plot is None:
        title, column = next(iter(task.columns.items()))
        axes = figure.add_subplot(title=title)
        for name, table in tables.items():
            groups = groups_of(every[name][0], grouped)
            value, low, high = metrics.bootstrap(column.values(table), column.statistic, config.seed, groups=groups)
            axes.errorbar(value, name, xerr=[[value - low], [high - value]], fmt="o", color="black")
        axes.invert_yaxis()
    else:
        curves = {name: task.plot.curves(table) for name, table in tables.items()}
        titles = list(dict.fromkeys(title for panels in curves.values() for title in panels))
        x_label = task.plot.x_label.replace("pixels", "words") if kind == "text" else task.plot.x_label
        labels = {"xlabel": x_label, "ylabel": task.plot.y_of(config.score)}
        for k, title in enumerate(titles, 1):
            axes = figure.add_subplot(1, len(titles), k, title=title, **labels)
            for i, (name, panels) in enumerate(curves.items()):
                colour = colours(i / max(len(curves) - 1, 1)) if many else colours(i % 10)
                style: dict[str, Any] = {"color": "grey", "linestyle": "--"} if name == RANDOM else {"color": colour}
                axes.plot(*panels[title], label=name, **style)
            if config.score is None:
                axes.set_ylim(0)
        for axes in figure.axes[-1:]:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.set_size_inches(5.5 * len(figure.axes) + 3, max(4.0, 0.25 * len(config.rows) + 1))
    return figure


class Figure(TypedDict):
    """One number of `results.json`."""

    method: str
    metric: str
    value: float
    low: float
    high: float
    images: int
    paper: NotRequired[float]
    mark: NotRequired[Literal["best", "level"] | None]


class DataSet(TypedDict):
    name: str
    identity: str
    grouped: NotRequired[bool]  # as in `Source`


class Made(TypedDict):
    config: dict[str, Any]  # an `EvaluateConfig`
    data: DataSet


class Results(TypedDict):
    """The content of `results.json`, as far as it is read again."""

    rows: list[Figure]
    run: Made


Measured = tuple[list[str], dict[str, np.ndarray]]  # examples, and by metric the results per image [n, ...]


class Finished(NamedTuple):
    """A finished evaluation. The folder may hold more, of an earlier run with another limit, half or names."""

    out: Path
    config: EvaluateConfig
    data: DataSet
    figures: list[Figure]
    clean: Records  # of the whole images
    keys: list[str]  # those that the figures are of
    fields: Fields  # by which the records of rows are checked

    @property
    def grouped(self) -> bool:
        """As in `Source`."""
        return self.data.get("grouped", False)

    def records(self, row: Row) -> Records:
        """The results per image of a row, from its file."""
        return Records(record_file(self.out, row), self.fields)

    def measured(self, row: Row, records: Records | None = None) -> Measured:
        """The finished examples of a row and its results per image; `records` are the row's, if read already.

        Raises InputError where results per image are gone that the figures are of.
        """
        records = self.records(row) if records is None else records
        done, table = table_of(row, self.config.explained, self.clean, records, self.keys)
        wanted = max((figure["images"] for figure in self.figures if figure["method"] == row.name), default=0)
        if len(done) < wanted or not os.path.lexists(records.path):
            here = f"{len(done)} of the {wanted} images" if os.path.lexists(records.path) else "no image: it is gone"
            raise InputError(f"{records.path} holds the results of {here}; `tokentm evaluate` computes them again")
        return done, TASKS[self.config.task].measure(table) if done else {}


def open_finished(out: Path) -> Finished:
    """Read the folder of a finished evaluation; nothing in it is trusted, and nothing is written.

    Raises InputError for a folder without one, and for anything in it that is not as `evaluate` wrote it.
    """
    path = out / "results.json"
    if not os.path.lexists(path):
        raise InputError(f"{out} holds no finished evaluation (results.json)")
    results = _read_results(path)
    run, known = results["run"], {field.name for field in dataclasses.fields(EvaluateConfig)} - {"paper"}
    given = {name: value for name, value in run["config"].items() if name in known} | {"rows": _rows_in(results, path)}
    try:
        config = check(read_fields(EvaluateConfig, given, "the config"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    clean = Records(out / "records" / "clean.jsonl", clean_fields(config), (CLEAN,))
    if not clean.places:
        raise InputError(f"{clean.path} holds no results")
    listed = out / EXAMPLES
    keys: list[str] = checked(str(listed), list[str], read_json(listed))
    for key in keys:
        if (key, CLEAN) not in clean.places:
            raise InputError(f"{listed} names {key}, of which {clean.path} holds no results")
    return Finished(out, config, run["data"], results["rows"], clean, keys, fields_of(config))


def fields_of(config: EvaluateConfig) -> Fields:
    """The annotations of what a run of this config records per image."""
    return TASKS[config.task].records(config.task, config.options, config.score is not None)


def _read_results(path: Path) -> Results:
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("run"), dict) and "ratings" in content["run"]:
        raise InputError(f"{path.parent} is an evaluation of texts, and this is for those of images")
    return checked(str(path), Results, content)


def _rows_in(results: Results, path: Path) -> list[Row]:
    rows = checked(f"{path}: 'rows'", list[dict[str, Any]], results["run"]["config"].get("rows"))
    return [check_fields(read_fields(Row, row, f"{path}: a row"), f"{path}: a row") for row in rows]


def with_kept_rows(config: EvaluateConfig, out: Path) -> EvaluateConfig:
    """The config with the rows that the results in `out` have besides, in the order of these; `random` is last.

    Raises InputError for results that are damaged.
    """
    path = out / "results.json"
    if not ours(path):
        return config
    results = _read_results(path)
    kept = _rows_in(results, path)
    paper = {(f["method"], f["metric"]): f["paper"] for f in results["rows"] if "paper" in f}
    rows = {row.name: row for row in (*kept, *config.rows)}
    if len(rows) > len(kept) and RANDOM in rows:
        rows[RANDOM] = rows.pop(RANDOM)
    return check(dataclasses.replace(config, rows=tuple(rows.values()), paper={**paper, **config.paper}))


def compare(outs: Sequence[str | Path], to: str | None = None) -> list[dict[str, Any]]:
    """Differences with 95 % intervals over the images that both have.

    Args:
      outs: folders of runs. Of one, every method is compared with another; of several, with itself in the first run.
      to: of one run, the row that the others are compared with; None: its first.

    Returns:
      Entries with `run`, `method`, `metric`, `value`, `better` ("higher", "lower" or None), `baseline` (what it is
      compared with), `difference`, `low`, `high`, `images`, and `verdict`: "better" or "worse" where the interval
      excludes zero, "tie" where it includes it, None where no direction is better.

    Raises:
      InputError: a folder without results, runs of different tasks or data sets, a row that the run has not, and `to`
        for several runs.
    """
    if to is not None and len(outs) > 1:
        raise InputError("of several runs, every method is compared with the same method of the first, not with a row")
    runs = [open_finished(Path(out)) for out in outs]
    first = runs[0]
    names = [row.name for row in first.config.rows]
    if to is not None and to not in names:
        raise suggest("row", to, names, of=str(first.out))
    for run in runs[1:]:
        if any(getattr(run.config, name) != getattr(first.config, name) for name in ("task", "options", "score")):
            raise InputError("the runs are of different tasks, or of other options or another score of the task")
        if run.data["identity"] != first.data["identity"]:
            raise InputError(f"the runs are of different data: {first.data['name']} and {run.data['name']}")
    seed, columns = first.config.seed, TASKS[first.config.task].columns
    baselines = {row.name: first.measured(row) for row in first.config.rows}
    entries = []
    for number, run in enumerate(runs):
        for row in run.config.rows:
            done, measures = baselines[row.name] if number == 0 else run.measured(row)
            against = (to or names[0]) if len(runs) == 1 else row.name
            for metric, per_image in measures.items():
                statistic, better = columns[metric].statistic, columns[metric].better
                entry = {"run": str(run.out), "method": row.name, "metric": metric, "better": better, "baseline": None}
                entry |= {"value": metrics.bootstrap(per_image, statistic, seed, 1)[0], "images": len(done)}
                itself = row.name == against if len(runs) == 1 else number == 0
                other = ([], {}) if itself else baselines.get(against, ([], {}))
                if found := difference((done, measures), other, metric, statistic, seed, first.grouped):
                    tied, won = found["low"] <= 0 <= found["high"], (found["low"] > 0) == (better == "higher")
                    verdict = None if better is None else "tie" if tied else "better" if won else "worse"
                    baseline = against if len(runs) == 1 else str(first.out)
                    entry |= {"baseline": baseline, **found, "verdict": verdict}
                entries.append(entry)
    return entries


def difference(
    measured: Measured, other: Measured, metric: str, statistic: metrics.Statistic, seed: int, grouped: bool = False
) -> dict[str, Any]:
    """The metric of `measured` less that of `other` over the `images` that both have: `difference` with its 95 %
    interval from `low` to `high`. Empty where they have none."""
    places, others = ({key: i for i, key in enumerate(done)} for done, _ in (measured, other))
    both = [key for key in places if key in others]
    if not both or metric not in other[1]:
        return {}
    a, b = measured[1][metric][[places[key] for key in both]], other[1][metric][[others[key] for key in both]]
    value, low, high = metrics.paired(a, b, statistic, seed, groups=groups_of(both, grouped))
    return {"difference": value, "low": low, "high": high, "images": len(both)}
