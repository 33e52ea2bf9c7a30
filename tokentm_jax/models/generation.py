"""What a decoder writes after a prompt, greedy or sampled, with a cache of keys and values."""

import dataclasses
from functools import partial
from typing import Annotated, Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.prompts import Prompts
from tokentm_jax.inputs.texts import Tokens
from tokentm_jax.models.decoder import Cache, Decoder, NextWord, recast
from tokentm_jax.models.loading import Model
from tokentm_jax.models.vision_decoder import NextSeenWord, VisionDecoder
from tokentm_jax.validation import checked

ROOM = 64  # the cache has a multiple of this number of tokens, so that few sizes have to be compiled


@overload
def generate(
    model: Model, prompt: str | Tokens, most: int = 32, *, temperature: float = 0.0, seed: int = 0
) -> Tokens: ...
@overload
def generate(model: Model, prompt: Prompts, most: int = 32, *, temperature: float = 0.0, seed: int = 0) -> Prompts: ...
def generate(
    model: Model,
    prompt: str | Tokens | Prompts,
    most: int = 32,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tokens | Prompts:
    """A prompt and what a decoder writes after it, until a token that ends a text.

    Args:
        model: a loaded decoder.
        prompt: a text, or what `model.read` gives for one; of a vision-language model, for a pair of image and text.
        most: at most this number of tokens is written.
        temperature: 0: the most probable token at each step. Else a token is drawn from the softmax of the logits
            divided by the temperature.
        seed: of these draws. A draw depends on the seed, the position and the logits only.

    Returns:
        One text [1, N] as `model.read` gives it, with the image where the prompt has one: the prompt, the answer, and
        padding to a multiple of 16.

    Raises:
        InputError: for another model, more than one text, wrong options, and if prompt and answer are longer than the
            model allows.

    Examples:
        >>> model = tm.load("smollm2")  # doctest: +SKIP
        >>> model.preprocessing.decode(tm.models.generate(model, "The capital of France is", 8))  # doctest: +SKIP
    """
    if not isinstance(model, Model) or not isinstance(model.module, Decoder):
        raise InputError(f"only a loaded decoder writes texts, got {getattr(model, 'name', type(model).__name__)}")
    most = checked("most", Annotated[int, Ge(1), Le(2**20)], most)
    temperature = checked("temperature", Annotated[float, Ge(0), Le(1e6)], temperature)
    seed = checked("seed", Annotated[int, Ge(0), Le(2**32 - 1)], seed)
    tokens = model.preprocessing.checked(model.read(prompt) if isinstance(prompt, str) else prompt)
    if len(tokens.ids) != 1:
        raise InputError(f"a decoder continues one text at a time, got {len(tokens.ids)}")
    known, longest = int(tokens.mask.sum()), model.module.max_length
    if known + most > longest:
        raise InputError(f"prompt and answer may have {longest} tokens for this model, got {known} and {most}")
    ids = np.zeros(-(-(known + most) // ROOM) * ROOM, np.int32)
    ids[:known] = tokens.ids[0, :known]
    given = model.prepare(model.preprocessing.answered(tokens, ids[:0], np.zeros(0, bool)))  # with little padding
    written, count = _written(
        *(model.module, model.params, given, ids, known, known + most, np.float32(temperature)), jax.random.key(seed)
    )
    return followed(model, tokens, np.asarray(written)[known : int(count)])


def next_words(model: Model) -> Model:
    """A decoder as a classifier of the word piece that follows a prompt, with the vocabulary as classes; another model
    as it is."""
    module = model.module
    if not isinstance(module, Decoder):
        return model
    kind = NextSeenWord if isinstance(module, VisionDecoder) else NextWord
    names = model.preprocessing.names
    names = (*names, *[""] * (module.vocab_size - len(names)))[: module.vocab_size]
    return dataclasses.replace(model, module=recast(module, kind), class_names=names)


def followed(model: Model, prompt: Any, answer: np.ndarray) -> Any:
    """A prompt [1, N] and the ids of an answer [M] after it, as one text with padding."""
    return model.preprocessing.answered(prompt, answer, np.isin(answer, model.module.end))


@partial(jax.jit, static_argnums=0)
def _written(
    module: Decoder, params: Any, prompt: Any, ids: Array, known: Array, limit: Array, temperature: Array, key: Array
) -> tuple[Array, Array]:
    """The ids [K] of a text, of which `known` are those of the prompt, with those that follow, and the number of all.
    Padding behind the prompt is put in the cache, too, and replaced there before it is read."""

    def apply(method: str, *arguments: Any) -> Any:
        return module.apply({"params": params}, *arguments, method=method)

    def choose(hidden: Array, place: Array) -> Array:
        logits = apply("logits", hidden)
        drawn = jax.random.categorical(jax.random.fold_in(key, place), logits / jnp.maximum(temperature, 1e-30))
        return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(ids.dtype)

    def going_on(state: tuple[Array, Array, Array, Cache]) -> Array:
        place, ids, _, _ = state
        ended = jnp.isin(ids[place - 1], jnp.asarray(module.end, ids.dtype))
        return (place < limit) & ~((place > known) & ended)

    def step(state: tuple[Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Cache]:
        place, ids, hidden, cache = state
        ids = ids.at[place].set(choose(hidden, place))
        own = jax.lax.dynamic_slice_in_dim(ids, place, 1)[None]
        written = Tokens(own, jnp.ones_like(own, bool), jnp.zeros_like(own), jnp.zeros_like(own, bool))
        hidden, cache = apply("extend", written, cache, place)
        return place + 1, ids, hidden[0, 0], cache

    shape = (module.depth, 1, module.num_kv_heads, len(ids), module.head_dim)
    empty = jnp.zeros(shape, module.dtype or params["word_embeddings"].dtype)
    hidden, cache = apply("extend", prompt, Cache(empty, empty), jnp.zeros((), jnp.int32))
    state = (jnp.asarray(known, jnp.int32), ids, hidden[0, known - 1], cache)
    place, ids, _, _ = jax.lax.while_loop(going_on, step, state)
    return ids, place
