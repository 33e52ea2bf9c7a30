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

A tap is a function `tap(evaluation, value, state, extra) -> (value, state, note)` of one value of the program, which
continues with the returned value. The state goes from tap to tap, also through scans. Notes are collected by the
number of the value, and stacked over the iterations of a scan. `extra` is an additional input, of a value in a scan
one for each iteration.

Large attention runs in `pieces` of queries. A tap by queries, `tap(evaluation, state, extra) -> (inside, after)`, is
for the values of a piece: `inside(value) -> (value, result)`, and then `after(results of all queries) -> state`.
In a piece, `f.queries` is the axis of the queries in a step's result. A rule that needs the mean of something over the
whole sample appends that of each query, [Q], to `f.means`; their cotangents are the mean over all queries.

With `fused`, plain attention without rules runs in a kernel. Where its weights have a tap by queries, they need one of
streams as well: `tap(evaluation, state, extra) -> (streams [H, N], after)`, and then `after(zeros [N]) -> state`.
"""

import copy
import dataclasses
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.programs.flat import Call, Step, bind, scanned
from tokentm_jax.programs.fused import Fused, fused_of
from tokentm_jax.programs.kernel import TOKENS
from tokentm_jax.programs.pieces import Pieces, pieces_of, tied
from tokentm_jax.programs.reading import ELEMENTWISE, SAME_SHAPE, Reading

KINDS = ("linear", "embed", "mix", "product", "gate", "add", "residual", "turn", "bias", "scale", "position", "norm",
         "centre", "softmax", "reduce", "activation", "fork")  # fmt: skip

Rule = Callable[..., Any]
Rules = Mapping[str, Rule]
Tap = Callable[["Evaluation", Array, Any, Any], tuple[Array, Any, Any]]
TapByQueries = Callable[["Evaluation", Any, Any], tuple[Callable[[Array], Any], Callable[[Any], Any]]]
TapOfStreams = Callable[["Evaluation", Any, Any], tuple[Array, Callable[[Array], Any]]]


def by_query(*rules: Rule) -> None:
    """Mark rules that may run for some queries of an attention, in a set that also has rules for linear maps."""
    for rule in rules:
        rule.by_query = True  # type: ignore[attr-defined]


# What an iteration of a scan stores for its backward pass besides its input: weights [N] of TokenTM and rollout, and
# with "store" also the results of its linear maps (queries, keys, values and hidden channels) and of a kernel of
# attention. The weights of attention are always computed again.
Memory = Literal["recompute", "store"]
WEIGHTS = "transformation weights"
_ONLY_WEIGHTS = jax.checkpoint_policies.save_only_these_names(WEIGHTS)
_AND_TOKENS = jax.checkpoint_policies.save_only_these_names(WEIGHTS, TOKENS)
POLICIES: dict[Memory, Any] = {
    "recompute": _ONLY_WEIGHTS,
    "store": jax.checkpoint_policies.save_from_both_policies(
        _AND_TOKENS, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to evaluate a program: rules by kind, and taps by value."""

    rules: Rules = dataclasses.field(default_factory=dict)
    taps: Mapping[int, Tap] = dataclasses.field(default_factory=dict)
    memory: Memory | None = None  # what iterations of a scan store for the backward pass; None: all that it reads
    untapped: Mapping[Step, int] = dataclasses.field(default_factory=dict)  # first iterations of scans, without taps
    by_queries: Mapping[int, TapByQueries] = dataclasses.field(default_factory=dict)
    streams: Mapping[int, TapOfStreams] = dataclasses.field(default_factory=dict)
    whole: bool = False  # no attention runs in pieces or in a kernel, because something reads its weights
    fused: bool = False  # plain attention runs in a kernel
    queries: Mapping[int, int] = dataclasses.field(default_factory=dict)  # of a piece: their axis in its values
    second: "Plan | None" = None  # of another backward pass over the same values, with other rules and taps


@jax.custom_jvp
def _equal(value: Array, known: Array) -> Array:
    """`known`, with the derivative of a value that is equal to it."""
    return known


_equal.defjvp(lambda values, tangents: (values[1], tangents[0]))


class Evaluation:
    """One evaluation of a program, or of one iteration of a scan's body; `values` are the ones known so far.

    With a second plan, `second` is another evaluation, `inputs_of_second` are its inputs (None for those that do not
    depend on the explained one), and all of its values are those of the `first`: only its backward pass is computed.
    """

    def __init__(
        self,
        reading: Reading,
        plan: Plan,
        inputs: list[Any],
        state: Any = None,
        extra: Any = None,
        inputs_of_second: list[Any] | None = None,
        first: "Evaluation | None" = None,
    ) -> None:
        self.reading, self.plan, self.state, self.first, self.place = reading, plan, state, first, 0
        self.outputs: list[Any] = []
        self.left: dict[int, Any] = {}  # what taps of the first evaluation leave for those of the second
        self.scanned: list[Any] = []  # of the second evaluation, the results of the last step, if both ran it together
        self.values: dict[int, Any] = {**reading.flat.constants}
        self.known: dict[int, Any] = {}  # values by rules, for steps outside of their group
        self.forks = {s.of[0]: s for s in reading.sums if isinstance(s.of, tuple)} if "fork" in plan.rules else {}
        self.extra, self.notes = extra or {}, {}
        self.means: list[Array] = []  # of rules in a piece
        self.pieces = self._pieces() if first is None else first.pieces
        self.in_pieces = {step for pieces in self.pieces.values() for step in pieces.steps}
        for number, value in zip(reading.flat.inputs, inputs, strict=True):
            self._put(number, value)
        self.second = None
        if plan.second is not None:
            self.second = Evaluation(reading, plan.second, inputs_of_second or inputs, None, extra, first=self)

    def run(self) -> "Evaluation":
        """All steps, in order."""
        for evaluation in (self, self.second):
            if evaluation is not None:
                evaluation._until(len(self.reading.flat.steps))
                evaluation.outputs = [evaluation.get(o) for o in self.reading.flat.outputs]
        return self

    def _until(self, stop: int) -> None:
        """The steps before number `stop`."""
        flat = self.reading.flat
        while self.place < stop:
            step, call = flat.steps[self.place], flat.calls.get(self.place)
            if step in self.in_pieces:
                self.place += 1
                continue
            if call is not None and not self._touches(call):
                self.place = call.stop
                values = bind(call.equation, [self.get(i) for i in call.inputs])
                outputs = call.outputs
            else:
                self.place += 1
                outputs, values = step.outputs, self._step(step)
            for number, value in zip(outputs, values, strict=True):
                self._put(number, value)
            for number, value in zip(outputs, self.scanned, strict=True) if self.scanned else ():
                self.second._put(number, value)  # type: ignore[union-attr]
            self.scanned = []

    def held(self) -> "Evaluation":
        """The same values as constants."""
        other = copy.copy(self)
        stop = lambda value: jax.lax.stop_gradient(value) if isinstance(value, Array) else value  # noqa: E731
        other.values = {number: stop(value) for number, value in self.values.items()}
        return other

    def get(self, number: int, step: Step | None = None) -> Any:
        """A value as `step` reads it; None: as an output."""
        if self.plan.rules and number in self.reading.facts:
            if number in self.forks:
                return self._forked(number, step)
            if self._leaves(number, step):
                return self._activated(number)
        return self.values[number]

    def _put(self, number: int, value: Any) -> None:
        self.values[number] = value
        if number in self.plan.taps:
            value, self.state, note = self.plan.taps[number](self, value, self.state, self.extra.get(number))
            self.values[number] = value
            if note is not None:
                self.notes[number] = note
        if number in self.plan.by_queries:
            inside, after = self.plan.by_queries[number](self, self.state, self.extra.get(number))
            self.values[number], result = inside(value)
            self.state = after(result)
        if self.first is not None:
            self.values[number] = self._of_first(number, self.values[number])

    def _of_first(self, number: int, value: Any) -> Any:
        """The value of the first evaluation, with the backward pass of this one."""
        known = self.first.values.get(number)  # type: ignore[union-attr]
        if known is None or number not in self.reading.facts:
            return value if known is None else known
        return _equal(value, known)

    def _leaves(self, number: int, step: Step | None) -> bool:
        """Whether a value leaves its group of elementwise steps here, so that a rule applies."""
        fact, rules = self.reading.facts.get(number), self.plan.rules
        if fact is None or fact.root == number or fact.statistic or number in self.reading.exempt:
            return False
        # A multiple has its ordinary derivative, unless rules carry relevance, which biases do not change.
        if "activation" not in rules or (fact.linear and "bias" not in rules):
            return False
        if step is not None and (step.name in ELEMENTWISE or step.name in SAME_SHAPE):
            out = self.reading.facts.get(step.outputs[0])
            return not (out is not None and out.root == fact.root)
        return True

    def _activated(self, number: int) -> Any:
        if number not in self.known:
            root = self.reading.facts[number].root
            value = self.plan.rules["activation"](self.function([root], number), self.get(root))
            self.known[number] = value if self.first is None else self._of_first(number, value)
        return self.known[number]

    def _forked(self, number: int, step: Step | None) -> Any:
        if number not in self.known:
            value = self._activated(number) if self._leaves(number, step) else self.values[number]
            self.known[number] = self.plan.rules["fork"](lambda x: (x, x), value)
        return self.known[number][0 if step is self.forks[number] else 1]

    def _touches(self, call: Call) -> bool:
        """Whether a rule or a tap is for a step inside a custom derivative, which is then evaluated step by step."""
        steps = self.reading.flat.steps[call.start : call.stop]
        inside = {number for step in steps for number in step.outputs}
        if inside - set(call.outputs) & {*self.plan.taps, *self.plan.by_queries}:
            return True
        return bool(self.plan.rules) and any(
            step.kind in self.plan.rules or any(i in inside and self._leaves(i, step) for i in step.inputs)
            for step in steps
        )

    def _pieces(self) -> dict[Step, Pieces | Fused]:
        """The attentions that run in pieces or in a kernel.

        No tap needs all of their weights, and no rule a sum over a sample.
        """
        plan = self.plan
        if plan.whole:
            return {}
        found: dict[Step, Pieces | Fused] = {**pieces_of(self.reading)}
        if plan.fused and not plan.rules:
            for step, fused in fused_of(self.reading).items():
                if fused.inside & plan.by_queries.keys() <= fused.weights & plan.streams.keys():
                    found[step] = fused
        both = [plan] if plan.second is None else [plan, plan.second]
        return {step: pieces for step, pieces in found.items() if all(_may_run(pieces, each) for each in both)}

    def _fused(self, fused: Fused) -> Array:
        """The tokens of one attention from a kernel, with its tap of streams."""
        streams: Any = jnp.zeros(fused.streams, jnp.float32)
        after: Callable[[Array], Any] = lambda _: self.state  # noqa: E731
        for number in fused.inside & self.plan.streams.keys():
            streams, after = self.plan.streams[number](self, self.state, self.extra.get(number))
        tokens, zeros = fused.run(self.get, streams)
        self.state = after(zeros)
        return tokens

    def _in_pieces(self, pieces: Pieces) -> Array:
        """The tokens of one attention, with its tap by queries. The second evaluation runs in the same pieces."""
        both = [self] if self.second is None else [self, self.second]
        if self.second is not None:
            self.second._until(self.place - 1)
        plans, afters = zip(*(each._of_piece(pieces) for each in both), strict=True)
        plan = dataclasses.replace(plans[0], second=plans[1] if self.second is not None else None)
        count = len(pieces.given)

        def piece(*values: Array) -> Any:
            done = Evaluation(pieces.reading, plan, [*values[:count]], inputs_of_second=[*values[count:]]).run()
            return [(e.outputs[0], e.state, e.means) for e in (done, done.second) if e is not None]

        given = [each.get(number, step) for each in both for (number, _), step in pieces.given.items()]
        tokens = []
        for each, after, (own, results, means) in zip(both, afters, pieces.run(piece, given), strict=True):
            results, means = jax.tree.map(lambda result: pieces.joined(result, 0), (results, means))
            each.state = after(results)
            tokens.append(tied(pieces.joined(own, pieces.axis), means))
        if self.second is not None:
            self.second.place, self.scanned = self.place, tokens[1:]
        return tokens[0]

    def _of_piece(self, pieces: Pieces) -> tuple[Plan, Callable[[Any], Any]]:
        """The plan of a piece, and what follows its tap by queries."""
        by_queries: dict[int, TapByQueries] = {}
        after: Callable[[Any], Any] = lambda _: self.state  # noqa: E731
        for number in pieces.inside & self.plan.by_queries.keys():
            inside, after = self.plan.by_queries[number](self, self.state, self.extra.get(number))
            by_queries[pieces.numbers[number]] = lambda *_, inside=inside: (inside, lambda result: result)
        return Plan(self.plan.rules, by_queries=by_queries, queries=pieces.axes, whole=True), after

    def _step(self, step: Step) -> list[Any]:
        if (pieces := self.pieces.get(step)) is not None:
            return [self._fused(pieces) if isinstance(pieces, Fused) else self._in_pieces(pieces)]
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
        elif step.kind in ("linear", "embed", "bias", "scale", "position", "gate") and step.of == 1:
            order = [1, 0]

        def f(*inputs: Any) -> Any:
            return bind(step.equation, [inputs[order.index(i)] for i in range(len(inputs))])[0]

        if self.first is not None:
            f.value = self.first.values.get(step.outputs[0])  # type: ignore[attr-defined]
        if self.plan.queries:
            f.queries, f.means = self.plan.queries[step.outputs[0]], self.means  # type: ignore[attr-defined]
        return rule(f, *(self.get(step.inputs[i], step) for i in order))

    def function(self, starts: list[int], end: int) -> Callable[..., Any]:
        """The part of the program from some values to another, as a function without rules.

        Other values are used as they are known, or computed.
        """
        chain = self.chain(starts, end)

        def f(*inputs: Any) -> Any:
            known = ChainMap(dict(zip(starts, inputs, strict=True)), self.values)
            for step in chain:
                outputs = bind(step.equation, [known[i] for i in step.inputs])
                known.update(zip(step.outputs, outputs, strict=True))
            return known[end]

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
            waiting += step.inputs
        return [step for step in self.reading.flat.steps if step in needed] if needed else []

    def _cond(self, step: Step) -> list[Any]:
        def taken(branch: Reading) -> Callable[..., Any]:
            return lambda *inputs: Evaluation(branch, self.plan, list(inputs)).run().outputs

        index, *inputs = (self.get(i, step) for i in step.inputs)
        return list(jax.lax.switch(index, [taken(branch) for branch in self.reading.branches[step]], *inputs))

    def _scan(self, step: Step) -> list[Any]:
        params, body = step.params, self.reading.bodies[step]
        (consts, carries), length = scanned(params), params["length"]
        extra = {number: array for number, array in self.extra.items() if number in body.facts}

        def inputs_of(evaluation: Evaluation) -> tuple[list[Any], list[Any], list[Any]]:
            values = [evaluation.get(i, step) for i in step.inputs]
            if evaluation is not self:  # weights are passed once
                depends = [i in self.reading.facts for i in step.inputs]
                values = [
                    value if own or consts <= place < consts + carries else None
                    for place, (value, own) in enumerate(zip(values, depends, strict=True))
                ]
            return values[:consts], values[consts : consts + carries], values[consts + carries :]

        if self.second is not None:
            self.second._until(self.place - 1)
        both = [inputs_of(each) for each in (self, self.second) if each is not None]
        fixed, carry, xs = ([each[part] for each in both] for part in range(3))

        def run(plan: Plan, carried: Any, extra: Any, start: int, stop: int) -> Any:
            whole = stop - start == length

            def turn(carried: Any, given: Any) -> Any:
                (carry, state), (own, extra) = carried, given
                if not whole:  # the iteration's number: a slice of `xs` would be a copy of the weights
                    own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, given[0], keepdims=False), xs)
                inputs, *more = ([*a, *b, *c] for a, b, c in zip(fixed, carry, own, strict=True))
                done = Evaluation(body, plan, inputs, state, extra, more[0] if more else None).run()
                outputs = [each.outputs for each in (done, done.second) if each is not None]
                return ([o[:carries] for o in outputs], done.state), ([o[carries:] for o in outputs], done.notes)

            if plan.memory is not None:
                turn = partial(jax.checkpoint, policy=POLICIES[plan.memory], prevent_cse=False)(turn)
            given = (xs if whole else jnp.arange(start, stop), extra)
            if whole or stop - start > 1:
                how = {name: params[name] for name in ("reverse", "unroll")}
                return jax.lax.scan(turn, carried, given, stop - start, **how)
            carried, found = turn(carried, jax.tree.map(lambda a: a[0], given))  # its backward pass can end inside
            return carried, jax.tree.map(lambda a: a[None], found)

        first, carried, parts = self.plan.untapped.get(step, 0), (carry, self.state), []
        if first:
            plan = dataclasses.replace(self.plan, taps={}, by_queries={}, streams={})
            carried, (ys, _) = run(plan, carried, {}, 0, first)
            parts.append(ys)
        (carry, self.state), (ys, notes) = run(self.plan, carried, extra, first, length)
        self.notes |= notes
        ys = jax.tree.map(lambda *a: jnp.concatenate(a), *parts, ys) if parts else ys
        found = [[*a, *b] for a, b in zip(carry, ys, strict=True)]
        if self.second is not None:
            self.second.place, self.scanned = self.place, found[1]
        return found[0]


def _may_run(pieces: Pieces | Fused, plan: Plan) -> bool:
    """Whether an attention may run in pieces: no tap is for all of its weights, and no rule is for a whole sample."""
    steps = pieces.reading.flat.steps if isinstance(pieces, Pieces) else []
    rules = [plan.rules[kind] for kind in {"activation", *(step.kind for step in steps)} & plan.rules.keys()]
    # Sets with rules for linear maps have stabilisers of the sample.
    by_queries = "linear" not in plan.rules or all(hasattr(rule, "by_query") for rule in rules)
    return by_queries and not pieces.inside & plan.taps.keys()
