"""Explain a whole data set, shard by shard. A shard needs nobody else, and `pipeline.py` runs it."""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import NamedTuple

import numpy as np

from tokentm_jax.data.examples import Source
from tokentm_jax.runs import store as stores
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.job import begin
from tokentm_jax.runs.pipeline import Clock, run_shards
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import PartName, is_whole, store_at


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
    engine_options: Mapping[str, object] | None = None,
) -> Outcome:
    """Write the maps of a data set to a store, or those that a store still lacks.

    Args:
      explainer: the model and its methods.
      source: the data; a path as `tokentm_jax.data.sources.open_source` takes it; or files that are shards, local or
        in an object store: "train-{000000..001281}.tar", "s3://bucket/*.parquet", "data.array_record".
      out: a local folder, or a URL such as s3://bucket/maps.
      report: called with (examples finished, examples in all or 0 where unknown, examples skipped by this run).
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
        estimate = round(unknown * float(np.mean(rows))) if rows else 0
        if report is not None:
            report(done, 0 if unknown and not rows else max(done, known + estimate), skipped)

    say(count)
    with closing(run(todo) if run else run_shards(explainer, todo, store, data, clock)) as steps:
        for step in steps:
            if isinstance(step, PartName):
                rows.append(step.rows)
                new, bad = (step.rows, step.skipped) if run else (0, 0)
            else:
                new, bad = len(step["status"]), int((step["status"] == stores.SKIPPED).sum())
            count, skipped = count + new, skipped + bad
            if new:
                say(count)
    return Outcome(len(own), len(todo), damaged, "" if run else clock.sentence())
