"""The question why a decoder writes a token, as one about a model of the token that follows a text."""

from typing import Any

import jax.numpy as jnp

from tokentm_jax.errors import InputError
from tokentm_jax.maths.scores import Question, Token, classes_of
from tokentm_jax.programs.model import Function


def of_next(model: Function, inputs: Any, target: Any) -> tuple[Function, Any, Any, Any]:
    """The question about a token as one about the model of the next token, of the text before it; and whether each
    sample has such a text. Others as they are."""
    if not isinstance(target, Question) or not isinstance(target.score, Token):
        return model, inputs, target, True
    if not hasattr(inputs, "until"):
        raise InputError(f"a token is explained in Tokens or Texts, got {type(inputs).__name__}")
    count = jnp.asarray(classes_of(target.score.position, len(inputs.mask), "the position"))
    before, within = inputs.until(count)
    return model.of_next(), before, target.score.of_next(), within
