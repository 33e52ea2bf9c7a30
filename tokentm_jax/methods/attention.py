"""Methods that read attention, alone or with its gradient. Most carry a row through the blocks by one rule.

Each function is `(module, params, inputs, target, **options) -> (maps, details)`; see `tokentm_jax.methods.table`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Ge, Le, Lt
from jax import Array

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.maths.maps import token_map
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.scores import explained
from tokentm_jax.maths.tokentm import (
    Blocks,
    TokenTM,
    Weights,
    attention_update,
    block_update,
    block_weights,
    contributions,
    initial_contributions,
    propagate,
    sample_axes,
    token_length,
    transformed_attention,
)
from tokentm_jax.methods.stream import POLICIES, Memory, backward, forward, replaced, require_streams, streams
from tokentm_jax.models.capture import Trace, capture, zero_perturbations
from tokentm_jax.models.inputs import as_inputs, context, mean_of_seen, read_out, seen, values, with_values
from tokentm_jax.programs import passes
from tokentm_jax.programs.model import Found

OFF = TokenTM(length=False, direction="none", initialise=False, ffn=False, norms=False)  # GAE

Details = dict[str, Array]
Explanation = tuple[Array, Details]
Block = Annotated[int, Ge(0)]  # a block, counted from 0
Read = Literal["head", "mean", "pool"]  # how LeGrad reads the tokens of a block


def from_trace(module: Any, trace: Trace, rule: Callable[[Blocks, Array], Array]) -> Explanation:
    """Token maps of a batch by a rule for one sample, `rule(blocks, read-out [N]) -> row [N]`.

    The rule computes in float32 at least, whatever the model computes in.
    """

    blocks = wide_blocks(trace.blocks())
    rows = jax.vmap(rule, in_axes=(sample_axes(1), 0))(blocks, read_out(module, trace.seen, trace.score))
    return token_map(module, rows), trace.details()


def wide_blocks(blocks: Blocks) -> Blocks:
    return jax.tree.map(wide, blocks._replace(seen=None))._replace(seen=blocks.seen)


def check_blocks(depth: int, first_block: int, end_block: int | None = None) -> None:
    if not 0 <= first_block < depth:
        raise InputError(f"option 'first_block' must be from 0 to {depth - 1} for this model, got {first_block}")
    if end_block is not None and end_block > depth:
        raise InputError(f"option 'end_block' must be at most {depth} for this model, got {end_block}")


def tokentm(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    options: TokenTM,
    memory: Memory = "store",
) -> Explanation:
    """TokenTM; see `tokentm_jax.maths.tokentm`.

    `memory` is how to run it, with equal results: "store" what the linear maps of each block gave until the backward
    pass, for speed, or "recompute" it, for memory.
    """
    chosen = (options.first_block, options.end_block)
    if isinstance(module, Found) and not options.takes("gradient"):
        check_blocks(module.depth, *chosen)
        return _tokentm_of_function(module, params, inputs, target, options, memory)
    if not streams(module) or options.takes("gradient"):  # which a pass does not know on its way forward
        fields = options.uses(getattr(module, "post_norm", False))
        if "output_grad" in fields:
            fields = fields - {"output_grad"} | {"tokens", "token_grads", "final_tokens"}
        trace = capture(module, params, inputs, target, fields)
        check_blocks(len(trace.attention), *chosen)

        def rule(blocks: Blocks, row: Array) -> Array:
            return contributions(blocks, blocks.tokens[0] if options.initialise else None, row, options)

        return from_trace(module, trace, rule)
    check_blocks(module.depth, *chosen)

    def plain(block: Blocks) -> tuple[Array, Weights]:
        weights = block_weights(block, options)
        return transformed_attention(block.attention, None, weights.attention, options), weights

    model = (module, params, inputs, target)
    if options.attention != "plain":
        rows, embedded, _, _, details = backward(*model, options, memory)
    else:
        rows, embedded, details = forward(*model, plain, lambda row, known: block_update(row, *known), *chosen)
    rows = jax.vmap(partial(initial_contributions, options=options))(rows, wide(embedded))
    return token_map(module, rows), details


def _tokentm_of_function(
    found: Found, params: Any, inputs: Array, target: Any, options: TokenTM, memory: Memory
) -> Explanation:
    """TokenTM of a function that was read: its row is in the backward pass, or behind the forward pass."""
    if options.attention == "plain":

        def summary(view: passes.View) -> tuple[Array, Weights]:
            weights = view.weights(options)
            return transformed_attention(view.heads, None, weights.attention, options), weights

        one = lambda sample, target: passes.rows_behind(  # noqa: E731
            found,
            params,
            sample,
            target,
            summary,
            lambda row, known: block_update(row, *known),
            options.first_block,
            options.end_block,
        )
    else:
        one = lambda sample, target: passes.rows_inside(found, params, sample, target, options, POLICIES[memory])  # noqa: E731
    (rows, embedded, *_), details = found.per_sample(one, inputs, target)
    rows = jax.vmap(partial(initial_contributions, options=options))(rows, wide(embedded))
    return token_map(found, rows), details


def _from_attention(
    module: Any,
    params: Any,
    inputs: Array,
    target: Any,
    fuse: Callable[[Blocks], Array],
    update: Callable[[Array, Array], Array],
    first_block: int | None,
) -> Explanation:
    """Maps by a rule that knows of each block only `fuse` of its attention [H, N, N]; `first_block` None: the last
    alone."""
    if isinstance(module, Found):
        start = module.depth - 1 if first_block is None else first_block
        check_blocks(module.depth, start)
        of_view = lambda view: fuse(passes.NOTHING._replace(attention=view.heads))  # noqa: E731
        one = lambda sample, target: passes.rows_behind(module, params, sample, target, of_view, update, start)  # noqa: E731
        (rows, _), details = module.per_sample(one, inputs, target)
        return token_map(module, rows), details
    trace = None if streams(module) else capture(module, params, inputs, target, ["attention"])
    depth = module.depth if trace is None else len(trace.attention)
    start = depth - 1 if first_block is None else first_block
    check_blocks(depth, start)
    if trace is not None:
        of_block = lambda row, block: update(row, fuse(block))  # noqa: E731
        return from_trace(module, trace, lambda blocks, row: propagate(of_block, blocks, row, start))
    rows, _, details = forward(module, params, inputs, target, fuse, update, start)
    return token_map(module, rows), details


def raw_attention(module: nn.Module, params: Any, inputs: Array, target: Array | None) -> Explanation:
    """Mean attention of the last block, read as the head reads."""
    model = (module, params, inputs, target)
    return _from_attention(*model, lambda block: block.attention.mean(0), lambda row, fused: row @ fused, None)


def rollout(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    fusion: Literal["mean", "max", "min"] = "mean",
    discard_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0,
    normalise: bool = True,
    first_block: Block = 0,
) -> Explanation:
    """Attention rollout (Abnar & Zuidema, ACL 2020): the product of `rownorm(fuse_h(A) + I)` over blocks.

    `discard_ratio` in [0, 1) sets that share of each block's lowest fused attentions to zero first.
    """
    reduce = {"mean": jnp.mean, "max": jnp.max, "min": jnp.min}[fusion]

    def fuse(block: Blocks) -> Array:
        fused = reduce(block.attention, axis=0)
        if not discard_ratio:
            return fused
        ranked, least = fused, int(discard_ratio * fused.size)
        if block.seen is not None:  # of the attentions between tokens that are there
            ranked = jnp.where(block.seen & block.seen[:, None], fused, jnp.inf)
            least = jnp.int32(discard_ratio * jnp.square(block.seen.sum().astype(fused.dtype)))
        rank = ranked.ravel().argsort(stable=True).argsort(stable=True).reshape(fused.shape)
        return jnp.where(rank < least, 0, fused)

    def update(row: Array, fused: Array) -> Array:
        # A row of (A + I) / s: dividing the relevance of each query by its row sum s.
        return attention_update(row / (fused.sum(-1) + 1) if normalise else row, fused)

    return _from_attention(module, params, inputs, target, fuse, update, first_block)


def gae(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    first_block: Block = 0,
    memory: Memory = "store",
) -> Explanation:
    """Generic attention explainability (Chefer et al., ICCV 2021): `R <- R + mean_h relu(G * A_h) R` from R = I.

    It is TokenTM with every component off.
    """
    options = dataclasses.replace(OFF, first_block=first_block)
    return tokentm(module, params, inputs, target, options=options, memory=memory)


def grad_cam(module: nn.Module, params: Any, inputs: Array, target: Array | None) -> Explanation:
    """Grad-CAM on the last block's attention: heads weighted by their mean gradient in the read-out row."""
    trace = capture(module, params, inputs, target, ["attention", "attention_grad"])

    def rule(blocks: Blocks, row: Array) -> Array:
        attention, gradient = row @ blocks.attention[-1], row @ blocks.attention_grad[-1]  # [H, N]
        there = None if blocks.seen is None else blocks.seen[-1]
        weights = mean_of_seen(gradient[:, module.prefix :], there)
        return jax.nn.relu((weights[:, None] * attention).mean(0))

    return from_trace(module, trace, rule)


def grad_cam_tokens(module: nn.Module, params: Any, inputs: Array, target: Array | None) -> Explanation:
    """Grad-CAM on the patch tokens after the last block's first LayerNorm, as users of CAM libraries do."""
    trace = capture(module, params, inputs, target, ["normalised", "normalised_grads"])

    def one(features: Array, gradient: Array, there: Array | None) -> Array:
        features, gradient = wide(features), wide(gradient)
        return jax.nn.relu((features * mean_of_seen(gradient[module.prefix :], there, -2)).sum(-1))

    rows = jax.vmap(one)(trace.normalised[-1], trace.normalised_grads[-1], trace.seen)
    return token_map(module, rows), trace.details()


def attcat(module: nn.Module, params: Any, inputs: Array, target: Array | None) -> Explanation:
    """AttCAT (Qiang et al., NeurIPS 2022): token * gradient at each block's input, times the attention it gets."""
    trace = capture(module, params, inputs, target, ["attention", "tokens", "token_grads"])
    effect = (wide(trace.tokens) * wide(trace.token_grads)).sum(-1)  # [L, B, N]
    per_query = wide(trace.attention).mean(2)  # [L, B, N, N]
    received = jax.vmap(partial(mean_of_seen, axis=-2), (1, 0), 1)(per_query, trace.seen)
    return token_map(module, (received * effect).sum(0)), trace.details()


def legrad(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    read: Read = "head",
    first_block: Block = 0,
) -> Explanation:
    """LeGrad (Bousselham et al., ICCV 2025): `sum_l mean_{h,q} relu(d s_l / d A_l)`, s_l read from block l's output.

    `read` is how: by the model's "head"; from the "mean" of all tokens, as the published code does for CLIP; or by the
    attention "pool" without the norm before it, as it does for SigLIP: A_l is then the attention of the pool.
    """
    if isinstance(module, Found):
        if read != "head":
            raise Unfit("of a function only the whole head is known: LeGrad reads it with read='head'")
        check_blocks(module.depth, first_block)
        one = partial(passes.legrad_rows, module, params, first_block=first_block)
        rows, details = module.per_sample(one, inputs, target)
        return token_map(module, rows), details
    require_streams(module, "the method 'legrad' reads every block's tokens through the head")
    inputs = as_inputs(module, params, inputs)
    trace = capture(module, params, inputs, target, ["tokens", "final_tokens"])
    check_blocks(module.depth, first_block)
    if read == "pool":
        of_layer = legrad_of_pool(module, params, trace.target)
    else:
        of_layer = legrad_of_block(module, params, inputs, trace.target, read)
    layers = jax.tree.map(lambda a: a[first_block:], (params["blocks"], trace.tokens[:-1], trace.tokens[1:]))
    start = jnp.zeros_like(wide(trace.tokens[0, ..., 0]))
    rows, _ = jax.lax.scan(lambda sum, layer: (sum + of_layer(*layer), None), start, layers)
    return token_map(module, rows), trace.details()


def legrad_of_block(module: Any, params: Any, inputs: Any, target: Array, read: Read = "head") -> Callable[..., Array]:
    """`(a block's parameters, its input [B, N, D], ...) -> mean_{h,q} relu(d s_l / d A_l)` [B, N]: LeGrad's."""
    block, more, there = module.block(), context(inputs), seen(inputs)
    if read == "mean" and (there is not None or module.global_pool != "token" or module.distilled):
        raise Unfit("read='mean' puts the mean of all tokens in the class token's place, so it needs one that is read")
    shares: Any = slice(None)
    if there is None and read == "head":
        # Behind the attention tokens do not mix: those that the head does not read need not be computed.
        every = replaced(module, ["classify", "readout"])  # may read others
        shares = jnp.array([token for token, share in enumerate(module.readout) if share or every])

    def of_block(weights: Any, tokens: Array, *_: Array) -> Array:
        zeros = zero_perturbations(block, weights, tokens)["perturbations"]

        def class_score(change: Array) -> Array:
            variables = {"params": weights, "perturbations": {**zeros, "attn": {"attention": change}}}
            middle = block.apply(variables, tokens, *more, method="attend")
            after = jnp.zeros_like(tokens).at[:, shares].set(block.apply(variables, middle[:, shares], method="feed"))
            after = after.mean(1, keepdims=True) if read == "mean" else after
            logits = module.apply({"params": params}, after, *more, method="classify")
            return explained(logits, target)[0].sum()

        gradient = jax.nn.relu(wide(jax.grad(class_score)(zeros["attn"]["attention"])))
        return jax.vmap(partial(mean_of_seen, axis=-2))(gradient.mean(1), there)

    return of_block


def legrad_of_pool(module: Any, params: Any, target: Array) -> Callable[..., Array]:
    """`(..., a block's output [B, N, D]) -> mean_h relu(d s_l / d A)` [B, N], of the attention A of the pool."""
    if getattr(module, "global_pool", None) != "map":
        raise Unfit("read='pool' reads the attention of a pool, as SigLIP has, and this model has none")

    def of_block(weights: Any, before: Array, tokens: Array) -> Array:
        def class_score(change: Array) -> Array:
            rules = module.primitives._replace(attended=lambda attention: attention + change.astype(attention.dtype))
            logits = module.clone(primitives=rules).apply({"params": params}, tokens, method="pool")
            return explained(logits, target)[0].sum()

        b, n, _ = tokens.shape
        attention = jnp.zeros((b, module.num_heads, 1, n - module.prefix), wide(tokens).dtype)
        gradient = jax.nn.relu(jax.grad(class_score)(attention))
        return jnp.pad(gradient.mean((1, 2)), ((0, 0), (module.prefix, 0)))

    return of_block


def beyond_intuition(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    *,
    variant: Literal["head", "token"] = "head",
    steps: Annotated[int, Ge(1), Le(100_000)] = 20,
    from_zero: bool = False,
    first_block: Block = 0,
) -> Explanation:
    """Beyond Intuition (Chen et al., TMLR 2023): attention perception P, times the reasoning feedback F.

    `P <- P + A P` with `A = sum_h I_h A_h`, `I_h` proportional to `mean |A_h^T G_h|` (variant "head"), or with
    `A = mean_h A_h diag(||V_j W_O|| / ||x_j||)` (variant "token"); `F = mean_h relu(mean_k G_L(k x / steps))`, k from
    1 to steps. `from_zero` takes `linspace(0, 1, steps)` instead, as the published code does, which also begins at its
    fourth block (`first_block=3`).
    """
    weighted = ["tokens", "transformed_value"] if variant == "token" else []
    inputs = as_inputs(module, params, inputs)
    trace = capture(module, params, inputs, target, ["attention", "attention_grad", *weighted])
    check_blocks(len(trace.attention), first_block)

    def gradient_at(share: Array) -> Array:
        numbers = values(inputs)
        point = with_values(inputs, numbers * share.astype(numbers.dtype))
        return wide(capture(module, params, point, trace.target, ["attention_grad"]).attention_grad[-1])

    shares = jnp.arange(1, steps + 1, dtype=jnp.float32) / steps
    shares = jnp.linspace(0, 1, steps, dtype=jnp.float32) if from_zero else shares
    start = jnp.zeros_like(wide(trace.attention_grad[-1]))
    total, _ = jax.lax.scan(lambda total, share: (total + gradient_at(share), None), start, shares)
    feedback = jax.nn.relu(total / steps).mean(1)  # [B, N, N]

    def update(rows: Array, block: Blocks) -> Array:
        if variant == "token":
            weights = token_length(block.transformed_value) / jnp.maximum(token_length(block.tokens), 1e-12)
            return attention_update(rows, block.attention.mean(0) * weights)
        influence = jnp.abs(jnp.einsum("hqk,hqj->hkj", block.attention, block.attention_grad)).mean((1, 2))
        influence = influence / jnp.maximum(influence.sum(), 1e-30)
        return attention_update(rows, jnp.einsum("h,hqk->qk", influence, block.attention))

    def one(blocks: Blocks, feedback: Array, row: Array) -> Array:
        # Where the head reads several tokens, F and P multiply before they are read, so P is needed for each.
        identity = jnp.eye(len(row), dtype=row.dtype)
        return row @ (feedback * propagate(update, blocks, identity, first_block))

    readout = read_out(module, trace.seen, feedback)
    rows = jax.vmap(one, in_axes=(sample_axes(1), 0, 0))(wide_blocks(trace.blocks()), feedback, readout)
    return token_map(module, rows), trace.details()
