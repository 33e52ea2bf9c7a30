"""Training of a small ViT classifier, from random weights or from a converted checkpoint.

A run is exactly repeatable and resumable: the order of the data, the augmentation and the dropped patches of step
`t` are functions of (seed, t) alone, and the Orbax checkpoint holds everything else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from models.training.augmentation import missing
from models.training.data import Data
from models.training.distil import Teacher, TeacherFunction, answers, distillation_loss, load_teacher
from models.training.loop import OPTIMISERS, Loop, State, begin, descend, run_steps
from models.training.recipe import LARGEST_STEP, TrainConfig, augment, mix, resize, view
from tokentm_jax.errors import InputError
from tokentm_jax.files import require_ours
from tokentm_jax.identity import claimed, digest, digest_files, environment
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.maths.maps import unit
from tokentm_jax.maths.mixed import linear
from tokentm_jax.models.checkpoint import read_checkpoint, read_description, write_checkpoint
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.validation import check_fields


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


def preprocessing_of(config: TrainConfig, module: ViT) -> Preprocessing:
    return Preprocessing(module.img_size, 1.0, mean=config.mean, std=config.std, audio=config.audio)


class Batch(NamedTuple):
    """A batch of training data: images uint8 [B, h, w, C], labels [B], where they stand in the data, and the epoch."""

    images: Any
    labels: Any
    rows: Any
    epoch: Any


def make_step(
    config: TrainConfig, module: ViT, steps_per_epoch: int, teacher: TeacherFunction | None = None
) -> tuple[Callable, optax.GradientTransformation]:
    """The jitted training step `(state, batch, soft, patch_drop) -> (state, loss)` and its optimiser.

    `soft` is None without a teacher, the teacher's parameters, or with `teacher_views` its logits [B, classes].
    """
    normalise = preprocessing_of(config, module).normalise
    optimiser = OPTIMISERS[config.optimiser](config, steps_per_epoch)
    stored, classes = config.teacher_views > 0, module.num_classes

    @partial(jax.jit, donate_argnums=0, static_argnums=3)
    def step(state: State, batch: Batch, soft: Any, patch_drop: float) -> tuple[State, Array]:
        k_augment, k_mix, k_use, k_drop = jax.random.split(
            jax.random.fold_in(jax.random.key(config.seed), state.step), 4
        )
        if stored:
            inputs = view(config, module.img_size, batch.images, batch.rows, batch.epoch % config.teacher_views)
        else:
            inputs = augment(config, k_augment, unit(batch.images), module.img_size)
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, classes), config.label_smoothing)
        if teacher is not None and stored:  # what was said of two images is mixed as their labels are
            targets = jnp.concatenate([targets, jax.nn.softmax(soft.astype(jnp.float32) / config.temperature)], 1)
        inputs, targets = mix(config, k_use, k_mix, inputs, targets)
        if teacher is not None and not stored:  # the teacher sees the mixed image
            said = teacher(soft, inputs)
            targets = jnp.concatenate([targets, jax.nn.softmax(said / config.temperature)], 1)
        hard, soft_targets = targets[:, :classes], targets[:, classes:]
        inputs = normalise(inputs)
        if config.missing:  # after the teacher, which sees whole images
            inputs = missing(config.missing, module.grid, jax.random.fold_in(k_drop, 0), inputs)
        training = module.clone(linear=linear) if config.mixed_precision else module
        training = training.clone(patch_drop=patch_drop, unroll=module.depth)

        def loss_of(params: Any) -> Array:
            logits: Any = training.apply({"params": params}, inputs, rngs={"patch_drop": k_drop})
            if teacher is None:
                return optax.softmax_cross_entropy(logits, hard).mean()
            return distillation_loss(logits, hard, soft_targets, config.teacher_weight, config.temperature)

        return descend(optimiser, state, loss_of, config.ema_decay)

    return step, optimiser


def batches(config: TrainConfig, data: Data, start: int) -> Iterator[Batch]:
    """Endless training batches from step `start` on; every epoch is a new permutation from (seed, epoch)."""
    per_epoch = len(data.labels) // config.batch_size
    step = start
    while True:
        epoch = step // per_epoch
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data.labels))
        while step // per_epoch == epoch:
            rows = order[(step % per_epoch) * config.batch_size :][: config.batch_size]
            yield Batch(data.images[rows], data.labels[rows], rows.astype(np.int32), np.int32(epoch))
            step += 1


@partial(jax.jit, static_argnums=(0, 1))
def _hits(module: ViT, preprocessing: Preprocessing, params: Any, images: Array, labels: Array) -> Array:
    logits = module.apply({"params": params}, preprocessing.normalise(resize(unit(images), module.img_size)))
    return (jnp.argmax(logits, -1) == labels).sum()  # pyright: ignore[reportArgumentType]


def accuracy(config: TrainConfig, module: ViT, params: Any, data: Data, batch_size: int = 250) -> float:
    """Top-1 accuracy in [0, 1] over the whole of `data`."""
    hits = partial(_hits, module, preprocessing_of(config, module))
    total = 0
    for i in range(0, len(data.labels), batch_size):
        images, labels = data.images[i : i + batch_size], data.labels[i : i + batch_size]
        short = batch_size - len(labels)  # one shape for all batches; the padding's label matches nothing
        images = np.pad(images, ((0, short), (0, 0), (0, 0), (0, 0)))
        total += int(hits(params, images, np.pad(labels, (0, short), constant_values=-1)))
    return total / len(data.labels)


def initial_params(config: TrainConfig, module: ViT, class_names: Sequence[str]) -> dict[str, Any]:
    """Random parameters, or those of `fine_tune`, with a fresh head unless it is of these very classes."""
    key = jax.random.key(config.seed)
    params = init_params(module, key)
    if config.fine_tune is not None:
        path = Path(config.fine_tune[1])
        description = read_description(path)
        if description is not None and tuple(description["class_names"] or ()) == tuple(class_names):
            return read_checkpoint(module, path)
        head = {"head", "head_dist"} & params.keys()
        body = read_checkpoint(module, path, reset_head=True)
        return {**body, **{name: params[name] for name in head}}
    if config.mimetic_init:
        params = mimetic(params, module.num_heads, module.grid, module.prefix, jax.random.fold_in(key, 1))
    return params


# ---- a run ----------------------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    module: ViT,
    data: Data,
    test: Data,
    out: Path,
    log: Callable[[str], None],
    *,
    overwrite: bool = False,
) -> float:
    """Train to the end, or from where `out` stopped on to the end; returns the average's test accuracy in [0, 1].

    `out` holds the Orbax checkpoints, `log.jsonl` and, at the end, `<name>.safetensors`. `overwrite` also replaces
    files of these names that this program did not write.

    Raises:
      InputError: a recipe whose fields are not what their annotations say, data that do not fit the model, a full
        disk, or an `out` that holds a run of another recipe, of other data, by other versions or on another device,
        files of others, or a run that is going on.
    """
    config = check_fields(config, "the recipe")
    steps, per_epoch, test = _fit(config, module, data, test)
    out = out.absolute()  # as Orbax wants it
    params = initial_params(config, module, data.class_names)
    teacher = None
    if config.teacher is not None:
        teacher = load_teacher(*config.teacher, data.class_names, config.mixed_precision)
    terms = _terms(config, data, test, teacher)
    model = out / f"{config.name}.safetensors"
    with claimed(out, terms, ("checkpoints", "log.jsonl", model.name), overwrite):
        require_ours(model, overwrite)
        step_fn, optimiser = make_step(config, module, per_epoch, teacher and teacher.function)
        soft: Any = None if teacher is None else teacher.params
        if teacher is not None and config.teacher_views:
            soft = answers(config, module, teacher, data, out / "teacher.npz", terms["train_data"], log)

        def advance(state: State, step: int, batch: Batch) -> tuple[State, Array]:
            drop = config.patch_drop if step < config.patch_drop_epochs * per_epoch else 0.0
            said = soft[batch.epoch % config.teacher_views, batch.rows] if config.teacher_views else soft
            return step_fn(state, batch, said, drop)

        state, top_1 = run_steps(
            Loop(steps, per_epoch, config.checkpoint_epochs),
            begin(optimiser, params, averaged=True),
            partial(batches, config, data),
            advance,
            lambda state: accuracy(config, module, state.average, test),
            out,
            log,
        )
        how = {"name": config.name, "top_1": top_1, "epochs": config.epochs, "test_data": Path(config.test_data).name}
        params, made = jax.device_get(state.average), preprocessing_of(config, module)
        write_checkpoint(model, module, params, made, tuple(data.class_names), how, overwrite=overwrite)
    return top_1


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
    for what in (data, test):
        found = what.images.shape[-1]
        if not found == len(config.mean) == module.in_chans:
            raise InputError(
                f"the recipe: the images have {found} channels, the model {module.in_chans}, 'mean' {len(config.mean)}"
            )
    for given, needs, there in (
        ("patch_drop", "no rotary positions", config.patch_drop == 0 or module.rope_type is None),
        ("mimetic_init", "position embeddings", not config.mimetic_init or module.pos_embed == "learn"),
        ("rand_augment", "images of three channels", config.rand_augment is None or module.in_chans == 3),
    ):
        if not there:
            raise InputError(f"the recipe: {given!r} needs {needs}")
    per_epoch = len(data.labels) // config.batch_size
    if per_epoch == 0:
        raise InputError(f"{config.train_data}: {len(data.labels)} images do not fill a batch of {config.batch_size}")
    steps = config.epochs * per_epoch
    if config.crop_area is not None and config.crop_area[0] > config.crop_area[1]:
        raise InputError(f"the recipe: 'crop_area' must be (least, most), got {config.crop_area}")
    if config.cutmix + config.mixup > 1:
        raise InputError("the recipe: 'mixup' and 'cutmix' must not be more than 1 together")
    if config.teacher_views and config.teacher is None:
        raise InputError("the recipe: 'teacher_views' needs a 'teacher'")
    if not 1 <= round(min(steps, 2.0 * LARGEST_STEP)) <= LARGEST_STEP:
        raise InputError(f"the recipe: 'epochs' must make 1 to {LARGEST_STEP} steps of {per_epoch} an epoch")
    return round(steps), per_epoch, test


def _terms(config: TrainConfig, data: Data, test: Data, teacher: Teacher | None) -> dict[str, Any]:
    """What must be equal for a run to go on: every field of the recipe, the bytes it names, and what computes."""
    terms = dataclasses.asdict(config)
    for name, given in (("train_data", data), ("test_data", test)):
        terms[name] = {"name": f"{terms[name]}, {len(given.labels)} images", "identity": given.identity()}
    if config.fine_tune is not None:
        path = Path(config.fine_tune[1])
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        identity = digest(config.fine_tune[0], digest_files(files))
        terms["fine_tune"] = {"name": str(path), "identity": identity}
    if teacher is not None:
        terms["teacher"] = {"name": teacher.name, "identity": teacher.identity}
    return {**terms, **environment()}
