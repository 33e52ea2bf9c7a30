"""Attention in pieces of queries: from the scores of some queries to their tokens, so that no array [H, N, N] is held.

Every step between the product of queries with keys and that of the weights with values treats each query separately:
scale, mask, bias, softmax. So these steps run for some queries and all keys at a time. The backward pass computes a
piece again, and sums the gradients of keys and values over the pieces.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import dropwhile
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.programs.flat import Flat, Step, axis_after, bind, flatten
from tokentm_jax.programs.reading import ELEMENTWISE, SAME_SHAPE, Reading, read

# Numbers of attention weights of a block, in all heads. Pieces take 1.5 times as long, so only attention of more than
# 64 MiB (in float32) is cut, into pieces of 16 MiB.
LARGE = 2**24
ENTRIES = 2**22

SIZES = {"new_sizes", "shape", "limit_indices"}  # parameters with an entry for every axis of the result
BROADCAST = {"broadcast_in_dim", "reshape", "transpose", "squeeze"}
BY_QUERY = ELEMENTWISE | SAME_SHAPE | BROADCAST | {"dot_general", "reduce_sum", "reduce_max", "reduce_min"}

Place = tuple[int, int | None]  # a value, and its axis of queries; None: all of the value


@dataclasses.dataclass(eq=False, repr=False)
class Pieces:
    """The steps of one attention that run in pieces of `rows` queries."""

    product: Step  # of weights with values, the last step
    axis: int  # of the queries in its result
    queries: int
    rows: int
    steps: set[Step]  # before the product
    inside: set[int]  # their values
    given: dict[Place, Step]  # what they read from outside, and one step that reads it
    reading: Reading  # of these steps for one piece: a program of `given`
    numbers: dict[int, int]  # the values inside, in that program
    axes: dict[int, int]  # of the queries in these values, by their number in that program

    @property
    def count(self) -> int:
        return -(-self.queries // self.rows)

    def run(self, piece: Callable[..., Any], values: list[Array]) -> Any:
        """`piece(*parts of values)` for every piece: its results, stacked over pieces.

        Values are the `given` ones, once or for several evaluations.
        """
        axes = [axis for _, axis in self.given] * (len(values) // len(self.given))
        split = [x for x, axis in zip(values, axes, strict=True) if axis is not None]
        places = [axis for axis in axes if axis is not None]

        @partial(jax.checkpoint, prevent_cse=False)
        def one(parts: list[Array]) -> Any:
            moved = (jnp.moveaxis(part, 0, axis) for part, axis in zip(parts, places, strict=True))
            return piece(*(x if axis is None else next(moved) for x, axis in zip(values, axes, strict=True)))

        return jax.lax.map(one, [self._split(x, axis) for x, axis in zip(split, places, strict=True)])

    def _split(self, x: Array, axis: int) -> Array:
        """[pieces, rows, ...]. The last query fills the last piece, because a query of zeros may have no softmax."""
        x = jnp.moveaxis(x, axis, 0)
        more = self.count * self.rows - len(x)
        if more:
            x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (more, *x.shape[1:]))])
        return x.reshape(self.count, self.rows, *x.shape[1:])

    def joined(self, x: Array, axis: int) -> Array:
        """Stacked results whose axis of queries is `axis`, as one."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, self.queries, axis=axis)


def pieces_of(reading: Reading) -> dict[Step, Pieces]:
    """The attentions of a program that run in pieces, by their last step."""
    return _pieces_of(reading, LARGE, ENTRIES)


@lru_cache(maxsize=64)
def _pieces_of(reading: Reading, large: int, entries: int) -> dict[Step, Pieces]:
    large_ones = (step for step in reading.attentions if math.prod(reading.flat.shape(step.of)) > large)
    found = (pieces_of_attention(reading, product, entries) for product in large_ones)
    return {pieces.product: pieces for pieces in found if pieces is not None}


def query_axis(reading: Reading, product: Step) -> int | None:
    """The axis of the queries in attention weights, by their product with values; None if it is unclear.

    If values lack several axes of the weights, one has the queries: it becomes the axis of tokens of the residual sum.
    The others are groups of heads with the same values, perhaps as many as tokens, so sizes do not tell them apart.
    """
    weights = product.of
    side, shape = product.inputs.index(weights), reading.flat.shape(weights)
    contracted, batched = product.params["dimension_numbers"]
    free = [a for a in range(len(shape)) if shape[a] > 1 and a not in (*contracted[side], *batched[side])]
    if len(free) == 1:
        return free[0]
    found = [axis for axis in free if _are_tokens(reading, product, axis_after(product.equation, side, axis))]
    return found[0] if len(found) == 1 else None


def _are_tokens(reading: Reading, product: Step, axis: Any) -> bool:
    """Whether an axis of a step's result becomes that of the tokens in the next residual sum [.., N, D]."""
    flat, start = reading.flat, product.outputs[0]
    axes, size = {start: axis}, flat.shape(start)[axis]
    for step in dropwhile(lambda other: other is not product, flat.steps):
        if step.kind == "residual" and reading.descends(step.of[1], start) and not reading.descends(step.of[0], start):
            shape, found = flat.shape(step.of[1])[:-1], axes.get(step.of[1])
            return found is not None and found < len(shape) and shape[found] == math.prod(shape) == size
        after = {axis_after(step.equation, side, axes[i]) for side, i in enumerate(step.inputs) if i in axes} - {None}
        if step.name in BY_QUERY and len(after) == 1:
            axes |= dict.fromkeys(step.outputs, after.pop())
    return False


def pieces_of_attention(reading: Reading, product: Step, entries: int) -> Pieces | None:
    """The pieces of one attention; None if a step may mix queries."""
    flat, weights = reading.flat, product.of
    if product.name != "dot_general":
        return None
    side, shape, query = product.inputs.index(weights), flat.shape(weights), query_axis(reading, product)
    if query is None:
        return None
    queries = shape[query]
    axis: Any = axis_after(product.equation, side, query)
    rows = max(1, entries * queries // math.prod(shape))
    rows = -(-queries // -(-queries // rows))  # of the same number of pieces, with the least padding

    own: list[Place] = [(weights, query), (product.inputs[1 - side], None)]
    steps = {product: own if side == 0 else own[::-1]}
    inside: dict[int, int] = {}  # values, with their axis of queries
    given: dict[Place, Step] = {own[1]: product}
    waiting = [(weights, query, product)]
    while waiting:
        number, at, reader = waiting.pop()
        if inside.get(number, at) != at:
            return None
        step, dependent = flat.producer.get(number), number in reading.facts
        if step is None or not _is_by_query(step, dependent):
            if dependent and flat.shape(number).count(queries) > 1:  # it holds scores
                return None
            given[number, at] = reader
        elif number not in inside:
            inside[number] = at
            steps[step] = [(i, _axis_before(flat, step, side, at)) for side, i in enumerate(step.inputs)]
            for i, its in steps[step]:
                if its is None or (step.name == "dot_general" and flat.shape(i).count(queries) == 1):
                    given[i, its] = step
                else:
                    waiting.append((i, its, step))
    ordered = {step: steps[step] for step in flat.steps if step in steps}
    # Masks and biases may have other readers, so their steps also stay where they are.
    skipped = {step for step in ordered if step.outputs[0] in reading.facts and step is not product}
    others = {i for step in flat.steps if step not in steps for i in step.inputs}
    scores = {step.outputs[0] for step in skipped}
    if scores & {*others, *flat.outputs, *(i for i, _ in given)} or all(at is None for _, at in given):
        return None
    scalars = {place for place in given if place[0] in flat.constants and not flat.shape(place[0])}
    given = {place: step for place, step in given.items() if place not in scalars}
    result = (product.outputs[0], axis)

    def piece(*values: Array) -> Array:
        known: dict[Place, Any] = {place: flat.constants[place[0]] for place in scalars}
        known |= zip(given, values, strict=True)
        for step, places in ordered.items():
            out = result if step is product else (step.outputs[0], inside[step.outputs[0]])
            sizes = {name: with_rows(own, out[1], rows) for name, own in step.params.items() if name in SIZES}
            equation = step.equation.replace(params={**step.params, **sizes})
            (known[out],) = bind(equation, [known[place] for place in places])
        return known[result]

    types = [
        jax.ShapeDtypeStruct(flat.shape(i) if at is None else with_rows(flat.shape(i), at, rows), flat.types[i].dtype)
        for i, at in given
    ]
    part = flatten(jax.make_jaxpr(piece)(*types))
    depends = (new for new, (i, _) in zip(part.inputs, given, strict=True) if i in reading.facts)
    own_reading = read(part, depends, raw=False)
    if [(step.name, step.kind) for step in part.steps] != [(step.name, step.kind) for step in ordered]:
        return None
    numbers = {old.outputs[0]: new.outputs[0] for old, new in zip(ordered, part.steps, strict=True)}
    axes = {new: axis if old == product.outputs[0] else inside[old] for old, new in numbers.items()}
    return Pieces(product, axis, queries, rows, skipped, scores, given, own_reading, numbers, axes)


@jax.custom_vjp
def tied(x: Array, means: list[Array]) -> Array:
    """x. Backward, the cotangent of each array of `means` is its mean, everywhere."""
    return x


tied.defvjp(
    lambda x, means: (x, means),
    lambda means, g: (g, [jnp.full_like(each, each.mean()) for each in means]),
)


def with_rows(sizes: tuple[int, ...], axis: int, rows: int) -> tuple[int, ...]:
    """A shape with `rows` along an axis."""
    return (*sizes[:axis], rows, *sizes[axis + 1 :])


def _is_by_query(step: Step, dependent: bool) -> bool:
    """Whether a step may run for some queries: it treats each by itself, or it only broadcasts a mask or bias."""
    params = step.params
    placed = params.get("sharding") is not None or params.get("out_sharding") is not None
    moved = step.name == "reshape" and params["dimensions"] is not None
    return step.name in (BY_QUERY if dependent else BROADCAST) and not placed and not moved


def _axis_before(flat: Flat, step: Step, side: int, after: int) -> int | None:
    """The axis of input number `side` that is the axis `after` of a step's result, with its size; None if none is."""
    shape, size = flat.shape(step.inputs[side]), flat.shape(step.outputs[0])[after]
    axes = (axis for axis in range(len(shape)) if shape[axis] == size)
    return next((axis for axis in axes if axis_after(step.equation, side, axis) == after), None)
