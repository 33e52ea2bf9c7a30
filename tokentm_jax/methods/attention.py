"""Methods that read attention, with or without its gradient. Most carry a row through the blocks by one rule.

Each function is `(model, params, inputs, target, **options) -> (maps, details)`; see `tokentm_jax.methods.table`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le, Lt
from jax import Array

from tokentm_jax.errors import Unfit
from tokentm_jax.inputs.values import mean_of_seen, seen, token_map, values, with_values
from tokentm_jax.maths.primitives import mean_of_heads, wide
from tokentm_jax.maths.variants import TokenTM, initialised
from tokentm_jax.methods.sharing import Details, Explanation, Share, alone
from tokentm_jax.programs import passes
from tokentm_jax.programs.capture import capture, check_blocks, of_sample, plus_extra
from tokentm_jax.programs.model import Applied, Function, Model
from tokentm_jax.programs.one_pass import Pass, Wanted, one_pass
from tokentm_jax.programs.passes import Score, View
from tokentm_jax.programs.relevance import Perception, perception_rows, reads_one
from tokentm_jax.programs.running import Plan

OFF = TokenTM(length=False, direction="none", initialise=False, ffn=False, norms=False)  # GAE

Block = Annotated[int, Ge(0)]  # a block, counted from 0
Read = Literal["head", "mean", "pool"]  # how LeGrad reads the tokens of a block


def tokentm_share(*, options: TokenTM) -> Share | None:
    """TokenTM as a part of one pass; None for options that need a gradient before the pass."""
    if options.takes("gradient"):
        return None

    def explain(model: Model, inputs: Any, done: Pass, details: Details) -> Explanation:
        check_blocks(model, options.first_block, options.end_block)
        rows = jax.vmap(partial(initialised, options=options))(done.rows[0], wide(done.embedded))
        return token_map(model, rows), details

    return Share(Wanted(rows=(options,)), explain)


def tokentm(model: Model, params: Any, inputs: Any, target: Any, *, options: TokenTM) -> Explanation:
    """TokenTM; see `tokentm_jax.maths.tokentm` and, for the options, `variants`."""
    check_blocks(model, options.first_block, options.end_block)
    share = tokentm_share(options=options)
    if share is not None:
        return alone(share, _for_row(model) if options.attention == "plain" else model, params, inputs, target)

    def one(sample: Any, score: Score) -> tuple[tuple[Array, Array], Any]:
        known, _ = of_sample(model, params, sample, score, ("token_grads", "final_tokens"))
        wanted = Wanted(rows=(options,))
        done, outputs = one_pass(model, params, sample, score, wanted, known["token_grads"][1:])
        return (done.rows[0], done.embedded), outputs

    (rows, embedded), details = model.per_sample(one, inputs, target)
    rows = jax.vmap(partial(initialised, options=options))(rows, wide(embedded))
    return token_map(model, rows), details


def _for_row(model: Model) -> Model:
    """The model for a row without a gradient, which reads less of a block than `memory="store"` would store."""
    return model.storing(None) if model.memory == "store" else model


def _from_attention(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    fuse: Callable[[View, Array], Array],
    update: Callable[[Array, Array, Array], Array],
    first_block: int,
    whole: bool = False,
) -> Explanation:
    """Maps by a rule on each block's attention, see `passes.row_behind`."""
    check_blocks(model, first_block)
    take = partial(passes.row_behind, _for_row(model), params)
    one = lambda sample, _: take(sample, fuse, update, first_block, whole)  # noqa: E731
    rows, details = model.per_sample(one, inputs, target)
    return token_map(model, rows), details


def raw_attention(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Mean attention of the last block, in the rows that the head reads."""
    fuse, update = lambda _, attention: mean_of_heads(attention), lambda u, given, total: given
    return _from_attention(model, params, inputs, target, fuse, update, model.structure.depth - 1)


def value_zeroing(model: Model, params: Any, inputs: Any, target: Any, *, first_block: Block = 0) -> Explanation:
    """Value zeroing (Mohebbi et al., EACL 2023): the product over blocks of how much each token changes if the value
    of another one is zero, with rows that sum to 1. The residual sum is in these changes, so no identity is added."""
    fuse, update = passes.value_zeroing_of, lambda u, given, total: given / jnp.where(total > 0, total, 1)
    return _from_attention(model, params, inputs, target, fuse, update, first_block, whole=True)


def rollout(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    fusion: Literal["mean", "max", "min"] = "mean",
    discard_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0,
    normalise: bool = True,
    first_block: Block = 0,
) -> Explanation:
    """Attention rollout (Abnar & Zuidema, ACL 2020): the product of `rownorm(fuse_h(A) + I)` over blocks.

    First, the share `discard_ratio` in [0, 1) of each block's lowest fused attentions becomes zero.
    """
    of_heads = {"mean": mean_of_heads, "max": partial(jnp.max, axis=0), "min": partial(jnp.min, axis=0)}[fusion]

    def fuse(block: View, attention: Array) -> Array:
        fused = of_heads(attention)
        if not discard_ratio:
            return fused
        ranked, least = fused, int(discard_ratio * fused.size)
        if block.seen is not None:  # only attentions between present tokens count
            ranked = jnp.where(block.seen & block.seen[:, None], fused, jnp.inf)
            least = jnp.int32(discard_ratio * jnp.square(block.seen.sum().astype(fused.dtype)))
        rank = ranked.ravel().argsort(stable=True).argsort(stable=True).reshape(fused.shape)
        return jnp.where(rank < least, 0, fused)

    def update(u: Array, given: Array, total: Array) -> Array:
        return (u + given) / (total + 1) if normalise else u + given

    return _from_attention(model, params, inputs, target, fuse, update, first_block, whole=discard_ratio > 0)


def gae_share(*, first_block: Block = 0) -> Share | None:
    """GAE as a part of one pass."""
    return tokentm_share(options=dataclasses.replace(OFF, first_block=first_block))


def gae(model: Model, params: Any, inputs: Any, target: Any, *, first_block: Block = 0) -> Explanation:
    """Generic attention explainability (Chefer et al., ICCV 2021): `R <- R + mean_h relu(G * A_h) R` from R = I.

    It is TokenTM without its components.
    """
    return tokentm(model, params, inputs, target, options=dataclasses.replace(OFF, first_block=first_block))


def grad_cam(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Grad-CAM on the last block's attention: heads weighted by their mean gradient in the read-out row."""

    def one(sample: Any, score: Score) -> tuple[Array, Any]:
        (attention, gradient), outputs = passes.of_last_attention(model, params, sample, score)
        weights = mean_of_seen(gradient[:, model.prefix :], seen(sample))
        return jax.nn.relu((weights[:, None] * attention).mean(0)), outputs

    rows, details = model.per_sample(one, inputs, target)
    return token_map(model, rows), details


def grad_cam_tokens(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """Grad-CAM on the patch tokens after the last block's first LayerNorm, as usual with CAM libraries."""
    last = model.structure.depth - 1
    trace: Any = capture(model, params, inputs, target, ["normalised", "normalised_grads"], first_block=last)

    def one(features: Array, gradient: Array, there: Array | None) -> Array:
        features, gradient = wide(features), wide(gradient)
        return jax.nn.relu((features * mean_of_seen(gradient[model.prefix :], there, -2)).sum(-1))

    rows = jax.vmap(one)(trace.normalised[-1], trace.normalised_grads[-1], trace.seen)
    return token_map(model, rows), trace.details()


def attcat_share() -> Share:
    """AttCAT as a part of one pass."""

    def explain(model: Model, inputs: Any, done: Pass, details: Details) -> Explanation:
        return token_map(model, (done.received * done.effects[:, :-1]).sum(1)), details

    return Share(Wanted(effects=True, received=True), explain)


def attcat(model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """AttCAT (Qiang et al., NeurIPS 2022): token * gradient at each block's input, times the attention it gets."""
    return alone(attcat_share(), model, params, inputs, target)


def legrad_share(*, read: Read = "head", first_block: Block = 0) -> Share | None:
    """LeGrad as a part of one pass, in its default form."""
    if read != "head" or first_block:
        return None
    explain = lambda model, _, done, details: (token_map(model, done.legrad), details)  # noqa: E731
    return Share(Wanted(legrad=True), explain, anywhere=True)


def legrad(
    model: Model, params: Any, inputs: Any, target: Any, *, read: Read = "head", first_block: Block = 0
) -> Explanation:
    """LeGrad (Bousselham et al., ICCV 2025): `sum_l mean_{h,q} relu(d s_l / d A_l)`, s_l read from block l's output.

    `read` specifies what reads it: the model's "head", the "mean" of all tokens (as in the published code for CLIP),
    or the attention "pool" without the norm before it (as there for SigLIP; A_l is then the attention of the pool).
    """
    check_blocks(model, first_block)
    if read == "pool":
        return _legrad_of_pool(model, params, inputs, target, first_block)
    if read == "mean" and (seen(inputs) is not None or max(model.readout) < 1):
        raise Unfit("read='mean' replaces the class token by the mean of all tokens: the head must read a class token")
    target = model.settled(params, inputs, target)
    one = partial(passes.legrad_rows, model, params, first_block=first_block, read=read)
    rows, details = model.per_sample(one, inputs, target)
    return token_map(model, rows), details


def _legrad_of_pool(model: Model, params: Any, inputs: Any, target: Any, first_block: int) -> Explanation:
    """LeGrad by the attention of SigLIP's pool: `sum_l mean_h relu(d s_l / d A)`."""
    module = model.source.module
    if getattr(module, "global_pool", None) != "map":
        raise Unfit("read='pool' reads the attention of a pool, as in SigLIP, and this model has none")
    trace: Any = capture(model, params, inputs, target, ["tokens", "final_tokens"])
    after = trace.tokens[first_block + 1 :]
    without_norm = module if module.fc_norm else module.clone(final_norm=False)
    pool = Function(Applied(without_norm, "classify")).read(params, after[0])
    (mix,) = pool.reading.attentions
    kind = pool.reading.flat.types[mix.of]

    def one(tokens: Array, score: Score) -> tuple[Array, Any]:
        plan = Plan(taps={mix.of: plus_extra})

        def run(change: Array) -> tuple[Array, Any]:
            outputs = pool.evaluate(params, tokens, plan, {mix.of: change}, None)[0]
            return score(outputs), outputs

        gradient, outputs = jax.grad(run, has_aux=True)(jnp.zeros(kind.shape, kind.dtype))
        row = jax.nn.relu(wide(gradient)).reshape(-1, kind.shape[-1]).mean(0)
        return jnp.pad(row, (model.prefix, 0)), outputs

    def of_block(total: Array, tokens: Array) -> tuple[Array, None]:
        return total + pool.per_sample(one, tokens, trace.target)[0], None

    rows, _ = jax.lax.scan(of_block, jnp.zeros_like(wide(after[0, ..., 0])), after)
    return token_map(model, rows), trace.details()


def beyond_intuition(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    variant: Perception = "head",
    steps: Annotated[int, Ge(1), Le(100_000)] = 20,
    from_zero: bool = False,
    first_block: Block = 0,
) -> Explanation:
    """Beyond Intuition (Chen et al., TMLR 2023): attention perception P, times the reasoning feedback F.

    `P <- P + A P` with `A = sum_h I_h A_h`, `I_h` proportional to `mean |A_h^T G_h|` (variant "head"), or with
    `A = mean_h A_h diag(||V_j W_O|| / ||x_j||)` (variant "token"); `F = mean_h relu(mean_k G_L(k x / steps))`, k from
    1 to steps. `from_zero` uses `linspace(0, 1, steps)` instead, as the published code does, which also starts at the
    fourth block (`first_block=3`).
    """
    check_blocks(model, first_block)
    take = partial(perception_rows, model, params, variant=variant, first_block=first_block)
    (perception, readout), details = model.per_sample(take, inputs, target)
    last, there = model.structure.depth - 1, seen(inputs)
    of_last = partial(passes.of_last_attention, model, params)

    def gradient_at(share: Array) -> Array:
        """In the rows of tokens that the head reads, [B, H, R, N]."""
        numbers = values(inputs)
        point = with_values(inputs, numbers * share.astype(numbers.dtype))
        if reads_one(model, there):
            return model.per_sample(of_last, point, details["target"])[0][:, 1, :, None]
        found: Any = capture(model, params, point, details["target"], ["attention_grad"], first_block=last)
        read = np.flatnonzero(model.readout) if there is None else slice(None)
        return wide(found.attention_grad[-1])[:, :, read]

    shares = jnp.arange(1, steps + 1, dtype=jnp.float32) / steps
    shares = jnp.linspace(0, 1, steps, dtype=jnp.float32) if from_zero else shares
    kind = jax.eval_shape(gradient_at, shares[0])
    start = jnp.zeros(kind.shape, kind.dtype)
    total, _ = jax.lax.scan(lambda total, share: (total + gradient_at(share), None), start, shares)
    feedback = jax.nn.relu(total / steps).mean(1)
    # If the head reads several tokens, F and P are multiplied before they are read.
    rows = jnp.einsum("br,brn->bn", readout, feedback * perception)
    return token_map(model, rows), details
