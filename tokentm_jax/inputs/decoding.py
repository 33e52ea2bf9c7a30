"""Decoding in other processes, one for each core, because threads share Python's lock.

Each is a plain child process that reads batches of encoded examples from its standard input, ends when that is closed,
and is started again when a decoder crashes: its example is skipped.
"""

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokentm_jax.data.examples import Example, decoded
from tokentm_jax.data.photos import decoding
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.reader import Reader

_COMMAND = "from tokentm_jax.inputs.decoding import serve; serve()"
_SENT = (bytes, str, Path, np.ndarray, InputError)  # contents that another process can decode


class Setup(NamedTuple):
    """How examples are decoded: `least` is as in `examples.decoded`."""

    reader: Reader
    profile: str
    least: int | None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_all(setup: Setup, examples: Sequence[Example]) -> list[Any]:
    """The `Reader.levels` of each example, or the reason why it has none."""
    found: list[Any] = []
    for example in examples:
        try:
            with decoding.turn():  # until the photo is gone, and only the model's input is left
                found.append(setup.reader.levels(decoded(example, setup.least), setup.profile)[0])
        except InputError as error:
            found.append(str(error))
    return found


def submit(setup: Setup, examples: Sequence[Example], elsewhere: bool) -> "Future[list[Any]]":
    """Decode in a thread, or `elsewhere` in another process if the contents can be sent."""
    sent = elsewhere and all(isinstance(example.content, _SENT) for example in examples)
    return _threads().submit(_elsewhere if sent else decode_all, setup, examples)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores())


class _Own(threading.local):
    """The process of a thread."""

    process: "subprocess.Popen[bytes] | None" = None
    setup: Setup | None = None


_own = _Own()


def _elsewhere(setup: Setup, examples: Sequence[Example]) -> list[Any]:
    """`decode_all` in the process of this thread."""
    try:
        if _own.process is None:
            paths = os.pathsep.join(path for path in sys.path if path)
            environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-c", _COMMAND]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            _own.process = subprocess.Popen(
                command, env=environment, stdin=pipe, stdout=pipe, stderr=nothing, start_new_session=True
            )
            atexit.register(_end, _own.process)
        process: Any = _own.process
        pickle.dump((None if setup is _own.setup else setup, examples), process.stdin, 5)
        process.stdin.flush()
        found = pickle.load(process.stdout)  # of a child of this process
        _own.setup = setup
        return found
    except (EOFError, OSError, pickle.UnpicklingError):
        if _own.process is not None:
            _end(_own.process)
        _own.process = _own.setup = None
        if len(examples) == 1:
            return [f"{examples[0].key}: its decoder crashed"]
        return [each for example in examples for each in _elsewhere(setup, [example])]


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not sent
                stream.close()


def serve() -> None:
    """The child: answer batches until the standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    setup: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            changed, examples = pickle.load(sys.stdin.buffer)
            setup = changed or setup
            pickle.dump(decode_all(setup, examples), answers, 5)
            answers.flush()
