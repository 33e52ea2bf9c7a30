"""`tokentm data`: the sample data, listed and fetched."""

import json

import click
from rich.table import Table
from rich.text import Text

from tokentm_jax.cli.options import TEXT
from tokentm_jax.cli.terminal import console, running
from tokentm_jax.errors import printable
from tokentm_jax.samples import SAMPLES, VARIABLE, cache, folder_of


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@click.pass_context
def data(ctx: click.Context, as_json: bool) -> None:
    """List the sample data that the project's configs are made for, and fetch them.

    A set is taken from the folder that the environment variable TOKENTM_DATA names (../shared/data where it is not
    set), and else from the cache folder, where `tokentm data fetch` puts it. What is downloaded is checked against its
    SHA-256.

    \b
    Examples:
      tokentm data
      tokentm data fetch photos deit_tiny
    """
    if ctx.invoked_subcommand is not None:
        return
    rows = [
        {
            "name": name,
            "about": sample.about,
            "download": sample.download,
            "licence": sample.licence,
            "origin": sample.address,
            "sha256": sample.sha256,
            "folder": None if (folder := folder_of(name)) is None else str(folder),
        }
        for name, sample in SAMPLES.items()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None)
    for column in ("Name", "Here", "Download", "What it is"):
        table.add_column(column, no_wrap=column != "What it is")
    for row in rows:
        sample = SAMPLES[row["name"]]
        size = f"{sample.download / 1e6:.3g} MB" if sample.download else "a package"
        what = Text(sample.about).append(f"\n{sample.origin}; licence: {sample.licence}", style="dim")
        table.add_row(row["name"], "yes" if row["folder"] else "no", size, what)
    out = console()
    out.print(table)
    out.print(
        Text(f"`tokentm data fetch NAME` fetches into {printable(cache())}; {VARIABLE} names a folder of yours.")
    )


@data.command(short_help="Download sample data and check their SHA-256.")
@click.argument("names", nargs=-1, required=True, type=TEXT, metavar="NAME...|all")
def fetch(names: tuple[str, ...]) -> None:
    """Download sample data and check their SHA-256; what is here already is left as it is.

    Downloads need the extra [data]. The licences are those of the originals: `tokentm data` lists them.

    \b
    Example:
      tokentm data fetch photos deit_tiny
    """
    from tokentm_jax.data.originals import fetch as fetch_one

    for name in SAMPLES if names == ("all",) else dict.fromkeys(names):
        folder = fetch_one(name, running)
        for path in SAMPLES[name].made:
            click.echo(printable(folder / path))
