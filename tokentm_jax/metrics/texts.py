"""Is an explanation of a text faithful (ERASER, DeYoung et al., ACL 2020), and does it name the words people would?

Functions take a batch of NumPy arrays and give results per text: `tokens` are `Tokens` [B, N], scores [B, N]. Special
tokens are never removed. What is followed is the probability of the class `target` [B].
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tokentm_jax.errors import require
from tokentm_jax.files import read_text
from tokentm_jax.inputs.texts import Tokens

if TYPE_CHECKING:
    from tokentm_jax.inputs.texts import Word

SHARES = 11  # 0 %, 10 % ... 100 % of the words' tokens


class Probabilities:
    """The probability of a class for texts: a function of tokens [M, N] and classes [M] to float32 [M].

    It looks at every text once, however often it comes back: short texts that lose some of their words often do. Those
    that are new are sorted by length, and go through the model `size` at a time, padded to a multiple of 8 tokens.

    Args:
      predict: logits [size, classes] for `Tokens` of any length.
    """

    def __init__(self, predict: Callable[[Tokens], Any], size: int = 64) -> None:
        self.predict, self.size = predict, size
        self.known: dict[tuple[bytes, bytes], np.ndarray] = {}

    def __call__(self, tokens: Tokens, target: np.ndarray) -> np.ndarray:
        tokens = Tokens(*map(np.asarray, tokens))
        keys = [(i[m].tobytes(), t[m].tobytes()) for i, m, t, _ in zip(*tokens, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self.known}
        places = sorted(new.values(), key=lambda place: len(keys[place][0]))
        for start in range(0, len(places), self.size):
            chosen = places[start : start + self.size]
            full = chosen + chosen[-1:] * (self.size - len(chosen))
            length = min(-(-int(tokens.mask[chosen[-1]].sum()) // 8) * 8, tokens.ids.shape[1])
            cut = [np.pad(array[full], ((0, 0), (0, length)))[:, :length] for array in tokens]
            cut[3] |= ~cut[1]
            found = np.asarray(jax.nn.softmax(self.predict(Tokens(*cut))))
            self.known |= {keys[place]: row for place, row in zip(chosen, found, strict=False)}
        return np.array([self.known[key][c] for key, c in zip(keys, target, strict=True)])


def rank_tokens(scores: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Rank of every token that can be removed, [B, N]: 0 is the highest score; of equal ones, the first. Others have
    the rank N."""
    order = np.argsort(np.where(tokens.special, np.inf, -scores), axis=1, kind="stable")
    return np.where(tokens.special, scores.shape[1], np.argsort(order, axis=1))


def delete(tokens: Tokens, removed: np.ndarray) -> Tokens:
    """The texts without the tokens that are `removed` [B, N]: those behind move up, and padding follows."""
    kept = tokens.mask & ~removed
    order = np.argsort(~kept, axis=1, kind="stable")  # what is kept first, in its order
    ids, types, special = (np.take_along_axis(a, order, 1) for a in (tokens.ids, tokens.types, tokens.special))
    there = np.arange(kept.shape[1]) < kept.sum(1, keepdims=True)
    return Tokens(np.where(there, ids, 0), there, np.where(there, types, 0), special | ~there)


def mask_out(tokens: Tokens, removed: np.ndarray, mask_id: int) -> Tokens:
    """The texts with the model's mask in place of the tokens that are `removed` [B, N]."""
    return tokens._replace(ids=np.where(removed, np.int32(mask_id), tokens.ids))


def _joined(parts: Sequence[Tokens]) -> Tokens:
    return Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def removal_curves(
    probability: Probabilities, tokens: Tokens, scores: np.ndarray, target: np.ndarray, mask_id: int | None
) -> np.ndarray:
    """Probability of the class [B, ways, 2, 11] with 0 % ... 100 % of the tokens removed, those of the highest scores
    first; and with those alone kept.

    The ways are deleting, and masking if the model has a mask. So many tokens are removed: k % of n, rounded half up.
    """
    ranks, count = rank_tokens(scores, tokens), (~tokens.special).sum(1, keepdims=True)
    changed: list[Tokens] = []
    for way in (0,) if mask_id is None else (0, 1):
        for keep in (False, True):
            for share in range(SHARES):
                first = ranks < (share * count + (SHARES - 1) // 2) // (SHARES - 1)
                removed = (first != keep) & ~tokens.special
                changed.append(delete(tokens, removed) if way == 0 else mask_out(tokens, removed, mask_id or 0))
    found = probability(_joined(changed), np.tile(target, len(changed)))
    return found.reshape(-1, 2, SHARES, len(scores)).transpose(3, 0, 1, 2)


def leave_one_out(probability: Probabilities, tokens: Tokens, target: np.ndarray) -> np.ndarray:
    """What the probability of the class loses when a token alone is deleted, [B, N]; 0 for special ones."""
    places = np.arange(tokens.ids.shape[1])
    without = [delete(tokens, (places == place) & ~tokens.special) for place in places]
    found = probability(_joined([tokens, *without]), np.tile(target, 1 + len(places)))
    whole, *others = found.reshape(-1, len(target))
    return np.where(tokens.special, 0, whole[:, None] - np.stack(others, 1))


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two rankings [n], in [-1, 1]; 0 where one of them is constant (Kendall, Biometrika 1945)."""
    i, j = np.triu_indices(len(a), 1)
    x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    norm = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


# ---- what people say ------------------------------------------------------------------------------------------------


def read_lexicon() -> dict[str, float]:
    """Valences of words by people, from -4 to 4: VADER's lexicon (Hutto & Gilbert, ICWSM 2014), of the package
    `vaderSentiment`. Raises InputError without it."""
    package = require("vaderSentiment", "evaluation", "a rating of words by people")
    valences = {}
    for line in read_text(Path(package.__path__[0]) / "vader_lexicon.txt").splitlines():
        word, _, rest = line.partition("\t")
        valences[word.lower()] = float(rest.partition("\t")[0])
    return valences


def agreement(words: Sequence["Word"], valences: Mapping[str, float], sign: int) -> dict[str, Any]:
    """Whether the word of the highest score is a rated one, whose valence has the class's `sign` (1, or -1 for a class
    that bad words speak for); and Kendall's tau of scores and valences over all words, unrated ones counted as 0.

    `rated` says whether the text has such a word at all; the others are 0 where it has none.
    """
    rated = np.array([sign * valences.get(word.text.lower(), 0.0) for word in words])
    scores = np.array([word.score for word in words])
    if not len(words) or not (rated > 0).any():
        return {"rated": False, "top_is_rated": 0.0, "agreement": 0.0}
    return {"rated": True, "top_is_rated": float(rated[scores.argmax()] > 0), "agreement": kendall(scores, rated)}
