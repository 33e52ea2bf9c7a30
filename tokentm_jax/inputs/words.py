"""Words of texts, and their scores from those of the tokens that a tokenizer made of them."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tokentm_jax.errors import InputError
from tokentm_jax.maths.primitives import AnyArray

LARGEST_TEXT = 1_000_000  # characters
Text = str | tuple[str, str]  # or a pair, for models of two texts
MERGES = {"sum": np.sum, "mean": np.mean, "max": np.max}


class Word(NamedTuple):
    """A word of a text with its score: `text[start:end]` of the first text (`part` 0) or the second of a pair."""

    text: str
    score: float
    start: int
    end: int
    part: int = 0


def words(
    model: Any, texts: str | Sequence[Text], scores: AnyArray, merge: Literal["sum", "mean", "max"] = "sum"
) -> list[list[Word]]:
    """Scores of words, from those of the tokens that a tokenizer made of them.

    Args:
      model: a text model, of `tokentm_jax.load`.
      texts: what was given to its `read`.
      scores: [B, N], of `explain`.
      merge: what a word's score is of its pieces' ones.

    Returns:
      For each text its words in order, with their places in it. What a tokenizer takes for a word is up to it:
      punctuation marks and Chinese characters are separate words with most. Special tokens, and what was cut off,
      have none.

    Raises:
      InputError: scores of another shape, an unknown `merge`.
    """
    reader = getattr(model, "preprocessing", model)
    if getattr(reader, "kind", None) != "text":
        raise InputError(f"words are those of a text model, got {getattr(model, 'name', type(model).__name__)}")
    if merge not in MERGES:
        raise InputError(f"merge must be one of {', '.join(MERGES)}, got {merge!r:.80}")
    encoded, scores = reader.encode(texts), np.asarray(scores)
    if scores.ndim != 2 or len(scores) != len(encoded) or scores.shape[1] < max(len(each.ids) for each in encoded):
        raise InputError(f"scores must be [{len(encoded)}, N] for every token of the texts, got {list(scores.shape)}")
    listed = [texts] if isinstance(texts, str) else texts
    return [scored(given, each, row, merge) for given, each, row in zip(listed, encoded, scores, strict=True)]


def scored(given: Text, encoding: Any, scores: np.ndarray, merge: str = "sum") -> list[Word]:
    """The words of one text, from the scores [N] of its tokens."""
    pieces: dict[tuple[int, int], list[int]] = {}
    places = zip(encoding.sequence_ids, encoding.word_ids, strict=True)
    for place, (part, word) in enumerate(places):
        if part is not None and word is not None:
            pieces.setdefault((part, word), []).append(place)
    found = []
    for (part, _), own in pieces.items():
        start = min(encoding.offsets[place][0] for place in own)
        end = max(encoding.offsets[place][1] for place in own)
        source = given[part] if isinstance(given, tuple) else given
        shown = source[start:end]
        start += len(shown) - len(shown.lstrip())
        found.append(Word(shown.strip(), float(MERGES[merge](scores[own])), start, start + len(shown.strip()), part))
    return found
