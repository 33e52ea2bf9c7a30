"""A function as the module of a loaded model."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from annotated_types import Ge
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.maths.primitives import PyTree
from tokentm_jax.validation import checked

_Grid = tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]]


def _listed(values: Any) -> Any:
    """A sequence or array of numbers as a list of Python numbers. Anything else is returned unchanged."""
    if isinstance(values, list | tuple):
        return [value.item() if isinstance(value, np.generic) else value for value in values]
    return values.tolist() if isinstance(values, np.ndarray | jax.Array) else values


@dataclasses.dataclass(frozen=True)
class PlainModel:
    """A function `forward(params, images) -> logits` as the module of a `Model`.

    `explain_fn` takes the function itself.

    Args:
      forward: takes normalised images [B, H, W, C]. A third parameter `tap`, if it has one, gets a function
        `tap(name, array)` that returns the array.
      grid: the grid (gh, gw) of the patches, and of the maps.
      prefix: number of tokens before those of the patches.
      readout: how the head reads tokens: "token" (the first one), "avg" (the mean of the patches), or a share for each
        of the N tokens. Only methods that carry a row through attention use it.
      num_classes: number of outputs.
      batched: False for a function of one image [H, W, C] whose arrays have no batch axis.

    Models with equal fields share a compiled program, so make `forward` once.
    """

    forward: Callable[..., PyTree]
    grid: tuple[int, int]
    prefix: int = 0
    readout: Literal["token", "avg"] | Sequence[float] | Array = "token"
    num_classes: int | None = None
    batched: bool = True

    def __post_init__(self) -> None:
        if not callable(self.forward):
            raise InputError(f"forward must be a function (params, images) -> logits, got {self.forward!r:.80}")
        grid = tuple(listed) if isinstance(listed := _listed(self.grid), list) else listed
        object.__setattr__(self, "grid", checked("the grid of PlainModel", _Grid, grid))
        object.__setattr__(self, "prefix", checked("the prefix of PlainModel", Annotated[int, Ge(0)], self.prefix))
        prefix, patches = self.prefix, self.grid[0] * self.grid[1]
        named = {"token": [1.0] + [0.0] * (prefix + patches - 1), "avg": [0.0] * prefix + [1 / patches] * patches}
        if isinstance(self.readout, str) and self.readout not in named:
            raise InputError(f"readout must be 'token', 'avg' or a share for each token, got {self.readout!r}")
        given = named[self.readout] if isinstance(self.readout, str) else _listed(self.readout)
        shares = checked("the readout of PlainModel", list[float], given)
        if len(shares) != prefix + patches:
            raise InputError(f"readout must have a share for each of {prefix} + {patches} tokens, got {len(shares)}")
        object.__setattr__(self, "readout", tuple(map(float, shares)))

    def apply(self, variables: PyTree, images: Array) -> PyTree:
        """As `apply` of a Linen module."""
        taps = () if len(inspect.signature(self.forward).parameters) < 3 else (lambda name, array: array,)
        run = lambda images: self.forward(variables["params"], images, *taps)  # noqa: E731
        return run(images) if self.batched else jax.vmap(run)(images)
