"""Prompts with a known cause: short texts whose next word follows from a stated place of the text.

A prompt is drawn by (kind, index) and never stored. It has a counterpart, in which only the cause is replaced, and
the word that follows then.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

PROMPTS = 2_000  # of a kind
CAUSE, ASKS = 1.0, -1.0  # values of `Prompt.mask`

THINGS = (
    "apple", "river", "stone", "cloud", "tiger", "bridge", "candle", "garden", "silver", "winter", "piano", "lemon",
    "forest", "hammer", "planet", "rabbit", "sugar", "window", "engine", "flower", "guitar", "island", "jacket",
    "kitchen", "letter", "market", "needle", "orange", "pencil", "queen",
)  # fmt: skip
NAMES = (
    "Mary", "John", "Anna", "Paul", "Peter", "Sarah", "David", "Laura", "James", "Emma", "Robert", "Alice",
)  # fmt: skip
GOODS, PLACES = ("drink", "book", "ring", "key"), ("store", "park", "school", "beach")
COUNTRIES: Mapping[str, str] = {
    "Rome": "Italy", "Paris": "France", "Berlin": "Germany", "Madrid": "Spain", "Tokyo": "Japan", "Moscow": "Russia",
    "London": "England", "Cairo": "Egypt", "Athens": "Greece", "Beijing": "China", "Delhi": "India",
    "Lisbon": "Portugal", "Dublin": "Ireland",
}  # fmt: skip


class Prompt(NamedTuple):
    """A text, its next word and the cause of it."""

    text: str
    answer: str  # the next word, after a space
    # float32 [characters]: `CAUSE`; `ASKS` where the text asks for this place, which matters too; 0 elsewhere.
    mask: np.ndarray
    without: str  # the text with the cause replaced
    other: str  # the next word of `without`


class Kind(NamedTuple):
    """A kind of prompts. `draw` gives the text, the answer, the text with the cause replaced, and its answer; of the
    texts, [the cause] is in square brackets, and <what asks for it> in angle brackets."""

    about: str
    answers: tuple[str, ...]
    draw: Callable[[np.random.Generator], tuple[str, str, str, str]]


def _some(random: np.random.Generator, words: tuple[str, ...], count: int) -> list[str]:
    return [words[place] for place in random.permutation(len(words))[:count]]


def _copy(random: np.random.Generator) -> tuple[str, str, str, str]:
    *listed, new = _some(random, THINGS, 7)
    k = int(random.integers(2, 6))

    def written(word: str) -> str:
        before, after, again = " ".join(listed[: k - 1]), "".join(f" {w}" for w in listed[k + 1 :]), listed[: k - 1]
        asks = listed[k - 1]
        first = f"List: {before} <{asks}>[ {word}]{after}."
        return f"{first} Same list: {' '.join(again)} <{asks}>"

    return written(listed[k]), listed[k], written(new), new


def _lookup(random: np.random.Generator) -> tuple[str, str, str, str]:
    names, (first, second, new) = _some(random, NAMES, 2), _some(random, THINGS, 3)
    own = int(random.integers(2))

    def written(word: str) -> str:
        codes = [f"Code of {name}: {code}." for name, code in zip(names, (first, second), strict=True)]
        codes[own] = f"Code of <{names[own]}>:[ {word}]."
        return f"{codes[0]} {codes[1]} Code of <{names[own]}>:"

    answer = (first, second)[own]
    return written(answer), answer, written(new), new


def _two_hop(random: np.random.Generator) -> tuple[str, str, str, str]:
    names, (other, own, new) = _some(random, NAMES, 2), _some(random, tuple(COUNTRIES), 3)

    def written(city: str) -> str:
        example = f"{names[0]} has a house in {other}, and pays taxes in {COUNTRIES[other]}."
        return f"{example} {names[1]} has a house in[ {city}], and pays taxes in"

    return written(own), COUNTRIES[own], written(new), COUNTRIES[new]


def _name(random: np.random.Generator) -> tuple[str, str, str, str]:
    names = _some(random, NAMES, 2)
    (place,), (good,), own = _some(random, PLACES, 1), _some(random, GOODS, 1), int(random.integers(2))

    def written(giver: str) -> str:
        both = f"<{names[0]}> and <{names[1]}>"
        return f"When {both} went to the {place},[ {giver}] gave a {good} to"

    return written(names[1 - own]), names[own], written(names[own]), names[1 - own]


KINDS: Mapping[str, Kind] = {
    "copy": Kind("the next word of a list that was given before", THINGS, _copy),
    "lookup": Kind("the code word of one of two people", THINGS, _lookup),
    "two_hop": Kind(
        "the country of a city in the text, after another city with its country", tuple(COUNTRIES.values()), _two_hop
    ),
    "name": Kind("who of two people receives something, by the name of the giver", NAMES, _name),
}
EVERY = "all"  # kinds in turn, two prompts each, so that both halves have all
WORDS = tuple(sorted({word for kind in KINDS.values() for word in kind.answers}))


def prompt(kind: str, index: int) -> Prompt:
    """Prompt number `index` of a kind."""
    place = [*KINDS].index(kind)
    marked, answer, other_marked, other = KINDS[kind].draw(np.random.default_rng([place, index]))
    text, mask = _parsed(marked)
    return Prompt(text, answer, mask, _parsed(other_marked)[0], other)


def _parsed(marked: str) -> tuple[str, np.ndarray]:
    """A text without its brackets, and what each character is."""
    text, values = "", []
    for part in re.findall(r"\[.+?\]|<.+?>|[^\[<]+", marked):
        value = {"[": CAUSE, "<": ASKS}.get(part[0], 0.0)
        plain = part[1:-1] if value else part
        text += plain
        values += [value] * len(plain)
    return text, np.array(values, np.float32)
