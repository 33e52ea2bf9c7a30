"""The positions of a stream's tokens in later values, and a part of a block for some tokens."""

from collections import ChainMap
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.programs.flat import Flat, Step, axis_after, bind
from tokentm_jax.programs.reading import ELEMENTWISE, SAME_SHAPE, Reading
from tokentm_jax.programs.running import Evaluation

MOVING = {"transpose", "broadcast_in_dim", "squeeze", "reshape", "dot_general"}
SIZES = {"new_sizes", "shape", "limit_indices"}  # of parameters, with an entry for every axis of the result
FOR_EACH = {*ELEMENTWISE, *SAME_SHAPE, "dot_general", "transpose", "reshape", "broadcast_in_dim", "slice", "squeeze"}
FOR_EACH |= {"reduce_sum", "reduce_max", "split", "optimization_barrier"}

Rows = tuple[int, np.ndarray] | np.ndarray  # (axis, share of each token [length, N]), or the shares [N] of a mixture


def rows_from(
    reading: Reading, start: int, n: int, attentions: Mapping[int, int] = MappingProxyType({})
) -> dict[int, Any]:
    """Where the tokens of the value `start` [.., N, D] are in later values: `Rows` by number.

    Unclear values are left out. In attention, the tokens are the queries, whose axes are given.
    """
    flat = reading.flat
    axes = [a for a, size in enumerate(flat.types[start].shape[:-1]) if size == n]
    if len(axes) != 1:
        return {}
    known: dict[int, Any] = {start: (axes[0], np.eye(n))}
    queries = {weights: (axis, np.eye(n)) for weights, axis in attentions.items()}
    for step in flat.steps:
        given = [(i, known[i]) for i in step.inputs if i in known]
        for out in step.outputs:
            rows = queries.get(out, _rows_after(flat, step, given, out, queries) if given else None)
            if rows is not None:
                known[out] = rows
    return known


def mixture(rows: Any) -> np.ndarray:
    return rows[1].mean(0) if isinstance(rows, tuple) else rows


def _rows_after(flat: Flat, step: Step, given: list[tuple[int, Any]], out: int, queries: Any = ()) -> Any:
    """The rows after one step; None if they are unclear."""
    number, rows = given[0]
    before, after = flat.types[number].shape, flat.types[out].shape
    if len(given) > 1:
        with_axis = [r for _, r in given if isinstance(r, tuple)]
        of_query = [(i, r) for i, r in given if i in queries]
        if of_query and step.name == "dot_general":
            return _rows_after(flat, step, of_query, out)
        if step.name == "dot_general" and with_axis:  # attention pooling: the shares depend on the image
            return mixture(with_axis[0])
        joined = step.name == "concatenate" and len(with_axis) == len(given)
        if joined and step.params["dimension"] == with_axis[0][0]:
            return (with_axis[0][0], np.concatenate([r[1] for r in with_axis]))
        if with_axis:
            return with_axis[0]
        distinct = [r for _, r in given]
        return sum(distinct) / len(distinct)
    if not isinstance(rows, tuple):
        return rows
    axis, shares = rows
    side = step.inputs.index(number)
    if step.name == "slice":
        start, stop = step.params["start_indices"][axis], step.params["limit_indices"][axis]
        stride = (step.params["strides"] or [1] * len(before))[axis]
        return (axis, shares[start:stop:stride])
    if step.name in ("gather", "dynamic_slice") and before[axis] != (after[axis] if axis < len(after) else None):
        index = flat.constants.get(step.inputs[1 + axis] if step.name == "dynamic_slice" else step.inputs[1])
        if index is None or (np.ndim(index) and np.any(index)):
            return None
        return shares[int(np.ravel(index)[0])]
    if step.name in MOVING or "axes" in step.params:
        place = axis_after(step.equation, side, axis)
        if step.name != "reshape" or (place is not None and before[axis] > 1):
            return shares.mean(0) if place is None else (place, shares)
        merged = [s for s in after if s % before[axis] == 0 and s >= before[axis]]
        if before[axis] == 1 or len(shares) == 1:
            return shares.mean(0)
        return (list(after).index(merged[0]), shares) if merged else None
    if step.name in ELEMENTWISE or before == after:
        return rows
    return shares.mean(0) if step.name != "scan" else None


def for_tokens(
    evaluation: Evaluation, rows: Mapping[int, Any], weights: int, end: int, size: int, tokens: np.ndarray
) -> Callable[[Array], Array] | None:
    """The part of a block after its attention `weights`, for some of its `size` tokens: attention of these queries ->
    these tokens of the value `end`. None if a step may mix tokens."""

    def axis(number: int) -> int | None:
        """The axis of the tokens, if all of them are there in their order."""
        known = rows.get(number)
        if not isinstance(known, tuple) or known[1].shape != (size, size) or (known[1] != np.eye(size)).any():
            return None
        return known[0]

    steps: list[tuple[Step, Any, int | None]] = []  # each with its equation for these tokens, and their axis
    changed = {weights}
    for step in evaluation.chain([weights], end):
        given = [i for i in step.inputs if i in changed]
        if not given:
            steps.append((step, step.equation, None))
            continue
        out = axis(step.outputs[0])
        partly = len(step.outputs) > 1 and len(given) < len(step.inputs)  # a barrier of other values as well
        if out is None or partly or step.name not in FOR_EACH or any(axis(i) is None for i in given):
            return None
        changed |= {*step.outputs}
        params = {
            name: (*value[:out], len(tokens), *value[out + 1 :]) if name in SIZES else value
            for name, value in step.params.items()
        }
        steps.append((step, step.equation.replace(params=params), out))

    def through(attention: Array) -> Array:
        known = ChainMap({weights: attention}, evaluation.values)
        for step, equation, out in steps:
            values = [known[i] for i in step.inputs]
            if out is not None and step.name in ELEMENTWISE:
                for place, i in enumerate(
                    step.inputs
                ):  # what is added or multiplied has all tokens, or an axis of one
                    if i not in changed and jnp.ndim(values[place]) > 0 and values[place].shape[out] == size:
                        values[place] = jnp.take(values[place], tokens, out)
            known.update(zip(step.outputs, bind(equation, values), strict=True))
        return known[end]

    return through
