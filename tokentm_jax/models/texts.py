"""From a folder to a text model that is ready to use, `load_text`; and from scores of tokens to scores of words."""

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.files import as_path, read_text
from tokentm_jax.models.architectures import dtype_of
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.hub import HUB, download
from tokentm_jax.models.inputs import Tokens
from tokentm_jax.models.layouts import present
from tokentm_jax.models.loading import Classes, read_class_names
from tokentm_jax.models.text import engine, one_sentence
from tokentm_jax.models.text_layouts import read_text_folder, require_config

LARGEST_TEXT = 1_000_000  # characters
STEP = 16  # texts are padded to a multiple of so many tokens, so that few lengths have to be compiled
MASKS = ("[MASK]", "<mask>")

Text = str | tuple[str, str]  # or a pair, for models of two texts


class Word(NamedTuple):
    """A word of a text with its score: `text[start:end]` of the first text (`part` 0) or the second of a pair."""

    text: str
    score: float
    start: int
    end: int
    part: int = 0


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """Texts -> word pieces, with the `tokenizer.json` of a model as it was when it was loaded (`read`).

    `length` is the most tokens that the model takes; longer texts are cut.
    """

    file: Path
    content: str = dataclasses.field(repr=False)
    length: int = 512

    @classmethod
    def read(cls, file: Path, length: int = 512) -> "WordPieces":
        """Raises InputError for a file that cannot be read; what it holds is looked at when it is first used."""
        return cls(file, read_text(file, what="tokenizer"), length)

    @property
    def digest(self) -> str:
        """A hash of the content."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @property
    def _engine(self) -> Any:
        return engine((self.content,), self.length, self.file)

    def token(self, *names: str) -> int | None:
        """The number of the first of these tokens that there is."""
        known = (self._engine.token_to_id(name) for name in names)
        return next((number for number in known if number is not None), None)

    def encode(self, texts: Any) -> list[Any]:
        """One `tokenizers.Encoding` a text. Raises InputError for what is no text or has none, and as `engine`."""
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, Sequence) or not listed:
            raise InputError(f"texts must be a text or a list of texts, got {texts!r:.80}")
        for number, text in enumerate(listed, 1):
            parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
            if not all(isinstance(part, str) and part.strip() for part in parts):
                raise InputError(f"text {number} must be a text with a word at least, or a pair, got {text!r:.80}")
            if sum(map(len, parts)) > LARGEST_TEXT:
                raise InputError(f"text {number} has more than {LARGEST_TEXT} characters")
            if any("\ud800" <= character <= "\udfff" for part in parts for character in part):
                raise InputError(f"text {number} is no valid Unicode: it holds half of a surrogate pair")
        with one_sentence((self.file,)):
            return self._engine.encode_batch(list(listed))

    def __call__(self, texts: Any) -> tuple[Tokens, list[bool]]:
        """The tokens, padded to one length, and which of the texts were cut."""
        encoded = self.encode(texts)
        longest = max(len(each.ids) for each in encoded)
        size = min(-(-longest // STEP) * STEP, self.length)
        ids = np.zeros((len(encoded), size), np.int32)
        mask, types, special = np.zeros_like(ids, bool), np.zeros_like(ids), np.ones_like(ids, bool)
        for row, each in enumerate(encoded):
            own = (row, slice(len(each.ids)))
            ids[own], types[own], mask[own] = each.ids, each.type_ids, True
            special[own] = each.special_tokens_mask
        return Tokens(ids, mask, types, special), [bool(each.overflowing) for each in encoded]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedText(Classes):
    """A text model with its weights, its tokenizer and the names of its classes (None: unknown)."""

    module: Bert
    params: Any
    tokenizer: WordPieces
    class_names: tuple[str, ...] | None
    name: str
    preprocessing = None
    wnids = None
    text = None

    def read(self, texts: str | Sequence[Text]) -> Tokens:
        """A text, several, or pairs of them -> `Tokens` [B, N], with special tokens, padded to a multiple of 16.

        Texts that are longer than the model's `max_length` are cut, with a warning that says how many. Raises
        InputError for what is no text.
        """
        tokens, cut = self.tokenizer(texts)
        if any(cut):
            found = f"{sum(cut)} of {len(cut)} texts have more than the {self.tokenizer.length} tokens of {self.name}"
            warnings.warn(f"{found}, and were cut", stacklevel=2)
        return self.prepare(tokens)

    def prepare(self, tokens: Any) -> Tokens:
        """Tokens of a caller as arrays of the types that the model wants. Raises InputError for others."""
        if not isinstance(tokens, Tokens):
            raise InputError(
                f"{self.name} explains texts: expected what its `read` gives, got {type(tokens).__name__}"
            )
        kinds = (np.int32, np.bool_, np.int32, np.bool_)
        arrays = Tokens(*(np.asarray(a).astype(kind) for a, kind in zip(tokens, kinds, strict=True)))
        shape = arrays.ids.shape
        if len(shape) != 2 or 0 in shape or any(a.shape != shape for a in arrays):
            raise InputError(f"tokens must be four arrays [B, N], got {[list(a.shape) for a in arrays]}")
        if shape[1] > self.module.max_length:
            raise InputError(f"tokens must be at most {self.module.max_length} a text, got {shape[1]}")
        if not arrays.mask[:, 0].all():
            raise InputError("every text must have a first token: padding stands behind the texts")
        largest = self.module.vocab_size, max(self.module.type_vocab_size, 1)
        for name, numbers, most in zip(("ids", "types"), (arrays.ids, arrays.types), largest, strict=True):
            if name == "types" and not self.module.type_vocab_size:
                continue
            if numbers.min() < 0 or numbers.max() >= most:
                raise InputError(f"the {name} of tokens must be from 0 to {most - 1} for {self.name}")
        return arrays

    def logits(self, tokens: Tokens) -> Array:
        """`Tokens` of `read` -> logits [B, classes], or features [B, D] without classes, in float32."""
        return _logits(self.module, self.params, self.prepare(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Bert, params: Any, tokens: Tokens) -> Array:
    found: Any = module.apply({"params": params}, tokens)
    return found


def load_text(
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    dtype: Any = None,
) -> LoadedText:
    """A text model ready to use.

    Args:
      folder: in Hugging Face's layout: `config.json` of a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT or
        ELECTRA, weights in safetensors, and a fast tokenizer, `tokenizer.json`. Or "hf-hub:OWNER/NAME".
        An encoder without a classifier gives features: the mean of its tokens, or what sentence-transformers says.
      class_names: one per class, or a file as for `load`; None: those of the config.
      dtype: type of the activations, such as "bfloat16".

    Raises:
      InputError: one sentence that names what is wrong. Also without the extra `tokentm_jax[text]`.

    Examples:
        >>> text = tm.load_text("distilbert-sst2")  # doctest: +SKIP
        >>> tokens = text.read(["a stirring, funny film"])  # doctest: +SKIP
        >>> tm.words(text, ["a stirring, funny film"], tm.explain(text, tokens))  # doctest: +SKIP
    """
    name = os.fspath(folder) if isinstance(folder, str | os.PathLike) else folder
    on_hub = isinstance(name, str) and name.startswith(HUB)
    path = download(name) if on_hub else as_path(folder, "the folder of a text model")
    require_config(path)
    if not present(path, "tokenizer.json"):
        raise InputError(f"{path} has no tokenizer.json, the file of a fast tokenizer")
    pieces = WordPieces.read(path / "tokenizer.json")
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype_of(dtype)}
    module, params, names, notes = read_text_folder(path, pieces.token(*MASKS))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    module = module.clone(**changes)
    if class_names is not None:
        names, _ = read_class_names(class_names, module.num_classes)
    title = name.removeprefix(HUB) if on_hub else os.path.basename(os.path.abspath(path))
    params = jax.tree.map(jnp.asarray, params)
    pieces = dataclasses.replace(pieces, length=module.max_length)
    return LoadedText(module, params, pieces, None if names is None else tuple(names), title)


MERGES = {"sum": np.sum, "mean": np.mean, "max": np.max}


def words(
    text: LoadedText, texts: str | Sequence[Text], scores: Any, merge: Literal["sum", "mean", "max"] = "sum"
) -> list[list[Word]]:
    """Scores of words, from those of the tokens that a tokenizer made of them.

    Args:
      text: the model.
      texts: what was given to its `read`.
      scores: [B, N], of `explain`.
      merge: what a word's score is of its pieces' ones.

    Returns:
      For each text its words in order, with their places in it. What a tokenizer takes for a word is up to it:
      punctuation marks and Chinese characters are words of their own with most. Special tokens, and what was cut off,
      have none.

    Raises:
      InputError: scores of another shape, an unknown `merge`.
    """
    if not isinstance(text, LoadedText):
        raise InputError(f"words are those of a text model, of tm.load_text, got {type(text).__name__}")
    if merge not in MERGES:
        raise InputError(f"merge must be one of {', '.join(MERGES)}, got {merge!r:.80}")
    encoded, scores = text.tokenizer.encode(texts), np.asarray(scores)
    if scores.ndim != 2 or len(scores) != len(encoded) or scores.shape[1] < max(len(each.ids) for each in encoded):
        raise InputError(f"scores must be [{len(encoded)}, N] for every token of the texts, got {list(scores.shape)}")
    listed = [texts] if isinstance(texts, str) else texts
    return [_words(given, each, row, merge) for given, each, row in zip(listed, encoded, scores, strict=True)]


def _words(given: Text, encoding: Any, scores: np.ndarray, merge: str) -> list[Word]:
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
