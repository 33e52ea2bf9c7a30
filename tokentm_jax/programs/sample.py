"""A program for a batch of one as a program for one sample: the same steps, without the axis of samples.

Any axis of size 1 may be removed. A program in which no step has such an axis is, mapped over a batch, as fast as a
program that was written for batches.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal

from tokentm_jax.programs.flat import CALLS, bind, closed, scanned, users
from tokentm_jax.programs.reading import ELEMENTWISE, SAME_SHAPE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Slim:
    """A value that depends on the sample, without its axis number `axis`, of size 1; None: it has all axes."""

    value: Any
    axis: int | None = dataclasses.field(metadata={"static": True})


def for_one_sample(program: Any, count: int = 1) -> Callable[..., list[Any]]:
    """A closed jaxpr `(*parameters, *sample [1, ...]) -> outputs [1, ...]` as a function without these axes.

    The sample has `count` arrays.
    """

    def function(*inputs: Any) -> list[Any]:
        outputs = _run(program, [*inputs[:-count], *(Slim(x, 0) for x in inputs[-count:])])
        return [_without(out, 0) for out in outputs]

    return function


def full(value: Any) -> Any:
    """A value with all its axes."""
    if not isinstance(value, Slim):
        return value
    return value.value if value.axis is None else lax.expand_dims(value.value, (value.axis,))


def _without(value: Any, axis: int) -> Any:
    """A value without its axis `axis`, which has size 1."""
    lacks = isinstance(value, Slim) and value.axis == axis
    return value.value if lacks else lax.squeeze(full(value), (axis,))


def _slim(array: Any) -> Slim:
    """A value that depends on the sample, without its first axis if that has size 1."""
    return Slim(lax.squeeze(array, (0,)), 0) if jnp.shape(array)[:1] == (1,) else Slim(array, None)


def _fitted(value: Any, axis: int | None) -> Slim:
    """A value without this axis."""
    return Slim(full(value) if axis is None else _without(value, axis), axis)


def _run(program: Any, inputs: Sequence[Any], call: Any = None) -> list[Any]:
    """The outputs of a closed jaxpr; `call` is the traceback of its call."""
    jaxpr = program.jaxpr
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *inputs], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        given = [value(atom) for atom in equation.invars]
        source = equation.source_info
        names = source_info_util.current_name_stack() + source.name_stack
        line = source.traceback if call is None or users(source.traceback) is not None else call
        with source_info_util.user_context(line, name_stack=names):
            outputs = _step(equation, given) if any(isinstance(v, Slim) for v in given) else bind(equation, given)
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _step(equation: Any, given: list[Any]) -> list[Any]:
    name = equation.primitive.name
    if name == "remat2":
        return _checkpoint(equation, given)
    if name in ("custom_jvp_call", "scan", "cond"):
        found = {"custom_jvp_call": _custom_jvp, "scan": _scan, "cond": _cond}[name](equation, given)
    elif name in CALLS and name != "custom_vjp_call":
        return _run(closed(equation.params[CALLS[name]]), given, equation.source_info.traceback)
    elif name in ELEMENTWISE or name in SAME_SHAPE:
        found = _elementwise(equation, given)
    else:
        found = STEPS[name](equation, given) if name in STEPS else None
    return [_slim(out) for out in bind(equation, list(map(full, given)))] if found is None else found


def _bound(equation: Any, values: Sequence[Any], lacking: int | None, /, **params: Any) -> list[Slim]:
    """A step with other parameters. Its outputs lack the axis `lacking`."""
    changed = equation.replace(params={**equation.params, **params})
    return [Slim(out, lacking) for out in bind(changed, list(values))]


def _shape(equation: Any, place: int = 0) -> tuple[int, ...]:
    return tuple(equation.invars[place].aval.shape)


# ---- steps: each returns its outputs, or None if it needs the axis --------------------------------------------------


def _elementwise(equation: Any, given: list[Any]) -> list[Slim] | None:
    axis = next((v.axis for v in given if isinstance(v, Slim) and v.axis is not None), None)
    if axis is None:
        return _bound(equation, list(map(full, given)), None)
    shapes = [_shape(equation, place) for place in range(len(given))]
    if any(shape and shape[axis] != 1 for shape in shapes) or equation.params.get("sharding") is not None:
        return None
    return _bound(
        equation, [_without(v, axis) if shape else full(v) for v, shape in zip(given, shapes, strict=True)], axis
    )


def _transpose(equation: Any, given: list[Any]) -> list[Slim] | None:
    (x,), order = given, equation.params["permutation"]
    if x.axis is None:
        return None
    left = tuple(p - (p > x.axis) for p in order if p != x.axis)
    if left == tuple(range(len(left))):
        return [Slim(x.value, order.index(x.axis))]
    return _bound(equation, [x.value], order.index(x.axis), permutation=left)


def _reshape(equation: Any, given: list[Any]) -> list[Slim] | None:
    x, sizes = given[0], tuple(equation.params["new_sizes"])
    if len(given) > 1 or equation.params["dimensions"] is not None or equation.params.get("sharding") is not None:
        return None
    before, axis = _shape(equation), None
    if x.axis is not None:
        ahead = math.prod(before[: x.axis])
        axis = next((p for p, size in enumerate(sizes) if size == 1 and math.prod(sizes[:p]) == ahead), None)
    elif sizes[:1] == (1,):
        axis = 0
    left = sizes if axis is None else sizes[:axis] + sizes[axis + 1 :]
    if left == jnp.shape(x.value):
        return [Slim(x.value, axis)]
    return _bound(equation, [x.value], axis, new_sizes=left)


def _broadcast(equation: Any, given: list[Any]) -> list[Slim] | None:
    x, shape, places = given[0], tuple(equation.params["shape"]), tuple(equation.params["broadcast_dimensions"])
    if len(given) > 1 or equation.params.get("sharding") is not None:
        return None
    if x.axis is not None:
        axis, places = places[x.axis], places[: x.axis] + places[x.axis + 1 :]
    elif 0 not in places:
        axis = 0
    else:
        return None
    if shape[axis : axis + 1] != (1,):
        return None
    left, places = shape[:axis] + shape[axis + 1 :], tuple(p - (p > axis) for p in places)
    if left == jnp.shape(x.value) and places == tuple(range(len(left))):
        return [Slim(x.value, axis)]
    return _bound(equation, [x.value], axis, shape=left, broadcast_dimensions=places)


def _squeeze(equation: Any, given: list[Any]) -> list[Slim] | None:
    (x,), gone = given, [d % len(_shape(equation)) for d in equation.params["dimensions"]]
    return _over(equation, x, gone, "dimensions")


def _reduce(equation: Any, given: list[Any]) -> list[Slim] | None:
    if len(given) > 1 or (equation.params.get("out_sharding") is not None):
        return None
    return _over(equation, given[0], equation.params["axes"], "axes")


def _over(equation: Any, x: Slim, gone: Sequence[int], name: str) -> list[Slim] | None:
    """A step that removes axes."""
    if x.axis is None:
        return None
    left = tuple(d - (d > x.axis) for d in gone if d != x.axis)
    axis = None if x.axis in gone else x.axis - sum(d < x.axis for d in gone)
    if not left:
        return [Slim(x.value, axis)]
    return _bound(equation, [x.value], axis, **{name: left})


def _along(name: str) -> Callable[[Any, list[Any]], list[Slim] | None]:
    """A step along the axis in its parameter `name`, of arrays with equal other axes."""

    def step(equation: Any, given: list[Any]) -> list[Slim] | None:
        along = equation.params[name]
        axis = next((v.axis for v in given if isinstance(v, Slim) and v.axis is not None), None)
        if axis is None or axis == along:
            return None
        return _bound(equation, [_without(v, axis) for v in given], axis, **{name: along - (along > axis)})

    return step


def _sliced(equation: Any, given: list[Any]) -> list[Slim] | None:
    x, params = given[0], equation.params
    if x.axis is None:
        return None
    of = {name: params[name] for name in ("start_indices", "limit_indices", "strides") if params[name] is not None}
    if of["limit_indices"][x.axis] - of["start_indices"][x.axis] != 1:
        return None
    return _bound(equation, [x.value], x.axis, **{k: v[: x.axis] + v[x.axis + 1 :] for k, v in of.items()})


def _dynamic_slice(equation: Any, given: list[Any]) -> list[Slim] | None:
    x, *starts = given
    sizes = equation.params["slice_sizes"]
    if not isinstance(x, Slim) or x.axis is None or sizes[x.axis] != 1:
        return None
    starts = [full(start) for place, start in enumerate(starts) if place != x.axis]
    return _bound(equation, [x.value, *starts], x.axis, slice_sizes=sizes[: x.axis] + sizes[x.axis + 1 :])


def _dot(equation: Any, given: list[Any]) -> list[Slim] | None:
    contracted, batched = (list(map(list, pair)) for pair in equation.params["dimension_numbers"])
    side = 0 if isinstance(given[0], Slim) and given[0].axis is not None else 1
    x, other = given[side], given[1 - side]
    if not isinstance(x, Slim) or x.axis is None or equation.params.get("out_sharding") is not None:
        return None
    ranks = [len(_shape(equation, place)) for place in (0, 1)]
    free = [[a for a in range(ranks[s]) if a not in contracted[s] and a not in batched[s]] for s in (0, 1)]
    own: int = x.axis
    partner = None
    for pairs in (contracted, batched):
        if own in pairs[side]:
            place = pairs[side].index(own)
            partner = pairs[1 - side][place]
            axis = place if pairs is batched else None
            del pairs[side][place], pairs[1 - side][place]
            break
    else:
        axis = len(batched[0]) + (len(free[0]) if side else 0) + free[side].index(own)
    other = full(other) if partner is None else _without(other, partner)

    def moved(pairs: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        near = tuple(a - (a > own) for a in pairs[side])
        far = tuple(a if partner is None else a - (a > partner) for a in pairs[1 - side])
        return (far, near) if side else (near, far)

    values = [other, x.value] if side else [x.value, other]
    return _bound(equation, values, axis, dimension_numbers=(moved(contracted), moved(batched)))


STEPS: dict[str, Callable[[Any, list[Any]], list[Slim] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "concatenate": _along("dimension"),
    "split": _along("axis"),
    "cumsum": _along("axis"),
    "cumlogsumexp": _along("axis"),
    "slice": _sliced,
    "dynamic_slice": _dynamic_slice,
    "dot_general": _dot,
} | dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce)


# ---- steps that hold programs --------------------------------------------------------------------------------------


def _checkpoint(equation: Any, given: list[Any]) -> list[Any]:
    params = equation.params

    def body(*values: Any) -> list[Any]:
        return _run(closed(params["jaxpr"]), values)

    return jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])(*given)


def _custom_jvp(equation: Any, given: list[Any]) -> list[Any] | None:
    """A step with a custom derivative, which is a program, too."""
    if not all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.invars):
        return None
    types = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars)
    call, axes = closed(equation.params["call_jaxpr"]), []  # axes of the outputs

    @jax.custom_jvp
    def function(*values: Any) -> list[Slim]:
        outputs = [out if isinstance(out, Slim) else Slim(out, None) for out in _run(call, values)]
        axes[:] = [out.axis for out in outputs]
        return outputs

    def differentiated(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return jax.jvp(lambda *values: bind(equation, list(values)), primals, tangents)

    @function.defjvp
    def tangent(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Slim], list[Slim]]:
        outputs = _run(jax.make_jaxpr(differentiated)(types, types), [*primals, *tangents])
        fitted = [_fitted(out, axis) for out, axis in zip(outputs, axes * 2, strict=True)]
        return fitted[: len(axes)], fitted[len(axes) :]

    return function(*given)


def _scan(equation: Any, given: list[Any]) -> list[Any]:
    params = equation.params
    consts, carries = scanned(params)
    fixed, carry, xs = given[:consts], given[consts : consts + carries], given[consts + carries :]
    carry = [v if isinstance(v, Slim) else _slim(v) for v in carry]

    def of_turn(x: Any) -> Any:
        if not isinstance(x, Slim) or x.axis is None:
            return x
        return Slim(full(x), None) if x.axis == 0 else Slim(x.value, x.axis - 1)

    def turn(carried: list[Any], turns: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _run(params["jaxpr"], [*fixed, *carried, *turns])
        after = [_fitted(out, v.axis) for out, v in zip(outputs[:carries], carry, strict=True)]
        return after, [out if isinstance(out, Slim) else Slim(out, None) for out in outputs[carries:]]

    turns = [of_turn(x) for x in xs]
    carry, found = lax.scan(turn, carry, turns, params["length"], params["reverse"], params["unroll"])
    return [*carry, *(y if y.axis is None else Slim(y.value, y.axis + 1) for y in found)]


def _cond(equation: Any, given: list[Any]) -> list[Any]:
    def taken(branch: Any) -> Callable[..., list[Any]]:
        return lambda *values: [_slim(full(out)) for out in _run(branch, values)]

    index, *more = given
    return list(lax.switch(full(index), [taken(branch) for branch in equation.params["branches"]], *more))
