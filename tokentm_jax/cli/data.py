"""`tokentm data`: the sample data, listed and fetched."""

import json

import click
from rich.text import Text

from tokentm_jax.cli.options import TEXT, as_json
from tokentm_jax.cli.terminal import console, print_table, running
from tokentm_jax.errors import printable
from tokentm_jax.samples import SAMPLES, VARIABLE, cache, folder_of


@click.group(invoke_without_command=True)
@as_json
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
    shown = []
    for row in rows:
        sample = SAMPLES[row["name"]]
        size = f"{sample.download / 1e6:.3g} MB" if sample.download else "a package"
        what = Text(sample.about).append(f"\n{sample.origin}; licence: {sample.licence}", style="dim")
        shown.append((row["name"], "yes" if row["folder"] else "no", size, what))
    print_table(("Name", "Here", "Download", "What it is"), shown)
    place = printable(cache())
    console().print(Text(f"`tokentm data fetch NAME` fetches into {place}; {VARIABLE} names a folder of yours."))


@data.command(short_help="Download sample data and check their SHA-256.")
@click.argument("sets", nargs=-1, required=True, type=TEXT, metavar="NAME...|all")
def fetch(sets: tuple[str, ...]) -> None:
    """Download sample data and check their SHA-256; what is here already is left as it is.

    Downloads need the extra [data]. The licences are those of the originals: `tokentm data` lists them.

    \b
    Example:
      tokentm data fetch photos deit_tiny
    """
    from tokentm_jax.data.originals import fetch as fetch_one

    for name in SAMPLES if sets == ("all",) else dict.fromkeys(sets):
        folder = fetch_one(name, running)
        for path in SAMPLES[name].made:
            click.echo(printable(folder / path))
