"""Amortised explainers: a small network gives in one forward pass what sampled Shapley values estimate.

A network that is fitted to values with noise of mean zero learns the values (Covert et al., NeurIPS 2024). It is made
by `models/training/amortise.py`, for one model, whose tokens it reads.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.files import as_path
from tokentm_jax.inputs.values import of, read_out
from tokentm_jax.maths.scores import CLASS_LOGIT, Question, explained
from tokentm_jax.methods.gradient import Explanation
from tokentm_jax.methods.table import Method
from tokentm_jax.models.checkpoint import read_safetensors
from tokentm_jax.models.loading import SHIPPED
from tokentm_jax.programs.capture import capture
from tokentm_jax.programs.model import Model

# Arrays of an explainer for F features, K hidden units, n patches and C classes.
SHAPES = {"hidden": "F K", "bias": "K", "out": "K C", "direct": "F C", "places": "n C", "empty": "C"}


def features(model: Model, params: Any, inputs: Any) -> tuple[Array, Array]:
    """What an explainer reads of one forward pass.

    Args:
      model, params, inputs: as for a method; inputs of images.

    Returns:
      For each patch [B, n, F]: its token in the middle of the blocks and at their end, the attention that the head's
      tokens pay to it in each head of each block, and the tokens at the end as the head reads them. The logits [B, C].
    """
    if not of(inputs).regular or model.grid is None:
        raise Unfit("an amortised explainer is for images, whose patches have fixed places")
    trace = capture(model, params, inputs, None, ("tokens", "final_tokens", "attention"), gradients=False)
    tokens, attention = trace.tokens, trace.attention
    assert tokens is not None and attention is not None
    share = read_out(model, None, tokens[-1]).astype(tokens.dtype)
    paid = jnp.einsum("bq,lbhqk->bklh", share, attention)
    own = [tokens[len(attention) // 2], tokens[-1], paid.reshape(*paid.shape[:2], -1)]
    read = jnp.einsum("bk,bkd->bd", share, tokens[-1])[:, None]
    patches = jnp.concatenate(own, -1)[:, model.prefix :]
    return jnp.concatenate([patches, jnp.broadcast_to(read, (*patches.shape[:2], read.shape[-1]))], -1), trace.logits


def values(weights: Mapping[str, Array], read: Array, logits: Array) -> Array:
    """The values of all patches for all classes, whose sums are what the patches add to the logits.

        phi = GELU(z W + b) U + z V + p,   and each gets an equal share of   f(x) - f(empty) - sum phi

    Args:
      weights: arrays, see `SHAPES`; `empty` are the logits of an image without patches.
      read: z [B, n, F], from `features`.
      logits: [B, C].

    Returns:
      [B, n, C].
    """
    found = jax.nn.gelu(read @ weights["hidden"] + weights["bias"]) @ weights["out"]
    found = found + read @ weights["direct"] + weights["places"]
    left = logits - weights["empty"] - found.sum(1)
    return found + left[:, None] / found.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Amortised:
    """Shapley values by a trained explainer (ViT-Shapley; Covert et al., ICLR 2023): one forward pass; signed.

    The sum of a map is the logit minus that of an image without patches.
    """

    weights: Mapping[str, Array]

    def __call__(self, model: Model, params: Any, inputs: Any, target: Any) -> Explanation:
        if isinstance(target, Question) and target.score != CLASS_LOGIT:
            raise InputError("an amortised explainer knows the logits of classes: leave out the score")
        read, logits = features(model, params, inputs)
        details = explained(logits, target)[1]
        sizes = {"F": read.shape[-1], "n": read.shape[1], "C": logits.shape[-1], "K": len(self.weights["bias"])}
        for name, axes in SHAPES.items():
            expected = [sizes[axis] for axis in axes.split()]
            if [*self.weights[name].shape] != expected:
                raise InputError(
                    f"this explainer was trained for another model: its {name!r} is "
                    f"{[*self.weights[name].shape]}, expected {expected}"
                )
        asked = details["target"]
        classes = asked.target if isinstance(asked, Question) else asked
        found = values(self.weights, read, logits)
        known = jnp.take_along_axis(found, classes[:, None, None], -1, mode="fill")[..., 0]
        assert model.grid is not None
        return known.reshape(-1, *model.grid), details


def amortised(path: str | os.PathLike[str]) -> Method:
    """The method of a trained amortised explainer, for `explain` or as a row of `METHODS`.

    Args:
      path: the `.safetensors` file that its training wrote, or the name of a shipped model that has an explainer
        ("cifar10_distilled"). It fits only the model that it was trained for.

    Returns:
      A method of one forward pass, for images and the logits of classes.

    Raises:
      InputError: the file is missing, damaged, or not an explainer.

    Examples:
        >>> import tokentm_jax as tm
        >>> vit = tm.load()
        >>> maps = tm.explain(vit, vit.read("cat.jpg"), tm.amortised("cifar10_distilled"))
        >>> maps.shape
        (1, 8, 8)
    """
    shipped = [folder / "explainers" / f"{path}.safetensors" for folder in SHIPPED if isinstance(path, str)]
    path = next((file for file in shipped if file.is_file()), as_path(path, "the explainer"))
    tensors = read_safetensors(path)
    if tensors.keys() != SHAPES.keys():
        raise InputError(f"{path} is not an explainer: expected the arrays {', '.join(SHAPES)}")
    for name, axes in SHAPES.items():
        if tensors[name].ndim != len(axes.split()):
            raise InputError(f"{path} is not an explainer: {name!r} must be [{', '.join(axes.split())}]")
    weights = {name: jnp.asarray(array, jnp.float32) for name, array in tensors.items()}
    return Method(Amortised(weights), "Covert et al., ICLR", 2023, "1 F", float32=True)
