"""Rules that run inside the passes: of a block, only what its rule asks for is kept.

A relevance row travels from the last block to the first, and so does the backward pass. So the forward pass keeps
each layer's input and a summary of the block, and one scan over the blocks in reverse does all that is left:
compute the block again, take its attention and the gradient there, update the row. Attention and gradients are never
held for two blocks at once; the rules are those that run over a stored `Trace`.

The module must be made of `embed`, stacked `params["blocks"]` for `block()` with `attend` and `feed`, and `classify`,
as `ViT` is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.primitives import wide
from tokentm_jax.tokentm import Blocks, propagate
from tokentm_jax.trace import class_logits, zero_perturbations

Summary = Callable[[Blocks], Any]  # arrays of one block of one sample -> what the rule needs of it
Details = dict[str, Array]


def streams(module: Any) -> bool:
    """Whether the module is made of the parts that streaming needs."""
    return all(hasattr(module, name) for name in ("embed", "block", "classify", "depth"))


def _block(sown: Any) -> Blocks:
    """What one block sowed, for a batch: [B, ...], in float32 at least."""
    arrays = {**sown, **sown["attn"]}
    found = {name: arrays[name][0] for name in Blocks._fields if name in arrays}
    return jax.tree.map(wide, Blocks(**{"attention_grad": None, **found}))


def forward(
    module: Any,
    params: Any,
    inputs: Array,
    target: Array | None,
    summary: Summary,
    update: Callable[[Array, Any], Array],
    first_block: int = 0,
    end_block: int | None = None,
) -> tuple[Array, Array, Details]:
    """One forward pass, then a rule that needs no gradients: as `backward`, with `update(row, summary) -> row`."""
    embedded, last, _, summaries = _forward(module, params, inputs, summary)
    logits = module.apply({"params": params}, last, method="classify")
    update_all = jax.vmap(update)
    rows = propagate(update_all, summaries, _readout(module, last), first_block, end_block)
    return rows, embedded, {"logits": logits, "target": class_logits(logits, target)[1]}


def _readout(module: Any, tokens: Array) -> Array:
    """The head's read-out for each sample, [B, N]; placed as the tokens [B, N, D] are."""
    return jnp.zeros_like(wide(tokens[..., 0])) + jnp.asarray(module.readout, wide(tokens).dtype)


def _forward(module: Any, params: Any, inputs: Array, summary: Summary) -> tuple[Array, Array, Any, Any]:
    """Tokens before the first and after the last block, the inputs of both layers [L, B, N, D], summaries."""
    block = module.block()

    def through(x: Array, weights: Any) -> tuple[Array, Any]:
        (after, _), state = block.apply({"params": weights}, x, mutable=["intermediates"])
        sown = state["intermediates"]
        middle = module.primitives.add(x, sown["attention_branch"][0])
        return after, ((x, middle), jax.vmap(summary)(_block(sown)))

    embedded = module.apply({"params": params}, inputs, method="embed")
    last, (layer_inputs, summaries) = jax.lax.scan(through, embedded, params["blocks"])
    return embedded, last, layer_inputs, summaries


def backward(
    module: Any,
    params: Any,
    inputs: Array,
    target: Array | None,
    summary: Summary,
    update: Callable[[Array, Array, Array, Any], Array],
    first_block: int = 0,
    end_block: int | None = None,
) -> tuple[Array, Array, Details]:
    """One forward and one backward pass, with a rule inside the backward one.

    Args:
      module, params, inputs, target: as in `trace.capture`.
      summary: what the rule needs to know of a block, but for its attention; the arrays may be small.
      update: `(row [N], attention [H, N, N], its gradient, summary) -> row` of one sample, from the output of a
        block to its input.
      first_block: first block that the row passes, from 0.
      end_block: one past the last one; None for all.

    Returns:
      The rows [B, N] that began as the head's read-out, the embedded tokens [B, N, D], and the details.
    """
    embedded, last, layer_inputs, summaries = _forward(module, params, inputs, summary)

    def score(tokens: Array) -> tuple[Array, Details]:
        logits = module.apply({"params": params}, tokens, method="classify")
        own, chosen = class_logits(logits, target)
        return own.sum(), {"logits": logits, "target": chosen}  # samples do not touch each other

    gradient, details = jax.grad(score, has_aux=True)(last)
    block, end = module.block(), module.depth if end_block is None else end_block
    first_weights = jax.tree.map(lambda a: a[0], params["blocks"])
    zeros = zero_perturbations(block, first_weights, embedded, method="attend")["perturbations"]

    def attend(weights: Any, x: Array, change: Array) -> tuple[Array, Array]:
        variables = {"params": weights, "perturbations": {**zeros, "attn": {"attention": change}}}
        middle, state = block.apply(variables, x, method="attend", mutable=["intermediates"])
        return middle, state["intermediates"]["attn"]["attention"][0]

    def feed(weights: Any, middle: Array) -> Array:
        return block.apply({"params": weights}, middle, method="feed")

    def back(carry: tuple[Array, Array], layer: Any) -> tuple[tuple[Array, Array], None]:
        (gradient, rows), (index, weights, (x, middle), known) = carry, layer
        (gradient,) = jax.vjp(partial(feed, weights), middle)[1](gradient)
        _, pull, attention = jax.vjp(partial(attend, weights), x, zeros["attn"]["attention"], has_aux=True)
        gradient, attention_grad = pull(gradient)
        updated = jax.vmap(update)(rows, wide(attention), wide(attention_grad), known)
        return (gradient, jnp.where(index < end, updated, rows)), None

    layers = (jnp.arange(module.depth), params["blocks"], layer_inputs, summaries)
    passed = jax.tree.map(lambda a: a[first_block:], layers)
    (_, rows), _ = jax.lax.scan(back, (gradient, _readout(module, last)), passed, reverse=True)
    return rows, embedded, details
