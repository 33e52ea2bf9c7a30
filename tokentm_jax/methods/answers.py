"""Why a decoder wrote each token of an answer: maps of a text, [written tokens, tokens].

Axes: M tokens of the answer, N tokens of prompt and answer, C candidates for each written token.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, overload

import jax
import numpy as np
from annotated_types import Ge, Le
from jax.nn import softmax

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.prompts import IMAGE, Prompts
from tokentm_jax.inputs.texts import Tokens
from tokentm_jax.maths.scores import Token
from tokentm_jax.methods.explain import explain
from tokentm_jax.methods.table import Method
from tokentm_jax.models.decoder import Decoder
from tokentm_jax.models.generation import followed, generate
from tokentm_jax.models.loading import Model
from tokentm_jax.models.vision_decoder import VisionDecoder
from tokentm_jax.validation import checked


@dataclasses.dataclass(frozen=True, eq=False)
class Reasons:
    """Why each token of an answer was written.

    Args:
      pieces: N texts of the tokens of prompt and answer; joined, they are the text.
      ids: their numbers [N] in the vocabulary.
      start: number of tokens of the prompt, and so the position of the first token of the answer.
      maps: relevance [M, N] of each token for each token of the answer; 0 for that token and all after it. The map of
        a span is the sum of its rows: with `log_probability`, of the log-probability of the whole span.
      logits: the model's logit of each token of the answer [M].
      probabilities: the model's probability of each, given all before it [M].
      candidates: numbers of the most probable tokens at each of these positions, the best one first [M, C].
      candidate_pieces: their texts.
      candidate_probabilities: their probabilities [M, C].
      against: the other token of the contrast at each position [M]; None without a contrast.
      image: the places of the image's tokens in the prompt, in rows [gh, gw]; None without an image.
    """

    pieces: list[str]
    ids: np.ndarray
    start: int
    maps: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    candidates: np.ndarray
    candidate_pieces: list[list[str]]
    candidate_probabilities: np.ndarray
    against: np.ndarray | None
    image: np.ndarray | None = None

    @property
    def image_maps(self) -> np.ndarray:
        """Relevance of the image's tokens for each token of the answer [M, gh, gw]. InputError without an image."""
        if self.image is None:
            raise InputError("this prompt has no image")
        return self.maps[:, self.image]

    def others(self, row: int) -> list[tuple[int, str, float]]:
        """The candidates for a token of the answer that were not written: number, text and probability of each."""
        every = zip(
            self.candidates[row].tolist(), self.candidate_pieces[row], self.candidate_probabilities[row].tolist(),
            strict=True,
        )  # fmt: skip
        return [each for each in every if each[0] != self.ids[self.start + row]]

    @property
    def answer(self) -> str:
        """The text of the answer."""
        return "".join(self.pieces[self.start :])


Image = str | os.PathLike[str] | np.ndarray
Other = str | int | Sequence[str | int]


@overload
def explain_words(
    model: Model,
    prompt: str | Tokens | Prompts,
    answer: str | Sequence[int] | None = None,
    method: str | Method = "tokentm",
    *,
    image: Image | None = None,
    against: Other | None = None,
    log_probability: bool = False,
    most: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 4,
    candidates: int = 5,
    **options: object,
) -> Reasons: ...
@overload
def explain_words(
    model: Model,
    prompt: list[str] | list[Tokens] | list[Prompts],
    answer: str | Sequence[str | Sequence[int]] | None = None,
    method: str | Method = "tokentm",
    *,
    image: Image | Sequence[Image] | None = None,
    against: str | int | Sequence[Other] | None = None,
    log_probability: bool = False,
    most: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 4,
    candidates: int = 5,
    **options: object,
) -> list[Reasons]: ...
def explain_words(
    model: Model,
    prompt: str | Tokens | Prompts | list[str] | list[Tokens] | list[Prompts],
    answer: str | Sequence[int] | Sequence[str | Sequence[int]] | None = None,
    method: str | Method = "tokentm",
    *,
    image: Image | Sequence[Image] | None = None,
    against: Other | Sequence[Other] | None = None,
    log_probability: bool = False,
    most: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 4,
    candidates: int = 5,
    **options: object,
) -> Reasons | list[Reasons]:
    """Why a decoder writes each token of an answer: which tokens of the prompt, and of the answer so far, matter.

    The tokens of an image are among those of the prompt. Their relevance is read where they enter the decoder, after
    the vision tower, whose attention mixes patches.

    Args:
      model: a loaded decoder.
      prompt: a text, or what `model.read` gives for one; for an image and a text, of a vision-language model. Or a
        list of these; then a list in `answer`, `image` or `against` has one item for each, and another value is for
        all.
      answer: a text that follows the prompt, or numbers of tokens; None: what the model writes.
      method: a name of `METHODS`, or a row.
      image: of a vision-language model, the image that the prompt is about: a file, or an array [H, W, 3].
      against: explain why each token, and not this one: the difference of the logits. A text (of which the first token
        counts) or the number of a token; one for the whole answer, or one for each of its tokens.
      log_probability: explain the log-probability of each token, and not its logit.
      most: at most this number of tokens is written.
      temperature, seed: how tokens are drawn, as in `tokentm_jax.models.generate`; 0: the most probable ones.
      batch_size: number of tokens that are explained at a time. One compiled program is for all of them, and for all
        texts with the same multiple of 16 tokens.
      candidates: number of candidates that are kept for each token.
      **options: the method's options.

    Returns:
      The tokens with their maps, logits, probabilities and candidates. For a list of prompts, a list of these, each as
      for that prompt by itself.

    Raises:
      InputError: another model, no text, an answer or contrast without a token, no such method or option, and prompt
        and answer that are longer than the model allows. It states which prompt of a list.

    Examples:
        >>> model = tm.load("smollm2")  # doctest: +SKIP
        >>> found = tm.explain_words(model, "The capital of France is")  # doctest: +SKIP
        >>> found.pieces[found.start], found.maps.shape  # doctest: +SKIP
        (' Paris', (16, 21))
    """
    if not isinstance(model, Model) or not isinstance(model.module, Decoder):
        raise InputError(f"only a decoder writes words, got {getattr(model, 'name', type(model).__name__)}")
    if isinstance(prompt, list):
        own: Any = {"log_probability": log_probability, "most": most, "temperature": temperature, "seed": seed}
        own |= {"batch_size": batch_size, "candidates": candidates, **options}
        explain_one: Any = partial(explain_words, model, method=method, **own)
        return _each(explain_one, prompt, {"answer": answer, "image": image, "against": against})
    size = checked("batch_size", Annotated[int, Ge(1), Le(1024)], batch_size)
    count = min(checked("candidates", Annotated[int, Ge(0), Le(1024)], candidates), model.module.vocab_size)
    checked("log_probability", bool, log_probability)
    settings: dict[str, Any] = options
    reader = model.preprocessing
    if isinstance(prompt, str):
        sees = isinstance(model.module, VisionDecoder)
        if sees != (image is not None):
            wants = "needs an image with the prompt" if sees else "is no vision-language model: leave out the image"
            raise InputError(f"{model.name} {wants}")
        given = reader.checked(model.read((image, prompt) if sees else prompt))
    elif image is not None:
        raise InputError("the prompt has an image: leave out the other one")
    else:
        given = reader.checked(prompt)
    if len(given.ids) != 1:
        raise InputError(f"one text is explained at a time, got {len(given.ids)}")
    start = int(given.mask.sum())
    if answer is None:
        written = generate(model, given, most, temperature=temperature, seed=seed)
    else:
        own = reader.continued(prompt, given.ids[0, :start], answer) if isinstance(answer, str) else answer
        written = _with_answer(model, given, start, own)
    n = int(written.mask.sum())
    ids, places = written.ids[0, :n], np.arange(start, n)
    others = None if against is None else _others(model, against, written, places)

    batches = []
    for first in range(0, len(places), size):
        asked = np.minimum(np.arange(first, first + size), len(places) - 1)  # the last batch repeats its last token
        other = None if others is None else others[asked]
        score = Token(places[asked], ids[places[asked]], other, log_probability)
        texts = jax.tree.map(lambda array: np.repeat(array, size, 0), written)
        found, details = explain(model, texts, method, score=score, details=True, **settings)
        outputs = np.asarray(details["logits"], np.float32)
        every, which = softmax(outputs), (np.arange(size), ids[places[asked]])
        columns = (np.asarray(found, np.float32)[:, :n], outputs[which], every[which], *jax.lax.top_k(every, count))
        batches.append([np.asarray(column)[: len(places) - first] for column in columns])
    maps, logits, shares, best_shares, best = map(np.concatenate, zip(*batches, strict=True))
    pieces = [[reader.following(ids[:place], int(k)) for k in own] for place, own in zip(places, best, strict=True)]
    return Reasons(
        reader.pieces(ids), ids, start, maps, logits, shares, best, pieces, best_shares, others, _image(model, given)
    )


def _each(explain_one: Callable[..., Reasons], prompts: Sequence[Any], given: Mapping[str, Any]) -> list[Reasons]:
    """What a function gives for each prompt, with its item of each list in `given`."""
    if not prompts:
        raise InputError("the list of prompts is empty")
    lists = {name: value for name, value in given.items() if isinstance(value, list | tuple)}
    for name, value in lists.items():
        if len(value) != len(prompts):
            raise InputError(
                f"{name} must be one for each of {len(prompts)} prompts, or one for all, got {len(value)}"
            )
    found = []
    for place, prompt in enumerate(prompts):
        try:
            found.append(explain_one(prompt, **{**given, **{name: value[place] for name, value in lists.items()}}))
        except InputError as error:
            raise InputError(f"prompt {place + 1} of {len(prompts)}: {error}") from None
    return found


def _image(model: Model, prompt: Any) -> np.ndarray | None:
    """The places of an image's tokens in a prompt [gh, gw]."""
    if not isinstance(model.module, VisionDecoder):
        return None
    return np.flatnonzero(np.asarray(prompt.tokens.types[0]) == IMAGE).reshape(model.module.image_grid)


def _with_answer(model: Model, prompt: Any, start: int, answer: Any) -> Any:
    """Prompt and answer as one text [1, N]."""
    numbers = np.asarray(answer)
    if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
        raise InputError(f"the answer must be a text or numbers of tokens, one at least, got {answer!r:.80}")
    longest = model.module.max_length
    if start + len(numbers) > longest:
        raise InputError(f"prompt and answer may have {longest} tokens for this model, got {start} and {len(numbers)}")
    return model.preprocessing.checked(followed(model, prompt, numbers.astype(np.int64)))


def _others(model: Model, against: Any, written: Any, places: np.ndarray) -> np.ndarray:
    """The other token of each contrast [M]."""
    each = [against] * len(places) if isinstance(against, str | int | np.integer) else list(against)
    if len(each) != len(places):
        raise InputError(
            f"against must be one token or one for each of the {len(places)} of the answer, got {len(each)}"
        )
    reader, ids = model.preprocessing, written.ids[0]
    found = []
    for place, other in zip(places, each, strict=True):
        own = reader.first_token(ids[:place], other, int(ids[place])) if isinstance(other, str) else other
        if not isinstance(own, int | np.integer) or not 0 <= own < model.module.vocab_size:
            raise InputError(
                f"against must be texts or numbers of tokens below {model.module.vocab_size}, got {other!r:.80}"
            )
        found.append(int(own))
    return np.array(found, np.int32)
