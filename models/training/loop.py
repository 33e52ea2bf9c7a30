"""Training that resumes exactly: steps, with an Orbax checkpoint and a line of `log.jsonl` at intervals."""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.files import read_text, reason, remove, uninterrupted, write_text


class Loop(NamedTuple):
    """Number of steps, in all and in an epoch, and the epochs between two checkpoints."""

    steps: int
    per_epoch: int
    checkpoint_epochs: float = 1.0


class State(NamedTuple):
    """What a checkpoint keeps."""

    step: Array
    params: Any
    optimiser: Any
    average: Any = None  # exponential moving average of the parameters


def adamw(config: Any, per_epoch: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, warm-up and a cosine to zero; kernels alone decay."""
    decayed = partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(_schedule(config, per_epoch), b2=config.beta_2, weight_decay=config.weight_decay, mask=decayed),
    )


def muon(config: Any, per_epoch: int) -> optax.GradientTransformation:
    """Muon for the kernels of blocks, which decay, and Adam for all else; otherwise as `adamw`.

    The gradient's moving average, orthogonalised (https://kellerjordan.github.io/posts/muon/), and scaled to the size
    that updates of Adam have (Liu et al., 2025, arXiv 2502.16982), so that learning rates are alike.
    """

    def matrix(path: Any, _: Array) -> optax.contrib.MuonDimensionNumbers | None:
        inside = any(part.key == "blocks" for part in path) and path[-1].key == "kernel"  # [L, I, O]
        return optax.contrib.MuonDimensionNumbers(1, 2) if inside else None

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.contrib.muon(
            _schedule(config, per_epoch),
            weight_decay=config.weight_decay,
            adam_b2=config.beta_2,
            muon_weight_dimension_numbers=partial(jax.tree_util.tree_map_with_path, matrix),
            consistent_rms=0.2,
        ),
    )


OPTIMISERS = {"adamw": adamw, "muon": muon}


def _schedule(config: Any, per_epoch: int) -> optax.Schedule:
    steps = round(config.epochs * per_epoch)
    warmup = min(round(config.warmup_epochs * per_epoch), steps // 2)  # short trial runs have one too
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(warmup, 1), max(steps, 2), 0.0)


def begin(optimiser: optax.GradientTransformation, params: Any, averaged: bool = False) -> State:
    """The state before the first step, of a copy of the parameters."""
    params = jax.tree.map(jnp.array, params)
    average = jax.tree.map(jnp.copy, params) if averaged else None
    return State(jnp.zeros((), jnp.int32), params, optimiser.init(params), average)


def descend(
    optimiser: optax.GradientTransformation, state: State, loss_of: Callable[[Any], Array], ema_decay: float = 0.0
) -> tuple[State, Array]:
    """One step of gradient descent, and the loss before it."""
    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, kept = optimiser.update(gradients, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    average = (
        jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
        if state.average is not None
        else None
    )
    return State(state.step + 1, params, kept, average), loss


def run_steps(
    loop: Loop,
    state: State,
    batches: Callable[[int], Iterator[Any]],
    advance: Callable[[State, int, Any], tuple[State, Array]],
    measure: Callable[[State], float],
    out: Path,
    log: Callable[[str], None],
) -> tuple[State, float]:
    """From a state, or from the last checkpoint in `out`, to the last step; also what `measure` finds there.

    Args:
      batches: from a step on, endless.
      advance: `(state, number of the step, batch) -> (state, loss)`.
      measure: the accuracy of a state in [0, 1], for the log.

    Raises InputError for a full disk, or a checkpoint or log that is damaged.
    """
    # Nothing is saved in the background, where an error or a signal would find nobody to take it.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    folder, top_1, losses = out / "checkpoints", None, []
    _drop_unfinished(folder)  # of a run that was killed
    try:
        with ocp.CheckpointManager(folder, options=options) as saved:
            state = _restore(saved, state, loop.steps, log)
            first, began = int(state.step), time.monotonic()
            save_every = max(1, round(min(loop.checkpoint_epochs * loop.per_epoch, loop.steps)))
            lines = _lines(out / "log.jsonl", first)
            for step, batch in zip(range(first, loop.steps), batches(first), strict=False):
                state, loss = advance(state, step, batch)
                losses.append(loss)
                done = step + 1
                if done % save_every and done != loop.steps:
                    continue
                mean_loss, losses = float(jnp.stack(losses).mean()), []
                top_1 = measure(state)
                elapsed = time.monotonic() - began
                left = elapsed / (done - first) * (loop.steps - done)
                record = {"step": done, "loss": mean_loss, "test_accuracy": top_1, "seconds": round(elapsed, 1)}
                lines.append(json.dumps(record) + "\n")
                # First: a line beyond the checkpoint is dropped later. The folder is claimed.
                write_text(out / "log.jsonl", "".join(lines), overwrite=True)
                _save(saved, done, state)
                epoch = done / loop.per_epoch
                log(f"epoch {epoch:.1f}: loss {mean_loss:.3f}, test {top_1:.2%}, {left / 60:.0f} min left")
    finally:
        _drop_unfinished(folder)
    return state, measure(state) if top_1 is None else top_1  # None: nothing was left to train


def _restore(saved: Any, state: State, steps: int, log: Callable[[str], None]) -> State:
    """The state of the last checkpoint, if there is one."""
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


def _save(saved: Any, step: int, state: State) -> None:
    try:
        with uninterrupted():
            saved.save(step, args=ocp.args.StandardSave(state))
    except Exception as error:
        again = "; the same command goes on from the checkpoint before"
        raise InputError(f"{saved.directory / str(step)} cannot be written: {reason(error)}{again}") from None


def _drop_unfinished(folder: Path) -> None:
    """Remove what Orbax calls so until a checkpoint is whole."""
    for left in folder.glob("*.orbax-checkpoint-tmp*"):
        remove(left)


def _lines(path: Path, step: int) -> list[str]:
    """The lines of the log up to a step: a run that was stopped may have written more than it kept."""
    if not path.exists():
        return []
    lines = read_text(path).splitlines(keepends=True)
    try:
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: every line must be a JSON object with a 'step'; remove it") from None
