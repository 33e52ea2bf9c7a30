"""Factors 1 + u of tokens and of what is added to them. The derivative by u, at zeros, is an effect of each token.

All functions are for one sample.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.inputs.values import seen
from tokentm_jax.maths.primitives import wide
from tokentm_jax.programs.flat import Step
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.passes import first_row
from tokentm_jax.programs.running import Evaluation, Tap


def factor_taps(model: Model, sample: Any) -> dict[int, Tap]:
    """Taps by which every token and bias has a factor 1 + share * u [N], whose derivative by u is FullGrad+'s row.

    Their state is u and the number of blocks before. The shares of tokens are 1 / L for each block.
    """
    structure = model.structure
    n, depth = structure.tokens, structure.depth
    kind = structure.reading.flat.types[structure.embedded]
    readout = None if seen(sample) is None else first_row(model, sample, kind)
    taps: dict[int, Tap] = {}
    for reading in {structure.reading, *(stage.reading for stage in structure.stages)}:
        for step in reading.flat.steps:
            if step.kind == "bias" and step.outputs[0] in structure.rows:
                taps[step.outputs[0]] = partial(_with_factor, step, structure.rows[step.outputs[0]], readout, depth)
    for stage in structure.stages:
        taps |= {block[0].stream: partial(_scaled_stream, depth, n) for block in stage.blocks}
    return taps


def _scaled_stream(depth: int, n: int, evaluation: Evaluation, value: Array, state: Any, extra: Any) -> Any:
    """The tokens that enter a block, times their factor. The block then counts for the shares of biases."""
    u, index = state
    shape = [1] * value.ndim
    shape[-2] = n
    return (wide(value) * (1 + u / depth).reshape(shape)).astype(value.dtype), (u, index + 1), None


def _with_factor(
    step: Step, rows: Any, readout: Array | None, depth: int, evaluation: Evaluation, value: Array, state: Any, _: Any
) -> Any:
    """A sum with a bias times its factor, whose share is that of the blocks before it.

    After the head has read the tokens, the factor is that of the read tokens: by `readout` [N] if it depends on the
    sample.
    """
    u, index = state
    share = index.astype(u.dtype) / depth
    if isinstance(rows, tuple):
        factor = at_tokens(rows, u, value)
    else:
        factor = (jnp.asarray(rows, u.dtype) if readout is None else readout) @ u
    return (wide(value) + added(step, evaluation) * (factor * share)).astype(value.dtype), state, None


def added(step: Step, evaluation: Evaluation) -> Array:
    """What a step adds to its value, with its sign."""
    added = wide(evaluation.get(step.inputs[1 - step.of]))
    return -added if step.name == "sub" and step.of == 0 else added


def at_tokens(rows: tuple[Any, Any], u: Array, value: Array) -> Array:
    """Factors u [N] of the tokens at their places in a value."""
    axis, shares = rows
    if isinstance(axis, slice):
        return u[axis].reshape(shares)
    shape = [1] * value.ndim
    shape[axis] = len(shares)
    every = len(shares) == len(u) and (shares == np.eye(len(u))).all()
    return (u if every else jnp.asarray(shares, u.dtype) @ u).reshape(shape)
