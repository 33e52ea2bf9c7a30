"""The program: the group of all commands, which turns bad input into one sentence and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import click

from tokentm_jax import __version__
from tokentm_jax.cli.answers import explain_lm
from tokentm_jax.cli.compare import compare
from tokentm_jax.cli.completion import add_completion
from tokentm_jax.cli.convert import convert
from tokentm_jax.cli.data import data
from tokentm_jax.cli.dataset import dataset
from tokentm_jax.cli.evaluate import evaluate
from tokentm_jax.cli.explain import explain, explain_audio, explain_text
from tokentm_jax.cli.export import export
from tokentm_jax.cli.leaderboard import leaderboard
from tokentm_jax.cli.report import report
from tokentm_jax.cli.serve import serve
from tokentm_jax.cli.tables import methods, models
from tokentm_jax.cli.terminal import complain, memory_errors
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


def _of_jax(error: BaseException) -> bool:
    """Whether JAX is missing since its import ended with this error: of an environment variable that it reads, or
    of a limit of the address space."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return "jax" not in sys.modules and any(name.split(".")[0] in ("jax", "jaxlib") for name in frames)


class OneSentence(click.Command):
    """A command that turns bad input into one sentence and exit code 2."""

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
        except (ImportError, ValueError) as error:
            if not _of_jax(error):
                raise
            complain(f"JAX cannot be imported: {reason(error)}")
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


class Commands(OneSentence, click.Group):
    """The group of all commands."""


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tokentm")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Explain what a Vision Transformer sees: TokenTM heatmaps and other methods.

    \b
    Example:
      tokentm explain cat.jpg
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


# Every command with what it does, in one line of a terminal of 80 columns.
COMMANDS = {
    explain: "Show classes of photos, sounds or texts; write heatmaps.",
    explain_text: "As explain, for texts, which are printed.",
    explain_audio: "As explain, with the shipped model of recordings.",
    explain_lm: "Show why a language model writes each word.",
    serve: "Serve a page that explains photos, recordings or texts.",
    report: "Write a page about photos, an evaluation or a store.",
    models: "List the models that are shipped or can be loaded.",
    methods: "List the explanation methods.",
    data: "List and fetch the sample data of the configs.",
    dataset: "Write the maps of a whole data set to a store.",
    export: "Write the maps of a store as plain Parquet files.",
    evaluate: "Measure explanation methods by a recipe.",
    compare: "Compare finished evaluations, with intervals.",
    leaderboard: "Rank methods by many metrics.",
    convert: "Write a checkpoint that describes itself.",
}
for command, summary in COMMANDS.items():
    command.short_help = summary
    main.add_command(command)
add_completion(COMMANDS)


@main.command("train", hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def moved_train(arguments: tuple[str, ...]) -> None:
    raise InputError("training is run from a clone of the repository: python -m models.training RECIPE.py")
