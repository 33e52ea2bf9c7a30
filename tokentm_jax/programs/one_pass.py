"""One forward and backward pass of a sample, from which several methods read what they need, block by block.

Arrays of two blocks are never stored at once. The row of TokenTM and GAE is the cotangent of a stream of zeros [N],
which goes from tap to tap; see `maths.variants`. The effects of tokens are derivatives by zeros, too.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from tokentm_jax.inputs.values import mean_of_seen, seen, values, with_values
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.variants import TokenTM, attention_layer, attention_weights, ffn_layer, ffn_weights, norm_gain
from tokentm_jax.programs.capture import as_before, heads_of, of_blocks
from tokentm_jax.programs.factors import factor_taps
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.passes import Block, Score, View, blocks_of, end_of, first_row, legrad_of_block
from tokentm_jax.programs.running import WEIGHTS, Evaluation, Plan, Tap
from tokentm_jax.programs.structure import Layer

PLAIN = TokenTM(attention="plain")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What one pass of a sample computes: the fields of `Pass`."""

    rows: tuple[TokenTM, ...] = ()
    effects: bool = False
    carried: bool = False
    received: bool = False
    legrad: bool = False
    full_gradient: bool = False
    input_grads: bool = False

    def __or__(self, other: "Wanted") -> "Wanted":
        """What either wants."""
        flags = {f.name: getattr(self, f.name) or getattr(other, f.name) for f in dataclasses.fields(self)}
        return Wanted(**{**flags, "rows": tuple(dict.fromkeys((*self.rows, *other.rows)))})

    @property
    def blocks(self) -> bool:
        """Whether something of the blocks is computed."""
        return self != Wanted(input_grads=self.input_grads)


class Pass(NamedTuple):
    """The results of one forward and backward pass of a sample by the model's rules; None: not wanted."""

    rows: Any  # for each of the options, [N] the head's read-out, carried to the input of block `options.first_block`
    embedded: Any  # [N, D] the tokens that enter the first block, where there are rows
    effects: Any  # [L+1, N] tokens times their gradient, where each block begins, and where the last one ends
    carried: Any  # [L+1, N] the sum of that gradient over channels: by rules of relevance, the relevance
    received: Any  # [L, N] the attention that each token gets, mean over heads and queries
    legrad: Any  # [N] LeGrad's row, for a score whose class is given
    full_gradient: Any  # [N] tokens and biases times their gradients, mean over blocks: FullGrad+
    input_grads: Any  # gradient at the sample's numbers


def one_pass(
    model: Model, params: Any, sample: Any, score: Score, wanted: Wanted, gradients: Any = None
) -> tuple[Pass, Any]:
    """One forward and backward pass of a sample, block by block, and the outputs.

    `gradients` [L, N, D] are those of the score at each block's output, for weights that need them.
    """
    taps: dict[int, list[Tap]] = {}
    by_queries: dict[int, Any] = {}
    streams: dict[int, Any] = {}
    blocks = [*blocks_of(model.structure)] if wanted.blocks else []
    if blocks:
        _tap_blocks(model, params, sample, score, wanted, taps, by_queries, streams)
    plan = Plan(
        model.rules,
        {number: partial(_in_turn, own) for number, own in taps.items()},
        by_queries=by_queries,
        streams=streams,
    )

    def extra(seeds: Any) -> dict[int, dict[str, Any]]:
        """The additional inputs of taps: the block's own parts of gradients [L, N, D] and of zeros [L+1, N]."""
        found: dict[int, dict[str, Any]] = {}
        for block, own_part in blocks:
            if gradients is not None:
                ends = (number for layer in block for number in (layer.output, layer.end))
                for number in (block[0].attention.weights, *ends):  # type: ignore[union-attr]
                    found.setdefault(number, {})["gradient"] = own_part(gradients)
            if "received" in seeds:
                found.setdefault(block[0].attention.weights, {})["received"] = own_part(seeds["received"])  # type: ignore[union-attr]
            found.setdefault(block[0].stream, {})["seeds"] = own_part(jax.tree.map(lambda a: a[:-1], seeds))
        if blocks:
            found.setdefault(model.structure.last, {})["seeds"] = jax.tree.map(lambda a: a[-1], seeds)
        return found

    def run(numbers: Array, seeds: Any, u: Any, factor: Any) -> Any:
        read = None if attended_once is None else jnp.zeros_like(attended_once)
        own, start = with_values(sample, numbers), (u, jnp.int32(0), read, (factor, jnp.int32(0)))
        outputs, notes, state = model.evaluate(params, own, plan, extra(seeds), start)
        return (score(outputs), (state[0], state[2])), (notes, outputs)

    seeds, u, factor = {}, (), None
    readout: Any = None
    if blocks:
        structure = model.structure
        readout = first_row(model, sample, structure.reading.flat.types[structure.embedded])
        zeros = jnp.zeros((structure.depth + 1, structure.tokens), readout.dtype)
        seeds = {name: zeros for name in ("effects", "carried", "received") if getattr(wanted, name)}
        u = (jnp.zeros_like(readout),) * len(wanted.rows)
        factor = jnp.zeros_like(readout) if wanted.full_gradient else None
    numbers = values(sample)
    attended_once: Any = jnp.ones_like(readout, shape=()) if wanted.received else None
    cotangents = (readout,) * len(u), attended_once
    # Rules are not derivatives: where the map is differentiated, they must be inside this pass down to the input.
    if wanted.input_grads or (model.rules and seeds):
        (own, _), pull, (notes, outputs) = jax.vjp(run, numbers, seeds, u, factor, has_aux=True)
        of_input, *others = pull((jnp.ones_like(own), cotangents))
    else:
        (own, _), pull, (notes, outputs) = jax.vjp(partial(run, numbers), seeds, u, factor, has_aux=True)
        of_input, others = None, pull((jnp.ones_like(own), cotangents))
    of_seeds, rows, of_factor = others

    def of_all(name: str, number: Any) -> Any:
        return of_blocks(model.structure.stages, notes, number, lambda _, note: note[name])

    done = Pass(
        rows,
        notes[model.structure.embedded]["embedded"].reshape(model.structure.tokens, -1) if wanted.rows else None,
        of_seeds.get("effects"),
        of_seeds.get("carried"),
        of_seeds["received"][:-1] if wanted.received else None,
        of_all("legrad", end_of).sum(0) if wanted.legrad else None,
        of_factor,
        of_input if wanted.input_grads else None,
    )
    return done, outputs


def observed(n: int, evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
    """A tap of n tokens that adds zeros; the derivatives by them are `effects` and `carried`."""
    before, seeds = value, extra["seeds"]
    value = wide(value).reshape(n, -1)
    if "effects" in seeds:
        value = value * (1 + seeds["effects"][:, None])
    if "carried" in seeds:
        value = value + seeds["carried"][:, None]
    return value.reshape(before.shape).astype(before.dtype), state, {}


def _in_turn(taps: list[Tap], evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
    """Several taps of one value; their notes are dictionaries."""
    notes = {}
    for tap in taps:
        value, state, note = tap(evaluation, value, state, extra or {})
        notes |= note
    return value, state, notes or None


def _tap_blocks(
    model: Model,
    params: Any,
    sample: Any,
    score: Score,
    wanted: Wanted,
    taps: dict[int, list[Tap]],
    by_queries: dict[int, Any],
    by_heads: dict[int, Any],
) -> None:
    """The taps of `one_pass` in all blocks."""
    structure, there = model.structure, seen(sample)
    n = structure.tokens
    legrad = legrad_of_block(model.by({}), params, sample, score) if wanted.legrad else None

    def kept(options: TokenTM, index: Array, weights: Array) -> Array:
        end = structure.depth if options.end_block is None else options.end_block
        inside = (index >= options.first_block) & (index < end)
        return checkpoint_name(jnp.where(inside, weights, 0), WEIGHTS)

    def embedded(evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
        return value, state, {"embedded": value}

    def of_attention(block: Block, evaluation: Evaluation, index: Array, extra: Any) -> list[Array]:
        view = View(evaluation, block, n, there, (extra or {}).get("gradient"))
        return [kept(options, index, attention_weights(view, options)) for options in wanted.rows]

    def attended(block: Block, evaluation: Evaluation, state: Any, extra: Any) -> Any:
        layer: Any = block[0].attention
        streams, index, read, factor = state
        passing = [*zip(wanted.rows, streams, of_attention(block, evaluation, index, extra), strict=True)]
        if wanted.received:  # the derivative by this zero is what the attention of the mean query gives
            passing.append((PLAIN, extra["received"], jnp.ones_like(extra["received"])))

        def of_queries(value: Array) -> tuple[Array, Any]:
            heads, zeros = heads_of(layer, value), []
            for options, u, own in passing:
                passed: Any = attention_layer(options, heads, u, own)
                heads = passed[0]
                zeros.append(passed[1])
            return as_before(layer, heads, value), tuple(zeros)

        def after(zeros: Any) -> Any:
            total = read + mean_of_seen(zeros[-1], there) if wanted.received else read
            return tuple(u + zero for u, zero in zip(streams, zeros, strict=False)), index, total, factor

        return of_queries, after

    def by_head(block: Block, evaluation: Evaluation, state: Any, extra: Any) -> Any:
        (u,), index, read, factor = state
        (weights,) = of_attention(block, evaluation, index, extra)
        # Backward, u gets w times the mean over heads of what each stream gets.
        each = jnp.broadcast_to(u * jax.lax.stop_gradient(weights) / structure.heads, (structure.heads, n))
        return each, lambda zeros: ((u + zeros,), index, read, factor)

    def summed(
        block: Block, layer: Layer, number: int, evaluation: Evaluation, value: Array, state: Any, extra: Any
    ) -> Any:
        (streams, index, *others), note = state, {}
        view = View(evaluation, block, n, there, extra.get("gradient"))

        def through(options: TokenTM, u: Array) -> Array:
            if options.ffn and layer.attention is None and number == layer.output:
                own = view.rows(layer.stream), view.rows(layer.branch)
                u = ffn_layer(u, kept(options, index, ffn_weights(*own, view, options)))
            if options.norms and number == layer.normed:
                gain = norm_gain(view.rows(layer.output), view.rows(number))
                u = ffn_layer(u, kept(options, index, gain - 1))
            return u

        streams = tuple(through(options, u) for options, u in zip(wanted.rows, streams, strict=True))
        if layer is block[-1] and number == layer.end:
            index = index + 1
            note = {} if legrad is None else {"legrad": legrad(evaluation, block)}
        return value, (streams, index, *others), note

    def by_factor(tap: Tap, evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
        *others, factor = state
        value, factor, _ = tap(evaluation, value, factor, extra)
        return value, (*others, factor), {}

    if wanted.rows:
        taps.setdefault(structure.embedded, []).append(embedded)
    for block, _ in blocks_of(structure):
        attention = block[0].attention.weights  # type: ignore[union-attr]
        if wanted.effects or wanted.carried:
            taps.setdefault(block[0].stream, []).append(partial(observed, n))
        if wanted.rows or wanted.received:
            by_queries[attention] = partial(attended, block)
            if not wanted.received and [options.attention for options in wanted.rows] == ["gradient"]:
                by_heads[attention] = partial(by_head, block)
        for layer in block if wanted.rows or wanted.legrad else []:
            for number in {layer.output, layer.end}:
                taps.setdefault(number, []).append(partial(summed, block, layer, number))
    if wanted.effects or wanted.carried:
        taps.setdefault(structure.last, []).append(partial(observed, n))
    for number, tap in factor_taps(model, sample).items() if wanted.full_gradient else ():
        taps.setdefault(number, []).append(partial(by_factor, tap))
