"""What is explained: one number per sample, of what the model gives.

A score is a function `(outputs, target) -> [B]` or `outputs -> [B]`, where `outputs` is what the module gives for a
batch. It must treat the samples independently. `class_logit` is the default. The scores that hold arrays are
pytrees, so that another class or another prompt runs the same compiled program.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from tokentm_jax.errors import InputError
from tokentm_jax.maths.code import by_code
from tokentm_jax.maths.primitives import AnyArray, PyTree, wide

Classes = int | str | Sequence[int | str] | AnyArray  # a class for all samples, or one per sample [B]
Target = Classes | PyTree | None  # or the arrays that a custom score takes; None: the predicted class


def class_logit(outputs: Float[Array, "B classes"], target: Integer[AnyArray, " B"]) -> Float[Array, " B"]:
    """The logit of each sample's class.

    Args:
      outputs: logits.
      target: classes.

    Returns:
      The logit of each sample; NaN for a number that is not a class.
    """
    there = (target >= 0) & (target < outputs.shape[-1])
    return jnp.where(there, jnp.take_along_axis(outputs, target[:, None], 1)[:, 0], jnp.nan)


def log_probability(outputs: Float[Array, "B classes"], target: Integer[AnyArray, " B"]) -> Float[Array, " B"]:
    """The log of the softmax at each sample's class.

    Args:
      outputs: logits.
      target: classes.

    Returns:
      The log-probability of each sample; NaN for a number that is not a class.
    """
    return class_logit(jax.nn.log_softmax(wide(outputs)), target)


def margin(outputs: Float[Array, "B classes"], target: Integer[AnyArray, " B"]) -> Float[Array, " B"]:
    """Why this class and not the next best one: its logit minus the largest logit of another class.

    Args:
      outputs: logits.
      target: classes.

    Returns:
      The difference for each sample; NaN for a number that is not a class.
    """
    own = jax.nn.one_hot(target, outputs.shape[-1], dtype=bool)
    return class_logit(outputs, target) - jnp.where(own, -jnp.inf, outputs).max(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Versus:
    """Why this class and not the `other` one (an int, or one per sample [B]): the difference of their logits.

    None is for evaluations: the class that an example has without its cause (`of_examples`).
    """

    other: Classes | None = None
    of_class: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "other", listed(self.other))

    def of_examples(self, others: AnyArray) -> "Versus":
        """The same score, with these classes [B] where the other one is None."""
        return Versus(others) if self.other is None else self

    def __call__(self, outputs: Float[Array, "B classes"], target: Integer[AnyArray, " B"]) -> Float[Array, " B"]:
        other = classes_of(self.other, outputs.shape[0], "the other class")
        return class_logit(outputs, target) - class_logit(outputs, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cosine:
    """Cosine of the outputs, features [B, E], with an `embedding` [E], or one per sample [B, E]."""

    embedding: Float[AnyArray, "*B E"]
    of_class: ClassVar[bool] = False

    def __call__(self, outputs: Float[Array, "B E"]) -> Float[Array, " B"]:
        embedding = as_numbers(self.embedding)
        if embedding.ndim not in (1, 2) or embedding.shape[-1] != outputs.shape[-1]:
            raise InputError(
                f"the embedding must be [{outputs.shape[-1]}] or one per sample, like the model's features, "
                f"got {list(embedding.shape)}"
            )
        a, b = wide(outputs), wide(embedding)
        return (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Channel:
    """One channel of the outputs [B, D]: an int, or one per sample [B]. NaN for a channel that the model lacks."""

    index: Classes
    of_class: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", listed(self.index))

    def __call__(self, outputs: Float[Array, "B D"]) -> Float[Array, " B"]:
        return class_logit(outputs, classes_of(self.index, outputs.shape[0], "the channel"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Token:
    """Why a decoder writes this token: the logit of the token `id` at a position, given the tokens before it.

    Each of the first three is an int, or one per sample [B]; positions and ids are values of a compiled program, so
    others run the same program. What follows the position is read like padding: it has relevance 0, and affects
    nothing.

    Args:
      position: the number of tokens before the explained one, at least 1 and at most those of the text.
      id: number of the token in the vocabulary; None: the most probable one.
      against: another token: the difference of the two logits is explained.
      log_probability: explain this instead of the logit; a difference is the same of both. The log-probability of a
        span is the sum of those of its tokens.
    """

    position: Classes
    id: Classes | None = None
    against: Classes | None = None
    log_probability: bool = dataclasses.field(default=False, metadata={"static": True})
    of_class: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("position", "id", "against"):
            object.__setattr__(self, name, listed(getattr(self, name)))

    def __call__(self, outputs: Float[Array, "B N V"]) -> Float[Array, " B"]:
        if getattr(outputs, "ndim", 0) != 3:
            raise InputError(f"a token is explained by logits [B, N, V], got {list(jnp.shape(outputs))}")
        samples, n = outputs.shape[:2]
        before = classes_of(self.position, samples, "the position")
        logits = jnp.take_along_axis(outputs, jnp.clip(before - 1, 0, n - 1)[:, None, None], 1)[:, 0]
        own, _ = explained(logits, self.of_next())
        return jnp.where((before >= 1) & (before <= n), own, jnp.nan)

    def of_next(self) -> "Question":
        """The same question of the logits [B, V] after the tokens that are before the position."""
        own = Function(log_probability, True) if self.log_probability else CLASS_LOGIT
        return Question(own if self.against is None else Versus(self.against), self.id)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Function:
    """A score that is a plain function."""

    function: Callable[..., Array] = dataclasses.field(metadata={"static": True})
    of_class: bool = dataclasses.field(metadata={"static": True})  # whether it takes the target

    def __call__(self, *arguments: PyTree) -> Array:
        return self.function(*arguments)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """A class per sample [B] where `given` [B], else the predicted one: one program for both."""

    classes: AnyArray
    given: AnyArray


class Question(NamedTuple):
    """A score with its target; a pytree that stands wherever a target may."""

    score: PyTree  # a score of this module
    target: PyTree = None  # class per sample [B], or what else the score takes; None: the predicted class

    @property
    def open(self) -> bool:
        """Whether the predicted class, which only the model's answer shows, may be the target."""
        return self.score.of_class and (self.target is None or isinstance(self.target, Chosen))

    @property
    def of_logits(self) -> bool:
        """Whether the target is a class of the model, and not what else a custom score takes."""
        if isinstance(self.score, Function):
            return self.score.function in (class_logit, log_probability, margin)
        return self.score.of_class

    def of_samples(self, count: object) -> "Question | None":
        """The same question with every array per sample, [count, ...]: what holds for all samples is repeated. None
        where only the score itself knows which of its arrays are per sample."""
        score, target = self.score, self.target
        if isinstance(score, Function) and not self.of_logits:
            return None
        if isinstance(score, Versus | Channel | Token):
            score = jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(a), (count,)), score)
        elif isinstance(score, Cosine):
            embedding = jnp.asarray(score.embedding)
            score = Cosine(jnp.broadcast_to(embedding, (count, embedding.shape[-1])))
        known = target is None or isinstance(target, Chosen)
        return Question(score, target if known else jnp.asarray(classes_of(target, count)))


CLASS_LOGIT = Function(class_logit, True)


def question(score: Callable[..., Array] | None, target: Target = None) -> Question:
    """A score and its target in one.

    Args:
      score: a score of this module, or a function `(outputs, target) -> [B]` or `outputs -> [B]`; None for the logit.
      target: class per sample [B], or the argument of a custom score; None: the predicted class.

    Returns:
      The question.

    Raises:
      InputError: a score that cannot be called so.
    """
    if score is None:
        return Question(CLASS_LOGIT, target)
    if isinstance(score, type):
        raise InputError(f"{_SCORE}, got the class {score.__name__}")
    if hasattr(score, "of_class"):
        return Question(score, target)
    try:
        return Question(Function(by_code(score), _binds(inspect.signature(score), None, None)), target)
    except (TypeError, ValueError):  # not callable; a class or built-in without a signature
        raise InputError(f"{_SCORE}, got {score!r:.80}") from None


_SCORE = "the score must be a function (outputs, target) -> [B] or outputs -> [B]"


def _binds(signature: inspect.Signature, *arguments: Any) -> bool:
    """Whether a function takes these arguments."""
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def as_numbers(value: object) -> Array:
    """The array of a score.

    Args:
      value: an array, known or traced, or numbers.

    Returns:
      The array.

    Raises:
      InputError: anything else.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"the score needs an array of numbers, got {value!r:.80}") from None


def listed(classes: PyTree) -> PyTree:
    """A list of whole numbers becomes one leaf of a pytree.

    Args:
      classes: a list of whole numbers, known or traced, or anything else.

    Returns:
      An array; anything else is returned as it is.
    """
    if type(classes) not in (list, tuple) or not classes:
        return classes
    if all(isinstance(each, int | np.integer) for each in classes):
        return np.asarray(classes)
    return jnp.stack(classes) if all(isinstance(each, jax.Array) for each in classes) else classes


def classes_of(target: object, samples: object, what: str = "target") -> AnyArray:
    """A class for all samples or one per sample, as an array.

    Args:
      target: whole numbers, one or [B], known or traced. Whether they are classes of the model is not checked.
      samples: B, an int or the symbol of an exported batch.
      what: the name of the argument in the error.

    Returns:
      Whole numbers [B], a NumPy array where they are known.

    Raises:
      InputError: anything else.
    """
    try:
        found = target if isinstance(target := listed(target), jax.Array) else np.asarray(target)
    except (TypeError, ValueError):  # a ragged list, an object that fails to become an array
        found = None
    if found is None or found.dtype.kind not in "iu" or found.shape not in ((), (samples,)):
        raise InputError(f"{what} must be one class or one per sample ({samples}), as whole numbers")
    shape: Any = (samples,)
    known = isinstance(found, np.ndarray) and isinstance(samples, int)  # and not the symbol of an exported batch
    return (np if known else jnp).broadcast_to(found, shape)


def explained(outputs: PyTree, target: "Target | Question" = None) -> tuple[Array, dict[str, PyTree]]:
    """Each sample's score [B], and what every method reports of it.

    Args:
      outputs: of the module: logits [B, classes], or features, or a pytree of arrays that a custom score reads.
      target: a class for all or one per sample [B], None for the predicted ones; or a `Question`.

    Returns:
      The score [B] and the details: `logits` (the outputs), `target` (with the predicted class put in), `score`.

    Raises:
      InputError: outputs that a class cannot be read from, or a score that is not one floating-point number a sample.
    """
    asked = target if isinstance(target, Question) else Question(CLASS_LOGIT, target)
    leaves = jax.tree.leaves(outputs)
    is_table = leaves and leaves[0] is outputs and outputs.ndim == 2
    if asked.score == CLASS_LOGIT and not is_table:
        found = [list(leaf.shape) for leaf in leaves]
        raise InputError(f"a class is explained by its logit, of logits [B, classes]; outputs {found} need a `score`")
    samples = leaves[0].shape[0]
    if asked.score.of_class:
        if asked.open and is_table:
            own, predicted = asked.target, outputs.argmax(-1)
            if own is not None:
                predicted = jnp.where(own.given, own.classes.astype(predicted.dtype), predicted)
            asked = asked._replace(target=predicted)
        elif asked.of_logits:
            asked = asked._replace(target=jnp.asarray(classes_of(asked.target, samples)))
        elif getattr(asked.target, "ndim", 1) == 0 or isinstance(asked.target, int):
            asked = asked._replace(target=jnp.broadcast_to(jnp.asarray(asked.target), (samples,)))
        own = asked.score(outputs, asked.target)
    else:
        own = asked.score(outputs)
    if getattr(own, "shape", None) != (samples,) or not jnp.issubdtype(own.dtype, jnp.floating):
        found = f"{own.dtype} {list(own.shape)}" if hasattr(own, "shape") else type(own).__name__
        raise InputError(f"the score must be one floating-point number per sample, [{samples}], got {found}")
    kept = asked if isinstance(target, Question) else asked.target
    return own, {"logits": outputs, "target": kept, "score": own}


def is_open(target: "Target | Question") -> bool:
    """Whether the predicted class is to become the target.

    Args:
      target: a target or a `Question`.

    Returns:
      True where it has no class yet, or may have none.
    """
    return (target if isinstance(target, Question) else Question(CLASS_LOGIT, target)).open
