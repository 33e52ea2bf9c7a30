"""Decoder in Flax Linen: the Llama family, Qwen2 and Qwen3, Gemma 1 to 3, by options.

Pre-norm blocks with RMSNorm, rotary positions, grouped queries, a gated FFN and a causal mask. The blocks are one scan
with stacked parameters. Axes as in `vit`, and V vocabulary, E channels of a head, K tokens in the cache.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.inputs.texts import Texts, Tokens, last_token
from tokentm_jax.maths import primitives
from tokentm_jax.maths.primitives import wide
from tokentm_jax.models.blocks import Affine, Linear, Module, trunc_normal


class RMSNorm(Module):
    """`x / sqrt(mean(x^2) + eps)` over the last axis, times a learned scale; computed in float32 at least."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale.astype(y.dtype)).astype(x.dtype)


class Places(NamedTuple):
    """What the blocks need to know of the positions of N tokens and of K earlier and present ones."""

    cosine: Array  # [N, E], of the rotation of each token
    sine: Array  # [N, E], with the sign of the channel
    visible: Array  # [N, K] bool, or [B, 1, N, K]: whether a token attends to another


def shown(hidden: Array) -> Array:
    """Whether a token may attend to another [B, 1, N, N]: to itself, and to those that are not `hidden` [B, N]."""
    return ~hidden[:, None, None] | jnp.eye(hidden.shape[1], dtype=bool)


class Cache(NamedTuple):
    """Keys and values of earlier tokens, each [L, B, KV heads, K, E]."""

    key: Array
    value: Array


def turns(base: float, divisors: tuple[float, ...], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and signed sine of the angles of positions 0 to `count` - 1, for heads of `width` channels, each [K, E].

    The frequency of channels i and i + E/2 is `base^(-2i/E)`, divided by its divisor if there are any. Computed in
    float32, as in the library `transformers`: in more digits, late positions would differ from those of the training.
    """
    frequencies = np.float32(1) / np.float32(base) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    if divisors:
        frequencies = frequencies / np.asarray(divisors, np.float32)
    angles = np.tile(np.arange(count, dtype=np.float32)[:, None] * frequencies, 2)
    signs = np.array([-1, 1], np.float32).repeat(width // 2)
    return np.cos(angles), np.sin(angles) * signs


class GroupedAttention(Module):
    """Causal self-attention, in which each head of keys and values serves a group of query heads.

    With a cache, `past` are the keys and values of its block [B, KV heads, K, E], in which those of the present tokens
    are put from `start` on.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    proj_bias: bool
    qk_norm: bool
    norm_eps: float
    scale: float
    cap: float | None
    linear: Linear

    @nn.compact
    def __call__(self, x: Array, places: Places, past: Cache | None, start: Any) -> tuple[Array, Cache | None]:
        b, n, d = x.shape
        h, e = self.num_heads, self.head_dim

        def heads(name: str, count: int) -> Array:
            flat = self.linear(x, *Affine(count * e, self.qkv_bias, name=name)(d))
            return jnp.moveaxis(flat.reshape(b, n, count, e), 1, 2)

        query, key, value = heads("q", h), heads("k", self.num_kv_heads), heads("v", self.num_kv_heads)
        if self.qk_norm:
            query, key = RMSNorm(self.norm_eps, name="q_norm")(query), RMSNorm(self.norm_eps, name="k_norm")(key)
        query, key = (primitives.rotate(a, places.cosine, places.sine, half=True) for a in (query, key))
        if past is not None:
            pairs = zip(past, (key, value), strict=True)
            past = Cache(*(jax.lax.dynamic_update_slice_in_dim(old, new, start, 2) for old, new in pairs))
            key, value = past
        key, value = (jnp.repeat(a, h // self.num_kv_heads, 1) for a in (key, value))
        scores = jnp.einsum("bhqe,bhke->bhqk", query, key)
        scale = self.scale
        if self.cap is not None:
            scores, scale = jnp.tanh(scores * (scale / self.cap)) * self.cap, 1.0
        scores = jnp.where(places.visible, scores, jnp.finfo(scores.dtype).min / 2)
        attention = primitives.softmax(scores, scale)
        mixed = primitives.mix(attention, value)
        return self.linear(mixed, *Affine(d, self.proj_bias, name="proj")(h * e)), past


class GatedFeedForward(Module):
    """`(f(x W_gate) * x W_up) W_down`: SwiGLU or GeGLU, by the non-linearity f."""

    hidden: int
    activation: str
    use_bias: bool
    linear: Linear

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        gate, up = (self.linear(x, *Affine(self.hidden, self.use_bias, name=name)(d)) for name in ("gate", "up"))
        gated = primitives.activation(gate, self.activation) * up
        return self.linear(gated, *Affine(d, self.use_bias, name="down")(self.hidden))


class DecoderBlock(Module):
    """`x' = x + Attention(RMS1(x))`, `x+ = x' + FFN(RMS2(x'))`; with `post_norms`, each branch has a norm at its end.

    `local` (None: no block is) is whether this block attends to a window only.
    """

    attention: Mapping[str, Any]  # the fields of `GroupedAttention`, and those of `GatedFeedForward`
    ffn: Mapping[str, Any]
    norm_eps: float
    post_norms: bool

    @nn.compact
    def __call__(
        self, x: Array, local: Array | None, past: Cache | None, places: tuple[Places, Places | None], start: Any
    ) -> tuple[Array, Cache | None]:
        own, near = places
        if local is not None:
            own = jax.tree.map(lambda a, b: jnp.where(local, a, b), near, own)
        branch = RMSNorm(self.norm_eps, name="norm1")(x)
        branch, past = GroupedAttention(**self.attention, name="attn")(branch, own, past, start)
        x = x + (RMSNorm(self.norm_eps, name="post1")(branch) if self.post_norms else branch)
        branch = GatedFeedForward(**self.ffn, name="mlp")(RMSNorm(self.norm_eps, name="norm2")(x))
        return x + (RMSNorm(self.norm_eps, name="post2")(branch) if self.post_norms else branch), past


class Decoder(Module):
    """Causal language model: `Tokens` or `Texts` -> logits [B, N, V] of the word piece that follows each token.

    Padding follows a text, so it does not affect the logits at the text's tokens. `dtype` and `linear` are those of
    `ViT`. The defaults are a Llama; a norm that multiplies by 1 + w has the scale 1 + w in the parameters.
    """

    vocab_size: int
    max_length: int = 2048  # positions
    embed_dim: int = 576
    depth: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3  # heads of keys and values
    head_dim: int = 64
    mlp_hidden: int = 1536
    activation: str = "silu"  # of the gate
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_divisors: tuple[float, ...] = ()  # of the frequencies, for longer contexts: see `turns`
    window: int | None = None  # tokens that a token of a `local` block attends to, with itself
    local: tuple[bool, ...] = ()  # whether each block attends to the window only; (): no block
    local_rope_base: float | None = None  # of these blocks, without divisors; None: as the others
    together: tuple[int, ...] = ()  # the `types` of tokens that also attend to later tokens, of all these types
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # a norm of queries and of keys, per head
    post_norms: bool = False  # also a norm at the end of each branch
    embed_scale: float = 1.0  # of the embeddings
    attention_scale: float | None = None  # of the attention's scores; None: head_dim^(-1/2)
    attention_cap: float | None = None  # c of `c tanh(scores / c)`; None: no such step
    logit_cap: float | None = None  # the same of the logits
    tied: bool = True  # the head is the transposed table of the embeddings
    end: tuple[int, ...] = ()  # ids of the tokens that end a text
    dtype: DTypeLike | None = None
    linear: Linear = primitives.linear

    num_classes = 0  # no classes: what is explained is a score
    prefix = 0
    grid = None

    def example(self) -> Tokens:
        """Shapes and types of a batch of one."""
        ids, flags = (jax.ShapeDtypeStruct((1, 2), kind) for kind in (jnp.int32, jnp.bool_))
        return Tokens(ids, flags, ids, flags)

    def reads(self, mask: Array) -> Array:
        """Raises Unfit: which token the head reads depends on the position that is explained."""
        raise Unfit("a decoder has logits at every token: explain one of them, by tm.scores.Token")

    def setup(self) -> None:
        self.word_embeddings = self.param("word_embeddings", trunc_normal, (self.vocab_size, self.embed_dim))
        axes: Any = {"params": 0}
        rngs: Any = {"params": True}
        shared: Any = nn.broadcast
        in_axes: Any = (0, 0, shared, shared)
        scan = nn.scan(DecoderBlock, variable_axes=axes, split_rngs=rngs, in_axes=in_axes, length=self.depth)
        attention = {
            **{name: getattr(self, name) for name in ("num_heads", "num_kv_heads", "head_dim", "qkv_bias")},
            **{name: getattr(self, name) for name in ("proj_bias", "qk_norm", "norm_eps", "linear")},
            "scale": self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale,
            "cap": self.attention_cap,
        }
        ffn = {"hidden": self.mlp_hidden, "activation": self.activation, "use_bias": self.mlp_bias}
        self.blocks = scan(attention, ffn | {"linear": self.linear}, self.norm_eps, self.post_norms)
        self.norm = RMSNorm(self.norm_eps)
        if not self.tied:
            self.head = Affine(self.vocab_size, use_bias=False)

    def __call__(self, texts: Texts | Tokens) -> Array:
        return self.logits(self.hidden(texts))

    def look_up(self, tokens: Tokens) -> Texts:
        """Word pieces -> their embeddings; NaN for an unknown id."""
        return Texts(self._embeddings(tokens.ids), tokens.mask, tokens.types, tokens.special)

    def _embeddings(self, ids: Array) -> Array:
        found = self.word_embeddings[ids].astype(self.dtype or self.word_embeddings.dtype)
        return jnp.where(((ids >= 0) & (ids < self.vocab_size))[..., None], found, jnp.nan)

    def blank(self) -> Array:
        """The embedding [D] that replaces a removed word: zeros, as these models have no mask."""
        return jnp.zeros_like(self.word_embeddings[0])

    def hidden(self, texts: Texts | Tokens) -> Array:
        """The tokens [B, N, D] that the head reads. Raises InputError for texts that are too long."""
        return self._run(self._known(texts), None, 0)[0]

    def after(self, texts: Texts | Tokens) -> Array:
        """The logits [B, V] of the word piece that follows each text."""
        known = self._known(texts)
        return self.logits(known.last(self.hidden(known)))

    def extend(self, texts: Texts | Tokens, cache: Cache, start: Array) -> tuple[Array, Cache]:
        """The next N tokens of texts, of which `start` are in the cache -> what the head reads [B, N, D] at these, and
        the cache with them."""
        found, after = self._run(self._known(texts), cache, start)
        assert after is not None
        return found, after

    def _known(self, texts: Any) -> Texts:
        return self.look_up(texts) if hasattr(texts, "look_up") else texts

    def logits(self, hidden: Array) -> Array:
        """What the head reads [..., D] -> logits [..., V], in float32 at least."""
        tied = (self.word_embeddings.T, None)
        logits = wide(self.linear(hidden, *(tied if self.tied else self.head(self.embed_dim))))
        return logits if self.logit_cap is None else jnp.tanh(logits / self.logit_cap) * self.logit_cap

    def _run(self, texts: Texts, cache: Cache | None, start: Any) -> tuple[Array, Cache | None]:
        embeddings, n = texts.embeddings, texts.embeddings.shape[1]
        if n > self.max_length:
            raise InputError(f"a text may have {self.max_length} tokens for this model, got {n}")
        keys = n if cache is None else cache.key.shape[3]
        pairs = self._pairs(texts, keys)
        every = self._places(start, n, keys, self.rope_base, self.rope_divisors, None, pairs)
        local = near = None
        if any(self.local):
            local = jnp.asarray(self.local)
            own = (self.rope_base, self.rope_divisors) if self.local_rope_base is None else (self.local_rope_base, ())
            near = self._places(start, n, keys, *own, self.window, pairs)
        if texts.hidden is not None:  # a token still attends to itself
            every = every._replace(visible=every.visible & shown(texts.hidden))
            near = None if near is None else near._replace(visible=near.visible & shown(texts.hidden))
        x = embeddings if self.embed_scale == 1 else embeddings * self.embed_scale
        x, cache = self.blocks(x, local, cache, (every, near), start)
        return self.norm(x), cache

    def _pairs(self, texts: Texts, keys: int) -> Array | None:
        """Which of N new tokens [B, 1, N, K] also attend to later ones: those of the types `together`. None: none."""
        if not self.together:
            return None
        free = jnp.isin(texts.types, jnp.asarray(self.together, texts.types.dtype)) & texts.mask
        later = jnp.pad(free, ((0, 0), (0, keys - free.shape[1])))  # the tokens of such types are the first of a text
        return free[:, None, :, None] & later[:, None, None]

    def _places(
        self,
        start: Any,
        n: int,
        keys: int,
        base: float,
        divisors: tuple[float, ...],
        window: int | None,
        pairs: Array | None,
    ) -> Places:
        """Where `n` tokens from `start` on are, and which of the tokens 0 to `keys` - 1 they attend to."""
        tables = (jnp.asarray(table) for table in turns(base, divisors, keys, self.head_dim))
        cosine, sine = (jax.lax.dynamic_slice_in_dim(table, start, n) for table in tables)
        back = (start + jnp.arange(n))[:, None] - jnp.arange(keys)  # by how many tokens each one is earlier
        visible = back >= 0 if pairs is None else (back >= 0) | pairs
        return Places(cosine, sine, visible if window is None else visible & (back < window))


Kind = TypeVar("Kind", bound=Decoder)


def recast(decoder: Decoder, kind: type[Kind], **more: Any) -> Kind:
    """A decoder as a module of a class with more fields, or other ones."""
    fields = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)}
    return kind(**{name: value for name, value in fields.items() if name not in ("parent", "name")} | more)


class NextWord(Decoder):
    """A decoder as a classifier: `Tokens` or `Texts` -> logits [B, V] of the word piece that follows each text."""

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    def reads(self, mask: Array) -> Array:
        """r0 [B, N]: the head reads the last token; mask [B, N]."""
        return last_token(mask)

    def __call__(self, texts: Texts | Tokens) -> Array:
        return self.after(texts)
