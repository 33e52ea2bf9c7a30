"""TokenTM: Token Transformation Matters (Wu et al., CVPR 2024, arXiv 2403.14552).

Every function takes ONE sample; use `jax.vmap` for a batch. Axes: L blocks, H heads, N tokens, D width; attention
is [.., N queries, N keys]. Contributions are written as rows: `row[j]` is the contribution of input token j to one
output token (or to the mixture of output tokens that the head reads). A matrix of rows `[M, N]` is M such outputs.

    L(x)   = ||x||_2                                                      length
    NECC_j = exp cos(x_j, x~_j) / mean_k exp cos(x_k, x~_k)               direction
    w_j    = L(x~_j) / L(x_j) * NECC_j,   W = diag(w)                     transformation weight
    C0     = diag(L(x0_1) ... L(x0_N))                                    initial contribution
    C      <- (I + mean_h relu(G * A_h) W_attn) C                         attention layer
    C      <- (I + W_ffn) C                                               FFN layer

Post-norm blocks (BERT) put a LayerNorm behind each sum u: `C <- diag(L(LN(u)) / L(u)) C`.

Every update multiplies from the left, so a row of the final C is found from the last block down to the first with
no product of two [N, N] maps: `r <- r * (1 + w_ffn)`, `r <- r + r A W_attn`, and at the end `r * L(x0)`.

That is the order of the backward pass, too, which is where the gradient G of the logit at attention comes from. So a
stream u [N] of zeros goes through the blocks beside the tokens, by `attention_layer` and `ffn_layer`. It changes
nothing and stays zero. Its cotangent is the row: it enters the backward pass as the head's read-out and leaves it as
the heatmap's row, and no attention and no gradient of it is held for two blocks at once.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import chex
import jax
import jax.numpy as jnp
from annotated_types import Ge
from jax import Array


class Blocks(NamedTuple):
    """What one sample's blocks did. Each array has a leading L axis where all blocks are meant; None is not known.

    The two kernels are parameters, the same for all samples. Head h has the columns of W_V, and the rows of W_O, from
    h D/H on.
    """

    attention: Any  # [L, H, N, N] after softmax
    attention_grad: Any  # [L, H, N, N] gradient of the logit at the attention
    tokens: Any  # [L, N, D] input tokens x
    normalised: Any  # [L, N, D] LN1(x)
    transformed_value: Any  # [L, N, D] x~ of the attention layer: value and output projection, without mixing
    attention_branch: Any  # [L, N, D] output of the attention layer before the residual sum
    ffn_branch: Any  # [L, N, D] x~ of the FFN layer: its output before the residual sum
    value: Any = None  # [L, H, N, D/H] value projection of LN1(x)
    value_kernel: Any = None  # [L, D, D] W_V of the value projection, without its bias
    output_kernel: Any = None  # [L, D, D] W_O of the output projection, with the layer's scale
    middle: Any = None  # [L, N, D] of post-norm blocks: x', LN of the sum behind the attention layer
    after: Any = None  # [L, N, D] of post-norm blocks: x+, LN of the sum behind the FFN layer
    output_grad: Any = None  # [L, N, D] gradient of the score at the block's output tokens
    seen: Any = None  # [L, N] bool: which tokens are there, and not padding; None: all

    def through(self, x: Array) -> Array:
        """Tokens x [N, D] through the projections of values and of the output, without biases, of one block."""
        return x @ self.value_kernel @ self.output_kernel

    def by_heads(self, x: Array, linear: bool) -> "Change":
        """The change of tokens x [N, D] by each head of one block; `linear`: by the value projection of x itself."""
        value = self.value
        if linear:
            value = jnp.swapaxes((x @ self.value_kernel).reshape(len(x), len(self.attention), -1), 0, 1)
        return change_by_heads(x, value, self.output_kernel, self.seen)


def sample_axes(axis: int) -> Blocks:
    """`in_axes` of `jax.vmap` for Blocks whose samples are along `axis`."""
    return Blocks(**{name: None if name.endswith("_kernel") else axis for name in Blocks._fields})


@dataclasses.dataclass(frozen=True)
class TokenTM:
    """The choices of TokenTM; the defaults are the method, all components off is GAE.

    Args:
      length: whether `w` has the ratio of lengths.
      direction: "necc"; "softmax", which is NECC with sum 1 in place of mean 1; "cosine" (`cos` in place of NECC) or
        "none".
      initialise: whether `C0` has the lengths of the embedded tokens, in place of the identity.
      ffn: whether the FFN layers update the contributions.
      attention: "gradient" for `mean_h relu(G * A_h)`, which is class-specific; "means" for
        `mean_h relu(G) * mean_h A_h`, which is, too; or "plain" for `mean_h A_h`.
      heads: whether the attention layer's weights compare tokens with the "sum" over heads of what they become, or for
        "each" head alone: `mean_h relu(G * A_h) diag(w_h)`.
      original: what the attention layer's `x_j` is: the "residual" stream x or the "normalised" LN1(x).
      transformed: what the attention layer's `x~_j` is: the "value" projection of LN1(x), with bias, through the
        output projection; that of `x_j` itself, without bias ("linear"); or the "stream" after the layer.
      ffn_transformed: what the FFN layer's `x~_j` is: its "branch", or the "stream" after the layer.
      norms: whether the LayerNorms behind the sums of post-norm blocks scale the contributions.
      weights: a function of a layer's original and transformed tokens in place of `w`, or the name of one of
        `tokentm_jax.maths.weights`; `length` and `direction` are then not looked at.
      first_block: first block that is aggregated, from 0.
      end_block: one past the last block that is aggregated; None for all.
    """

    length: bool = True
    direction: Literal["necc", "softmax", "cosine", "none"] = "necc"
    initialise: bool = True
    ffn: bool = True
    attention: Literal["gradient", "means", "plain"] = "gradient"
    heads: Literal["sum", "each"] = "sum"
    original: Literal["residual", "normalised"] = "residual"
    transformed: Literal["value", "linear", "stream"] = "value"
    ffn_transformed: Literal["branch", "stream"] = "branch"
    norms: bool = True
    weights: Literal["entropy", "alignment", "distance_from_mean"] | Callable[..., Any] | None = None
    first_block: Annotated[int, Ge(0)] = 0
    end_block: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a choice that is none, so that no map is ever computed by a misspelt one."""
        for field in dataclasses.fields(self):
            choices, given = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and given not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {given!r}")
        if self.heads == "each" and self.transformed == "stream":
            raise ValueError("heads='each' needs what each head makes of a token, and transformed='stream' has none")
        if self.weights is not None and self.heads == "each":
            raise ValueError("weights are those of tokens as all heads make them: heads='each' has none")
        if isinstance(self.weights, str) and self.weights not in WEIGHT_NAMES:
            raise ValueError(f"weights must be a function or one of {', '.join(WEIGHT_NAMES)}, got {self.weights!r}")
        if self.end_block is not None and self.end_block <= self.first_block:
            raise ValueError(f"end_block must be past first_block ({self.first_block}), got {self.end_block}")

    @property
    def weighs(self) -> bool:
        """Whether tokens and what they become have weights at all."""
        return self.length or self.direction != "none" or self.weights is not None

    @property
    def weight(self) -> Callable[..., Any] | None:
        """The function that `weights` is, or names."""
        from tokentm_jax.maths.weights import WEIGHTS

        return WEIGHTS[self.weights] if isinstance(self.weights, str) else self.weights

    def takes(self, name: str) -> bool:
        """Whether the function of `weights` has an argument of that name."""
        return self.weight is not None and name in inspect.signature(self.weight).parameters

    def uses(self, post_norm: bool = False) -> set[str]:
        """The fields of `Blocks` that these choices read of pre-norm blocks, or of post-norm ones."""
        names = {"attention"} | (set() if self.attention == "plain" else {"attention_grad"})
        if self.weighs:
            names |= {"tokens" if self.original == "residual" else "normalised"}
            names |= {
                ("value", "sum"): {"transformed_value"},
                ("value", "each"): {"value", "output_kernel"},
                ("linear", "sum"): {"value_kernel", "output_kernel"},
                ("linear", "each"): {"value_kernel", "output_kernel"},
                ("stream", "sum"): {"tokens", "attention_branch"},
            }[self.transformed, self.heads]
        if self.takes("gradient"):
            names |= {"output_grad"}
        if self.weighs and self.ffn:
            names |= {"ffn_branch", *(("middle",) if post_norm else ("tokens", "attention_branch"))}
        if self.norms and post_norm:
            names |= {"tokens", "attention_branch", "middle", "ffn_branch", "after"}
        return names | ({"tokens"} if self.initialise else set())


WEIGHT_NAMES = ("entropy", "alignment", "distance_from_mean")

# What public re-implementations compute, as options of `TokenTM`.
READINGS: dict[str, dict[str, str]] = {
    "featuregradientgate": {"direction": "softmax", "heads": "each", "transformed": "linear"},
    "decompv": {
        "direction": "softmax",
        "attention": "means",
        "transformed": "stream",
        "ffn_transformed": "stream",
    },
}


def root(squared: Array) -> Array:
    """Square root; zero, with gradient zero, where `squared` is not positive."""
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def token_length(x: Array) -> Array:
    """Length `L(x) = ||x||_2` of each token [..., D] -> [...]; its gradient at a zero token is zero."""
    return root(jnp.square(x).sum(-1))


def ratio(a: Array, b: Array) -> Array:
    """`a / b`, zero where b is zero."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


class Change(NamedTuple):
    """Tokens x and what they become x~, as far as the weights look at them. Each [..., N]."""

    before: Array  # L(x)
    after: Array  # L(x~)
    product: Array  # x . x~
    seen: Any = None  # [N] bool: which tokens are there; None: all


def change(original: Array, transformed: Array, seen: Array | None = None) -> Change:
    """The change of paired tokens [N, D] -> [N]."""
    return Change(token_length(original), token_length(transformed), (original * transformed).sum(-1), seen)


def change_by_heads(original: Array, value: Array, output_kernel: Array, seen: Array | None = None) -> Change:
    """The change of tokens [N, D] by each head, `x~_h = v_h W_h` -> [H, N], with no array [H, N, D].

    For values v [H, N, D/H] and the rows W_h [D/H, D] of the output projection [D, D]: `||v W||^2 = v (W W^T) v^T` and
    `x . v W = v . (W x)`.
    """
    kernel = output_kernel.reshape(*value.shape[::2], -1)
    gram = jnp.einsum("hid,hjd->hij", kernel, kernel)
    squared = (jnp.einsum("hni,hij->hnj", value, gram) * value).sum(-1)
    product = (jnp.einsum("nd,hid->hni", original, kernel) * value).sum(-1)
    return Change(jnp.broadcast_to(token_length(original), squared.shape), root(squared), product, seen)


def cosine(tokens: Change) -> Array:
    """`cos(x_j, x~_j)` [..., N]; zero where either has no length."""
    return ratio(ratio(tokens.product, tokens.before), tokens.after)


def necc(tokens: Change) -> Array:
    """Normalised exponential cosine correlation [..., N], with mean 1 over the tokens that are there."""
    correlation = jnp.exp(cosine(tokens))
    if tokens.seen is None:
        return correlation / correlation.mean(-1, keepdims=True)
    there = jnp.broadcast_to(tokens.seen, correlation.shape)
    return correlation / correlation.mean(-1, keepdims=True, where=there)


DIRECTIONS: dict[str, Callable[[Change], Array]] = {
    "necc": necc,
    "softmax": lambda tokens: jax.nn.softmax(cosine(tokens), where=tokens.seen),
    "cosine": cosine,
    "none": lambda tokens: jnp.ones_like(tokens.before),
}


def transformation_weights(tokens: Change, options: TokenTM) -> Array:
    """`w_j = L(x~_j) / L(x_j) * NECC_j` [..., N]."""
    lengths = ratio(tokens.after, tokens.before) if options.length else jnp.ones_like(tokens.before)
    return lengths * DIRECTIONS[options.direction](tokens)


def weigh(original: Array, transformed: Array, block: Blocks, options: TokenTM) -> Array:
    """The weights [N] of paired tokens [N, D], by what the options say."""
    if options.weight is None:
        return transformation_weights(change(original, transformed, block.seen), options)
    more = {"gradient": block.output_grad, "seen": block.seen}
    return options.weight(original, transformed, **{name: a for name, a in more.items() if options.takes(name)})


def attention_weights(block: Any, options: TokenTM) -> Array:
    """Diagonal of W_attn, [N], or [H, N] for each head, from what one block did (`Blocks`)."""
    x = block.tokens if options.original == "residual" else block.normalised
    match options.transformed, options.heads:
        case "value", "sum":
            return weigh(x, block.transformed_value, block, options)
        case "linear", "sum":
            return weigh(x, block.through(x), block, options)
        case "stream", _:
            return weigh(x, block.tokens + block.attention_branch, block, options)
        case _:
            return transformation_weights(block.by_heads(x, options.transformed == "linear"), options)


def ffn_weights(tokens: Array, block: Blocks, options: TokenTM) -> Array:
    """Diagonal [N] of W_ffn from a layer's input [N, D] and what the layer did; zeros without `ffn`."""
    if not options.ffn:
        return jnp.zeros_like(tokens[..., 0])
    transformed = block.ffn_branch if options.ffn_transformed == "branch" else tokens + block.ffn_branch
    return weigh(tokens, transformed, block, options)


def norm_gain(before: Array, after: Array) -> Array:
    """`L(LN(u)) / L(u)` [N] of the tokens u [N, D] before and after a LayerNorm."""
    return ratio(token_length(after), token_length(before))


class Weights(NamedTuple):
    """The diagonals of one block's updates: W_attn, [N] or [H, N], and W_ffn, [N]; of post-norm blocks, what the norm
    behind each of the layers does, [N]."""

    attention: Array
    ffn: Array
    attention_norm: Any = None
    ffn_norm: Any = None


def block_weights(block: Blocks, options: TokenTM) -> Weights:
    """Transformation weights of one block (arrays of `block` without the L axis). They need no gradient."""
    ones = jnp.ones(block.attention.shape[-1:], block.attention.dtype)
    norms = ()
    if options.norms and block.after is not None:
        norms = (
            norm_gain(block.tokens + block.attention_branch, block.middle),
            norm_gain(block.middle + block.ffn_branch, block.after),
        )
    if not options.weighs:
        return Weights(ones, ones if options.ffn else jnp.zeros_like(ones), *norms)
    ffn = jnp.zeros_like(ones)
    if options.ffn:
        middle = block.tokens + block.attention_branch if block.middle is None else block.middle
        ffn = ffn_weights(middle, block, options)
    return Weights(attention_weights(block, options), ffn, *norms)


def rectified_mean(weighted: Array, weights: Array | None = None) -> Array:
    """`mean_h relu(.) W_h` [H, N, N] -> [N, N], of gradient times attention `G * A` or of attention alone; the
    diagonals w, 1 for None, are [N] for all heads or [H, N]."""
    rectified = jax.nn.relu(weighted)
    return (rectified if weights is None else rectified * weights[..., None, :]).mean(0)


def transformed_attention(attention: Array, gradient: Array | None, weights: Array, options: TokenTM) -> Array:
    """`A W` [N, N] of an attention layer, from attention [H, N, N], its gradient, and the weights [N] or [H, N]."""
    if options.attention == "plain":
        return rectified_mean(attention, weights)
    assert gradient is not None
    if options.attention == "means":
        return rectified_mean(gradient) * rectified_mean(attention, weights)
    return rectified_mean(gradient * attention, weights)


def attention_update(rows: Array, attention: Array) -> Array:
    """Rows [..., N] of `C` through `(I + A)` for A [N, N]: `r + r A`."""
    return rows + rows @ attention


def ffn_update(rows: Array, weights: Array) -> Array:
    """Rows [..., N] of `C` through `(I + W)` for w [N]: `r * (1 + w)`."""
    return rows * (1 + weights)


def block_update(rows: Array, attention: Array, weights: Weights) -> Array:
    """Rows [..., N] from the output of one block to its input, for its `A W_attn` [N, N] and its weights."""
    if weights.ffn_norm is not None:
        rows = rows * weights.ffn_norm
    rows = ffn_update(rows, weights.ffn)
    if weights.attention_norm is not None:
        rows = rows * weights.attention_norm
    return attention_update(rows, attention)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_layer(options: TokenTM, attention: Array, u: Array, weights: Array) -> tuple[Array, Array]:
    """Attention [H, N, N] and the stream u [N] through an attention layer: both unchanged.

    Backward, the cotangent of the attention is its gradient G, and that of u is a row r, which becomes `r + r A W`
    with `A W = mean_h relu(G * A_h) W_h`. The weights get none, for u is zero.
    """
    return attention, u


def _attention_layer_backward(
    options: TokenTM, saved: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    (attention, weights), (gradient, row) = saved, cotangents
    known = attention.astype(row.dtype), gradient.astype(row.dtype)
    return gradient, attention_update(row, transformed_attention(*known, weights, options)), None


attention_layer.defvjp(
    lambda options, attention, u, weights: ((attention, u), (attention, weights)), _attention_layer_backward
)


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
        weights = block_weights(block, options)
        attention = transformed_attention(block.attention, block.attention_grad, weights.attention, options)
        return block_update(rows, attention, weights)

    rows = propagate(update, blocks, rows, options.first_block, options.end_block)
    return initial_contributions(rows, embedded, options)


def initial_contributions(rows: Array, embedded: Array | None, options: TokenTM) -> Array:
    """Rows [..., N] times C0, for the embedded tokens x0 [N, D]: what each token brings into the first block."""
    if not options.initialise:
        return rows
    assert embedded is not None
    return rows * token_length(embedded)
