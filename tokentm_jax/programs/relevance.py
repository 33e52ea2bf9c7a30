"""Rows of relevance by rules: Transformer Attribution, FullGrad+, and the relevance of positions.

All functions are for one sample.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.inputs.values import seen, values, with_values
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.tokentm import attention_map
from tokentm_jax.programs.capture import as_before, heads_of
from tokentm_jax.programs.flat import Step
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.one_pass import observed
from tokentm_jax.programs.passes import Score, blocks_of, first_row, wide_type
from tokentm_jax.programs.running import Evaluation, Plan, Rules


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


def full_gradient_rows(model: Model, params: Any, sample: Any, score: Score) -> tuple[tuple[Array, Array], Any]:
    """FullGrad+'s row for one sample by the model's rules: tokens and biases times gradients, mean over blocks.

    Every token and bias has a factor 1 + share * u [N]; the derivative by u is the row. Returns (row, sum of the row
    minus the score) and the outputs.
    """
    structure = model.structure
    n, depth = structure.tokens, structure.depth
    kind = structure.reading.flat.types[structure.embedded]
    readout = None if seen(sample) is None else first_row(model, sample, kind)
    taps: dict[int, Any] = {}
    for reading in {structure.reading, *(stage.reading for stage in structure.stages)}:
        for step in reading.flat.steps:
            if step.kind == "bias" and step.outputs[0] in structure.rows:
                taps[step.outputs[0]] = partial(_with_factor, step, structure.rows[step.outputs[0]], readout, depth)
    for stage in structure.stages:
        taps |= {block[0].stream: partial(_scaled_stream, depth, n) for block in stage.blocks}

    def run(u: Array) -> tuple[Array, Any]:
        outputs, _, _ = model.evaluate(params, sample, Plan(model.rules, taps), None, (u, jnp.int32(0)))
        own = score(outputs)
        return own, (own, outputs)

    row, (own, outputs) = jax.grad(run, has_aux=True)(jnp.zeros(n, wide_type(kind)))
    return (row, row.sum() - own), outputs


def _scaled_stream(depth: int, n: int, evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
    """The tokens that enter a block, times their factor. The block then counts for the shares of biases."""
    u, index = state
    shape = [1] * value.ndim
    shape[-2] = n
    return (wide(value) * (1 + u / depth).reshape(shape)).astype(value.dtype), (u, index + 1), None


def _with_factor(
    step: Step, rows: Any, readout: Array | None, depth: int, evaluation: Evaluation, value: Array, state: Any, _: Any
) -> Any:
    """A sum with a bias times its factor, whose share is that of the blocks before it.

    After the head has read the tokens, the factor is that of the read tokens: by `readout` [N] if it depends on the
    sample.
    """
    u, index = state
    share = index.astype(u.dtype) / depth
    if isinstance(rows, tuple):
        factor = _at_tokens(rows, u, value)
    else:
        factor = (jnp.asarray(rows, u.dtype) if readout is None else readout) @ u
    return (wide(value) + _added(step, evaluation) * (factor * share)).astype(value.dtype), state, None


def _added(step: Step, evaluation: Evaluation) -> Array:
    """What a step adds to its value, with its sign."""
    added = wide(evaluation.get(step.inputs[1 - step.of]))
    return -added if step.name == "sub" and step.of == 0 else added


def _at_tokens(rows: tuple[Any, Any], u: Array, value: Array) -> Array:
    """Factors u [N] of the tokens at their places in a value."""
    axis, shares = rows
    if isinstance(axis, slice):
        return u[axis].reshape(shares)
    shape = [1] * value.ndim
    shape[axis] = len(shares)
    every = len(shares) == len(u) and (shares == np.eye(len(u))).all()
    return (u if every else jnp.asarray(shares, u.dtype) @ u).reshape(shape)


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
    return (wide(value) + _added(step, evaluation) * _at_tokens(rows, u, value)).astype(value.dtype), u, None


def _turned(rows: Any, evaluation: Evaluation, value: Array, u: Any, extra: Any) -> Any:
    """A product with a rotary position: half of its relevance is for the position."""
    half, factor = wide(value) / 2, _at_tokens(rows, u, value)
    return (half + jax.lax.stop_gradient(half) * (1 + factor)).astype(value.dtype), u, None
