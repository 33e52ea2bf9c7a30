"""What `tokentm explain` shows of texts: words in the colours of their scores, on a terminal and on a page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokentm_jax.cli.terminal import console
from tokentm_jax.errors import printable

if TYPE_CHECKING:
    from tokentm_jax.inputs.passages import Passage

BAR = 24  # characters


def signed_methods(results: Sequence[Mapping[str, Any]]) -> set[str]:
    """The methods whose scores have signs; those of the others are importance."""
    return {
        name
        for result in results
        for target in result.get("targets", ())
        for name, words in target.get("methods", {}).items()
        if any(word["score"] < 0 for word in words)
    }


def print_words(text: str, target: Mapping[str, Any], signed: set[str]) -> None:
    """The class and its probability, and for each method the words."""
    from rich.text import Text

    out = console()
    coloured = out.is_terminal and out.color_system and not out.no_color
    out.print(f"{printable(target['name'])} {100 * target['probability']:.1f} %", markup=False, style="bold")
    for name, words in target["methods"].items():
        shown = [printable(word["word"]) for word in words]
        most, width = max((abs(w["score"]) for w in words), default=0) or 1, max(map(len, shown), default=0)
        several = len(target["methods"]) > 1
        if coloured:
            line, end = Text(f"{name}: " if several else ""), 0
            for word, own in zip(words, shown, strict=True):
                line.append(printable(text[end : word["start"]]))
                line.append(own, style=_style(word["score"] / most, name in signed))
                end = word["end"]
            out.print(line.append(printable(text[end:]), style="dim"))
            continue
        if several:
            out.print(name, markup=False)
        for word, own in zip(words, shown, strict=True):
            bar = ("+" if word["score"] > 0 else "-") * round(BAR * abs(word["score"]) / most)
            out.print(f"  {own:{width}} {word['score']:10.4g} {bar}", markup=False, highlight=False)


def _style(share: float, signed: bool) -> str:
    """Background of a score in [-1, 1]: towards red for the class, towards blue against it; of a map without signs
    towards yellow."""
    strength = min(abs(share), 1)
    low = round(255 * (1 - strength))
    red, blue = (255, low) if share >= 0 else (low, 255)
    return f"black on #{red:02x}{low if signed else 255:02x}{blue:02x}"


def page_of(
    model: str,
    passages: Sequence["Passage"],
    results: Sequence[Mapping[str, Any]],
    first: int | None,
    title: str | None = None,
    question: str = "",
) -> str:
    """The page of texts with their results. It begins with the class `first`; None: with the predicted class of each
    text, where these are explained."""
    from tokentm_jax.cli.templates import render
    from tokentm_jax.methods.titles import title_of

    found = [{target["class"]: target for target in result["targets"]} for result in results]
    names = {index: target["name"] for targets in found for index, target in sorted(targets.items())}
    classes, methods = sorted(names), list(results[0]["targets"][0]["methods"])
    signed = signed_methods(results)
    best = [result["top5"][0]["class"] for result in results]
    predicted = all(index in own for index, own in zip(best, found, strict=True))
    first = results[0]["target"]["class"] if first is None and not predicted else first

    def scores(target: Mapping[str, Any]) -> dict[str, list[float]]:
        return {name: [word["score"] for word in words] for name, words in target["methods"].items()}

    settings = {
        "scores": [[scores(own[k]) if k in own else None for k in classes] for own in found],
        "signed": {name: name in signed for name in methods},
        "sentences": {name: title_of(name).sentence for name in methods},
        "classes": [names[k] for k in classes],
        "texts": [
            {
                "own": classes.index(index) if index in own else None,
                "probability": [own[k]["probability"] if k in own else None for k in classes],
            }
            for index, own in zip(best, found, strict=True)
        ],
        "first": "" if first is None else str(classes.index(first)),
    }
    return render(
        "text.html.j2",
        question,
        title="Which words matter for a class?" if title is None else title,
        methods=[(name, title_of(name).name) for name in methods],
        classes=settings["classes"],
        predicted=predicted,
        texts=list(zip(passages, results, strict=True)),
        settings=settings,
        model=model,
    )
