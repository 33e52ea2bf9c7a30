"""`Reader`: from files and texts to the input of a model, whatever the modality. `Preprocessing` is one for images."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jax import Array

from tokentm_jax.data.examples import Example, Source
from tokentm_jax.inputs.pictures import Panel

PROFILES = ("default", "reference")


def random_map(key: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """The baseline: noise that depends on the example's name only.

    Args:
      key: the name.
      shape: (h, w).
      seed: of the noise.

    Returns:
      float32 [h, w] in [0, 1).
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16])).random(shape, np.float32)


def nearness(mask: Any) -> np.ndarray:
    """The baseline: tokens are relevant by how near to the end of their text they are. Maps [B, 1, N], 1 / k for the
    k-th token from the end, of texts with the mask [B, N]."""
    mask = np.asarray(mask)
    behind = mask[:, ::-1].cumsum(1, dtype=np.float32)[:, ::-1]
    return np.where(mask, 1 / np.maximum(behind, 1), 0)[:, None].astype(np.float32)


class Reader(Protocol):
    """What a loaded model has as `preprocessing`. Frozen and hashable: compiled programs are kept for it.

    A comment stands above its member.
    """

    kind: str  # what a sample is called: "photo", "recording", "text"
    frame: str | None  # what the picture under a map is called; None without one
    figures: str  # the usual format of what is drawn
    suffixes: frozenset[str]  # of the files that are read
    size: tuple[int, ...]  # of what the model receives
    regular: bool  # whether every map is a grid of the same parts

    # What an argument of the command line names, by what messages call it. Raises InputError.
    def found(self, argument: str, number: int = 1) -> dict[str, Any]: ...
    # The content of what was found, as in an `Example`. Raises InputError.
    def opened(self, given: Any) -> Any: ...
    # The content of an upload. Raises InputError.
    def decoded(self, content: bytes) -> Any: ...
    # An upload, to compile programs for.
    def example(self) -> bytes: ...
    # What of a sample the model does not receive, as a sentence; None for nothing.
    def notice(self, content: Any, name: str) -> str | None: ...
    # An example as `explain` takes it, without the axis of samples; see `stacked`. Raises InputError.
    def sample(self, example: Example) -> Any: ...
    # What maps are shown on.
    def panel(self, content: Any, title: str, side: int = ..., profile: str = "default") -> Panel: ...
    # What `read` takes: each as a `sample`, and what its map is shown on, of `side` pixels. Raises InputError.
    def panels(self, what: Any, side: int) -> list[tuple[Any, Panel]]: ...
    # A map as it lies on the panel.
    def shown(self, heatmap: np.ndarray, module: Any, squares: bool) -> np.ndarray: ...
    # Files, or texts, of a caller -> what `explain` takes. Raises InputError.
    def read(self, given: Any) -> Any: ...
    # What `explain` takes, as arrays of the right shape and type. Raises InputError for anything else.
    def checked(self, inputs: Any) -> Any: ...
    # What `explain` takes -> the input of the module; to be compiled.
    def normalise(self, inputs: Any) -> Any: ...
    # An example of a data set as small numbers, and its mask. Raises InputError.
    def levels(self, example: Example, profile: str = "default") -> tuple[Any, Any]: ...
    # The `levels` of examples as a batch.
    def stacked(self, samples: Sequence[Any]) -> Any: ...
    # The masks of examples as an array [B, ...].
    def stacked_masks(self, masks: Sequence[Any]) -> np.ndarray: ...
    # A batch of `stacked`, or what `explain` takes -> what `explain` takes; to be compiled.
    def unit(self, levels: Any) -> Any: ...
    # Shapes and types of a batch of `size` examples, as `stacked` gives it.
    def batch(self, size: int) -> Any: ...
    # A reader whose batches have one shape for all of a source.
    def fixed(self, source: Source) -> "Reader": ...
    # A batch as `stacked` gives it, to measure speed.
    def dummy(self, size: int) -> Any: ...
    # The baseline: a random map for each key that depends on nothing else: [B, h, w]; `inputs` are a batch.
    def noise(self, keys: Sequence[str], seed: int, module: Any, inputs: Any, pixels: bool) -> np.ndarray: ...
    # What replaces a removed part, in the values of the inputs that `unit` gives.
    def blank(self, module: Any, params: Any) -> Any: ...
    # Everything that the numbers depend on, as JSON.
    def to_dict(self) -> dict[str, Any]: ...
    # Maps of a model -> maps in [0, 1] of what can be removed: pixels of images, words of texts.
    def to_pixels(self, maps: Array, inputs: Any, module: Any) -> Array: ...
