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

from tokentm_jax.maths.primitives import ratio, root


def length(x: Array) -> Array:
    """`L(x) = ‖x‖₂` of tokens x [..., D] -> [...]; the gradient at a zero token is zero."""
    return root(jnp.square(x).sum(-1))


def cosine(x: Array, x_tilde: Array) -> Array:
    """`cos(x_j, x̃_j)` of paired tokens [..., N, D] -> [..., N]; zero where a token is zero."""
    return ratio(ratio((x * x_tilde).sum(-1), length(x)), length(x_tilde))


def necc(cos: Array, present: Array | None = None) -> Array:
    """Normalised exponential cosine correlation: `NECC_j = exp(cos_j) / ((1/N) Σ_k exp(cos_k))`.

    Args:
      cos: `cos(x_j, x̃_j)` [..., N].
      present: which tokens are not padding, bool [N]; None for all. The mean is over these.

    Returns:
      NECC [..., N], with mean 1 over the tokens.
    """
    correlation = jnp.exp(cos)
    where = None if present is None else jnp.broadcast_to(present, cos.shape)
    return correlation / correlation.mean(-1, keepdims=True, where=where)


def transformation_weight(
    x: Array,
    x_tilde: Array,
    present: Array | None = None,
    length: Callable[[Array], Array] = length,
    direction: Callable[[Array, Array | None], Array] = necc,
) -> Array:
    """`w_j = L(x̃_j) / L(x_j) · NECC_j`, the diagonal of W.

    Args:
      x: original tokens [..., N, D].
      x_tilde: transformed tokens [..., N, D].
      present: which tokens are not padding, bool [N]; None for all.
      length: L.
      direction: the second factor, a function of `cos(x_j, x̃_j)` and `present`.

    Returns:
      Weights [..., N].
    """
    return ratio(length(x_tilde), length(x)) * direction(cosine(x, x_tilde), present)


def attention_map(A: Array, G: Array) -> Array:
    """`Ā = ⟨[G ⊙ A]₊⟩_h`: attention A and its gradient G, both [H, N, N] -> [N, N]."""
    return jax.nn.relu(G * A).mean(0)


def attention_update(r: Array, A_bar: Array, w: Array | float = 1.0) -> Array:
    """`C ← (I + Ā W) C` for rows: `r ← r + (r Ā) ⊙ w`, with r [..., N], Ā [N, N] and w [N] -> [..., N]."""
    return r + (r @ A_bar) * w


def ffn_update(r: Array, w: Array) -> Array:
    """`C ← (I + W) C` for rows: `r ← r ⊙ (1 + w)`, with r [..., N] and w [N] -> [..., N]."""
    return r * (1 + w)


def initial_contribution(r: Array, x0: Array) -> Array:
    """`C⁰ = diag(L(x⁰))` for rows: `r ⊙ L(x⁰)`, with r [..., N] and embedded tokens x⁰ [N, D] -> [..., N]."""
    return r * length(x0)


def block_update(r: Array, block: tuple[Array, Array, Array]) -> Array:
    """Rows [..., N] from the output of a block to its input: `C ← (I + W_ffn) (I + Ā W_attn) C`.

    Args:
      r: rows [..., N].
      block: Ā [N, N], w_attn [N] and w_ffn [N].

    Returns:
      Rows [..., N].
    """
    A_bar, w_attn, w_ffn = block
    return attention_update(ffn_update(r, w_ffn), A_bar, w_attn)


def aggregate(
    r: Array,
    blocks: Any,
    update: Callable[[Array, Any], Array] = block_update,
    first_block: int = 0,
    end_block: int | None = None,
) -> Array:
    """All blocks, from the last to the first. `initial_contribution` follows.

    Args:
      r: rows [..., N]: the read-out r₀ [N] for a heatmap, the identity [N, N] for the whole map C.
      blocks: arrays with a leading axis L: Ā [L, N, N], w_attn [L, N] and w_ffn [L, N], or what `update` takes.
      update: the rule of one block, `(r, block) -> r`.
      first_block, end_block: the range of blocks, counted from 0; all by default.

    Returns:
      Rows [..., N] at the input of the first block.
    """
    chosen = jax.tree.map(lambda a: a[first_block:end_block], blocks)
    return jax.lax.scan(lambda r, block: (update(r, block), None), r, chosen, reverse=True)[0]
