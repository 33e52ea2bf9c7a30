"""Methods that carry relevance through the model by other backward rules (`tokentm_jax.maths.relevance`).

Each function is `(module, params, inputs, target, **options) -> (maps, details)`. `details["relevance"]` [B, L+1] is
the relevance that enters every block and, last, leaves the last one: what a conserving rule keeps constant.

The README says what LRP's patent means for commercial use.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
from annotated_types import Ge
from jax import Array

from tokentm_jax.errors import Unfit
from tokentm_jax.maths.maps import token_map
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.relevance import Activation, Stabiliser, attn_lrp, conservative, lrp, res_lrp
from tokentm_jax.maths.tokentm import attention_update, propagate, rectified_mean
from tokentm_jax.methods.attention import Block, Details, Explanation, check_blocks
from tokentm_jax.methods.stream import FORWARD, KNOWN, replaced
from tokentm_jax.models.capture import Trace, capture
from tokentm_jax.models.inputs import as_inputs, input_map, read_out, values
from tokentm_jax.programs import rules as of_programs
from tokentm_jax.programs.model import Found

# Sets of rules by name: for the steps of tm.ViT, and for those of a function that was read.
RULES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conservative": (conservative, of_programs.conservative),
    "attn_lrp": (attn_lrp, of_programs.attn_lrp),
    "res_lrp": (res_lrp, of_programs.res_lrp),
    "lrp": (lrp, of_programs.lrp),
}


def ruled(module: Any, rules: str, *choices: Any) -> Any:
    """The same model with other backward rules, a name of `RULES` and its choices. Raises Unfit where they would not
    govern every step of it."""
    of_modules, of_functions = RULES[rules]
    if isinstance(module, Found):
        return module.clone(of_functions(*choices))
    if not hasattr(module, "primitives"):
        raise Unfit("this method needs a module with the field 'primitives', as tm.ViT has, to carry relevance")
    own = replaced(module, (*FORWARD, "embed", "classify")) if isinstance(module, KNOWN) else []
    if own:
        raise Unfit(
            f"this method carries relevance by rules for the steps of tm.ViT; {type(module).__name__} has its own "
            f"'{own[0]}', whose steps have none"
        )
    return module.clone(primitives=of_modules(*choices))


RuleNames = Literal["plain", "libra", "conservative", "attn_lrp", "res_lrp", "lrp"]
_OF_NAMES: dict[str, tuple[Any, ...]] = {
    "libra": ("conservative", "identity"),  # LibraGrad's pruned backward pass
    "conservative": ("conservative", "identity"),
    "attn_lrp": ("attn_lrp",),
    "res_lrp": ("res_lrp", 1.0),
    "lrp": ("lrp", "lrp", "signed"),  # the cotangent is then the relevance, and not a gradient
}


def by_rules(function: Callable[..., Explanation], rules: str) -> Callable[..., Explanation]:
    """A method of gradients on the backward pass of a set of rules, one of `RuleNames`."""
    if rules == "plain":
        return function

    def ruled_method(module: Any, params: Any, inputs: Any, target: Any, **options: Any) -> Explanation:
        return function(ruled(module, *_OF_NAMES[rules]), params, inputs, target, **options)

    return ruled_method


class Relevance(NamedTuple):
    """What a rule whose cotangent is the relevance has carried to every value; what was not asked for is None."""

    attention: Any  # [L, B, H, N, N] of the attention of every block
    tokens: Any  # [L+1, B, N, D] of the tokens before every block and after the last
    inputs: Any  # [B, H, W, 3] of the normalised images, or [B, N, D] of the embeddings of texts
    details: Details
    seen: Any  # as in `Trace`


def _carry(
    module: nn.Module, rules: tuple[Any, ...], params: Any, inputs: Array, target: Array | None, *more: str
) -> Relevance:
    """A forward pass, and a backward pass by the rules; `more` are fields of `Trace` beside those of the tokens."""
    trace = capture(ruled(module, *rules), params, inputs, target, (*_tokens_of(module), *more))
    details = _details(trace, trace.token_grads)
    return Relevance(trace.attention_grad, trace.token_grads, trace.input_grads, details, trace.seen)


def _tokens_of(module: Any) -> tuple[str, ...]:
    """The fields of a trace that the relevance of blocks needs; none for a function without blocks."""
    blocks = not isinstance(module, Found) or module.has_blocks
    return ("tokens", "token_grads", "final_tokens") if blocks else ()


def _details(trace: Trace, token_relevance: Any) -> Details:
    return trace.details() | ({} if token_relevance is None else {"relevance": token_relevance.sum((2, 3)).T})


def _maps(module: Any, mask: Array | None, arrays: Any, rule: Callable[[Any, Array], Array]) -> Array:
    """Token maps of a batch by a rule for one sample, `rule(arrays [L, ...], read-out [N]) -> row [N]`, from arrays
    [L, B, ...]; it computes in float32 at least."""
    arrays = jax.tree.map(wide, arrays)
    readout = read_out(module, mask, jax.tree.leaves(arrays)[0][0])
    return token_map(module, jax.vmap(rule, in_axes=(1, 0))(arrays, readout))


def full_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, stabiliser: Stabiliser = "signed"
) -> Explanation:
    """Layer-wise relevance propagation down to the pixels, summed over channels: signed maps [B, H, W]."""
    relevance = _carry(module, ("lrp", "lrp", stabiliser), params, inputs, target, "input_grads")
    return input_map(relevance.seen, relevance.inputs.sum(-1)), relevance.details


def partial_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, stabiliser: Stabiliser = "signed"
) -> Explanation:
    """Positive relevance of the last block's attention (Voita et al., ACL 2019), mean over heads."""
    relevance = _carry(module, ("lrp", "lrp", stabiliser), params, inputs, target, "attention_grad")
    rule = lambda carried, row: row @ jax.nn.relu(carried[-1]).mean(0)  # noqa: E731
    return _maps(module, relevance.seen, relevance.attention, rule), relevance.details


def transformer_attribution(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    first_block: Block = 0,
    stabiliser: Stabiliser = "signed",
) -> Explanation:
    """Transformer Attribution (Chefer et al., CVPR 2021): the product of `I + mean_h relu(G * R_A)` over blocks."""
    trace = capture(module, params, inputs, target, ["attention_grad"])
    check_blocks(len(trace.attention_grad), first_block)
    rules = ("lrp", "ours", stabiliser)
    relevance = _carry(module, rules, params, inputs, trace.target, "attention_grad")

    def update(row: Array, block: tuple[Array, Array]) -> Array:
        gradient, carried = block
        return attention_update(row, rectified_mean(carried * gradient))

    arrays = (trace.attention_grad, relevance.attention)
    maps = _maps(module, trace.seen, arrays, lambda blocks, row: propagate(update, blocks, row, first_block))
    return maps, {**relevance.details, **trace.details()}


def _token_times_gradient(
    module: nn.Module, rules: tuple[Any, ...], params: Any, inputs: Array, target: Array | None, pixels: bool
) -> Explanation:
    inputs = as_inputs(module, params, inputs)
    trace = capture(ruled(module, *rules), params, inputs, target, ("input_grads", *_tokens_of(module)))
    relevance: Any = None if trace.tokens is None else wide(trace.tokens) * wide(trace.token_grads)
    at_pixels = (wide(values(inputs)) * wide(trace.input_grads)).sum(-1)
    if not pixels and relevance is None:
        raise Unfit("a function without attention has no map of tokens: ask for pixels=True")
    maps = input_map(trace.seen, at_pixels) if pixels else token_map(module, relevance[0].sum(-1))
    return maps, _details(trace, relevance)


def conservative_lrp(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    activation: Activation = "identity",
    pooler: Activation | None = None,
    pixels: bool = False,
) -> Explanation:
    """Conservative LRP (Ali et al., ICML 2022): `sum_d x0 * dy/dx0` with attention and norms held constant.

    `activation` chooses the rule of GELU: "identity" `f(x) / x`, or its "gradient". `pooler` is that of the tanh in
    BERT's pooler, by default the same; the published code takes its "gradient". `pixels` gives [B, H, W].
    """
    return _token_times_gradient(module, ("conservative", activation, pooler), params, inputs, target, pixels)


def attention_lrp(
    module: nn.Module, params: Any, inputs: Array, target: Array | None, *, pixels: bool = False
) -> Explanation:
    """AttnLRP (Achtibat et al., ICML 2024) at the embedded tokens; `pixels` gives [B, H, W]."""
    return _token_times_gradient(module, ("attn_lrp",), params, inputs, target, pixels)


def residual_lrp(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    gamma: Annotated[float, Ge(0)] = 1.0,
    pixels: bool = False,
) -> Explanation:
    """ResLRP (2026): AttnLRP with the gamma rule at residual sums; `pixels` gives [B, H, W].

    `gamma` 0 is AttnLRP.
    """
    return _token_times_gradient(module, ("res_lrp", gamma), params, inputs, target, pixels)
