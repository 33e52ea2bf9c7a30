"""Rules that run inside the passes: of a block, only what is asked for is kept.

A relevance row travels from the last block to the first, and so does the backward pass. So the forward pass keeps
the input of each layer and a summary of each block, and one scan over the blocks in reverse does all that is left:
differentiate the block, and update the row by the attention times its gradient there. Those are never held for two
blocks at once. The rules are the ones that run over a stored `Trace`.

The module must be a `ViT` whose forward pass is known: `embed`, its blocks one after the other, `classify`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.tokentm import Blocks, propagate
from tokentm_jax.models.capture import class_logits
from tokentm_jax.models.vit import ViT

Memory = Literal["recompute", "store"]
Summary = Callable[[Blocks], Any]  # arrays of one block of one sample -> what the rule needs of it
Details = dict[str, Array]

# What a layer keeps for its backward pass beside its input: nothing, or what its linear maps gave (queries, keys,
# values and the hidden channels). Attention is computed again from queries and keys in both.
POLICIES = {
    "recompute": jax.checkpoint_policies.nothing_saveable,
    "store": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# What makes the forward pass of a `ViT` known; a subclass may have its own `embed` and `classify`, which are called.
FORWARD = ("__call__", "setup", "block")


def replaced(module: Any, names: Iterable[str]) -> list[str]:
    """Those of the methods of `ViT` called `names` that the module's class has its own of."""
    return [name for name in names if getattr(type(module), name) is not getattr(ViT, name)]


def streams(module: Any) -> bool:
    """Whether the forward pass is known to be that of `ViT`. Of any other module only what it shows is known."""
    return isinstance(module, ViT) and not replaced(module, FORWARD)


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
    block = module.block()

    def through(x: Array, weights: Any) -> tuple[Array, Any]:
        (after, _), state = block.apply({"params": weights}, x, mutable=["intermediates"])
        return after, jax.vmap(summary)(_read(state))

    embedded = module.apply({"params": params}, inputs, method="embed")
    last, summaries = jax.lax.scan(through, embedded, params["blocks"])
    logits = module.apply({"params": params}, last, method="classify")
    rows = propagate(jax.vmap(update), summaries, _readout(module, last), first_block, end_block)
    return rows, embedded, {"logits": logits, "target": class_logits(logits, target)[1]}


def backward(
    module: Any,
    params: Any,
    inputs: Array,
    target: Array | None,
    summary: Summary,
    update: Callable[[Array, Array, Any], Array],
    first_block: int = 0,
    end_block: int | None = None,
    memory: Memory = "store",
) -> tuple[Array, Array, Details]:
    """One forward and one backward pass, with a rule inside the backward one.

    Args:
      module, params, inputs, target: as in `trace.capture`.
      summary: what the rule needs to know of a block beside its attention.
      update: `(row [N], gradient times attention [H, N, N], summary) -> row` of one sample, from the output of a
        block to its input.
      first_block: first block that the row passes, from 0.
      end_block: one past the last one; None for all.
      memory: a key of `POLICIES`.

    Returns:
      The rows [B, N] that began as the head's read-out, the embedded tokens [B, N, D], and the details.
    """
    block, end = module.block(), module.depth if end_block is None else end_block
    keep = partial(jax.checkpoint, policy=POLICIES[memory], prevent_cse=False)
    rebuild: dict[str, Callable[[Any, Any], Any]] = {}

    def ones(x: Array) -> Array:
        return jnp.ones((*x.shape[:1], block.num_heads, x.shape[1], x.shape[1]), x.dtype)

    def attend(weights: Any, x: Array, gate: Array) -> tuple[Array, Any]:
        plain = module.primitives  # the gradient at a gate on the attention is gradient times attention
        gated = plain._replace(softmax=lambda scores, scale: plain.softmax(scores, scale) * gate)
        variables = {"params": weights}
        return block.clone(primitives=gated).apply(variables, x, method="attend", mutable=["intermediates"])

    def feed(weights: Any, middle: Array) -> tuple[Array, Any]:
        return block.apply({"params": weights}, middle, method="feed", mutable=["intermediates"])

    def through(x: Array, weights: Any) -> tuple[Array, Any]:
        gate = ones(x)
        middle, pull_attend, attended = jax.vjp(keep(partial(attend, weights)), x, gate, has_aux=True)
        after, pull_feed, fed = jax.vjp(keep(partial(feed, weights)), middle, has_aux=True)
        known = (weights, x, gate, middle)
        more_attend, rebuild["attend"] = _split(pull_attend, known)
        more_feed, rebuild["feed"] = _split(pull_feed, known)
        return after, (x, middle, more_attend, more_feed, jax.vmap(summary)(_read(attended, fed)))

    def back(carry: tuple[Array, Array], layer: Any) -> tuple[tuple[Array, Array], None]:
        (gradient, rows), (index, weights, (x, middle, more_attend, more_feed, summaries)) = carry, layer
        known = (weights, x, ones(x), middle)
        (gradient,) = rebuild["feed"](more_feed, known)(gradient)
        gradient, product = rebuild["attend"](more_attend, known)(gradient)
        updated = jax.vmap(update)(rows, wide(product), summaries)
        return (gradient, jnp.where(index < end, updated, rows)), None

    def score(tokens: Array) -> tuple[Array, Details]:
        logits = module.apply({"params": params}, tokens, method="classify")
        own, chosen = class_logits(logits, target)
        return own.sum(), {"logits": logits, "target": chosen}  # samples do not touch each other

    embedded = module.apply({"params": params}, inputs, method="embed")
    last, saved = jax.lax.scan(through, embedded, params["blocks"])
    gradient, details = jax.grad(score, has_aux=True)(last)
    layers = jax.tree.map(lambda a: a[first_block:], (jnp.arange(module.depth), params["blocks"], saved))
    (_, rows), _ = jax.lax.scan(back, (gradient, _readout(module, last)), layers, reverse=True)
    return rows, embedded, details


def _split(pull: Any, known: Any) -> tuple[list[Array], Callable[[Any, Any], Any]]:
    """The arrays that a pull-back of `jax.vjp` holds beside `known` ones, and a function of both that makes it again.

    A scan would otherwise store, once more for every block, the very weights that it runs over.
    """
    places = {id(array): place for place, array in enumerate(jax.tree.leaves(known))}
    held, tree = jax.tree.flatten(pull)
    more = [array for array in held if id(array) not in places]
    order = [places.get(id(array)) for array in held]

    def rebuild(more: Any, known: Any) -> Any:
        arrays, others = jax.tree.leaves(known), iter(more)
        return tree.unflatten([next(others) if place is None else arrays[place] for place in order])

    return more, rebuild


def _read(*states: Any) -> Blocks:
    """What the layers of one block sowed, for a batch: [B, ...], in float32 at least."""
    arrays = {}
    for state in states:
        sown = state["intermediates"]
        arrays |= {**sown, **sown.get("attn", {})}
    found = {name: arrays[name][0] for name in Blocks._fields if name in arrays}
    return jax.tree.map(wide, Blocks(**{"attention_grad": None, **found}))


def _readout(module: Any, tokens: Array) -> Array:
    """The head's read-out for each sample, [B, N]; placed as the tokens [B, N, D] are."""
    return jnp.zeros_like(wide(tokens[..., 0])) + jnp.asarray(module.readout, wide(tokens).dtype)
