"""LibraGrad (Mehri et al., CVPR 2025): gradient methods on a backward pass with pruned paths.

Gradients stop at the softmax's result, at GELU's gate f(x) / x, and at LayerNorm's deviation: these are the rules
of Conservative LRP, so that `conservative_lrp` is LibraGrad's gradient x token at the embedded tokens. The logit is
then a sum of tokens and biases times their gradients, exactly, at every block: what the authors call complete.

Each function is `(module, params, inputs, target, **options) -> (maps, details)`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.maths.maps import token_map
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.relevance import conservative, with_factor_on_biases
from tokentm_jax.maths.scores import explained
from tokentm_jax.methods.attention import Details, Explanation
from tokentm_jax.methods.lrp import ruled
from tokentm_jax.methods.stream import require_streams
from tokentm_jax.models.inputs import as_inputs, context, read_out, seen
from tokentm_jax.programs import passes
from tokentm_jax.programs.model import Found

RULES = conservative("identity")


def libra_full_grad(module: nn.Module, params: Any, inputs: Array, target: Array | None) -> Explanation:
    """Libra FullGrad+: tokens and biases times their gradients, mean over blocks; the pruned backward pass.

    Block l gives `sum_d x_l g_l`, and the same for every bias from there on: a map that sums to the logit, over all
    tokens. Biases after the tokens were read go to the tokens that were. `details["completeness_gap"]` [B] is the sum
    less the logit.
    """
    if isinstance(module, Found):
        one = partial(passes.full_gradient_rows, ruled(module, "conservative", "identity"), params)
        (rows, gap), details = module.per_sample(one, inputs, target)
        return token_map(module, rows), {**details, "completeness_gap": gap}
    ruled(module, "conservative", "identity")  # refuses a module whose steps have no rules
    require_streams(module, "the method 'libra_full_grad' goes block by block")
    inputs = as_inputs(module, params, inputs)
    block, depth, more = module.block(), module.depth, context(inputs)
    embedded: Any = module.apply({"params": params}, inputs, method="embed")
    readout = read_out(module, seen(inputs), embedded)

    def score(factor: Array) -> tuple[Array, tuple[Array, Details]]:
        """Every token and bias has a factor 1 + share * u [B, N]: the derivative by u is the map."""

        def through(x: Array, layer: tuple[Array, Any]) -> tuple[Array, None]:
            index, weights = layer
            share = (index + 1).astype(factor.dtype) / depth  # of the blocks that come before this one's biases
            rules = with_factor_on_biases(RULES, 1 + share * factor, readout)
            x = (wide(x) * (1 + factor / depth)[..., None]).astype(x.dtype)
            return block.clone(primitives=rules).apply({"params": weights}, x, *more)

        last, _ = jax.lax.scan(through, embedded, (jnp.arange(depth), params["blocks"]))
        head = module.clone(primitives=with_factor_on_biases(RULES, 1 + factor, readout))
        logits = head.apply({"params": params}, last, *more, method="classify")
        own, details = explained(logits, target)
        return own.sum(), (own, details)  # samples do not touch each other

    rows, (own, details) = jax.grad(score, has_aux=True)(jnp.zeros_like(wide(embedded)[..., 0]))
    return token_map(module, rows), {**details, "completeness_gap": rows.sum(-1) - own}
