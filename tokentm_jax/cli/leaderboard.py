"""`tokentm leaderboard`: all methods by all metrics in one table."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from tokentm_jax.cli import options
from tokentm_jax.cli.options import PATH, TEXT
from tokentm_jax.cli.recipes import own_tasks, read_recipe
from tokentm_jax.cli.terminal import running_work, show_results


@click.command()
@click.argument("recipe", type=PATH, metavar="CONFIG.py")
@click.option("--checkpoint", type=PATH, help="Weights, instead of the recipe's.")
@click.option("--methods", help="Rows of the recipe, as a,b,c.")
@click.option("--runs", help="Metrics of the recipe, as a,b,c, with that of its `faithfulness`.")
@click.option("--limit", type=click.IntRange(1), help="Largest number of images of each run.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="Instead of the recipe's.")
@options.class_names
@click.option("--maps", type=TEXT, multiple=True, help="Store of `tokentm dataset` to take maps from; repeatable.")
@click.option("--out", type=PATH, help="Folder; default: runs/<name of the recipe>.")
@own_tasks
@options.may_overwrite
def leaderboard(
    recipe: Path,
    methods: str | None,
    runs: str | None,
    limit: int | None,
    out: Path | None,
    overwrite: bool,
    **given: Any,
) -> None:
    """Measure methods by many metrics and rank them; started again with the same folder, it goes on.

    CONFIG.py is a Python file that is run, and whose `config`, or what its `get_config(KEY=VALUE, ...)` returns, is a
    LeaderboardConfig. The results are leaderboard.md, leaderboard.json and leaderboard.png (faithfulness against
    cost). Every metric has a folder that `tokentm compare` reads. The speed of the methods is measured at the end,
    on this machine.

    \b
    Example:
      tokentm leaderboard configs/leaderboard.py:data=cifar10 --methods tokentm,gae --limit 100
    """
    from tokentm_jax.models.loading import load
    from tokentm_jax.runs.leaderboard import LeaderboardConfig, check, leaderboard, select
    from tokentm_jax.runs.store import open_maps

    chosen = {"methods": methods, "runs": runs}
    chosen = {kind: options.names_of(names) for kind, names in chosen.items() if names is not None}
    config = select(read_recipe(recipe, LeaderboardConfig), **chosen)
    classes, maps = given.pop("classes"), given.pop("maps")
    own = [dataclasses.replace(run, **options.changes(given)) for run in config.runs]
    if limit is not None:
        own = [dataclasses.replace(run, limit=min(limit, run.limit or limit)) for run in own]
    config = check(dataclasses.replace(config, runs=own))
    options.start_jax(config.runs[0].batch_size)
    stores = [open_maps(path) for path in maps]
    vit = load(config.runs[0].model, config.runs[0].checkpoint, class_names=classes)
    folder = out or Path("runs") / config.name
    options.make_folder(folder)
    leaderboard(config, vit, folder, stores, running_work, overwrite=overwrite)
    show_results(folder / "leaderboard.md")
