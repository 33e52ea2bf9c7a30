"""Distillation: a teacher's soft answers on what the student sees (Hinton et al., 2015, arXiv 1503.02531)."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from models.training.data import Data
from models.training.kept import keep, kept
from models.training.recipe import OF_SPECTROGRAMS, TrainConfig, resize, view
from tokentm_jax.errors import InputError
from tokentm_jax.identity import digest, environment
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.maths.mixed import linear
from tokentm_jax.models.loading import load
from tokentm_jax.models.vit import ViT

# Fields of a recipe that say what the views of a photo are, and how they are answered.
VIEW_FIELDS = ("crop_area", "crop_padding", "flip", "affine_colour", "rand_augment", "seed")
VIEW_FIELDS += (*OF_SPECTROGRAMS, "mixed_precision")
_BATCH = 250  # photos that the teacher sees at a time


@dataclasses.dataclass(frozen=True)
class TeacherFunction:
    """`(params, images [B, h, w, 3] in [0, 1]) -> logits [B, classes]`: the images resized to the teacher's size, the
    classes in the student's order. Hashable, as a static argument of `jit`."""

    module: ViT
    preprocessing: Preprocessing
    order: tuple[int, ...]  # the teacher's number of each of the student's classes

    def __call__(self, params: Any, images: Array) -> Array:
        inputs = self.preprocessing.normalise(resize(images, self.module.img_size))
        logits = self.module.apply({"params": params}, inputs)
        assert isinstance(logits, jax.Array)  # nothing is mutable
        return logits[:, jnp.array(self.order)]


class Teacher(NamedTuple):
    function: TeacherFunction
    params: Any
    name: str
    identity: str


def load_teacher(
    model: str | None, checkpoint: str | None, class_names: Sequence[str], mixed: bool = False
) -> Teacher:
    """A model, named as for `tm.load`, as a teacher of these classes, which go by name; `mixed`: in mixed precision.

    Raises InputError for what `tm.load` refuses, and for a model that does not know all of the classes.
    """
    vit = load(model, checkpoint)
    known = vit.class_names or ()
    lacking = [name for name in class_names if known.count(name) != 1]
    if lacking:
        shown = ", ".join(lacking[:5])
        raise InputError(f"the teacher {checkpoint or model} does not know each of the classes by its name: {shown}")
    order = tuple(known.index(name) for name in class_names)
    identity = digest(vit.described()["identity"], order)
    function = TeacherFunction(vit.module.clone(linear=linear) if mixed else vit.module, vit.preprocessing, order)
    return Teacher(function, vit.params, vit.name, identity)


def distillation_loss(logits: Array, hard: Array, soft: Array, weight: float, temperature: float) -> Array:
    """`(1 - w) CE(hard, p) + w T^2 CE(soft, p_T)`, averaged over the batch; T^2 keeps the gradients' size.

    Args:
      logits: of the student, [B, classes]; `p` and `p_T` are their softmax at temperature 1 and T.
      hard: distributions over classes, [B, classes].
      soft: the teacher's, at the temperature T, [B, classes].
      weight: w, in [0, 1].
    """
    cross_entropy = optax.softmax_cross_entropy
    taught = temperature**2 * cross_entropy(logits / temperature, soft)
    return ((1 - weight) * cross_entropy(logits, hard) + weight * taught).mean()


def answers(
    config: TrainConfig,
    module: ViT,
    teacher: Teacher,
    data: Data,
    path: Path,
    train_data: Any,
    log: Callable[[str], None],
) -> np.ndarray:
    """The teacher's logits, float16 [views, photos, classes], on the views of all photos that a training sees.

    They are kept in the .npz at `path`, which is written after each view: what is there is not computed again.

    Args:
      train_data: the term that tells these data from others.

    Raises InputError for a file of other terms, or that is damaged or cannot be written.
    """
    size, count = module.img_size, len(data.labels)
    fields = {name: getattr(config, name) for name in VIEW_FIELDS}
    identity = digest(fields, size, teacher.identity, train_data, environment())
    others = "a teacher's answers to other views, or on other data, by another teacher or by other versions"
    found = kept(path, "logits", identity, (count, module.num_classes), "the teacher is asked again", others)
    found = found[: config.teacher_views]

    @jax.jit
    def answer(params: Any, images: Array, rows: Array, number: Array) -> Array:
        return teacher.function(params, view(config, size, images, rows, number)).astype(jnp.float16)

    began, first = time.monotonic(), len(found)
    for number in range(first, config.teacher_views):
        said = []
        for start in range(0, count, _BATCH):
            rows = np.arange(start, start + _BATCH, dtype=np.int32) % count  # one shape for all batches
            said.append(answer(teacher.params, data.images[rows], rows, np.int32(number)))
        found.append(np.concatenate(said)[:count])
        keep(path, "logits", identity, np.stack(found))
        left = (time.monotonic() - began) / (number + 1 - first) * (config.teacher_views - number - 1)
        log(f"teacher: view {number + 1} of {config.teacher_views}, {left / 60:.0f} min left")
    return np.stack(found)
