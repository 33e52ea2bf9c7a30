"""The evaluation of a program, step by step, with other backward rules and with taps.

A rule is a function `rule(f, *inputs)` that returns `f(*inputs)` with another backward pass. `f` computes one step of
a kind (`reading`) from these inputs:

    linear, embed           f(x, kernel)          bias, scale, position   f(x, array)
    mix, product            f(a, b)               norm                    f(x, statistic)
    gate                    f(gate, x)            softmax                 f(scores)
    centre                  f(norm of x, norm of its mean)
    add, residual, turn     f(a, b)               reduce, activation      f(x)
    fork                    f(x) -> (x as the residual sum reads it, x as its branch does)

`f.steps` of an activation, a norm and a softmax are the names of its operations.

A tap is a function `tap(value, state, extra) -> (value, state, note)` of one value of the program, which continues
with the returned value. The state goes from tap to tap, also through scans. Notes are collected, and stacked over the
iterations of a scan. `extra` is the tap's slice of additional inputs for each iteration.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.extend.core import Literal

from tokentm_jax.programs.flat import Call, Step, bind, scanned
from tokentm_jax.programs.reading import ELEMENTWISE, SAME_SHAPE, Reading

KINDS = ("linear", "embed", "mix", "product", "gate", "add", "residual", "turn", "bias", "scale", "position", "norm",
         "centre", "softmax", "reduce", "activation", "fork")  # fmt: skip

Rule = Callable[..., Any]
Rules = Mapping[str, Rule]
Tap = Callable[[Array, Any, Any], tuple[Array, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to evaluate a program: rules by kind, and taps by reading and value."""

    rules: Rules = dataclasses.field(default_factory=dict)
    taps: Mapping[Reading, Mapping[int, Callable[..., Tap]]] = dataclasses.field(default_factory=dict)
    checkpoint: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda body: body  # of the body of a scan


def scan_key(step: Step) -> int:
    """The key of a scan's notes and extras among those of the program's values."""
    return -1 - step.outputs[0]


class Evaluation:
    """One evaluation of a program, or of one iteration of a scan's body; `values` are the ones known so far."""

    def __init__(self, reading: Reading, plan: Plan, inputs: list[Any], state: Any = None, extra: Any = None) -> None:
        self.reading, self.plan, self.state = reading, plan, state
        self.values: dict[int, Any] = {**reading.flat.constants}
        self.known: dict[int, Any] = {}  # values by rules, for steps outside of their group
        self.forks = {s.of[0]: s for s in reading.sums if isinstance(s.of, tuple)} if "fork" in plan.rules else {}
        self.taps, self.extra, self.notes = plan.taps.get(reading, {}), extra or {}, {}
        for number, value in zip(reading.flat.inputs, inputs, strict=True):
            self._put(number, value)

    def run(self) -> "Evaluation":
        """All steps, in order."""
        flat, place = self.reading.flat, 0
        while place < len(flat.steps):
            call = flat.calls.get(place)
            if call is not None and not self._touches(call):
                place = call.stop
                values = bind(call.equation, [self.get(i) for i in call.inputs])
                outputs = call.outputs
            else:
                place += 1
                outputs, values = flat.steps[place - 1].outputs, self._step(flat.steps[place - 1])
            for number, value in zip(outputs, values, strict=True):
                self._put(number, value)
        self.outputs = [self.get(o) for o in flat.outputs]
        return self

    def held(self) -> "Evaluation":
        """The same values as constants."""
        other = copy.copy(self)
        other.values = {number: jax.lax.stop_gradient(value) for number, value in self.values.items()}
        return other

    def get(self, atom: Any, step: Step | None = None) -> Any:
        """The value of an atom as `step` reads it; None: as an output."""
        if isinstance(atom, Literal):
            return atom.val
        if self.plan.rules and atom in self.reading.facts:
            if atom in self.forks:
                return self._forked(atom, step)
            if self._leaves(atom, step):
                return self._activated(atom)
        return self.values[atom]

    def _put(self, number: int, value: Any) -> None:
        self.current = number
        if number in self.taps:
            value, self.state, note = self.taps[number](self)(value, self.state, self.extra.get(number))
            if note is not None:
                self.notes[number] = note
        self.values[number] = value

    def _leaves(self, atom: int, step: Step | None) -> bool:
        """Whether a value leaves its group of elementwise steps here, so that a rule applies."""
        fact, rules = self.reading.facts.get(atom), self.plan.rules
        if fact is None or fact.root == atom or fact.statistic or atom in self.reading.exempt:
            return False
        # A multiple has its ordinary derivative, unless rules carry relevance, which biases do not change.
        if "activation" not in rules or (fact.linear and "bias" not in rules):
            return False
        if step is not None and (step.name in ELEMENTWISE or step.name in SAME_SHAPE):
            out = self.reading.facts.get(step.outputs[0])
            return not (out is not None and out.root == fact.root)
        return True

    def _activated(self, atom: int) -> Any:
        if atom not in self.known:
            root = self.reading.facts[atom].root
            self.known[atom] = self.plan.rules["activation"](self.function([root], atom), self.get(root))
        return self.known[atom]

    def _forked(self, atom: int, step: Step | None) -> Any:
        if atom not in self.known:
            value = self._activated(atom) if self._leaves(atom, step) else self.values[atom]
            self.known[atom] = self.plan.rules["fork"](lambda x: (x, x), value)
        return self.known[atom][0 if step is self.forks[atom] else 1]

    def _touches(self, call: Call) -> bool:
        """Whether a rule or a tap is for a step inside a custom derivative, which is then evaluated step by step."""
        steps = self.reading.flat.steps[call.start : call.stop]
        inside = {number for step in steps for number in step.outputs}
        if inside - set(call.outputs) & self.taps.keys():
            return True
        if not self.plan.rules:
            return False
        return any(
            step.kind in self.plan.rules
            or any(not isinstance(i, Literal) and i in inside and self._leaves(i, step) for i in step.inputs)
            for step in steps
        )

    def _step(self, step: Step) -> list[Any]:
        if step in self.reading.bodies:
            return self._scan(step)
        if step in self.reading.branches:
            return self._cond(step)
        rule = self.plan.rules.get(step.kind)
        if rule is None:
            return bind(step.equation, [self.get(i, step) for i in step.inputs])
        return [self._ruled(step, rule)]

    def _ruled(self, step: Step, rule: Rule) -> Any:
        """The value of a step by the rule of its kind."""
        if step.kind == "norm":
            _, statistic, x = step.of
            return rule(self.function([x, statistic], step.outputs[0]), self.get(x), self.get(statistic, step))
        if step.kind == "softmax":
            return rule(self.function([step.of], step.outputs[0]), self.get(step.of))
        order = [0, 1][: len(step.inputs)]
        if step.kind == "centre":
            order = [step.inputs.index(number) for number in step.of[:2]]
        if step.kind == "reduce":
            return rule(lambda x: bind(step.equation, [x])[0], self.get(step.inputs[0], step))
        if step.kind in ("linear", "embed", "bias", "scale", "position", "gate") and step.of == 1:
            order = [1, 0]

        def f(*inputs: Any) -> Any:
            return bind(step.equation, [inputs[order.index(i)] for i in range(len(inputs))])[0]

        return rule(f, *(self.get(step.inputs[i], step) for i in order))

    def function(self, starts: list[int], end: Any) -> Callable[..., Any]:
        """The part of the program from some values to another, as a function without rules.

        Other values are used as they are known, or computed.
        """
        chain = self.chain(starts, end)

        def f(*inputs: Any) -> Any:
            own = dict(zip(starts, inputs, strict=True))
            for step in chain:
                given = [
                    i.val if isinstance(i, Literal) else own[i] if i in own else self.values[i] for i in step.inputs
                ]
                own.update(zip(step.outputs, bind(step.equation, given), strict=True))
            return own[end] if end in own else self.values[end]

        f.steps = [step.name for step in chain]  # type: ignore[attr-defined]
        return f

    def chain(self, starts: list[int], end: int) -> list[Step]:
        """The steps of `function`, in order."""
        facts, producer = self.reading.facts, self.reading.flat.producer
        begun = sum(1 << number for number in set(starts))
        needed: set[Step] = set()
        waiting = [end]
        while waiting:
            number = waiting.pop()
            step = producer.get(number)
            changed = number in facts and facts[number].above & begun
            if number in starts or step is None or step in needed or (number in self.values and not changed):
                continue
            needed.add(step)
            waiting += [i for i in step.inputs if not isinstance(i, Literal)]
        return [step for step in self.reading.flat.steps if step in needed] if needed else []

    def _cond(self, step: Step) -> list[Any]:
        def taken(branch: Reading) -> Callable[..., Any]:
            return lambda *inputs: Evaluation(branch, self.plan, list(inputs)).run().outputs

        index, *inputs = (self.get(i, step) for i in step.inputs)
        return list(jax.lax.switch(index, [taken(branch) for branch in self.reading.branches[step]], *inputs))

    def _scan(self, step: Step) -> list[Any]:
        params, body = step.params, self.reading.bodies[step]
        consts, carries = scanned(params)
        values = [self.get(i, step) for i in step.inputs]
        fixed, carry, xs = values[:consts], values[consts : consts + carries], values[consts + carries :]
        extra = self.extra.get(scan_key(step), {})

        @self.plan.checkpoint
        def turn(carried: Any, given: Any) -> Any:
            (carry, state), (xs, extra) = carried, given
            done = Evaluation(body, self.plan, [*fixed, *carry, *xs], state, extra).run()
            return (done.outputs[:carries], done.state), (done.outputs[carries:], done.notes)

        (carry, self.state), (ys, notes) = jax.lax.scan(
            turn, (carry, self.state), (xs, extra), params["length"], params["reverse"], params["unroll"]
        )
        if notes:
            self.notes[scan_key(step)] = notes
        return [*carry, *ys]
