"""Models that are functions: of any library, and of none.

    def forward(params, images, tap):
        ...
        attention = tap("attention", nn.softmax(scores))  # use what tap gives back
        ...
        return logits

`tap(name, array)` shows an array under a name of the contract (`tokentm_jax.models.capture`) and returns the one to
use in its place. Without taps, the methods that need nothing but outputs and gradients of inputs work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge
from jax import Array
from jax.extend.core import get_opaque_trace_state

from tokentm_jax.errors import InputError, suggest
from tokentm_jax.models.capture import KERNELS, NAMES, POST_NORM
from tokentm_jax.validation import checked

_Grid = tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]]
Tap = Callable[[str, Array], Array]


def _listed(values: Any) -> Any:
    """A sequence or array of numbers as a list of Python's, and anything else as it is."""
    if isinstance(values, list | tuple):
        return [value.item() if isinstance(value, np.generic) else value for value in values]
    return values.tolist() if isinstance(values, np.ndarray | jax.Array) else values


@dataclasses.dataclass(frozen=True)
class PlainModel:
    """A function `forward(params, images, tap) -> logits` as a model, explained by what it shows.

    Args:
      forward: of normalised images [B, H, W, C], with the blocks in a Python loop: what is tapped inside of `jax.jit`,
        `vmap`, `scan` or `checkpoint` cannot be shown, and is refused.
      grid: the grid (gh, gw) of the patches, and of the maps.
      prefix: how many tokens stand before those of the patches.
      readout: how the head reads tokens: "token" (the first one), "avg" (the mean of the patches), or a share for each
        of the N tokens. Only methods that carry a row through attention ask for it.
      num_classes: how many outputs there are, where `tm.LoadedViT` wraps this.
      batched: False for a function of one image [H, W, C] whose arrays have no batch axis.

    Two models are the same to a compiled program if their fields are, so make `forward` once.
    """

    forward: Callable[..., Any]
    grid: tuple[int, int]
    prefix: int = 0
    readout: Any = "token"
    num_classes: int | None = None
    batched: bool = True

    def __post_init__(self) -> None:
        if not callable(self.forward):
            raise InputError(f"forward must be a function (params, images, tap) -> logits, got {self.forward!r:.80}")
        grid = tuple(listed) if isinstance(listed := _listed(self.grid), list) else listed
        object.__setattr__(self, "grid", checked("the grid of PlainModel", _Grid, grid))
        object.__setattr__(self, "prefix", checked("the prefix of PlainModel", Annotated[int, Ge(0)], self.prefix))
        patches = self.grid[0] * self.grid[1]
        if isinstance(self.readout, str):
            if self.readout not in ("token", "avg"):
                raise InputError(f"readout must be 'token', 'avg' or a share for each token, got {self.readout!r}")
            shares: Sequence[float] = [1.0] + [0.0] * (self.prefix + patches - 1)
            if self.readout == "avg":
                shares = [0.0] * self.prefix + [1 / patches] * patches
        else:
            shares = checked("the readout of PlainModel", list[float], _listed(self.readout))
        if len(shares) != self.prefix + patches:
            raise InputError(
                f"readout must have a share for each of {self.prefix} + {patches} tokens, got {len(shares)}"
            )
        object.__setattr__(self, "readout", tuple(map(float, shares)))

    def apply(self, variables: Any, images: Array, mutable: Sequence[str] = ()) -> Any:
        """As `apply` of a Linen module: the outputs and, with `mutable` collections, what was tapped for them."""

        def run(images: Array, changes: Any) -> tuple[Any, Taken, Taken]:
            tap = _Tap(changes)
            return self.forward(variables["params"], images, tap), tap.found, tap.kernels

        run = run if self.batched else jax.vmap(run)
        outputs, found, kernels = run(images, variables.get("perturbations"))
        if not self.batched:
            kernels = jax.tree.map(lambda a: a[0], kernels)
        collections = {"intermediates": {"arrays": found, "kernels": kernels}, "perturbations": {"arrays": found}}
        return (outputs, {name: collections[name] for name in mutable}) if mutable else outputs


Taken = dict[str, dict[str, Array]]  # the k-th array of every name, under k


class _Tap:
    """The `tap` of one forward pass. `changes` are what is added, and `found` and `kernels` are what passed."""

    def __init__(self, changes: Any) -> None:
        self.found: Taken = {}
        self.kernels: Taken = {}
        self._changes = {} if changes is None else changes["arrays"]
        self._trace = get_opaque_trace_state(convention="flax")

    def __call__(self, name: str, array: Array) -> Array:
        if name not in (*NAMES, *POST_NORM):
            raise suggest("tap", name, (*NAMES, *POST_NORM))
        if get_opaque_trace_state(convention="flax") != self._trace:
            raise InputError(
                f"{name!r} is tapped inside of a jit, vmap, scan or checkpoint of its own, which no array can leave: "
                f"loop over the blocks in Python, and see the field `batched`"
            )
        taken = self.kernels if name in KERNELS else self.found
        place = str(sum(name in names for names in taken.values()))
        if name in self._changes.get(place, {}):
            array = array + self._changes[place][name]
        taken.setdefault(place, {})[name] = array
        return array
