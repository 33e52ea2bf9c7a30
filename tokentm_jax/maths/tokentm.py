"""TokenTM: Token Transformation Matters (Wu et al., CVPR 2024, arXiv 2403.14552), equation by equation.

Every function takes the arrays of one sample; `jax.vmap` makes a batch. L blocks, H heads, N tokens, D width. A layer
turns the original token x_j into the transformed token x̃_j. C_ij is the contribution of input token j to token i:

    C⁰ = diag(L(x⁰_1) … L(x⁰_N)),    C ← (I + Ā W_attn) C    (attention),    C ← (I + W_ffn) C    (FFN)

The heatmap is one row of C: r₀ᵀ C, where the distribution r₀ over tokens is how the head reads them. Every update
multiplies C from the left. So the row goes from the last block to the first, with no product of two [N, N] maps.

These are the defaults of the method. `variants` calls them for the other choices, and inside the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PyTree, Shaped

from tokentm_jax.maths.primitives import mean_of_heads, ratio, root


def length(x: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """`L(x) = ‖x‖₂` of tokens x; the gradient at a zero token is zero."""
    return root(jnp.square(x).sum(-1))


def cosine(x: Float[Array, "*n D"], x_tilde: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """`cos(x_j, x̃_j)` of original tokens x and transformed tokens x̃; zero where a token is zero."""
    return ratio(ratio((x * x_tilde).sum(-1), length(x)), length(x_tilde))


def necc(cos: Float[Array, "*b N"], present: Bool[Array, " N"] | None = None) -> Float[Array, "*b N"]:
    """Normalised exponential cosine correlation: `NECC_j = exp(cos_j) / ((1/N) Σ_k exp(cos_k))`.

    Args:
      cos: `cos(x_j, x̃_j)`.
      present: which tokens are not padding; None for all. The mean is over these.

    Returns:
      NECC, with mean 1 over the tokens.
    """
    correlation = jnp.exp(cos)
    where = None if present is None else jnp.broadcast_to(present, cos.shape)
    return correlation / correlation.mean(-1, keepdims=True, where=where)


def transformation_weight(
    x: Float[Array, "*b N D"],
    x_tilde: Float[Array, "*b N D"],
    present: Bool[Array, " N"] | None = None,
    length: Callable[[Array], Array] = length,
    direction: Callable[[Array, Array | None], Array] = necc,
) -> Float[Array, "*b N"]:
    """`w_j = L(x̃_j) / L(x_j) · NECC_j`, the diagonal of W.

    Args:
      x: original tokens.
      x_tilde: transformed tokens.
      present: which tokens are not padding; None for all.
      length: L.
      direction: the second factor, a function of `cos(x_j, x̃_j)` and `present`.

    Returns:
      Weights.
    """
    return ratio(length(x_tilde), length(x)) * direction(cosine(x, x_tilde), present)


def attention_map(A: Float[Array, "H Q N"], G: Float[Array, "H Q N"]) -> Float[Array, "Q N"]:
    """`Ā = ⟨[G ⊙ A]₊⟩_h` of attention A, rows are queries, and the gradient G of the class's logit at A."""
    return mean_of_heads(jax.nn.relu(G * A))


def attention_part(
    r: Float[Array, "*b Q"], A_bar: Float[Array, "Q N"], w: Float[Array, " N"] | float = 1.0
) -> Float[Array, "*b N"]:
    """`(r Ā) ⊙ w`: what rows r of some queries give the keys, with the weights w of the attention layer."""
    return (r @ A_bar) * w


def attention_update(
    r: Float[Array, "*b N"], A_bar: Float[Array, "N N"], w: Float[Array, " N"] | float = 1.0
) -> Float[Array, "*b N"]:
    """`C ← (I + Ā W) C`: rows r become `r + (r Ā) ⊙ w`."""
    return r + attention_part(r, A_bar, w)


def ffn_update(r: Float[Array, "*b N"], w: Float[Array, " N"]) -> Float[Array, "*b N"]:
    """`C ← (I + W) C`: rows r become `r ⊙ (1 + w)`, with the weights w of the FFN layer."""
    return r * (1 + w)


def initial_contribution(r: Float[Array, "*b N"], x0: Float[Array, "N D"]) -> Float[Array, "*b N"]:
    """`C⁰ = diag(L(x⁰))`: rows r become `r ⊙ L(x⁰)`, with the embedded tokens x⁰."""
    return r * length(x0)


def block_update(
    r: Float[Array, "*b N"], block: tuple[Float[Array, "N N"], Float[Array, " N"], Float[Array, " N"]]
) -> Float[Array, "*b N"]:
    """`C ← (I + W_ffn) (I + Ā W_attn) C` for rows, which go from the output of a block to its input.

    Args:
      r: rows.
      block: Ā, w_attn and w_ffn.

    Returns:
      Rows.
    """
    A_bar, w_attn, w_ffn = block
    return attention_update(ffn_update(r, w_ffn), A_bar, w_attn)


def aggregate(
    r: Float[Array, "*b N"],
    blocks: PyTree[Shaped[Array, "L ..."]],
    update: Callable[[Array, Any], Array] = block_update,
    first_block: int = 0,
    end_block: int | None = None,
) -> Float[Array, "*b N"]:
    """All blocks, from the last to the first. `initial_contribution` follows.

    Args:
      r: rows: the read-out r₀ [N] for a heatmap, the identity [N, N] for the whole map C.
      blocks: Ā [L, N, N], w_attn [L, N] and w_ffn [L, N], or what `update` takes.
      update: the rule of one block, `(r, block) -> r`.
      first_block, end_block: the range of blocks, counted from 0; all by default.

    Returns:
      Rows at the input of the first block.
    """
    chosen = jax.tree.map(lambda a: a[first_block:end_block], blocks)
    return jax.lax.scan(lambda r, block: (update(r, block), None), r, chosen, reverse=True)[0]
