"""From (module, params, inputs, target) to arrays: everything the methods need to know about a forward pass.

Flax stays in this file and in `vit.py`. Any Linen module can be explained that sows, under any scope, the names of
`Blocks` for every block (unrolled blocks in the natural order of their names, or stacked by `nn.scan`), sows and
perturbs `final_tokens`, perturbs `attention` and `tokens`, and has the attributes `grid`, `prefix` and `readout`.
"""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.tokentm import Blocks


class Trace(NamedTuple):
    """One forward and backward pass of a batch. Axes: L blocks, B batch, H heads, N tokens, D width.

    The gradients are None where they were not asked for.
    """

    tokens: Array  # [L+1, B, N, D] input of every block, and the output of the last
    token_grads: Any  # [L+1, B, N, D] gradient of the explained logit there
    input_grads: Any  # [B, H, W, 3] gradient at the normalised images
    attention: Array  # [L, B, H, N, N] after softmax
    attention_grad: Any  # [L, B, H, N, N]
    normalised: Array  # [L, B, N, D] LN1 of the block's input
    normalised_grads: Any  # [L, B, N, D]
    value: Array  # [L, B, H, N, D/H]
    transformed_value: Array  # [L, B, N, D]
    attention_branch: Array  # [L, B, N, D]
    ffn_branch: Array  # [L, B, N, D]
    logits: Array  # [B, classes]
    target: Array  # [B] the class explained

    def details(self) -> dict[str, Array]:
        """What every method reports: logits [B, classes] and the class explained [B]."""
        return {"logits": self.logits, "target": self.target}

    def blocks(self) -> Blocks:
        """The arrays of all blocks, with the batch axis second: [L, B, ...]."""
        shared = {name: getattr(self, name) for name in Blocks._fields if name != "tokens"}
        return Blocks(tokens=self.tokens[:-1], **shared)


RANKS = {"attention": 4, "value": 4}  # of one block's array; all others are [B, N, D]


def _stacked(tree: Any, name: str, kind: str) -> Array:
    """All arrays called `name` in a tree of one collection, stacked over blocks in natural order: [L, ...]."""

    def natural(path: tuple) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", jax.tree_util.keystr(path))]

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # `sow` keeps a tuple; its first element, at index 0, is the value.
    first = jax.tree_util.SequenceKey(0)
    found = [(p, a) for p, a in leaves if (p[:-1] if p[-1] == first else p)[-1:] == (jax.tree_util.DictKey(name),)]
    if not found:
        raise InputError(f"the module {kind} no '{name}', which this explanation needs (see tokentm_jax.trace)")
    rank = RANKS.get(name, 3)
    return jnp.concatenate(
        [a if a.ndim == rank + 1 else a[None] for _, a in sorted(found, key=lambda item: natural(item[0]))]
    )


def class_logits(logits: Array, target: Array | None) -> tuple[Array, Array]:
    """Each sample's own logit [B], and its class [B]: `target` (an int or [B]), or the predicted one for None."""
    chosen = logits.argmax(-1) if target is None else jnp.broadcast_to(jnp.asarray(target), logits.shape[:1])
    return jnp.take_along_axis(logits, chosen[:, None], 1)[:, 0], chosen


def capture(
    module: nn.Module, params: Any, inputs: Array, target: Array | None = None, gradients: bool = True
) -> Trace:
    """Run the model forward, and backward where `gradients` are wanted, and keep what the blocks did.

    Args:
      module: a Linen module that sows and perturbs, such as `ViT` (see the top of this file).
      params: its parameters.
      inputs: normalised images [B, H, W, 3].
      target: class of each sample [B] or one class for all; None for the predicted ones.
      gradients: whether to run backward; without it the gradients are None.

    Returns:
      A `Trace`; gradients are those of each sample's own logit.

    Raises:
      InputError: the module sows or perturbs nothing of what is needed.
    """

    def score(perturbations: Any, inputs: Array) -> tuple[Array, tuple[Array, Any, Array]]:
        variables = {"params": params, **perturbations}
        logits, state = module.apply(variables, inputs, mutable=["intermediates"])
        own, chosen = class_logits(logits, target)
        # Samples do not touch each other, so the gradient of the sum is every sample's own.
        return own.sum(), (logits, state.get("intermediates", {}), chosen)

    def tokens(tree: Any, verb: str) -> Array:
        return jnp.concatenate([_stacked(tree, "tokens", verb), _stacked(tree, "final_tokens", verb)])

    token_grads = attention_grad = normalised_grads = input_grads = None
    if gradients:
        zeros = zero_perturbations(module, params, inputs)
        (grads, input_grads), (logits, sown, chosen) = jax.grad(score, (0, 1), has_aux=True)(zeros, inputs)
        token_grads, attention_grad = tokens(grads, "perturbs"), _stacked(grads, "attention", "perturbs")
        normalised_grads = _stacked(grads, "normalised", "perturbs")
    else:
        _, (logits, sown, chosen) = score({}, inputs)
    plain = ("attention", "normalised", "value", "transformed_value", "attention_branch", "ffn_branch")
    return Trace(
        tokens=tokens(sown, "sows"),
        token_grads=token_grads,
        input_grads=input_grads,
        attention_grad=attention_grad,
        normalised_grads=normalised_grads,
        logits=logits,
        target=chosen,
        **{name: _stacked(sown, name, "sows") for name in plain},
    )


def zero_perturbations(module: nn.Module, params: Any, x: Array) -> dict[str, Any]:
    """The variables that perturb nothing: zeros of the shape and type of every perturbation point of `module`.

    (Those that `init` makes are float32 always, and of the batch that `init` saw.)
    """
    shapes = jax.eval_shape(lambda p, x: module.apply({"params": p}, x, mutable=["perturbations"])[1], params, x)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), {**shapes})
