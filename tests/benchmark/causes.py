"""All methods by all known causes: one table, with intervals.

    python tests/benchmark/causes.py runs/causes_* --out tests/benchmark/results/causes.md

Each folder is one of `tokentm evaluate configs/causes.py:data=...,methods=all`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import parser, publish, table
from scipy.stats import rankdata

from tokentm_jax.configs import RANDOM
from tokentm_jax.runs.report import STYLES, Finished, open_finished

COLUMNS = {"pointing": ("share", "auc"), "effects": ("linear_correlation",), "deletion": ("rank_correlation",)}
SHORT = {"linear_correlation": "", "rank_correlation": ""}
NOTES = """In brackets: 95 % intervals, over images, or over mosaics where cells are compared. **Bold** is the best
method of a column, and *slanted* are those whose paired difference to it has an interval that includes zero. The
mean rank is over the kinds of data (1 is the best), for methods that all of them have. "level" is the number of
columns in which a method is the best or level with the best. A dash: not measured there."""


def cell(figure: dict) -> str:
    numbers = (f"{figure[name]:.2f}".replace("0.", ".", 1) for name in ("value", "low", "high"))
    value, low, high = numbers
    return STYLES[figure.get("mark")].format(value) + f" [{low}, {high}]"


def read(folders: Sequence[Path]) -> dict[tuple[str, str], tuple[Finished, dict[str, dict]]]:
    """By run and metric: the run, and by method its figure."""
    found = {}
    for folder in folders:
        run = open_finished(folder)
        name = run.config.name.removeprefix("causes_").removesuffix("_all")
        for metric in COLUMNS[run.config.task]:
            found[name, metric] = run, {f["method"]: dict(f) for f in run.figures if f["metric"] == metric}
    return found


def main(folders: Sequence[Path], out: Path | None) -> None:
    columns = read(folders)
    methods = list(dict.fromkeys(method for _, by_method in columns.values() for method in by_method))
    ranks: dict[str, dict[str, list[float]]] = {}
    for (name, _), (_, by_method) in columns.items():
        own = {method: f["value"] for method, f in by_method.items() if method != RANDOM}
        for method, rank in zip(own, rankdata([-value for value in own.values()]), strict=True):
            ranks.setdefault(method, {}).setdefault(name, []).append(rank)
    everywhere = {name for name, _ in columns}
    mean = {
        method: float(np.mean([np.mean(each) for each in by_run.values()]))
        for method, by_run in ranks.items()
        if by_run.keys() == everywhere
    }
    level = {
        method: sum(bool(by_method[method].get("mark")) for _, by_method in columns.values() if method in by_method)
        for method in methods
    }
    order = sorted((m for m in methods if m != RANDOM), key=lambda m: mean.get(m, np.inf))
    order += [m for m in methods if m == RANDOM]
    rows = [
        [
            f"`{method}`",
            f"{mean[method]:.1f}" if method in mean else "-",
            level[method] if method != RANDOM else "-",
            *(cell(found[method]) if method in found else "-" for _, found in columns.values()),
        ]
        for method in order
    ]
    heads = [f"{name} {SHORT.get(metric, metric)}".strip().replace("_", " ") for name, metric in columns]
    counted = ", ".join(
        f"{name} {max(f['images'] for f in found.values())}"
        for name, found in {name: found for (name, _), (_, found) in columns.items()}.items()
    )
    publish(
        out,
        "# All methods by known causes",
        NOTES,
        f"Images or cells: {counted}.",
        table(["method", "mean rank", f"level, of {len(columns)}", *heads], rows),
    )


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("folders", nargs="+", type=Path, help="finished evaluations of configs/causes.py")
    given = arguments.parse_args()
    main(given.folders, given.out)
