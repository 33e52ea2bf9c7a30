"""Which methods of a leaderboard are best: marks, mean ranks, the Pareto front, and the table and picture of them."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from tokentm_jax.configs import RANDOM
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.runs.report import ARROWS, STYLES, Finished, document, in_table, plural_of, standing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def standings(runs: Mapping[str, Finished], results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every number of the runs' methods, and its place in its column, as `standing` gives it. Columns of which no
    direction is better have no marks, and neither has the `random` row."""
    entries = []
    for name, run in runs.items():
        figures = {(figure["method"], figure["metric"]): figure for figure in results[name]["rows"]}
        measured = {row.name: run.measured(row) for row in run.config.rows}
        for metric, column in TASKS[run.config.task].columns.items():
            own = [figures[row, metric] for row in measured if (row, metric) in figures]
            rivals = [figure for figure in own if figure["method"] != RANDOM]
            found = standing(rivals, measured, column, run.config.seed, run.grouped)
            for figure in own:
                entry = {"run": name, **{k: figure[k] for k in ("method", "metric", "value", "low", "high", "images")}}
                entries.append({**entry, "better": column.better, "mark": None, **found.get(figure["method"], {})})
    return entries


def mean_ranks(figures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each method's rank in the columns of a run (1 is the best, equals share theirs), averaged first over these and
    then over the runs that the method is in: every metric counts once. Without `random`, and without columns of
    which no direction is better."""
    ranks: dict[str, dict[str, list[float]]] = {}
    columns: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for figure in figures:
        if figure["better"] and figure["method"] != RANDOM:
            columns.setdefault((figure["run"], figure["metric"]), []).append(figure)
    for (run, _), column in columns.items():
        sign = -1 if column[0]["better"] == "higher" else 1
        values = sign * np.array([figure["value"] for figure in column])
        for figure, value in zip(column, values, strict=True):
            rank = (values < value).sum() + ((values == value).sum() + 1) / 2
            ranks.setdefault(figure["method"], {}).setdefault(run, []).append(float(rank))
    return {method: fmean(map(fmean, runs.values())) for method, runs in ranks.items()}


def pareto(cost: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Which of n points are on the front [n]: no other one costs at most as much and gains at least as much, and is
    better in one of the two."""
    no_worse = (cost <= cost[:, None]) & (gain >= gain[:, None])  # [n, other]
    better = (cost < cost[:, None]) | (gain > gain[:, None])
    return np.asarray(~(no_worse & better).any(1))


LONG = 60.0  # seconds that a batch may take; else the speed of its method is measured by a single image
LEGEND = """In each column **bold** is the best number, and *slanted* are those whose paired difference to it has a
95 % interval that includes zero; arrows show which direction is better. Passes are forward (F) and backward (B) passes
of the model for a map with the method's default options. The mean rank averages a method's rank over the columns of a
metric, and then over the metrics that it was measured by: it depends on the other methods of the table, and is not a
measure of faithfulness."""


def markdown(found: Mapping[str, Any]) -> str:
    """`leaderboard.md`: a line per method; intervals are in the tables of the runs."""
    run, figures = found["run"], found["rows"]
    columns = list(dict.fromkeys((figure["run"], figure["metric"]) for figure in figures))
    metrics = [metric for _, metric in columns]
    task = {entry["name"]: TASKS[entry["task"]] for entry in run["runs"]}
    better = {(figure["run"], figure["metric"]): figure["better"] for figure in figures}
    cells = {(f["method"], f["run"], f["metric"]): f for f in figures}

    def head(name: str, metric: str) -> str:
        full = metric if metrics.count(metric) == 1 else f"{name}: {metric}"
        return in_table(f"{full.replace('_', ' ')} {ARROWS[better[name, metric]]}".strip())

    def shown(method: str) -> list[str]:
        found = [(cells.get((method, *column)), task[column[0]].columns[column[1]].digits) for column in columns]
        return ["" if f is None else STYLES[f["mark"]].format(f"{f['value']:.{digits}f}") for f, digits in found]

    data: dict[str, list[str]] = {}
    for entry in run["runs"]:
        images = f"{entry['data']['examples']} {plural_of(run)} of {entry['data']['name']}, {entry['skipped']} skipped"
        data.setdefault(images, []).append(entry["name"])
    measured = "; ".join(f"{', '.join(names)}: {images}" for images, names in data.items())
    mixed = [entry["name"] for entry in run["runs"] if entry["mixed_precision"]]
    if mixed:
        measured += f". In mixed precision: answers to changed images, in {', '.join(mixed)}"
    heads = [*(head(*column) for column in columns), "passes", "images/s", "mean rank"]
    lines = [f"# {run['name']}", "", f"{run['model']['name']}. {measured}.", "", LEGEND, ""]
    measured_by = f"batches of {run['batch_size']}, or one image where a batch would take more than {LONG:.0f} s"
    lines += [f"Images per second: {run['device']}, {measured_by}.", ""]
    lines += [f"| method | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for method in found["methods"]:
        rank = "" if method["mean_rank"] is None else f"{method['mean_rank']:.1f}"
        own = [*shown(method["name"]), method["passes"], f"{method['images_per_second']:.3g}", rank]
        lines.append(f"| {' | '.join([in_table(method['name']), *own])} |")
    lines.append(f"| {' | '.join([RANDOM, *shown(RANDOM), '', '', ''])} |")
    return document(lines)


def draw(found: Mapping[str, Any]) -> "Figure":
    """The picture: the faithfulness of the methods with its intervals over the seconds that a map takes, and the
    front of those that no other one beats in both."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    name, metric = found["run"]["faithfulness"]
    figures = {f["method"]: f for f in found["rows"] if (f["run"], f["metric"]) == (name, metric)}
    methods = sorted(
        (method for method in found["methods"] if method["name"] in figures),
        key=lambda method: figures[method["name"]]["value"],
        reverse=(better := next(iter(figures.values()))["better"]) == "higher",
    )
    height = max(4.0, 0.2 * len(methods) + 1)
    figure = Figure(layout="constrained", dpi=120, figsize=(9, height))
    axes = figure.add_subplot()
    for place, method in enumerate(methods):
        own = figures[method["name"]]
        x, y = 1 / method["images_per_second"], own["value"]
        colour = "tab:red" if method["pareto"] else "tab:grey"
        axes.errorbar(x, y, [[y - own["low"]], [own["high"] - y]], fmt="o", color=colour, elinewidth=0.8, markersize=4)
        axes.annotate(  # the names are in order at the right, each with a line to its point
            method["name"],
            (x, y),
            (1.06, 1 - (place + 0.5) / len(methods)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            parse_math=False,
            color=colour if method["pareto"] else "black",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "relpos": (0, 0.5)},
        )
    front = sorted((1 / m["images_per_second"], figures[m["name"]]["value"]) for m in methods if m["pareto"])
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="tab:red", linewidth=1, label="Pareto front")
    if RANDOM in figures:
        axes.axhline(figures[RANDOM]["value"], color="grey", linestyle="--", linewidth=1, label=RANDOM)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")  # the default would be a formula
    axes.xaxis.set_minor_formatter(LogFormatter())
    if better == "lower":
        axes.invert_yaxis()
    axes.set(xlabel="seconds per image", ylabel=f"{metric.replace('_', ' ')} ({better} is better)")
    axes.set_title(f"{found['run']['name']}: faithfulness against cost", parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
