"""The kinds of a program's steps, found from its jaxpr, never from names.

Every value that depends on the explained input has a `Fact`: the root of which it is an elementwise function, whether
that function is linear, and whether it is a statistic. Every step with a rule gets a kind:

    kind         step                                           `step.of`
    linear       product with a kernel that does not depend     which input depends
    embed        the same, where it reads the input itself      which input depends
    mix          product of a softmax with values               number of the softmax's value
    gate         elementwise product with an activated value    which input is activated
    product      another product of two dependent values        -
    residual     sum of a stream and a branch that descends     (stream, branch)
    turn         sum of one value with itself, moved and scaled -
    add          another sum of two dependent values            -
    bias, scale  sum or product with an array that does not     which input depends
                 depend (but not with a scalar constant)
    position     sum with an array that has an axis of tokens   which input depends
    norm         tokens times (or over) their statistic         (tokens, statistic, x): numbers of values
    centre       a norm of x, less one of the mean of x         (the former, the latter, x)
    softmax      exp(r) / sum exp(r)                            number of the scores r
    reduce       sum over an axis of something linear           -

A value that is a non-linear function of its root is an `activation` at the end of its group (`Fact.linear`).
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jax.extend.core import Literal

from tokentm_jax.errors import Unfit
from tokentm_jax.programs.flat import Flat, Step, line_of, scanned

SAME_SHAPE = {
    "convert_element_type",
    "copy",
    "sharding_constraint",
    "reshard",
    "stop_gradient",
    "device_put",
    "reduce_precision",
}
SHAPE = SAME_SHAPE | {"reshape", "transpose", "broadcast_in_dim", "squeeze", "optimization_barrier"}
MOVES = {
    "slice",
    "dynamic_slice",
    "gather",
    "concatenate",
    "pad",
    "rev",
    "select_and_gather_add",
    "dynamic_update_slice",
    "scatter",
    "scatter-add",
    "split",
    "reduce_window_sum",
    "cumsum",
    "tile",
}
REDUCTIONS = {
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "argmax",
    "argmin",
    "reduce_window_max",
    "reduce_and",
    "reduce_or",
    "cummax",
    "cumlogsumexp",
}
LINEAR_ELEMENTWISE = {"neg", "add", "sub", "mul", "div", "add_any"}
ELEMENTWISE = LINEAR_ELEMENTWISE | {
    "exp",
    "exp2",
    "log",
    "log2",
    "log1p",
    "expm1",
    "tanh",
    "logistic",
    "erf",
    "erfc",
    "erf_inv",
    "sqrt",
    "rsqrt",
    "cbrt",
    "square",
    "integer_pow",
    "pow",
    "max",
    "min",
    "abs",
    "sign",
    "sin",
    "cos",
    "tan",
    "select_n",
    "clamp",
    "floor",
    "ceil",
    "round",
    "is_finite",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "not",
    "xor",
    "rem",
    "atan2",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
    "asin",
    "acos",
    "atan",
    "nextafter",
    "real",
    "imag",
    "population_count",
    "lgamma",
    "digamma",
    "one_minus_square",
    "polynomial",
}
REFUSED = {
    "while": "a while loop whose state depends on the input has no backward pass: use a scan or a Python loop",
    "pallas_call": "a Pallas kernel hides its attention: switch the fused attention of the model off",
    "ffi_call": "a foreign call hides what it computes: switch the fused kernel off",
    "dot_product_attention_fwd_wrapper": "cuDNN's attention hides its weights: use implementation='xla'",
    "shard_map": "a shard_map hides its steps: explain the function without it",
    "sort": "a sort has no rule: leave it out of the part that is explained",
}


@dataclasses.dataclass(eq=False)
class Fact:
    """Properties of a value that depends on the input."""

    root: int  # the value of which it is an elementwise function
    linear: bool = True  # that function is linear (a scalar times the root, perhaps in another type)
    statistic: bool = False  # a reduction of something non-linear, or a function of such reductions
    reduced: bool = False  # a function of reductions only
    exp: int | None = None  # the scores r, if it is exp(r), perhaps masked
    exp_sum: tuple[int, bool] | None = None  # (r, whether of the logarithm), if it is a function of sum exp(r)
    centred: int | None = None  # x, if it is x - mean(x)
    mean_of: int | None = None  # x, if it is the mean of x over an axis, broadcast or not
    weights: Step | None = None  # the softmax that gives it, perhaps in another shape
    norm: Step | None = None  # the norm that gives it, perhaps with an array added
    raw: bool = False  # the explained input, its numbers perhaps moved
    base: int = -1  # the source of its numbers, which are moved, scaled or summed with each other
    above: int = 0  # the values on which it depends, as bits


@dataclasses.dataclass(eq=False, repr=False)
class Reading:
    """The facts of a flat program, with `bodies` for its scans and `branches` for its conds."""

    flat: Flat
    facts: dict[int, Fact]
    sums: list[Step]  # residual sums: `a + b` where b descends from a
    attentions: list[Step]  # products of a softmax with values
    exempt: set[int]  # values inside a softmax, without the rule of activations
    bodies: dict[Step, "Reading"]
    branches: dict[Step, list["Reading"]]
    norms: list[Step]
    softmaxes: list[Step]

    def descends(self, value: int, other: int) -> bool:
        """Whether `value` depends on `other`."""
        return bool(self.facts[value].above >> other & 1)


def read(flat: Flat, dependent: Iterable[int], raw: bool = True) -> Reading:
    """Read a program. `dependent` are its explained inputs.

    Raises Unfit for a step without a rule, with its name and source line.
    """
    reading = Reading(flat, {}, [], [], set(), {}, {}, [], [])
    for value in dependent:
        reading.facts[value] = Fact(value, base=value, above=1 << value, raw=raw)
    for step in flat.steps:
        depends = [i for i in step.inputs if not isinstance(i, Literal) and i in reading.facts]
        if depends:
            _read_step(reading, step, depends)
    return reading


def _set(reading: Reading, step: Step, **known: Any) -> Fact:
    """Set the fact of a step's outputs; by default each output is a new root."""
    above = 0
    for i in step.inputs:
        if not isinstance(i, Literal) and i in reading.facts:
            above |= reading.facts[i].above
    fact = None
    for out in step.outputs:
        fact = Fact(**{"root": out, "base": out, **known}, above=above | 1 << out)
        reading.facts[out] = fact
    assert fact is not None
    return fact


def _read_step(reading: Reading, step: Step, depends: list[int]) -> None:
    name, facts = step.name, reading.facts
    if name in REFUSED:
        raise Unfit(f"{line_of(step)}: {REFUSED[name]}")
    if name == "scan":
        return _read_scan(reading, step)
    first = facts[depends[0]]
    if name in SHAPE:
        return _read_shape(reading, step, depends[0])
    if name in REDUCTIONS:
        return _read_reduction(reading, step, depends[0])
    if name in ("dot_general", "conv_general_dilated"):
        return _read_product(reading, step, depends)
    if name in ELEMENTWISE:
        return _read_elementwise(reading, step, list(dict.fromkeys(depends)))
    if name in MOVES:
        known: dict[str, Any] = {key: all(getattr(facts[i], key) for i in depends) for key in ("statistic", "raw")}
        weights = first.weights if len(depends) == 1 and name == "slice" else None
        _set(reading, step, weights=weights, **known, **_base(facts, depends))
        return None
    if name == "cond":
        return _read_cond(reading, step)
    raise Unfit(f"{line_of(step)}: no rule for the operation '{name}'")


def _read_shape(reading: Reading, step: Step, value: int) -> None:
    """The same numbers in another shape or type."""
    fact = reading.facts[value]
    kept = {field.name: getattr(fact, field.name) for field in dataclasses.fields(fact) if field.name != "above"}
    if step.name not in SAME_SHAPE or reading.flat.shape(value) != reading.flat.shape(step.outputs[0]):
        # A group of elementwise steps ends when the shape changes; the numbers are the same.
        kept |= {"root": step.outputs[0], "linear": True}
    _set(reading, step, **kept)


def _read_reduction(reading: Reading, step: Step, value: int) -> None:
    fact = reading.facts[value]
    if step.name == "reduce_sum" and fact.exp is not None:
        _set(reading, step, statistic=True, reduced=True, exp_sum=(fact.exp, False))
        reading.exempt |= _members(reading, fact.root)
    elif step.name != "reduce_sum" or not fact.linear or fact.statistic:
        _set(reading, step, statistic=True, reduced=True)
    else:
        step.kind = "reduce"
        _set(reading, step, reduced=True, mean_of=value)


def _members(reading: Reading, root: int) -> set[int]:
    return {v for v, fact in reading.facts.items() if fact.root == root and not fact.linear}


def _read_product(reading: Reading, step: Step, depends: list[int]) -> None:
    facts = reading.facts
    if len(depends) == 2 and facts[depends[0]].root == facts[depends[1]].root and _contracts_all(step):
        _set(reading, step, statistic=True, reduced=True)  # x . x
        return
    if len(depends) == 1 and not _is_computed(reading, step, depends[0]):
        step.kind, step.of = "embed" if facts[depends[0]].raw else "linear", 0 if step.inputs[0] == depends[0] else 1
        _set(reading, step)
        return
    weights = [i for i in depends if facts[i].weights is not None]
    step.kind, step.of = ("mix", weights[0]) if weights else ("product", None)
    _set(reading, step)
    if weights:
        reading.attentions.append(step)


def _contracts_all(step: Step) -> bool:
    """Whether a product pairs all entries of two values: x . x of each token, not tokens with tokens."""
    if step.name != "dot_general":
        return False
    (contracted, _), (batched, _) = step.params["dimension_numbers"]
    first: Any = step.equation.invars[0].aval
    return len(contracted) + len(batched) == first.ndim


def _is_computed(reading: Reading, step: Step, value: int) -> bool:
    """Whether the other factor of a product is the result of a linear map, such as a learned query."""
    other = step.inputs[1 - step.inputs.index(value)]
    while not isinstance(other, Literal) and (producer := reading.flat.producer.get(other)) is not None:
        if producer.name == "dot_general":
            return True
        if producer.name not in SHAPE | MOVES | LINEAR_ELEMENTWISE:
            return False
        other = producer.inputs[0]
    return False


def _is_scalar(reading: Reading, atom: Any) -> bool:
    return math.prod(reading.flat.shape(atom)) == 1


def _read_elementwise(reading: Reading, step: Step, depends: list[int]) -> None:
    facts, name = reading.facts, step.name
    known = [facts[i] for i in depends]
    statistics = [f for f in known if f.statistic]
    # A mean times the deviation is part of a norm that multiplies before it subtracts.
    scaled_mean = name in ("mul", "div") and any(f.linear and not f.statistic for f in known)
    if statistics and all(f.reduced or f.statistic for f in known) and not scaled_mean:
        sums = [f.exp_sum for f in statistics if f.exp_sum]
        total = sums[0] if sums else None
        if total and name == "log":
            total = (total[0], True)
        _set(reading, step, statistic=True, reduced=True, exp_sum=total)
    elif statistics:
        _read_with_statistic(reading, step, depends)
    elif len({f.root for f in known}) == 1:
        _read_of_one_root(reading, step, depends)
    else:
        _read_of_two_roots(reading, step, depends)


def _read_with_statistic(reading: Reading, step: Step, depends: list[int]) -> None:
    """A token and a statistic: a softmax, a norm, or a shift."""
    facts, name = reading.facts, step.name
    tokens = next(i for i in depends if not facts[i].statistic)
    statistic = next(i for i in depends if facts[i].statistic)
    token, over = facts[tokens], facts[statistic]
    if name in ("mul", "div") and token.exp is not None and over.exp_sum == (token.exp, False):
        step.kind, step.of = "softmax", token.exp
        fact = _set(reading, step)
        fact.weights = step
        reading.softmaxes.append(step)
        reading.exempt |= _members(reading, token.root)
    elif name in ("mul", "div"):
        source = token.centred if token.centred is not None else tokens
        step.kind, step.of = "norm", (tokens, statistic, source)
        _set(reading, step, reduced=token.reduced, norm=step)
        reading.norms.append(step)
    elif name in ("sub", "add"):  # a shift, as by the maximum
        shift = over.exp_sum
        _set(reading, step, root=token.root, linear=token.linear, exp_sum=shift if shift and shift[1] else None)
    else:
        _set(reading, step, root=token.root, linear=False)


def _read_of_one_root(reading: Reading, step: Step, depends: list[int]) -> None:
    """An elementwise function of one root stays in the root's group, unless an array is added or multiplied."""
    facts, name = reading.facts, step.name
    known = [facts[i] for i in depends]
    first = known[0]
    others = [a for a in step.inputs if isinstance(a, Literal) or a not in facts]
    with_array = len(step.inputs) == 2 and len(others) == 1 and not _is_scalar(reading, others[0])
    if with_array and name in LINEAR_ELEMENTWISE and first.exp is None:
        place = 0 if step.inputs[0] == depends[0] else 1
        if name == "div" and place == 1:  # 1 / x
            _set(reading, step, root=first.root, linear=False, reduced=first.reduced)
            return
        kind = "scale" if name in ("mul", "div") else "bias"
        if kind == "bias" and _has_tokens(reading, others[0], step.outputs[0]):
            kind = "position"
        step.kind, step.of = kind, place
        kept: dict[str, Any] = _base(facts, depends) if kind == "scale" else {"norm": first.norm}
        _set(reading, step, reduced=first.reduced, **kept)
        return
    linear = all(f.linear for f in known) and (
        name in ("neg", "convert_element_type")
        or (name in ("mul", "div") and len(others) == 1 and not (name == "div" and step.inputs[1] == depends[0]))
        or (name in ("add", "sub") and not others)
        or (name in ("add", "sub") and all(_is_scalar(reading, a) for a in others))
        or (name == "select_n" and len(depends) == 1 and depends[0] in step.inputs[1:])
    )
    exp = None
    if name == "exp":
        exp = _scores(reading, depends[0])
    elif first.exp is not None and len(depends) == 1 and name in ("select_n", "mul"):
        exp = first.exp
    mean = first.mean_of if name == "neg" or (name in ("div", "mul") and len(others) == 1) else None
    fact = _set(
        reading,
        step,
        root=first.root,
        base=first.base if linear else step.outputs[0],
        linear=linear and exp is None,
        reduced=all(f.reduced for f in known),
        exp=exp,
        mean_of=mean,
    )
    if first.weights is not None and len(depends) == 1 and name in ("select_n", "mul"):
        fact.weights = first.weights  # masked again
    if name == "exp" and first.exp_sum is not None and first.exp_sum[1]:  # exp(r - log sum exp(r))
        step.kind, step.of = "softmax", exp
        fact.root, fact.linear, fact.exp, fact.weights = step.outputs[0], True, None, step
        reading.softmaxes.append(step)


def _scores(reading: Reading, value: int) -> int:
    """The scores of a softmax, before the maximum was subtracted."""
    while True:
        step = reading.flat.producer.get(value)
        if step is None or step.name not in ("sub", "convert_element_type"):
            return value
        given = [i for i in step.inputs if not isinstance(i, Literal) and i in reading.facts]
        tokens = [i for i in given if not reading.facts[i].statistic]
        if len(tokens) != 1 or (step.name == "sub" and len(given) != 2):
            return value
        value = tokens[0]


def _base(facts: dict[int, Fact], depends: list[int]) -> dict[str, int]:
    """The base of values that share one; else nothing, and the result is a new base."""
    bases = {facts[i].base for i in depends}
    return {"base": bases.pop()} if len(bases) == 1 else {}


def _has_tokens(reading: Reading, atom: Any, out: int) -> bool:
    """Whether an added array has more axes than the last, not counting axes of size 1 (a table of positions)."""
    shape = reading.flat.shape(atom)
    return len(shape) == len(reading.flat.shape(out)) and any(n > 1 for n in shape[:-1])


def _read_of_two_roots(reading: Reading, step: Step, depends: list[int]) -> None:
    facts, name = reading.facts, step.name
    if name in ("mul", "div") and len(depends) == 2:
        nonlinear = [place for place, i in enumerate(step.inputs) if not facts[i].linear]
        step.kind, step.of = ("gate", nonlinear[0]) if len(nonlinear) == 1 else ("product", None)
        _set(reading, step)
    elif name in ("add", "sub", "add_any") and len(depends) == 2:
        a, b = step.inputs
        pairs = ((a, b), (b, a))
        means = [(x, of) for x, m in pairs if (of := facts[m].mean_of) is not None]
        centred = [x for x, of in means if facts[x].root == facts[of].root]
        scaled = [(x, m) for x, m in pairs if _is_centre(facts, facts[x].norm, facts[m].norm)]
        if centred:
            _set(reading, step, centred=centred[0])
        elif scaled:
            _read_centre(reading, step, *scaled[0])
        elif facts[a].base == facts[b].base:
            step.kind = "turn"
            _set(reading, step, base=facts[a].base)
        else:
            step.kind = "add"
            _set(reading, step)
            if name != "sub" and reading.flat.shape(a) == reading.flat.shape(b):
                _read_sum(reading, step, pairs)
    else:
        _set(reading, step)


def _is_centre(facts: dict[int, Fact], norm: Step | None, other: Step | None) -> bool:
    """Whether one norm is of x, and the other of the mean of x by the same statistic."""
    if norm is None or other is None or (mean_of := facts[other.of[0]].mean_of) is None:
        return False
    same = facts[norm.of[1]].base == facts[other.of[1]].base
    return same and facts[norm.of[0]].root == facts[mean_of].root


def _read_centre(reading: Reading, step: Step, scaled: int, mean: int) -> None:
    """The end of a norm that multiplies before it subtracts."""
    norm, of_mean = reading.facts[scaled].norm, reading.facts[mean].norm
    assert norm is not None and of_mean is not None
    step.kind, step.of = "centre", (scaled, mean, norm.of[2])
    reading.norms = [other for other in reading.norms if other not in (norm, of_mean)] + [step]
    _set(reading, step)


def _read_sum(reading: Reading, step: Step, pairs: Iterable[tuple[int, int]]) -> None:
    """Find a sum of a stream and its branch. A multiple of the stream counts as the stream."""
    for stream, branch in pairs:
        fact = reading.facts[stream]
        if reading.descends(branch, fact.root if fact.linear else stream):
            reading.sums.append(step)
            step.kind, step.of = "residual", (stream, branch)
            return


def _read_scan(reading: Reading, step: Step) -> None:
    """Read the body once. Its dependent inputs are those that depend after any number of iterations."""
    consts, carries = scanned(step.params)
    (body,) = step.bodies
    depends = [not isinstance(i, Literal) and i in reading.facts for i in step.inputs]
    while True:
        inner = read(body, [v for v, is_so in zip(body.inputs, depends, strict=True) if is_so], raw=False)
        out = [not isinstance(o, Literal) and o in inner.facts for o in body.outputs]
        changed = [out[c] and not depends[consts + c] for c in range(carries)]
        if not any(changed):
            break
        for c in range(carries):
            depends[consts + c] |= out[c]
    reading.bodies[step] = inner
    _set(reading, step)
    for o, is_so in zip(step.outputs, out, strict=True):
        if not is_so:
            del reading.facts[o]


def _read_cond(reading: Reading, step: Step) -> None:
    """Read every branch. The choice of the branch must not depend on the input."""
    depends = [not isinstance(i, Literal) and i in reading.facts for i in step.inputs]
    if depends[0]:
        raise Unfit(f"{line_of(step)}: a branch that is chosen by the input has no rule: choose it by the parameters")
    branches = []
    for body in step.bodies:
        given = [v for v, is_so in zip(body.inputs, depends[1:], strict=True) if is_so]
        branches.append(read(body, given, raw=False))
    reading.branches[step] = branches
    _set(reading, step)
    for place, out in enumerate(step.outputs):
        ends = [(branch, branch.flat.outputs[place]) for branch in branches]
        if not any(not isinstance(end, Literal) and end in branch.facts for branch, end in ends):
            del reading.facts[out]
