"""Maps of several methods in as few passes of the model as possible."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
from jax import Array

from tokentm_jax.inputs.values import token_map
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.variants import TokenTM, initialised
from tokentm_jax.methods.attention import OFF, Details, Explanation
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.one_pass import Wanted, one_pass
from tokentm_jax.programs.rules import ATTN_LRP, LIBRA

Gradient = Literal["own", "conservative_lrp", "attn_lrp"]

# Methods whose map is a row, carried through the blocks by attention and its gradient: the options, and the method
# whose rules give the gradient (None: the option `gradient`).
ROWS: dict[str, tuple[TokenTM, Gradient | None]] = {
    "tokentm": (TokenTM(), None),
    "gae": (OFF, None),
    "libra_tokentm": (TokenTM(), "conservative_lrp"),
    "libra_gae": (OFF, "conservative_lrp"),
}
# Methods whose map is token times gradient at the embedded tokens, with their rules.
RULES = {"own": {}, "conservative_lrp": LIBRA, "attn_lrp": ATTN_LRP}


def shared_maps(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    names: Sequence[str],
    gradient: Gradient,
    explain: Callable[[str, Any], Explanation],
) -> tuple[list[Array], Details]:
    """The maps of the methods called `names`, and the details of the first pass.

    Methods share passes: a method of `ROWS` carries its row in one forward and backward pass. If this pass has the
    rules of a method of `RULES`, its gradient also gives that method's map. LeGrad reads every block in the forward
    pass. All other methods have separate passes, by `explain(name, target)`.
    """
    found: dict[str, Array] = {}
    details: Details = {}
    rows = {name: (ROWS[name][0], ROWS[name][1] or gradient) for name in names if name in ROWS}
    joined = {*(rules for _, rules in rows.values()), "legrad"} & set(names) if rows else set()
    for name in names:
        if name not in (*rows, *joined):
            found[name], more = explain(name, target)
            details, target = details or more, more["target"]
    if "legrad" in joined:
        target = model.settled(params, inputs, target)
    for name, (options, rules) in rows.items():
        noted = "legrad" in joined - found.keys()

        ruled = model.by(RULES[rules])
        wanted = Wanted(rows=(options,), legrad=noted, effects=rules in joined)
        done, more = model.per_sample(partial(one_pass, ruled, params, wanted=wanted), inputs, target)
        start = partial(initialised, options=options)
        found[name] = token_map(model, jax.vmap(start)(done.rows[0], wide(done.embedded)))
        if noted:
            found["legrad"] = token_map(model, done.legrad)
        if rules in joined:
            found[rules] = token_map(model, done.effects[:, 0])
        details, target = details or more, more["target"]
    return [found[name] for name in names], details
