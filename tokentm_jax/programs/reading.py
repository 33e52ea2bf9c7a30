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
from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any

from tokentm_jax.errors import Unfit
from tokentm_jax.programs.flat import Flat, Step, line_of, scanned

SAME_SHAPE = {"convert_element_type", "copy", "sharding_constraint", "reshard", "stop_gradient", "device_put",
              "reduce_precision"}  # fmt: skip
SHAPE = SAME_SHAPE | {"reshape", "transpose", "broadcast_in_dim", "squeeze", "optimization_barrier"}
MOVES = {"slice", "dynamic_slice", "gather", "concatenate", "pad", "rev", "select_and_gather_add", "scatter",
         "dynamic_update_slice", "scatter-add", "split", "reduce_window_sum", "cumsum", "tile"}  # fmt: skip
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "reduce_window_max",
              "reduce_and", "reduce_or", "cummax", "cumlogsumexp"}  # fmt: skip
LINEAR_ELEMENTWISE = {"neg", "add", "sub", "mul", "div", "add_any"}
ELEMENTWISE = LINEAR_ELEMENTWISE | {
    "exp", "exp2", "log", "log2", "log1p", "expm1", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma",
    "sqrt", "rsqrt", "cbrt", "square", "integer_pow", "pow", "one_minus_square", "polynomial", "rem", "nextafter",
    "max", "min", "abs", "sign", "clamp", "floor", "ceil", "round", "is_finite", "real", "imag", "select_n",
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "population_count",
    "sin", "cos", "tan", "asin", "acos", "atan", "atan2",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
}  # fmt: skip
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
    facts: dict[int, Fact] = dataclasses.field(default_factory=dict)
    sums: list[Step] = dataclasses.field(default_factory=list)  # residual sums: `a + b` where b descends from a
    attentions: list[Step] = dataclasses.field(default_factory=list)  # products of a softmax with values
    exempt: set[int] = dataclasses.field(default_factory=set)  # inside a softmax, without the rule of activations
    bodies: dict[Step, "Reading"] = dataclasses.field(default_factory=dict)
    branches: dict[Step, list["Reading"]] = dataclasses.field(default_factory=dict)
    norms: list[Step] = dataclasses.field(default_factory=list)
    softmaxes: list[Step] = dataclasses.field(default_factory=list)

    def dependent(self, step: Step) -> list[int]:
        """The inputs of a step that depend on the explained input."""
        return [i for i in step.inputs if i in self.facts]

    def descends(self, value: int, other: int) -> bool:
        """Whether `value` depends on `other`."""
        return value in self.facts and bool(self.facts[value].above >> other & 1)


def read(flat: Flat, dependent: Iterable[int], raw: bool = True) -> Reading:
    """Read a program. `dependent` are its explained inputs.

    Raises Unfit for a step without a rule, with its name and source line.
    """
    reading = Reading(flat)
    for value in dependent:
        reading.facts[value] = Fact(value, base=value, above=1 << value, raw=raw)
    for step in flat.steps:
        if depends := reading.dependent(step):
            if step.name in REFUSED:
                raise Unfit(f"{line_of(step)}: {REFUSED[step.name]}")
            if step.name not in READERS:
                raise Unfit(f"{line_of(step)}: no rule for the operation '{step.name}'")
            READERS[step.name](reading, step, depends)
    return reading


def _set(reading: Reading, step: Step, outputs: Iterable[int] | None = None, **known: Any) -> Any:
    """Set the fact of a step's outputs, or of some; by default each is a new root. Returns that of the last one."""
    above, fact = 0, None
    for i in reading.dependent(step):
        above |= reading.facts[i].above
    for out in step.outputs if outputs is None else outputs:
        fact = Fact(**{"root": out, "base": out, **known}, above=above | 1 << out)
        reading.facts[out] = fact
    return fact


def _read_shape(reading: Reading, step: Step, depends: list[int]) -> None:
    """The same numbers in another shape or type."""
    value, out = depends[0], step.outputs[0]
    kept = {**vars(reading.facts[value])}
    del kept["above"]
    if step.name not in SAME_SHAPE or reading.flat.shape(value) != reading.flat.shape(out):
        # A group of elementwise steps ends when the shape changes; the numbers are the same.
        kept |= {"root": out, "linear": True}
    _set(reading, step, **kept)


def _read_move(reading: Reading, step: Step, depends: list[int]) -> None:
    """Some of the numbers, or those of several values, at other places."""
    facts = [reading.facts[i] for i in depends]
    weights = facts[0].weights if len(depends) == 1 and step.name == "slice" else None
    known: dict[str, Any] = {key: all(getattr(fact, key) for fact in facts) for key in ("statistic", "raw")}
    _set(reading, step, weights=weights, **known, **_base(facts))


def _read_reduction(reading: Reading, step: Step, depends: list[int]) -> None:
    fact = reading.facts[depends[0]]
    if step.name == "reduce_sum" and fact.exp is not None:
        _set(reading, step, statistic=True, reduced=True, exp_sum=(fact.exp, False))
        _exempt(reading, fact.root)
    elif step.name != "reduce_sum" or not fact.linear or fact.statistic:
        _set(reading, step, statistic=True, reduced=True)
    else:
        step.kind = "reduce"
        _set(reading, step, reduced=True, mean_of=depends[0])


def _exempt(reading: Reading, root: int) -> None:
    """The values between the scores and the result of a softmax are no activations."""
    reading.exempt |= {v for v, fact in reading.facts.items() if fact.root == root and not fact.linear}


def _read_product(reading: Reading, step: Step, depends: list[int]) -> None:
    facts = [reading.facts[i] for i in depends]
    if len(facts) == 2 and facts[0].root == facts[1].root and _contracts_all(reading, step):
        _set(reading, step, statistic=True, reduced=True)  # x . x
    elif len(facts) == 1 and not _is_computed(reading, step, depends[0]):
        step.kind, step.of = "embed" if facts[0].raw else "linear", step.inputs.index(depends[0])
        _set(reading, step)
    else:
        weights = [i for i in depends if reading.facts[i].weights is not None]
        step.kind, step.of = ("mix", weights[0]) if weights else ("product", None)
        _set(reading, step)
        reading.attentions += [step] * bool(weights)


def _contracts_all(reading: Reading, step: Step) -> bool:
    """Whether a product pairs all entries of two values: x . x of each token, not tokens with tokens."""
    if step.name != "dot_general":
        return False
    (contracted, _), (batched, _) = step.params["dimension_numbers"]
    return len(contracted) + len(batched) == len(reading.flat.shape(step.inputs[0]))


def _is_computed(reading: Reading, step: Step, value: int) -> bool:
    """Whether the other factor of a product is the result of a linear map, such as a learned query."""
    other = step.inputs[1 - step.inputs.index(value)]
    while (producer := reading.flat.producer.get(other)) is not None:
        if producer.name == "dot_general":
            return True
        if producer.name not in SHAPE | MOVES | LINEAR_ELEMENTWISE:
            return False
        other = producer.inputs[0]
    return False


def _read_elementwise(reading: Reading, step: Step, depends: list[int]) -> None:
    depends = list(dict.fromkeys(depends))
    facts, name = [reading.facts[i] for i in depends], step.name
    statistics = [f for f in facts if f.statistic]
    # A mean times the deviation is part of a norm that multiplies before it subtracts.
    scaled_mean = name in ("mul", "div") and any(f.linear and not f.statistic for f in facts)
    if statistics and all(f.reduced or f.statistic for f in facts) and not scaled_mean:
        total = next((f.exp_sum for f in statistics if f.exp_sum), None)
        if total and name == "log":
            total = (total[0], True)
        _set(reading, step, statistic=True, reduced=True, exp_sum=total)
    elif statistics:
        _read_with_statistic(reading, step, depends)
    elif len({f.root for f in facts}) == 1:
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
        _set(reading, step, weights=step)
        reading.softmaxes.append(step)
        _exempt(reading, token.root)
    elif name in ("mul", "div"):
        step.kind, step.of = "norm", (tokens, statistic, tokens if token.centred is None else token.centred)
        _set(reading, step, reduced=token.reduced, norm=step)
        reading.norms.append(step)
    elif name in ("sub", "add"):  # a shift, as by the maximum
        shift = over.exp_sum
        _set(reading, step, root=token.root, linear=token.linear, exp_sum=shift if shift and shift[1] else None)
    else:
        _set(reading, step, root=token.root, linear=False)


def _read_of_one_root(reading: Reading, step: Step, depends: list[int]) -> None:
    """An elementwise function of one root stays in the root's group, unless an array is added or multiplied."""
    facts, name = [reading.facts[i] for i in depends], step.name
    first, place = facts[0], step.inputs.index(depends[0])
    others = [i for i in step.inputs if i not in reading.facts]
    scalars = all(math.prod(reading.flat.shape(i)) == 1 for i in others)
    one_other, inverse = len(others) == 1, name == "div" and place == 1  # 1 / x
    if one_other and len(step.inputs) == 2 and not scalars and name in LINEAR_ELEMENTWISE and first.exp is None:
        if inverse:
            _set(reading, step, root=first.root, linear=False, reduced=first.reduced)
        elif name in ("mul", "div"):
            step.kind, step.of = "scale", place
            _set(reading, step, reduced=first.reduced, **_base(facts))
        else:
            step.kind = "position" if _has_tokens(reading, others[0], step.outputs[0]) else "bias"
            step.of = place
            _set(reading, step, reduced=first.reduced, norm=first.norm)
        return
    linear = all(f.linear for f in facts) and (
        name == "neg"
        or (name in ("mul", "div") and one_other and not inverse)
        or (name in ("add", "sub") and scalars)
        or (name == "select_n" and len(depends) == 1 and place > 0)
    )
    masked = len(depends) == 1 and name in ("select_n", "mul")  # exp(r) or a softmax, perhaps masked again
    exp = _scores(reading, depends[0]) if name == "exp" else first.exp if masked else None
    fact = _set(
        reading,
        step,
        root=first.root,
        base=first.base if linear else step.outputs[0],
        linear=linear and exp is None,
        reduced=all(f.reduced for f in facts),
        exp=exp,
        mean_of=first.mean_of if name == "neg" or (name in ("div", "mul") and one_other) else None,
        weights=first.weights if masked else None,
    )
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
        given = reading.dependent(step)
        tokens = [i for i in given if not reading.facts[i].statistic]
        if len(tokens) != 1 or (step.name == "sub" and len(given) != 2):
            return value
        value = tokens[0]


def _base(facts: list[Fact]) -> dict[str, Any]:
    """The base of values that share one; else nothing, and the result is a new base."""
    bases = {fact.base for fact in facts}
    return {"base": bases.pop()} if len(bases) == 1 else {}


def _has_tokens(reading: Reading, array: int, out: int) -> bool:
    """Whether an added array has more axes than the last, not counting axes of size 1 (a table of positions)."""
    shape = reading.flat.shape(array)
    return len(shape) == len(reading.flat.shape(out)) and any(n > 1 for n in shape[:-1])


def _read_of_two_roots(reading: Reading, step: Step, depends: list[int]) -> None:
    facts, name, both = reading.facts, step.name, len(depends) == 2
    if name in ("mul", "div") and both:
        nonlinear = [place for place, i in enumerate(step.inputs) if not facts[i].linear]
        step.kind, step.of = ("gate", nonlinear[0]) if len(nonlinear) == 1 else ("product", None)
    if name not in ("add", "sub", "add_any") or not both:
        _set(reading, step)
        return
    a, b = step.inputs
    pairs = ((a, b), (b, a))
    means = [(x, of) for x, m in pairs if (of := facts[m].mean_of) is not None]
    centred = next((x for x, of in means if facts[x].root == facts[of].root), None)
    scaled = next(((x, m) for x, m in pairs if _is_centre(facts, facts[x].norm, facts[m].norm)), None)
    if centred is not None:
        _set(reading, step, centred=centred)
    elif scaled is not None:  # the end of a norm that multiplies before it subtracts
        norm, of_mean = (facts[i].norm for i in scaled)
        assert norm is not None
        step.kind, step.of = "centre", (*scaled, norm.of[2])
        reading.norms = [other for other in reading.norms if other not in (norm, of_mean)] + [step]
        _set(reading, step)
    elif facts[a].base == facts[b].base:
        step.kind = "turn"
        _set(reading, step, base=facts[a].base)
    else:
        step.kind = "add"
        _set(reading, step)
        if name != "sub" and reading.flat.shape(a) == reading.flat.shape(b):
            _read_sum(reading, step, pairs)


def _is_centre(facts: dict[int, Fact], norm: Step | None, other: Step | None) -> bool:
    """Whether one norm is of x, and the other of the mean of x by the same statistic."""
    if norm is None or other is None or (mean_of := facts[other.of[0]].mean_of) is None:
        return False
    same = facts[norm.of[1]].base == facts[other.of[1]].base
    return same and facts[norm.of[0]].root == facts[mean_of].root


def _read_sum(reading: Reading, step: Step, pairs: Iterable[tuple[int, int]]) -> None:
    """Find a sum of a stream and its branch. A multiple of the stream counts as the stream."""
    for stream, branch in pairs:
        fact = reading.facts[stream]
        if reading.descends(branch, fact.root if fact.linear else stream):
            reading.sums.append(step)
            step.kind, step.of = "residual", (stream, branch)
            return


def _read_scan(reading: Reading, step: Step, _: list[int]) -> None:
    """Read the body once. Its dependent inputs are those that depend after any number of iterations."""
    consts, carries = scanned(step.params)
    (body,) = step.bodies
    depends, carried = [i in reading.facts for i in step.inputs], slice(consts, consts + carries)
    while True:
        inner = read(body, compress(body.inputs, depends), raw=False)
        out = [o in inner.facts for o in body.outputs]
        after = [before or now for before, now in zip(depends[carried], out[:carries], strict=True)]
        if after == depends[carried]:
            break
        depends[carried] = after
    reading.bodies[step] = inner
    _set(reading, step, compress(step.outputs, out))


def _read_cond(reading: Reading, step: Step, _: list[int]) -> None:
    """Read every branch. The choice of the branch must not depend on the input."""
    choice, *depends = (i in reading.facts for i in step.inputs)
    if choice:
        raise Unfit(f"{line_of(step)}: a branch that is chosen by the input has no rule: choose it by the parameters")
    branches = [read(body, compress(body.inputs, depends), raw=False) for body in step.bodies]
    reading.branches[step] = branches
    ends = zip(*([end in branch.facts for end in branch.flat.outputs] for branch in branches), strict=True)
    _set(reading, step, compress(step.outputs, map(any, ends)))


READERS: dict[str, Callable[[Reading, Step, list[int]], None]] = {
    **dict.fromkeys(SHAPE, _read_shape),
    **dict.fromkeys(MOVES, _read_move),
    **dict.fromkeys(REDUCTIONS, _read_reduction),
    **dict.fromkeys(("dot_general", "conv_general_dilated"), _read_product),
    **dict.fromkeys(ELEMENTWISE, _read_elementwise),
    "scan": _read_scan,
    "cond": _read_cond,
}
