"""Text Transformer in Flax Linen, in the style of BERT: post-norm blocks, token types, learned positions, padding.

Its blocks are those of `vit`, and sow the same names. Axes as in `vit`; N is the number of tokens of the longest text.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.texts import Texts, Tokens
from tokentm_jax.maths import primitives
from tokentm_jax.maths.primitives import wide
from tokentm_jax.models.blocks import Affine, Block, Linear, Module, Norm, scanned, trunc_normal


class Bert(Module):
    """Text encoder with a head: `Texts` or `Tokens` -> logits [B, classes], or features [B, D] for no classes.

    `dtype` and `linear` are those of `ViT`. Values at padded positions do not affect the result.
    """

    vocab_size: int = 30522
    max_length: int = 512  # positions
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    num_classes: int = 2  # 0: no head, the outputs are the pooled features
    type_vocab_size: int = 2  # 0: no token types
    embedding_size: int | None = None  # if a linear map follows the embeddings (ELECTRA): their width
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pool: str = "token"  # the first token, or "avg" of all
    pooler: str | None = "tanh"  # the non-linearity of a layer between pooling and classifier; None: no such layer
    mask_id: int | None = None  # of the word piece that replaces a removed one
    dtype: DTypeLike | None = None
    linear: Linear = primitives.linear

    post_norm = True
    prefix = 0  # every token has a score
    grid = None

    def example(self) -> Tokens:
        """Shapes and types of a batch of one."""
        ids, flags = (jax.ShapeDtypeStruct((1, 2), kind) for kind in (jnp.int32, jnp.bool_))
        return Tokens(ids, flags, ids, flags)

    def reads(self, mask: Array) -> Array:
        """r0 [B, N]: the distribution with which the head reads tokens; mask [B, N]."""
        if self.pool == "avg":
            shares = jnp.asarray(mask, jnp.float32)
            return shares / jnp.maximum(shares.sum(-1, keepdims=True), 1)
        return jnp.zeros(mask.shape, jnp.float32).at[:, 0].set(1)

    def setup(self) -> None:
        width = self.embedding_size or self.embed_dim
        self.word_embeddings = self.param("word_embeddings", trunc_normal, (self.vocab_size, width))
        self.position_embeddings = self.param("position_embeddings", trunc_normal, (self.max_length, width))
        if self.type_vocab_size:
            self.type_embeddings = self.param("type_embeddings", trunc_normal, (self.type_vocab_size, width))
        self.embed_norm = Norm(self.norm_eps)
        if self.embedding_size:
            self.embed_project = Affine(self.embed_dim)
        self.blocks = scanned(self.depth, self._block_fields)
        if self.pooler is not None:
            self.pooler_layer = Affine(self.embed_dim, name="pooler")
        if self.num_classes:
            self.head = Affine(self.num_classes)

    @property
    def _block_fields(self) -> dict[str, Any]:
        same = ("num_heads", "mlp_hidden", "activation", "norm_eps", "linear", "post_norm")
        return {name: getattr(self, name) for name in same}

    def block(self) -> Block:
        """One block, to apply to a slice of `params["blocks"]`."""
        return Block(**self._block_fields, parent=None)

    def __call__(self, texts: Texts | Tokens) -> Array:
        given: Any = texts
        known = self.look_up(given) if hasattr(given, "look_up") else given
        mask = known.mask if known.hidden is None else known.mask & ~known.hidden
        tokens, _ = self.blocks(self.embed(known), mask)
        self.sow("intermediates", "final_tokens", tokens)
        return self.classify(tokens, mask)

    def look_up(self, tokens: Tokens) -> Texts:
        """Word pieces -> their embeddings; NaN for an unknown id."""
        known = (tokens.ids >= 0) & (tokens.ids < self.vocab_size)
        found = self.word_embeddings[tokens.ids].astype(self.dtype or self.word_embeddings.dtype)
        return Texts(jnp.where(known[..., None], found, jnp.nan), tokens.mask, tokens.types, tokens.special)

    def blank(self) -> Array:
        """The embedding [D] that replaces a removed word: of the mask, or zeros for a model without a mask."""
        if self.mask_id is None:
            return jnp.zeros_like(self.word_embeddings[0])
        return self.word_embeddings[self.mask_id]

    def embed(self, texts: Texts) -> Array:
        """Embeddings [B, N, D] -> tokens [B, N, D] that enter the first block."""
        x = texts.embeddings
        if x.shape[1] > self.max_length:
            raise InputError(f"a text may have {self.max_length} tokens for this model, got {x.shape[1]}")
        places = self.position_embeddings[: x.shape[1]]
        if self.type_vocab_size:
            places = places + self.type_embeddings[texts.types]
        x = self.embed_norm(x + jnp.broadcast_to(places, x.shape).astype(x.dtype))
        return self.linear(x, *self.embed_project(x.shape[-1])) if self.embedding_size else x

    def read_part(self, tokens: Array, kept: Array, count: int) -> Array:
        """The outputs for embedded tokens [B, N, D] without attention to those that are not `kept` [B, N]."""
        return self.classify(self.blocks(tokens, kept)[0], kept)

    def classify(self, tokens: Array, mask: Array) -> Array:
        """Tokens [B, N, D] and their mask [B, N] -> logits [B, classes], or features, in float32 at least."""
        d = self.embed_dim
        if self.pool == "avg":

            def mean(x: Array, shares: Array) -> Array:  # a linear map over tokens, so that the rules for one hold
                return self.linear(x.T, shares[:, None].astype(x.dtype), None)[:, 0]

            pooled = jax.vmap(mean)(tokens, self.reads(mask))
        else:
            pooled = tokens[:, 0]
        if self.pooler is not None:
            pooled = primitives.activation(self.linear(pooled, *self.pooler_layer(d)), self.pooler)
        return wide(self.linear(pooled, *self.head(d)) if self.num_classes else pooled)
