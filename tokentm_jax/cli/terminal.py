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


class _Rate:
    """How much is done in a second since the first report: what was done before that took no time of this run."""

    first: tuple[float, int] | None = None

    def __call__(self, now: float, done: int) -> float:
        self.first = self.first or (now, done)
        return (done - self.first[1]) / max(now - self.first[0], 1e-9)


@contextmanager
def running_images() -> Iterator[Any]:
    """A progress bar with images per second and the time left; a line now and then where nobody looks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("Images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    rate, shown = _Rate(), [0.0]

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Images", total=None, speed="looking at what is there")

        def report(done: int, total: int, skipped: int) -> None:
            now = time.monotonic()
            speed = rate(now, done)
            text = f"{speed:.1f} images/s, {_duration((total - done) / speed)} left" if speed else "starting"
            text += f", {skipped} skipped" if skipped else ""
            bar.update(task, completed=done, total=total, speed=text)
            if not console.is_terminal and (now - shown[0] > 30 or done == total):
                shown[0] = now
                click.echo(f"{done} of {total} images, {text}", err=True)

        yield report


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


@contextmanager
def running_table(title: str = "Batches") -> Iterator[Any]:
    """A progress bar with the time left, above the figures so far; a line now and then where nobody looks."""
    from rich.live import Live
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task(escape(title), total=None)
    rate, shown = _Rate(), [0.0]

    with Live(bar, console=console, transient=True) as live:

        def report(done: int, total: int, rows: Any) -> None:
            now = time.monotonic()
            speed = rate(now, done)
            bar.update(task, completed=done, total=total)
            every = 2 if console.is_terminal else 60  # figures of a large run take a while themselves
            if now - shown[0] < every:
                return
            shown[0] = now
            figures = rows()
            if not console.is_terminal:
                said = f"{(total - done) / speed / 60:.0f} min left" if speed else "starting"
                click.echo(printable(f"{title}: {done} of {total}, {said}"), err=True)
                return
            metrics = list(dict.fromkeys(row["metric"] for row in figures if row["method"] != "clean"))
            table = Table(box=None)
            for column in ("So far", *(name.replace("_", " ") for name in metrics)):
                table.add_column(column, justify="left" if column == "So far" else "right")
            values = {(row["method"], row["metric"]): f"{row['value']:.3f}" for row in figures}
            for name in dict.fromkeys(row["method"] for row in figures if row["method"] != "clean"):
                table.add_row(Text(name), *(values.get((name, metric), "") for metric in metrics))
            live.update(Group(bar, table))

        yield report
