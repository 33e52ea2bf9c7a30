"""Rules that run inside the passes: of a block, only what is asked for is kept.

The module must be a `ViT` or a `Bert` whose forward pass is known: `embed`, its blocks one after the other,
`classify`. The rules are the ones that run over a stored `Trace`, with the same numbers.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from tokentm_jax.errors import Unfit
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.scores import explained
from tokentm_jax.maths.tokentm import (
    Blocks,
    TokenTM,
    attention_layer,
    attention_weights,
    ffn_layer,
    ffn_weights,
    norm_gain,
    propagate,
    sample_axes,
)
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.inputs import context, read_out, seen
from tokentm_jax.models.vit import ViT
from tokentm_jax.programs.passes import WEIGHTS

Memory = Literal["recompute", "store"]
Summary = Callable[[Blocks], Any]  # arrays of one block of one sample -> what the rule needs of it
Details = dict[str, Array]

# What a layer keeps for its backward pass beside its input: the transformation weights, [N], and what its linear maps
# gave (queries, keys, values and the hidden channels) or not. Attention is computed again from queries and keys.
_WEIGHTS_ALONE = jax.checkpoint_policies.save_only_these_names(WEIGHTS)
POLICIES = {
    "recompute": _WEIGHTS_ALONE,
    "store": jax.checkpoint_policies.save_from_both_policies(
        _WEIGHTS_ALONE, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


# What makes a forward pass known; a subclass may have its own `embed` and `classify`, which are called.
FORWARD = ("__call__", "setup", "block")


KNOWN = (ViT, Bert)


def replaced(module: Any, names: Iterable[str]) -> list[str]:
    """Those of the methods of `ViT` or `Bert` called `names` that the module's class has its own of."""
    home = next(kind for kind in KNOWN if isinstance(module, kind))
    return [name for name in names if getattr(type(module), name) is not getattr(home, name)]


def streams(module: Any) -> bool:
    """Whether the forward pass is known to be that of `ViT` or `Bert`. Of any other module only what it shows is."""
    return isinstance(module, KNOWN) and not replaced(module, FORWARD)


def require_streams(module: Any, reason: str) -> None:
    """Unfit "{reason}, so it needs ..." for a module whose forward pass is not known."""
    if not streams(module):
        name = type(module).__name__
        raise Unfit(f"{reason}, so it needs a module with the forward pass of tm.ViT; {name} has its own")


def forward(
    module: Any,
    params: Any,
    inputs: Array,
    target: Any,
    summary: Summary,
    update: Callable[[Array, Any], Array],
    first_block: int = 0,
    end_block: int | None = None,
) -> tuple[Array, Array, Details]:
    """One forward pass, then a rule that needs no gradients: as `backward`, with `update(row, summary) -> row`."""
    block, more = module.block(), context(inputs)

    def through(x: Array, weights: Any) -> tuple[Array, Any]:
        (after, _), state = block.apply({"params": weights}, x, *more, mutable=["intermediates"])
        return after, jax.vmap(summary, in_axes=(sample_axes(0),))(_read(state, inputs))

    embedded = module.apply({"params": params}, inputs, method="embed")
    last, summaries = jax.lax.scan(through, embedded, params["blocks"])
    logits = module.apply({"params": params}, last, *more, method="classify")
    rows = propagate(jax.vmap(update), summaries, read_out(module, seen(inputs), last), first_block, end_block)
    return rows, embedded, explained(logits, target)[1]


class Pass(NamedTuple):
    """What one forward and backward pass gives."""

    rows: Array  # [B, N] that began as the head's read-out, at the input of block `options.first_block`
    embedded: Array  # [B, N, D] the tokens that enter the first block
    gradient: Array  # [B, N, D] of the logit, or what the module's rules make of it, at the input of `first_block`
    noted: Any  # [L - first_block, ...] what `note` gave
    details: Details


def backward(
    module: Any,
    params: Any,
    inputs: Array,
    target: Any,
    options: TokenTM,
    memory: Memory = "store",
    note: Callable[[Any, Array], Any] | None = None,
) -> Pass:
    """One forward and one backward pass in which TokenTM's rows are the cotangents of a stream of zeros.

    Args:
      module, params, inputs, target: as in `capture`.
      options: with another `attention` than "plain".
      memory: a key of `POLICIES`.
      note: `(a block's parameters, its input [B, N, D]) -> what is to be noted`, on the way forward.
    """
    block, first, more = module.block(), options.first_block, context(inputs)
    end = module.depth if options.end_block is None else options.end_block
    norms = block.post_norm and options.norms
    keep = partial(jax.checkpoint, policy=POLICIES[memory], prevent_cse=False)

    def kept(index: Array, weights: Array) -> Array:
        return checkpoint_name(jnp.where(index < end, weights, 0), WEIGHTS)  # left out: a block that adds nothing

    def normed(index: Array, u: Array, before: Array, after: Array) -> Array:
        """The stream through the LayerNorm behind a sum of a post-norm block."""
        gain = jax.vmap(norm_gain)(wide(before), wide(after))
        return jax.vmap(ffn_layer)(u, kept(index, gain - 1))

    @keep
    def attend(layer: Any, x: Array, u: Array) -> tuple[Array, Array]:
        index, params = layer
        # The layer stands here twice, and the compiler computes it once: the stream enters at the attention, and its
        # weights may look at what comes after that.
        middle, state = block.apply({"params": params}, x, *more, method="attend", mutable=["intermediates"])
        known = _read(state, inputs)
        weights_of = jax.vmap(partial(attention_weights, options=options), in_axes=(sample_axes(0),))
        weights = kept(index, weights_of(known))
        left = []  # the stream, as it leaves the hook that it enters inside the layer

        def attended(attention: Array) -> Array:
            attention, after = jax.vmap(partial(attention_layer, options))(attention, u, weights)
            left.append(after)
            return attention

        ruled = block.clone(primitives=module.primitives._replace(attended=attended))
        attend = ruled.apply({"params": params}, x, *more, method="attend")
        if norms:
            left = [normed(index, *left, wide(x) + known.attention_branch, middle)]
        return attend, *left

    @keep
    def feed(layer: Any, x: Array, u: Array) -> tuple[Array, Array]:
        index, params = layer
        after, state = block.apply({"params": params}, x, method="feed", mutable=["intermediates"])
        known = _read(state, inputs)
        weights_of = jax.vmap(partial(ffn_weights, options=options), in_axes=(0, sample_axes(0)))
        u = jax.vmap(ffn_layer)(u, kept(index, weights_of(wide(x), known)))
        return after, normed(index, u, wide(x) + known.ffn_branch, after) if norms else u

    def through(carry: tuple[Array, Array], layer: Any) -> tuple[tuple[Array, Array], Any]:
        noted = None if note is None else jax.lax.stop_gradient(note(layer[1], jax.lax.stop_gradient(carry[0])))
        return feed(layer, *attend(layer, *carry)), noted

    def from_first(x: Array, u: Array) -> tuple[tuple[Array, Array], tuple[Any, Details]]:
        (x, u), noted = jax.lax.scan(through, (x, u), layers)
        logits = module.apply({"params": params}, x, *more, method="classify")
        own, details = explained(logits, target)
        return (own.sum(), u), (noted, details)  # samples do not touch each other

    embedded = module.apply({"params": params}, inputs, method="embed")
    numbered = (jnp.arange(module.depth), params["blocks"])
    before, layers = jax.tree.map(lambda a: a[:first], numbered), jax.tree.map(lambda a: a[first:], numbered)
    x, _ = jax.lax.scan(lambda x, layer: block.apply({"params": layer[1]}, x, *more), embedded, before)
    row = read_out(module, seen(inputs), x)
    (own, _), pull, (noted, details) = jax.vjp(from_first, x, jnp.zeros_like(row), has_aux=True)
    gradient, rows = pull((jnp.ones_like(own), row))
    return Pass(rows, embedded, gradient, noted, details)


def _read(state: Any, inputs: Any) -> Blocks:
    """What a layer, or all of a block, sowed for a batch: [B, ...], in float32 at least."""
    sown = state["intermediates"]
    arrays = {**sown, **sown.get("attn", {})}
    read = {name: wide(arrays[name][0]) if name in arrays else None for name in Blocks._fields}
    return Blocks(**{**read, "seen": seen(inputs)})
