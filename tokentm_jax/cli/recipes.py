"""Recipes: Python files that are run, and define an evaluation or a leaderboard."""

import contextlib
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

from tokentm_jax.cli.options import parse_options
from tokentm_jax.errors import InputError
from tokentm_jax.files import read_text

LARGEST_RECIPE = 2**20  # bytes


def read_recipe(recipe: Path, *kinds: type) -> Any:
    """The config of a recipe, every field as its annotation says.

    Args:
      recipe: a Python file that defines `config`, or the function `get_config(**options)`; options follow the file's
        name after a colon, as in `perturbation.py:data=imagenet,model=vit_base`.
      kinds: what the config may be, such as `EvaluateConfig`.

    Raises:
      InputError: no such file, an error in it, an option that it does not have, a config of another type.
    """
    from tokentm_jax.validation import check_fields, check_options, options_of

    name, colon, rest = str(recipe).rpartition(".py:")
    path = Path(f"{name}.py") if colon else recipe
    options = parse_options(rest.split(",") if rest and colon else [])

    def refuse(reason: str) -> NoReturn:
        raise InputError(f"the recipe {path} {reason}") from None

    read_text(path, LARGEST_RECIPE, "the recipe")  # a pipe, a device, no text: before it is run
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where results go, it has nothing to print
            found = runpy.run_path(str(path))
            make = found.get("get_config")
            if callable(make):
                config = make(**check_options(f"the recipe {path}", options_of(make), options))
            elif options:
                refuse("has no options: it defines no function `get_config`")
            else:
                config = found.get("config")
    except SystemExit as error:
        refuse(f"ends the program (SystemExit: {error.code})")
    except InputError as error:
        if str(path) in str(error):
            raise
        refuse(f"cannot be run: {error}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a recipe may raise what it likes
        refuse(f"cannot be run: {type(error).__name__}{_said(error)}")
    if type(config) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        refuse(f"must define `config` as a {names}, or a function `get_config` that gives one")
    return check_fields(config, f"the recipe {path}")


def read_task(recipe: Path | None) -> None:
    """Run a recipe for the task that it defines, where one is given. Raises InputError as `read_recipe`."""
    if recipe is not None:
        from tokentm_jax.configs import EvaluateConfig
        from tokentm_jax.runs.leaderboard import LeaderboardConfig

        read_recipe(recipe, EvaluateConfig, LeaderboardConfig)


def _said(error: BaseException) -> str:
    try:
        return f": {error}"
    except Exception:  # the text of a recipe's own exception may fail itself
        return ""
