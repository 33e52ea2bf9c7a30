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
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.tokentm import attention_map, length
from tokentm_jax.programs.capture import as_before, heads_of
from tokentm_jax.programs.factors import added, at_tokens
from tokentm_jax.programs.flat import Step
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.one_pass import observed
from tokentm_jax.programs.passes import Block, Score, View, blocks_of, first_row, wide_type
from tokentm_jax.programs.running import Evaluation, Plan, Rules

Perception = Literal["head", "token"]  # how Beyond Intuition sums the heads


@jax.custom_vjp
def _attributed(attention: Array, u: Array, inside: Array) -> tuple[Array, Array, Array]:
    """Attention [H, N, N] unchanged, zeros of its shape, and zeros that are added to a stream u [N] of zeros.

    Backward, the cotangents are the gradient G of the attention, its relevance R, and a row r. That of u becomes
    `r mean_h relu(G * R)`, or zero where the block is not `inside`.
    """
    return attention, jnp.zeros_like(attention), jnp.zeros_like(u)


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

    def tap(attention: Any, evaluation: Evaluation, value: Array, u: Array, inside: Array) -> Any:
        heads, slot, zeros = _attributed(heads_of(attention, value), u, inside)
        evaluation.left[attention.weights] = slot
        return as_before(attention, heads, value), u + zeros, None

    def tap_of_second(attention: Any, evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
        slot = evaluation.first.left.pop(attention.weights)  # type: ignore[union-attr]
        return value + as_before(attention, slot, value), state, None

    taps: dict[int, Any] = {}
    of_second: dict[int, Any] = {structure.last: partial(observed, n)}
    for block, _ in blocks:
        attention: Any = block[0].attention
        taps[attention.weights] = partial(tap, attention)
        of_second[attention.weights] = partial(tap_of_second, attention)
        of_second[block[0].stream] = partial(observed, n)
    plan = Plan(model.rules, taps, whole=True, second=Plan(rules, of_second))
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
        fused = heads.mean(0) * weights
    else:
        influence = jnp.abs(jnp.einsum("hqk,hqj->hkj", heads, gradient.astype(rows.dtype))).mean((1, 2))
        fused = jnp.einsum("h,hqk->qk", influence / jnp.maximum(influence.sum(), 1e-30), heads)
    return gradient, jnp.where(inside, rows @ fused, 0), None, None


_perceived.defvjp(_perceived_forward, _perceived_backward)


def perception_rows(
    model: Model, params: Any, sample: Any, score: Score, variant: Perception, first_block: int = 0
) -> tuple[tuple[Array, Array], Any]:
    """Rows [R, N] of Beyond Intuition's attention perception P for one sample, with the read-out of each [R], and the
    outputs. Only of tokens that the head reads, where these are known."""
    structure, there = model.structure, seen(sample)
    n = structure.tokens
    readout = first_row(model, sample, structure.reading.flat.types[structure.embedded])
    read = np.flatnonzero(model.readout) if there is None else np.arange(n)
    taps: dict[int, Any] = {}

    def tap(block: Block, evaluation: Evaluation, value: Array, u: Array, inside: Array) -> Any:
        attention: Any = block[0].attention
        weights = jnp.ones(n, u.dtype)
        if variant == "token":
            view = View(evaluation, block, n, there, None)
            weights = length(view.transformed_value) / jnp.maximum(length(view.tokens), 1e-12)
        passed: Any = _perceived(variant, heads_of(attention, value), u, weights, inside)
        return as_before(attention, passed[0], value), u + passed[1], None

    extra: dict[int, Any] = {}
    for block, own_part in blocks_of(structure):
        number = block[0].attention.weights  # type: ignore[union-attr]
        taps[number], extra[number] = partial(tap, block), own_part(jnp.arange(structure.depth) >= first_block)

    def run(u: Array) -> Any:
        outputs, _, u = model.evaluate(params, sample, Plan(model.rules, taps, whole=True), extra, u)
        return (score(outputs), u), outputs

    identity = jnp.eye(n, dtype=readout.dtype)[read]
    found: Any = jax.vjp(run, jnp.zeros_like(identity), has_aux=True)
    (own, _), pull, outputs = found
    pulled = pull((jnp.ones_like(own), identity))
    return (pulled[0], readout[read]), outputs


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
