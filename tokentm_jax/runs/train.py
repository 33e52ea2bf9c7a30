"""Training of a small ViT classifier, from random weights or from a converted checkpoint.

A run is exactly repeatable and resumable: the order of the data, the augmentation and the dropped patches of step
`t` are functions of (seed, t) alone, and the Orbax checkpoint holds everything else.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Le, Len, Lt
from jax import Array
from pydantic import Strict

from tokentm_jax.data.arrays import Data
from tokentm_jax.data.preprocessing import Preprocessing
from tokentm_jax.errors import InputError
from tokentm_jax.files import read_text, reason, remove, write_text
from tokentm_jax.identity import claimed, digest, digest_files, environment
from tokentm_jax.models.checkpoint import read_checkpoint, write_checkpoint
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.validation import Name, check_fields

LARGEST_STEP = 2**31 - 1  # steps are counted in int32

Text = Annotated[str, Len(1, 1000)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
NotAll = Annotated[float, Ge(0), Lt(1)]
Lax = Strict(False)  # a list will do for a tuple


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One recipe. Sizes in pixels, durations in epochs, `mean` and `std` per channel for images in [0, 1]."""

    name: Name
    train_data: Text  # zip of class folders, or "tfds:NAME:SPLIT"
    test_data: Text
    model: Mapping[str, Any]  # keyword arguments of timm's VisionTransformer
    epochs: Annotated[float, Gt(0), Le(1_000_000)]
    warmup_epochs: NotNegative = 2.0
    batch_size: Annotated[int, Ge(1), Le(2**20)] = 128
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    beta_2: NotAll = 0.99
    clip_norm: Positive = 1.0
    label_smoothing: Share = 0.1
    ema_decay: NotAll = 0.999
    crop_padding: Annotated[int, Ge(0), Le(1024)] = 4
    flip: bool = True
    affine_colour: Share = 0.0  # strength of random affine and colour changes
    cutmix: Share = 0.0  # probability that a batch is mixed by CutMix
    patch_drop: NotAll = 0.0  # share of patches left out ...
    patch_drop_epochs: NotNegative = 0.0  # ... in the first so many epochs
    mimetic_init: bool = False
    fine_tune: Annotated[tuple[Text, Text], Lax] | None = None  # (model name, checkpoint) to start from
    mean: Annotated[tuple[float, float, float], Lax] = (0.4914, 0.4822, 0.4465)
    std: Annotated[tuple[Positive, Positive, Positive], Lax] = (0.2470, 0.2435, 0.2616)
    seed: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    checkpoint_epochs: Positive = 1.0


class State(NamedTuple):
    step: Array
    params: Any
    optimiser: Any
    average: Any  # exponential moving average of the parameters


def mimetic(params: dict[str, Any], num_heads: int, grid: tuple[int, int], prefix: int, key: Array) -> dict[str, Any]:
    """Start attention near what trained ViTs look like (Trockman & Kolter, ICML 2023, arXiv 2305.09828): per head
    `W_Q W_K^T = 0.7 Z + 0.7 I`, `W_V W_O = 0.4 Z - 0.4 I` with Gaussian Z, and sinusoidal positions."""
    qkv = params["blocks"]["attn"]["qkv"]["kernel"]
    depth, d, _ = qkv.shape
    width = d // num_heads

    def factors(k: Array, noise: float, identity: float) -> tuple[Array, Array]:
        z = jax.random.normal(k, (d, d)) / d**0.5
        u, s, vt = jnp.linalg.svd(noise * z + identity * jnp.eye(d))
        return u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * vt

    def block(k: Array) -> tuple[Array, Array]:
        keys = jax.random.split(k, num_heads + 1)
        left, right = jax.vmap(lambda k: factors(k, 0.7, 0.7))(keys[:-1])
        query = jnp.moveaxis(left[..., :width], 0, 1).reshape(d, d)
        key_ = jnp.moveaxis(right[:, :width].transpose(0, 2, 1), 0, 1).reshape(d, d)
        value, out = factors(keys[-1], 0.4, -0.4)
        return jnp.concatenate([query, key_, value], 1), out

    kernels, outs = jax.vmap(block)(jax.random.split(key, depth))
    frequencies = 10000.0 ** (-jnp.arange(d // 4) / (d // 4))
    y, x = jnp.meshgrid(jnp.arange(grid[0]), jnp.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (y, x)]
    positions = jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], -1) * 0.1
    attn = {"qkv": {**params["blocks"]["attn"]["qkv"], "kernel": kernels}}
    attn["proj"] = {**params["blocks"]["attn"]["proj"], "kernel": outs}
    skipped = params["pos_embed"].shape[1] - positions.shape[0]
    pos_embed = params["pos_embed"].at[:, skipped:].set(positions)
    return {**params, "blocks": {**params["blocks"], "attn": attn}, "pos_embed": pos_embed}


def augment(config: TrainConfig, key: Array, images: Array) -> Array:
    """Random shift (zero padding), horizontal flip, and optional affine and colour changes of images in [0, 1]."""
    b, h, w, _ = images.shape
    k_shift, k_flip, k_affine, k_colour = jax.random.split(key, 4)
    pad = config.crop_padding
    if pad:
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corner = jax.random.randint(k_shift, (b, 2), 0, 2 * pad + 1)
        images = jax.vmap(lambda i, c: jax.lax.dynamic_slice(i, (c[0], c[1], 0), (h, w, 3)))(padded, corner)
    if config.flip:
        images = jnp.where(jax.random.bernoulli(k_flip, 0.5, (b, 1, 1, 1)), images[:, :, ::-1], images)
    if config.affine_colour:
        images = jax.vmap(partial(_affine, config.affine_colour))(jax.random.split(k_affine, b), images)
        images = jax.vmap(partial(_colour, config.affine_colour))(jax.random.split(k_colour, b), images)
    return images


def _affine(strength: float, key: Array, image: Array) -> Array:
    """Random rotation, shear and zoom of one image [H, W, 3] about its centre, bilinear."""
    h, w, _ = image.shape
    angle, shear, zoom = jax.random.uniform(key, (3,), minval=-1, maxval=1) * strength
    angle = angle * 0.5
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    matrix = rotation @ jnp.array([[1.0, shear * 0.3], [0.0, 1.0]]) * (1 + 0.3 * zoom)
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2])
    points = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1) - centre
    source = points @ matrix.T + centre
    sample = partial(jax.scipy.ndimage.map_coordinates, coordinates=[source[..., 0], source[..., 1]], order=1)
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def _colour(strength: float, key: Array, image: Array) -> Array:
    """Random brightness, contrast and saturation of one image [H, W, 3] in [0, 1]."""
    brightness, contrast, saturation = 1 + 0.6 * strength * jax.random.uniform(key, (3,), minval=-1, maxval=1)
    image = image * brightness
    image = image.mean() + (image - image.mean()) * contrast
    grey = image.mean(-1, keepdims=True)
    return jnp.clip(grey + (image - grey) * saturation, 0, 1)


def cutmix(key: Array, images: Array, targets: Array) -> tuple[Array, Array]:
    """Paste one random box of each image's neighbour in the batch into it; targets mix by area (Yun et al., 2019)."""
    _, h, w, _ = images.shape
    k_area, k_centre = jax.random.split(key)
    side = jnp.sqrt(jax.random.uniform(k_area))
    cy, cx = jax.random.uniform(k_centre, (2,)) * jnp.array([h, w])
    rows = jnp.abs(jnp.arange(h) + 0.5 - cy) < side * h / 2
    columns = jnp.abs(jnp.arange(w) + 0.5 - cx) < side * w / 2
    box = (rows[:, None] & columns)[None, :, :, None]
    share = box.mean()
    mixed = jnp.where(box, jnp.roll(images, 1, 0), images)
    return mixed, (1 - share) * targets + share * jnp.roll(targets, 1, 0)


def _prepare(module: ViT, images: Array) -> Array:
    """uint8 [B, h, w, 3] -> [B, H, W, 3] in [0, 1] at the model's resolution."""
    images = images.astype(jnp.float32) / 255
    if images.shape[1:3] != module.img_size:
        images = jax.image.resize(images, (images.shape[0], *module.img_size, 3), "cubic").clip(0, 1)
    return images


def _preprocessing(config: TrainConfig, module: ViT) -> Preprocessing:
    return Preprocessing(module.img_size, 1.0, mean=config.mean, std=config.std)


def make_step(config: TrainConfig, module: ViT, steps_per_epoch: int) -> tuple[Callable, optax.GradientTransformation]:
    """The jitted training step `(state, images uint8, labels) -> (state, loss)` and its optimiser."""
    steps = round(config.epochs * steps_per_epoch)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps // 2)  # short trial runs have one too
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(warmup, 1), max(steps, 2), 0.0)
    normalise = _preprocessing(config, module).normalise
    decayed = partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel")
    optimiser = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b2=config.beta_2, weight_decay=config.weight_decay, mask=decayed),
    )

    @partial(jax.jit, donate_argnums=0, static_argnums=3)
    def step(state: State, images: Array, labels: Array, patch_drop: float) -> tuple[State, Array]:
        k_augment, k_mix, k_use, k_drop = jax.random.split(
            jax.random.fold_in(jax.random.key(config.seed), state.step), 4
        )
        inputs = augment(config, k_augment, _prepare(module, images))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, module.num_classes), config.label_smoothing)
        if config.cutmix:
            use = jax.random.bernoulli(k_use, config.cutmix)
            inputs, targets = jax.tree.map(partial(jnp.where, use), cutmix(k_mix, inputs, targets), (inputs, targets))
        training = module.clone(patch_drop=patch_drop)

        def loss_of(params: Any) -> Array:
            logits = training.apply({"params": params}, normalise(inputs), rngs={"patch_drop": k_drop})
            return optax.softmax_cross_entropy(logits, targets).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, new_optimiser = optimiser.update(gradients, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
        return State(state.step + 1, params, new_optimiser, average), loss

    return step, optimiser


def batches(config: TrainConfig, data: Data, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless training batches from step `start` on; every epoch is a new permutation from (seed, epoch)."""
    per_epoch = len(data.labels) // config.batch_size
    step = start
    while True:
        epoch = step // per_epoch
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data.labels))
        while step // per_epoch == epoch:
            rows = order[(step % per_epoch) * config.batch_size :][: config.batch_size]
            yield data.images[rows], data.labels[rows]
            step += 1


@partial(jax.jit, static_argnums=(0, 1))
def _hits(module: ViT, preprocessing: Preprocessing, params: Any, images: Array, labels: Array) -> Array:
    logits = module.apply({"params": params}, preprocessing.normalise(_prepare(module, images)))
    return (jnp.argmax(logits, -1) == labels).sum()  # pyright: ignore[reportArgumentType]


def accuracy(config: TrainConfig, module: ViT, params: Any, data: Data, batch_size: int = 250) -> float:
    """Top-1 accuracy in [0, 1] over the whole of `data`."""
    hits = partial(_hits, module, _preprocessing(config, module))
    total = 0
    for i in range(0, len(data.labels), batch_size):
        images, labels = data.images[i : i + batch_size], data.labels[i : i + batch_size]
        short = batch_size - len(labels)  # one shape for all batches; the padding's label matches nothing
        images = np.pad(images, ((0, short), (0, 0), (0, 0), (0, 0)))
        total += int(hits(params, images, np.pad(labels, (0, short), constant_values=-1)))
    return total / len(data.labels)


def initial_params(config: TrainConfig, module: ViT) -> dict[str, Any]:
    """Random parameters, or those of `fine_tune` with a fresh head."""
    key = jax.random.key(config.seed)
    params = init_params(module, key)
    if config.fine_tune is not None:
        head = {"head", "head_dist"} & params.keys()
        body = read_checkpoint(module, Path(config.fine_tune[1]), reset_head=True)
        return {**body, **{name: params[name] for name in head}}
    if config.mimetic_init:
        params = mimetic(params, module.num_heads, module.grid, module.prefix, jax.random.fold_in(key, 1))
    return params


# ---- a run ----------------------------------------------------------------------------------------------------------


def train(config: TrainConfig, module: ViT, data: Data, test: Data, out: Path, log: Callable[[str], None]) -> float:
    """Train to the end, or from where `out` stopped on to the end; returns the average's test accuracy in [0, 1].

    `out` holds the Orbax checkpoints, `log.jsonl` and, at the end, `<name>.safetensors`.

    Raises:
      InputError: a recipe whose fields are not what their annotations say, data that do not fit the model, a full
        disk, or an `out` that holds a run of another recipe, of other data, by other versions or on another device,
        files of others, or a run that is going on.
    """
    import orbax.checkpoint as ocp

    config = check_fields(config, "the recipe")
    steps, per_epoch, test = _fit(config, module, data, test)
    out = out.absolute()  # as Orbax wants it
    params = initial_params(config, module)
    with claimed(out, _terms(config, data, test), ("checkpoints", "log.jsonl", f"{config.name}.safetensors")):
        step_fn, optimiser = make_step(config, module, per_epoch)
        state = State(jnp.zeros((), jnp.int32), params, optimiser.init(params), jax.tree.map(jnp.copy, params))
        # Nothing is saved in the background, where an error or a signal would find nobody to take it.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        _drop_unfinished(out / "checkpoints")  # of a run that was killed
        try:
            with ocp.CheckpointManager(out / "checkpoints", options=options) as saved:
                state = _restore(saved, state, steps, log)
                state, top_1 = _run(config, module, data, test, out, log, saved, step_fn, state, steps)
        finally:
            _drop_unfinished(out / "checkpoints")
        _write_model(config, module, state.average, data.class_names, top_1, out / f"{config.name}.safetensors")
    return top_1


def _write_model(
    config: TrainConfig, module: ViT, params: Any, class_names: Sequence[str], top_1: float, path: Path
) -> None:
    """The trained model as a checkpoint that describes itself and says how well it does."""
    how = {"name": config.name, "top_1": top_1, "epochs": config.epochs, "test_data": Path(config.test_data).name}
    write_checkpoint(path, module, jax.device_get(params), _preprocessing(config, module), tuple(class_names), how)


def _fit(config: TrainConfig, module: ViT, data: Data, test: Data) -> tuple[int, int, Data]:
    """Steps of the run and of an epoch, and the test data with the training data's numbers of the classes.

    Raises InputError for data that do not go with the recipe and the model.
    """
    for name, names in ((config.train_data, data.class_names), (config.test_data, test.class_names)):
        if set(names) != set(data.class_names) or len(names) != module.num_classes:
            raise InputError(
                f"{name}: expected the {module.num_classes} classes of the model and of the training data, "
                f"found {len(names)}: {', '.join(names[:5])} ..."
            )
    place = np.array([data.class_names.index(name) for name in test.class_names], np.int32)
    test = test._replace(labels=place[test.labels], class_names=data.class_names)  # by name, whatever their order
    per_epoch = len(data.labels) // config.batch_size
    if per_epoch == 0:
        raise InputError(f"{config.train_data}: {len(data.labels)} images do not fill a batch of {config.batch_size}")
    steps = config.epochs * per_epoch
    if not 1 <= round(min(steps, 2.0 * LARGEST_STEP)) <= LARGEST_STEP:
        raise InputError(f"the recipe: 'epochs' must make 1 to {LARGEST_STEP} steps of {per_epoch} an epoch")
    return round(steps), per_epoch, test


def _terms(config: TrainConfig, data: Data, test: Data) -> dict[str, Any]:
    """What must be equal for a run to go on: every field of the recipe, the bytes it names, and what computes."""
    terms = dataclasses.asdict(config)
    for name, given in (("train_data", data), ("test_data", test)):
        state = hashlib.sha256(digest(given.class_names, given.images.shape, given.labels.tolist()).encode())
        for images in given.images:
            state.update(images.tobytes())
        terms[name] = {"name": f"{terms[name]}, {len(given.labels)} images", "identity": state.hexdigest()[:16]}
    if config.fine_tune is not None:
        path = Path(config.fine_tune[1])
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        identity = digest(config.fine_tune[0], digest_files(files))
        terms["fine_tune"] = {"name": str(path), "identity": identity}
    return {**terms, **environment()}


def _restore(saved: Any, state: State, steps: int, log: Callable[[str], None]) -> State:
    """The state of the last checkpoint, if there is one."""
    import orbax.checkpoint as ocp

    last = saved.latest_step()
    if last is None:
        return state
    try:
        state = saved.restore(last, args=ocp.args.StandardRestore(state))
    except Exception as error:  # Orbax lets errors of several libraries through
        raise InputError(
            f"the checkpoint {saved.directory / str(last)} is damaged ({reason(error)}); "
            "remove it, and the training goes on from the one before"
        ) from None
    if not int(state.step) == last <= steps:
        raise InputError(f"the checkpoint {saved.directory / str(last)} is of step {int(state.step)} of {steps}")
    log(f"resumed at step {last} of {steps}")
    return state


def _run(
    config: TrainConfig,
    module: ViT,
    data: Data,
    test: Data,
    out: Path,
    log: Callable[[str], None],
    saved: Any,
    step_fn: Callable[..., tuple[State, Array]],
    state: State,
    steps: int,
) -> tuple[State, float]:
    """From a state to the last step, with checkpoints and lines of `log.jsonl`; also the test accuracy there."""
    per_epoch, first, began = len(data.labels) // config.batch_size, int(state.step), time.monotonic()
    save_every = max(1, round(min(config.checkpoint_epochs * per_epoch, steps)))
    lines, losses, top_1 = _lines(out / "log.jsonl", first), [], None
    for step, (images, labels) in zip(range(first, steps), batches(config, data, first), strict=False):
        drop = config.patch_drop if step < config.patch_drop_epochs * per_epoch else 0.0
        state, loss = step_fn(state, images, labels, drop)
        losses.append(loss)
        done = step + 1
        if done % save_every == 0 or done == steps:
            mean_loss, losses = float(jnp.stack(losses).mean()), []
            top_1 = accuracy(config, module, state.average, test)
            _save(saved, done, state)
            elapsed = time.monotonic() - began
            left = elapsed / (done - first) * (steps - done)
            record = {"step": done, "loss": mean_loss, "test_accuracy": top_1, "seconds": round(elapsed, 1)}
            lines.append(json.dumps(record) + "\n")
            write_text(out / "log.jsonl", "".join(lines))
            log(f"epoch {done / per_epoch:.1f}: loss {mean_loss:.3f}, test {top_1:.2%}, {left / 60:.0f} min left")
    if top_1 is None:  # nothing was left to train
        top_1 = accuracy(config, module, state.average, test)
    return state, top_1


def _drop_unfinished(folder: Path) -> None:
    """Remove what Orbax calls so until a checkpoint is whole."""
    for left in folder.glob("*.orbax-checkpoint-tmp*"):
        remove(left)


def _save(saved: Any, step: int, state: State) -> None:
    import orbax.checkpoint as ocp

    try:
        saved.save(step, args=ocp.args.StandardSave(state))
    except Exception as error:
        again = "; the same command goes on from the checkpoint before"
        raise InputError(f"{saved.directory / str(step)} cannot be written: {reason(error)}{again}") from None


def _lines(path: Path, step: int) -> list[str]:
    """The lines of the log up to a step: a run that was stopped may have written more than it kept."""
    if not path.exists():
        return []
    lines = read_text(path).splitlines(keepends=True)
    try:
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: every line must be a JSON object with a 'step'; remove it") from None
