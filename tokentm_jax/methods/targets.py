"""What a call explains, as arrays: classes by number or name, or what a custom score takes."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tokentm_jax.errors import InputError
from tokentm_jax.maths.scores import Question, classes_of

if TYPE_CHECKING:
    from tokentm_jax.models.loading import Model


def target_of(vit: "Model", target: Any, asked: Question, samples: int) -> Any:
    """The classes [B] of a target, or the arrays [B, ...] that a custom score takes."""
    if not asked.score.of_class:
        raise InputError("this score takes no target: leave it out")
    if asked.of_logits or _named(target):
        return class_numbers(vit, "target", target, samples)
    if isinstance(target, int | np.integer):
        return np.full(samples, target, np.int32)
    try:
        arrays = jax.tree.map(jnp.asarray, target)
    except (TypeError, ValueError):
        raise InputError(f"target must be arrays with the {samples} samples first, got {target!r:.80}") from None
    shapes = [array.shape for array in jax.tree.leaves(arrays)]
    if any(shape[:1] != (samples,) for shape in shapes):
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"the arrays of target must have the {samples} samples first, got {found}")
    return arrays


def _named(classes: Any) -> bool:
    """Whether classes are given by name, at least one of them."""
    if isinstance(classes, np.ndarray):
        return classes.dtype.kind == "U"
    return any(isinstance(each, str) for each in (classes if isinstance(classes, list | tuple) else [classes]))


def class_numbers(vit: "Model", what: str, classes: Any, samples: int) -> Any:
    """A class for all samples, or one per sample, by number or by name, as an array [B]. Raises InputError for one
    that there is not; the numbers of a traced array are not looked at."""
    classes = classes.tolist() if isinstance(classes, np.ndarray) and _named(classes) else classes
    if isinstance(classes, str):
        classes = vit.class_index(classes)
    elif _named(classes):
        classes = [vit.class_index(each) if isinstance(each, str) else each for each in classes]
    found, last = classes_of(classes, samples, what), vit.module.num_classes - 1
    if isinstance(found, np.ndarray) and found.size and not (found.min() >= 0 and found.max() <= last):
        raise InputError(f"{what} must be a class from 0 to {last}, got {np.asarray(classes).tolist()}")
    return found
