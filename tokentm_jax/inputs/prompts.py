"""Prompts: texts with an image each, for models that see, and their reader.

Axes: B batch, N tokens of the longest prompt, with those of its image.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tokentm_jax.data.examples import Example, Question, kind_of
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.inputs.pictures import SIDE, Panel
from tokentm_jax.inputs.texts import Texts, Tokens, WordPieces, embedded
from tokentm_jax.inputs.tokenizers import one_sentence
from tokentm_jax.maths.primitives import PyTree

WRITTEN, IMAGE, PROMPT = range(3)  # the `types` of tokens: of an answer, of the image, of the prompt's words
SPACE = "▁"  # how vocabularies of SentencePiece write a space


class Prompts(NamedTuple):
    """Texts with an image each, whose tokens are among those of the text. NumPy or JAX arrays, or their shapes."""

    images: PyTree  # [B, H, W, C]
    tokens: Tokens  # [B, N]; `types` has what each token is of

    @property
    def ids(self) -> Any:
        return self.tokens.ids

    @property
    def mask(self) -> Any:
        return self.tokens.mask

    def look_up(self, module: Any, params: PyTree) -> Texts:
        """The embeddings of words and image. Raises InputError for a function, which takes `Texts`."""
        return embedded(self, module, params)


@dataclasses.dataclass(frozen=True)
class PromptReader(WordPieces):
    """The reader of texts with an image each: a tokenizer, and how a photo becomes an image.

    Args:
      pictures: how.
      image: the number of the token that holds the place of a token of the image.
      patches: how many tokens an image has.
      before: text before the image's tokens, in the prompt's beginning or where it has `start`.
      between: text after the image's tokens.
      after: text after the prompt.
      begin: text before everything.
      start: where a prompt has this text, the image is there instead of before the prompt; "": nowhere else.
    """

    pictures: Preprocessing | None = None
    image: int = 0
    patches: int = 1
    begin: str = ""
    before: str = ""
    between: str = ""
    after: str = ""
    start: str = ""

    kind = "photo with a question"
    frame = "Photo"
    figures = "png"

    @property
    def _pictures(self) -> Preprocessing:
        assert self.pictures is not None
        return self.pictures

    def to_dict(self) -> dict[str, Any]:
        template = [self.begin, self.before, self.between, self.after, self.start]
        return {**super().to_dict(), "image": self._pictures.to_dict(), "template": template}

    def read(self, given: Any) -> Prompts:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A pair of an image (a file, or an array [H, W, 3]) and a text, or several pairs -> `Prompts`, whose images
        are float32 [B, H, W, 3] in [0, 1].

        Raises InputError for anything else, and for a prompt that is too long for the model.
        """
        pairs = [given] if isinstance(given, tuple) and len(given) == 2 else given
        if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
            raise InputError(f"this model takes an image with a text: give a pair (image, text), got {given!r:.80}")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise InputError(f"this model takes pairs (image, text), got {given!r:.80}")
        images = [self._pictures.panels(image, 1)[0][0] for image, _ in pairs]
        return Prompts(np.stack(images), self.stacked([self._prompt(text) for _, text in pairs]))

    def _prompt(self, text: Any) -> Tokens:
        """The tokens [N] of a text, with places for those of an image."""
        self.encode([text])  # which refuses what is no text
        name = self.token_name
        image = [(self.before, True), (name * self.patches, False), (self.between, True)]
        first, found, rest = text.partition(self.start) if self.start else ("", "", text)
        prompt = [(first, False), *image, (rest, False)] if found else [*image, (text, False)]
        parts = [(self.begin, True), *prompt, (self.after, True)]
        with one_sentence((self.file,)):
            encoded = self._engine.encode("".join(part for part, _ in parts), add_special_tokens=False)
        if encoded.overflowing:
            raise InputError(
                f"the prompt has more than the {self.length} tokens of the model, with those of the image"
            )
        ids = np.array(encoded.ids, np.int32)
        marks = np.concatenate([np.full(len(part), mark) for part, mark in parts])  # of each character
        special = np.array([marks[start] for start, _ in encoded.offsets], bool)
        types = np.where(ids == self.image, IMAGE, PROMPT).astype(np.int32)
        return Tokens(ids, np.ones(len(ids), bool), types, special)

    @property
    def token_name(self) -> str:
        """The text of the token that holds the place of a token of the image."""
        with one_sentence((self.file,)):
            name = self._engine.id_to_token(self.image)
        if name is None:
            raise InputError(f"{self.file} has no token {self.image}, which holds the place of the image")
        return name

    def checked(self, prompts: Any) -> Prompts:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raises InputError for anything but what `read` gives."""
        if not isinstance(prompts, Prompts):
            found = f"expected what its `read` gives, got {type(prompts).__name__}"
            raise InputError(f"the model takes an image with a text: {found}")
        images, tokens = self._pictures.checked(prompts.images), super().checked(prompts.tokens)
        if len(images) != len(tokens.ids):
            raise InputError(f"every text has an image, got {len(images)} images and {len(tokens.ids)} texts")
        counts = ((tokens.types == IMAGE) & tokens.mask).sum(1)
        if (counts != self.patches).any():
            raise InputError(f"every text must have {self.patches} tokens of its image, got {counts.tolist()}")
        return Prompts(images, tokens)

    def found(self, argument: str, number: int = 1) -> dict[str, Any]:
        """The photos that an argument names."""
        return self._pictures.found(argument, number)

    def opened(self, given: Any) -> Any:
        return self._pictures.opened(given)

    def panel(self, content: Any, title: str, side: int = SIDE, profile: str = "default") -> Panel:
        return self._pictures.panel(content, title, side, profile)

    def normalise(self, prompts: Any) -> Any:
        """Embeddings stay as they are: the image is in them."""
        if not isinstance(prompts, Prompts):
            return prompts
        return prompts._replace(images=self._pictures.normalise(prompts.images))

    def unit(self, prompts: Prompts) -> Prompts:  # pyright: ignore[reportIncompatibleMethodOverride]
        return prompts._replace(images=self._pictures.unit(prompts.images))

    def levels(self, example: Example, profile: str = "default") -> tuple[Any, Any]:
        """A question about an image, whose mask rates the tokens of the image [N, 2]: of each a number as of a word,
        and the share of its square that is marked. Other tokens have no number (-1)."""
        if not isinstance(content := example.content, Question):
            raise InputError(f"{example.key} is a {kind_of(content)}, and the model takes photos with questions")
        image, mask = self._pictures.levels(Example(example.key, content.image, None, example.mask), profile)
        tokens = self._prompt(content.text)
        if mask is None:
            return Prompts(image, tokens), None
        side = math.isqrt(self.patches)
        inside = mask.astype(bool).reshape(side, mask.shape[0] // side, side, -1).mean((1, 3)).ravel()
        ratings = np.full((len(tokens.ids), 2), (-1.0, 0.0), np.float32)
        ratings[tokens.types == IMAGE] = np.stack([np.arange(self.patches), inside], 1)
        return Prompts(image, tokens), ratings

    def stacked(self, samples: Any) -> Any:
        """The results of `levels`, or tokens only, as a batch."""
        if not isinstance(samples[0], Prompts):
            return super().stacked(samples)
        return Prompts(np.stack([each.images for each in samples]), super().stacked([each.tokens for each in samples]))

    def batch(self, size: int) -> Prompts:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Prompts(self._pictures.batch(size), super().batch(size))

    @property
    def names(self) -> tuple[str, ...]:
        """The word pieces by number, without the space before those that begin a word; "" for a number without one."""
        with one_sentence((self.file,)):
            known = {number: name for name, number in self._engine.get_vocab().items()}
        return tuple(known.get(i, "").removeprefix(SPACE) for i in range(max(known) + 1))

    def answered(self, prompt: Any, answer: np.ndarray, marks: np.ndarray) -> Any:
        return prompt._replace(tokens=super().answered(prompt.tokens, answer, marks))
