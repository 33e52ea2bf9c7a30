"""Explain a whole data set, shard by shard: read, decoded in other processes, computed on the devices, written.

A shard needs nobody else. Its batches have one shape and start at its first example, so its part has the same bytes
whichever devices, processes or engines computed it, and whatever was interrupted.
"""

import dataclasses
import functools
import json
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from tokentm_jax.data.labels import read_label_map
from tokentm_jax.data.shards import Shard, examples, find_shards, kind_of_shards, slices
from tokentm_jax.data.sources import Example, Source, open_source, reopened
from tokentm_jax.errors import InputError
from tokentm_jax.identity import digest, environment, require_same
from tokentm_jax.inputs.decoding import cores, submit
from tokentm_jax.models.classes import known_classes, translation
from tokentm_jax.runs import store as stores
from tokentm_jax.runs.explainer import Explainer, Started
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import GROUP, PartName, PartWriter, Store, is_whole, store_at, understood

SLICES = 10_000  # of a source at most, unless a size is given
FEW = 1000  # examples that are decoded in threads: processes take seconds to start
READING = 4  # files that are read at a time
AHEAD = 4  # batches decoded before they are asked for
WRITERS = 4  # threads that write parts
UNWRITTEN = 2**28  # bytes of results that wait to be written


class Outcome(NamedTuple):
    """What one process did: its shards, how many of them it computed, which were damaged, and what took the time."""

    shards: int
    computed: int
    damaged: list[int]
    limits: str


def explain_dataset(
    explainer: Explainer,
    source: Source | str,
    out: str,
    report: Callable[[int, int, int], None] | None = None,
    *,
    process: int = 0,
    processes: int = 1,
    limit: int | None = None,
    shard_size: int | None = None,
    retry_skipped: bool = False,
    verify: bool = False,
    engine: str = "local",
    engine_options: Mapping[str, Any] | None = None,
) -> Outcome:
    """Write the maps of a data set to a store, or those that a store still lacks.

    Args:
      source: the data; a path as `tokentm_jax.data.sources.open_source` takes it; or files that are shards, local or
        in an object store: "train-{000000..001281}.tar", "s3://bucket/*.parquet", "data.array_record".
      out: a local folder, or a URL such as s3://bucket/maps.
      report: called with (examples finished, examples in all as far as known, examples skipped by this run).
      process, processes: this process writes every shard whose number has the remainder `process`.
      limit: number of examples, at even intervals; not for files that are shards.
      shard_size: examples of a shard of other sources, a multiple of the batch size; None: 256 or a little more, and
        as many as make 10,000 shards.
      retry_skipped: compute the shards again that have an example that was skipped.
      verify: read all finished parts, and compute damaged ones again.
      engine: "local" (this process), or "ray" or "beam": workers on any number of machines.
      engine_options: of the engine, see `tokentm_jax.runs.engines`.

    Returns:
      What this process did.

    Raises:
      InputError: an explainer and data that do not go together, a store of something else, a full disk.
    """
    clock, run = Clock(), None
    if engine == "local":
        store, explainer, data = begin(explainer, source, out, limit, shard_size, list_again=processes == 1)
    else:
        from tokentm_jax.runs import engines

        job = engines.Job(explainer, source, out, limit, shard_size, processes == 1)
        run, store, data = engines.started(engine, engine_options or {}, job), store_at(Place(out)), None
    own = [shard for shard in store.shards if shard.index % processes == process]
    parts = {shard.index: store.parts[shard.index] for shard in own if shard.index in store.parts}
    damaged = sorted(index for index, part in parts.items() if verify and not is_whole(store, part))
    again = {index for index, part in parts.items() if retry_skipped and part.skipped} | set(damaged)
    for index in damaged:
        store.place.remove(parts[index].pattern)
        del store.parts[index]
    todo = [shard for shard in own if shard.index not in parts or shard.index in again]
    count = sum(part.rows for index, part in parts.items() if index not in again)
    skipped, rows = 0, [part.rows for part in parts.values()]
    unknown = sum(shard.rows < 0 for shard in todo)  # their number is estimated from those that are done
    known = count + sum(max(shard.rows, 0) for shard in todo)

    def say(done: int) -> None:
        if report is not None:
            report(done, max(done, known + round(unknown * float(np.mean(rows)) if rows else 0)), skipped)

    say(count)
    with closing(run(todo) if run else run_shards(explainer, todo, out, data, clock)) as steps:
        for step in steps:
            if isinstance(step, PartName):
                rows.append(step.rows)
                new, bad = (step.rows, step.skipped) if run else (0, 0)
            else:
                new, bad = len(step["status"]), int((step["status"] == stores.SKIPPED).sum())
            count, skipped = count + new, skipped + bad
            say(count)
    return Outcome(len(own), len(todo), damaged, "" if run else clock.sentence())


# ---- the store of a job ---------------------------------------------------------------------------------------------


def begin(
    explainer: Explainer,
    source: Source | str,
    out: str,
    limit: int | None = None,
    shard_size: int | None = None,
    *,
    list_again: bool = True,
) -> tuple[Store, Explainer, Source | None]:
    """The store of a job with its shards, made where there is none; the explainer, ready for it; and the source.

    The shards are listed once. Later only a source of one process is listed again, with `list_again`, to detect that
    its examples have changed. Raises InputError for a store of something else.
    """
    place = Place(out)
    content = place.read(stores.ROOT)
    data, spec = (None, source) if isinstance(source, str) else (source, "")
    files = kind_of_shards(spec) is not None
    if files and limit is not None:
        raise InputError(f"a limit is not for shards: name fewer files than {spec}")
    if data is None and not files and (content is None or list_again):
        data = open_source(spec, limit=limit)
    if data is not None and explainer.target == "label" and not data.labelled:
        raise InputError(f"{data.name} has no labels to explain; take the target 'predicted'")
    if data is not None:
        _check_classes(explainer, data)
    reader = explainer.loaded.preprocessing
    if explainer.length is None and hasattr(reader, "padded") and (files or data is not None):
        length = reader.length if data is None else reader.fixed(data).padded
        explainer = dataclasses.replace(explainer, length=length)
    size = _shard_size(explainer, data, shard_size)
    shards = None
    if content is None:
        if place.has("zarr.json"):
            raise InputError(f"{place.path} is a zarr store of version 0.1, which is read only; choose another --out")
        if not place.is_empty():
            raise InputError(f"{place.path} is not empty and holds no maps; choose another --out")
        shards = find_shards(spec) if data is None else slices(data, size, spec)
        made = {"format": stores.FORMAT, **described(explainer), **_listed(data, spec, shards, size)}
        place.write(stores.ROOT, lambda path: path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))
        content = place.read(stores.ROOT) or b""
    made = understood(content, place.path)
    store, explainer = _joined(explainer, Store(place, made, []))
    if data is not None:
        size = made.get("shard_size", size) if shard_size is None else size
        now = _listed(data, spec, [], size)
        require_same(place.path, made, {name: now[name] for name in ("data", "examples", "keys", "shard_size")})
    elif spec != made["data"]["spec"]:
        raise InputError(f"{place.path} was made with data {made['data']['spec']}, and this command has {spec}")
    known = stores.read_manifest(place)
    if known is None:
        known = shards or (find_shards(spec) if data is None else slices(data, size, spec))
        if data is not None:
            stores.write_keys(place, data.keys, size)
        stores.write_manifest(place, known)
    if known is not shards and digest(known) != made["manifest"]:
        raise InputError(f"the shards of {place.path} are not those that it was begun with; choose another --out")
    return dataclasses.replace(store, shards=known), explainer, data


def _listed(data: Source | None, spec: str, shards: Sequence[Shard], size: int) -> dict[str, Any]:
    """What tokentm.json has of the data."""
    found = {"shards": len(shards), "manifest": digest(shards)}
    if data is None:
        return {"data": {"name": spec, "identity": found["manifest"], "spec": spec}, "examples": -1, **found}
    known = {"data": {"name": data.name, "identity": data.stamped(), "spec": spec}, "examples": len(data)}
    return {**known, "keys": digest(*data.keys), "shard_size": size, **found}


def described(explainer: Explainer) -> dict[str, Any]:
    """What an explainer computes here, as JSON. It has no times, so that equal runs give equal bytes."""
    what = explainer.described()
    columns = {name: {"shape": shape, "dtype": kind} for name, (shape, kind) in explainer.layout().items()}
    return {**what, "explainer": digest(what), **environment(), "columns": columns}


def _joined(explainer: Explainer, store: Store) -> tuple[Store, Explainer]:
    """The explainer of a store, with the store's length of texts. InputError if it computes something else."""
    made = store.made
    if explainer.length is None and made.get("length") is not None:
        explainer = dataclasses.replace(explainer, length=made["length"])
    what = {name: value for name, value in described(explainer).items() if name not in ("explainer", "columns")}
    wanted = json.loads(json.dumps(what))
    require_same(store.place.path, {**made, **made["versions"]}, {**wanted, **wanted.pop("versions")})
    return store, explainer


def _shard_size(explainer: Explainer, source: Source | None, size: int | None) -> int:
    """Examples of a slice."""
    batch, count = explainer.batch_size, 0 if source is None else len(source)
    if size is None:
        return -(-max(GROUP, -(-count // SLICES)) // batch) * batch
    if size < 1 or size % batch or size > 2**20:
        raise InputError(f"the shard size must be a multiple of the batch size up to {2**20}, got {size} and {batch}")
    return size


def _check_classes(explainer: Explainer, source: Source) -> None:
    """Warn about classes that the model does not have; InputError where they are to be explained."""
    if explainer.target == "label" or explainer.label_map is not None:
        translation(explainer.loaded, source, read_label_map(explainer.label_map))
    elif unknown := known_classes(explainer.loaded, source)[1]:  # labels are stored, and nothing depends on them
        warnings.warn(f"labels are stored as -1 where they are unknown: {unknown}", stacklevel=4)


# ---- running --------------------------------------------------------------------------------------------------------


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


def run_shard(explainer: Explainer, shard: Shard, out: str) -> PartName:
    """Explain one shard and write its part to a store that `begin` made. A function of its arguments only.

    Returns:
      The name of the part, with its numbers of examples and of skipped ones.

    Raises:
      InputError: a shard that has changed or cannot be read, a store of something else, a full disk.
    """
    done = [step for step in run_shards(explainer, [shard], out) if isinstance(step, PartName)]
    return done[0]


def run_shards(
    explainer: Explainer,
    shards: Sequence[Shard],
    out: str,
    source: Source | None = None,
    clock: Clock | None = None,
) -> Generator[PartName | Mapping[str, np.ndarray], None, None]:
    """`run_shard` for several shards, whose stages overlap. Yields the columns of each batch, and each finished part.

    Args:
      source: the source of slices, where it has no path, or to spare opening it.
    """
    if not shards:
        return
    clock = clock or Clock()
    store, explainer = _store_of(explainer, out)
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
            pool.shutdown(cancel_futures=True)
        for part in parts.values():
            part.discard()


def _store_of(explainer: Explainer, out: str) -> tuple[Store, Explainer]:
    """The store that `begin` made, read once for an explainer."""
    known = explainer.__dict__.setdefault("_stores", {})  # not pickled
    if out not in known:
        known[out] = _joined(explainer, store_at(Place(out)))
    return known[out]


_reopened = functools.cache(reopened)  # the sources of slices


def _examples(shard: Shard, store: Store, source: Source | None) -> Iterator[Example]:
    """The examples of a shard, encoded."""
    if shard.kind != "slice":
        yield from examples(shard)
        return
    keys = source.keys[shard.first : shard.first + shard.rows] if source else stores.read_keys(store.place, shard)
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
