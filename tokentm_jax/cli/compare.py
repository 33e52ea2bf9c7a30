"""`tokentm compare`: runs side by side."""

import json
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from tokentm_jax.cli.options import PATH, own_tasks
from tokentm_jax.cli.terminal import console
from tokentm_jax.errors import printable


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--to", metavar="METHOD", help="The row that the others are compared with; default: the first.")
@own_tasks
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def compare(runs: tuple[Path, ...], to: str | None, task: tuple[Path, ...], as_json: bool) -> None:
    """Put finished evaluations side by side, with paired differences and their 95 % intervals.

    RUN is an output folder of `tokentm evaluate`. Of one run, every method is compared with the first, or with that
    of --to; of several, every method with the same method of the first run, over the images that both have. A method
    is called better or worse where the interval of the difference excludes zero, and else a tie.

    \b
    Example:
      tokentm compare runs/perturbation_photos --to gae
    """
    from tokentm_jax.cli.recipes import run_tasks
    from tokentm_jax.runs.report import ARROWS
    from tokentm_jax.runs.report import compare as compare_runs

    run_tasks(task)
    entries = compare_runs(list(dict.fromkeys(runs)), to)
    if as_json:
        click.echo(json.dumps(entries, indent=1))
        return
    table = Table(box=None)
    for column in ("Metric", "Method", "Run", "Value", "Difference", "95 % interval", "Verdict", "To", "Images"):
        table.add_column(column, justify="right" if column in ("Value", "Difference", "Images") else "left")
    for entry in sorted(entries, key=lambda e: e["metric"]):  # stable: methods and runs keep their order
        compared = ("", "", "", "")
        if entry["baseline"] is not None:
            interval = f"[{entry['low']:+.4f}, {entry['high']:+.4f}]"
            compared = (f"{entry['difference']:+.4f}", interval, entry["verdict"] or "", entry["baseline"])
        metric = f"{entry['metric']} {ARROWS[entry['better']]}"
        names = [Text(printable(name)) for name in (metric, entry["method"], entry["run"])]
        row = (*names, f"{entry['value']:.4f}", *compared[:3], Text(printable(compared[3])))
        table.add_row(*row, str(entry["images"]))
    out = console()
    out.print(table)
    out.print("Arrows show which direction is better. A tie: the 95 % interval includes zero.", style="dim")
