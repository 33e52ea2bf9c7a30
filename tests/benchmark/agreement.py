"""Which metrics of removal rank the methods as known causes do: Kendall's tau-b, with intervals, and one figure.

    python tests/benchmark/agreement.py runs/agreement_xor runs/agreement_more --figure agreement.png

Each folder is one of `tokentm leaderboard configs/agreement.py`. For each model, the methods are ranked by every
metric and by every known cause, and tau is their agreement: 1 for the same order, -1 for the opposite one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import parser, publish, table
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from tokentm_jax.configs import RANDOM, Row
from tokentm_jax.metrics.statistics import Statistic, unit_area
from tokentm_jax.metrics.task import Table, followed_in
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.runs.records import table_of
from tokentm_jax.runs.report import Finished, groups_of, open_finished
from tokentm_jax.runs.standings import pareto

CAUSES = {"pointing": ("share", "auc"), "effects": ("linear_correlation",)}
RESAMPLES = 1000
NOTES = f"""Kendall's tau-b. In brackets: 95 % of its values when the images of every run are drawn again {RESAMPLES}
times, with replacement, and all methods are ranked again. `random`, whose last place says nothing of the others, is
left out."""
Ranked = dict[str, np.ndarray]  # the values of the methods [1 + RESAMPLES, rows], higher is better


def one_order(which: int) -> Callable[[Table], np.ndarray]:
    """One of the curves of `srg`: while the most relevant patches are removed first, or the least relevant ones."""
    return lambda table: followed_in(table)[:, which]


ORDERS: dict[str, tuple[Callable[[Table], np.ndarray], Statistic, str]] = {
    "most_first": (one_order(0), unit_area, "lower"),
    "least_first": (one_order(1), unit_area, "higher"),
}


def rows_of(run: Finished) -> list[Row]:
    return [row for row in run.config.rows if row.method != RANDOM]


def values(run: Finished) -> Ranked:
    """Of every column of a run: the value of each row, of all images and of each draw of them."""
    task, rows = TASKS[run.config.task], rows_of(run)
    columns = {name: (column.values, column.statistic, column.better) for name, column in task.columns.items()}
    columns = {name: column for name, column in columns.items() if column[2] and "target" not in name}
    if run.config.task == "srg":
        columns |= ORDERS
    tables = [table_of(row, run.config.explained, run.clean, run.records(row), run.keys) for row in rows]
    count = len(tables[0][0])
    assert all(done == tables[0][0] for done, _ in tables)  # so that a draw has the same images for all
    _, units = np.unique(groups_of(tables[0][0], run.grouped) or range(count), return_inverse=True)
    random, most = np.random.default_rng(0), units.max() + 1
    draws = [np.ones(count)]
    draws += [np.bincount(random.integers(most, size=most), minlength=most)[units] for _ in range(RESAMPLES)]
    draws = [drawn / drawn.sum() for drawn in draws]
    found = {}
    for name, (read, statistic, better) in columns.items():
        each = [np.asarray(read(table), np.float64).reshape(count, -1) for _, table in tables]
        signed = -1 if better == "lower" else 1
        found[name] = np.stack([signed * statistic(np.stack(draws) @ own) for own in each], 1)
    return found


def agreement(metric: np.ndarray, cause: np.ndarray) -> np.ndarray:
    """Kendall's tau-b [1 + RESAMPLES] of two rankings in each draw."""
    return np.array([kendalltau(a, b)[0] for a, b in zip(metric, cause, strict=True)])


class Model(NamedTuple):
    """What was measured of one model."""

    name: str
    methods: list[str]
    metrics: Ranked
    causes: Ranked


def measured(folder: Path) -> Model:
    metrics: Ranked = {}
    causes: Ranked = {}
    methods: list[str] = []
    for path in sorted(folder.glob("*/results.json")):
        name, run = path.parent.name, open_finished(path.parent)
        methods = [row.name for row in rows_of(run)]
        for column, ranked in values(run).items():
            if run.config.task not in CAUSES:
                fill = name.partition("_")[2]
                metrics[f"{column} ({fill})" if fill and not column.startswith("road") else column] = ranked
            elif column in CAUSES[run.config.task]:
                causes["" if run.config.task == "effects" else f", {name}, {column}".replace("_", " ")] = ranked
    return Model(folder.name.removeprefix("agreement_"), methods, metrics, causes)


def spread(tau: np.ndarray) -> str:
    low, high = np.nanpercentile(tau[1:], [2.5, 97.5])
    return f"{tau[0]:.2f} [{low:.2f}, {high:.2f}]"


def drawn(taus: dict[str, dict[str, np.ndarray]], columns: list[str]) -> Figure:
    """One cell for each metric and known cause, grey where the interval includes zero."""
    figure = Figure(layout="constrained", dpi=120, figsize=(4 + 0.6 * len(columns), 1.5 + 0.27 * len(taus)))
    axes = figure.add_subplot()
    shown = np.array([[row[c][0] if c in row else np.nan for c in columns] for row in taus.values()])
    picture = axes.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for y, row in enumerate(taus.values()):
        for x, column in enumerate(columns):
            if column in row:
                low, high = np.nanpercentile(row[column][1:], [2.5, 97.5])
                sure = low > 0 or high < 0
                style: dict[str, Any] = {"weight": "bold" if sure else "normal", "alpha": 1 if sure else 0.6}
                style["color"] = "white" if abs(row[column][0]) > 0.6 else "black"
                axes.text(x, y, f"{row[column][0]:.2f}", ha="center", va="center", fontsize=8, **style)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(taus)), list(taus), fontsize=8)
    figure.colorbar(picture, ax=axes, label="Kendall's tau with the known cause", shrink=0.6)
    return figure


def traded(models: list[Model], metric: str) -> Figure:
    """Methods by the metric and by the known causes, both in the mean over the models, with the front of both.

    Those far behind the others, by more than three times the middle half's width, are left out.
    """
    x = np.mean([model.metrics[metric][0] for model in models], 0)
    y = np.mean([np.mean([cause[0] for cause in model.causes.values()], 0) for model in models], 0)
    near = np.all([v > np.median(v) - 3 * np.ptp(np.quantile(v, [0.25, 0.75])) for v in (x, y)], 0)
    names = [name for name, shown in zip(models[0].methods, near, strict=True) if shown]
    return fronted(names, x[near], y[near], f"{metric}, higher is better")


def fronted(names: list[str], x: np.ndarray, y: np.ndarray, label: str) -> Figure:
    """Points with their names, and the front: those to which no other point is better in both."""
    figure = Figure(layout="constrained", dpi=120, figsize=(7, 5))
    axes = figure.add_subplot(xlabel=label, ylabel="known causes, higher is better")
    best = pareto(-x, y)
    axes.scatter(x, y, c=np.where(best, "black", "0.6"))
    order = np.flatnonzero(best)[np.argsort(x[best])]
    axes.plot(x[order], y[order], color="black", linewidth=0.8)
    heights = np.linspace(0.02, 0.98, len(x))  # of the names, at the right, in the order of the points
    for i, height in zip(np.argsort(y), heights, strict=True):
        line = {"arrowstyle": "-", "color": "0.8", "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(
            names[i],
            (x[i], y[i]),
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            weight="bold" if best[i] else "normal",
            arrowprops=line,
        )
    axes.grid(alpha=0.3)
    return figure


def main(folders: list[Path], out: Path | None, figure: Path | None, trade: Path | None) -> None:
    taus: dict[str, dict[str, np.ndarray]] = {}
    columns: list[str] = []
    models = [measured(folder) for folder in folders]
    for model in models:
        for cause, by_cause in model.causes.items():
            columns.append(model.name + cause)
            for metric, by_metric in model.metrics.items():
                taus.setdefault(metric, {})[columns[-1]] = agreement(by_metric, by_cause)
    everywhere = {m: np.mean([row[c] for c in columns], 0) for m, row in taus.items() if row.keys() >= {*columns}}
    taus = {m: {"mean": everywhere[m], **taus[m]} for m in sorted(everywhere, key=lambda m: -everywhere[m][0])}
    columns = ["mean", *columns]
    rows = [[metric.replace("_", " "), *(spread(row[c]) for c in columns)] for metric, row in taus.items()]
    publish(out, "# Which metrics agree with known causes", table(["metric", *columns], rows), NOTES)
    if figure:
        drawn({metric.replace("_", " "): row for metric, row in taus.items()}, columns).savefig(figure)
    if trade:
        traded(models, "srg (mean)").savefig(trade)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("folders", nargs="+", type=Path, help="of tokentm leaderboard configs/agreement.py")
    arguments.add_argument("--figure", type=Path, metavar="FILE", help="draw the table to this PNG file")
    arguments.add_argument(
        "--trade", type=Path, metavar="FILE", help="draw removal against known causes to this PNG file"
    )
    given = arguments.parse_args()
    main(given.folders, given.out, given.figure, given.trade)
