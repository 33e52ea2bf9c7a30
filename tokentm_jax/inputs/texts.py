"""Texts as inputs: `Tokens` and `Texts`, the tokenizer that reads them, and scores of words from those of tokens.

Axes: B batch, N tokens of the longest text, D width of the word embeddings.
"""

import dataclasses
import hashlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.data.examples import Example, Source, kind_of
from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.files import read_text
from tokentm_jax.inputs.chat import as_chat
from tokentm_jax.inputs.passages import Passage
from tokentm_jax.inputs.pictures import SIDE
from tokentm_jax.inputs.reader import random_map
from tokentm_jax.inputs.tokenizers import engine, one_sentence
from tokentm_jax.inputs.values import Hide
from tokentm_jax.inputs.words import LARGEST_TEXT, Text
from tokentm_jax.maths.maps import min_max
from tokentm_jax.maths.primitives import PyTree

STEP = 16  # texts are padded to a multiple of this number of tokens, so that few lengths have to be compiled
REACH = 16  # tokens that are decoded to know the text of the last of them
MASKS = ("[MASK]", "<mask>")
_SPACES = ("Ġ", "▁")  # how vocabularies of byte pairs, and of SentencePiece, write a space
KINDS = (np.int32, np.bool_, np.int32, np.bool_)  # of the arrays of `Tokens`


class Tokens(NamedTuple):
    """Texts as numbers of word pieces, padded at the end to one length. NumPy or JAX arrays, or their shapes."""

    ids: PyTree  # [B, N] int32
    mask: PyTree  # [B, N] bool: a token of the text, and not padding
    types: PyTree  # [B, N] int32: of which of two texts
    special: PyTree  # [B, N] bool: a mark such as [CLS], or padding; no part of a word

    def look_up(self, module: Any, params: PyTree) -> "Texts":
        """The embeddings of a module's word pieces. Raises InputError for a function, which takes `Texts`."""
        return embedded(self, module, params)


class Texts(NamedTuple):
    """Texts as the input of a model: what is differentiated is the embedding of each word piece."""

    embeddings: Array  # [B, N, D]; position and type are added inside the model
    mask: Array  # the others as in `Tokens`
    types: Array
    special: Array
    hidden: Array | None = None  # [B, N] bool: tokens that no other token attends to, see `hidden`

    regular = False

    @property
    def values(self) -> Array:
        return self.embeddings

    @property
    def removable(self) -> Array:
        """The word pieces, as a map [B, 1, N]: all tokens except marks and padding."""
        return ~self.special[:, None]

    def with_values(self, numbers: Array) -> "Texts":
        return self._replace(embeddings=numbers)

    def until(self, count: Array) -> tuple["Texts", Array]:
        """The first `count` [B] tokens of each text, with padding instead of the others; and whether these are tokens
        of the text, one at least [B]."""
        mask = self.mask & (jnp.arange(self.mask.shape[1]) < count[:, None])
        within = (count >= 1) & (count <= self.mask.sum(1))
        return self._replace(mask=mask, special=self.special | ~mask), within

    def last(self, rows: Array) -> Array:
        """What belongs to the last token of each text, of rows [B, N, D] for all tokens: [B, D]."""
        return jnp.einsum("bn,bnd->bd", last_token(self.mask).astype(rows.dtype), rows)

    def without(self, removed: Array, fill: Any, tiling: Any = None) -> Any:
        """Word pieces are replaced, or deleted where `fill` is `deleted`."""
        if callable(fill):
            return fill(self, removed)
        fill = jnp.asarray(fill, self.embeddings.dtype)
        return self.with_values(jnp.where(removed[:, 0, :, None], fill, self.embeddings))

    def background(self, fill: str, mean: Any) -> Array:
        """The embedding of the model's mask, which has no colour: it also replaces black."""
        if fill == "blur":
            raise Unfit("the fill 'blur' is for images: of texts, words are replaced by the model's mask")
        return mean

    def parts(self, model: Any, params: Any, options: Any) -> tuple[tuple[int, int], Hide]:
        """Word pieces: the model's mask replaces those that are hidden, and marks such as [CLS] stay."""
        if options.fill != "mean" or options.patch is not None:
            raise Unfit("options 'fill' and 'patch' are for images: of texts, words are removed")
        blank = jnp.asarray(_blank(model.source.module, params), self.embeddings.dtype)

        def hide(kept: Array) -> Texts:
            return self.with_values(jnp.where((kept | self.special)[..., None], self.embeddings, blank))

        return (1, self.mask.shape[1]), hide

    def remaining(self, kept: Array) -> Array:
        return self.mask & (kept | self.special)


def embedded(tokens: Any, module: Any, params: PyTree) -> Texts:
    """`Tokens`, or `Prompts`, as `Texts` by a module's table. InputError without a module."""
    if module is None:
        name = type(tokens).__name__
        raise InputError(f"{name} are for a module that looks their embeddings up: give a function Texts")
    return module.apply({"params": params}, jax.tree.map(jnp.asarray, tokens), method="look_up")


def last_token(mask: Array) -> Array:
    """r0 [B, N] of a head that reads the last token of each text, as that of a decoder does."""
    return (jnp.arange(1, mask.shape[-1] + 1) == mask.sum(-1, keepdims=True)).astype(jnp.float32)


def hidden(texts: Texts, removed: Array) -> Texts:
    """Texts in which no other token attends to those that are `removed` [B, 1, N], in any block; the others keep their
    positions, and a head that reads the last token still does."""
    return texts._replace(hidden=removed[:, 0])


def deleted(texts: Texts, removed: Array) -> Texts:
    """Texts without the tokens that are `removed` [B, 1, N]: those behind move up, and padding follows."""
    kept = texts.mask & ~removed[:, 0]
    order = jnp.argsort(~kept, axis=1, stable=True)  # kept tokens first, in their order
    embeddings = jnp.take_along_axis(texts.embeddings, order[..., None], 1)
    types, special = (jnp.take_along_axis(a, order, 1) for a in (texts.types, texts.special))
    present = jnp.arange(kept.shape[1]) < kept.sum(1, keepdims=True)
    return Texts(
        jnp.where(present[..., None], embeddings, 0), present, jnp.where(present, types, 0), special | ~present
    )


def _blank(module: Any, params: Any) -> Any:
    """The embedding [D] of a module that replaces a removed word piece; zero for a function."""
    return 0.0 if module is None else module.apply({"params": params}, method="blank")


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """The reader of texts: the `tokenizer.json` of a model, as it was when it was loaded (`from_file`).

    Args:
      length: the most tokens that the model takes; longer texts are cut.
      vocabulary, types: how many word pieces, and types of tokens, the model knows.
      padded: tokens that every batch of a data set is padded to; 0: to a multiple of `STEP`.
      template: of the model's chat, for `chat`; empty: it has none.
    """

    file: Path
    content: str = dataclasses.field(repr=False)
    length: int = 512
    vocabulary: int = 2**31 - 1
    types: int = 0
    padded: int = 0
    template: str = dataclasses.field(default="", repr=False)

    regular = False
    kind = "text"
    frame = None
    figures = "html"
    suffixes = frozenset({".txt"})

    @property
    def size(self) -> tuple[int, ...]:
        return (self.length,)

    @classmethod
    def from_file(cls, file: Path, length: int = 512) -> "WordPieces":
        """Raises InputError for a file that cannot be read; its content is parsed when it is first used."""
        return cls(file, read_text(file, what="tokenizer"), length)

    @classmethod
    def from_folder(cls, folder: Path, length: int = 512) -> "WordPieces":
        """The reader of a model's folder. Raises InputError as `from_file`, and for a folder without a tokenizer."""
        file = folder / "tokenizer.json"
        if not os.path.lexists(file):
            raise InputError(f"{folder} has no tokenizer.json, the file of a fast tokenizer")
        return cls.from_file(file, length)

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": hashlib.sha256(self.content.encode()).hexdigest(), "length": self.length}

    @property
    def _engine(self) -> Any:
        return engine((self.content,), self.length, self.file)

    def chat(self, prompt: str) -> str:
        """A prompt as a user's message in the model's chat, up to where the answer begins. Raises InputError for a
        model without a chat template, and as `as_chat`."""
        if not self.template:
            raise InputError(f"{self.file} has no chat template: this model continues texts")
        return as_chat(self.template, prompt, self.file)

    def token(self, *names: str) -> int | None:
        """The number of the first of these tokens that the vocabulary has."""
        known = (self._engine.token_to_id(name) for name in names)
        return next((number for number in known if number is not None), None)

    def encode(self, texts: Any, name: str = "") -> list[Any]:
        """One `tokenizers.Encoding` a text. Raises InputError for anything but texts with words, and as `engine`; of
        one text, with its name."""
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, Sequence) or not listed:
            raise InputError(f"texts must be a text or a list of texts, got {texts!r:.80}")
        for number, text in enumerate(listed, 1):
            called = name or f"text {number}"
            parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
            if not all(isinstance(part, str) and part.strip() for part in parts):
                raise InputError(f"{called} must be a text with a word at least, or a pair, got {text!r:.80}")
            if sum(map(len, parts)) > LARGEST_TEXT:
                raise InputError(f"{called} has more than {LARGEST_TEXT} characters")
            if any("\ud800" <= character <= "\udfff" for part in parts for character in part):
                raise InputError(f"{called} is no valid Unicode: it holds half of a surrogate pair")
        with one_sentence((self.file,)):
            return self._engine.encode_batch(list(listed))

    def decode(self, tokens: Tokens) -> list[str]:
        """The texts of these tokens [B, N], without marks. Raises InputError for tokens of another vocabulary."""
        known = self.checked(tokens)
        with one_sentence((self.file,)):
            return [self._engine.decode(ids[mask]) for ids, mask in zip(known.ids, known.mask, strict=True)]

    def pieces(self, ids: Any) -> list[str]:
        """The text of each of the tokens `ids` [N] of one text, which joined are the text; of a mark, its name. A
        character of several tokens belongs to the last of them."""
        found, shown = [], ""
        with one_sentence((self.file,)):
            for end, own in enumerate(map(int, ids), 1):
                first = max(0, end - REACH)
                if first:  # the text of the tokens before is not needed to know that of this one
                    shown = self._engine.decode([int(i) for i in ids[first : end - 1]]).rstrip("\ufffd")
                decoded = self._engine.decode([int(i) for i in ids[first:end]])
                whole = decoded.rstrip("\ufffd")  # without the bytes of a character that is not whole
                mark = decoded == shown
                found.append(self._engine.id_to_token(own) or "" if mark else whole[len(shown) :])
                shown = whole
        return found

    def following(self, before: Any, token: int) -> str:
        """The text of a token after others."""
        return self.pieces([*before[-REACH + 1 :], token])[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """The word pieces by number, with a space before those that begin a word; "" for a number without one."""
        known = {number: name for name, number in self._engine.get_vocab().items()}
        mark = next((mark for mark in _SPACES if f"{mark}the" in known.values()), " ")
        return tuple(known.get(i, "").replace(mark, " ") for i in range(max(known) + 1))

    def continued(self, prompt: Any, known: Any, answer: str) -> list[int]:
        """The tokens of an answer after a prompt with the tokens `known`: as in the whole text, if that begins with
        these, else those of the answer as a text of its own."""
        with one_sentence((self.file,)):
            if isinstance(prompt, str):
                whole = self._engine.encode(prompt + answer).ids
                if whole[: len(known)] == [int(i) for i in known] and len(whole) > len(known):
                    return whole[len(known) :]
            return self._engine.encode(answer, add_special_tokens=False).ids

    def first_token(self, before: Any, word: str, instead: int) -> int:
        """The first token of a word that is written instead of another token, and after a space if that is."""
        spaced = self.following(before, instead)[:1].isspace() and not word[:1].isspace()
        with one_sentence((self.file,)):
            found = self._engine.encode(f" {word}" if spaced else word, add_special_tokens=False).ids
        if not found:
            raise InputError(f"against must be a word, got {word!r:.80}")
        return found[0]

    def answered(self, prompt: Any, answer: np.ndarray, marks: np.ndarray) -> Any:
        """A prompt [1, N] and the ids of an answer [M] after it, with padding; `marks` [M] are no part of a word."""
        known = int(prompt.mask.sum())
        ids, types, special = (np.asarray(a)[0, :known] for a in (prompt.ids, prompt.types, prompt.special))
        ids, types = np.concatenate([ids, answer]), np.concatenate([types, np.zeros_like(types, shape=len(answer))])
        return self.stacked([Tokens(ids, np.ones(len(ids), bool), types, np.concatenate([special, marks]))])

    def found(self, argument: str, number: int = 1) -> dict[str, str]:
        """The argument itself, or with "-" the lines of the standard input."""
        try:
            texts = [line.rstrip("\n") for line in sys.stdin if line.strip()] if argument == "-" else [argument]
        except UnicodeDecodeError:
            raise InputError("the standard input is no UTF-8 text") from None
        if not texts:
            raise InputError("texts must be a text or a list of texts, and the standard input has none")
        return {f"text {place}": text for place, text in enumerate(texts, number)}

    def opened(self, given: Text) -> Text:
        return given

    def decoded(self, content: bytes) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise InputError("the text is not UTF-8") from None

    def example(self) -> bytes:
        return b"an example"

    def sample(self, example: Example) -> Tokens:
        return self.levels(example)[0]

    def notice(self, content: Text, name: str) -> str | None:
        cut = self.encode([content], name)[0].overflowing
        return f"{name} has more than the {self.length} tokens of the model, and is cut" if cut else None

    def panel(self, content: Text, title: str, side: int = SIDE, profile: str = "default") -> Any:
        return Passage(content, self.encode([content], title)[0], title, side)

    def panels(self, what: Any, side: int) -> list[tuple[Tokens, Any]]:
        listed = [what] if isinstance(what, str) else what
        encoded = self.encode(listed)
        titles = [f"text {i}" for i in range(1, len(encoded) + 1)] if len(encoded) > 1 else ["text"]
        of_each = zip(listed, encoded, titles, strict=True)
        return [(_sample(each), Passage(text, each, title, side)) for text, each, title in of_each]

    def shown(self, heatmap: np.ndarray, module: Any, squares: bool) -> np.ndarray:
        return heatmap

    def read(self, texts: str | Sequence[Text]) -> Tokens:
        """A text, several, or pairs of them -> `Tokens` [B, N], with special tokens, padded to a multiple of 16.

        Texts that are longer than the model's `length` are cut, with a warning. Raises InputError for anything but
        texts.
        """
        encoded = self.encode(texts)
        if count := sum(bool(each.overflowing) for each in encoded):
            found = f"{count} of {len(encoded)} texts have more than the {self.length} tokens of the model"
            warnings.warn(f"{found}, and were cut", stacklevel=3)
        return self.stacked([_sample(each) for each in encoded])

    def checked(self, tokens: Any) -> Tokens:
        """Tokens of a caller as arrays of the types that the model needs. Raises InputError for others."""
        if not isinstance(tokens, Tokens):
            raise InputError(f"the model takes texts: expected what its `read` gives, got {type(tokens).__name__}")
        arrays = Tokens(*(np.asarray(a).astype(kind) for a, kind in zip(tokens, KINDS, strict=True)))
        shape = arrays.ids.shape
        if len(shape) != 2 or 0 in shape or any(a.shape != shape for a in arrays):
            raise InputError(f"tokens must be four arrays [B, N], got {[list(a.shape) for a in arrays]}")
        if shape[1] > self.length:
            raise InputError(f"tokens must be at most {self.length} a text, got {shape[1]}")
        if not arrays.mask[:, 0].all():
            raise InputError("every text must have a first token: padding follows the texts")
        for name, numbers, most in (("ids", arrays.ids, self.vocabulary), ("types", arrays.types, self.types)):
            if most and (numbers.min() < 0 or numbers.max() >= most):
                raise InputError(f"the {name} of tokens must be from 0 to {most - 1}")
        return arrays

    def normalise(self, tokens: Tokens) -> Tokens:
        return tokens

    unit = normalise

    def levels(self, example: Example, profile: str = "default") -> tuple[Tokens, np.ndarray | None]:
        """A text of a data set as tokens [N], and where its characters are rated [N, 2]: for each token the number
        of its word (-1: none), and the word's rating."""
        if not isinstance(example.content, str):
            raise InputError(f"{example.key} is a {kind_of(example.content)}, and the model takes texts")
        (encoded,) = self.encode([example.content], example.key)
        if 0 < self.padded < len(encoded.ids):
            raise InputError(f"{example.key} has more than {self.padded} tokens")
        if example.mask is None:
            return _sample(encoded), None
        ratings = np.full((len(encoded.ids), 2), (-1.0, 0.0), np.float32)
        for place, (word, (start, end)) in enumerate(zip(encoded.word_ids, encoded.offsets, strict=True)):
            if word is not None and end > start:
                ratings[place] = word, example.mask[start:end].mean()
        return _sample(encoded), ratings

    def _size(self, longest: int) -> int:
        """Tokens that texts of at most `longest` ones are padded to."""
        return self.padded or min(-(-longest // STEP) * STEP, self.length)

    def stacked(self, samples: Sequence[Tokens]) -> Tokens:
        size = self._size(max(len(each.ids) for each in samples))

        def padded(arrays: Sequence[np.ndarray], value: Any) -> np.ndarray:
            return np.stack([np.pad(a, (0, size - len(a)), constant_values=value) for a in arrays])

        return Tokens(*map(padded, zip(*samples, strict=True), Tokens(0, False, 0, True)))

    def stacked_masks(self, masks: Sequence[np.ndarray]) -> np.ndarray:
        size = self._size(max(map(len, masks)))
        return np.stack([np.pad(m, ((0, size - len(m)), (0, 0)), constant_values=-1) for m in masks])

    def batch(self, size: int) -> Tokens:
        return Tokens(*(jax.ShapeDtypeStruct((size, self._size(1)), kind) for kind in KINDS))

    def fixed(self, source: Source) -> "WordPieces":
        longest = max(len(each.ids) for each in self.encode([source[i].content for i in range(len(source))]))
        return dataclasses.replace(self, padded=dataclasses.replace(self, padded=0)._size(longest))

    def dummy(self, size: int) -> Tokens:
        encoded = self.encode(["a text of some common words " * 4] * size)
        return self.stacked([_sample(each) for each in encoded])

    def noise(self, keys: Sequence[str], seed: int, module: Any, inputs: Tokens, pixels: bool) -> np.ndarray:
        """The same for every length of the padding."""
        return np.stack([random_map(key, (1, self.length), seed) for key in keys])[..., : inputs.ids.shape[1]]

    blank = staticmethod(_blank)

    def to_pixels(self, maps: Array, inputs: Texts, module: Any) -> Array:
        """Tokens that are no part of a word get 0."""
        return jnp.where(inputs.removable, min_max(maps, inputs.removable), 0)


def _sample(encoded: Any) -> Tokens:
    """Tokens [N] of one text."""
    ids = np.array(encoded.ids, np.int32)
    special = np.array(encoded.special_tokens_mask, bool)
    return Tokens(ids, np.ones(len(ids), bool), np.array(encoded.type_ids, np.int32), special)
