"""Methods that carry relevance through the model by other backward rules (`tokentm_jax.relevance`).

Each function is `(module, params, inputs, target, **options) -> (maps, details)`. `details["relevance"]` [B, L+1] is
the relevance that enters every block and, last, leaves the last one: what a conserving rule keeps constant.

The README says what LRP's patent means for commercial use.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
from jax import Array

from tokentm_jax.attention_methods import Explanation, check_blocks, from_trace
from tokentm_jax.errors import InputError
from tokentm_jax.maps import token_map
from tokentm_jax.primitives import Primitives, wide
from tokentm_jax.relevance import QUOTIENTS, attn_lrp, conservative, lrp
from tokentm_jax.tokentm import Blocks, attention_update, mean_attention, propagate
from tokentm_jax.trace import Trace, capture


def _rules(variant: Literal["ours", "lrp"], stabiliser: str) -> Primitives:
    if stabiliser not in QUOTIENTS:
        raise InputError(f"option 'stabiliser' must be {' or '.join(QUOTIENTS)}, got {stabiliser!r}")
    return lrp(variant, stabiliser)  # pyright: ignore[reportArgumentType]


def _ruled(module: nn.Module, rules: Primitives) -> nn.Module:
    """The same model with other backward rules."""
    if not hasattr(module, "primitives"):
        raise InputError("this method needs a module with the field 'primitives', as tm.ViT has, to carry relevance")
    return module.clone(primitives=rules)


def _details(trace: Trace, token_relevance: Array) -> dict[str, Array]:
    return {**trace.details(), "relevance": token_relevance.sum((2, 3)).T}


def full_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, stabiliser: str = "signed"
) -> Explanation:
    """Layer-wise relevance propagation down to the pixels, summed over channels: signed maps [B, H, W]."""
    ruled = _ruled(module, _rules("lrp", stabiliser))
    trace = capture(ruled, params, inputs, target)
    return trace.input_grads.sum(-1), _details(trace, trace.token_grads)


def partial_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, stabiliser: str = "signed"
) -> Explanation:
    """Positive relevance of the last block's attention (Voita et al., ACL 2019), mean over heads."""
    trace = capture(_ruled(module, _rules("lrp", stabiliser)), params, inputs, target)
    maps, _ = from_trace(module, trace, lambda blocks, row: row @ jax.nn.relu(blocks.attention_grad[-1]).mean(0))
    return maps, _details(trace, trace.token_grads)


def transformer_attribution(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Array | None,
    *,
    first_block: int = 0,
    stabiliser: str = "signed",
) -> Explanation:
    """Transformer Attribution (Chefer et al., CVPR 2021): the product of `I + mean_h relu(G * R_A)` over blocks."""
    trace = capture(module, params, inputs, target)
    check_blocks(len(trace.attention), first_block)
    ruled = capture(_ruled(module, _rules("ours", stabiliser)), params, inputs, trace.target)
    mixed = trace._replace(attention=ruled.attention_grad)

    def update(row: Array, block: Blocks) -> Array:
        return attention_update(row, mean_attention(block.attention * block.attention_grad))

    maps, _ = from_trace(module, mixed, lambda blocks, row: propagate(update, blocks, row, first_block))
    return maps, _details(trace, ruled.token_grads)


def _token_times_gradient(
    module: nn.Module, rules: Primitives, params: Any, inputs: Array, target: Array | None, pixels: bool
) -> Explanation:
    ruled = _ruled(module, rules)
    trace = capture(ruled, params, inputs, target)
    relevance = wide(trace.tokens) * wide(trace.token_grads)
    at_pixels = (wide(inputs) * wide(trace.input_grads)).sum(-1)
    maps = at_pixels if pixels else token_map(module, relevance[0].sum(-1))
    return maps, _details(trace, relevance)


def conservative_lrp(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Array | None,
    *,
    activation: Literal["identity", "gradient"] = "identity",
    pixels: bool = False,
) -> Explanation:
    """Conservative LRP (Ali et al., ICML 2022): `sum_d x0 * dy/dx0` with attention and norms held constant.

    `activation` chooses the rule of GELU: "identity" `f(x) / x`, or its "gradient". `pixels` gives [B, H, W].
    """
    if activation not in ("identity", "gradient"):
        raise InputError(f"option 'activation' must be identity or gradient, got {activation!r}")
    return _token_times_gradient(module, conservative(activation), params, inputs, target, pixels)


def attention_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, pixels: bool = False
) -> Explanation:
    """AttnLRP (Achtibat et al., ICML 2024) at the embedded tokens; `pixels` gives [B, H, W]."""
    return _token_times_gradient(module, attn_lrp(), params, inputs, target, pixels)
