"""From results per image to numbers with intervals, tables, curves and comparisons."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokentm_jax import metrics
from tokentm_jax.errors import InputError
from tokentm_jax.metrics import Measures
from tokentm_jax.records import Records, record_file, table_of
from tokentm_jax.tasks import CLEAN, PREDICTED, RANDOM, TASKS, EvaluateConfig, Row


def summarise(
    config: EvaluateConfig, clean: Records, records: Mapping[str, Records], keys: Sequence[str], final: bool = True
) -> list[dict[str, Any]]:
    """The rows of `results.json`. Before the end: values without intervals, and without the targets, of which only
    the images with another prediction come last."""
    task = TASKS[config.task]
    rows: list[dict[str, Any]] = []

    def add(row: str, metric: str, per_image: np.ndarray, statistic: metrics.Statistic) -> None:
        value, low, high = metrics.bootstrap(per_image, statistic, config.seed, 1000 if final else 1)
        entry = {"method": row, "metric": metric, "value": value, "low": low, "high": high, "images": len(per_image)}
        if (row, metric) in config.paper:
            entry["paper"] = config.paper[row, metric]
        rows.append(entry)

    own = sorted((key, CLEAN) for key in keys)
    if (clean.take("label", own) >= 0).all():
        add(CLEAN, "accuracy", 100.0 * clean.take("hit", own), metrics.mean)
    for row in config.rows:
        explained = task.explained if final else (PREDICTED,)
        done, table = table_of(row, explained, clean, records[row.name], keys)
        for metric, (per_image, statistic) in (task.measure(table) if done else {}).items():
            add(row.name, metric, per_image, statistic)
        if done and not table["predicted_finite"].all():
            add(row.name, "finite_maps", 100.0 * table["predicted_finite"], metrics.mean)
    return rows


def markdown(results: Mapping[str, Any]) -> str:
    """`results.md`: a line per method, with intervals; published figures in columns of their own."""
    run, rows = results["run"], results["rows"]
    config = run["config"]
    clean = [row for row in rows if row["method"] == CLEAN]
    others = [row for row in rows if row["method"] != CLEAN]
    columns = list(dict.fromkeys(row["metric"] for row in others))
    cells = {(row["method"], row["metric"]): _cell(row) for row in others}
    heads = {c: c.replace("_", " ") for c in columns}
    for row in others:
        if "paper" in row:
            heads[f"paper: {row['metric']}"] = f"paper: {row['metric']}".replace("_", " ")
            cells[row["method"], f"paper: {row['metric']}"] = f"{row['paper']:g}"
    lines = [
        f"# {config['name']}",
        "",
        f"{run['model']['name']} on {run['data']['name']}: {run['data']['examples']} images, profile "
        f"{config['profile']}, seed {run['seed']}, {run['skipped']['count']} skipped. "
        "In brackets: 95 % intervals over images.",
        *(f"Clean accuracy: {_cell(row)} %." for row in clean),
        "",
        f"| method | {' | '.join(heads.values())} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    for name in dict.fromkeys(row["method"] for row in others):
        lines.append(f"| {name} | {' | '.join(cells.get((name, c), '') for c in heads)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any]) -> str:
    digits = 3 if row["metric"] in ("aopc", "lodds", "saco", "similarity") else 2
    return f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def draw(
    config: EvaluateConfig, clean: Records, records: Mapping[str, Records], keys: Sequence[str], path: Path
) -> None:
    """Write `curves.png`: what the task's numbers summarise, one line per row."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    axes_names = {"perturbation": ("pixels removed [%]", "accuracy [%]"), "segmentation": ("recall", "precision")}
    axes_names["insertion"] = ("pixels changed [%]", "probability")
    for row in config.rows:
        done, table = table_of(row, (PREDICTED,), clean, records[row.name], keys)
        if not done:
            continue
        if config.task == "perturbation":
            for d, name in enumerate(("positive (lower is better)", "negative (higher is better)")):
                curve = np.concatenate([table["clean_hit"][:, None], table["predicted_hit"][:, d]], 1).mean(0)
                panels.setdefault(name, {})[row.name] = (10 * np.arange(len(curve)), 100 * curve)
        elif config.task == "segmentation":
            precision, recall = metrics.precision_recall(table["predicted_histogram"])
            panels.setdefault("foreground, pooled pixels", {})[row.name] = (recall, precision)
        elif config.task == "insertion":
            for d, name in enumerate(("insertion (higher is better)", "deletion (lower is better)")):
                curve = np.exp(table["predicted_log_probability"][:, d]).mean(0)
                panels.setdefault(name, {})[row.name] = (np.linspace(0, 100, len(curve)), curve)
        else:
            (metric, (per_image, statistic)) = next(iter(TASKS[config.task].measure(table).items()))
            values = np.array(metrics.bootstrap(per_image, statistic, config.seed))
            panels.setdefault(metric, {})[row.name] = (values, values)

    bars = config.task not in axes_names
    height = max(4.0, 0.25 * len(config.rows) + 1)
    figure = Figure((5.5 * len(panels) + 3, height), layout="constrained")
    FigureCanvasAgg(figure)
    colours = colormaps["viridis" if len(config.rows) > 12 else "tab10"]
    for k, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), k + 1)
        axes.set_title(title)
        for i, (name, (x, y)) in enumerate(curves.items()):
            if bars:
                value, low, high = x
                axes.errorbar(value, name, xerr=[[value - low], [high - value]], fmt="o", color="black")
                continue
            colour = colours(i / max(len(curves) - 1, 1)) if len(config.rows) > 12 else colours(i % 10)
            style = {"color": "grey", "linestyle": "--"} if name == RANDOM else {"color": colour}
            axes.plot(x, y, label=name, **style)
        if bars:
            axes.invert_yaxis()
        else:
            x_name, y_name = axes_names[config.task]
            axes.set(xlabel=x_name, ylabel=y_name, ylim=(0, None))
        axes.grid(alpha=0.3)
        if not bars and k + 1 == len(panels):
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, format="png", dpi=120)


def compare(outs: Sequence[Path]) -> list[dict[str, Any]]:
    """Differences with 95 % intervals over the images that both have.

    Of one run: every method less the run's first. Of several: every method less the same in the first run.
    Entries have `run`, `method`, `metric`, `value`, `baseline` (what it is compared with), `difference`, `low`,
    `high`, `images`. Raises InputError for a folder without results, or runs of different tasks.
    """
    loaded = []
    for out in outs:
        try:
            config = json.loads((out / "results.json").read_text(encoding="utf-8"))["run"]["config"]
            own = tuple(Row(**row) for row in config["rows"])
            task = TASKS[config["task"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{out} holds no finished evaluation (results.json)") from None
        clean = Records(out / "records" / "clean.jsonl")
        loaded.append((out, config, own, clean))
    if len({config["task"] for _, config, _, _ in loaded}) > 1:
        raise InputError("the runs are of different tasks")
    task, seed = TASKS[loaded[0][1]["task"]], loaded[0][1]["seed"]

    def measured(out: Path, row: Row, clean: Records) -> tuple[list[str], Measures]:
        keys = [key for key, _ in clean.places]
        done, table = table_of(row, task.explained, clean, Records(record_file(out, row)), keys)
        return done, task.measure(table) if done else {}

    first_out, _, first_rows, first_clean = loaded[0]
    baselines = {row.name: measured(first_out, row, first_clean) for row in first_rows}
    entries = []
    for number, (out, _, own, clean) in enumerate(loaded):
        for row in own:
            done, measures = baselines[row.name] if number == 0 else measured(out, row, clean)
            against = first_rows[0].name if len(loaded) == 1 else row.name
            other_done, others = baselines.get(against, ([], {}))
            places, other_places = ({key: i for i, key in enumerate(d)} for d in (done, other_done))
            both = [key for key in done if key in other_places]
            for metric, (per_image, statistic) in measures.items():
                entry = {"run": str(out), "method": row.name, "metric": metric, "baseline": None}
                entry |= {"value": metrics.bootstrap(per_image, statistic, seed, 1)[0], "images": len(done)}
                if both and metric in others and (number or len(loaded) == 1) and (number, row.name) != (0, against):
                    a = per_image[[places[key] for key in both]]
                    b = others[metric][0][[other_places[key] for key in both]]
                    difference, low, high = metrics.paired(a, b, statistic, seed)
                    entry |= {"baseline": against if len(loaded) == 1 else str(first_out), "difference": difference}
                    entry |= {"low": low, "high": high, "images": len(both)}
                entries.append(entry)
    return entries
