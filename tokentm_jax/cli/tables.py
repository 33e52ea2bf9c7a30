"""`tokentm models` and `tokentm methods`: what there is."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click

from tokentm_jax.cli.options import as_json
from tokentm_jax.cli.terminal import print_table


@click.command()
@as_json
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
    heads = ("Model", "Parameters", "Resolution", "Patch", "Weights")
    shown = [
        (
            row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            _sides(row["resolution"]),
            _sides(row["patch_size"]),
            "shipped" if row["shipped"] else row["tags"][0] if row["tags"] else "needs a checkpoint",
        )
        for row in rows
    ]
    print_table(heads, shown, right=heads[1:-1])


def _sides(size: int | Sequence[int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return str(height) if height == width else f"{height} x {width}"


def _model_rows() -> Iterator[dict[str, Any]]:
    from tokentm_jax.models.architectures import TIMM, build, repositories
    from tokentm_jax.models.checkpoint import read_description, read_safetensors
    from tokentm_jax.models.folders import CONFIG, read_section, read_weights
    from tokentm_jax.models.loading import shipped, shipped_folders

    models: dict[str, Any] = {}  # options, number of parameters, and whether it is shipped
    for name, file in shipped().items():
        if description := read_description(file):
            count = sum(tensor.size for tensor in read_safetensors(file).values())
            models[name] = description["architecture"], count, True
    for name, folder in shipped_folders().items():
        vision = read_section(folder / CONFIG, "model").section("vision_config")
        options = {"img_size": vision("image_size", int), "patch_size": vision("patch_size", int)}
        models[name] = options, sum(tensor.size for tensor in read_weights(folder).values()), True
    models |= {name: (row["options"], row["parameters"], False) for name, row in TIMM.items()}
    for name, (options, count, is_shipped) in models.items():
        module = build(options)
        yield {
            "name": name,
            "parameters": count,
            "resolution": list(module.img_size),
            "patch_size": module.patch_size,
            "shipped": is_shipped,
            "tags": [] if is_shipped else list(repositories(name)),
        }


@click.command()
@as_json
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
    shown = []
    for name, method in METHODS.items():
        specific, derivative = ("yes" if has else "no" for has in (method.class_specific, method.differentiable))
        shown.append((name, method.paper, method.year, specific, method.output, derivative, method.passes))
    notes = (
        "Passes: forward (F) and backward (B) passes of the model per batch; n patches.",
        "Derivative: whether jax.grad of a map is true; it refuses the others.",
    )
    print_table(("Method", "Paper", "Year", "Class-specific", "Output", "Derivative", "Passes"), shown, notes)
