"""Texts: ERASER's metrics (DeYoung et al., ACL 2020), leave-one-out, and the words that people would name.

Functions take a batch of `Texts` and give results per text; maps are scores of word pieces, [B, 1, N]. What is
followed is the probability of the class `target` [B], or the score of a `Question`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Num, Shaped

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.texts import Texts, deleted, hidden
from tokentm_jax.maths.primitives import AnyArray
from tokentm_jax.metrics.insertion import insertion_deletion
from tokentm_jax.metrics.removal import confidence, plotted
from tokentm_jax.metrics.statistics import unit_area
from tokentm_jax.metrics.task import Column, Plot, Predict, Subject, Table, Target, Task, among, followed_in

SHARES = 10  # steps of the curves: 0 %, 10 % ... 100 % of a text's word pieces


def kendall(a: Num[AnyArray, " N"], b: Num[AnyArray, " N"], where: Bool[AnyArray, " N"]) -> Float[Array, ""]:
    """Kendall's tau-b of two rankings [N] of the items `where` True, in [-1, 1]; 0 where one is constant (Kendall,
    Biometrika 1945)."""
    both = where[:, None] & where
    x, y = (jnp.where(both, jnp.sign(r[:, None] - r), 0) for r in (a, b))
    norm = jnp.sqrt(jnp.square(x).sum() * jnp.square(y).sum())
    return jnp.where(norm > 0, (x * y).sum() / jnp.where(norm > 0, norm, 1), 0)


def leave_one_out(predict: Predict, texts: Texts, target: Target) -> Float[Array, "B N"]:
    """What is lost when one token is deleted, [B, N]; 0 for marks and padding."""
    places = jnp.arange(texts.mask.shape[1])

    def without(place: Array) -> Array:
        return confidence(predict, deleted(texts, texts.removable & (places == place)), target)

    lost = confidence(predict, texts, target)[:, None] - jax.lax.map(without, places).T
    return jnp.where(texts.special, 0, lost)


def agreement(
    scores: Float[AnyArray, " N"], words: Int[AnyArray, " N"], ratings: Float[AnyArray, " N"], sign: Int[AnyArray, ""]
) -> dict[str, Shaped[Array, ""]]:
    """Whether the word of the highest score is one that people rate, and Kendall's tau of scores and ratings.

    Args:
      scores: of tokens [N]; a word's score is the sum of its tokens'.
      words: number of each token's word [N], -1 for a token of none.
      ratings: of each token's word [N], 0 where it has none.
      sign: 1 for a class that words of positive ratings support, -1 for one that those of negative ratings support.

    Returns:
      `rated`, whether a word of the text supports the class; the others are 0 where none does. `top_is_rated`, 0 or 1,
      and `agreement`.
    """
    same = (words[:, None] == words) & (words >= 0)
    first = (words >= 0) & ~jnp.tril(same, -1).any(1)  # a word is known by its first token
    total = jnp.where(same, scores, 0).sum(1)
    rated = jnp.where(first, sign.astype(ratings.dtype) * ratings, 0)
    there = (rated > 0).any()
    top = rated[jnp.where(first, total, -jnp.inf).argmax()] > 0
    return {
        "rated": there,
        "top_is_rated": (there & top).astype(jnp.float32),
        "agreement": jnp.where(there, kendall(total, rated, first), 0),
    }


def _eraser(
    predict: Predict, subject: Subject, maps: Array, *, fill: Literal["delete", "mask", "hide"] = "delete"
) -> dict[str, Array]:
    how: Any = {"delete": deleted, "hide": hidden}.get(fill)
    how = subject.background("mean") if how is None else how
    return insertion_deletion(predict, subject.inputs, maps, subject.target, how, SHARES, nearest=True)


def _drop(curve: int) -> Column:
    """Mean drop over the shares from 0 to 1, of a curve of `_eraser` below the whole text's."""

    def values(table: Table) -> np.ndarray:
        curves = followed_in(table)
        return unit_area(curves[:, 1, :1] - curves[:, curve])

    return Column(values, better="lower" if curve == 0 else "higher", digits=3)


def _lost(predict: Predict, subject: Subject) -> Array:
    texts: Any = subject.inputs
    return leave_one_out(predict, texts, subject.target)


def _leave_one_out(predict: Predict, subject: Subject, maps: Array) -> dict[str, Array]:
    assert subject.removable is not None
    return {"kendall": jax.vmap(kendall)(maps[:, 0], subject.shared, subject.removable[:, 0])}


def _people(predict: Predict, subject: Subject, maps: Array, *, signs: str = "-1,1") -> dict[str, Array]:
    """`signs` are those of the classes, see `agreement`."""
    try:
        known = jnp.asarray([int(sign) for sign in signs.split(",")], jnp.int32)
    except ValueError:
        raise InputError(
            f"option 'signs' must be 1 or -1 for each class, with commas between, got {signs!r}"
        ) from None
    count = jax.eval_shape(predict, subject.inputs).shape[-1]
    if count > 1 and len(known) != count:  # the example of `Task.records` has one output
        raise InputError(f"option 'signs' must have one for each of {count} classes, got {signs!r}")
    assert subject.masks is not None
    words, ratings = subject.masks[..., 0].astype(jnp.int32), subject.masks[..., 1]
    classes = getattr(subject.target, "target", subject.target)
    sign = known[jnp.zeros(len(maps), jnp.int32) if classes is None else classes]
    return jax.vmap(agreement)(maps[:, 0], words, ratings, sign)


ERASER = Task(
    _eraser,
    {"comprehensiveness": _drop(1), "sufficiency": _drop(0)},
    Plot("words [%]", "probability", plotted("only these words kept", "these words removed")),
    regular=False,
)
LEAVE_ONE_OUT = Task(
    _leave_one_out,
    {"kendall_leave_one_out": Column(lambda table: table["predicted_kendall"], better="higher", digits=3)},
    raw=True,
    shared=_lost,
    regular=False,
)
PEOPLE = Task(
    _people,
    {
        "top_word_rated": among("top_is_rated", "rated", 100.0, digits=1),
        "agreement_with_people": among("agreement", "rated"),
    },
    needs="masks",
    raw=True,
    regular=False,
)
