"""Methods that carry relevance through the model by other backward rules (`tokentm_jax.programs.rules`).

Each function is `(model, params, inputs, target, **options) -> (maps, details)`. `details["relevance"]` [B, L+1] is
the relevance at the input of every block, and at the output of the last one. A conserving rule keeps it constant.

The README states what LRP's patent means for commercial use.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jax import Array

from tokentm_jax.errors import Unfit
from tokentm_jax.inputs.values import input_map, seen, token_map, values
from tokentm_jax.maths.maps import spread
from tokentm_jax.maths.primitives import mean_of_heads, wide
from tokentm_jax.methods.attention import Block
from tokentm_jax.methods.sharing import Details, Explanation, Share, alone
from tokentm_jax.programs.capture import check_blocks
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.one_pass import Pass, Wanted, one_pass
from tokentm_jax.programs.passes import of_last_attention
from tokentm_jax.programs.relevance import attribution_rows, position_rows
from tokentm_jax.programs.rules import ATTN_LRP, LIBRA, RULES, Activation, Stabiliser, conservative, lrp, res_lrp
from tokentm_jax.programs.running import Rules

RuleNames = Literal["plain", "libra", "conservative", "attn_lrp", "res_lrp", "lrp"]


def by_rules(function: Callable[..., Explanation], rules: str) -> Callable[..., Explanation]:
    """A method of gradients on the backward pass of a set of rules, one of `RuleNames`."""
    if rules == "plain":
        return function

    def ruled(model: Model, params: Any, inputs: Any, target: Any, **options: Any) -> Explanation:
        return function(model.by(RULES[rules]), params, inputs, target, **options)

    return ruled


def _with_relevance(details: Details, tokens: Array | None) -> Details:
    """Details with the relevance of blocks, from that of their tokens [B, L+1, N]; without blocks it is None."""
    return details if tokens is None else {**details, "relevance": tokens.sum(-1)}


def full_lrp_share(*, stabiliser: Stabiliser = "signed") -> Share:
    """LRP as a part of one pass."""

    def explain(model: Model, inputs: Any, done: Pass, details: Details) -> Explanation:
        return input_map(seen(inputs), wide(done.input_grads).sum(-1)), _with_relevance(details, done.carried)

    return Share(Wanted(input_grads=True), explain, lrp("lrp", stabiliser), Wanted(carried=True))


def full_lrp(model: Model, params: Any, inputs: Any, target: Any, *, stabiliser: Stabiliser = "signed") -> Explanation:
    """Layer-wise relevance propagation down to the pixels, summed over channels: signed maps [B, H, W]."""
    return alone(full_lrp_share(stabiliser=stabiliser), model, params, inputs, target)


def partial_lrp(
    model: Model, params: Any, inputs: Any, target: Any, *, stabiliser: Stabiliser = "signed"
) -> Explanation:
    """Positive relevance of the last block's attention (Voita et al., ACL 2019), mean over heads."""
    ruled = model.by(lrp("lrp", stabiliser))
    positive = lambda row, _, relevance: row @ mean_of_heads(jax.nn.relu(relevance))  # noqa: E731
    rows, details = model.per_sample(partial(of_last_attention, ruled, params, part=positive), inputs, target)
    # The relevance of all blocks is another pass, which is compiled only if it is read.
    flow = partial(one_pass, ruled.storing("store"), params, wanted=Wanted(carried=True))
    done, _ = model.per_sample(flow, inputs, details["target"])
    return token_map(model, rows), _with_relevance(details, done.carried)


def transformer_attribution(
    model: Model, params: Any, inputs: Any, target: Any, *, first_block: Block = 0, stabiliser: Stabiliser = "signed"
) -> Explanation:
    """Transformer Attribution (Chefer et al., CVPR 2021): the product of `I + mean_h relu(G * R_A)` over blocks."""
    check_blocks(model, first_block)
    take = partial(attribution_rows, model, lrp("ours", stabiliser), params, first_block=first_block)
    (rows, relevance), details = model.per_sample(take, inputs, target)
    return token_map(model, rows), _with_relevance(details, relevance)


def _token_times_gradient(rules: Rules, pixels: bool) -> Share:
    """Token times gradient at the embedded tokens, or at the pixels."""

    def explain(model: Model, inputs: Any, done: Pass, details: Details) -> Explanation:
        if pixels:
            maps = input_map(seen(inputs), (wide(values(inputs)) * wide(done.input_grads)).sum(-1))
        elif done.effects is None:
            raise Unfit("a function without attention has no map of tokens: use pixels=True")
        else:
            maps = token_map(model, done.effects[:, 0])
        return maps, _with_relevance(details, done.effects)

    return Share(Wanted(input_grads=pixels), explain, rules, Wanted(effects=True))


def conservative_lrp_share(
    *, activation: Activation = "identity", pooler: Activation | None = None, pixels: bool = False
) -> Share:
    """Conservative LRP as a part of one pass. With "identity" its rules are those of LibraGrad."""
    rules = LIBRA if activation == "identity" and pooler in (None, "identity") else conservative(activation, pooler)
    return _token_times_gradient(rules, pixels)


def conservative_lrp(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    activation: Activation = "identity",
    pooler: Activation | None = None,
    pixels: bool = False,
) -> Explanation:
    """Conservative LRP (Ali et al., ICML 2022): `sum_d x0 * dy/dx0` with constant attention and norms.

    `activation` is the rule of GELU: "identity" `f(x) / x`, or its "gradient". `pooler` is the rule of the tanh in
    BERT's pooler, by default the same; the published code uses "gradient". `pixels` gives [B, H, W].
    """
    share = conservative_lrp_share(activation=activation, pooler=pooler, pixels=pixels)
    return alone(share, model, params, inputs, target)


def attention_lrp_share(*, pixels: bool = False) -> Share:
    """AttnLRP as a part of one pass."""
    return _token_times_gradient(ATTN_LRP, pixels)


def attention_lrp(model: Model, params: Any, inputs: Any, target: Any, *, pixels: bool = False) -> Explanation:
    """AttnLRP (Achtibat et al., ICML 2024) at the embedded tokens; `pixels` gives [B, H, W]."""
    return alone(attention_lrp_share(pixels=pixels), model, params, inputs, target)


def residual_lrp_share(*, gamma: Annotated[float, Ge(0)] = 1.0, pixels: bool = False) -> Share:
    """ResLRP as a part of one pass."""
    return _token_times_gradient(res_lrp(gamma), pixels)


def residual_lrp(
    model: Model, params: Any, inputs: Any, target: Any, *, gamma: Annotated[float, Ge(0)] = 1.0, pixels: bool = False
) -> Explanation:
    """ResLRP (2026): AttnLRP with the gamma rule at residual sums; `pixels` gives [B, H, W].

    `gamma` 0 is AttnLRP.
    """
    return alone(residual_lrp_share(gamma=gamma, pixels=pixels), model, params, inputs, target)


def position_aware_lrp(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """PA-LRP (Bakish et al., 2025): LRP to the pixels, with the relevance of positions kept at their tokens; signed.

    The relevance of a patch's position is spread evenly over its pixels. `details["position_relevance"]` [B, N] is
    that of all tokens: of tables that are added, and half of each product with a rotary position.
    """
    (row, gradient), details = model.per_sample(partial(position_rows, model, params), inputs, target)
    mask, array = seen(inputs), values(inputs)
    maps = (wide(array) * wide(gradient)).sum(-1)
    if mask is None:
        if array.ndim != 4:
            raise Unfit(f"this method explains images [B, H, W, C] and texts, and the inputs are {list(array.shape)}")
        size = (array.shape[1], array.shape[2])
        own = lambda patches: spread(patches, size, model.tiling)  # noqa: E731
        kept = token_map(model, row)
        pixels = jax.grad(lambda patches: own(patches).sum())(jnp.ones_like(kept))  # that show each patch
        shown = own(kept / jnp.maximum(pixels, 1))
    else:
        shown = row
    return input_map(mask, maps + shown), {**details, "position_relevance": row}


def libra_full_grad_share() -> Share:
    """Libra FullGrad+ as a part of one pass."""

    def explain(model: Model, inputs: Any, done: Pass, details: Details) -> Explanation:
        row = done.full_gradient
        return token_map(model, row), {**details, "completeness_gap": row.sum(-1) - details["score"]}

    return Share(Wanted(full_gradient=True), explain, LIBRA)


def libra_full_grad(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Libra FullGrad+ (Mehri et al., CVPR 2025): tokens and biases times their gradients, mean over blocks, on the
    pruned backward pass.

    Block l gives `sum_d x_l g_l`, plus the same for every later bias: a map whose sum over all tokens is exactly the
    logit. Biases after the read-out belong to the tokens that the head reads. `details["completeness_gap"]` [B] is the
    sum minus the logit.
    """
    return alone(libra_full_grad_share(), model, params, inputs, target)
