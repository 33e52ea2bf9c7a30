"""Engines that run the shards of `explain_dataset` on many machines: Ray, here, and Apache Beam, in `beam.py`.

Both give numbers of shards to workers that keep the model and its compiled program. A shard is explained by
`run_shard` everywhere, so its part has the same bytes. This process loads no model: its machine needs no device.
"""

import contextlib
import dataclasses
import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from tokentm_jax.data.examples import Source
from tokentm_jax.data.shards import Shard
from tokentm_jax.errors import InputError, require, suggest
from tokentm_jax.files import reason
from tokentm_jax.runs.beam import LOSSES, beam
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.job import begin, run_shard
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import AGAIN, PartName, store_at

ENGINES = ("local", "ray", "beam")
START = "start"  # what a worker does first
AT_ONCE = 2  # shards of a worker of Ray: one is read and decoded while another is computed

Run = Callable[[Sequence[int | None]], Generator[Any, None, None]]  # of the numbers of shards, or [None]: begin


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker does. It pickles, and keeps the model where it is."""

    explainer: Explainer
    source: Source | str
    out: str
    limit: int | None
    shard_size: int | None
    list_again: bool
    folder: str = dataclasses.field(default_factory=os.getcwd)  # where relative paths start

    def start(self) -> None:
        """Load the model, once for a worker."""
        with contextlib.suppress(OSError):  # another machine has no such folder: only absolute paths work there
            os.chdir(self.folder)
        _ = self.explainer.setup

    def run(self, index: int | None) -> PartName | None:
        """Explain a shard; or begin the store, which is of this worker's kind of device."""
        if index is not None:
            return run_shard(self.explainer, _shards(self.out)[index], self.out)
        begin(self.explainer, self.source, self.out, self.limit, self.shard_size, list_again=self.list_again)
        return None


@functools.lru_cache(1)
def _shards(out: str) -> Sequence[Shard]:
    return store_at(Place(out)).shards


def started(
    engine: str, options: Mapping[str, Any], job: Job
) -> Callable[[Sequence[Shard]], Generator[PartName, None, None]]:
    """Begin a store. Returns what explains some of its shards, and yields their parts. Raises InputError."""
    if engine not in ENGINES:
        raise suggest("engine", engine, ENGINES)
    if not isinstance(job.source, str):
        raise InputError(f"the engine {engine} reads the data in other processes: give its path or URL")
    run = ray(job, options) if engine == "ray" else functools.partial(beam, job, job.out, options)
    deque(run([None]), 0)
    return lambda shards: run([shard.index for shard in shards])


def ray(job: Job, options: Mapping[str, Any]) -> Run:
    """What yields the job's result for each item, in the order in which they are ready.

    Workers get an item when they are free, and only those that have started. An item whose worker is lost is given to
    another, and another worker is started instead.

    Args:
      options: "workers", their number; "address" of the cluster; others are of Ray's actors, such as "num_gpus".
    """
    ray = require("ray", "ray", "the engine ray")
    options = dict(options)
    address, count = options.pop("address", None), options.pop("workers", None)
    if not ray.is_initialized():
        ray.init(address=address)
    have, nodes = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if have.get("GPU"):
        options, count = {"num_gpus": 1, **options}, count or int(have["GPU"])
    elif have.get("TPU"):
        options, count = {"resources": {"TPU": 1}, **options}, count or int(have["TPU"])
    else:  # a worker uses all cores
        options, count = {"scheduling_strategy": "SPREAD", **options}, count or sum("CPU" in node for node in nodes)
    actor = ray.remote(Job).options(max_concurrency=AT_ONCE, **{"num_cpus": 1, **options})
    load: dict[Any, int] = {}  # items of each worker that has started

    def run(items: Sequence[int | None]) -> Generator[Any, None, None]:
        waiting, left, losses = deque[int | str | None](items), len(items), Counter[int | str | None]()
        running: dict[Any, tuple[Any, int | str | None]] = {}  # reference -> worker and item

        def start() -> None:
            worker = actor.remote(**vars(job))
            running[worker.start.remote()] = worker, START

        for _ in range(len(load), min(count, left)):
            start()
        while left:
            while waiting and load and load[free := min(load, key=load.__getitem__)] < AT_ONCE:
                item = waiting.popleft()
                running[free.run.remote(item)] = free, item
                load[free] += 1
            (ready,), _ = ray.wait([*running], num_returns=1)
            worker, item = running.pop(ready)
            try:
                found = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise getattr(error, "cause", error) from None
            except ray.exceptions.RayError as error:  # the worker is lost
                losses[item] += 1
                if losses[item] > (LOSSES * count if item == START else LOSSES):
                    what = "the workers do not start" if item == START else f"shard {item} lost {LOSSES + 1} workers"
                    raise InputError(f"{what}: {reason(error)}; {AGAIN}") from None
                if item != START:
                    waiting.append(item)
                if item == START or load.pop(worker, None) is not None:  # its other item comes here, too
                    start()
                continue
            if item == START:
                load[worker], losses[START] = 0, 0
                continue
            if worker in load:
                load[worker] -= 1
            left -= 1
            yield found

    return run
