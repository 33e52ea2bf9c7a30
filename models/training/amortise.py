"""Training of an amortised explainer against sampled Shapley values, whose noise is zero on average.

The samples cost hundreds of passes an image and are kept in a file, which is written as they come; the explainer reads
the tokens of the explained model, which stays as it is, so its own training takes minutes.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.training.recipe import resize
from tokentm_jax.errors import InputError
from tokentm_jax.files import reason, replace
from tokentm_jax.maths.maps import unit
from tokentm_jax.maths.mixed import linear
from tokentm_jax.methods.perturbation import Removal, shapley
from tokentm_jax.models.loading import Model
from tokentm_jax.programs.model import function_of

_BATCH = 8  # images at a time


def inputs_of(vit: Model, images: Array) -> Array:
    """Photos uint8 [B, h, w, C] as inputs of the model."""
    return vit.preprocessing.normalise(resize(unit(images), vit.module.img_size))


def sampled(vit: Model, images: np.ndarray, pairs: int, path: Path, identity: str, log: Callable[[str], None]) -> Any:
    """Sampled Shapley values of all classes, float16 [images, classes, gh, gw], each image with other orders.

    They are kept in the .npz at `path`: what is there is not computed again.

    Args:
      vit: the explained model, whose passes are in mixed precision here.
      images: uint8 [images, h, w, C].
      pairs: of orders, as for the method `shapley`.
      path: the file.
      identity: of what they depend on.
      log: is told how far it is.

    Raises InputError for a file of another identity, or that is damaged or cannot be written.
    """
    module = vit.module.clone(linear=linear)
    classes = jnp.arange(vit.module.num_classes, dtype=jnp.int32)

    def one(params: Any, image: Array, seed: Array) -> Array:
        model = function_of(module).read(params, image[None])
        play = partial(shapley, model, params, image[None], options=Removal(), pairs=pairs, seed=seed)  # type: ignore[arg-type]
        return jax.vmap(lambda c: play(target=c[None])[0][0])(classes)  # the passes are shared

    @jax.jit
    def values(params: Any, images: Array, seeds: Array) -> Array:
        found = jax.vmap(one, (None, 0, 0))(params, inputs_of(vit, images), seeds)
        return found.astype(jnp.float16)

    shape = (vit.module.num_classes, *vit.module.grid)
    found = [*_read(path, identity, shape)] if path.exists() else []
    began, first, saved = time.monotonic(), len(found), time.monotonic()
    while len(found) < len(images):
        rows = np.arange(len(found), len(found) + _BATCH) % len(images)  # one shape for all batches
        found += [*np.asarray(values(vit.params, images[rows], rows.astype(np.int32)))]
        done = time.monotonic()
        if done - saved > 60 or len(found) >= len(images):
            replace(path, partial(_write, identity, np.stack(found[: len(images)])), overwrite=True)
            left = (done - began) / (len(found) - first) * (len(images) - len(found))
            log(f"Shapley values: {len(found)} of {len(images)} images, {left / 60:.0f} min left")
            saved = done
    return np.stack(found[: len(images)])


def _write(identity: str, values: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, identity=np.array(identity), values=values)


def _read(path: Path, identity: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            made, values = str(file["identity"]), file["values"]
        if values.dtype != np.float16 or values.shape[1:] != shape:
            raise ValueError(f"it holds {values.dtype} {values.shape}")
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged archives
        raise InputError(f"{path} is damaged ({reason(error)}); remove it, and the values are sampled again") from None
    if made != identity:
        raise InputError(f"{path} holds values of another model, other images or by other versions; remove it")
    return values
