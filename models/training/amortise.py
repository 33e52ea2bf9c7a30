"""Training of an amortised explainer against sampled Shapley values, whose noise is zero on average.

The samples cost hundreds of passes an image. They are kept in a file, which grows as they come, so a run that stops
goes on. The explainer reads what the explained model, which stays as it is, has computed: its own training is fast.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import Array

from models.training.data import Data
from models.training.kept import keep, kept
from models.training.loop import Loop, State, adamw, begin, descend, run_steps
from models.training.recipe import AmortiseConfig, resize
from models.training.train import Batch, batches
from tokentm_jax.errors import InputError
from tokentm_jax.files import MARK, replace, require_ours
from tokentm_jax.identity import claimed, digest, environment
from tokentm_jax.maths.maps import unit
from tokentm_jax.maths.mixed import linear
from tokentm_jax.methods.amortised import features, values
from tokentm_jax.methods.perturbation import Removal, shapley
from tokentm_jax.models.loading import Model, load
from tokentm_jax.programs.model import function_of
from tokentm_jax.validation import check_fields

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
    def sample(params: Any, images: Array, seeds: Array) -> Array:
        found = jax.vmap(one, (None, 0, 0))(params, inputs_of(vit, images), seeds)
        return found.astype(jnp.float16)

    shape = (vit.module.num_classes, *vit.module.grid)
    others = "values of another model, other images or by other versions"
    found = kept(path, "values", identity, shape, "the values are sampled again", others)
    began, first, saved = time.monotonic(), len(found), time.monotonic()
    while len(found) < len(images):
        rows = np.arange(len(found), len(found) + _BATCH) % len(images)  # one shape for all batches
        found += [*np.asarray(sample(vit.params, images[rows], rows.astype(np.int32)))]
        done = time.monotonic()
        if done - saved > 60 or len(found) >= len(images):
            keep(path, "values", identity, np.stack(found[: len(images)]))
            left = (done - began) / (len(found) - first) * (len(images) - len(found))
            log(f"Shapley values: {len(found)} of {len(images)} images, {left / 60:.0f} min left")
            saved = done
    return np.stack(found[: len(images)])


def read_all(vit: Model, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`features` of photos: float16 [images, n, F], and the logits [images, classes]."""

    @jax.jit
    def read(params: Any, images: Array) -> tuple[Array, Array]:
        inputs = inputs_of(vit, images)
        tokens, logits = features(function_of(vit.module).read(params, inputs), params, inputs)
        return tokens.astype(jnp.float16), logits

    found = []
    for start in range(0, len(images), _BATCH):
        rows = np.arange(start, start + _BATCH) % len(images)
        found.append(jax.device_get(read(vit.params, images[rows])))
    tokens, logits = (np.concatenate(arrays)[: len(images)] for arrays in zip(*found, strict=True))
    return tokens, logits


def initial(key: Array, count: int, hidden: int, places: int, classes: int) -> dict[str, Any]:
    """Weights of an explainer that gives each patch the same share; as the optimiser takes them."""
    kernel = jax.random.normal(key, (count, hidden)) / count**0.5
    return {
        "hidden": {"kernel": kernel, "bias": jnp.zeros(hidden)},
        "out": {"kernel": jnp.zeros((hidden, classes))},
        "direct": {"kernel": jnp.zeros((count, classes))},
        "places": {"bias": jnp.zeros((places, classes))},
    }


def weights_of(params: Any, mean: Any, std: Any, empty: Any) -> dict[str, Any]:
    """The weights for `methods.amortised.values`, of parameters that were trained on (features - mean) / std."""
    hidden, direct = (params[name]["kernel"] / std[:, None] for name in ("hidden", "direct"))
    places = params["places"]["bias"]  # what all patches have alike, such as `mean @ direct`, changes no value
    return {
        "hidden": hidden,
        "bias": params["hidden"]["bias"] - mean @ hidden,
        "out": params["out"]["kernel"],
        "direct": direct,
        "places": places - places.mean(0),
        "empty": empty,
    }


def train_explainer(
    config: AmortiseConfig,
    data: Data,
    test: Data,
    out: Path,
    log: Callable[[str], None],
    *,
    overwrite: bool = False,
) -> float:
    """Train an explainer to the end, or from where `out` stopped on.

    `out` holds the samples, the Orbax checkpoints, `log.jsonl` and, at the end, `<name>.safetensors` in half precision
    for `tm.amortised`. `overwrite` also replaces files of these names that this program did not write.

    Returns:
      The correlation with held-out samples, whose noise limits it.

    Raises:
      InputError: a model that has no features, images that do not fill a batch, and what `train` raises.
    """
    config = check_fields(config, "the recipe")
    vit = load(config.model, config.checkpoint)
    order = np.random.default_rng(config.seed).permutation(len(data.images))  # the first samples are of all classes
    data = data._replace(images=data.images[order], labels=data.labels[order])
    per_epoch = len(data.images) // config.batch_size
    if per_epoch == 0:
        raise InputError(f"{config.train_data}: {len(data.images)} images do not fill a batch of {config.batch_size}")
    file, described = out.absolute() / f"{config.name}.safetensors", vit.described()["identity"]
    terms = {**dataclasses.asdict(config), "model": {"name": vit.name, "identity": described}, **environment()}
    sets = {"train_data": data, "test_data": test}
    for name, given in sets.items():
        terms[name] = {"name": f"{terms[name]}, {len(given.images)} images", "identity": given.identity()}
    written = ("shapley.npz", "test_shapley.npz", "checkpoints", "log.jsonl", file.name)
    with claimed(out := out.absolute(), json.loads(json.dumps(terms)), written, overwrite):
        require_ours(file, overwrite)
        made = [digest(described, config.pairs, terms[name]["identity"], environment()) for name in sets]
        held_out = sampled(vit, test.images, config.pairs, out / "test_shapley.npz", made[1], log)
        samples = sampled(vit, data.images, config.pairs, out / "shapley.npz", made[0], log)
        params, top = fit(config, vit, (data.images, samples), (test.images, held_out), out, log)
        tensors = {name: np.asarray(array, np.float16) for name, array in params.items()}
        about = {"model": vit.name, "identity": described, "correlation": top, "images": len(data.images)}
        content = safetensors.numpy.save(tensors, {MARK: json.dumps(about), "format": "pt"})
        replace(file, lambda part: part.write_bytes(content), overwrite=overwrite)
    return top


Samples = tuple[np.ndarray, np.ndarray]  # photos uint8 [images, h, w, C], and their sampled values


def fit(
    config: AmortiseConfig, vit: Model, train: Samples, test: Samples, out: Path, log: Callable[[str], None]
) -> tuple[dict[str, Any], float]:
    """The weights of an explainer that is fitted to samples, and its correlation with those of `test`."""
    (read, logits), (test_read, test_logits) = read_all(vit, train[0]), read_all(vit, test[0])
    targets, held_out = (np.moveaxis(s.reshape(*s.shape[:2], -1), 1, 2).astype(np.float32) for _, s in (train, test))
    sample = read[:: -(-len(read) // 500)].astype(np.float32)
    mean, std = sample.mean((0, 1)), np.maximum(sample.std((0, 1)), 1e-3)
    empty = vit.module.apply({"params": vit.params}, jnp.zeros_like(inputs_of(vit, jnp.asarray(train[0][:1]))))[0]
    scale = float(np.square(targets).mean())
    per_epoch = len(read) // config.batch_size
    optimiser = adamw(config, per_epoch)

    def given(params: Any, read: Array, logits: Array) -> Array:
        return values(weights_of(params, mean, std, empty), read.astype(jnp.float32), logits)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch, logits: Array) -> tuple[State, Array]:
        def loss_of(params: Any) -> Array:
            return jnp.square(given(params, batch.images, logits) - batch.labels).mean() / scale

        return descend(optimiser, state, loss_of, config.ema_decay)

    def correlation(state: State) -> float:
        found = given(state.average, jnp.asarray(test_read), jnp.asarray(test_logits))
        return float(np.corrcoef(np.ravel(found), held_out.ravel())[0, 1])

    first = initial(jax.random.key(config.seed), read.shape[-1], config.hidden, read.shape[1], len(empty))
    state, top = run_steps(
        Loop(round(config.epochs * per_epoch), per_epoch, config.checkpoint_epochs),
        begin(optimiser, first, averaged=True),
        partial(batches, config, Data(read, targets, ())),  # type: ignore[arg-type]
        lambda state, _, batch: step(state, batch, logits[batch.rows]),
        correlation,
        out,
        log,
    )
    return weights_of(jax.device_get(state.average), mean, std, empty), top
