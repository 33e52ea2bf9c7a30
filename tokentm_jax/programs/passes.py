"""Rules that run inside the passes of a function, block by block: no array of two blocks is held at once.

The row of TokenTM and GAE is the cotangent of a stream of zeros [N] that goes from tap to tap; see `maths.tokentm`.
Everything here is for one sample.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

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
    Weights,
    attention_layer,
    change,
    ffn_layer,
    norm_gain,
    propagate,
    transformation_weights,
    weigh,
)
from tokentm_jax.programs.model import POINTS, Found, canonical, identity_of
from tokentm_jax.programs.running import Evaluation, Plan, scan_key
from tokentm_jax.programs.structure import Attention, Layer, Stage

Block = list[Layer]
WEIGHTS = "transformation weights"  # what a layer keeps for its backward pass, see `methods.stream`


def as_before(attention: Attention, heads: Array, like: Array) -> Array:
    """[H, N, N] in the layout of the program."""
    moved = jnp.moveaxis(like, (attention.query, attention.key), (-2, -1)).shape
    return jnp.moveaxis(heads.reshape(moved), (-2, -1), (attention.query, attention.key))


class View:
    """What one block of an evaluation did, in one layout; computed where it is not known yet."""

    def __init__(self, evaluation: Evaluation, block: Block, tokens: int) -> None:
        self.evaluation, self.block, self.count = evaluation, block, tokens

    def value(self, number: int) -> Array:
        """A value of the program in its own layout."""
        return self.evaluation.function([], number)()

    def rows(self, number: int) -> Array:
        """A value of the program as tokens [N, D], in float32 at least."""
        return wide(self.value(number).reshape(self.count, -1))

    def number(self, name: str) -> int:
        """The value that holds a field of `Blocks`."""
        return POINTS[name](self.evaluation.reading, self.block)

    def original(self, options: TokenTM) -> int:
        """The value that holds what the attention layer's x_j is."""
        return self.number("tokens" if options.original == "residual" else "normalised")

    @property
    def attention(self) -> Attention:
        """Where the attention of the block is."""
        attention = self.block[0].attention
        assert attention is not None
        return attention

    @property
    def heads(self) -> Array:
        """The attention of the block, [H, N, N], in float32 at least."""
        return wide(canonical(self.attention, self.value(self.attention.weights)))

    def transformed(self, options: TokenTM) -> Array:
        """x~ of the attention layer, [N, D], or [H, N, D] of each head: its branch with attention replaced by the
        identity, less its last bias, is the derivative of the branch in that direction."""
        first = self.block[0]
        if options.transformed == "stream":
            return self.rows(first.stream) + self.rows(first.branch)
        weights = self.value(self.attention.weights)
        identity = identity_of(self.attention, weights)
        if options.transformed == "linear":  # of x itself, by the value projection without its bias
            place = self.number("normalised")
            value = self.value(place)
            x = self.value(self.original(options)).reshape(value.shape).astype(value.dtype)
            branch = self.evaluation.function([self.attention.weights, place], first.branch)
            through = lambda attention: jax.jvp(partial(branch, attention), (value,), (x,))[1]  # noqa: E731
        else:
            branch = self.evaluation.function([self.attention.weights], first.branch)
            through = lambda attention: jax.jvp(branch, (jnp.zeros_like(weights),), (attention,))[1]  # noqa: E731
        if options.heads == "sum":
            return wide(through(identity).reshape(self.count, -1))
        heads = canonical(self.attention, identity)
        alone = heads[None] * jnp.eye(len(heads), dtype=heads.dtype)[:, :, None, None]
        of_head = lambda one: through(as_before(self.attention, one, weights)).reshape(self.count, -1)  # noqa: E731
        return wide(jax.lax.map(of_head, alone))

    def attention_weights(self, options: TokenTM) -> Array:
        """Diagonal of W_attn, [N], or [H, N]."""
        x = self.rows(self.original(options))
        if not options.weighs:
            return jnp.ones_like(x[:, 0])
        transformed = self.transformed(options)
        if transformed.ndim == 2:
            return weigh(x, transformed, NOTHING, options)
        return jax.vmap(lambda t: transformation_weights(change(x, t), options))(transformed)

    def ffn_weights(self, layer: Layer, options: TokenTM) -> Array:
        """Diagonal of W_ffn of one layer, [N]."""
        x, branch = self.rows(layer.stream), self.rows(layer.branch)
        if not options.ffn or not options.weighs:
            return jnp.full_like(x[:, 0], 1.0 if options.ffn else 0.0)
        transformed = branch if options.ffn_transformed == "branch" else x + branch
        return weigh(x, transformed, NOTHING, options)

    def weights(self, options: TokenTM) -> Weights:
        """The diagonals of all updates of the block."""
        ffn = [self.ffn_weights(layer, options) for layer in self.block[1:]]
        none = jnp.zeros_like(self.rows(self.block[0].stream)[:, 0])
        norms = []
        if options.norms and self.block[0].normed is not None:
            norms = [self.norm_gain(layer) for layer in self.block[:2]]
        return Weights(self.attention_weights(options), reduce(lambda a, b: a + b + a * b, ffn, none), *norms)

    def norm_gain(self, layer: Layer) -> Array:
        """What the norm behind a layer's sum does to the length of each token, [N]."""
        assert layer.normed is not None
        return norm_gain(self.rows(layer.output), self.rows(layer.normed))


def _wide_type(kind: Any) -> Any:
    """float64 for that, and float32 for all else."""
    return kind.dtype if kind.dtype == jnp.float64 else jnp.float32


NOTHING = Blocks(*[None] * len(Blocks._fields))


def rows_inside(
    found: Found, params: Any, sample: Array, target: Any, options: TokenTM, policy: Any
) -> tuple[tuple[Array, Array, Array], Any]:
    """TokenTM's row for one sample in one forward and backward pass.

    Returns (row [N] at the input of block `options.first_block`, embedded tokens [N, D], gradient there) and details.
    """
    structure = found.structure
    n, first = structure.tokens, options.first_block
    end = structure.depth if options.end_block is None else options.end_block

    def kept(index: Array, weights: Array) -> Array:
        inside = (index >= first) & (index < end)
        return checkpoint_name(jnp.where(inside, weights, 0), WEIGHTS)

    def attended(block: Block, evaluation: Evaluation) -> Any:
        view = View(evaluation, block, n)

        def tap(value: Array, state: Any, extra: Any) -> Any:
            u, index = state
            evaluation.values[evaluation.current] = value
            weights = kept(index, view.attention_weights(options))
            passed: Any = attention_layer(options, canonical(view.attention, value), u, weights)
            heads, u = passed
            return as_before(view.attention, heads, value), (u, index), None

        return tap

    def summed(block: Block, layer: Layer, evaluation: Evaluation) -> Any:
        view, norms = View(evaluation, block, n), options.norms and layer.normed is not None

        def tap(value: Array, state: Any, extra: Any) -> Any:
            u, index = state
            evaluation.values[evaluation.current] = value
            if layer.attention is None and evaluation.current == layer.output:
                u = ffn_layer(u, kept(index, view.ffn_weights(layer, options)))
            if norms and evaluation.current == layer.normed:
                u = ffn_layer(u, kept(index, view.norm_gain(layer) - 1))
            last = layer is block[-1] and evaluation.current == layer.end
            return value, (u, index + 1 if last else index), None

        return tap

    taps: dict[Any, dict[int, Any]] = {structure.reading: {}}
    for stage in structure.stages:
        own = taps.setdefault(stage.reading, {})
        for block in stage.blocks:
            own[block[0].attention.weights] = partial(attended, block)  # type: ignore[union-attr]
            for layer in block:
                for number in {layer.output, layer.end}:
                    own[number] = partial(summed, block, layer)

    def noted(evaluation: Evaluation) -> Any:
        def tap(value: Array, state: Any, extra: Any) -> Any:
            value = value + extra.astype(value.dtype)
            return value, state, value

        return tap

    if structure.embedded in taps[structure.reading]:
        raise Unfit("the tokens that enter the first block cannot be told from a layer's")
    taps[structure.reading][structure.embedded] = noted
    kind = structure.reading.flat.types[structure.embedded]
    plan = Plan(found.rules, taps, partial(jax.checkpoint, policy=policy, prevent_cse=False))
    row = jnp.asarray(found.readout, _wide_type(kind))
    readout = row

    def run(zeros: Array, u: Array) -> Any:
        outputs, notes, state = found.evaluate(params, sample, plan, {structure.embedded: zeros}, (u, jnp.int32(0)))
        own, details = explained(jax.tree.map(lambda a: a[None], outputs), target)
        return (own.sum(), state[0]), (notes[structure.embedded], details)

    (own, _), pull, (embedded, details) = jax.vjp(
        run, jnp.zeros(kind.shape, row.dtype), jnp.zeros_like(row), has_aux=True
    )
    gradient, rows = pull((jnp.ones_like(own), readout))
    return (rows, embedded.reshape(n, -1), gradient.reshape(n, -1)), details


def rows_behind(
    found: Found,
    params: Any,
    sample: Array,
    target: Any,
    summary: Callable[[View], Any],
    update: Callable[[Array, Any], Array],
    first_block: int = 0,
    end_block: int | None = None,
) -> tuple[tuple[Array, Array], Any]:
    """One forward pass that keeps `summary(view)` of every block, then a rule that needs no gradient.

    Returns (row [N], embedded tokens [N, D]) and details.
    """
    structure = found.structure
    n = structure.tokens

    def at_end(block: Block, evaluation: Evaluation) -> Any:
        def tap(value: Array, state: Any, extra: Any) -> Any:
            evaluation.values[evaluation.current] = value
            return value, state, summary(View(evaluation, block, n))

        return tap

    taps: dict[Any, dict[int, Any]] = {structure.reading: {}}
    for stage in structure.stages:
        for block in stage.blocks:
            taps.setdefault(stage.reading, {})[block[-1].end] = partial(at_end, block)
    of_embedded = lambda evaluation: lambda value, state, extra: (value, state, value)  # noqa: E731
    taps[structure.reading].setdefault(structure.embedded, of_embedded)
    outputs, notes, _ = found.evaluate(params, sample, Plan(found.rules, taps), None, None)
    details = explained(jax.tree.map(lambda a: a[None], outputs), target)[1]
    parts = [_stacked(stage, notes, lambda stage, block, own: own[block[-1].end]) for stage in structure.stages]
    summaries = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    embedded = notes[structure.embedded].reshape(n, -1)
    row = jnp.asarray(found.readout, wide(embedded).dtype)
    return (propagate(update, summaries, row, first_block, end_block), embedded), details


def _stacked(stage: Stage, notes: Any, pick: Callable[..., Any]) -> Any:
    """The notes of a stage's blocks, [length * blocks, ...]."""
    own = notes if stage.scan is None else notes[scan_key(stage.scan)]
    arrays = [pick(stage, block, own) for block in stage.blocks]
    if stage.scan is None:
        return jax.tree.map(lambda *a: jnp.stack(a), *arrays)
    return jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *arrays)


def legrad_rows(found: Found, params: Any, sample: Array, target: Any, first_block: int = 0) -> tuple[Array, Any]:
    """LeGrad's row for one sample: `sum_l mean_{h,q} relu(d s_l / d A_l)`, s_l read by what follows the blocks."""
    structure = found.structure
    head = found.head(params)
    outputs, _, _ = found.evaluate(params, sample, Plan(found.rules), None, None)
    _, details = explained(jax.tree.map(lambda a: a[None], outputs), target)
    asked = details["target"]

    def at_end(block: Block, evaluation: Evaluation) -> Any:
        attention = block[0].attention
        assert attention is not None
        view = View(evaluation, block, structure.tokens)

        def tap(value: Array, state: Any, extra: Any) -> Any:
            evaluation.values[evaluation.current] = value
            through = evaluation.function([attention.weights], block[-1].end)

            def score(weights: Array) -> Array:
                return explained(jax.tree.map(lambda a: a[None], head(through(weights))), asked)[0].sum()

            gradient = jax.grad(score)(evaluation.values[attention.weights])
            row = jax.nn.relu(wide(canonical(view.attention, gradient))).mean((0, 1))
            return value, state, row

        return tap

    taps: dict[Any, dict[int, Any]] = {}
    for stage in structure.stages:
        for block in stage.blocks:
            taps.setdefault(stage.reading, {})[block[-1].end] = partial(at_end, block)
    _, notes, _ = found.evaluate(params, sample, Plan(found.rules, taps), None, None)
    pick = lambda stage, block, own: own[block[-1].end]  # noqa: E731
    rows = jnp.concatenate([_stacked(stage, notes, pick) for stage in structure.stages])
    return rows[first_block:].sum(0), details


def full_gradient_rows(found: Found, params: Any, sample: Array, target: Any) -> tuple[tuple[Array, Array], Any]:
    """FullGrad+'s row for one sample by the rules of `found`: tokens and biases times gradients, mean over blocks.

    Every token and bias has a factor 1 + share * u [N]; the derivative by u is the row. Returns (row, its sum less the
    score) and details.
    """
    structure = found.structure
    n, depth = structure.tokens, structure.depth
    taps: dict[Any, dict[int, Any]] = {}
    for reading, rows, after in found.token_rows():
        own = taps.setdefault(reading, {})
        for step in reading.flat.steps:
            out = step.outputs[0]
            if step.kind == "bias" and out in rows:
                own[out] = partial(_with_factor, step, rows[out], after, depth)
    for stage in structure.stages:
        own = taps.setdefault(stage.reading, {})
        for block in stage.blocks:
            own[block[0].stream] = partial(_scaled_stream, depth, n)

    def score(u: Array) -> tuple[Array, Any]:
        outputs, _, _ = found.evaluate(params, sample, Plan(found.rules, taps), None, (u, jnp.int32(0)))
        own, details = explained(jax.tree.map(lambda a: a[None], outputs), target)
        return own.sum(), details

    kind = structure.reading.flat.types[structure.embedded]
    row, details = jax.grad(score, has_aux=True)(jnp.zeros(n, _wide_type(kind)))
    return (row, row.sum() - details["score"][0]), details


def _scaled_stream(depth: int, n: int, evaluation: Evaluation) -> Any:
    """The tokens that enter a block, with their share of the factor; from here on the block counts."""

    def tap(value: Array, state: Any, extra: Any) -> Any:
        u, index = state
        shape = [1] * value.ndim
        shape[-2] = n
        return (wide(value) * (1 + u / depth).reshape(shape)).astype(value.dtype), (u, index + 1), None

    return tap


def _with_factor(step: Any, rows: Any, after: bool, depth: int, evaluation: Evaluation) -> Any:
    """A sum with a bias, whose share of the factor is that of the blocks that came before."""

    def tap(value: Array, state: Any, extra: Any) -> Any:
        u, index = state
        bias = evaluation.get(step.inputs[1 - step.of])
        if step.name == "sub" and step.of == 0:
            bias = -bias
        share = index.astype(u.dtype) / depth
        if isinstance(rows, tuple):
            axis, shares = rows
            shape = [1] * value.ndim
            shape[axis] = len(shares)
            factor = (jnp.asarray(shares, u.dtype) @ u).reshape(shape)
        else:
            factor = jnp.asarray(rows, u.dtype) @ u
        return (wide(value) + wide(bias) * factor * share).astype(value.dtype), state, None

    return tap
