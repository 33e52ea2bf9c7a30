"""`tokentm explain`, and its aliases for recordings (`explain-audio`) and texts (`explain-text`)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tokentm_jax.cli import options as shared
from tokentm_jax.cli.names import output_names, question_of, require_free, sheet_names
from tokentm_jax.cli.options import MODELS_HELP, PATH, TEXT, class_names, may_overwrite, mixed_precision
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import write_text
from tokentm_jax.identity import digest

KINDS = click.Choice(["png", "pdf", "svg", "html"])
SPEECH = "spoken_digits"  # the shipped model of recordings
ASKED = "scenes_words"  # the shipped model that answers questions
BATCH = 8

of_method = click.option(
    "--method",
    help="A method, several as a,b,c, or 'all'. Default: tokentm_mix for photos and recordings, attn_lrp for words.",
)
of_option = click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the method; repeatable."
)


@click.command()
@click.argument("samples", nargs=-1, required=True, metavar="PHOTO|SOUND|TEXT...")
@click.option("--model", type=TEXT, help=MODELS_HELP)
@click.option(
    "--checkpoint", type=PATH,
    help="Weights; default: the shipped model's, or timm's of a timm name, from the Hugging Face Hub.",
)  # fmt: skip
@of_method
@click.option(
    "--target", "--class", "targets", multiple=True, metavar="CLASS",
    help="Class to explain, by number or name; several as a,b,c, or repeat; 'each': all classes of a model with up to "
    "10, else the five most probable ones of each sample. Default: the predicted class of each.",
)  # fmt: skip
@click.option("--versus", metavar="CLASS", help="Explain why the class, and not this other one.")
@click.option(
    "--text", "prompts", multiple=True, metavar="PROMPT", help="Explain a prompt, with CLIP or SigLIP; repeatable."
)
@click.option(
    "--ask", type=TEXT, metavar="QUESTION",
    help="Ask a vision-language model about photos, and explain each word of its answer; default model: scenes_words.",
)  # fmt: skip
@click.option("--out", type=PATH, default="explanations", show_default=True, help="Folder.")
@of_option
@click.option("--batch-size", type=click.IntRange(1, 1024), default=BATCH, show_default=True)
@class_names
@mixed_precision
@click.option("--format", "kind", type=KINDS, help="Format of pictures; default: png, and of texts a page, html.")
@click.option("--title", help="Line above a picture or page; default: what it explains. Empty for none.")
@click.option(
    "--colours", metavar="NAME", default="inferno", show_default=True,
    help="Of the maps: inferno, magma, viridis, cividis, turbo or grey.",
)  # fmt: skip
@click.option("--squares", is_flag=True, help="Show each patch as a square, not smoothly.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def explain(
    samples: tuple[str, ...],
    model: str | None,
    checkpoint: Path | None,
    method: str | None,
    targets: tuple[str, ...],
    versus: str | None,
    prompts: tuple[str, ...],
    ask: str | None,
    out: Path,
    options: tuple[str, ...],
    batch_size: int,
    classes: Path | None,
    mixed_precision: bool,
    kind: str | None,
    title: str | None,
    colours: str,
    squares: bool,
    as_json: bool,
) -> None:
    """Show the top five classes of photos, recordings or texts, and write heatmaps.

    The model decides what is explained. A photo or a recording (WAV, FLAC or OGG) is a file, a folder or a pattern. A
    text is an argument, and "-" reads one from each line of the standard input.

    For each photo or recording, <name>.png (picture, heatmap, both) and <name>.npz (the map and how it was made) go to
    the output folder. With several methods, classes or prompts, each batch gives one picture, a grid with a name for
    each row and column, and each photo <name>.<method>.<class>.npz, or the number of the prompt, of which a name has
    what differs.

    The words of a text are printed: on a terminal red for the class and blue against it, or yellow for importance
    where a method gives no signs; elsewhere each with its score on a line. Texts are written to text-1.npz, text-2.npz
    and so on, and to one page.

    With --ask, the picture of a photo has a map for each word of the answer, and the table has the words of the
    question that matter. --versus is then another word: why the answer, and not this one.

    The same command replaces its files; where another question was answered before, or a file of yours is, <name>-2 is
    the next name.

    \b
    Examples:
      tokentm explain cat.jpg
      tokentm explain photos/ --model deit_tiny_patch16_224
      tokentm explain cat.jpg --method tokentm,rollout,gae --target dog
      tokentm explain cat.jpg dog.jpg --target cat,dog --format pdf --squares
      tokentm explain cat.jpg --versus dog
      tokentm explain cat.jpg --model hf-hub:openai/clip-vit-base-patch32 --text "a cat" --text "whiskers"
      tokentm explain cat.jpg --method tokentm --option ffn=false --json
      tokentm explain scene.png --ask "What colour is the large circle?"
      tokentm explain seven.wav --model spoken_digits
      tokentm explain "a stirring, funny film" --model runs/sst2_minilm
    """
    from tokentm_jax.cli.heatmaps import Job, Writer, classes_asked, columns_of, print_result, prompts_asked
    from tokentm_jax.cli.words import page_of, signed_methods
    from tokentm_jax.inputs.pictures import look_of
    from tokentm_jax.methods.titles import RECOMMENDED
    from tokentm_jax.models.loading import load

    bound = None if method is None else _bound(method, options)
    if prompts and (targets or versus is not None):
        raise InputError("--text explains a prompt: leave out --target and --versus")
    look = look_of(colours, squares)
    if ask is not None and (targets or prompts):
        raise InputError("--ask explains the words of an answer: leave out --target and --text")
    shared.start_jax()
    vit = load(ASKED if ask is not None and checkpoint is None is model else model, checkpoint, class_names=classes)
    vit = vit.mixed() if mixed_precision else vit
    chosen, settings = bound or _bound(RECOMMENDED[vit.preprocessing.kind], options)
    if ask is not None:
        from tokentm_jax.cli.asking import Asked, explain_asked

        shared.make_folder(out)
        explain_asked(vit, samples, Asked(ask, versus, chosen, settings, kind or "png", title, look), out, as_json)
        return
    if hasattr(vit.module, "image_grid"):
        raise InputError(f"{vit.name} answers questions about photos: ask one, with --ask")
    reader = vit.preprocessing
    kind = str(kind or reader.figures)
    if kind == "html" and (reader.figures != kind or squares or colours != "inferno"):
        raise InputError("--format html is for texts, without --squares and --colours; `tokentm report` has photos")
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
    shared.make_folder(out)

    results, listed = _found(vit, samples)
    given = [one.given for one in listed]
    weights = None if checkpoint is None else os.path.realpath(checkpoint)
    question = digest(vit.name, weights, chosen, settings, [one[:3] for one in asked], other)
    suffixes = [column.suffix for column in columns]
    single = len(columns) == 1 and reader.frame is not None  # else a picture is of a batch, and has another name
    if single or len(given) == 1:
        suffixes.append(f".{kind}")
    names = output_names(given, out, suffixes, question)
    listed = [one._replace(file=names[i]) for i, one in enumerate(listed)]
    batches = [listed[i : i + batch_size] for i in range(0, len(listed), batch_size)]
    sheets, stem = ([listed] if listed else [], "texts") if kind == "html" else (batches, "sheet")
    titles = sheet_names([[one.given for one in sheet] for sheet in sheets], out, f".{kind}", question, stem)
    titles = [listed[0].file] if len(listed) == 1 else titles
    job = Job(vit, columns, settings, min(batch_size, len(listed)), method == "all", other, squares)
    writer = Writer(job, out, question, kind, title, look)
    texts = job.run(batches, results, lambda found, i: writer.write(found, titles[i % len(titles)]))
    fine = {name: result for name, result in results.items() if "error" not in result}
    if texts and kind == "html":
        file, of_page = out / f"{titles[0]}.html", question_of(given, question)
        require_free(file, of_page)
        write_text(file, page_of(vit.name, texts, list(fine.values()), None, title, of_page))
        for result in fine.values():
            result["files"].insert(0, str(file))

    found = {one.name: str(one.given) for one in listed}
    if as_json:
        named = "path" if reader.frame is not None else "text"
        entries = [{named: found.get(name, name), **result} for name, result in results.items()]
        click.echo(json.dumps(entries, indent=1))
    else:
        signed = signed_methods(list(fine.values()))
        for name, result in fine.items():
            print_result(found[name], result, signed)
    _end(results, reader.kind)


@click.command("explain-audio", params=explain.params)
@click.pass_context
def explain_audio(context: click.Context, model: str | None, checkpoint: Path | None, **given: Any) -> None:
    """The same as `tokentm explain`, with the shipped model of recordings, spoken_digits, as the default.

    \b
    Examples:
      tokentm explain-audio seven.wav
      tokentm explain-audio seven.wav --method tokentm,gae,occlusion --class 9
    """
    model = SPEECH if model is None and checkpoint is None else model
    context.invoke(explain, model=model, checkpoint=checkpoint, **given)


@click.command("explain-text")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--model", type=TEXT, required=True, help="Folder of a text classifier, or hf-hub:OWNER/NAME.")
@of_method
@click.option("--target", help="Class to explain, by number or name; default: each text's predicted class.")
@click.option(
    "--out", type=PATH, metavar="PAGE.html", help="Also write a page, with the best five classes of each text."
)
@of_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of words.")
@may_overwrite
def explain_text(
    texts: tuple[str, ...],
    model: str,
    method: str | None,
    target: str | None,
    out: Path | None,
    options: tuple[str, ...],
    as_json: bool,
    overwrite: bool,
) -> None:
    """Show which words of texts support a class, as `tokentm explain` does, and write no files but a page.

    \b
    Examples:
      tokentm explain-text "a stirring, funny film" --model runs/sst2_minilm
      tokentm explain-text - --model runs/sst2_minilm --method tokentm,attn_lrp --out reviews.html < reviews.txt
    """
    from tokentm_jax.cli.heatmaps import EACH, Job, classes_asked, columns_of
    from tokentm_jax.cli.words import page_of, print_words, signed_methods
    from tokentm_jax.methods.titles import RECOMMENDED
    from tokentm_jax.models.loading import load

    chosen, settings = _bound(method or RECOMMENDED["text"], options)
    if out is not None:
        shared.require_place(out, overwrite)
    shared.start_jax()
    vit = load(model)
    vit.require_classes()
    first = None if target is None else vit.class_index(target)
    asked = classes_asked(vit, [*([] if target is None else [target]), *([] if out is None else [EACH])])
    results, listed = _found(vit, texts)
    job = Job(vit, columns_of(chosen, asked), settings, min(BATCH, len(listed)), method == "all")
    passages = job.run([listed[i : i + BATCH] for i in range(0, len(listed), BATCH)], results)
    found = {one.name: one.given for one in listed}
    fine = {name: result for name, result in results.items() if "error" not in result}
    if out is not None and passages:
        write_text(out, page_of(vit.name, passages, list(fine.values()), first), overwrite=overwrite)
    entries = []
    for name, one in fine.items():
        index = one["top5"][0]["class"] if first is None else first
        own = next(target for target in one["targets"] if target["class"] == index)
        classes = [{"name": c["name"], "probability": c["probability"]} for c in one["top5"]]
        explained = {key: value for key, value in own.items() if key != "methods"}
        entries.append({"text": found[name], "classes": classes, "target": explained, "methods": own["methods"]})
    if as_json:
        click.echo(json.dumps(entries, indent=1))
    else:
        signed = signed_methods(list(fine.values()))
        for entry in entries:
            print_words(entry["text"], {**entry["target"], "methods": entry["methods"]}, signed)
        if out is not None and passages:
            click.echo(f"The page is {printable(out)}")
    _end(results, "text")


def _bound(method: str, options: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """The methods and their options. Raises InputError for an unknown one, before any work."""
    from tokentm_jax.methods.table import METHODS

    chosen, settings = shared.methods_of(method), shared.parse_options(options)
    for name in chosen:
        METHODS[name].bind(name, settings)
    return chosen, settings


def _found(vit: Any, arguments: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """The results of arguments that name nothing, and an empty one for each sample; and the samples."""
    from tokentm_jax.cli.heatmaps import Sample, fail

    failed: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for argument in arguments:
        try:
            found |= vit.preprocessing.found(argument, len(found) + 1)
        except InputError as error:
            fail(failed, argument, error)
    return failed | {name: {} for name in found}, [Sample(name, given) for name, given in found.items()]


def _end(results: dict[str, dict[str, Any]], what: str) -> None:
    if failed := sum("error" in result for result in results.values()):
        click.echo(f"{failed} of {len(results)} {what}s failed", err=True)
        click.get_current_context().exit(2)
