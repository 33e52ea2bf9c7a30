"""Methods whose map is read from one pass of the model, and several methods in as few passes as possible."""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.programs.model import Model
from tokentm_jax.programs.one_pass import Pass, Wanted, one_pass
from tokentm_jax.programs.running import Memory, Rules

Details = dict[str, Array]
Explanation = tuple[Array, Details]
Explain = Callable[[Model, Any, Any, Any], Explanation]  # (model, params, inputs, target)


class Share(NamedTuple):
    """What a method reads from a pass."""

    wanted: Wanted
    explain: Callable[[Model, Any, Pass, Details], Explanation]  # (model, inputs, the batch's pass, its details)
    rules: Rules | None = None  # None: those of the model
    more: Wanted = Wanted()  # for a model with blocks
    anywhere: bool = False  # whether the pass may have any rules, because this part is of the forward pass


class Member(NamedTuple):
    """A method among several."""

    explain: Explain  # alone
    share: Share | None  # None: it has separate passes
    memory: Memory | None = None  # what its pass stores
    float32: bool = False  # whether it is computed in float32 at least


def alone(share: Share, model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
    """A method by its own pass."""
    (explanation,) = _by_one_pass({"": share}, model, params, inputs, target).values()
    return explanation


def together(
    members: Mapping[str, Member], model: Model, params: Any, inputs: Any, target: Any
) -> dict[str, Explanation]:
    """The maps and details of several methods.

    Those whose passes have equal rules share one. Without a target, all explain the class that the first pass
    predicts.
    """
    found: dict[str, Explanation] = {}
    if not is_wide(model, params, inputs):  # those in float32 have passes of another type
        members = {name: member._replace(share=None) if member.float32 else member for name, member in members.items()}
    for names in grouped(members) if model.has_blocks else [[name] for name in members]:
        own = {name: members[name] for name in names}
        if len(own) > 1:
            shares = {name: member.share for name, member in own.items() if member.share is not None}
            by = next(member for name, member in own.items() if not shares[name].anywhere)
            found |= _by_one_pass(shares, model.storing(by.memory), params, inputs, target)
        else:
            found |= {name: member.explain(model, params, inputs, target) for name, member in own.items()}
        target = found[names[0]][1]["target"]
    return {name: found[name] for name in members}


def grouped(members: Mapping[str, Member]) -> list[list[str]]:
    """The names of the members that can share a pass, by pass; every other member has a list of its own."""
    shares = {name: member.share for name, member in members.items() if member.share is not None}
    passes = [name for name, share in shares.items() if not share.anywhere]
    groups: list[list[str]] = []
    for name in members:
        if any(name in group for group in groups):
            continue
        own = [name]
        if name in shares and passes:
            by = members[passes[0] if shares[name].anywhere else name]
            own = [n for n in shares if not any(n in group for group in groups) and _joins(members[n], by)]
        groups.append(own)
    return groups


def is_wide(model: Model, params: Any, inputs: Any) -> bool:
    """Whether a model computes in float32 at least as it is."""
    floats = [a for a in jax.tree.leaves((params, inputs)) if jnp.issubdtype(a.dtype, jnp.floating)]
    return model.source.wide() is model.source and all(jnp.finfo(a.dtype).bits >= 32 for a in floats)


def _joins(member: Member, by: Member) -> bool:
    """Whether a member can be read from the pass of another. Equal rules are the same object."""
    share: Any = member.share
    return share.anywhere or (share.rules is by.share.rules and member.memory == by.memory)  # type: ignore[union-attr]


def _by_one_pass(
    shares: Mapping[str, Share], model: Model, params: Any, inputs: Any, target: Any
) -> dict[str, Explanation]:
    """The maps and details of methods with equal rules."""
    each = {name: share.wanted | share.more if model.has_blocks else share.wanted for name, share in shares.items()}
    wanted = reduce(Wanted.__or__, each.values())
    rules = next((share.rules for share in shares.values() if not share.anywhere), None)
    ruled = model if rules is None else model.by(rules)
    if wanted.legrad:
        target = model.settled(params, inputs, target)
    done, details = model.per_sample(partial(one_pass, ruled, params, wanted=wanted), inputs, target)

    def part(own: Wanted) -> Pass:
        return done._replace(rows=tuple(done.rows[wanted.rows.index(options)] for options in own.rows))

    return {name: share.explain(ruled, inputs, part(each[name]), dict(details)) for name, share in shares.items()}
