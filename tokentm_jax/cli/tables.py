"""`tokentm models` and `tokentm methods`: what there is."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.table import Table

from tokentm_jax.cli.terminal import console


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def models(as_json: bool) -> None:
    """List the shipped models, and timm's: with weights on the Hugging Face Hub, or only for a checkpoint.

    \b
    Example:
      tokentm models
    """
    rows = list(_model_rows())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None)
    for column in ("Model", "Parameters", "Resolution", "Patch", "Weights"):
        table.add_column(column, justify="left" if column in ("Model", "Weights") else "right", no_wrap=True)
    for row in rows:
        weights = "shipped" if row["shipped"] else row["tags"][0] if row["tags"] else "needs a checkpoint"
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            _sides(row["resolution"]),
            _sides(row["patch_size"]),
            weights,
        )
    console().print(table)


def _sides(size: int | Sequence[int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return str(height) if height == width else f"{height} x {width}"


def _model_rows() -> Iterator[dict[str, Any]]:
    from tokentm_jax.models.architectures import ARCHITECTURES, build, parameter_count, tags_of
    from tokentm_jax.models.checkpoint import read_description
    from tokentm_jax.models.loading import shipped

    described = {name: read_description(file) for name, file in shipped().items()}
    configs = {name: (description["architecture"], True) for name, description in described.items() if description}
    for name, (config, is_shipped) in {**configs, **{n: (c, False) for n, (c, _) in ARCHITECTURES.items()}}.items():
        module = build(config)
        yield {
            "name": name,
            "parameters": parameter_count(module),
            "resolution": list(module.img_size),
            "patch_size": module.patch_size,
            "shipped": is_shipped,
            "tags": [] if is_shipped else tags_of(name),
        }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def methods(as_json: bool) -> None:
    """List the explanation methods.

    \b
    Example:
      tokentm methods
    """
    from tokentm_jax.methods.table import METHODS

    if as_json:
        fields = ("summary", "paper", "year", "class_specific", "output", "differentiable", "float32", "passes")
        rows = [{"name": name, **{f: getattr(method, f) for f in fields}} for name, method in METHODS.items()]
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("Method", no_wrap=True)
    for column in ("Paper", "Year", "Class-specific", "Output", "Derivative", "Passes"):
        table.add_column(column)
    for name, method in METHODS.items():
        specific, derivative = ("yes" if has else "no" for has in (method.class_specific, method.differentiable))
        table.add_row(name, method.paper, str(method.year), specific, method.output, derivative, method.passes)
    out = console()
    out.print(table)
    out.print("Passes: forward (F) and backward (B) passes of the model per batch; n patches.", style="dim")
    out.print("Derivative: whether jax.grad of a map is true; it refuses the others.", style="dim")
