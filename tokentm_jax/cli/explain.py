"""`tokentm explain` and `tokentm explain-audio`: heatmaps of photos and of recordings."""

import json
import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import click

from tokentm_jax.cli.heatmaps import (
    Pictures,
    Writer,
    classes_asked,
    columns_of,
    fail,
    output_names,
    print_result,
    prompts_asked,
    sheet_names,
)
from tokentm_jax.cli.options import (
    MODELS_HELP,
    PATH,
    TEXT,
    class_names,
    make_folder,
    methods_of,
    parse_options,
    start_jax,
)
from tokentm_jax.cli.terminal import running
from tokentm_jax.errors import InputError
from tokentm_jax.identity import digest

OF_OPTION = "Option of the method; repeatable."
KINDS = click.Choice(["png", "pdf", "svg"])
OF_COLOURS = "Of the maps: inferno, magma, viridis, cividis, turbo or grey."
HEARS = "spoken_digits"  # the shipped model of recordings


def _shared(thing: str, model: str, checkpoint: str, *more: Any, target: Sequence[str] = ("--target",)) -> Any:
    """The options of both commands, in the order of their help, with `more` in their midst."""
    of_target = (
        f"Class to explain, by number or name; several as a,b,c, or repeat; 'each': all classes of a model with up to "
        f"10, else each {thing}'s top five. Default: each {thing}'s predicted class."
    )
    of_method = "A method, several as a,b,c, or 'all'."
    options = [
        click.option("--model", type=TEXT, help=model),
        click.option("--checkpoint", type=PATH, help=checkpoint),
        click.option("--method", default="tokentm", show_default=True, help=of_method),
        click.option(*target, "targets", multiple=True, metavar="CLASS", help=of_target),
        click.option("--versus", metavar="CLASS", help="Explain why the class, and not this other one."),
        *more,
        click.option("--out", type=PATH, default="explanations", show_default=True, help="Folder."),
        click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help=OF_OPTION),
        click.option("--batch-size", type=click.IntRange(1, 1024), default=8, show_default=True),
        class_names,
        click.option("--format", "kind", type=KINDS, default="png", show_default=True, help="Format of pictures."),
        click.option("--title", help="Line above a picture; default: what it explains. Empty for none."),
        click.option("--colours", metavar="NAME", default="inferno", show_default=True, help=OF_COLOURS),
        click.option("--squares", is_flag=True, help="Show each patch as a square, not smoothly."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."),
    ]

    def add(command: Any) -> Any:
        return reduce(lambda given, option: option(given), reversed(options), command)

    return add


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@_shared(
    "photo",
    MODELS_HELP,
    "Weights; default: the shipped model's, or timm's of a timm name, from the Hugging Face Hub.",
    click.option(
        "--text", "prompts", multiple=True, metavar="PROMPT", help="Explain a prompt, with CLIP or SigLIP; repeatable."
    ),
)
def explain(photos: tuple[str, ...], **given: Any) -> None:
    """Show the top five classes of photos and write heatmaps.

    PHOTO is a file, a folder or a pattern. For each photo, <name>.png (photo, heatmap, both) and <name>.npz (the
    map and how it was made) go to the output folder. With several methods, classes or prompts, each batch of photos
    gives one picture, a grid with a name for each row and column, and each photo <name>.<method>.<class>.npz, or the
    number of the prompt, of which a name has what differs. The same command replaces its files; where another question
    was answered before, or a file of yours is, <name>-2 is the next name.

    \b
    Examples:
      tokentm explain cat.jpg
      tokentm explain photos/ --model deit_tiny_patch16_224
      tokentm explain cat.jpg --method tokentm,rollout,gae --target dog
      tokentm explain cat.jpg dog.jpg --target cat,dog --format pdf --squares
      tokentm explain cat.jpg --versus dog
      tokentm explain cat.jpg --model hf-hub:openai/clip-vit-base-patch32 --text "a cat" --text "whiskers"
      tokentm explain cat.jpg --option ffn=false --json
    """
    _explain("photo", photos, **given)


@click.command("explain-audio")
@click.argument("recordings", nargs=-1, required=True, metavar="SOUND...")
@_shared(
    "recording",
    f"{MODELS_HELP[:-1]}, else {HEARS}.",
    f"Weights; default: the shipped model {HEARS}.",
    target=("--class", "--target"),
)
def explain_audio(recordings: tuple[str, ...], model: str | None, checkpoint: Path | None, **given: Any) -> None:
    """Show the top five classes of recordings and write heatmaps over their spectrograms.

    SOUND is a file (WAV, FLAC or OGG), a folder or a pattern. For each recording, <name>.png (spectrogram, heatmap,
    both, with time and frequency) and <name>.npz (the map, its first row the lowest frequency, and how it was made)
    go to the output folder; with several methods as in `tokentm explain`. Of 1 to 32 channels, at 1 to 384 kHz.

    \b
    Examples:
      tokentm explain-audio seven.wav
      tokentm explain-audio seven.wav --method tokentm,gae,occlusion --class 9
      tokentm explain-audio dog.wav --model hf-hub:MIT/ast-finetuned-audioset-10-10-0.4593
    """
    if model is None and checkpoint is None:
        model = HEARS
    _explain("recording", recordings, model=model, checkpoint=checkpoint, **given)


def _explain(
    what: str,
    files: tuple[str, ...],
    *,
    model: str | None,
    checkpoint: Path | None,
    method: str,
    targets: tuple[str, ...],
    versus: str | None,
    out: Path,
    options: tuple[str, ...],
    batch_size: int,
    classes: Path | None,
    kind: str,
    title: str | None,
    colours: str,
    squares: bool,
    as_json: bool,
    prompts: tuple[str, ...] = (),
) -> None:
    """What both commands do; `what` is "photo" or "recording"."""
    from tokentm_jax.cli.figure import look_of
    from tokentm_jax.data.photos import find_photos
    from tokentm_jax.methods.table import METHODS
    from tokentm_jax.models.loading import load

    chosen, settings = methods_of(method), parse_options(options)
    for name in chosen:
        METHODS[name].bind(name, settings)  # an unknown option is noticed before any work
    if prompts and (targets or versus is not None):
        raise InputError("--text explains a prompt: leave out --target and --versus")
    pictures = Pictures(title, kind, look_of(colours, squares))
    start_jax()
    vit = load(model, checkpoint, class_names=classes)
    what = vit.preprocessing.kind
    other = None if versus is None else vit.class_index(versus)
    asked = prompts_asked(vit, list(dict.fromkeys(prompts))) if prompts else classes_asked(vit, targets, other)
    if other is not None and other in (one.index for one in asked):
        raise InputError(f"--target and --versus are the same class, {vit.class_name(other)!r}")
    if other is not None and any(one.rank for one in asked):
        raise InputError("--versus compares with one class: name the classes of --target instead of 'each'")
    tiling = getattr(vit.module, "tiling", None)
    if squares and tiling is not None and tiling.patch != tiling.stride:
        raise InputError(f"the patches of {vit.name} overlap: leave out --squares")
    if not prompts:
        vit.require_classes()
    columns = columns_of(chosen, asked)
    make_folder(out)

    results: dict[str, dict[str, Any]] = {}
    paths: list[Path] = []
    for argument in files:
        try:
            found = find_photos([argument], vit.preprocessing.suffixes, what)
            paths += [path for path in found if path not in paths]
        except InputError as error:
            fail(results, argument, error)
    results |= {str(path): {} for path in paths}
    weights = None if checkpoint is None else os.path.realpath(checkpoint)
    question = digest(vit.name, weights, chosen, settings, [one.identity for one in asked], other)
    suffixes = [column.suffix for column in columns]
    if len(columns) == 1 or len(paths) == 1:  # else a picture is of a batch, and has another name
        suffixes.append(f".{kind}")
    names = output_names(paths, out, suffixes, question)
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    sheets = list(names.values()) if len(paths) == 1 else sheet_names(batches, out, f".{kind}", question)
    with running("Explaining", len(paths)) as step:
        for sheet, batch in zip(sheets, batches, strict=True):
            rows = min(batch_size, len(paths))
            writer = Writer(vit, columns, settings, other, out, names, sheet, question, rows, pictures)
            writer.write(batch, results, skip_unfit=method == "all")
            step(len(batch))

    failed = sum("error" in result for result in results.values())
    if as_json:
        click.echo(json.dumps([{"path": path, **result} for path, result in results.items()], indent=1))
    else:
        for path, result in results.items():
            if "error" not in result:
                print_result(path, result)
    if failed:
        click.echo(f"{failed} of {len(results)} {what}s failed", err=True)
        click.get_current_context().exit(2)
