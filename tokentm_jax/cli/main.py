"""The program: the group of all commands, which turns bad input into one sentence and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from tokentm_jax import __version__
from tokentm_jax.cli.compare import compare
from tokentm_jax.cli.convert import convert
from tokentm_jax.cli.dataset import dataset
from tokentm_jax.cli.evaluate import evaluate
from tokentm_jax.cli.explain import explain, explain_audio
from tokentm_jax.cli.explain_text import explain_text
from tokentm_jax.cli.leaderboard import leaderboard
from tokentm_jax.cli.report import report
from tokentm_jax.cli.serve import serve
from tokentm_jax.cli.tables import methods, models
from tokentm_jax.cli.terminal import complain, memory_errors
from tokentm_jax.cli.train import train
from tokentm_jax.errors import InputError
from tokentm_jax.files import reason

INTERRUPTED = 130  # exit code, as shells have it


@contextmanager
def _short_errors() -> Iterator[None]:
    """Click's own errors, which repeat what was given, are as short and printable as an InputError."""
    try:
        yield
    except click.ClickException as error:
        setattr(error, "message", str(InputError(str(error.message))))  # noqa: B010  # it is declared as final
        raise


class Commands(click.Group):
    """The group whose commands turn bad input into one sentence and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with memory_errors():
                return super().main(*args, **kwargs)  # which knows what to do where nobody reads our output
        except InputError as error:
            complain(str(error))
        except OSError as error:
            where = f"{click.format_filename(error.filename)}: " if error.filename else ""
            complain(f"{where}{reason(error)}")
        except RecursionError:
            complain("something that was given is nested too deeply")
        sys.exit(2)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _short_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _short_errors():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tokentm")
def main() -> None:
    """Explain what a Vision Transformer sees: TokenTM heatmaps and other methods.

    \b
    Example:
      tokentm explain cat.jpg
    """


for command in (
    explain,
    explain_text,
    explain_audio,
    models,
    methods,
    convert,
    train,
    dataset,
    evaluate,
    compare,
    leaderboard,
    report,
    serve,
):
    main.add_command(command)
