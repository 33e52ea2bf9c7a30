"""TokenTM: Token Transformation Matters (Wu et al., CVPR 2024, arXiv 2403.14552).

Every function takes ONE sample; use `jax.vmap` for a batch. Axes: L blocks, H heads, N tokens, D width; attention
is [.., N queries, N keys]. Contributions are written as rows: `row[j]` is the contribution of input token j to one
output token (or to the mixture of output tokens that the head reads). A matrix of rows `[M, N]` is M such outputs.

    L(x)   = ||x||_2                                                      length
    NECC_j = exp cos(x_j, x~_j) / mean_k exp cos(x_k, x~_k)               direction
    w_j    = L(x~_j) / L(x_j) * NECC_j,   W = diag(w)                     transformation weight
    C0     = diag(L(x0_1) ... L(x0_N))                                    initial contribution
    C      <- (I + A W_attn) C                                            attention layer
    C      <- (I + W_ffn) C                                               FFN layer

Every update multiplies from the left, so a row of the final C is found from the last block down to the first with
no product of two [N, N] maps: `r <- r * (1 + w_ffn)`, `r <- r + (r A) * w_attn`, and at the end `r * L(x0)`.

That is the order of the backward pass, too, which is where the gradient in `A = mean_h relu(G * A_h)` comes from. So a
stream u [N] of zeros goes through the blocks beside the tokens, by `attention_layer` and `ffn_layer`. It changes
nothing and stays zero. Its cotangent is the row: it enters the backward pass as the head's read-out and leaves it as
the heatmap's row, and no attention and no gradient of it is held for two blocks at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import chex
import jax
import jax.numpy as jnp
from annotated_types import Ge
from jax import Array


class Blocks(NamedTuple):
    """What one sample's blocks did. Each array has a leading L axis where all blocks are meant; None is not known."""

    attention: Any  # [L, H, N, N] after softmax
    attention_grad: Any  # [L, H, N, N] gradient of the logit at the attention
    tokens: Any  # [L, N, D] input tokens x
    normalised: Any  # [L, N, D] LN1(x)
    transformed_value: Any  # [L, N, D] x~ of the attention layer: value and output projection, without mixing
    attention_branch: Any  # [L, N, D] output of the attention layer before the residual sum
    ffn_branch: Any  # [L, N, D] x~ of the FFN layer: its output before the residual sum


@dataclasses.dataclass(frozen=True)
class TokenTM:
    """The choices of TokenTM; the defaults are the method, all components off is GAE.

    Args:
      length: whether `w` has the ratio of lengths.
      direction: "necc", "cosine" (`cos` in place of NECC) or "none".
      initialise: whether `C0` has the lengths of the embedded tokens, in place of the identity.
      ffn: whether the FFN layers update the contributions.
      attention: "gradient" for `A = mean_h relu(G * A_h)`, which is class-specific, or "plain" for `mean_h A_h`.
      original: what the attention layer's `x_j` is: the "residual" stream x or the "normalised" LN1(x).
      first_block: first block that is aggregated, from 0.
      end_block: one past the last block that is aggregated; None for all.
    """

    length: bool = True
    direction: Literal["necc", "cosine", "none"] = "necc"
    initialise: bool = True
    ffn: bool = True
    attention: Literal["gradient", "plain"] = "gradient"
    original: Literal["residual", "normalised"] = "residual"
    first_block: Annotated[int, Ge(0)] = 0
    end_block: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a choice that is none, so that no map is ever computed by a misspelt one."""
        for field in dataclasses.fields(self):
            choices, given = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and given not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {given!r}")
        if self.end_block is not None and self.end_block <= self.first_block:
            raise ValueError(f"end_block must be past first_block ({self.first_block}), got {self.end_block}")

    @property
    def weighs(self) -> bool:
        """Whether tokens and what they become have weights at all."""
        return self.length or self.direction != "none"

    def uses(self) -> set[str]:
        """The fields of `Blocks` that these choices read."""
        names = {"attention"} | ({"attention_grad"} if self.attention == "gradient" else set())
        if self.weighs:
            names |= {"tokens" if self.original == "residual" else "normalised", "transformed_value"}
        if self.weighs and self.ffn:
            names |= {"tokens", "attention_branch", "ffn_branch"}
        return names | ({"tokens"} if self.initialise else set())


def token_length(x: Array) -> Array:
    """Length `L(x) = ||x||_2` of each token [..., D] -> [...]; its gradient at a zero token is zero."""
    squared = jnp.square(x).sum(-1)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def _ratio(a: Array, b: Array) -> Array:
    """`a / b`, zero where b is zero."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def cosine(original: Array, transformed: Array) -> Array:
    """`cos(x_j, x~_j)` of paired tokens [N, D] -> [N]; zero where either has no length."""
    dot = (original * transformed).sum(-1)
    return _ratio(_ratio(dot, token_length(original)), token_length(transformed))


def necc(original: Array, transformed: Array) -> Array:
    """Normalised exponential cosine correlation of paired tokens [N, D] -> [N], with mean 1 over the tokens."""
    correlation = jnp.exp(cosine(original, transformed))
    return correlation / correlation.mean()


def transformation_weights(
    original: Array, transformed: Array, *, length: bool = True, direction: str = "necc"
) -> Array:
    """`w_j = L(x~_j) / L(x_j) * NECC_j` of paired tokens [N, D] -> [N]."""
    weights = jnp.ones(original.shape[:-1], original.dtype)
    if length:
        weights = weights * _ratio(token_length(transformed), token_length(original))
    if direction != "none":
        weights = weights * {"necc": necc, "cosine": cosine}[direction](original, transformed)
    return weights


def mean_attention(weighted: Array) -> Array:
    """`mean_h relu(.)` [H, N, N] -> [N, N], of gradient times attention `G * A` or of attention alone."""
    return jax.nn.relu(weighted).mean(0)


def attention_update(rows: Array, attention: Array, weights: Array | float = 1.0) -> Array:
    """Rows [..., N] of `C` through `(I + A W)` for A [N, N] and w [N]: `r + (r A) * w`."""
    return rows + (rows @ attention) * weights


def ffn_update(rows: Array, weights: Array) -> Array:
    """Rows [..., N] of `C` through `(I + W)` for w [N]: `r * (1 + w)`."""
    return rows * (1 + weights)


class Weights(NamedTuple):
    """The transformation weights of one block: the diagonals of W_attn and W_ffn, each [N]."""

    attention: Array
    ffn: Array


def attention_weights(tokens: Array, normalised: Array, transformed_value: Array, options: TokenTM) -> Array:
    """Diagonal [N] of W_attn from a layer's input, LN1 of it and what values and output projection make of it."""
    original = tokens if options.original == "residual" else normalised
    return transformation_weights(original, transformed_value, length=options.length, direction=options.direction)


def ffn_weights(tokens: Array, ffn_branch: Array, options: TokenTM) -> Array:
    """Diagonal [N] of W_ffn from a layer's input and its output before the residual sum; zeros without `ffn`."""
    weights = transformation_weights(tokens, ffn_branch, length=options.length, direction=options.direction)
    return weights if options.ffn else jnp.zeros_like(weights)


def block_weights(block: Blocks, options: TokenTM) -> Weights:
    """Transformation weights of one block (arrays of `block` without the L axis). They need no gradient."""
    ones = jnp.ones(block.attention.shape[-1:], block.attention.dtype)
    if not options.weighs:
        return Weights(ones, ones if options.ffn else jnp.zeros_like(ones))
    attention = attention_weights(block.tokens, block.normalised, block.transformed_value, options)
    middle = block.tokens + block.attention_branch if options.ffn else None
    ffn = ffn_weights(middle, block.ffn_branch, options) if options.ffn else jnp.zeros_like(ones)
    return Weights(attention, ffn)


def block_update(rows: Array, attention: Array, weights: Weights) -> Array:
    """Rows [..., N] from the output of one block back to its input, for its head-averaged attention [N, N]."""
    return attention_update(ffn_update(rows, weights.ffn), attention, weights.attention)


@jax.custom_vjp
def attention_layer(attention: Array, u: Array, weights: Array) -> tuple[Array, Array]:
    """Attention [H, N, N] and the stream u [N] through an attention layer: both unchanged.

    Backward, the cotangent of the attention is its gradient G, and that of u is a row r, which becomes
    `r + (r A) * w` with `A = mean_h relu(G * A_h)`. The weights w [N] get none, for u is zero.
    """
    return attention, u


def _attention_layer_backward(saved: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    (attention, weights), (gradient, row) = saved, cotangents
    weighted = gradient.astype(row.dtype) * attention.astype(row.dtype)
    return gradient, attention_update(row, mean_attention(weighted), weights), None


attention_layer.defvjp(lambda attention, u, weights: ((attention, u), (attention, weights)), _attention_layer_backward)


@jax.custom_vjp
def ffn_layer(u: Array, weights: Array) -> Array:
    """The stream u [N] through an FFN layer, unchanged. Backward, its cotangent, a row r, becomes `r * (1 + w)`."""
    return u


ffn_layer.defvjp(lambda u, weights: (u, weights), lambda weights, row: (ffn_update(row, weights), None))


def propagate(
    update: Callable[[Array, Any], Array],
    blocks: Any,
    rows: Array,
    first_block: int = 0,
    end_block: int | None = None,
) -> Array:
    """Carry rows [..., N] from the output of the last chosen block down to the input of the first.

    `update(rows, block)` is the rule of one block; the arrays of `blocks` have a leading L axis.
    """
    chosen = jax.tree.map(lambda a: a[first_block:end_block], blocks)
    return jax.lax.scan(lambda r, block: (update(r, block), None), rows, chosen, reverse=True)[0]


def contributions(blocks: Blocks, embedded: Array | None, rows: Array, options: TokenTM = TokenTM()) -> Array:
    """Contribution of every input token to the outputs that `rows` [..., N] read.

    With `rows` the read-out of the head this is the heatmap's row; with the identity it is the full map C [N, N].

    Args:
      blocks: arrays with a leading L axis; those that `options.uses()` names.
      embedded: tokens x0 [N, D] that enter the first block; needed where `options.initialise`.
      rows: distributions over output tokens, [..., N].
      options: see `TokenTM`.

    Returns:
      Contributions [..., N], column j for input token j.
    """
    chex.assert_axis_dimension(rows, -1, blocks.attention.shape[-1])

    def update(rows: Array, block: Blocks) -> Array:
        weighted = block.attention * (block.attention_grad if options.attention == "gradient" else 1)
        return block_update(rows, mean_attention(weighted), block_weights(block, options))

    rows = propagate(update, blocks, rows, options.first_block, options.end_block)
    return initial_contributions(rows, embedded, options)


def initial_contributions(rows: Array, embedded: Array | None, options: TokenTM) -> Array:
    """Rows [..., N] times C0, for the embedded tokens x0 [N, D]: what each token brings into the first block."""
    if not options.initialise:
        return rows
    assert embedded is not None
    return rows * token_length(embedded)
