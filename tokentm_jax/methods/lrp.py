"""Methods that carry relevance through the model by other backward rules (`tokentm_jax.maths.relevance`).

Each function is `(module, params, inputs, target, **options) -> (maps, details)`. `details["relevance"]` [B, L+1] is
the relevance that enters every block and, last, leaves the last one: what a conserving rule keeps constant.

The README says what LRP's patent means for commercial use.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.maths.maps import token_map
from tokentm_jax.maths.primitives import Primitives, wide
from tokentm_jax.maths.relevance import Stabiliser, attn_lrp, conservative, lrp
from tokentm_jax.maths.tokentm import Blocks, attention_update, mean_attention, propagate
from tokentm_jax.methods.attention import Block, Explanation, check_blocks, from_trace
from tokentm_jax.methods.stream import FORWARD, replaced
from tokentm_jax.models.capture import Trace, capture
from tokentm_jax.models.vit import ViT

# What LRP reads of a trace: the relevance of attention, and of the tokens before and after every block.
_FIELDS = ("attention", "attention_grad", "tokens", "token_grads", "final_tokens")


def _ruled(module: nn.Module, rules: Primitives) -> nn.Module:
    """The same model with other backward rules. Raises InputError where they would not govern every step of it."""
    if not hasattr(module, "primitives"):
        raise InputError("this method needs a module with the field 'primitives', as tm.ViT has, to carry relevance")
    own = replaced(module, (*FORWARD, "embed", "classify")) if isinstance(module, ViT) else []
    if own:
        raise InputError(
            f"this method carries relevance by rules for the steps of tm.ViT; {type(module).__name__} has its own "
            f"'{own[0]}', whose steps have none"
        )
    return module.clone(primitives=rules)


def _details(trace: Trace, token_relevance: Array) -> dict[str, Array]:
    return {**trace.details(), "relevance": token_relevance.sum((2, 3)).T}


def full_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, stabiliser: Stabiliser = "signed"
) -> Explanation:
    """Layer-wise relevance propagation down to the pixels, summed over channels: signed maps [B, H, W]."""
    fields = ("input_grads", "tokens", "token_grads", "final_tokens")
    trace = capture(_ruled(module, lrp("lrp", stabiliser)), params, inputs, target, fields)
    return trace.input_grads.sum(-1), _details(trace, trace.token_grads)


def partial_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, stabiliser: Stabiliser = "signed"
) -> Explanation:
    """Positive relevance of the last block's attention (Voita et al., ACL 2019), mean over heads."""
    trace = capture(_ruled(module, lrp("lrp", stabiliser)), params, inputs, target, _FIELDS)
    maps, _ = from_trace(module, trace, lambda blocks, row: row @ jax.nn.relu(blocks.attention_grad[-1]).mean(0))
    return maps, _details(trace, trace.token_grads)


def transformer_attribution(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Array | None,
    *,
    first_block: Block = 0,
    stabiliser: Stabiliser = "signed",
) -> Explanation:
    """Transformer Attribution (Chefer et al., CVPR 2021): the product of `I + mean_h relu(G * R_A)` over blocks."""
    ruled_module = _ruled(module, lrp("ours", stabiliser))
    trace = capture(module, params, inputs, target, ["attention", "attention_grad"])
    check_blocks(len(trace.attention), first_block)
    ruled = capture(ruled_module, params, inputs, trace.target, _FIELDS)
    mixed = trace._replace(attention=ruled.attention_grad)

    def update(row: Array, block: Blocks) -> Array:
        return attention_update(row, mean_attention(block.attention * block.attention_grad))

    maps, _ = from_trace(module, mixed, lambda blocks, row: propagate(update, blocks, row, first_block))
    return maps, _details(trace, ruled.token_grads)


def _token_times_gradient(
    module: nn.Module, rules: Primitives, params: Any, inputs: Array, target: Array | None, pixels: bool
) -> Explanation:
    ruled = _ruled(module, rules)
    trace = capture(ruled, params, inputs, target, ("input_grads", "tokens", "token_grads", "final_tokens"))
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
    return _token_times_gradient(module, conservative(activation), params, inputs, target, pixels)


def attention_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, pixels: bool = False
) -> Explanation:
    """AttnLRP (Achtibat et al., ICML 2024) at the embedded tokens; `pixels` gives [B, H, W]."""
    return _token_times_gradient(module, attn_lrp(), params, inputs, target, pixels)
