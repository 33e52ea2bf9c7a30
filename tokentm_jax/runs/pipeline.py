"""The pipeline of shards: read in threads, decoded in processes, computed on the devices, written in threads.

Its batches have one shape and start at the first example of a shard, so a part has the same bytes whichever devices of
one kind, processes or engines computed it, and whatever was interrupted.
"""

import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import jax
import numpy as np

from tokentm_jax.data.examples import Example, Source
from tokentm_jax.data.shards import Shard, examples
from tokentm_jax.data.sources import reopened
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.decoding import cores, submit
from tokentm_jax.runs.explainer import Explainer, Started
from tokentm_jax.runs.store import PartName, PartWriter, Store, read_keys

FEW = 1000  # examples that are decoded in threads: processes take seconds to start
READING = 4  # files that are read at a time
AHEAD = 4  # batches decoded before they are asked for
WRITERS = 4  # threads that write parts
UNWRITTEN = 2**28  # bytes of results that wait to be written


class Clock:
    """The seconds for which a run waited for each stage; what it never waited for is no limit."""

    def __init__(self) -> None:
        self.waited = {"reading and decoding": 0.0, "computing": 0.0, "writing": 0.0}

    def wait(self, stage: str, call: Callable[[], Any]) -> Any:
        start = time.monotonic()
        found = call()
        self.waited[stage] += time.monotonic() - start
        return found

    def sentence(self) -> str:
        """Which stage limits the speed."""
        total = sum(self.waited.values()) or 1.0
        stages = sorted(((s, name) for name, s in self.waited.items()), reverse=True)
        return "waited for " + ", ".join(f"{name} {s:.1f} s ({s / total:.0%})" for s, name in stages)


def run_shards(
    explainer: Explainer,
    shards: Sequence[Shard],
    store: Store,
    source: Source | None = None,
    clock: Clock | None = None,
) -> Generator[PartName | Mapping[str, np.ndarray], None, None]:
    """Explain shards and write their parts to a store that `begin` made, or `store_of` opened; all stages overlap.

    Yields the columns of each batch, and each finished part.

    Args:
      source: the source of slices, where it has no path, or to spare opening it.
    """
    if not shards:
        return
    clock = clock or Clock()
    size = explainer.batch_size
    elsewhere = any(shard.rows < 0 for shard in shards) or sum(shard.rows for shard in shards) > FEW
    at_once = 1 if shards[0].kind == "slice" else READING
    row = sum(int(np.prod(shape)) * 4 for shape, _ in store.layout.values())
    most = max(1, min(64, UNWRITTEN // (size * row)))
    parts: dict[int, PartWriter] = {}
    pools = [ThreadPoolExecutor(1) for _ in range(WRITERS)]  # the batches of a part are written in order
    writing: deque[Future[PartName | None]] = deque()

    def written(left: int) -> Iterator[PartName]:
        while len(writing) > left:
            part = clock.wait("writing", writing.popleft().result)
            if part is not None:
                yield part

    try:
        read = functools.partial(_examples, store=store, source=source)
        with closing(_read(shards, read, size, at_once)) as groups:
            ready = _decoded(explainer, groups, elsewhere, clock)
            for shard, columns in _computed(explainer, ready, clock):
                part, pool = parts.get(shard.index), pools[shard.index % WRITERS]
                if part is None:
                    part = parts[shard.index] = PartWriter(store, shard)
                if columns is None:
                    writing.append(pool.submit(part.finish))
                    del parts[shard.index]
                else:
                    writing.append(pool.submit(part.write, columns))
                    yield columns
                yield from written(most)
            yield from written(0)
    finally:
        for pool in pools:
            pool.shutdown()  # what was computed is written, also after an interruption
        for part in parts.values():
            part.discard()


_reopened = functools.cache(reopened)  # the sources of slices


def _examples(shard: Shard, store: Store, source: Source | None) -> Iterator[Example]:
    """The examples of a shard, encoded."""
    if shard.kind != "slice":
        yield from examples(shard)
        return
    keys = source.keys[shard.first : shard.first + shard.rows] if source else read_keys(store.place, shard)
    if source is None:
        source = _reopened(shard.url)
    if source.stamped(keys) != shard.identity:
        raise InputError(f"{source.name} has changed since the store was begun; choose another --out")
    for key in keys:
        try:
            yield source.encoded(key)
        except InputError as error:
            yield Example(key, error)


Group = tuple[Shard, list[Example]]


def _read(
    shards: Iterable[Shard], read: Callable[[Shard], Iterator[Example]], size: int, at_once: int
) -> Generator[Group, None, None]:
    """The examples of shards in groups, each shard ended by an empty group. Several are read at a time, in threads."""
    found: queue.Queue[Group | BaseException | None] = queue.Queue(2 * at_once)
    waiting, lock, stop = iter(shards), threading.Lock(), threading.Event()

    def put(item: Group | BaseException | None) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                found.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            while True:
                with lock:
                    shard = next(waiting, None)
                if shard is None:
                    break
                group: list[Example] = []
                for example in read(shard):
                    group.append(example)
                    if len(group) == size:
                        if not put((shard, group)):
                            return
                        group = []
                if (group and not put((shard, group))) or not put((shard, [])):
                    return
        except BaseException as error:
            put(error)
        put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(at_once)]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            while (item := found.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
    finally:
        stop.set()


def _decoded(
    explainer: Explainer, groups: Iterator[Group], elsewhere: bool, clock: Clock
) -> Iterator[tuple[Shard, list[Example], list[Any]]]:
    """The groups with what is decoded of them, ahead of what is asked for."""
    workers, setup = cores(), explainer.setup
    step = max(1, min(16, -(-explainer.batch_size // workers)))  # examples sent at a time
    ahead = max(AHEAD, -(-4 * workers * step // explainer.batch_size))
    waiting: deque[tuple[Shard, list[Example], list[Future[list[Any]]]]] = deque()

    def first() -> tuple[Shard, list[Example], list[Any]]:
        shard, group, futures = waiting.popleft()
        return shard, group, [found for future in futures for found in future.result()]

    try:
        while True:
            item = clock.wait("reading and decoding", lambda: next(groups, None)) if len(waiting) < ahead else None
            if item is not None:
                shard, group = item
                tasks = [group[i : i + step] for i in range(0, len(group), step)]
                waiting.append((shard, group, [submit(setup, task, elsewhere) for task in tasks]))
                continue
            if not waiting:
                return
            yield clock.wait("reading and decoding", first)
    finally:
        for _, _, futures in waiting:
            for future in futures:
                future.cancel()


def _computed(
    explainer: Explainer, ready: Iterable[tuple[Shard, list[Example], list[Any]]], clock: Clock
) -> Iterator[tuple[Shard, Mapping[str, np.ndarray] | None]]:
    """The columns of each group, and None at the end of a shard. The devices take turns.

    While one batch is fetched and written, each device computes another.
    """
    devices, number = len(jax.local_devices()), 0
    waiting: deque[tuple[Shard, Started | None]] = deque()

    def first() -> tuple[Shard, Mapping[str, np.ndarray] | None]:
        shard, started = waiting.popleft()
        return shard, None if started is None else started.columns()

    for shard, group, found in ready:
        started = explainer.start(group, found, number % devices) if group else None
        number += started is not None
        waiting.append((shard, started))
        while sum(started is not None for _, started in waiting) > devices or (waiting and waiting[0][1] is None):
            yield clock.wait("computing", first)
    while waiting:
        yield clock.wait("computing", first)
