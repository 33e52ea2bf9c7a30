"""Recipes: Python files that are run, and define an evaluation or a leaderboard; and files that define tasks."""

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tokentm_jax.cli.options import PATH, parse_options
from tokentm_jax.errors import InputError
from tokentm_jax.files import read_text

LARGEST_RECIPE = 2**20  # bytes


@contextlib.contextmanager
def _running(what: str, path: Path) -> Iterator[None]:
    """In it, code of this file runs: each of its errors is an InputError, and what it prints goes to stderr."""
    refused = f"{what} {path}"
    read_text(path, LARGEST_RECIPE, what)  # a pipe, a device, no text: before it is run
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise InputError(f"{refused} ends the program (SystemExit: {error.code})") from None
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{refused} cannot be run: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a recipe may raise what it likes
        raise InputError(f"{refused} cannot be run: {type(error).__name__}{_said(error)}") from None


def _run_tasks(ctx: click.Context, _: click.Parameter, files: tuple[Path, ...]) -> None:
    from tokentm_jax.metrics import TASKS

    for path in () if ctx.resilient_parsing else files:
        before = dict(TASKS)
        with _running("the file", path):
            runpy.run_path(str(path))
        if before == TASKS:
            raise InputError(f"the file {path} adds no task to tokentm_jax.metrics.TASKS")


own_tasks = click.option(
    "--task", type=PATH, multiple=True, metavar="FILE.py", callback=_run_tasks, expose_value=False,
    help="File that adds your metric to TASKS; it is run.",
)  # fmt: skip


def read_recipe(recipe: Path, *kinds: type) -> Any:
    """The config, of one of `kinds`, that a recipe defines as `config`, or that its `get_config(**options)` returns.

    Options follow the file's name after a colon, as in `perturbation.py:data=imagenet,model=vit_base`. InputError for
    no such file, an error in it, an option that it does not have, and a config of another type.
    """
    from tokentm_jax.validation import check_fields, check_options, options_of

    name, colon, rest = str(recipe).rpartition(".py:")
    path = Path(f"{name}.py") if colon else recipe
    options = parse_options(rest.split(",") if rest and colon else [])
    with _running("the recipe", path):
        found = runpy.run_path(str(path))
        make = found.get("get_config")
        if callable(make):
            config = make(**check_options(f"the recipe {path}", options_of(make), options))
        elif options:
            raise InputError(f"the recipe {path} has no options: it defines no function `get_config`")
        else:
            config = found.get("config")
    if type(config) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        defined = f"must define `config` as a {names}, or a function `get_config` that gives one"
        raise InputError(f"the recipe {path} {defined}")
    return check_fields(config, f"the recipe {path}")


def _said(error: BaseException) -> str:
    try:
        return f": {error}"
    except Exception:  # the text of a recipe's own exception may fail itself
        return ""
