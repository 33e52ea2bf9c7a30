"""Plain attention in a program, which a kernel can compute: scale, mask or bias, softmax, product with the values.

It is found from the steps of `pieces`, which nothing else reads. Going back from the weights to the product of queries
with keys, each step must be the softmax over the keys, or make `scale * scores + bias` with a bias that does not
depend on the explained input. A mask by large negative numbers is a bias. All other attention runs as without the
kernel.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from tokentm_jax.programs.flat import Flat, Step, axis_after
from tokentm_jax.programs.kernel import attention_with_row
from tokentm_jax.programs.pieces import BROADCAST, ENTRIES, pieces_of_attention
from tokentm_jax.programs.reading import SAME_SHAPE, Reading

CHANNELS = 128  # of a head, at most: the kernel holds blocks of all channels
TYPES = ("float32", "bfloat16", "float16")
SOFTMAX = {"exp", "sub", "max", "reduce_max", "reduce_sum", *SAME_SHAPE, *BROADCAST}  # its steps before the quotient
SCALES = ((0, "mul"), (1, "mul"), (0, "div"))  # place of the scores in a product with a number, or a quotient
MASKED = -1e9  # a number that replaces scores and is not above this is a mask: its exponential is zero in float32

Axes = tuple[int | str | None, ...]  # for each axis: an axis of the weights, "channels", or None for an axis of size 1
Source = tuple[int, Axes]  # a value with its axes
Change = tuple[str, Source, float]  # how a step changes the scores: what it does, with which array and number

NOTHING: Source = (-1, ())


@dataclasses.dataclass(eq=False, repr=False)
class Fused:
    """One attention whose `steps` before the `product` with values are for the kernel."""

    product: Step
    steps: set[Step]
    inside: set[int]  # their values
    weights: set[int]  # of these, the attention weights, in one type or another
    heads: list[int]  # axes of the weights, all except `query` and `key`
    query: int
    key: int
    shape: tuple[int, ...]  # of the weights
    sources: tuple[Source, Source, Source]  # queries, keys, values
    changes: list[Change]  # from the product of queries and keys to the softmax
    result: Axes  # of the product

    @property
    def streams(self) -> tuple[int, int]:
        """The shape [H, K] of the streams of all heads."""
        return math.prod(self.shape[axis] for axis in self.heads), self.shape[self.key]

    def run(self, get: Callable[[int], Array], streams: Array) -> tuple[Array, Array]:
        """The tokens in the layout of the program, and zeros [Q], for the streams [H, K] of the heads.

        `get` returns a value. The cotangent of the zeros is a row r, and that of stream h is what head h gives to the
        keys.
        """
        scale, terms = 1.0, []  # of the bias: an array with its axes, for queries and keys
        for how, what, value in self.changes:
            if how == "scale":
                scale *= value
                terms = [(term * value, axes) for term, axes in terms]
            elif how == "add":
                terms.append((get(what[0]).astype(jnp.float32) * value, what[1]))
            else:  # "mask": the scores where it is true, `value` elsewhere, or the other way round
                mask = get(what[0]) if how == "mask" else ~get(what[0])
                terms.append((jnp.where(mask, 0.0, value).astype(jnp.float32), what[1]))
        shared = [axis for axis in self.heads if any(axis in axes for _, axes in terms)]
        order = [*shared, self.query, self.key]
        bias = sum(_placed(term, axes, order) for term, axes in terms) if terms else None
        if bias is not None:
            bias = jnp.broadcast_to(bias, [self.shape[axis] for axis in order])

        operands, owned = [], []
        for number, axes in self.sources:
            own = [axis for axis in self.heads if axis in axes]
            tokens = self.query if self.query in axes else self.key
            operands.append(_placed(get(number), axes, [*own, tokens, "channels"]))
            owned.append(own)
        sizes = [self.shape[axis] for axis in self.heads]
        function: Any = partial(attention_with_row, scale)
        for axis in reversed(self.heads):
            function = jax.vmap(function, in_axes=(*(0 if axis in own else None for own in (*owned, shared)), 0))
        tokens, zeros = function(*operands, bias, streams.reshape(*sizes, -1))
        zeros = zeros.reshape(-1, zeros.shape[-1]).sum(0)
        return _placed(tokens, (*self.heads, self.query, "channels"), self.result), zeros


def _placed(x: Array, axes: Axes, order: Any) -> Array:
    """An array whose axes are `axes`, with the axes `order`; those that it lacks have size 1."""
    x = jax.lax.squeeze(x, [place for place, axis in enumerate(axes) if axis is None])
    axes = tuple(axis for axis in axes if axis is not None)
    x = x.transpose([axes.index(axis) for axis in order if axis in axes])
    return jax.lax.expand_dims(x, [place for place, axis in enumerate(order) if axis not in axes])


@lru_cache(maxsize=64)
def fused_of(reading: Reading) -> dict[Step, Fused]:
    """The plain attentions of a program, by their last step."""
    found = (_fused(reading, product) for product in reading.attentions)
    return {fused.product: fused for fused in found if fused is not None}


def _fused(reading: Reading, product: Step) -> Fused | None:
    flat = reading.flat
    pieces = pieces_of_attention(reading, product, ENTRIES)
    if pieces is None:
        return None
    side = product.inputs.index(product.of)
    contracted, batched = product.params["dimension_numbers"]
    if len(contracted[side]) != 1:
        return None
    shape, (key,) = flat.shape(product.of), contracted[side]
    query = next(axis for axis in range(len(shape)) if axis_after(product.equation, side, axis) == pieces.axis)
    softmax, weights = _to_softmax(flat, product.of)
    if softmax is None or not _is_over(flat, softmax, key):
        return None
    scores = _to_scores(reading, softmax.of, len(shape))
    if scores is None:
        return None
    way, axes, changes = scores
    between = pieces.steps - {softmax, *way, *(flat.producer[number] for number in weights)}
    if not {step.name for step in between} <= SOFTMAX:  # such as a mask of the exponentials
        return None
    queries, keys = (_operand(flat, way[-1], which, axes) for which in (0, 1))
    if query not in queries[1]:
        queries, keys = keys, queries
    place = {axis: batched[side][i] for i, axis in enumerate(batched[1 - side])} | {contracted[1 - side][0]: key}
    value = product.inputs[1 - side]
    values = (value, tuple(place.get(axis, "channels") for axis in range(len(flat.shape(value)))))
    sources = (queries, keys, values)
    free = [axis for axis in range(len(shape)) if axis not in (key, *batched[side])]
    result: Axes = (*batched[side], *free, "channels") if side == 0 else (*batched[side], "channels", *free)
    for (number, own), tokens in zip(sources, (query, key, key), strict=True):
        if (
            own.count(tokens) != 1
            or own.count("channels") != 1
            or flat.shape(number)[own.index("channels")] > CHANNELS
        ):
            return None
    kinds = {str(flat.types[number].dtype) for number, _ in sources}
    if len(kinds) > 1 or not kinds <= {*TYPES}:
        return None
    heads = [axis for axis in range(len(shape)) if axis not in (query, key)]
    return Fused(product, pieces.steps, pieces.inside, weights, heads, query, key, shape, sources, changes, result)


def _to_softmax(flat: Flat, weights: int) -> tuple[Step | None, set[int]]:
    """The softmax that gives attention weights, and all values on the way; None if more than types changes."""
    passed = {weights}
    while (step := flat.producer.get(weights)) is not None and step.name in SAME_SHAPE:
        weights = step.inputs[0]
        passed.add(weights)
    return (step if step is not None and step.kind == "softmax" and step.name == "div" else None), passed


def _is_over(flat: Flat, softmax: Step, key: int) -> bool:
    """Whether a softmax divides by its sum over the axis `key` only."""
    total = softmax.inputs[1]
    while (step := flat.producer.get(total)) is not None and step.name in SAME_SHAPE | BROADCAST:
        total = step.inputs[0]
    return step is not None and step.name == "reduce_sum" and tuple(step.params["axes"]) == (key,)


def _to_scores(reading: Reading, value: int, axes: int) -> tuple[list[Step], Axes, list[Change]] | None:
    """The steps from `value` back to the product of queries and keys, its axes, and how the steps change it."""
    flat, places, changes, way = reading.flat, tuple(range(axes)), [], []
    later = 1.0  # the scale by the steps after
    while (step := flat.producer.get(value)) is not None:
        depends = reading.dependent(step)
        way.append(step)
        if step.name == "dot_general":
            return way, places, changes[::-1]
        if len(depends) != 1:
            return None
        (before,), (place, *_) = depends, [place for place, i in enumerate(step.inputs) if i in depends]
        others = [i for i in step.inputs if i != before]
        if step.name == "transpose":
            moved = dict(zip(step.params["permutation"], places, strict=True))
            places = tuple(moved[axis] for axis in range(axes))
        elif (place, step.name) in SCALES and (number := _number(flat, others[0])) is not None:
            if not number:
                return None
            changes.append(("scale", NOTHING, number if step.name == "mul" else 1 / number))
            later *= changes[-1][2]
        elif step.name in ("add", "sub") and place <= (step.name == "add"):
            changes.append(("add", _source(flat, others[0], places), 1.0 if step.name == "add" else -1.0))
        elif step.name == "select_n" and place > 0 and (number := _number(flat, step.inputs[3 - place])) is not None:
            if not number * later <= MASKED or later < 0 or flat.types[step.inputs[0]].dtype != bool:
                return None
            changes.append(("mask" if place == 2 else "unmask", _source(flat, step.inputs[0], places), number))
        elif step.name not in SAME_SHAPE:
            return None
        value = before
    return None


def _number(flat: Flat, value: int) -> float | None:
    """A constant scalar, perhaps broadcast or in another type."""
    while (step := flat.producer.get(value)) is not None and step.name in SAME_SHAPE | BROADCAST:
        value = step.inputs[0]
    known = flat.constants.get(value)
    if known is None or flat.shape(value) or isinstance(known, Tracer):
        return None
    return float(known)


def _source(flat: Flat, value: int, axes: Axes) -> Source:
    """The smallest array that broadcasts to a value with these axes."""
    while (step := flat.producer.get(value)) is not None and step.name in ("broadcast_in_dim", "squeeze"):
        before, after = flat.shape(step.inputs[0]), flat.shape(value)
        places = [axis_after(step.equation, 0, axis) for axis in range(len(before))]
        pairs = zip(before, places, strict=True)
        axes = tuple(None if at is None or size != after[at] else axes[at] for size, at in pairs)
        value = step.inputs[0]
    return value, axes if flat.shape(value) else ()


def _operand(flat: Flat, product: Step, which: int, axes: Axes) -> Source:
    """Queries or keys, whose axes in the result of their product are `axes`."""
    number = product.inputs[which]
    after = [axis_after(product.equation, which, axis) for axis in range(len(flat.shape(number)))]
    return number, tuple("channels" if place is None else axes[place] for place in after)
