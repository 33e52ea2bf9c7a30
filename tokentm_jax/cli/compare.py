"""`tokentm compare`: runs side by side."""

import json
from pathlib import Path

import click

from tokentm_jax.cli.options import PATH, as_json
from tokentm_jax.cli.recipes import own_tasks
from tokentm_jax.cli.terminal import print_table


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--to", metavar="METHOD", help="The row that the others are compared with; default: the first.")
@own_tasks
@as_json
def compare(runs: tuple[Path, ...], to: str | None, as_json: bool) -> None:
    """Put finished evaluations side by side, with paired differences and their 95 % intervals.

    RUN is an output folder of `tokentm evaluate`. Of one run, every method is compared with the first, or with that
    of --to; of several, every method with the same method of the first run, over the images that both have. A method
    is called better or worse where the interval of the difference excludes zero, and else a tie.

    \b
    Example:
      tokentm compare runs/perturbation_photos --to gae
    """
    from tokentm_jax.runs.report import ARROWS
    from tokentm_jax.runs.report import compare as compare_runs

    entries = compare_runs(list(dict.fromkeys(runs)), to)
    if as_json:
        click.echo(json.dumps(entries, indent=1))
        return
    heads = ("Metric", "Method", "Run", "Value", "Difference", "95 % interval", "Verdict", "To", "Images")
    rows = []
    for entry in sorted(entries, key=lambda e: e["metric"]):  # stable: methods and runs keep their order
        compared = ("", "", "", "")
        if entry["baseline"] is not None:
            interval = f"[{entry['low']:+.4f}, {entry['high']:+.4f}]"
            compared = (f"{entry['difference']:+.4f}", interval, entry["verdict"] or "", entry["baseline"])
        metric = f"{entry['metric']} {ARROWS[entry['better']]}"
        value = f"{entry['value']:.4f}"
        rows.append((metric, entry["method"], entry["run"], value, *compared, entry["images"]))
    notes = ["Arrows show which direction is better. A tie: the 95 % interval includes zero."]
    print_table(heads, rows, notes, right=("Value", "Difference", "Images"))
