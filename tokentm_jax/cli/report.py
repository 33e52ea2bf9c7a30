"""`tokentm report`: one page that shows photos, an evaluation or a store of maps."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tokentm_jax.cli import options
from tokentm_jax.cli.options import MODELS_HELP, PATH, TEXT, methods_of, names_of
from tokentm_jax.cli.recipes import own_tasks
from tokentm_jax.errors import InputError, printable

METHODS_SHOWN = ("tokentm", "gae", "attn_lrp", "legrad", "transformer_attribution", "rollout")


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="PHOTO|SOUND|TEXT...|RUN|STORE")
@click.option("--out", type=PATH, default="report.html", show_default=True, help="The page.")
@click.option("--model", type=TEXT, help=f"{MODELS_HELP[:-1]}, or the run's.")
@click.option(
    "--checkpoint", type=PATH, help="Weights; default: the shipped model's, timm's of a timm name, or the run's."
)
@click.option("--methods", help=f"As a,b,c; default: {', '.join(METHODS_SHOWN)}; or those of the run or store.")
@click.option("--target", help="Class to explain in photos, by number or name, beside the most probable ones.")
@click.option(
    "--top", type=click.IntRange(1, 10), default=3, show_default=True, help="Number of classes of each photo."
)
@click.option("--data", type=TEXT, metavar="SOURCE", help="Where the photos of a run or store lie now.")
@click.option("--limit", type=click.IntRange(1), help="Number of photos, taken at even intervals.")
@click.option(
    "--best", type=click.IntRange(0, 50), default=3, show_default=True,
    help="Of a run: number of the best and of the worst images of each method that are explained.",
)  # fmt: skip
@own_tasks
@options.class_names
@options.may_overwrite
def report(
    what: tuple[str, ...], out: Path, target: str | None, top: int, best: int, overwrite: bool, **given: Any
) -> None:
    """Write a page that shows what a model looks at.

    PHOTO and SOUND are a file, a folder or a pattern, TEXT is a text, as the model takes: each is explained by several
    methods for its most probable classes, with the curve of its probability as pixels or words are removed, and block
    by block (not texts). RUN is the folder of a finished `tokentm evaluate`: its tables and curves, and the best and
    worst images of every method. STORE is what `tokentm dataset` wrote; one of texts or recordings needs --model.

    The page is one file, needs no network, and no server. Needs the extra [report].

    \b
    Examples:
      tokentm report cat.jpg --target cat
      tokentm report photos/ --model deit_tiny_patch16_224 --out deit.html
      tokentm report "a stirring, funny film" --model runs/sst2_minilm
      tokentm report runs/photos
      tokentm report maps --data photos/
    """
    from tokentm_jax.cli.report_details import Photos
    from tokentm_jax.cli.report_page import Given, photos_page, run_page, store_page, write_page
    from tokentm_jax.configs import rows

    kind, methods = _kind(what, given["model"] is None), given["methods"]
    chosen = None if methods is None else (methods_of if kind == "photos" else names_of)(methods)
    asked = Given(**{**given, "methods": chosen})
    source = click.get_current_context().get_parameter_source
    for option, *kinds in (
        ("target", "photos"),
        ("top", "photos"),
        ("best", "a run"),
        ("task", "a run"),
        ("data", "a run", "a store"),
    ):
        if source(option) is ParameterSource.COMMANDLINE and kind not in kinds:
            raise InputError(f"--{option} is for a report on {' or '.join(kinds)}, not on {kind}")
    options.require_place(out, overwrite)
    options.start_jax()
    if kind == "photos":
        vit = asked.load()
        vit.require_classes()
        klass = None if target is None else vit.class_index(target)
        found: dict[str, Any] = {}
        for argument in what:
            found |= vit.preprocessing.found(argument, len(found) + 1)
        files = [os.path.realpath(each) for each in found.values() if isinstance(each, Path)]
        if overwrite and os.path.realpath(out) in files:
            raise InputError(f"the page {out} is one of the {vit.preprocessing.kind}s: choose another name")
        photos = Photos(vit, rows(*(chosen or METHODS_SHOWN)), top, klass, chosen is not None)
        page = photos_page(photos, found, asked.limit)
    elif kind == "a run":
        page = run_page(Path(what[0]), asked, best)
    else:
        page = store_page(what[0], asked)
    write_page(out, page, overwrite)
    click.echo(f"The page is {printable(out)} ({out.stat().st_size / 2**20:.1f} MiB)")


def _kind(what: Sequence[str], files: bool) -> str:
    """What was given: "photos" (or recordings or texts), "a run" or "a store"; `files`: a single one must exist."""
    for each in what:
        stores = any(os.path.lexists(Path(each) / root) for root in ("tokentm.json", "zarr.json"))
        is_store = ("://" in each and " " not in each) or stores
        if is_store or os.path.lexists(Path(each) / "results.json"):
            kind = "a store" if is_store else "a run"
            if len(what) > 1:
                raise InputError(f"{each} is {kind}: a report is on one of them, or on photos")
            return kind
    if files and len(what) == 1 and not os.path.lexists(what[0]) and not glob.has_magic(what[0]):
        raise InputError(f"{what[0]} does not exist: expected photos, a run or a store")
    return "photos"
