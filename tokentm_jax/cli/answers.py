"""`tokentm explain-lm`: which words of a prompt made a decoder write each word of its answer."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentm_jax.cli import options as shared
from tokentm_jax.cli.options import PATH, TEXT, may_overwrite
from tokentm_jax.cli.terminal import complain, console
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import write_text

if TYPE_CHECKING:
    from tokentm_jax.methods.answers import Reasons
    from tokentm_jax.models.loading import Model

TOP = 3  # tokens that are printed for each token of the answer


@click.command("explain-lm")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--model", type=TEXT, default="smollm2", show_default=True,
    help="Folder or GGUF file of a decoder, hf-hub:OWNER/NAME, or smollm2.",
)  # fmt: skip
@click.option("--method", default="attn_lrp", show_default=True, help="A method (`tokentm methods`).")
@click.option("--answer", type=TEXT, help="Explain this answer; default: what the model writes.")
@click.option("--against", type=TEXT, help="Also explain why each token, and not this one.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as a user's message.")
@click.option("--most", type=click.IntRange(1, 512), default=12, show_default=True, help="Tokens that are written.")
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
    help="Draw tokens; 0: the most probable ones.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of these draws.")
@click.option(
    "--contrasts", type=click.IntRange(0, 4), default=2, show_default=True,
    help="Other candidates of each token that it is compared with.",
)  # fmt: skip
@click.option(
    "--out", type=PATH, metavar="PAGE.html", default="answer.html", show_default=True,
    help="The page that is written; of several prompts, PAGE-1.html and so on.",
)  # fmt: skip
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the method; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@may_overwrite
def explain_lm(
    prompts: tuple[str, ...],
    model: str,
    method: str,
    answer: str | None,
    against: str | None,
    chat: bool,
    most: int,
    temperature: float,
    seed: int,
    contrasts: int,
    out: Path,
    options: tuple[str, ...],
    as_json: bool,
    overwrite: bool,
) -> None:
    """Show why a language model writes each token of its answer: which tokens of the prompt matter.

    The page shows the reasons of a token of the answer where it is touched, and why this token, and not another
    candidate. The table has, for each token of the answer, its probability and the most relevant tokens of the prompt,
    in shares of the largest relevance. The first token of a prompt often takes much attention without meaning, so the
    table leaves it out; --json has it. Several prompts, or the lines of the standard input (-), have a page each.

    \b
    Examples:
      tokentm explain-lm "The capital of France is"
      tokentm explain-lm "The capital of France is" --answer " London" --method tokentm
      tokentm explain-lm "What is the capital of France?" --chat --against " London"
      tokentm explain-lm - --chat --out answers.html < questions.txt
    """
    from tokentm_jax.methods.answers import explain_words
    from tokentm_jax.methods.table import METHODS
    from tokentm_jax.models.decoder import Decoder
    from tokentm_jax.models.loading import load
    from tokentm_jax.models.vision_decoder import VisionDecoder

    name, *more = shared.methods_of(method)
    if more:
        raise InputError("an answer is explained by one method")
    settings: dict[str, Any] = {**shared.parse_options(options)}
    METHODS[name].bind(name, settings)
    shared.require_place(out, overwrite)
    shared.start_jax()
    decoder = load(model)
    if not isinstance(decoder.module, Decoder) or isinstance(decoder.module, VisionDecoder):
        instead = "name a decoder, or leave out --model"
        if isinstance(decoder.module, Decoder):
            instead = "ask it about a photo, with `tokentm explain PHOTO --ask`"
        raise InputError(f"{decoder.name} continues no texts: {instead}")
    texts: dict[str, str] = {}
    for argument in prompts:
        texts |= decoder.preprocessing.found(argument, len(texts) + 1)
    pages = [out] if len(texts) == 1 else [out.with_stem(f"{out.stem}-{k}") for k in range(1, len(texts) + 1)]
    for page in pages:
        shared.require_place(page, overwrite)
    drawn: dict[str, Any] = {"most": most, "temperature": temperature, "seed": seed}

    def answered(text: str) -> dict[str, Any]:
        if not text.strip():
            raise InputError(f"a prompt must have a word at least, got {text!r}")
        prompt = decoder.preprocessing.chat(text) if chat else text
        found = explain_words(decoder, prompt, answer, name, **drawn, **settings)
        written = [int(number) for number in found.ids[found.start :]]
        other = ([] if against is None else [against]) + _others(found, contrasts).T.tolist()
        asked = partial(explain_words, decoder, prompt, written, name, candidates=0, **settings)
        return document(decoder, name, found, [asked(against=each) for each in other])

    results = []
    for (label, text), page in zip(texts.items(), pages, strict=True):
        try:
            results.append(answered(text))
        except InputError as error:
            if len(texts) == 1:
                raise
            complain(f"{label}: {error}")
            results.append({"prompt": text, "error": str(error)})
            continue
        write_text(page, page_of(results[-1]), overwrite=overwrite)
        if not as_json:
            _print(results[-1])
            click.echo(f"The page is {printable(page)}")
    if as_json:
        click.echo(json.dumps(results[0] if len(texts) == 1 else results, indent=1))
    if failed := sum("error" in result for result in results):
        click.echo(f"{failed} of {len(results)} prompts failed", err=True)
        click.get_current_context().exit(2)


def _others(found: "Reasons", count: int) -> Any:
    """The most probable tokens [M, count] of each position that were not written."""
    import numpy as np

    own = [[k for k in row if k != i] for row, i in zip(found.candidates, found.ids[found.start :], strict=True)]
    return np.array([row[:count] for row in own], np.int32).reshape(len(own), count)


def document(decoder: "Model", method: str, found: "Reasons", contrasts: Sequence["Reasons"]) -> dict[str, Any]:
    """Everything about an answer, for --json and for the page."""
    words = []
    for row, place in enumerate(range(found.start, len(found.ids))):
        against = {
            int(other.against[row]): other.maps[row, :place] for other in contrasts if other.against is not None
        }
        known: dict[int, tuple[str, float | None]] = {}
        known |= {number: (piece, round(share, 6)) for number, piece, share in found.others(row)}
        for number in against.keys() - known.keys():  # no candidate, but named by the user
            known[number] = decoder.preprocessing.following(found.ids[:place], number), None
        candidates = [
            {
                "token": known[number][0],
                "probability": known[number][1],
                "against": [float(f"{score:.6g}") for score in against[number]] if number in against else None,
            }
            for number in dict.fromkeys([*against, *known])
            if number != found.ids[place]
        ]
        words.append(
            {
                "token": found.pieces[place],
                "logit": float(found.logits[row]),
                "probability": round(float(found.probabilities[row]), 6),
                "scores": [float(f"{score:.6g}") for score in found.maps[row, :place]],
                "candidates": candidates,
            }
        )
    return {"model": decoder.name, "method": method, "prompt": found.pieces[: found.start], "answer": words}


def page_of(result: dict[str, Any]) -> str:
    """The page of an answer."""
    from tokentm_jax.cli.templates import render
    from tokentm_jax.methods.titles import title_of

    maps = [word["scores"] for word in result["answer"]]
    maps += [each["against"] or [] for word in result["answer"] for each in word["candidates"]]
    signed = any(score < 0 for scores in maps for score in scores)
    values: dict[str, Any] = {**result, "method": title_of(result["method"]), "signed": signed, "result": result}
    return render("answer.html.j2", title="Why this word?", **values)


def _print(result: dict[str, Any]) -> None:
    from rich.text import Text

    out, prompt = console(), result["prompt"]
    whole = "".join(word["token"] for word in result["answer"])
    lines = Text("".join(prompt)).append(whole, style="bold").split("\n", allow_blank=True)
    for line in lines:
        line.plain = printable(line.plain)
        out.print(line)
    shown = [_short(word["token"]) for word in result["answer"]]
    width = max(map(len, shown))
    for word, own in zip(result["answer"], shown, strict=True):
        scores = word["scores"][: len(prompt)]
        most = max((abs(score) for score in scores[1:]), default=0) or 1
        best = sorted(range(1, len(prompt)), key=lambda place: -scores[place])[:TOP]
        reasons = ", ".join(f"{_short(prompt[place])} {scores[place] / most:.2f}" for place in best)
        line = f"  {own:{width}} {100 * word['probability']:5.1f} %  {reasons}"
        out.print(line, markup=False, highlight=False)


def _short(piece: str) -> str:
    """A token in one line."""
    return printable(piece.strip(" ").replace("\n", "↵") or "␣")
