"""Rows of Transformer Attribution, Beyond Intuition, and the relevance of positions.

All functions are for one sample.
"""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.inputs.values import seen, values, with_values
from tokentm_jax.maths.primitives import mean_of_heads, wide
from tokentm_jax.maths.tokentm import attention_map, length
from tokentm_jax.maths.variants import attention_layer
from tokentm_jax.programs import pieces
from tokentm_jax.programs.capture import as_before, heads_of, unmixed, values_of
from tokentm_jax.programs.factors import added, at_tokens
from tokentm_jax.programs.flat import Step
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.one_pass import PLAIN, observed
from tokentm_jax.programs.passes import Block, Score, View, blocks_of, first_row, wide_type
from tokentm_jax.programs.rules import halved
from tokentm_jax.programs.running import Evaluation, Plan, Rules

Perception = Literal["head", "token"]  # how Beyond Intuition sums the heads


@jax.custom_vjp
def _attributed(attention: Array, u: Array, inside: Array) -> tuple[Array, Array, Array]:
    """Attention [H, Q, N] unchanged, zeros of its shape, and zeros [Q] that are added to a stream u [N] of zeros.

    Backward, the cotangents are the gradient G of the attention, its relevance R, and a row r. That of u becomes
    `r mean_h relu(G * R)`, or zero where the block is not `inside`.
    """
    return attention, jnp.zeros_like(attention), jnp.zeros(attention.shape[1], u.dtype)


def _attributed_backward(inside: Array, cotangents: tuple[Array, Array, Array]) -> tuple[Array, Array, None]:
    gradient, relevance, row = cotangents
    return gradient, jnp.where(inside, row @ attention_map(relevance, gradient), 0), None


_attributed.defvjp(lambda attention, u, inside: (_attributed(attention, u, inside), inside), _attributed_backward)


def attribution_rows(
    model: Model, rules: Rules, params: Any, sample: Any, score: Score, first_block: int = 0
) -> tuple[tuple[Array, Array], Any]:
    """Transformer Attribution's row [N] for one sample, the relevance [L+1, N] by the rules, and the outputs.

    One forward pass, and two backward passes block by block: that of the gradient, and that of the relevance.
    """
    structure = model.structure
    n, depth = structure.tokens, structure.depth
    blocks = [*blocks_of(structure)]

    def attended(attention: Any, evaluation: Evaluation, u: Array, inside: Array) -> Any:
        def of_queries(value: Array) -> tuple[Array, Array]:
            heads, slot, zeros = _attributed(heads_of(attention, value), u, inside)
            evaluation.left[attention.weights] = slot
            return as_before(attention, heads, value), zeros

        return of_queries, lambda zeros: u + zeros

    def attended_in_second(attention: Any, evaluation: Evaluation, state: Any, extra: Any) -> Any:
        def of_queries(value: Array) -> tuple[Array, None]:
            slot = evaluation.first.left.pop(attention.weights)  # type: ignore[union-attr]
            return value + as_before(attention, slot, value), None

        return of_queries, lambda _: state

    by_queries, of_second = {}, {}
    taps: dict[int, Any] = {structure.last: partial(observed, n)}
    for block, _ in blocks:
        attention: Any = block[0].attention
        by_queries[attention.weights] = partial(attended, attention)
        of_second[attention.weights] = partial(attended_in_second, attention)
        taps[block[0].stream] = partial(observed, n)
    plan = Plan(model.rules, by_queries=by_queries, second=Plan(rules, taps, by_queries=of_second))
    inside = jnp.arange(depth) >= first_block

    def run(numbers: Array, carried: Array, u: Array) -> Any:
        extra: dict[int, Any] = {structure.last: {"seeds": {"carried": carried[-1]}}}
        for block, own_part in blocks:
            extra[block[0].attention.weights] = own_part(inside)  # type: ignore[union-attr]
            extra[block[0].stream] = {"seeds": {"carried": own_part(carried[:-1])}}
        outputs, _, u = model.evaluate(params, with_values(sample, numbers), plan, extra, u)
        return (*map(score, outputs), u), outputs[0]

    readout = first_row(model, sample, structure.reading.flat.types[structure.embedded])
    zeros = jnp.zeros((depth + 1, n), readout.dtype)
    # The rules are inside this pass down to the input, so that the map has a true derivative.
    (own, *_), pull, outputs = jax.vjp(run, values(sample), zeros, jnp.zeros_like(readout), has_aux=True)
    _, relevance, row = pull((jnp.ones_like(own), jnp.ones_like(own), readout))
    return (row, relevance), outputs


def reads_one(model: Model, there: Array | None) -> bool:
    """Whether the head reads one token, in texts without padding and so in others; `there` are the present tokens."""
    if there is None:
        return np.count_nonzero(model.readout) == 1
    with jax.ensure_compile_time_eval():
        return np.count_nonzero(model.reads(jnp.ones((1, model.structure.tokens), bool))) == 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _perceived(variant: Perception, attention: Array, u: Array, weights: Array, inside: Array) -> tuple[Array, Array]:
    """Attention [H, N, N] unchanged, and zeros that are added to streams u [R, N] of zeros.

    Backward, the cotangents are the gradient G of the attention, and rows P. That of u becomes `P A` of Beyond
    Intuition, or zero where the block is not `inside`.
    """
    return attention, jnp.zeros_like(u)


def _perceived_forward(variant: Perception, attention: Array, u: Array, weights: Array, inside: Array) -> Any:
    return (attention, jnp.zeros_like(u)), (attention, weights, inside)


def _perceived_backward(variant: Perception, saved: tuple[Array, ...], cotangents: tuple[Array, Array]) -> Any:
    (attention, weights, inside), (gradient, rows) = saved, cotangents
    heads = attention.astype(rows.dtype)
    if variant == "token":
        fused = mean_of_heads(heads) * weights
    else:
        influence = jnp.abs(jnp.einsum("hqk,hqj->hkj", heads, gradient.astype(rows.dtype))).mean((1, 2))
        fused = jnp.einsum("h,hqk->qk", influence / jnp.maximum(influence.sum(), 1e-30), heads)
    return gradient, jnp.where(inside, rows @ fused, 0), None, None


_perceived.defvjp(_perceived_forward, _perceived_backward)


@jax.custom_vjp
def _given(attention: Array, given: Array, value: Array) -> tuple[Array, Array, Array]:
    """Attention [H, Q, N] of some queries unchanged, zeros [Q] of a stream, and zeros [Q, H, E].

    Backward, the cotangents are the gradient of the attention, a row r, and the gradient O of attention times values.
    Those of the streams `given` [H, N] and of the values [H, N, E] become `r A_h` and `A_h^T O_h`.
    """
    heads, queries, _ = attention.shape
    return attention, jnp.zeros(queries, given.dtype), jnp.zeros((queries, heads, value.shape[-1]), value.dtype)


def _given_backward(attention: Array, cotangents: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    gradient, row, of_tokens = cotangents
    given = jnp.einsum("q,hqk->hk", row, attention.astype(row.dtype))
    return gradient, given, jnp.einsum("hqk,qhe->hke", attention, of_tokens)


_given.defvjp(lambda attention, given, value: (_given(attention, given, value), attention), _given_backward)


@jax.custom_vjp
def _by_influence(u: Array, value: Array, inside: Array) -> tuple[Array, Array]:
    """A stream u [N] of zeros for each head [H, N], and the values V [H, N, E].

    Backward, the cotangents are `r A_h` and `A_h^T O_h`. That of u becomes `sum_h I_h r A_h`, or zero where the block
    is not `inside`. `I_h` is proportional to `mean |A_h^T G_h|`, where the gradient G of the attention is `O_h V_h^T`.
    """
    return jnp.broadcast_to(u, value.shape[:2]), value


def _by_influence_backward(saved: tuple[Array, Array], cotangents: tuple[Array, Array]) -> Any:
    (value, inside), (given, received) = saved, cotangents
    value, received = value.astype(given.dtype), jnp.moveaxis(received.astype(given.dtype), 1, 0)
    of_key = lambda own: jnp.abs(jnp.einsum("he,hje->hj", own, value)).sum(-1)  # noqa: E731
    rows = max(1, pieces.ENTRIES // math.prod(value.shape[:2]))
    influence = jax.lax.map(of_key, received, batch_size=rows).sum(0)
    return jnp.where(inside, influence / jnp.maximum(influence.sum(), 1e-30) @ given, 0), None, None


_by_influence.defvjp(
    lambda u, value, inside: (_by_influence(u, value, inside), (value, inside)), _by_influence_backward
)


@jax.custom_vjp
def _with_gradient(x: Array, zeros: Array) -> Array:
    """x. Backward, its gradient is also the cotangent of the zeros."""
    return x


_with_gradient.defvjp(lambda x, zeros: (x, None), lambda _, g: (g, g))


def perception_rows(
    model: Model, params: Any, sample: Any, score: Score, variant: Perception, first_block: int = 0
) -> tuple[tuple[Array, Array], Any]:
    """Rows [R, N] of Beyond Intuition's attention perception P for one sample, with the read-out of each [R], and the
    outputs. Only of tokens that the head reads, where these are known."""
    structure, there = model.structure, seen(sample)
    n, one = structure.tokens, reads_one(model, there)
    readout = first_row(model, sample, structure.reading.flat.types[structure.embedded])
    read = np.flatnonzero(model.readout) if there is None else np.arange(n)
    by_queries: dict[int, Any] = {}
    taps: dict[int, Any] = {}
    extra: dict[int, Any] = {}

    def attended(block: Block, evaluation: Evaluation, u: Array, inside: Array) -> Any:
        layer: Any = block[0].attention
        whole, weights = layer.product not in evaluation.pieces, jnp.ones(n, u.dtype)
        if variant == "token":
            view = View(evaluation, block, n, there, None)
            weights = length(view.transformed_value) / jnp.maximum(length(view.tokens), 1e-12)
        elif not whole:
            own = values_of(layer, evaluation.function([], layer.value)())
            given = _by_influence(u[0], own, inside)

        def of_queries(value: Array) -> tuple[Array, Any]:
            heads = heads_of(layer, value)
            if whole:
                passed: Any = _perceived(variant, heads, u, weights, inside)
            elif variant == "token":
                passed = attention_layer(PLAIN, heads, u[0], jnp.where(inside, weights, 0))
            else:
                passed = _given(heads, *given)
            return as_before(layer, passed[0], value), passed[1:]

        def after(zeros: tuple[Array, ...]) -> Array:
            evaluation.left[layer.output] = zeros[1:]
            return u + zeros[0]

        return of_queries, after

    def mixed(layer: Any, evaluation: Evaluation, value: Array, u: Array, extra: Any) -> Any:
        for zeros in evaluation.left.pop(layer.output):
            value = _with_gradient(value, unmixed(layer, jnp.moveaxis(zeros, 0, 1)))
        return value, u, None

    # In pieces, each head has a stream, and the gradient of attention must follow from that of attention times values.
    plain = model.rules.get("mix") in (None, halved)
    for block, own_part in blocks_of(structure):
        layer: Any = block[0].attention
        by_queries[layer.weights], taps[layer.output] = partial(attended, block), partial(mixed, layer)
        extra[layer.weights] = own_part(jnp.arange(structure.depth) >= first_block)
        plain = plain and layer.product.of == layer.weights
    whole = not (one and (plain or variant == "token"))
    plan = Plan(model.rules, taps, by_queries=by_queries, whole=whole)

    def run(u: Array) -> Any:
        outputs, _, u = model.evaluate(params, sample, plan, extra, u)
        return (score(outputs), u), outputs

    rows, shares = (
        (readout[None], jnp.ones(1, readout.dtype)) if one else (jnp.eye(n, dtype=readout.dtype)[read], readout[read])
    )
    found: Any = jax.vjp(run, jnp.zeros_like(rows), has_aux=True)
    (own, _), pull, outputs = found
    pulled = pull((jnp.ones_like(own), rows))
    return (pulled[0], shares), outputs


def position_rows(model: Model, params: Any, sample: Any, score: Score) -> tuple[tuple[Array, Array], Any]:
    """The relevance of positions by the model's rules, for one sample: the row [N], the gradient at the input, and the
    outputs.

    A position that is added has a factor 1 + u of its token; the derivative by u is its relevance. A rotation is a
    product of a query or key with its angle, so each gets half.
    """
    structure, taps = model.structure, {}
    n, patches = structure.tokens, math.prod(model.grid or (structure.tokens,))
    for reading in {structure.reading, *(stage.reading for stage in structure.stages)}:
        turned = {number for step in reading.flat.steps if step.kind == "turn" for number in step.inputs}
        for step in reading.flat.steps:
            out = step.outputs[0]
            rows = structure.rows.get(out)
            if rows is None and reading.descends(structure.embedded, out):  # before the first block, with D last
                shape = reading.flat.types[out].shape[:-1]
                first = {n: 0, patches: model.prefix}.get(math.prod(shape))
                rows = None if first is None else (slice(first, first + math.prod(shape)), (*shape, 1))
            if not isinstance(rows, tuple):  # not tokens, but mixtures of them
                continue
            if step.kind == "position":
                taps[out] = partial(_with_position, step, rows)
            elif step.kind == "scale" and out in turned:
                taps[out] = partial(_turned, rows)

    def run(u: Array, numbers: Array) -> tuple[Array, Any]:
        plan = Plan(model.rules, taps)
        outputs = model.evaluate(params, with_values(sample, numbers), plan, None, u)[0]
        return score(outputs), outputs

    kind = wide_type(structure.reading.flat.types[structure.embedded])
    return jax.grad(run, (0, 1), has_aux=True)(jnp.zeros(n, kind), values(sample))


def _with_position(step: Step, rows: Any, evaluation: Evaluation, value: Array, u: Any, extra: Any) -> Any:
    """A sum with a position, which has its factor."""
    return (wide(value) + added(step, evaluation) * at_tokens(rows, u, value)).astype(value.dtype), u, None


def _turned(rows: Any, evaluation: Evaluation, value: Array, u: Any, extra: Any) -> Any:
    """A product with a rotary position: half of its relevance is for the position."""
    half, factor = wide(value) / 2, at_tokens(rows, u, value)
    return (half + jax.lax.stop_gradient(half) * (1 + factor)).astype(value.dtype), u, None
