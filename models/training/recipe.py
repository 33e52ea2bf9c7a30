"""Training recipes, and what they do to images."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le, Len, Lt
from jax import Array
from pydantic import Strict

from models.training import augmentation
from models.training.augmentation import STRONGEST
from tokentm_jax.data.audio import Spectrogram
from tokentm_jax.maths.maps import unit
from tokentm_jax.validation import Name, Text

LARGEST_STEP = 2**31 - 1  # steps are counted in int32

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
NotAll = Annotated[float, Ge(0), Lt(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
Operations = Annotated[int, Ge(1), Le(100)]
Magnitude = Annotated[float, Ge(0), Le(STRONGEST)]
Lax = Strict(False)  # a list will do for a tuple


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One recipe. Sizes in pixels, durations in epochs, `mean` and `std` per channel for images in [0, 1].

    With `audio` the data are recordings, and the model's `img_size` is (mel bins, frames) of their spectrograms.
    """

    name: Name
    train_data: Text  # zip of class folders, or "tfds:NAME:SPLIT"
    test_data: Text
    model: Mapping[str, Any]  # keyword arguments of timm's VisionTransformer
    epochs: Annotated[float, Gt(0), Le(1_000_000)]
    warmup_epochs: NotNegative = 2.0
    batch_size: Annotated[int, Ge(1), Le(2**20)] = 128
    optimiser: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    beta_2: NotAll = 0.99
    clip_norm: Positive = 1.0
    label_smoothing: Share = 0.1
    ema_decay: NotAll = 0.999
    crop_padding: Annotated[int, Ge(0), Le(1024)] = 4
    flip: bool = True
    crop_area: Annotated[tuple[PositiveShare, PositiveShare], Lax] | None = None  # least and most of random crops
    affine_colour: Share = 0.0  # strength of random affine and colour changes
    rand_augment: Annotated[tuple[Operations, Magnitude], Lax] | None = None  # the paper's N and M
    cutmix: Share = 0.0  # probability that a batch is mixed by CutMix ...
    mixup: Share = 0.0  # ... or by Mixup
    patch_drop: NotAll = 0.0  # share of patches left out ...
    patch_drop_epochs: NotNegative = 0.0  # ... in the first so many epochs
    missing: Share = 0.0  # most share of an image's patches that are filled with the mean colour
    mixed_precision: bool = False  # linear maps read bfloat16, the teacher's, too; the test accuracy is float32's
    mimetic_init: bool = False
    fine_tune: Annotated[tuple[Text, Text], Lax] | None = None  # (model name, checkpoint) to start from
    teacher: Annotated[tuple[Text | None, Text | None], Lax] | None = None  # model and checkpoint, as for `tm.load`
    teacher_weight: Share = 0.5  # of its answers, beside the labels
    temperature: Positive = 1.0  # of both answers
    teacher_views: Annotated[int, Ge(0), Le(10_000)] = 0  # of each photo, which it sees once; 0: it sees every batch
    mean: Annotated[tuple[float, ...], Lax] = (0.4914, 0.4822, 0.4465)
    std: Annotated[tuple[Positive, ...], Lax] = (0.2470, 0.2435, 0.2616)
    seed: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    checkpoint_epochs: Positive = 1.0
    held_out: Text | None = None  # names of the test data, whose others are for training; see `open_source`
    audio: Spectrogram | None = None  # how recordings become spectrograms
    delay: Annotated[tuple[Share, Share], Lax] | None = None  # most shift of the sound, as shares: earlier and later
    stretch: Annotated[tuple[Share, Share], Lax] | None = None  # most change of their scale: frequency and time
    tilt: Share = 0.0  # most change of level from the lowest to the highest frequency
    hiss: Share = 0.0  # highest level of background noise
    spec_mask: Annotated[tuple[Share, Share], Lax] | None = None  # widest masks of SpecAugment: frequency and time


@dataclasses.dataclass(frozen=True)
class TextTrainConfig:
    """One recipe: an encoder, sentences, and how the one is fine-tuned on the other. Durations in epochs."""

    name: Name
    encoder: Text  # a folder, as for `load`
    train_data: Text  # see `tokentm_jax.data.sources.open_source`
    test_data: Text
    class_names: Annotated[tuple[Text, ...], Len(2), Lax]
    epochs: Annotated[float, Gt(0), Le(10_000)] = 3.0
    warmup_epochs: NotNegative = 0.3
    batch_size: Annotated[int, Ge(1), Le(2**16)] = 32
    learning_rate: Positive = 5e-5
    weight_decay: NotNegative = 0.01
    beta_2: NotAll = 0.999
    clip_norm: Positive = 1.0
    label_smoothing: Share = 0.0
    pool: Literal["token", "avg"] = "token"
    max_length: Annotated[int, Ge(4), Le(2**16)] = 128  # tokens; longer sentences are cut
    seed: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    checkpoint_epochs: Positive = 0.5


@dataclasses.dataclass(frozen=True)
class QuestionTrainConfig:
    """One recipe: a small vision-language model, of questions about rendered scenes. Durations in epochs."""

    name: Name
    vision: Mapping[str, Any]  # fields of `ViT`
    text: Mapping[str, Any]  # fields of `Decoder`
    scenes: Annotated[int, Ge(1)] = 100_000  # in an epoch; each is rendered when it is needed
    test_scenes: Annotated[int, Ge(1)] = 2_000
    questions: Annotated[int, Ge(1), Le(5)] = 4  # about each scene of a batch
    epochs: Annotated[float, Gt(0), Le(1_000_000)] = 1.0
    tower_epochs: NotNegative = 0.0  # of these, the first ones, in which only the tower learns: they cost a fifth
    warmup_epochs: NotNegative = 0.05
    batch_size: Annotated[int, Ge(1), Le(2**20)] = 32  # scenes
    learning_rate: Positive = 6e-3
    weight_decay: NotNegative = 0.1
    beta_2: NotAll = 0.99
    clip_norm: Positive = 1.0
    ema_decay: NotAll = 0.998
    seed: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    checkpoint_epochs: Positive = 0.1


@dataclasses.dataclass(frozen=True)
class AmortiseConfig:
    """One recipe: the model that is explained, photos, and how an explainer is fitted to sampled Shapley values."""

    name: Name
    train_data: Text  # photos of the size that the model takes; their labels are not used
    test_data: Text
    model: Text | None = None  # as for `tm.load`
    checkpoint: Text | None = None
    images: Annotated[int, Ge(1)] = 4000
    test_images: Annotated[int, Ge(1)] = 200
    pairs: Annotated[int, Ge(2), Le(1000)] = 2  # of orders, for each image; see the method `shapley`
    hidden: Annotated[int, Ge(1), Le(4096)] = 32  # units of the explainer
    epochs: Annotated[float, Gt(0), Le(1_000_000)] = 60.0
    warmup_epochs: NotNegative = 1.0
    batch_size: Annotated[int, Ge(1), Le(2**20)] = 32
    learning_rate: Positive = 3e-3
    weight_decay: NotNegative = 0.1
    beta_2: NotAll = 0.99
    clip_norm: Positive = 1.0
    ema_decay: NotAll = 0.99
    seed: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    checkpoint_epochs: Positive = 10.0


def augment(config: TrainConfig, key: Array, images: Array, size: tuple[int, int]) -> Array:
    """What a recipe does to images [B, h, w, C] in [0, 1]: in the order below, to [B, H, W, C] of so many pixels."""
    k_shift, k_flip, k_affine, k_colour = jax.random.split(key, 4)
    k_crop, k_operations = jax.random.split(jax.random.fold_in(key, 1))

    def each(function: Callable[[Array, Array], Array], key: Array) -> Array:
        return jax.vmap(function)(jax.random.split(key, len(images)), images)

    if config.crop_area is not None:
        images = each(partial(augmentation.random_resized_crop, config.crop_area, size), k_crop)
    else:
        images = resize(images, size)
    if config.crop_padding:
        images = augmentation.shift(k_shift, images, config.crop_padding)
    if config.flip:
        images = augmentation.flip(k_flip, images)
    if config.affine_colour:
        images = each(partial(augmentation.affine, config.affine_colour), k_affine)
        images = each(partial(augmentation.colour, config.affine_colour), k_colour)
    if config.rand_augment is not None:
        images = each(partial(augmentation.rand_augment, *config.rand_augment), k_operations)
    for name, (number, function) in OF_SPECTROGRAMS.items():
        if getattr(config, name):
            images = each(partial(function, getattr(config, name)), jax.random.fold_in(key, number))
    return images


# What only spectrograms need, by the field of a recipe; the number makes its key.
OF_SPECTROGRAMS = {
    "delay": (6, augmentation.delay),
    "stretch": (2, augmentation.stretch),
    "tilt": (3, augmentation.tilt),
    "hiss": (4, augmentation.hiss),
    "spec_mask": (5, augmentation.spec_mask),
}


def mix(config: TrainConfig, k_use: Array, k_mix: Array, images: Array, targets: Array) -> tuple[Array, Array]:
    """A batch mixed by CutMix or by Mixup, as often as the recipe says, or as it was."""
    if not (config.cutmix or config.mixup):
        return images, targets
    drawn = jax.random.uniform(k_use)
    which = jnp.searchsorted(jnp.array([config.cutmix, config.cutmix + config.mixup]), drawn, side="right")
    ways = (augmentation.cutmix, augmentation.mixup, lambda _, images, targets: (images, targets))
    return jax.lax.switch(which, ways, k_mix, images, targets)


def view(config: TrainConfig, size: tuple[int, int], images: Array, rows: Array, number: Array) -> Array:
    """The so manieth view of photos: `augment` as a function of (seed, place in the data, number) alone.

    Args:
      images: uint8 [B, h, w, C]; rows: int [B], where they stand in the data; number: int, of the view.

    Returns:
      [B, H, W, C] in [0, 1], of `size`.
    """
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), LARGEST_STEP), number)

    def one(row: Array, image: Array) -> Array:
        return augment(config, jax.random.fold_in(base, row), image[None], size)[0]

    return jax.vmap(one)(rows, unit(images))


def resize(images: Array, size: tuple[int, int]) -> Array:
    """[B, h, w, C] in [0, 1] -> [B, H, W, C] in [0, 1], cubic."""
    if images.shape[1:3] == size:
        return images
    return jax.image.resize(images, (len(images), *size, images.shape[-1]), "cubic").clip(0, 1)
