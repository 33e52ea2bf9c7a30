"""Rules that run inside the forward pass of a model, block by block, and what reads one block of it.

All functions are for one sample.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from tokentm_jax.inputs.values import read_out, seen, values, with_values
from tokentm_jax.maths.primitives import mean_of_heads, wide
from tokentm_jax.maths.variants import attention_stream
from tokentm_jax.programs import pieces
from tokentm_jax.programs.capture import (
    POINTS,
    as_before,
    heads_of,
    of_blocks,
    through_output,
    values_of,
)
from tokentm_jax.programs.flat import bind
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.running import WEIGHTS, Evaluation, Plan
from tokentm_jax.programs.structure import Layer, Structure
from tokentm_jax.programs.tokens import for_tokens

Block = list[Layer]
Score = Callable[[Any], Array]  # of one sample's outputs


class View:
    """One block of an evaluation with the fields of `Blocks`, which are computed when they are read."""

    attention_grad = None

    def __init__(self, evaluation: Evaluation, block: Block, count: int, there: Array | None, gradient: Any) -> None:
        self.evaluation, self.block, self.count = evaluation, block, count
        self.layer: Any = block[0].attention
        self.seen, self.output_grad = there, gradient

    def __getattr__(self, name: str) -> Array:
        """The fields [N, D], and x~ of the attention layer."""
        if name == "transformed_value":
            return self._through(values_of(self.layer, self._value(self.layer.value)))
        if name not in POINTS:
            raise AttributeError(name)
        return self.rows(POINTS[name](self.evaluation.reading, self.block))

    def _value(self, number: int) -> Array:
        """A value of the program in its layout."""
        return self.evaluation.function([], number)()

    def rows(self, number: Any) -> Array:
        """A value of the program as tokens [N, D], in float32 at least."""
        return wide(self._value(number).reshape(self.count, -1))

    def _through(self, heads: Array) -> Array:
        return wide(through_output(self.evaluation, self.block, heads).reshape(self.count, -1))

    @property
    def attention(self) -> Array:
        """[H, N, N], in float32 at least."""
        return wide(heads_of(self.layer, self._value(self.layer.weights)))

    @property
    def value(self) -> Array:
        return wide(values_of(self.layer, self._value(self.layer.value)))

    @property
    def output_kernel(self) -> Array:
        """W_O [D, D], from the rest of the layer applied to unit vectors as tokens."""
        heads = values_of(self.layer, self._value(self.layer.value))
        h, n, width = heads.shape
        places = np.eye(-(-h * width // n) * n, h * width).reshape(-1, n, h, width)
        rows = jax.lax.map(self._through, jnp.asarray(places.transpose(0, 2, 1, 3), heads.dtype))
        return rows.reshape(-1, rows.shape[-1])[: h * width]

    def through(self, x: Array) -> Array:
        return self._through(self._projected(x))

    def project(self, x: Array) -> Array:
        return wide(self._projected(x))

    def _projected(self, x: Array) -> Array:
        """The values [H, N, D/H] of tokens x [N, D], without the bias of their projection."""
        place = POINTS["normalised"](self.evaluation.reading, self.block)
        read = self._value(place)
        project = self.evaluation.function([place], self.layer.value)
        values = jax.jvp(project, (read,), (x.reshape(read.shape).astype(read.dtype),))[1]
        return values_of(self.layer, values)

    def ffn_layers(self) -> list[tuple[Array, Array]]:
        return [(self.rows(layer.stream), self.rows(layer.branch)) for layer in self.block[1:]]

    def norms(self) -> list[tuple[Array, Array]]:
        return [(self.rows(layer.output), self.rows(layer.normed)) for layer in self.block[:2] if layer.normed]


def wide_type(kind: Any) -> Any:
    """float64 for float64, and float32 for all other types."""
    return kind.dtype if kind.dtype == jnp.float64 else jnp.float32


def first_row(model: Model, sample: Any, kind: Any) -> Array:
    """r0 [N] of a sample."""
    there = seen(sample)
    return read_out(model, None if there is None else there[None], jnp.zeros((1, 1), wide_type(kind)))[0]


def blocks_of(structure: Structure) -> Iterator[tuple[Block, Callable[[Any], Any]]]:
    """Every block of the program, and what takes its own part of arrays [L, ...]: in a scan, that of its turns."""
    begun = 0
    for stage in structure.stages:
        count = len(stage.blocks)
        for place, block in enumerate(stage.blocks, begun):
            own: Any = place if stage.scan is None else slice(place, begun + stage.length * count, count)
            yield block, partial(jax.tree.map, itemgetter(own))
        begun += stage.length * count


def end_of(_: Any, block: Block) -> int:
    return block[-1].end


def _at_ends(model: Model, function: Callable[[Evaluation, Block], Any]) -> dict[int, Any]:
    """Taps that note the result of `function` at the end of each block."""

    def tap(block: Block, evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
        return value, state, function(evaluation, block)

    return {block[-1].end: partial(tap, block) for stage in model.structure.stages for block in stage.blocks}


def row_behind(
    model: Model,
    params: Any,
    sample: Any,
    fuse: Callable[[View, Array], Array],
    update: Callable[[Array, Array, Array], Array],
    first_block: int = 0,
    whole: bool = False,
) -> tuple[Array, Any]:
    """The row [N] of the read-out at the input of a block, by a rule without a gradient, and the outputs.

    A stream u [N] of zeros goes through the blocks, and its cotangent is the row. `fuse(view, A)` makes [Q, N] of the
    attention A [H, Q, N] of some queries, or of all if `whole`; `update(u, given, total)` is the next u [N], by what
    u gives to the queries, `fused @ u`, and by the sums of the fused attention. Only u has a derivative, so the
    backward pass has no more than the row.
    """
    structure, there = model.structure, seen(sample)
    stages = structure.since(first_block)
    untapped = {s.scan: s.scan.params["length"] - s.length for s in stages if s.scan is not None}

    def tap(block: Block, evaluation: Evaluation, state: Any, extra: Any) -> Any:
        u, index = state
        view = View(evaluation, block, structure.tokens, there, None)

        def of_queries(value: Array) -> tuple[Array, Any]:
            fused = fuse(view, heads_of(view.layer, value).astype(u.dtype))
            return value, (attention_stream(u, fused, jnp.ones_like(u)), fused.sum(-1))

        def after(found: Any) -> Any:
            given, total = found
            return jnp.where(index < first_block, u, update(u, given, checkpoint_name(total, WEIGHTS))), index + 1

        return of_queries, after

    blocks: Any = [block for stage in stages for block in stage.blocks]
    taps = {block[0].attention.weights: partial(tap, block) for block in blocks}
    plan = Plan(model.rules, by_queries=taps, untapped=untapped, whole=whole)
    first = structure.depth - sum(stage.length * len(stage.blocks) for stage in stages)

    def run(u: Array) -> Any:
        outputs, _, (u, _) = model.evaluate(params, sample, plan, None, (u, jnp.int32(first)))
        return u, outputs

    readout = first_row(model, sample, structure.reading.flat.types[structure.embedded])
    _, pull, outputs = jax.vjp(run, jnp.zeros_like(readout), has_aux=True)
    return pull(readout)[0], outputs


def by_head(row: Array, attention: Array, gradient: Array) -> Array:
    """`r A_h` and `r G_h` [2, H, N]."""
    return jnp.stack([jnp.einsum("q,hqn->hn", row, a) for a in (attention, gradient)])


Part = Callable[[Array, Array, Array], Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(part: Part, attention: Array, u: Array) -> tuple[Array, Array]:
    """Attention [H, Q, N] of some queries unchanged, and zeros [Q] that depend on zeros u.

    Backward, the cotangents are the gradient G of the attention and a row r of these queries. That of u becomes
    `part(r, A, G)`.
    """
    return _read_forward(part, attention, u)[0]


def _read_forward(part: Part, attention: Array, u: Array) -> Any:
    return (attention, jnp.zeros(attention.shape[1], u.dtype)), attention


def _read_backward(part: Part, attention: Array, cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
    gradient, row = cotangents
    return gradient, part(row, attention, gradient)


_read.defvjp(_read_forward, _read_backward)


def of_last_attention(model: Model, params: Any, sample: Any, score: Score, part: Part = by_head) -> tuple[Array, Any]:
    """`part(r0, A, G)` of the last block's attention A and its gradient G, for the read-out r0, and the outputs; the
    sum over parts of the queries."""
    structure = model.structure
    (stage,) = structure.since(structure.depth - 1)
    untapped = {} if stage.scan is None else {stage.scan: stage.scan.params["length"] - stage.length}

    def tap(layer: Any, evaluation: Evaluation, state: Any, extra: Any) -> Any:
        u, _ = state  # the last block replaces what those before it read

        def of_queries(value: Array) -> tuple[Array, Array]:
            found: Any = _read(part, heads_of(layer, value).astype(u.dtype), u)
            return as_before(layer, found[0], value).astype(value.dtype), found[1]

        return of_queries, lambda read: (u, read)

    layers: Any = [block[0].attention for block in stage.blocks]
    taps = {layer.weights: partial(tap, layer) for layer in layers}
    plan = Plan(model.rules, by_queries=taps, untapped=untapped)
    row = first_row(model, sample, structure.reading.flat.types[structure.embedded])

    def run(u: Array, numbers: Array = values(sample)) -> Any:
        own = with_values(sample, numbers)
        outputs, _, (_, read) = model.evaluate(params, own, plan, None, (u, jnp.zeros_like(row)))
        return (score(outputs), read), outputs

    attention = jax.ShapeDtypeStruct((structure.heads, *row.shape * 2), row.dtype)
    zeros = jnp.zeros_like(jax.eval_shape(part, row, attention, attention))
    # Rules are not derivatives: where the map is differentiated, they must be inside this pass down to the input.
    asked = (zeros, values(sample)) if model.rules else (zeros,)
    (own, _), pull, outputs = jax.vjp(run, *asked, has_aux=True)
    return pull((jnp.ones_like(own), row))[0], outputs


def value_zeroing_of(block: View, attention: Array) -> Array:
    """How much each token depends on another one in a block, [N, N]: one minus the cosine of the token at the end of
    the block with the same if the other one has the value 0 in all heads. Computed as half the squared distance of
    unit vectors, which small changes do not round to zero."""
    layer, end = block.layer, block.block[-1].end
    weights = block.evaluation.function([], layer.weights)()
    through = block.evaluation.function([layer.weights], end)
    places = jnp.arange(block.count)
    axes = [block.count if axis == layer.key else 1 for axis in range(weights.ndim)]

    def unit(tokens: Array) -> Array:
        tokens = wide(tokens.reshape(block.count, -1))
        length = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
        return tokens / jnp.where(length > 0, length, 1)

    whole = unit(through(weights))

    def change(other: Array) -> Array:
        without = jnp.where((places != other).reshape(axes), weights, jnp.zeros((), weights.dtype))
        return jnp.square(unit(through(without)) - whole).sum(-1) / 2

    changes = jax.lax.map(change, places).T
    return jnp.where(attention.max(0) > 0, changes, 0)  # no rounding where a token does not attend to another


def legrad_of_block(
    model: Model, params: Any, sample: Any, score: Score, read: str = "head"
) -> Callable[[Evaluation, Block], Array]:
    """`(evaluation, finished block) -> mean_{h,q} relu(d s_l / d A_l)` [N], s_l from the block's output."""
    head, there, n = model.head(params, sample), seen(sample), model.structure.tokens
    # Tokens do not mix after the attention, so those that the head does not read are not computed.
    some = there is None and read == "head"
    tokens = np.flatnonzero(model.readout) if some else np.arange(n)

    def of_block(evaluation: Evaluation, block: Block) -> Array:
        attention: Any = block[0].attention
        evaluation = evaluation.held()  # constant in the derivative of the surrounding pass
        rows, end, at = model.structure.rows, block[-1].end, attention.places[-2]
        through = for_tokens(evaluation, rows, attention.output, end, n, tokens) if len(tokens) < n else None
        own = np.arange(n) if through is None else tokens
        through = through or evaluation.function([attention.output], end)

        def read_by_head(mixed: Array) -> Array:
            after = through(mixed)
            if len(own) < n:
                after = jnp.zeros_like(evaluation.values[end]).at[..., own, :].set(after)
            if read == "mean":
                after = jnp.broadcast_to(after.mean(-2, keepdims=True), after.shape)
            return score(head(after))

        gradient = jax.grad(read_by_head)(jnp.take(evaluation.values[attention.output], own, at))
        present = jnp.ones(n, wide(gradient).dtype) if there is None else there.astype(wide(gradient).dtype)
        return _of_weights(evaluation, attention, gradient, (present / present.sum())[own])

    return of_block


def _of_weights(evaluation: Evaluation, attention: Any, gradient: Array, shares: Array) -> Array:
    """`sum_q shares_q mean_h relu(d s / d A_q)` [N], from the gradient of s at the product of weights A with values,
    for some queries; where A is large, for some of these at a time."""
    product, at = attention.product, attention.places[-2]
    kind = evaluation.reading.flat.types[attention.weights]
    value = evaluation.values[attention.value]
    order = (0, 1) if product.inputs[0] == product.of else (1, 0)

    def of_queries(gradient: Array, shares: Array) -> Array:
        like = jax.ShapeDtypeStruct(pieces.with_rows(kind.shape, attention.query, len(shares)), kind.dtype)
        mixed = lambda weights: bind(product.equation, [(weights, value)[i] for i in order])[0]  # noqa: E731
        (own,) = jax.linear_transpose(mixed, like)(gradient)
        return shares @ mean_of_heads(heads_of(attention, jax.nn.relu(wide(own))))

    weights_of_query = math.prod(kind.shape) // kind.shape[attention.query]
    if weights_of_query * len(shares) <= pieces.LARGE:
        return of_queries(gradient, shares)
    rows = max(1, pieces.ENTRIES // weights_of_query)
    more = -len(shares) % rows
    moved = jnp.moveaxis(gradient, at, 0)
    padded = (jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]) for x in (moved, shares))
    parts = tuple(x.reshape(-1, rows, *x.shape[1:]) for x in padded)
    return jax.lax.map(lambda part: of_queries(jnp.moveaxis(part[0], 0, at), part[1]), parts).sum(0)


def legrad_rows(
    model: Model, params: Any, sample: Any, score: Score, first_block: int = 0, read: str = "head"
) -> tuple[Array, Any]:
    """LeGrad's row for one sample, `sum_l mean_{h,q} relu(d s_l / d A_l)`, and the outputs.

    The class of the score must be given.
    """
    taps = _at_ends(model, legrad_of_block(model, params, sample, score, read))
    outputs, notes, _ = model.evaluate(params, sample, Plan(model.rules, taps), None, None)
    return of_blocks(model.structure.stages, notes, end_of)[first_block:].sum(0), outputs


def with_tokens(model: Model, params: Any, sample: Any, tokens: Array, placed: Array) -> Any:
    """The outputs for a sample when other `tokens` [L, N, D] enter the blocks where `placed` [L, N]."""
    parts = {block[0].stream: own_part((tokens, placed)) for block, own_part in blocks_of(model.structure)}
    taps: dict[int, Any] = dict.fromkeys(parts, _replaced)
    return model.evaluate(params, sample, Plan(model.rules, taps), parts, None)[0]


def _replaced(evaluation: Evaluation, value: Array, state: Any, extra: tuple[Array, Array]) -> Any:
    """A tap that replaces some tokens of a stream."""
    tokens, placed = extra
    after = jnp.where(placed[:, None], tokens.astype(value.dtype), value.reshape(tokens.shape))
    return after.reshape(value.shape), state, None
