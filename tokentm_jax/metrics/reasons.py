"""Known causes of words: does a map of a prompt point at the place that the next word follows from?"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Num

from tokentm_jax.data.prompts import ASKS
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.causes import pointing
from tokentm_jax.metrics.task import Predict, Subject, Task, among


def reasons(
    maps: Float[AnyArray, "B 1 N"], marks: Num[AnyArray, "B N"], words: Bool[AnyArray, "B 1 N"]
) -> dict[str, Float[Array, " B"]]:
    """How well maps of texts point at the cause of the next word, with and without the first token.

    Many decoders give their first token most of the attention, whatever it means (a sink).

    Args:
      maps: relevance of tokens.
      marks: the share of each token that is in the cause; below 0 where the text asks for the cause: these tokens
        matter as well, so they are not counted, for or against a map.
      words: tokens that count, and no marks or padding.

    Returns:
      `share`, `auc` and `hit` of `metrics.causes.pointing` over the counted tokens, and the same without the first
      token as `share_rest`, `auc_rest` and `hit_rest`.
    """
    marks = jnp.asarray(marks)[:, None]
    counted = jnp.asarray(words) & (marks > ASKS / 2)
    inside = jnp.where(counted, jnp.maximum(marks, 0), 0).astype(maps.dtype)
    rest = counted & (jnp.arange(maps.shape[-1]) > 0)
    found = pointing(maps, inside, counted)
    return found | {f"{name}_rest": value for name, value in pointing(maps, inside, rest).items()}


def _right(predict: Predict, subject: Subject, logits: Array) -> Array:
    """Only prompts that are continued rightly count, with and without their cause."""
    assert subject.others is not None
    without = predict(subject.without).argmax(-1)
    return (logits.argmax(-1) == subject.labels) & (without == subject.others) & (subject.labels != subject.others)


def _reasons(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    assert subject.masks is not None and subject.removable is not None
    found = reasons(maps, subject.masks[..., 1], subject.removable)
    return {**found, "marked": (subject.masks[..., 1] > 0).any(1)}


REASONS = Task(
    _reasons,
    {
        f"{name}{rest}": among(f"{name}{rest}", "marked", scale, digits=digits)
        for rest in ("", "_rest")
        for name, scale, digits in (("hit", 100.0, 1), ("share", 1.0, 3), ("auc", 1.0, 3))
    },
    needs="parts",
    regular=False,
    raw=True,
    counts=_right,
)
