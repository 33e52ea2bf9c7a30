"""Rules that run inside the passes of a model, block by block, so that arrays of two blocks are never stored at once.

The row of TokenTM and GAE is the cotangent of a stream of zeros [N] that goes from tap to tap; see `maths.variants`.
All functions are for one sample.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from tokentm_jax.errors import Unfit
from tokentm_jax.inputs.values import mean_of_seen, read_out, seen, values, with_values
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.tokentm import aggregate, block_update
from tokentm_jax.maths.variants import TokenTM, attention_layer, attention_weights, ffn_layer, ffn_weights, norm_gain
from tokentm_jax.programs.capture import (
    POINTS,
    as_before,
    heads_of,
    of_blocks,
    plus_extra,
    through_output,
    values_before,
    values_of,
)
from tokentm_jax.programs.flat import Step
from tokentm_jax.programs.kernel import TOKENS
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.running import Evaluation, Plan
from tokentm_jax.programs.structure import Layer, Structure
from tokentm_jax.programs.tokens import for_tokens

Block = list[Layer]
Score = Callable[[Any], Array]  # of one sample's outputs
Memory = Literal["recompute", "store"]

# What a block stores for its backward pass besides its input: the transformation weights [N], and with "store" also
# the results of its linear maps (queries, keys, values and hidden channels) and of a kernel of attention. The weights
# of attention are always computed again.
WEIGHTS = "transformation weights"
_ONLY_WEIGHTS = jax.checkpoint_policies.save_only_these_names(WEIGHTS)
_AND_TOKENS = jax.checkpoint_policies.save_only_these_names(WEIGHTS, TOKENS)
POLICIES = {
    "recompute": _ONLY_WEIGHTS,
    "store": jax.checkpoint_policies.save_from_both_policies(
        _AND_TOKENS, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


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
            return self._through(self._value(self.layer.value))
        if name not in POINTS:
            raise AttributeError(name)
        return self.rows(POINTS[name](self.evaluation.reading, self.block))

    def _value(self, number: int) -> Array:
        """A value of the program in its layout."""
        return self.evaluation.function([], number)()

    def rows(self, number: Any) -> Array:
        """A value of the program as tokens [N, D], in float32 at least."""
        return wide(self._value(number).reshape(self.count, -1))

    def _through(self, values: Array) -> Array:
        return wide(through_output(self.evaluation, self.block, values).reshape(self.count, -1))

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
        like = self._value(self.layer.value)
        h, n, width = values_of(self.layer, like).shape
        places = np.eye(-(-h * width // n) * n, h * width).reshape(-1, n, h, width)
        units = jnp.asarray(places.transpose(0, 2, 1, 3), like.dtype)
        rows = jax.lax.map(lambda heads: self._through(values_before(self.layer, heads, like)), units)
        return rows.reshape(-1, rows.shape[-1])[: h * width]

    def through(self, x: Array) -> Array:
        return self._through(self._projected(x))

    def project(self, x: Array) -> Array:
        return wide(values_of(self.layer, self._projected(x)))

    def _projected(self, x: Array) -> Array:
        """The values of tokens x [N, D], without the bias of their projection, in the program's layout."""
        place = POINTS["normalised"](self.evaluation.reading, self.block)
        read = self._value(place)
        project = self.evaluation.function([place], self.layer.value)
        return jax.jvp(project, (read,), (x.reshape(read.shape).astype(read.dtype),))[1]

    def ffn_layers(self) -> list[tuple[Array, Array]]:
        return [(self.rows(layer.stream), self.rows(layer.branch)) for layer in self.block[1:]]

    def norms(self) -> list[tuple[Array, Array]]:
        return [(self.rows(layer.output), self.rows(layer.normed)) for layer in self.block[:2] if layer.normed]


def _wide_type(kind: Any) -> Any:
    """float64 for float64, and float32 for all other types."""
    return kind.dtype if kind.dtype == jnp.float64 else jnp.float32


def _row(model: Model, sample: Any, kind: Any) -> Array:
    """r0 [N] of a sample."""
    there = seen(sample)
    return read_out(model, None if there is None else there[None], jnp.zeros((1, 1), _wide_type(kind)))[0]


class Pass(NamedTuple):
    """The results of one forward and backward pass of a sample."""

    row: Array  # [N] the head's read-out, carried to the input of block `options.first_block`
    embedded: Array  # [N, D] the tokens that enter the first block
    gradient: Array  # [N, D] of the score at `embedded`, by the model's rules
    legrad: Any  # [N] LeGrad's row, if requested


def rows_inside(
    model: Model,
    params: Any,
    sample: Any,
    score: Score,
    options: TokenTM,
    memory: Memory = "store",
    gradients: Any = None,
    legrad: bool = False,
) -> tuple[Pass, Any]:
    """TokenTM's row for one sample in one forward and backward pass, and the outputs.

    `gradients` [L, N, D] are those of the score at each block's output, for weights that need them. `legrad` also
    computes LeGrad's row, in the forward pass.
    """
    structure = model.structure
    n, first, there = structure.tokens, options.first_block, seen(sample)
    end = structure.depth if options.end_block is None else options.end_block
    by_rules = legrad_of_block(model.by({}), params, sample, score) if legrad else None

    def kept(index: Array, weights: Array) -> Array:
        inside = (index >= first) & (index < end)
        return checkpoint_name(jnp.where(inside, weights, 0), WEIGHTS)

    def of_attention(block: Block, evaluation: Evaluation, index: Array, gradient: Any) -> Array:
        return kept(index, attention_weights(View(evaluation, block, n, there, gradient), options))

    def attended(block: Block, evaluation: Evaluation, state: Any, gradient: Any) -> Any:
        layer: Any = block[0].attention
        u, index = state
        weights = of_attention(block, evaluation, index, gradient)

        def of_queries(value: Array) -> tuple[Array, Array]:
            passed: Any = attention_layer(options, heads_of(layer, value), u, weights)
            heads, zeros = passed
            return as_before(layer, heads, value), zeros

        return of_queries, lambda zeros: (u + zeros, index)

    def by_head(block: Block, evaluation: Evaluation, state: Any, gradient: Any) -> Any:
        u, index = state
        weights = jax.lax.stop_gradient(of_attention(block, evaluation, index, gradient))
        # Backward, u gets w times the mean over heads of what each stream gets.
        streams = jnp.broadcast_to(u * weights / structure.heads, (structure.heads, n))
        return streams, lambda zeros: (u + zeros, index)

    def summed(
        block: Block, layer: Layer, number: int, evaluation: Evaluation, value: Array, state: Any, gradient: Any
    ) -> Any:
        u, index = state
        view, noted = View(evaluation, block, n, there, gradient), None
        if options.ffn and layer.attention is None and number == layer.output:
            own = view.rows(layer.stream), view.rows(layer.branch)
            u = ffn_layer(u, kept(index, ffn_weights(*own, view, options)))
        if options.norms and number == layer.normed:
            u = ffn_layer(u, kept(index, norm_gain(view.rows(layer.output), view.rows(number)) - 1))
        if layer is block[-1] and number == layer.end:
            index = index + 1
            noted = None if by_rules is None else by_rules(evaluation, block)
        return value, (u, index), noted

    taps: dict[int, Any] = {}
    by_queries: dict[int, Any] = {}
    streams: dict[int, Any] = {}
    extra: dict[int, Any] = {}
    for block, own_part in _blocks(structure):
        attention, here = block[0].attention.weights, {}  # type: ignore[union-attr]
        by_queries[attention] = partial(attended, block)
        if options.attention == "gradient":
            streams[attention] = partial(by_head, block)
        for layer in block:
            here |= {number: partial(summed, block, layer, number) for number in (layer.output, layer.end)}
        taps |= here
        if gradients is not None:
            extra |= dict.fromkeys([attention, *here], own_part(gradients))
    if structure.embedded in taps:
        raise Unfit("the tokens that enter the first block are not distinct from those of a layer")
    taps[structure.embedded] = plus_extra
    kind = structure.reading.flat.types[structure.embedded]
    checkpoint = partial(jax.checkpoint, policy=POLICIES[memory], prevent_cse=False)
    plan = Plan(model.rules, taps, checkpoint, by_queries=by_queries, streams=streams, whole=legrad)
    readout = _row(model, sample, kind)

    def run(zeros: Array, u: Array) -> Any:
        inputs = {**extra, structure.embedded: zeros}
        outputs, notes, state = model.evaluate(params, sample, plan, inputs, (u, jnp.int32(0)))
        return (score(outputs), state[0]), (notes, outputs)

    (own, _), pull, (notes, outputs) = jax.vjp(
        run, jnp.zeros(kind.shape, readout.dtype), jnp.zeros_like(readout), has_aux=True
    )
    gradient, row = pull((jnp.ones_like(own), readout))
    embedded = notes[structure.embedded].reshape(n, -1)
    found = of_blocks(structure.stages, notes, _end).sum(0) if legrad else None
    return Pass(row, embedded, gradient.reshape(n, -1), found), outputs


def _blocks(structure: Structure) -> Iterator[tuple[Block, Callable[[Any], Any]]]:
    """Every block of the program, and what takes its own part of arrays [L, ...]: in a scan, that of its turns."""
    begun = 0
    for stage in structure.stages:
        count = len(stage.blocks)
        for place, block in enumerate(stage.blocks, begun):
            own: Any = place if stage.scan is None else slice(place, begun + stage.length * count, count)
            yield block, partial(jax.tree.map, itemgetter(own))
        begun += stage.length * count


def _end(_: Any, block: Block) -> int:
    return block[-1].end


def _at_ends(model: Model, function: Callable[[Evaluation, Block], Any]) -> dict[int, Any]:
    """Taps that note the result of `function` at the end of each block."""

    def tap(block: Block, evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
        return value, state, function(evaluation, block)

    return {block[-1].end: partial(tap, block) for stage in model.structure.stages for block in stage.blocks}


def rows_behind(
    model: Model,
    params: Any,
    sample: Any,
    summary: Callable[[View], Any],
    update: Callable[[Array, Any], Array] = block_update,
    first_block: int = 0,
    end_block: int | None = None,
) -> tuple[tuple[Array, Array], Any]:
    """One forward pass that stores `summary(view)` of every block, then a rule that needs no gradient.

    Returns (row [N], embedded tokens [N, D]) and the outputs.
    """
    structure, there = model.structure, seen(sample)
    n = structure.tokens
    taps = _at_ends(model, lambda evaluation, block: summary(View(evaluation, block, n, there, None)))
    taps.setdefault(structure.embedded, plus_extra)
    outputs, notes, _ = model.evaluate(params, sample, Plan(model.rules, taps, whole=True), None, None)
    embedded = notes[structure.embedded].reshape(n, -1)
    row = _row(model, sample, structure.reading.flat.types[structure.embedded])
    blocks = of_blocks(structure.stages, notes, _end)
    return (aggregate(row, blocks, update, first_block, end_block), embedded), outputs


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
        weights = evaluation.values[attention.weights]
        rows, end = model.structure.rows, block[-1].end
        through = for_tokens(evaluation, rows, attention.weights, end, n, tokens) if len(tokens) < n else None
        own = np.arange(n) if through is None else tokens
        through = through or evaluation.function([attention.weights], end)

        def read_by_head(weights: Array) -> Array:
            after = through(weights)
            if len(own) < n:
                after = jnp.zeros_like(evaluation.values[end]).at[..., own, :].set(after)
            if read == "mean":
                after = jnp.broadcast_to(after.mean(-2, keepdims=True), after.shape)
            return score(head(after))

        gradient = jax.nn.relu(wide(jax.grad(read_by_head)(jnp.take(weights, own, attention.query))))
        gradient = jnp.moveaxis(gradient, (attention.query, attention.key), (-2, -1))
        gradient = gradient.reshape(-1, len(own), n).mean(0)
        return mean_of_seen(gradient, there, -2) if len(own) == n else gradient.sum(0) / n

    return of_block


def legrad_rows(
    model: Model, params: Any, sample: Any, score: Score, first_block: int = 0, read: str = "head"
) -> tuple[Array, Any]:
    """LeGrad's row for one sample, `sum_l mean_{h,q} relu(d s_l / d A_l)`, and the outputs.

    The class of the score must be given.
    """
    taps = _at_ends(model, legrad_of_block(model, params, sample, score, read))
    outputs, notes, _ = model.evaluate(params, sample, Plan(model.rules, taps, whole=True), None, None)
    return of_blocks(model.structure.stages, notes, _end)[first_block:].sum(0), outputs


def full_gradient_rows(model: Model, params: Any, sample: Any, score: Score) -> tuple[tuple[Array, Array], Any]:
    """FullGrad+'s row for one sample by the model's rules: tokens and biases times gradients, mean over blocks.

    Every token and bias has a factor 1 + share * u [N]; the derivative by u is the row. Returns (row, sum of the row
    minus the score) and the outputs.
    """
    structure = model.structure
    n, depth = structure.tokens, structure.depth
    kind = structure.reading.flat.types[structure.embedded]
    readout = None if seen(sample) is None else _row(model, sample, kind)
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

    row, (own, outputs) = jax.grad(run, has_aux=True)(jnp.zeros(n, _wide_type(kind)))
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

    kind = _wide_type(structure.reading.flat.types[structure.embedded])
    return jax.grad(run, (0, 1), has_aux=True)(jnp.zeros(n, kind), values(sample))


def _with_position(step: Step, rows: Any, evaluation: Evaluation, value: Array, u: Any, extra: Any) -> Any:
    """A sum with a position, which has its factor."""
    return (wide(value) + _added(step, evaluation) * _at_tokens(rows, u, value)).astype(value.dtype), u, None


def _turned(rows: Any, evaluation: Evaluation, value: Array, u: Any, extra: Any) -> Any:
    """A product with a rotary position: half of its relevance is for the position."""
    half, factor = wide(value) / 2, _at_tokens(rows, u, value)
    return (half + jax.lax.stop_gradient(half) * (1 + factor)).astype(value.dtype), u, None


def with_tokens(model: Model, params: Any, sample: Any, tokens: Array, placed: Array) -> Any:
    """The outputs for a sample when other `tokens` [L, N, D] enter the blocks where `placed` [L, N]."""
    parts = {block[0].stream: own_part((tokens, placed)) for block, own_part in _blocks(model.structure)}
    taps: dict[int, Any] = dict.fromkeys(parts, _replaced)
    return model.evaluate(params, sample, Plan(model.rules, taps), parts, None)[0]


def _replaced(evaluation: Evaluation, value: Array, state: Any, extra: tuple[Array, Array]) -> Any:
    """A tap that replaces some tokens of a stream."""
    tokens, placed = extra
    after = jnp.where(placed[:, None], tokens.astype(value.dtype), value.reshape(tokens.shape))
    return after.reshape(value.shape), state, None
