"""TokenTM's other choices: ablations, readings of public codes, weights per head, post-norm blocks, and the form that
runs inside the backward pass. All of them are other arguments for the functions of `tokentm`.

Post-norm blocks (BERT) put a LayerNorm behind each sum u: `C <- diag(L(LN(u)) / L(u)) C`, a diagonal update as that of
an FFN layer.

A row goes from the last block to the first, which is also the order of the backward pass, where the gradient G of the
logit at the attention comes from. So a stream u [N] of zeros passes through the blocks next to the tokens, by
`attention_layer` and `ffn_layer`. It changes nothing and stays zero. Its cotangent enters the backward pass as the
read-out and leaves it as the heatmap's row. So no attention and no gradient of it is held for two blocks at once.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jax import Array
from jaxtyping import Bool, Float

from tokentm_jax.maths import tokentm
from tokentm_jax.maths.primitives import AnyArray, mean_of_heads, ratio, root
from tokentm_jax.maths.weights import WEIGHTS


class Blocks(NamedTuple):
    """What one sample's blocks did. Each array has a leading L axis where all blocks are meant; None is not known.

    The two kernels are parameters, the same for all samples. Head h has the columns of W_V, and the rows of W_O, from
    h D/H on.
    """

    attention: AnyArray | None  # [L, H, N, N] after softmax
    attention_grad: AnyArray | None  # [L, H, N, N] gradient of the logit at the attention
    tokens: AnyArray | None  # [L, N, D] input tokens x
    normalised: AnyArray | None  # [L, N, D] LN1(x)
    transformed_value: AnyArray | None  # [L, N, D] x~ of the attention layer: value and output projection, no mixing
    attention_branch: AnyArray | None  # [L, N, D] output of the attention layer before the residual sum
    ffn_branch: AnyArray | None  # [L, N, D] x~ of the FFN layer: its output before the residual sum
    value: AnyArray | None = None  # [L, H, N, D/H] value projection of LN1(x)
    value_kernel: AnyArray | None = None  # [L, D, D] W_V of the value projection, without its bias
    output_kernel: AnyArray | None = None  # [L, D, D] W_O of the output projection, with the layer's scale
    middle: AnyArray | None = None  # [L, N, D] of post-norm blocks: x', LN of the sum behind the attention layer
    after: AnyArray | None = None  # [L, N, D] of post-norm blocks: x+, LN of the sum behind the FFN layer
    output_grad: AnyArray | None = None  # [L, N, D] gradient of the score at the block's output tokens
    seen: AnyArray | None = None  # [L, N] bool: which tokens are there, and not padding; None: all

    def through(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Tokens x through the projections of values and of the output, without biases, of one block."""
        block: Any = self
        return x @ block.value_kernel @ block.output_kernel

    def project(self, x: Float[Array, "N D"]) -> Float[Array, "H N E"]:
        """Values of tokens x, without bias, of one block; E is D / H."""
        block: Any = self
        return jnp.swapaxes((x @ block.value_kernel).reshape(len(x), len(block.attention), -1), 0, 1)

    def ffn_layers(self) -> list[tuple[AnyArray | None, AnyArray | None]]:
        """Input x' and output [N, D] of the FFN layer of one block; None where they are not known."""
        block: Any = self
        if block.ffn_branch is None:
            return [(None, None)]
        return [(block.tokens + block.attention_branch if block.middle is None else block.middle, block.ffn_branch)]

    def norms(self) -> list[tuple[Array, Array]]:
        """Input and output [N, D] of the norms behind the sums of one block."""
        block: Any = self
        if block.after is None:
            return []
        return [(block.tokens + block.attention_branch, block.middle), (block.middle + block.ffn_branch, block.after)]


def sample_axes(axis: int) -> Blocks:
    """`in_axes` of `jax.vmap` for Blocks whose samples are along `axis`."""
    axes: Any = {name: None if name.endswith("_kernel") else axis for name in Blocks._fields}
    return Blocks(**axes)


@dataclasses.dataclass(frozen=True)
class TokenTM:
    """The choices of TokenTM; the defaults are the method, all components off is GAE.

    Args:
      length: whether `w` has the ratio of lengths.
      direction: "necc"; "softmax", which is NECC with sum 1 instead of mean 1; "cosine" (`cos` instead of NECC) or
        "none".
      initialise: whether `C0` has the lengths of the embedded tokens, instead of the identity.
      ffn: whether the FFN layers update the contributions.
      attention: "gradient" for `mean_h relu(G * A_h)`, which is class-specific; "means" for
        `mean_h relu(G) * mean_h A_h`, which is, too; or "plain" for `mean_h A_h`.
      heads: whether the attention layer's weights compare tokens with the "sum" over heads of what they become, or for
        "each" single head: `mean_h relu(G * A_h) diag(w_h)`.
      original: what the attention layer's `x_j` is: the "residual" stream x or the "normalised" LN1(x).
      transformed: what the attention layer's `x~_j` is: the "value" projection of LN1(x), with bias, through the
        output projection; that of `x_j` itself, without bias ("linear"); or the "stream" after the layer.
      ffn_transformed: what the FFN layer's `x~_j` is: its "branch", or the "stream" after the layer.
      norms: whether the LayerNorms behind the sums of post-norm blocks scale the contributions.
      weights: a function of a layer's original and transformed tokens instead of `w`, or the name of one of
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
    weights: Literal["entropy", "alignment", "distance_from_mean"] | Callable[..., Array] | None = None
    first_block: Annotated[int, Ge(0)] = 0
    end_block: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown choice, so that no map is computed with a misspelt one."""
        for field in dataclasses.fields(self):
            choices, given = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and given not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {given!r}")
        if self.heads == "each" and self.transformed == "stream":
            raise ValueError("heads='each' needs what each head makes of a token, and transformed='stream' has none")
        if self.weights is not None and self.heads == "each":
            raise ValueError("weights are those of tokens as all heads make them: heads='each' has none")
        if isinstance(self.weights, str) and self.weights not in WEIGHTS:
            raise ValueError(f"weights must be a function or one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.end_block is not None and self.end_block <= self.first_block:
            raise ValueError(f"end_block must be past first_block ({self.first_block}), got {self.end_block}")

    @property
    def weighs(self) -> bool:
        """Whether tokens and what they become have weights at all."""
        return self.length or self.direction != "none" or self.weights is not None

    @property
    def weight(self) -> Callable[..., Array] | None:
        """The function that `weights` is, or names."""
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
                "value": {"value", "output_kernel"} if self.heads == "each" else {"transformed_value"},
                "linear": {"value_kernel", "output_kernel"},
                "stream": {"tokens", "attention_branch"},
            }[self.transformed]
        if self.takes("gradient"):
            names |= {"output_grad"}
        if self.weighs and self.ffn:
            names |= {"ffn_branch", *(("middle",) if post_norm else ("tokens", "attention_branch"))}
        if self.norms and post_norm:
            names |= {"tokens", "attention_branch", "middle", "ffn_branch", "after"}
        return names | ({"tokens"} if self.initialise else set())


# What public re-implementations compute, as options of `TokenTM`.
READINGS: dict[str, dict[str, str]] = {
    "featuregradientgate": {"direction": "softmax", "heads": "each", "transformed": "linear"},
    "decompv": {"direction": "softmax", "attention": "means", "transformed": "stream", "ffn_transformed": "stream"},
}

DIRECTIONS: dict[str, Callable[[Array, Array | None], Array]] = {
    "necc": tokentm.necc,
    "softmax": lambda cos, present: jax.nn.softmax(cos, where=present),
    "cosine": lambda cos, present: cos,
    "none": lambda cos, present: jnp.ones_like(cos),
}


def weigh(x: Float[Array, "N D"], x_tilde: Float[Array, "N D"], block: Any, options: TokenTM) -> Float[Array, " N"]:
    """The weights w of original tokens x and transformed tokens x~; `block` is one of `Blocks`, or has its fields."""
    if options.weight is not None:
        more = {"gradient": block.output_grad, "seen": block.seen}
        return options.weight(x, x_tilde, **{name: a for name, a in more.items() if options.takes(name)})
    measure = tokentm.length if options.length else lambda x: jnp.ones_like(x[..., 0])
    return tokentm.transformation_weight(x, x_tilde, block.seen, measure, DIRECTIONS[options.direction])


def weights_of_heads(
    x: Float[Array, "N D"],
    value: Float[Array, "H N E"],
    kernel: Float[Array, "D D"],
    present: Bool[Array, " N"] | None,
    options: TokenTM,
) -> Float[Array, "H N"]:
    """The weights w_h of tokens by each head, `x~_h = v_h W_h`, with no array [H, N, D].

    With W_h [E, D] of the output projection, E = D / H: `||v W||^2 = v (W W^T) v^T` and `x . v W = v . (W x)`.
    """
    kernel = kernel.reshape(*value.shape[::2], -1)
    gram = jnp.einsum("hid,hjd->hij", kernel, kernel)
    transformed = root((jnp.einsum("hni,hij->hnj", value, gram) * value).sum(-1))
    product = (jnp.einsum("nd,hid->hni", x, kernel) * value).sum(-1)
    weights = DIRECTIONS[options.direction](ratio(ratio(product, tokentm.length(x)), transformed), present)
    return ratio(transformed, tokentm.length(x)) * weights if options.length else weights


def attention_weights(block: Any, options: TokenTM) -> Float[Array, "*H N"]:
    """The diagonal of W_attn of one block: [N], or [H, N] with `heads="each"`."""
    if not options.weighs:
        return jnp.ones_like(block.attention[0, 0])
    x = block.tokens if options.original == "residual" else block.normalised
    if options.heads == "each":
        value = block.project(x) if options.transformed == "linear" else block.value
        return weights_of_heads(x, value, block.output_kernel, block.seen, options)
    match options.transformed:
        case "value":
            x_tilde = block.transformed_value
        case "linear":
            x_tilde = block.through(x)
        case "stream":
            x_tilde = block.tokens + block.attention_branch
    return weigh(x, x_tilde, block, options)


def ffn_weights(
    x: Float[Array, "N D"] | None, branch: Float[Array, "N D"] | None, block: Any, options: TokenTM
) -> Float[Array, " N"]:
    """The diagonal of W_ffn of one FFN layer with input x and output `branch`, before the residual sum."""
    if not options.weighs:
        return jnp.ones_like(block.attention[0, 0])
    assert x is not None and branch is not None
    return weigh(x, branch if options.ffn_transformed == "branch" else x + branch, block, options)


def norm_gain(before: Float[Array, "N D"], after: Float[Array, "N D"]) -> Float[Array, " N"]:
    """`L(LN(u)) / L(u)`, by which a LayerNorm multiplies the contributions."""
    return ratio(tokentm.length(after), tokentm.length(before))


def attention_terms(
    A: Float[Array, "H Q N"], G: Float[Array, "H Q N"] | None, w: Float[Array, "*H N"], options: TokenTM
) -> tuple[Float[Array, "Q N"], Float[Array, " N"]]:
    """`Ā` and w of an attention layer, for `tokentm.attention_part`.

    Weights per head go into `Ā`: `Ā = mean_h relu(G * A_h) diag(w_h)`.
    """
    heads = A
    if options.attention != "plain":
        assert G is not None
        if options.attention == "gradient" and w.ndim == 1:
            return tokentm.attention_map(A, G), w
        heads = mean_of_heads(jax.nn.relu(G)) * A if options.attention == "means" else jax.nn.relu(G * A)
    if w.ndim == 2:
        heads, w = heads * w[:, None, :], jnp.ones_like(w[0])
    return mean_of_heads(heads), w


def block_terms(block: Any, options: TokenTM) -> tuple[Float[Array, "N N"], Float[Array, " N"], Float[Array, " N"]]:
    """Ā, w_attn and w_ffn of one block, for `tokentm.block_update`, whatever the options.

    `1 + w_ffn` is the product of all diagonal factors behind the attention, those of norms among them.
    """
    A_bar, w_attn = attention_terms(block.attention, block.attention_grad, attention_weights(block, options), options)
    factor = jnp.ones_like(w_attn)
    for x, branch in block.ffn_layers() if options.ffn else []:
        factor *= 1 + ffn_weights(x, branch, block, options)
    for before, after in block.norms() if options.norms else []:
        factor *= norm_gain(before, after)
    return A_bar, w_attn, factor - 1


def contributions(
    blocks: Blocks, embedded: Float[Array, "N D"] | None, rows: Float[Array, "*b N"], options: TokenTM = TokenTM()
) -> Float[Array, "*b N"]:
    """Contribution of every input token to the outputs that `rows` read.

    With `rows` the read-out of the head this is the heatmap's row; with the identity it is the full map C [N, N].

    Args:
      blocks: arrays with a leading L axis; those that `options.uses()` names.
      embedded: tokens x0 that enter the first block; needed where `options.initialise`.
      rows: distributions over output tokens.
      options: see `TokenTM`.

    Returns:
      Contributions, column j for input token j.

    Raises:
      AssertionError: rows of another number of tokens.
    """
    assert blocks.attention is not None
    if rows.shape[-1] != (tokens := blocks.attention.shape[-1]):
        raise AssertionError(f"rows must be distributions over {tokens} tokens, got {list(rows.shape)}")
    update = lambda rows, block: tokentm.block_update(rows, block_terms(block, options))  # noqa: E731
    rows = tokentm.aggregate(rows, blocks, update, options.first_block, options.end_block)
    return initialised(rows, embedded, options)


def initialised(
    rows: Float[Array, "*b N"], embedded: Float[Array, "N D"] | None, options: TokenTM
) -> Float[Array, "*b N"]:
    """Rows at the input of the first block times C0, where `options.initialise`: what each token brings into it."""
    if not options.initialise:
        return rows
    assert embedded is not None
    return tokentm.initial_contribution(rows, embedded)


@jax.custom_vjp
def attention_stream(u: Float[Array, " N"], A_bar: Float[Array, "Q N"], w: Float[Array, " N"]) -> Float[Array, " Q"]:
    """Zeros that are added to the stream u of some queries. Backward, their cotangent r is `(r Ā) ⊙ w` for u."""
    return jnp.zeros(len(A_bar), u.dtype)


attention_stream.defvjp(
    lambda u, A_bar, w: (jnp.zeros(len(A_bar), u.dtype), (A_bar, w)),
    lambda terms, row: (tokentm.attention_part(row, *terms), None, None),
)


def attention_layer(
    options: TokenTM, attention: Float[Array, "H Q N"], u: Float[Array, " N"], weights: Float[Array, "*H N"]
) -> tuple[Float[Array, "H Q N"], Float[Array, " Q"]]:
    """The attention of all queries or of some, unchanged, and zeros that are added to the stream u of these queries.

    Backward, the cotangent of the attention is its gradient G, and that of the zeros is a row r of these queries. That
    of u becomes `(r Ā) ⊙ w`. The weights get none, because u is zero. If `Ā` does not depend on G, only u has a
    derivative, so the backward pass has no more than the row.
    """
    if options.attention == "plain":
        return attention, attention_stream(u, *attention_terms(attention.astype(u.dtype), None, weights, options))
    return _attention_layer(options, attention, u, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention_layer(options: TokenTM, attention: Array, u: Array, weights: Array) -> tuple[Array, Array]:
    return _attention_layer_forward(options, attention, u, weights)[0]


def _attention_layer_forward(options: TokenTM, attention: Array, u: Array, weights: Array) -> tuple[Any, ...]:
    return (attention, jnp.zeros(attention.shape[1], u.dtype)), (attention, weights)


def _attention_layer_backward(
    options: TokenTM, saved: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    (attention, weights), (gradient, row) = saved, cotangents
    terms = attention_terms(attention.astype(row.dtype), gradient.astype(row.dtype), weights, options)
    return gradient, tokentm.attention_part(row, *terms), None


_attention_layer.defvjp(_attention_layer_forward, _attention_layer_backward)


@jax.custom_vjp
def ffn_layer(u: Float[Array, " N"], weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """The stream u of zeros through an FFN layer. Backward, its cotangent, a row r, becomes `r * (1 + w)`."""
    return u


ffn_layer.defvjp(lambda u, weights: (u, weights), lambda weights, row: (tokentm.ffn_update(row, weights), None))
