"""`tokentm explain --ask`: the words that a vision-language model answers, and the patches behind each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np

from tokentm_jax.cli.names import output_names, question_of, require_free
from tokentm_jax.cli.terminal import complain, console
from tokentm_jax.errors import InputError, printable
from tokentm_jax.identity import digest, write_figure, write_maps

if TYPE_CHECKING:
    from tokentm_jax.methods.answers import Reasons

TOP = 3  # words of the question that are printed for each word of the answer
MOST = 16  # tokens of an answer


class Asked(NamedTuple):
    """What is asked of every photo, and how it is shown."""

    question: str
    versus: str | None
    methods: Sequence[str]
    options: dict[str, Any]
    kind: str
    title: str | None
    look: Any


def explain_asked(vit: Any, photos: Sequence[str], asked: Asked, out: Path, as_json: bool) -> None:
    """Ask a model about photos: a picture and a file of maps for each, and a table or JSON.

    Raises InputError for a model that answers no questions, and a question that it cannot read.
    """
    from tokentm_jax.models.vision_decoder import VisionDecoder

    if not isinstance(vit.module, VisionDecoder):
        raise InputError(
            f"{vit.name} answers no questions: --ask is for a vision-language model, such as scenes_words"
        )
    results: list[dict[str, Any]] = []
    found: dict[str, Path] = {}
    for photo in photos:
        try:
            found |= vit.preprocessing.found(photo)
        except InputError as error:
            complain(str(error))
            results.append({"path": photo, "error": str(error)})
    key = digest(vit.name, asked.question, asked.versus, list(asked.methods), asked.options)
    suffixes = [f".{asked.kind}", ".npz"]
    names = output_names([*found.values()], out, suffixes, key)
    for place, (name, path) in enumerate(found.items()):
        try:
            result = _answered(vit, path, asked, [out / f"{names[place]}{end}" for end in suffixes], key)
        except InputError as error:
            complain(f"{name}: {error}")
            result = {"error": str(error)}
        results.append({"path": name, **result})
        if not as_json and "error" not in result:
            _print(name, result)
    if as_json:
        click.echo(json.dumps(results, indent=1))
    if failed := sum("error" in result for result in results):
        click.echo(f"{failed} of {len(results)} photos failed", err=True)
        click.get_current_context().exit(2)


def _answered(vit: Any, path: Path, asked: Asked, files: Sequence[Path], key: str) -> dict[str, Any]:
    """The answer about one photo, with its files."""
    from tokentm_jax.cli.figure import Explained, arranged, grid
    from tokentm_jax.inputs.prompts import PROMPT
    from tokentm_jax.methods.answers import explain_words

    reader, question = vit.preprocessing, question_of([path], key)
    prompt, answer = vit.read((path, asked.question)), None
    reasons: dict[str, Reasons] = {}
    for method in asked.methods:
        own: Any = asked.options
        reasons[method] = explain_words(vit, prompt, answer, method, against=asked.versus, most=MOST, **own)
        answer = [int(number) for number in reasons[method].ids[reasons[method].start :]]
    first = reasons[asked.methods[0]]
    said = [k for k, number in enumerate(answer or ()) if number not in vit.module.end]
    if not said:
        raise InputError("the model has no answer: it ends its text at once")
    words = [first.pieces[first.start + k].strip() for k in said]
    shown = [f"{first.probabilities[k]:.1%}" for k in said]
    explained = [
        Explained(method, f"{k} {word}", [one.image_maps[k]], [word], [probability])
        for method, one in reasons.items()
        for k, word, probability in zip(said, words, shown, strict=True)
    ]
    panel = reader.panel(reader.opened(path), path.name)
    instead = "" if asked.versus is None else f", not {asked.versus}"
    heading = f"{asked.question.strip()} {' '.join(words)}{instead}"
    heading = heading if asked.title is None else asked.title
    for file in files:
        require_free(file, question)
    write_figure(grid(arranged([panel], explained, asked.look), heading, asked.look), files[0], question=question)
    about = {"asked": asked.question, "versus": asked.versus or "", "words": words, "photo": printable(path)}
    about |= {"model": vit.name, "method": ",".join(asked.methods), "options": json.dumps(asked.options)}
    write_maps(files[1], question, np.stack([each.image_maps[said] for each in reasons.values()]), about)
    tokens = prompt.tokens
    asked_for = np.flatnonzero((tokens.types[0] == PROMPT) & ~tokens.special[0]).tolist()
    listed = [_word(first, k, {method: one.maps[k] for method, one in reasons.items()}, asked_for) for k in said]
    return {
        **{"model": vit.name, "question": asked.question, "versus": asked.versus, "answer": " ".join(words)},
        **{"words": listed, "files": [str(file) for file in files]},
    }


def _word(found: "Reasons", k: int, maps: dict[str, np.ndarray], asked_for: Sequence[int]) -> dict[str, Any]:
    """A word of an answer: by each method, the map of the image, its share of all relevance, and the scores of the
    words of the question, which are at the places `asked_for`, and of the answer so far."""
    assert found.image is not None
    image, place = found.image.ravel(), found.start + k
    words = [*asked_for, *range(found.start, place)]
    by_method = {}
    for method, row in maps.items():
        size = float(np.abs(row).sum())
        by_method[method] = {
            "map": np.round(row[found.image].astype(float), 6).tolist(),
            "image": round(float(np.abs(row[image]).sum()) / size, 6) if size else 0.0,
            "words": [{"token": found.pieces[i].strip(), "score": float(f"{row[i]:.6g}")} for i in words],
        }
    return {
        "word": found.pieces[place].strip(),
        "probability": round(float(found.probabilities[k]), 6),
        "others": [
            {"word": piece.strip(), "probability": round(float(share), 6)} for _, piece, share in found.others(k)
        ],
        "methods": by_method,
    }


def _print(name: str, result: dict[str, Any]) -> None:
    out = console()
    out.print(printable(name), style="bold", markup=False, highlight=False, soft_wrap=True)
    out.print(printable(f" {result['question']} {result['answer']}"), markup=False, highlight=False)
    for word in result["words"]:
        for method, own in word["methods"].items():
            most = max((abs(each["score"]) for each in own["words"]), default=0) or 1
            best = sorted(own["words"], key=lambda each: -each["score"])[:TOP]
            reasons = ", ".join(f"{each['token']} {each['score'] / most:.2f}" for each in best)
            of = f"  ({method})" if len(word["methods"]) > 1 else ""
            shares = f"{100 * word['probability']:5.1f} %  image {100 * own['image']:3.0f} %"
            line = f"  {word['word']:8} {shares}  {reasons}{of}"
            out.print(printable(line), markup=False, highlight=False)
    for file in result["files"]:
        click.echo(f" {printable(file)}")
    click.echo()
