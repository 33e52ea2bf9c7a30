"""What the commands say on a terminal: complaints, progress, and one sentence for a lack of memory."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tokentm_jax.errors import InputError, printable


def complain(sentence: str) -> None:
    click.echo(f"Error: {printable(' '.join(sentence.split()))}", err=True)


def show_results(table: Path) -> None:
    """Print the Markdown table of a finished run, and where it lies."""
    for line in table.read_text(encoding="utf-8").splitlines():
        if not line.startswith("<!-- "):
            click.echo(printable(line))
    click.echo(f"The results are in {printable(table.parent)}")


def console() -> Console:
    """Standard output; as wide as needed where nobody looks, such as in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def print_table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], notes: Sequence[str] = (), right: Collection[str] = ()
) -> None:
    """Rows below their heads, of which those in `right` are above numbers; then notes."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, justify="right" if head in right else "left", no_wrap=head == heads[0])
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    out = console()
    out.print(table)
    for note in notes:
        out.print(Text(note, style="dim"))


@contextmanager
def memory_errors() -> Iterator[None]:
    """The device's lack of memory as an InputError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # JAX's is a RuntimeError
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise InputError(
                "the memory is not enough: a smaller --batch-size, where there is one, may help"
            ) from None
        raise


@contextmanager
def running(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left, which a function of the number of steps moves on; for those who look."""
    from rich.progress import Progress

    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def running_work(title: str = "Batches", unit: str = "batches") -> Iterator[Any]:
    """A progress bar with the speed and the time left, above the figures so far, if there are any; a line now and then
    where nobody looks."""
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TextColumn("{task.fields[speed]}"), console=console)
    task = bar.add_task(title, total=None, speed="looking at what is there")
    began: list[tuple[float, int]] = []  # the first report: what was done before that took no time of this run
    printed = 0.0

    with Live(bar, console=console, transient=True) as live:

        def report(done: int, total: int, more: Any) -> None:
            """`total` 0: unknown. `more`: how many are skipped, or a function that gives the figures."""
            nonlocal printed
            now = time.monotonic()
            began.append((now, done)) if not began else None
            speed = (done - began[0][1]) / max(now - began[0][0], 1e-9)
            text = f"{speed:.1f} {unit}/s" if speed else "starting"
            text += f", {_duration((total - done) / speed)} left" if speed and total else ""
            text += f", {more} skipped" if more and not callable(more) else ""
            bar.update(task, completed=done, total=total or None, speed=text)
            every = 2 if console.is_terminal else 30  # figures of a large run take a while themselves
            if now - printed <= every and (done != total or callable(more)):
                return
            printed = now
            if not console.is_terminal:
                click.echo(printable(f"{title}: {done} of {total or 'unknown'} {unit}, {text}"), err=True)
            elif callable(more):
                live.update(Group(bar, _figures(more())))

        yield report


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _figures(rows: Any) -> Table:
    """The numbers of methods so far."""
    rows = [row for row in rows if row["method"] != "clean"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    values = {(row["method"], row["metric"]): f"{row['value']:.3f}" for row in rows}
    table = Table("So far", box=None)
    for name in metrics:
        table.add_column(name.replace("_", " "), justify="right")
    for name in dict.fromkeys(row["method"] for row in rows):
        table.add_row(Text(name), *(values.get((name, metric), "") for metric in metrics))
    return table
