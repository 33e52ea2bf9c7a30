"""Maps of several methods by as few passes of the model as they need."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
from jax import Array

from tokentm_jax.maths.maps import token_map
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.scores import explained, is_open
from tokentm_jax.maths.tokentm import TokenTM, initial_contributions
from tokentm_jax.methods.attention import OFF, Details, Explanation, legrad_of_block
from tokentm_jax.methods.lrp import ruled
from tokentm_jax.methods.stream import backward, streams
from tokentm_jax.models.inputs import as_inputs

Gradient = Literal["own", "conservative_lrp", "attn_lrp"]

# Methods whose map is a row that runs through the blocks by attention and its gradient: how, and by whose rules the
# gradient is where they do not leave that open.
ROWS: dict[str, tuple[TokenTM, Gradient | None]] = {
    "tokentm": (TokenTM(), None),
    "gae": (OFF, None),
    "libra_tokentm": (TokenTM(), "conservative_lrp"),
    "libra_gae": (OFF, "conservative_lrp"),
}
# Methods whose map is token times gradient at the embedded tokens, by rules.
RULES = {"conservative_lrp": ("conservative", "identity"), "attn_lrp": ("attn_lrp",)}


def shared_maps(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any,
    names: Sequence[str],
    gradient: Gradient,
    explain: Callable[[str, nn.Module, Array | None], Explanation],
) -> tuple[list[Array], Details]:
    """The maps of the methods called `names`, and the details of the first pass.

    Those that can share a pass do: a method of `ROWS` carries its row in one forward and backward pass. Where that is
    by the rules of a method of `RULES` (of `gradient`, if the row leaves it open), so that the gradient in the row is
    theirs, it gives this method's map, too. LeGrad looks at every block on the way forward. All others have passes of
    their own, by `explain(name, module, target)`, and so have all where the module's loop over blocks is not known.
    """
    inputs = as_inputs(module, params, inputs)
    found: dict[str, Array] = {}
    details: Details = {}
    rows = {name: ROWS[name] for name in names if name in ROWS} if streams(module) else {}
    rules = {name: fixed or gradient for name, (_, fixed) in rows.items()}
    joined = {*rules.values(), "legrad"} & set(names) if rows else set()
    for name in names:
        if name not in (*rows, *joined):
            leaves_open = name in ROWS and ROWS[name][1] is None and gradient != "own"
            found[name], more = explain(name, ruled(module, *RULES[gradient]) if leaves_open else module, target)
            details, target = details or more, more["target"]
    if "legrad" in joined and is_open(target):  # no pass before has found the predicted class
        target = explained(module.apply({"params": params}, inputs), target)[1]["target"]
    for name, (options, _) in rows.items():
        model = module if rules[name] == "own" else ruled(module, *RULES[rules[name]])
        note = legrad_of_block(module, params, inputs, target) if "legrad" in joined - found.keys() else None
        done = backward(model, params, inputs, target, options, note=note)
        embedded = wide(done.embedded)
        start = partial(initial_contributions, options=options)
        found[name] = token_map(module, jax.vmap(start)(done.rows, embedded))
        if note is not None:
            found["legrad"] = token_map(module, done.noted.sum(0))
        if rules[name] in joined:
            found[rules[name]] = token_map(module, (embedded * wide(done.gradient)).sum(-1))
        details, target = details or done.details, done.details["target"]
    return [found[name] for name in names], details
