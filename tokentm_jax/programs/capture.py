"""From (model, params, inputs, target) to arrays: those of all blocks in a forward and backward pass."""

import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.errors import InputError, Unfit, suggest
from tokentm_jax.inputs.values import seen, values, with_values
from tokentm_jax.maths.primitives import PyTree
from tokentm_jax.maths.scores import Target
from tokentm_jax.maths.variants import Blocks
from tokentm_jax.programs.model import Explainable, Model, Notes, check_model, function_of
from tokentm_jax.programs.reading import Reading
from tokentm_jax.programs.running import Evaluation, Plan
from tokentm_jax.programs.structure import Attention, Layer, Stage, normed


class Trace(NamedTuple):
    """One forward and backward pass of a batch. Axes: L blocks, B batch, H heads, N tokens, D width.

    Fields that were not requested are None.
    """

    tokens: Array | None  # [L+1, B, N, D] input of every block, and output of the last one (with "final_tokens")
    token_grads: Array | None  # [L+1, B, N, D] gradient of the score at `tokens`
    input_grads: Array | None  # [B, H, W, 3] gradient at the normalised images, or [B, N, D] at embeddings of texts
    attention: Array | None  # [L, B, H, N, N] after softmax
    attention_grad: Array | None  # [L, B, H, N, N]
    normalised: Array | None  # [L, B, N, D] input of the attention: LN1 of the block's input, or the block's input
    normalised_grads: Array | None  # [L, B, N, D]
    value: Array | None  # [L, B, H, N, D/H]
    transformed_value: Array | None  # [L, B, N, D]
    attention_branch: Array | None  # [L, B, N, D]
    ffn_branch: Array | None  # [L, B, N, D]
    value_kernel: Array | None  # [L, D, D] of the value projection, without its bias; only on request
    output_kernel: Array | None  # [L, D, D] of the output projection, with the layer's scale; only on request
    middle: Array | None  # [L, B, N, D] x' of post-norm blocks
    after: Array | None  # [L, B, N, D] x+ of post-norm blocks
    seen: Array | None  # [B, N] true for present tokens of texts; None: all
    logits: PyTree  # [B, classes], or other outputs of the model
    target: PyTree  # [B] the explained class, or the `Question`
    score: Array  # [B] the explained number: the logit of the class, or the score of the question

    def details(self) -> dict[str, PyTree]:
        """The details of every method: logits [B, classes], the explained class and its score [B]."""
        return {"logits": self.logits, "target": self.target, "score": self.score}

    def blocks(self) -> Blocks:
        """The arrays of all blocks. The batch is the second axis, except for kernels, which have none."""
        found = {name: getattr(self, name, None) for name in Blocks._fields}
        assert self.attention is not None
        depth = len(self.attention)
        if self.tokens is not None:
            found["tokens"] = self.tokens[:depth]
        if self.token_grads is not None and len(self.token_grads) > depth:
            found["output_grad"] = self.token_grads[1:]
        if self.seen is not None:
            found["seen"] = jnp.broadcast_to(self.seen, (depth, *self.seen.shape))
        return Blocks(**found)


# Field of `Trace` -> the point whose gradient it is.
GRADIENTS = {"attention_grad": "attention", "token_grads": "tokens", "normalised_grads": "normalised"}
SHOWN = ("tokens", "attention", "normalised", "value", "transformed_value", "attention_branch", "ffn_branch")
KERNELS = ("value_kernel", "output_kernel")
POST_NORM = ("middle", "after")
ALL = ("final_tokens", "input_grads", *SHOWN, *GRADIENTS)  # without kernels, which are parameters
FIELDS: Collection[str] = (*Trace._fields, "final_tokens")


def capture(
    module: Explainable | Model,
    params: PyTree,
    inputs: PyTree,
    target: Target = None,
    fields: Collection[str] | None = None,
    *,
    gradients: bool = True,
    first_block: int = 0,
) -> Trace:
    """Run the model forward, and backward if gradients are requested, and record arrays of the blocks.

    Args:
      module: a function `(params, inputs) -> outputs`, or a Linen module.
      params: its parameters.
      inputs: normalised images [B, H, W, C], `Tokens` or `Texts`.
      target: class of each sample [B] or one class for all; None for the predicted classes; or a `Question` of
        `tokentm_jax.maths.scores`.
      fields: requested fields of `Trace`, and "final_tokens", which appends the output of the last block to `tokens`
        and `token_grads`; None: all except the kernels, which a Linen module must sow. Logits and target are always
        present, and a backward pass is run only for gradients.
      gradients: False leaves out fields that are gradients.
      first_block: record this block and those after it. The backward pass ends there, except for "input_grads".

    Returns:
      A `Trace`. Gradients are of each sample's score.

    Raises:
      InputError: a requested field is not found in the model, or it has no block with this number.
    """
    model: Any = module
    if not isinstance(model, Model):
        function = function_of(module)
        check_model(function, params, inputs)
        inputs = function.look_up(params, inputs)
        model = function.read(params, inputs)
    if fields is None:
        fields = (*ALL, *POST_NORM) if model.structure.post_norm else ALL
    wanted: Any = fields
    if isinstance(wanted, str) or not isinstance(wanted, Iterable) or getattr(wanted, "shape", None) == ():
        raise InputError(f"fields must be a list of names of tm.Trace, got {wanted!r:.80}")
    for name in wanted:
        if name not in FIELDS:
            raise suggest("field", name, FIELDS, of="tm.capture")
    fields = {name for name in fields if gradients or name not in (*GRADIENTS, "input_grads")}
    kernels = {name: _sown(model, params, inputs, name)[first_block:] for name in KERNELS if name in fields}
    if first_block:
        check_blocks(model, first_block)
    one = partial(of_sample, model, params, fields=fields, first_block=first_block)
    known, details = model.per_sample(one, inputs, target)
    known = {name: array if name == "input_grads" else jnp.moveaxis(array, 0, 1) for name, array in known.items()}
    everything: Any = {**dict.fromkeys(Trace._fields), **known, **details, **kernels, "seen": seen(inputs)}
    return Trace(**everything)


def check_blocks(model: Model, first_block: int, end_block: int | None = None) -> None:
    """Raises InputError for blocks that the model does not have."""
    depth = model.structure.depth
    if not 0 <= first_block < depth:
        raise InputError(f"option 'first_block' must be from 0 to {depth - 1} for this model, got {first_block}")
    if end_block is not None and end_block > depth:
        raise InputError(f"option 'end_block' must be at most {depth} for this model, got {end_block}")


def _sown(model: Model, params: Any, inputs: Any, name: str) -> Array:
    """The arrays that a Linen module sows under a name, stacked over blocks."""
    sown: Any = {}
    if model.source.module is not None:
        sown = model.source.module.apply({"params": params}, inputs, mutable=["intermediates"])[1]
    paths = jax.tree_util.tree_leaves_with_path(sown)
    found = [array for path, array in paths if name in [getattr(key, "key", None) for key in path]]
    if not found:
        raise Unfit(f"the model sows no '{name}', which this explanation needs")
    return jnp.concatenate([array.reshape(-1, *array.shape[-2:]) for array in found])


def of_sample(
    model: Model,
    params: Any,
    sample: Any,
    score: Callable[[Any], Array],
    fields: Collection[str],
    first_block: int = 0,
) -> tuple[Any, Any]:
    """The fields for one sample, those of blocks [L, ...] from the first one on, and its outputs."""
    points = {point for field, point in GRADIENTS.items() if field in fields}
    both = "normalised" in points and model.structure.post_norm  # the stream, which the residual sum also reads
    points |= {"sum"} if both else set()
    final = "final_tokens" in fields
    stages = model.structure.since(first_block) if {*fields, *points} & POINTS.keys() else []
    places = _places(model, stages, {*fields, *points})
    taps = {number: partial(_note, names) for number, (_, names) in places.items()}
    untapped = {s.scan: s.scan.params["length"] - s.length for s in stages if s.scan is not None}
    plan = Plan(model.rules, taps, untapped=untapped)
    types = model.reading.flat.types if places else []
    zeros = {
        number: jnp.zeros((*turns, *types[number].shape), types[number].dtype)
        for number, (turns, names) in places.items()
        if points & names.keys()
    }

    def arrays(name: str, found: Notes) -> Array:
        """The gradients or notes of all blocks called `name`: [L, H, N, N], [L, H, N, D/H] or [L, N, D]."""
        laid = LAID.get(name, lambda attention, array: array.reshape(model.structure.tokens, -1))
        blocks = of_blocks(stages, found, POINTS[name], lambda block, array: laid(block[0].attention, array))
        blocks = blocks[first_block - model.structure.depth :]
        if name == "tokens" and final:
            blocks = jnp.concatenate([blocks, laid(None, found[model.structure.last])[None]])
        return blocks

    def run(zeros: Any, numbers: Array) -> tuple[Array, Any]:
        outputs, notes, _ = model.evaluate(params, with_values(sample, numbers), plan, zeros, None)
        return score(outputs), (notes, outputs)

    known: dict[str, Any] = {}
    if points or "input_grads" in fields:
        # Rules are not derivatives: where the map is differentiated, they must be inside this pass down to the input.
        asked = (0, 1) if "input_grads" in fields or model.rules else (0,)
        (grads, *of_input), (notes, outputs) = jax.grad(run, asked, has_aux=True)(zeros, values(sample))
        known = {"input_grads": of_input[0]} if "input_grads" in fields else {}
        for field, point in GRADIENTS.items():
            if field in fields:
                known[field] = arrays(point, grads)
        if both:
            known["normalised_grads"] -= arrays("sum", grads)
    else:
        _, (notes, outputs) = run({}, values(sample))
    for name in POINTS.keys() & set(fields):
        own = {number: note[name] for number, note in notes.items() if name in note}
        known[name] = arrays(name, own)
    return known, outputs


def plus_extra(evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
    """A tap that adds `extra` and notes the sum."""
    value = value if extra is None else value + extra.astype(value.dtype)
    return value, state, value


def _note(names: dict[str, Any], evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
    """A tap that adds `extra`, and notes the value, or x~ for "transformed_value", under each of the names."""
    value, state, _ = plus_extra(evaluation, value, state, extra)
    its = {name: name == "transformed_value" for name in names}
    found = {name: transformed_value(evaluation, names[name]) if its[name] else value for name in names}
    return value, state, found


def _places(
    model: Model, stages: list[Stage], names: Collection[str]
) -> dict[int, tuple[tuple[int, ...], dict[str, Any]]]:
    """The requested values: the axis of iterations of a scan, and their names, each with its block."""
    places: dict[int, tuple[tuple[int, ...], dict[str, Any]]] = {}
    asked = POINTS.keys() & set(names)
    for stage in stages:
        turns = () if stage.scan is None else (stage.length,)
        for block in stage.blocks:
            for name in asked:
                places.setdefault(POINTS[name](stage.reading, block), (turns, {}))[1][name] = block
    if "final_tokens" in names:
        places.setdefault(model.structure.last, ((), {}))[1]["tokens"] = None
    return places


def of_blocks(
    stages: list[Stage],
    notes: Notes,
    number: Callable[[Reading, list[Layer]], int],
    laid: Callable[[list[Layer], Any], Any] = lambda block, note: note,
) -> Any:
    """`laid(block, note)` of the note at the value `number(reading, block)`, for all blocks: [L, ...]."""
    parts = []
    for stage in stages:
        axis = 0 if stage.scan is None else 1  # after that of the iterations
        found = []
        for block in stage.blocks:
            each = partial(laid, block)
            found.append((jax.vmap(each) if axis else each)(notes[number(stage.reading, block)]))
        parts.append(jax.tree.map(lambda *a: jnp.stack(a, axis).reshape(-1, *a[0].shape[axis:]), *found))  # noqa: B023
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


# ---- values of a block ----------------------------------------------------------------------------------------------


def heads_of(attention: Attention, array: Array) -> Array:
    """Attention weights in the program's layout as [H, N, N], or those of some queries [H, Q, N]."""
    moved = array.transpose(attention.axes)
    return moved.reshape(-1, *moved.shape[-2:])


def as_before(attention: Attention, heads: Array, like: Array) -> Array:
    """[H, Q, N] in the layout of the program."""
    return heads.reshape([like.shape[axis] for axis in attention.axes]).transpose(np.argsort(attention.axes))


def values_of(attention: Attention, array: Array) -> Array:
    """The values of attention in the program's layout as [H, N, D/H], repeated for heads that share them."""
    tokens = len(attention.axes) - 2  # after the axes of heads
    *heads, n = attention.sizes[: tokens + 1]
    groups = range(tokens - (len(attention.places) - len(attention.order)), tokens)
    array = jnp.expand_dims(array.transpose(attention.order), groups)
    return jnp.broadcast_to(array, attention.sizes).reshape(math.prod(heads), n, -1)


def unmixed(attention: Attention, heads: Array) -> Array:
    """The product of attention with values [H, N, D/H], if each token attends only to itself."""
    return heads.reshape(attention.sizes).transpose(np.argsort(attention.places))


def through_output(evaluation: Evaluation, block: list[Layer], heads: Array) -> Array:
    """The values of attention [H, N, D/H] through the rest of the layer without its bias.

    Each token attends only to itself.
    """
    attention = block[0].attention
    assert attention is not None
    mixed = unmixed(attention, heads)
    return jax.jvp(evaluation.function([attention.output], block[0].branch), (jnp.zeros_like(mixed),), (mixed,))[1]


def transformed_value(evaluation: Evaluation, block: list[Layer]) -> Array:
    """x~ of the attention layer: its branch with the identity as attention, and without its last bias."""
    attention = block[0].attention
    assert attention is not None
    return through_output(evaluation, block, values_of(attention, evaluation.function([], attention.value)()))


def _normalised(reading: Reading, block: list[Layer]) -> int:
    """The input of the attention: the stream after its norm, or the stream."""
    found = normed(reading, block[0].stream, block[0].branch)
    return block[0].stream if found is None else found


def _ffn(block: list[Layer]) -> Layer:
    if len(block) < 2:
        raise InputError("a block of this function has no FFN layer, which this explanation needs")
    return block[1]


# Field of `Trace` -> its value in a block.
POINTS: dict[str, Callable[[Reading, list[Layer]], int]] = {
    "attention": lambda reading, block: block[0].attention.weights,  # type: ignore[union-attr]
    "tokens": lambda reading, block: block[0].stream,
    "normalised": _normalised,
    "value": lambda reading, block: block[0].attention.value,  # type: ignore[union-attr]
    "attention_branch": lambda reading, block: block[0].branch,
    "sum": lambda reading, block: block[0].output,
    "transformed_value": lambda reading, block: block[0].branch,
    "ffn_branch": lambda reading, block: _ffn(block).branch,
    "middle": lambda reading, block: block[0].normed,  # type: ignore[return-value]
    "after": lambda reading, block: _ffn(block).normed,  # type: ignore[return-value]
}
LAID: dict[str, Callable[[Any, Array], Array]] = {"attention": heads_of, "value": values_of}
