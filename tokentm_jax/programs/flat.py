"""A jaxpr as one list of steps: calls are inlined, scans remain loops.

Values and literals have numbers, because a jaxpr that is called twice has the same variables both times; no two values
of a program and its bodies share one. A `Call` has the steps of a `custom_jvp` or `custom_vjp`, which keeps its
derivative unless a rule needs another.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Calls that are inlined: the name of the parameter with their jaxpr.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
# Steps that only newer versions of jax have, written with steps of all versions.
WRITTEN_OUT = {
    "unstack": lambda x, axis: [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])],
    "stack": lambda *xs, axis: [lax.concatenate([lax.expand_dims(x, (axis,)) for x in xs], axis)],
}
_LIBRARY = Path(str(jax.__file__)).parent


@dataclasses.dataclass(eq=False, repr=False)
class Step:
    """One equation, with the numbers of its inputs and outputs."""

    equation: JaxprEqn
    inputs: list[int]
    outputs: list[int]
    bodies: "tuple[Flat, ...]" = ()  # the body of a scan, or the branches of a cond
    call: JaxprEqn | None = None  # the outermost call that contains it
    kind: str = ""  # see `reading`
    of: Any = None  # what the rule of this kind needs

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params


@dataclasses.dataclass(eq=False, repr=False)
class Call:
    """The steps `start` to `stop` of one custom derivative."""

    equation: JaxprEqn
    inputs: list[int]
    outputs: list[int]
    start: int
    stop: int


@dataclasses.dataclass(eq=False, repr=False)
class Flat:
    """A jaxpr, flat."""

    types: list[Any]  # the aval of every number, also of those in bodies
    inputs: list[int] = dataclasses.field(default_factory=list)
    outputs: list[int] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)  # literals too
    steps: list[Step] = dataclasses.field(default_factory=list)
    calls: dict[int, Call] = dataclasses.field(default_factory=dict)  # by their first step
    producer: dict[int, Step] = dataclasses.field(default_factory=dict)  # of every value that a step computes

    def shape(self, number: int) -> tuple[int, ...]:
        return tuple(self.types[number].shape)


def bind(equation: Any, values: list[Any]) -> list[Any]:
    """One equation, as JAX evaluates it."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair in older versions of JAX
    with equation.ctx.manager:
        out = equation.primitive.bind(*functions, *values, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def axis_after(equation: Any, side: int, axis: int) -> int | None:
    """The axis of a step's result that is `axis` of input number `side`; None if it is removed, merged or split."""
    name, params, shapes = equation.primitive.name, equation.params, [v.aval.shape for v in equation.invars]
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name == "reshape":
        before, after = shapes[0], equation.outvars[0].aval.shape
        ahead = math.prod(before[:axis])
        alike = (p for p, size in enumerate(after) if size == before[axis] and math.prod(after[:p]) == ahead)
        return next(alike, None)
    if name == "squeeze" or "axes" in params:
        gone = params["dimensions"] if name == "squeeze" else params["axes"]
        return None if axis in gone else axis - sum(d < axis for d in gone)
    if name == "dot_general":
        contracted, batched = params["dimension_numbers"]
        if axis in (*contracted[side], *batched[side]):
            return batched[side].index(axis) if axis in batched[side] else None
        free = [a for a in range(len(shapes[side])) if a not in (*contracted[side], *batched[side])]
        return free.index(axis) + len(batched[0]) + side * (len(shapes[0]) - len(contracted[0]) - len(batched[0]))
    return axis


def closed(jaxpr: Any) -> Any:
    """The jaxpr of a call, closed."""
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())


def scanned(params: dict[str, Any]) -> tuple[int, int]:
    """The number of constant inputs of a scan, and of carried ones."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # jax 0.12
    return len(constants), len(carried)


def flatten(program: Any, types: list[Any] | None = None) -> Flat:
    """The flat form of a `ClosedJaxpr`; `types` are those of the program that contains it."""
    flat = Flat([] if types is None else types)
    flat.inputs = [_new(flat, v.aval) for v in program.jaxpr.invars]
    flat.outputs = _inline(flat, program.jaxpr, program.consts, flat.inputs, None)
    return flat


def _new(flat: Flat, aval: Any) -> int:
    flat.types.append(aval)
    return len(flat.types) - 1


def _inline(flat: Flat, jaxpr: Jaxpr, constants: Any, inputs: list[int], call: JaxprEqn | None) -> list[int]:
    """Append the steps of a jaxpr whose inputs have these numbers. Returns the numbers of its outputs."""
    names: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

    def constant(atom: Any, value: Any) -> int:
        number = _new(flat, atom.aval)
        flat.constants[number] = value
        return number

    def number(atom: Any) -> int:
        return constant(atom, atom.val) if isinstance(atom, Literal) else names[atom]

    names |= {atom: constant(atom, value) for atom, value in zip(jaxpr.constvars, constants, strict=True)}
    for equation in jaxpr.eqns:
        given = [number(v) for v in equation.invars]
        primitive = equation.primitive.name
        if primitive in WRITTEN_OUT:
            written = partial(WRITTEN_OUT[primitive], **equation.params)
            inner = jax.make_jaxpr(written)(*(v.aval for v in equation.invars))
            outputs = _inline(flat, inner.jaxpr, inner.consts, given, call or equation)
        elif primitive in CALLS:
            inner, start = closed(equation.params[CALLS[primitive]]), len(flat.steps)
            outputs = _inline(flat, inner.jaxpr, inner.consts, given, call or equation)
            if primitive in CUSTOM and len(flat.steps) > start and flat.constants.keys().isdisjoint(outputs):
                flat.calls[start] = Call(equation, given, outputs, start, len(flat.steps))
        else:
            outputs = [_new(flat, v.aval) for v in equation.outvars]
            bodies = {"scan": lambda p: (p["jaxpr"],), "cond": lambda p: p["branches"]}.get(primitive, lambda p: ())
            inside = tuple(flatten(body, flat.types) for body in bodies(equation.params))
            step = Step(equation, given, outputs, inside, call)
            flat.steps.append(step)
            flat.producer |= dict.fromkeys(outputs, step)
        names |= dict(zip(equation.outvars, outputs, strict=True))
    return [number(v) for v in jaxpr.outvars]


def line_of(step: Step) -> str:
    """The innermost source line of a step outside of JAX, as "file:line (function)"."""
    for equation in (step.equation, step.call):
        frame = None if equation is None else users(equation.source_info.traceback)
        if frame is not None:
            return f"{Path(frame.file_name).name}:{frame.line_num} ({frame.function_name})"
    return "unknown line"


def users(traceback: Any) -> Any:
    """The innermost frame of a traceback that is outside of JAX, or None."""
    for frame in traceback.frames if traceback is not None else ():
        if _LIBRARY not in Path(frame.file_name).parents and not frame.file_name.startswith("<"):
            return frame
    return None
