"""From (module, params, inputs, target) to arrays: everything the methods need to know about a forward pass.

Flax stays in this file and in `vit.py`; functions become models in `plain.py`. Any Linen module can be explained that
has the attributes `grid`, `prefix` and `readout` of `ViT` and shows its blocks by
`self.sow("intermediates", name, value)` where a method reads a value, and `value = self.perturb(name, value)`, before
the value is used, where a method reads its gradient. The names may stand under any scope, once for every block (blocks
in the natural order of their names, or stacked by `nn.scan`), and `final_tokens` once. A method asks for what it uses,
and no more:

    name               of one block    sown for                         perturbed for
    attention          [B, H, N, N]    all but the gradients of inputs  gae, tokentm, grad_cam, beyond_intuition, LRP
    tokens             [B, N, D]       tokentm, attcat, LRP             attcat, LRP
    normalised         [B, N, D]       grad_cam_tokens                  grad_cam_tokens
    transformed_value  [B, N, D]       tokentm
    attention_branch   [B, N, D]       tokentm
    ffn_branch         [B, N, D]       tokentm
    final_tokens       [B, N, D]       LRP                              LRP
    value              [B, H, N, D/H]  `heads="each"` of tokentm
    value_kernel       [D, D]          `transformed="linear"` of tokentm
    output_kernel      [D, D]          both of these
    middle             [B, N, D]       tokentm, of post-norm blocks: x'
    after              [B, N, D]       tokentm, of post-norm blocks: x+

`Blocks` and `Trace` say what each is. LRP stands for the methods of `methods.lrp`, which need the field `primitives`,
too; legrad needs a `ViT` or a `Bert`. A module of post-norm blocks says so by the attribute `post_norm`. An option may
need another row (`original="normalised"` of tokentm, `variant="token"` of beyond_intuition); the error names what is
missing.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from tokentm_jax.errors import InputError, Unfit, suggest
from tokentm_jax.maths.scores import explained
from tokentm_jax.maths.tokentm import Blocks
from tokentm_jax.models.inputs import Tokens, as_inputs, check_inputs, seen, values, with_values


class Trace(NamedTuple):
    """One forward and backward pass of a batch. Axes: L blocks, B batch, H heads, N tokens, D width.

    What was not asked for is None.
    """

    tokens: Any  # [L+1, B, N, D] input of every block, and the output of the last (where `final_tokens` is asked for)
    token_grads: Any  # [L+1, B, N, D] gradient of the score (the explained logit) there
    input_grads: Any  # [B, H, W, 3] gradient at the normalised images, or [B, N, D] at the embeddings of texts
    attention: Any  # [L, B, H, N, N] after softmax
    attention_grad: Any  # [L, B, H, N, N]
    normalised: Any  # [L, B, N, D] LN1 of the block's input
    normalised_grads: Any  # [L, B, N, D]
    value: Any  # [L, B, H, N, D/H]
    transformed_value: Any  # [L, B, N, D]
    attention_branch: Any  # [L, B, N, D]
    ffn_branch: Any  # [L, B, N, D]
    value_kernel: Any  # [L, D, D] of the value projection, without its bias; kept only where it is asked for
    output_kernel: Any  # [L, D, D] of the output projection, with the layer's scale; likewise
    middle: Any  # [L, B, N, D] of post-norm blocks: x', and
    after: Any  # [L, B, N, D] x+
    seen: Any  # [B, N] which tokens of texts are there; None: all
    logits: Any  # [B, classes], or what else the module gives
    target: Any  # [B] the class explained, or the `Question`
    score: Array  # [B] what was explained: the logit of that class, or what the question's score is

    def details(self) -> dict[str, Any]:
        """What every method reports: logits [B, classes], the class explained and its score [B]."""
        return {"logits": self.logits, "target": self.target, "score": self.score}

    def blocks(self) -> Blocks:
        """The arrays of all blocks, `attention` among them, with the batch axis second, which kernels do not have."""
        found = {name: getattr(self, name, None) for name in Blocks._fields}
        depth = len(self.attention)
        if self.tokens is not None:
            found["tokens"] = self.tokens[:depth]
        if self.token_grads is not None and len(self.token_grads) > depth:
            found["output_grad"] = self.token_grads[1:]
        if self.seen is not None:
            found["seen"] = jnp.broadcast_to(self.seen, (depth, *self.seen.shape))
        return Blocks(**found)


# Field of `Trace` -> the perturbed point whose gradient it is.
GRADIENTS = {"attention_grad": "attention", "token_grads": "tokens", "normalised_grads": "normalised"}
SOWN = ("tokens", "attention", "normalised", "value", "transformed_value", "attention_branch", "ffn_branch")
KERNELS = ("value_kernel", "output_kernel")
POST_NORM = ("middle", "after")
NAMES = ("final_tokens", *SOWN, *KERNELS)  # of the contract, beside those of post-norm blocks
ALL = ("final_tokens", "input_grads", *SOWN, *GRADIENTS)  # kernels are parameters: few modules sow them
FIELDS: Collection[str] = (*Trace._fields, "final_tokens")
RANKS = {"attention": 4, "value": 4} | dict.fromkeys(KERNELS, 2)  # of one block's array; all others are [B, N, D]


def check_module(module: Any) -> None:
    """InputError, with what to do, for what is neither a Linen module nor a function of parameters and inputs."""
    if hasattr(module, "apply") and not isinstance(module, type):
        return
    what, found = (
        "the model must be a function (params, inputs) -> outputs or a Flax Linen module",
        type(module).__name__,
    )
    if hasattr(module, "module") and hasattr(module, "params"):
        raise InputError(f"{what}, got a {found}: give its `module`, and then its `params`")
    if any(base.__module__.startswith("flax.nnx") for base in inspect.getmro(type(module))):
        raise InputError(
            f"{what}, got the NNX module {found}: split it, `graph, state = nnx.split(model)`, and give "
            "lambda state, images: nnx.merge(graph, state)(images), and then `state`"
        )
    if is_function(module):
        return
    if callable(module) and not isinstance(module, type):
        raise InputError(f"{what}, got a {found}: give lambda params, images: ...")
    raise InputError(f"{what}, got {module!r:.80}")


def is_function(model: Any) -> bool:
    """Whether a model is a function `(params, inputs) -> outputs`, and not a module of some library that is called."""
    libraries = {base.__module__.partition(".")[0] for base in inspect.getmro(type(model))}
    if not callable(model) or isinstance(model, type) or libraries & {"flax", "equinox", "keras", "haiku", "penzai"}:
        return False
    try:
        inspect.signature(model).bind(None, None)
    except (TypeError, ValueError):
        return False
    return not hasattr(model, "apply")


def check_model(module: Any, params: Any, inputs: Any) -> None:
    """InputError for what is not a model, not the parameters of a Linen module, or not inputs."""
    check_module(module)
    if isinstance(module, nn.Module) and (not isinstance(params, Mapping) or not params):
        raise InputError("params must be the nested dictionary of the module's parameters")
    if not isinstance(inputs, Tokens):
        check_inputs(inputs)


def _stacked(tree: Any, name: str, kind: str) -> Array:
    """All arrays called `name` in a tree of one collection, stacked over blocks in natural order: [L, ...]."""

    def natural(path: tuple) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", jax.tree_util.keystr(path))]

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # `sow` keeps a tuple; its first element, at index 0, is the value.
    first = jax.tree_util.SequenceKey(0)
    found = [(p, a) for p, a in leaves if (p[:-1] if p[-1] == first else p)[-1:] == (jax.tree_util.DictKey(name),)]
    if not found:
        raise Unfit(f"the module {kind} no '{name}', which this explanation needs (see `tokentm_jax.capture`)")
    rank = RANKS.get(name, 3)
    return jnp.concatenate(
        [a if a.ndim == rank + 1 else a[None] for _, a in sorted(found, key=lambda item: natural(item[0]))]
    )


def capture(
    module: nn.Module,
    params: Any,
    inputs: Array,
    target: Any = None,
    fields: Collection[str] | None = None,
    *,
    gradients: bool = True,
) -> Trace:
    """Run the model forward, and backward where gradients are asked for, and keep what the blocks did.

    Args:
      module: a Linen module that sows and perturbs, such as `ViT` (see the top of this file), or a `PlainModel`.
      params: its parameters.
      inputs: normalised images [B, H, W, C], `Tokens` or `Texts`.
      target: class of each sample [B] or one class for all; None for the predicted ones; or a `Question` of
        `tokentm_jax.maths.scores`.
      fields: of `Trace`, which are wanted, and "final_tokens", which appends the output of the last block to `tokens`
        and `token_grads`; None: all but the kernels. Logits and target are always there, and the backward pass is run
        for gradients alone.
      gradients: False leaves out those fields that are gradients.

    Returns:
      A `Trace`; gradients are those of each sample's own score.

    Raises:
      InputError: the module sows or perturbs nothing of what is wanted.
    """
    check_model(module, params, inputs)
    inputs = as_inputs(module, params, inputs)
    if fields is None:
        fields = (*ALL, *POST_NORM) if getattr(module, "post_norm", False) else ALL
    wanted: Any = fields
    if isinstance(wanted, str) or not isinstance(wanted, Iterable) or getattr(wanted, "shape", None) == ():
        raise InputError(f"fields must be a list of names of tm.Trace, got {wanted!r:.80}")
    for name in wanted:
        if name not in FIELDS:
            raise suggest("field", name, FIELDS, of="tm.capture")
    if hasattr(module, "capture"):  # a function that was read
        return module.capture(
            params, inputs, target, [f for f in fields if gradients or f not in (*GRADIENTS, "input_grads")]
        )
    if not gradients:
        fields = [name for name in fields if name not in (*GRADIENTS, "input_grads")]

    def score(perturbed: Any, numbers: Array) -> tuple[Array, tuple[Any, dict[str, Any]]]:
        # A module perturbs all of its points or none.
        variables = {"params": params, **traverse_util.unflatten_dict({**others, **perturbed})}
        logits, state = module.apply(variables, with_values(inputs, numbers), mutable=["intermediates"])
        own, details = explained(logits, target)
        # Samples do not touch each other, so the gradient of the sum is every sample's own.
        return own.sum(), (state.get("intermediates", {}), details)

    def read(tree: Any, name: str, verb: str) -> Array:
        found = _stacked(tree, name, verb)
        if name == "tokens" and "final_tokens" in fields:
            found = jnp.concatenate([found, _stacked(tree, "final_tokens", verb)])
        return found

    others: Any = {}  # path -> zeros
    grads = input_grads = None
    if "input_grads" in fields or any(name in fields for name in GRADIENTS):
        points = {point for field, point in GRADIENTS.items() if field in fields} | {"final_tokens"}
        others = traverse_util.flatten_dict(zero_perturbations(module, params, inputs))
        zeros = {path: others.pop(path) for path in list(others) if path[-1] in points}
        # With respect to the inputs in any case: a relevance rule that no derivative passes here would stand in for
        # the true derivative of its step when the map is differentiated.
        (found, input_grads), (sown, details) = jax.grad(score, (0, 1), has_aux=True)(zeros, values(inputs))
        grads = traverse_util.unflatten_dict(found)
    else:
        _, (sown, details) = score({}, values(inputs))
    found_gradients = {field: read(grads, point, "perturbs") for field, point in GRADIENTS.items() if field in fields}
    arrays = {name: read(sown, name, "sows") for name in (*SOWN, *KERNELS, *POST_NORM) if name in fields}
    known: Any = {**found_gradients, **arrays, **details, "seen": seen(inputs)}
    if "input_grads" in fields:
        known["input_grads"] = input_grads
    return Trace(*(known.get(name) for name in Trace._fields))


def zero_perturbations(module: nn.Module, params: Any, x: Array) -> dict[str, Any]:
    """The variables that perturb nothing: zeros of the shape and type of every perturbation point of `module`.

    (Those that `init` makes are float32 always, and of the batch that `init` saw.)
    """
    shapes = jax.eval_shape(lambda p, x: module.apply({"params": p}, x, mutable=["perturbations"])[1], params, x)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), {**shapes})
