"""`tokentm explain-text`: words in the colours of their scores."""

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentm_jax.cli.heatmaps import softmax
from tokentm_jax.cli.options import PATH, TEXT, may_overwrite, methods_of, parse_options, require_place, start_jax
from tokentm_jax.cli.terminal import complain, console, memory_errors, running
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import write_text

if TYPE_CHECKING:
    import numpy as np

    from tokentm_jax.inputs.texts import Word
    from tokentm_jax.models.loading import Model

SHOWN_CLASSES = 5
BAR = 24  # characters
Scores = dict[int, dict[str, list[list["Word"]]]]  # class -> method -> for every text its words


@click.command("explain-text")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--model", type=TEXT, required=True, help="Folder of a text classifier, or hf-hub:OWNER/NAME.")
@click.option("--method", default="tokentm", show_default=True, help="A method, several as a,b,c, or 'all'.")
@click.option("--target", help="Class to explain, by number or name; default: each text's predicted class.")
@click.option(
    "--out",
    type=PATH,
    metavar="PAGE.html",
    help="Also write a page, with the best five classes of each text.",
)
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the method; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of words.")
@may_overwrite
def explain_text(
    texts: tuple[str, ...],
    model: str,
    method: str,
    target: str | None,
    out: Path | None,
    options: tuple[str, ...],
    as_json: bool,
    overwrite: bool,
) -> None:
    """Show which words of texts speak for a class, and which against it.

    TEXT is a text; "-" reads one from each line of the standard input. On a terminal the words are coloured: red for
    the class and blue against it, or yellow for importance where a method gives no signs. Elsewhere each has a line
    with its score.

    \b
    Examples:
      tokentm explain-text "a stirring, funny film" --model runs/sst2_minilm
      tokentm explain-text - --model runs/sst2_minilm --method tokentm,attn_lrp --out reviews.html < reviews.txt
    """
    from tokentm_jax.methods.table import METHODS as TABLE
    from tokentm_jax.models.loading import load

    chosen, settings = methods_of(method), parse_options(options)
    for name in chosen:
        TABLE[name].bind(name, settings)
    if out is not None:
        require_place(out, overwrite)
    given = [line for text in texts for line in (_lines() if text == "-" else [text])]
    start_jax()
    text = load(model)
    text.require_classes()
    asked = None if target is None else text.class_index(target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tokens = text.read(given)
    for warning in caught:
        click.echo(f"Warning: {printable(warning.message)}", err=True)
    outputs = _probabilities(text.logits(tokens))
    targets = outputs.argmax(-1) if asked is None else [asked] * len(given)
    page = () if out is None else map(int, outputs.argsort(-1)[:, -SHOWN_CLASSES:].ravel())
    scores = _explain(text, given, tokens, chosen, sorted({*map(int, targets), *page}), settings, method == "all")
    results = [
        _described(text, given[i], outputs[i], int(targets[i]), scores[int(targets[i])], i) for i in range(len(given))
    ]
    if out is not None:
        _write_page(out, text, given, outputs, scores, asked, overwrite)
    if as_json:
        click.echo(json.dumps(results, indent=1))
    else:
        for result in results:
            _print(result, _signed(scores))
    if out is not None and not as_json:
        click.echo(f"The page is {printable(out)}")


def _lines() -> list[str]:
    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError:
        raise InputError("the standard input is no UTF-8 text") from None


def _probabilities(logits: Any) -> "np.ndarray":
    import numpy as np

    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise InputError("the model gives no finite numbers for these texts")
    return softmax(logits)


def _explain(
    text: "Model",
    given: list[str],
    tokens: Any,
    methods: list[str],
    classes: list[int],
    options: dict[str, Any],
    skip_unfit: bool,
) -> Scores:
    import numpy as np

    from tokentm_jax.inputs.texts import words
    from tokentm_jax.methods.explain import explain

    found: Scores = {index: {} for index in classes}
    with running("Explaining", len(methods) * len(classes)) as step:
        for name in methods:
            try:
                for index in classes:
                    with memory_errors():
                        scores = explain(text, tokens, name, index, **options)
                    if not np.isfinite(scores).all():
                        raise InputError(f"{name} gives no finite scores for these texts")
                    found[index][name] = words(text, given, scores)
                    step(1)
            except InputError as error:
                if not skip_unfit:
                    raise
                complain(f"{name} is left out: {str(error).partition(';')[0]}")
    return found


def _described(
    text: "Model", given: str, outputs: Any, target: int, scores: dict[str, list[list["Word"]]], place: int
) -> dict[str, Any]:
    order = outputs.argsort()[::-1][:SHOWN_CLASSES]
    return {
        "text": given,
        "classes": [{"name": text.class_name(int(i)), "probability": float(outputs[i])} for i in order],
        "target": {"class": target, "name": text.class_name(target), "probability": float(outputs[target])},
        "methods": {
            name: [{"word": w.text, "score": w.score, "start": w.start, "end": w.end} for w in found[place]]
            for name, found in scores.items()
        },
    }


def _signed(scores: Scores) -> set[str]:
    """The methods whose scores have signs; those of the others are importance."""
    return {
        name
        for found in scores.values()
        for name, texts in found.items()
        if any(word.score < 0 for words in texts for word in words)
    }


def _print(result: dict[str, Any], signed: set[str]) -> None:
    from rich.text import Text

    out = console()
    target = result["target"]
    out.print(f"{printable(target['name'])} {100 * target['probability']:.1f} %", markup=False, style="bold")
    for name, words in result["methods"].items():
        most = max((abs(word["score"]) for word in words), default=0) or 1
        if out.is_terminal and out.color_system and not out.no_color:
            line, end = Text(f"{name}: " if len(result["methods"]) > 1 else ""), 0
            for word in words:
                line.append(printable(result["text"][end : word["start"]]))
                line.append(printable(word["word"]), style=_style(word["score"] / most, name in signed))
                end = word["end"]
            line.append(printable(result["text"][end:]), style="dim")
            out.print(line)
            continue
        if len(result["methods"]) > 1:
            out.print(name, markup=False)
        width = max((len(printable(word["word"])) for word in words), default=0)
        for word in words:
            bar = ("+" if word["score"] > 0 else "-") * round(BAR * abs(word["score"]) / most)
            out.print(
                f"  {printable(word['word']):{width}} {word['score']:10.4g} {bar}", markup=False, highlight=False
            )


def _style(share: float, signed: bool) -> str:
    """Background of a score in [-1, 1]: towards red for the class, towards blue against it; of a map without signs
    towards yellow."""
    strength = min(abs(share), 1)
    low = round(255 * (1 - strength))
    red, blue = (255, low) if share >= 0 else (low, 255)
    return f"black on #{red:02x}{low if signed else 255:02x}{blue:02x}"


def _write_page(
    out: Path, text: "Model", given: list[str], outputs: Any, scores: Scores, asked: int | None, overwrite: bool
) -> None:
    """Write the page, which begins with the class `asked`; None: with the predicted class of each text."""
    from tokentm_jax.cli.templates import render
    from tokentm_jax.methods.titles import title_of

    classes = list(scores)
    methods = list(scores[classes[0]])
    numbers = [
        [{name: [w.score for w in scores[index][name][i]] for name in methods} for index in classes]
        for i in range(len(given))
    ]
    cut = text.preprocessing.cut(given)
    shown = [
        {
            "parts": _parts(given[i], scores[classes[0]][methods[0]][i]),
            "said": [(text.class_name(int(k)), outputs[i][k]) for k in outputs[i].argsort()[::-1][:SHOWN_CLASSES]],
            "cut": text.preprocessing.length if cut[i] else 0,
        }
        for i in range(len(given))
    ]
    names, signed = [text.class_name(index) for index in classes], _signed(scores)
    settings = {
        "scores": numbers,
        "signed": {name: name in signed for name in methods},
        "sentences": {name: title_of(name).sentence for name in methods},
        "classes": names,
        "texts": [
            {"own": classes.index(int(own.argmax())), "probability": [float(own[index]) for index in classes]}
            for own in outputs
        ],
        "first": "" if asked is None else str(classes.index(asked)),
    }
    page = render(
        "text.html.j2",
        title="Which words matter for a class?",
        methods=[(name, title_of(name).name) for name in methods],
        classes=names,
        texts=shown,
        settings=settings,
        model=text.name,
    )
    write_text(out, page, overwrite=overwrite)


def _parts(given: str, words: list["Word"]) -> list[dict[str, Any]]:
    """The text as it was given, in pieces: words by their number, and what stands between them."""
    parts, end = [], 0
    for number, word in enumerate(words):
        parts += [
            {"text": given[end : word.start], "word": None},
            {"text": given[word.start : word.end], "word": number},
        ]
        end = word.end
    return [part for part in [*parts, {"text": given[end:], "word": None}] if part["text"]]
