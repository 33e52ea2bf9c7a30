"""`tokentm convert`: a checkpoint with its description."""

from pathlib import Path

import click

from tokentm_jax.cli.options import MODELS_HELP, PATH, TEXT, class_names, may_overwrite, start_jax
from tokentm_jax.errors import printable
from tokentm_jax.files import require_ours


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("out", type=PATH)
@click.option("--model", type=TEXT, help=MODELS_HELP)
@click.option("--img-size", type=click.IntRange(1), help="Another resolution; position embeddings are resampled.")
@click.option("--half", is_flag=True, help="Store numbers of 16 bits, for a file of half the size.")
@class_names
@may_overwrite
def convert(
    checkpoint: Path,
    out: Path,
    model: str | None,
    img_size: int | None,
    half: bool,
    classes: Path | None,
    overwrite: bool,
) -> None:
    """Write CHECKPOINT to OUT with its architecture, preprocessing and class names.

    OUT is NAME.safetensors, or a name without suffix for an Orbax folder. It then loads without --model.

    \b
    Example:
      tokentm convert deit_tiny.pth deit_tiny.safetensors --model deit_tiny_patch16_224
    """
    import jax

    from tokentm_jax.models.checkpoint import read_description, write_checkpoint
    from tokentm_jax.models.folders import is_folder
    from tokentm_jax.models.loading import load

    require_ours(out, overwrite, folder=not out.suffix)  # before minutes of reading
    start_jax()
    vit = load(model, checkpoint, img_size=img_size, class_names=classes)
    known = {} if is_folder(checkpoint) else read_description(checkpoint) or {}  # such as the accuracy, and the epochs
    extra = {**known, "name": vit.name}
    dtype = "float16" if half else "float32"
    written = write_checkpoint(
        out, vit.module, vit.params, vit.preprocessing, vit.class_names, extra, dtype, overwrite=overwrite
    )
    millions = sum(leaf.size for leaf in jax.tree.leaves(vit.params)) / 1e6
    click.echo(f"{printable(written)}: {vit.name}, {millions:.1f} M parameters, {vit.module.num_classes} classes")
