"""Text towers of CLIP and SigLIP: prompts -> embeddings, in the space of the image tower's outputs.

Axes, besides those of `vit`: T prompts, C tokens of a prompt, V vocabulary, W width, E embedding.
"""

import dataclasses
import functools
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.tokenizers import engine, one_sentence
from tokentm_jax.maths.primitives import linear
from tokentm_jax.models.blocks import Affine, Module, Norm, scanned, trunc_normal

LARGEST_PROMPT = 100_000  # characters


class TextEncoder(Module):
    """Text Transformer: token ids [T, C] -> embeddings [T, E], not of unit length.

    A causal encoder (CLIP) is pooled at the first end-of-text token: the id `end` or, for None, the highest id of the
    prompt. The other kind (SigLIP) is pooled at the last position.
    """

    vocabulary: int
    context: int
    width: int
    depth: int
    num_heads: int
    mlp_hidden: int
    output: int
    causal: bool
    end: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-5

    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and type of a batch of one."""
        return jax.ShapeDtypeStruct((1, self.context), jnp.int32)

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        w = self.width
        tokens = self.param("token_embedding", trunc_normal, (self.vocabulary, w))
        positions = self.param("positional_embedding", trunc_normal, (self.context, w))
        names = ("num_heads", "mlp_hidden", "activation", "norm_eps", "causal")
        blocks = scanned(self.depth, {name: getattr(self, name) for name in names}, name="blocks")
        x, _ = blocks(tokens[ids] + positions, None)
        x = Norm(self.norm_eps, name="norm")(x)
        if self.causal:
            place = (ids if self.end is None else ids == self.end).argmax(-1)
            pooled = jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
        else:
            pooled = x[:, -1]
        return linear(pooled, *Affine(self.output, name="head")(w))


@functools.partial(jax.jit, static_argnums=0)
def _embed(module: TextEncoder, params: Any, ids: Array) -> Array:
    embeddings: Any = module.apply({"params": params}, ids)
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Prompts -> token ids, with the model's files as they were when it was loaded."""

    files: tuple[Path, ...]  # `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`
    contents: tuple[str, ...] = dataclasses.field(repr=False)
    context: int  # number C of ids; longer prompts are cut, and keep their last special token
    pad: int | None = None  # id after shorter prompts; None: that of the prompt's last token, the end of text
    canonical: bool = False  # lower case without punctuation, as in SigLIP's processor
    problem: str | None = None  # why the tokenizer is missing, for the error at the first prompt

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[T] -> ids [T, C] int32. Raises InputError for files that are missing or damaged, and without the extra."""
        if self.problem is not None:
            raise InputError(self.problem)
        pieces = engine(self.contents, self.context, *self.files)
        texts, marks = list(prompts), str.maketrans("", "", string.punctuation)
        if self.canonical:
            texts = [" ".join(prompt.lower().translate(marks).split()) for prompt in prompts]
        with one_sentence(self.files):
            found = [encoding.ids for encoding in pieces.encode_batch(texts)]
        ids = np.empty((len(found), self.context), np.int32)
        for row, values in zip(ids, found, strict=True):
            if not values:
                raise InputError(f"{self.files[0]}: the tokenizer does not mark the end of a text")
            row[:] = values[-1] if self.pad is None else self.pad
            row[: len(values)] = values[: self.context]
        return ids


@dataclasses.dataclass(frozen=True, eq=False)
class TextTower:
    """The text half of a CLIP or SigLIP: a logit is `logit_scale * cosine(image, prompt) + logit_bias`."""

    module: TextEncoder
    params: Any
    tokenizer: Tokenizer
    logit_scale: float
    logit_bias: float = 0.0

    def embed(self, prompts: str | Sequence[str]) -> Array:
        """One prompt or several -> [T, E] float32 of unit length. Raises InputError."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompts must be a text or a list of texts, got {prompts!r:.80}")
        for text in texts:
            if not text.strip() or len(text) > LARGEST_PROMPT:
                raise InputError(f"a prompt must have 1 to {LARGEST_PROMPT} characters, got {text!r:.80}")
        ids = self.tokenizer(texts)
        if ids.min() < 0 or ids.max() >= self.module.vocabulary:
            given = f"it gives the id {ids.max()}, and the model has {self.module.vocabulary} tokens"
            raise InputError(f"the tokenizer does not fit the model: {given}")
        if self.module.end is not None and not (ids == self.module.end).any(-1).all():
            raise InputError(f"the tokenizer does not end a text with the model's id {self.module.end}")
        return _embed(self.module, self.params, jnp.asarray(ids))
