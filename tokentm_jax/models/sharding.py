"""Explanations on many devices: batches spread over them, or parameters too large for one.

Every function of `explain_fn` runs on arrays that are sharded under any mesh, with automatic or explicit axes. No
collective is needed if only the batch is sharded. These functions place the arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokentm_jax.errors import InputError
from tokentm_jax.maths.primitives import PyTree

BATCH, WIDTH = "batch", "width"


def over_batch(devices: Sequence[object]) -> NamedSharding:
    """Sharding of an array by its first axis, the batch, over the devices."""
    return NamedSharding(Mesh(np.array(devices), (BATCH,)), PartitionSpec(BATCH))


def over_devices(explain: Callable[..., PyTree], devices: Sequence[object] | None = None) -> Callable[..., PyTree]:
    """A method with the batch spread over devices.

    Args:
      explain: `(params, inputs, target=None)`, of `explain_fn`.
      devices: None: all.

    Returns:
      The same function, jitted, for batches of any size: copies of the last sample are added, and removed from the
      results. Each call copies the parameters to every device unless they are there already;
      `jax.device_put(params, run.replicated)` copies them once.
    """
    if not callable(explain):
        raise InputError(f"over_devices takes a function, such as that of tm.explain_fn, got {explain!r:.80}")
    chosen = list(devices or jax.devices())
    spread = over_batch(chosen)
    replicated = NamedSharding(spread.mesh, PartitionSpec())
    compiled = jax.jit(explain)

    def place(array: Any) -> Array:
        array = np.asarray(array) if not isinstance(array, Array) else array
        missing = -len(array) % len(chosen)
        if missing:
            array = jnp.concatenate([array, jnp.repeat(array[-1:], missing, axis=0)])
        return jax.device_put(array, spread)

    def run(params: Any, inputs: Any, target: Any = None) -> Any:
        size = len(inputs)
        if not size:
            raise InputError("the batch is empty")
        classes = None if target is None else place(target)
        results = compiled(jax.device_put(params, replicated), place(inputs), classes)
        return jax.tree.map(lambda a: a[:size], results)

    run.replicated = replicated  # pyright: ignore[reportFunctionMemberAccess]
    return run


def over_width(params: PyTree, mesh: Mesh, axis: str = WIDTH) -> PyTree:
    """Parameters of a model that is too large for one device, with its width split over an axis of a mesh.

    Linear maps into heads and hidden channels (`qkv`, `fc1`) are split by outputs, and maps back (`proj`, `fc2`) by
    inputs, so a layer needs one sum over the devices.

    Args:
      params: of a `ViT` or `Bert`.
      mesh, axis: the devices among which the width is split.

    Returns:
      The parameters on these devices; what is not split is replicated.

    Raises:
      InputError: an axis that the mesh does not have, or that does not divide the width.
    """
    if axis not in mesh.shape:
        raise InputError(f"the mesh has no axis {axis!r}, only {', '.join(map(repr, mesh.shape))}")
    count = mesh.shape[axis]

    def place(path: tuple, array: Array) -> Array:
        names = [getattr(key, "key", None) for key in path]
        spec: list[str | None] = [None] * array.ndim
        if {"qkv", "fc1"} & set(names):
            spec[-1] = axis
        elif {"proj", "fc2"} & set(names) and names[-1] == "kernel":
            spec[-2] = axis
        for size, split in zip(array.shape, spec, strict=True):
            if split and size % count:
                raise InputError(f"{'.'.join(map(str, names))}: {count} devices do not divide {size} channels")
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place, params)
