"""`tokentm evaluate`: methods by a recipe."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from tokentm_jax.cli import options
from tokentm_jax.cli.options import MODELS_HELP, PATH, TEXT
from tokentm_jax.cli.recipes import own_tasks, read_recipe
from tokentm_jax.cli.terminal import complain, running_work, show_results


@click.command()
@click.argument("recipe", type=PATH, metavar="CONFIG.py")
@click.option("--model", type=TEXT, help=MODELS_HELP)
@click.option("--checkpoint", type=PATH, help="Weights, instead of the recipe's.")
@click.option("--data", type=TEXT, help="Folder, zip, .mat file or tfds:NAME:SPLIT, instead of the recipe's.")
@click.option("--methods", help="Rows of the recipe or other methods, as a,b,c.")
@click.option("--limit", type=click.IntRange(1), help="Number of examples, drawn by the seed.")
@click.option("--half", type=click.Choice(["even", "odd"]), help="Use only the images at even (or odd) positions.")
@click.option("--names", type=TEXT, metavar="PATTERN", help="Use only images whose names match; !PATTERN: do not.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="Instead of the recipe's.")
@click.option("--label-map", type=TEXT, metavar="FILE", help="JSON or CSV: the data set's class name, the model's.")
@options.class_names
@click.option("--maps", type=TEXT, multiple=True, help="Store of `tokentm dataset` to take maps from; repeatable.")
@click.option("--out", type=PATH, help="Folder; default: runs/<name of the recipe>.")
@own_tasks
@options.may_overwrite
def evaluate(recipe: Path, methods: str | None, out: Path | None, overwrite: bool, **given: Any) -> None:
    """Measure explanation methods by a recipe; started again with the same folder, it resumes where it stopped.

    CONFIG.py is a Python file that is run, and whose `config`, or what its `get_config(KEY=VALUE, ...)` returns, is an
    EvaluateConfig. The results are results.json, results.md and curves.png.

    \b
    Example:
      tokentm evaluate configs/perturbation.py --methods tokentm,gae --limit 100
    """
    from tokentm_jax.configs import EvaluateConfig, check, select
    from tokentm_jax.models.loading import load
    from tokentm_jax.runs.evaluate import evaluate, examples
    from tokentm_jax.runs.store import open_maps

    config = read_recipe(recipe, EvaluateConfig)
    classes, maps = given.pop("classes"), given.pop("maps")
    if given["model"] is not None:  # another model's checkpoint would not fit
        config = dataclasses.replace(config, checkpoint=None)
    config = dataclasses.replace(config, **options.changes(given))
    if methods is not None:
        config = select(config, options.names_of(methods))
    check(config)
    options.start_jax(config.batch_size)
    stored = [open_maps(path) for path in maps]
    source = examples(config)
    vit = load(config.model, config.checkpoint, class_names=classes)
    folder = out or Path("runs") / config.name
    options.make_folder(folder)
    with running_work() as report:
        results = evaluate(config, vit, source, folder, report, stored, overwrite=overwrite)
    skipped = results["run"]["skipped"]
    for sentence in skipped["examples"].values():
        complain(f"skipped: {sentence}")
    if skipped["count"]:
        click.echo(f"{skipped['count']} images were skipped", err=True)
    show_results(folder / "results.md")
