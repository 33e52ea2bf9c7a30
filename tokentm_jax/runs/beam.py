"""Apache Beam as an engine: a pipeline in a child process, started again when the direct runner loses a worker."""

import contextlib
import dataclasses
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import reason
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import AGAIN, store_at

LOSSES = 5  # workers that one shard may lose, and pipelines without a finished shard
LISTING = 30  # seconds between two listings of the finished parts
_COMMAND = "from tokentm_jax.runs.beam import serve; serve()"
_DEFAULTS = {
    "runner": "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "direct_running_mode": "multi_processing",
    "default_sdk_harness_log_level": "WARNING",
}


def beam(job: Any, out: str, options: Mapping[str, Any], items: Sequence[int | None]) -> Generator[Any, None, None]:
    """Yields the part of each item, when a listing has it.

    The pipeline runs in a child process: Beam's direct runner waits forever for a lost worker, so the child ends, and
    another one gets the rest. Other runners try lost work again themselves.

    Args:
      options: of the pipeline, such as "runner"; by default the direct runner, with "direct_num_workers" processes.
    """
    require("apache_beam", "beam", "the engine beam")
    store = None if items == [None] else store_at(Place(out))
    for index in items:
        if store and index in store.parts:  # it is computed again
            store.place.remove(store.parts[index].pattern)
    left, losses, environment = [*items], 0, {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    while left:
        before, answer = len(left), b""
        child: Any = subprocess.Popen([sys.executable, "-c", _COMMAND], env=environment, **pipes)
        try:
            with contextlib.suppress(BrokenPipeError):
                pickle.dump((job, options, left), child.stdin)
                child.stdin.flush()
            ended = False
            while not ended:
                ended = bool(select.select([child.stdout], [], [], LISTING)[0])
                parts = dataclasses.replace(store).parts if store else {}  # listed now
                yield from (parts[index] for index in left if index in parts)
                left = [index for index in left if index not in parts]
            answer = child.stdout.read()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # workers, too
            with contextlib.suppress(BrokenPipeError):
                child.communicate()
        if answer:
            error = pickle.loads(answer)  # of a child of this process
            if store and left and not error:
                error = f"the pipeline has ended without {len(left)} shards; {AGAIN}"
            if error:
                raise InputError(error)
            return
        losses = losses + 1 if len(left) == before else 0
        if losses > LOSSES:
            raise InputError(f"{losses} pipelines were lost without a finished shard; {AGAIN}")


def serve() -> None:
    """A child of `beam`: run the pipeline that the standard input has, and answer with its error. Ends with that."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job, options, items = pickle.load(sys.stdin.buffer)
    threading.excepthook = lambda _: os._exit(1)  # in a thread of Beam: a worker is lost

    def end() -> None:
        sys.stdin.buffer.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    try:
        error = _pipeline(job, options, items)
    except Exception as failed:  # those of runners have no common type
        known = re.findall(r"InputError: (.*?)(?: \[while running|$)", str(failed), re.MULTILINE)
        error = known[-1] if known else f"the pipeline failed: {reason(failed)}; {AGAIN}"
    pickle.dump(error, answers)
    answers.flush()
    os._exit(0)


def _pipeline(job: Any, options: Mapping[str, Any], items: Sequence[int | None]) -> str | None:
    """Run to its end; the error, if there is one."""
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.utils.shared import Shared

    class Explain(apache_beam.DoFn):
        def __init__(self) -> None:
            self.shared = Shared()  # by all threads of a worker

        def setup(self) -> None:
            self.job = self.shared.acquire(lambda: job)
            self.job.start()

        def process(self, index: int | None) -> None:
            self.job.run(index)

    named = {**_DEFAULTS, **options}.items()
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in named if value]
    pipeline = apache_beam.Pipeline(options=PipelineOptions(flags))
    shards = pipeline | apache_beam.Create(items) | apache_beam.Reshuffle()  # among the workers
    _ = shards | apache_beam.ParDo(Explain())
    state = pipeline.run().wait_until_finish()
    return None if state == "DONE" else f"the pipeline has ended as {state}; {AGAIN}"
