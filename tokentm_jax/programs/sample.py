"""A program for a batch of one as a program for one sample: the same steps, without the axis of samples.

Any axis of size 1 may be removed. A program in which no step has such an axis is, mapped over a batch, as fast as a
program that was written for batches.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal

from tokentm_jax.programs.flat import CALLS, axis_after, bind, closed, scanned, users
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
    name, params = equation.primitive.name, equation.params
    if name in HOLDING:
        found = HOLDING[name](equation, given)
    elif name in CALLS and name != "custom_vjp_call":
        found = _run(closed(params[CALLS[name]]), given, equation.source_info.traceback)
    elif name in STEPS and params.get("sharding") is None and params.get("out_sharding") is None:
        found = STEPS[name](equation, given)
    else:
        found = None
    return [_slim(out) for out in bind(equation, list(map(full, given)))] if found is None else found


# ---- steps: each returns its outputs, or None if it needs the axis --------------------------------------------------


def _bound(equation: Any, values: Sequence[Any], lacking: int | None, /, **params: Any) -> list[Slim]:
    """A step with other parameters. Its outputs lack the axis `lacking`."""
    changed = equation.replace(params={**equation.params, **params})
    return [Slim(out, lacking) for out in bind(changed, list(values))]


def _lacking(given: list[Any]) -> int | None:
    """The axis that the first value lacks, of those that lack one."""
    return next((v.axis for v in given if isinstance(v, Slim) and v.axis is not None), None)


def _dropped(sizes: tuple[int, ...], place: int | None) -> tuple[int, ...]:
    return sizes if place is None else sizes[:place] + sizes[place + 1 :]


def _shifted(axes: Sequence[int], gone: int | None) -> tuple[int, ...]:
    """Numbers of axes without the axis `gone`."""
    return tuple(axes) if gone is None else tuple(axis - (axis > gone) for axis in axes if axis != gone)


def _elementwise(equation: Any, given: list[Any]) -> list[Slim] | None:
    axis, shapes = _lacking(given), [v.aval.shape for v in equation.invars]
    if axis is None:
        return _bound(equation, list(map(full, given)), None)
    if any(shape and shape[axis] != 1 for shape in shapes):
        return None
    values = [_without(v, axis) if shape else full(v) for v, shape in zip(given, shapes, strict=True)]
    return _bound(equation, values, axis)


# Parameter with axes, or with a number for each: `(parameter, axis of the input, that of the output) -> parameter`.
_CHANGES: dict[str, Callable[[Any, int | None, int | None], Any]] = {
    **dict.fromkeys(("permutation", "dimensions", "axes"), lambda own, before, after: _shifted(own, before)),
    **dict.fromkeys(("axis", "dimension"), lambda own, before, after: own - (own > before)),
    **dict.fromkeys(("start_indices", "limit_indices", "strides"), lambda own, before, after: _dropped(own, before)),
    **dict.fromkeys(("new_sizes", "shape"), lambda own, before, after: _dropped(own, after)),
    "broadcast_dimensions": lambda own, before, after: _shifted(_dropped(own, before), after),
}


def _with_axes(equation: Any, given: list[Any]) -> list[Slim] | None:
    name, params, before = equation.primitive.name, equation.params, _lacking(given)
    shape = tuple(equation.outvars[0].aval.shape)
    if before is not None:
        after = axis_after(equation, 0, before)
    elif name in ("reshape", "broadcast_in_dim") and 0 not in params.get("broadcast_dimensions", ()):
        after = 0  # a new one
    else:
        return None
    along = params.get("dimension", params.get("axis", -1))
    moved = name == "reshape" and params["dimensions"] is not None
    if along == before or moved or (after is not None and shape[after : after + 1] != (1,)):
        return None
    values = [full(v) if before is None else _without(v, before) for v in given]
    changed = {
        key: _CHANGES[key](own, before, after) for key, own in params.items() if key in _CHANGES and own is not None
    }
    order = list(changed.get("permutation", ()))
    if name in RESHAPES and _dropped(shape, after) == jnp.shape(values[0]) and order == sorted(order):
        return [Slim(values[0], after)]
    return _bound(equation, values, after, **changed)


def _dynamic_slice(equation: Any, given: list[Any]) -> list[Slim] | None:
    x, *starts = given
    sizes = equation.params["slice_sizes"]
    if not isinstance(x, Slim) or x.axis is None or sizes[x.axis] != 1:
        return None
    starts = [full(start) for place, start in enumerate(starts) if place != x.axis]
    return _bound(equation, [x.value, *starts], x.axis, slice_sizes=_dropped(sizes, x.axis))


def _dot(equation: Any, given: list[Any]) -> list[Slim] | None:
    axis = _lacking(given)
    if axis is None:
        return None
    side = 0 if isinstance(given[0], Slim) and given[0].axis is not None else 1
    gone = {side: axis}  # of each factor
    for pairs in equation.params["dimension_numbers"]:
        if axis in pairs[side]:
            gone[1 - side] = pairs[1 - side][pairs[side].index(axis)]
    numbers = [
        tuple(_shifted(pairs[s], gone.get(s)) for s in (0, 1)) for pairs in equation.params["dimension_numbers"]
    ]
    values = [_without(v, gone[s]) if s in gone else full(v) for s, v in enumerate(given)]
    return _bound(equation, values, axis_after(equation, side, axis), dimension_numbers=tuple(numbers))


RESHAPES = {"transpose", "reshape", "broadcast_in_dim", "squeeze"}
RESHAPES |= {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"}
STEPS: dict[str, Callable[[Any, list[Any]], list[Slim] | None]] = {
    **dict.fromkeys(ELEMENTWISE | SAME_SHAPE, _elementwise),
    **dict.fromkeys({*RESHAPES, "slice", "concatenate", "split", "cumsum", "cumlogsumexp"}, _with_axes),
    "dynamic_slice": _dynamic_slice,
    "dot_general": _dot,
}


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
    carry, found = lax.scan(turn, carry, turns, **{name: params[name] for name in ("length", "reverse", "unroll")})
    return [*carry, *(y if y.axis is None else Slim(y.value, y.axis + 1) for y in found)]


def _cond(equation: Any, given: list[Any]) -> list[Any]:
    def taken(branch: Any) -> Callable[..., list[Any]]:
        return lambda *values: [_slim(full(out)) for out in _run(branch, values)]

    index, *more = given
    return list(lax.switch(full(index), [taken(branch) for branch in equation.params["branches"]], *more))


HOLDING: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "remat2": _checkpoint,
    "custom_jvp_call": _custom_jvp,
    "scan": _scan,
    "cond": _cond,
}
