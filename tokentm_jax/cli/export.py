"""`tokentm export`: the maps of a store as plain Parquet files."""

import click

from tokentm_jax.cli.options import TEXT
from tokentm_jax.cli.terminal import running_work
from tokentm_jax.errors import printable


@click.command()
@click.argument("store", type=TEXT)
@click.option("--out", type=TEXT, required=True, help="New folder, or a URL such as s3://bucket/export.")
@click.option("--to", default="parquet", show_default=True, help="Layout: parquet or huggingface.")
def export(store: str, out: str, to: str) -> None:
    """Write the finished maps of STORE as Parquet files with the methods' own values, float32.

    With huggingface, OUT also has a README.md: `datasets.load_dataset(OUT)` reads it, and it can be uploaded as it is.

    \b
    Example:
      tokentm export maps --out plain --to huggingface
    """
    from tokentm_jax.runs.export import export_maps

    with running_work("Maps", "maps") as report:
        count = export_maps(store, out, to, report)
    click.echo(f"{printable(out)}: {count} Parquet {'files' if count > 1 else 'file'}")
