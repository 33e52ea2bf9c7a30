"""Explain a whole data set: decoded ahead, computed on the local devices, written to a store chunk by chunk.

Every batch has one shape and runs on one device, so that a map depends neither on the number of devices and processes
nor on what was finished before: a store that was interrupted ends with the same bytes as one that was not.
"""

import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.data.labels import read_label_map
from tokentm_jax.data.sources import Source, open_source
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.identity import digest, environment
from tokentm_jax.inputs.batches import Batch, batches
from tokentm_jax.inputs.reader import PROFILES
from tokentm_jax.inputs.values import as_maps
from tokentm_jax.maths.scores import question
from tokentm_jax.methods.explain import compiled
from tokentm_jax.methods.table import METHODS
from tokentm_jax.models.classes import known_classes, translation
from tokentm_jax.models.loading import Model
from tokentm_jax.runs.store import (
    DONE,
    DTYPES,
    FILL,
    FORMAT,
    REASON_BYTES,
    SKIPPED,
    BatchSize,
    ChunkSize,
    Store,
    encode,
    scaled,
)
from tokentm_jax.validation import check_fields

TARGETS = ("predicted", "label")
CHUNK = 256  # examples of a chunk, or a little more so that batches divide it
WRITING = 4  # chunks that are being written, fewer where they are large; the next one waits


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What is stored. Another value of any of these is another store.

    Args:
      methods: names of `METHODS`.
      options: of the methods; each must know all of them.
      target: which class is explained, "predicted" or "label".
      dtype: of the stored maps, "float16" or "float32".
      profile: how images are prepared: "default" (as the model specifies) or "reference" (squashed, bilinear).
      batch_size: examples computed at a time, on one device; from 1 to 4096.
      chunk_size: examples written at a time, a multiple of the batch size up to 65536; None: 256 or a little more.
      score: what is explained: None for the logit of the class, or see `Model.score`.
      label_map: the model's class (name, wnid or number) of classes that the data set names otherwise, or the file of
        such a map, see `read_label_map`.
    """

    methods: Sequence[str] = ("tokentm",)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: str = "predicted"
    dtype: str = "float16"
    profile: str = "default"
    batch_size: BatchSize = 32
    chunk_size: ChunkSize | None = None
    label_map: Mapping[str, str | int] | str | None = None
    score: str | None = None

    @property
    def chunk(self) -> int:
        """Examples of a chunk."""
        return -(-CHUNK // self.batch_size) * self.batch_size if self.chunk_size is None else self.chunk_size


class Outcome(NamedTuple):
    """What one process did: its chunks, how many of them it computed, and which of those were damaged."""

    chunks: int
    computed: int
    damaged: list[int]


Report = Callable[[int, int, int], None]


def explain_dataset(
    config: DatasetConfig,
    vit: Model,
    source: Source | str,
    out: str,
    report: Report | None = None,
    *,
    process: int = 0,
    processes: int = 1,
    retry_skipped: bool = False,
) -> Outcome:
    """Write the maps of a data set to a store, or those that a store still lacks.

    Args:
      source: the data, or a path as `tokentm_jax.data.sources.open_source` takes it.
      out: a local folder, or a URL of gs:// or s3://.
      report: called with (examples finished, examples in all, examples skipped by this run) of this process.
      process, processes: this process writes every chunk whose number has the remainder `process`.
      retry_skipped: compute the chunks again that have an example that was skipped.

    Returns:
      What this process did.

    Raises:
      InputError: a config, model and data set that do not go together, chunks too large for the memory, a store of
        something else, a full disk.
    """
    source = open_source(source) if isinstance(source, str) else source
    config = check(config, source)
    config = dataclasses.replace(config, label_map=read_label_map(config.label_map))
    if config.score is None:
        vit.require_classes()
    translate = _translation(config, vit, source)
    vit = dataclasses.replace(vit, preprocessing=vit.preprocessing.fixed(source))
    store = Store(out, provenance(config, vit, source))
    at_once = min(WRITING, store.at_a_time)
    own = range(process, store.chunks, processes)
    done, damaged = store.finished(own, retry_skipped=retry_skipped)
    todo = sorted(set(own) - set(done))
    count, total = (sum(len(store.rows(c)) for c in chunks) for chunks in (done, own))
    skipped: dict[str, str] = {}
    if report is not None:
        report(count, total, 0)

    indices = [i for chunk in todo for i in store.rows(chunk)]
    stream = batches(source, vit.preprocessing, config.batch_size, config.profile, indices=indices, skipped=skipped)
    writing: deque[Future[None]] = deque()
    with closing(_results(config, vit, translate, stream)) as results, ThreadPoolExecutor(at_once) as pool:
        for chunk in todo:
            rows = store.rows(chunk)
            layout = store.fields.items()
            fields = {n: np.full((len(rows), *shape), FILL[dtype], dtype) for n, (shape, dtype) in layout}
            for start in range(0, len(rows), config.batch_size):
                group = rows[start : start + config.batch_size]
                batch, found = next(results)
                _fill(fields, start, [source.keys[i] for i in group], batch, found, config, skipped)
                count += len(group)
                if report is not None:
                    report(count, total, len(skipped))
            while len(writing) >= at_once:
                writing.popleft().result()
            writing.append(pool.submit(store.write, chunk, fields))
        for future in writing:
            future.result()
    return Outcome(len(own), len(todo), damaged)


def check(config: DatasetConfig, source: Source) -> DatasetConfig:
    """The config, with plain Python values. InputError for a method, option, name or number that does not exist."""
    config = check_fields(config, "the settings")
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise InputError(f"the methods must be different ones, got {','.join(config.methods) or 'none'}")
    for method in config.methods:
        if method not in METHODS:
            raise suggest("method", method, METHODS)
        METHODS[method].bind(method, dict(config.options))
    for kind, value, known in (
        ("target", config.target, TARGETS),
        ("dtype", config.dtype, DTYPES),
        ("profile", config.profile, PROFILES),
    ):
        if value not in known:
            raise suggest(kind, value, known)
    if config.chunk % config.batch_size:
        sizes = f"got {config.chunk} and {config.batch_size}"
        raise InputError(f"the chunk size must be a multiple of the batch size, {sizes}")
    if config.target == "label" and not source.labelled:
        raise InputError(f"{source.name} has no labels to explain; take the target 'predicted'")
    return config


def shapes(config: DatasetConfig, vit: Model, source: Source) -> dict[str, list[int]]:
    """What is stored of one example, where that depends on model, methods and names.

    Compiles nothing. Raises InputError for a method that cannot explain this model.
    """
    inputs, asked = vit.preprocessing.batch(1), _target(config, vit, None)
    found, _ = jax.eval_shape(_program(config, vit), vit.params, inputs, asked)
    width = max(len(key.encode("utf-8", "surrogateescape")) for key in source.keys)
    maps = {f"maps/{method}": [*jax.eval_shape(as_maps, found[method]).shape[1:]] for method in config.methods}
    return {**maps, "logits": [vit.module.num_classes], "key": [max(1, width)]}


def provenance(config: DatasetConfig, vit: Model, source: Source) -> dict[str, Any]:
    """What the maps are of and how they were made. It has no times, so that equal runs give equal bytes."""
    return {
        "format": FORMAT,
        "model": vit.described(),
        "data": {"name": source.name, "identity": source.identity},
        "examples": len(source),
        "keys": digest(*source.keys),
        "classes": digest(vit.class_names, vit.wnids),
        **{name: value for name, value in dataclasses.asdict(config).items() if (name, value) != ("score", None)},
        "methods": list(config.methods),
        "options": dict(config.options),
        "chunk_size": config.chunk,
        **environment(),
        "shapes": shapes(config, vit, source),
    }


def _translation(config: DatasetConfig, vit: Model, source: Source) -> Callable[[np.ndarray], np.ndarray]:
    """From the source's classes to the model's; -1, with a warning, for a class that the model does not have."""
    if config.target == "label" or config.label_map is not None:
        table = translation(vit, source, config.label_map)
    else:  # labels are stored, and nothing depends on them
        table, unknown = known_classes(vit, source)
        if unknown:
            warnings.warn(f"labels are stored as -1 where they are unknown: {unknown}", stacklevel=3)

    def translate(labels: np.ndarray) -> np.ndarray:
        known = labels if table is None else np.where(labels < 0, -1, table[labels])
        return np.where(known < vit.module.num_classes, known, -1).astype(np.int32)

    return translate


# ---- computing ------------------------------------------------------------------------------------------------------


def _program(config: DatasetConfig, vit: Model) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    """(params, pixels, target) -> maps, and logits and target; the logits are those of the first method's own pass."""
    methods = {name: config.options for name in config.methods}
    return compiled(vit.module, methods, details=("logits", "target"), preprocessing=vit.preprocessing)


def _target(config: DatasetConfig, vit: Model, classes: np.ndarray | None) -> Any:
    """What is explained: the classes [B], None for the predicted ones, or the config's score of them."""
    if config.score is None:
        return classes
    asked = question(vit.score(config.score))
    return asked._replace(target=classes) if asked.score.of_class else asked


Found = dict[str, np.ndarray]


def _results(
    config: DatasetConfig, vit: Model, translate: Callable[[np.ndarray], np.ndarray], stream: Iterable[Batch]
) -> Generator[tuple[Batch, Found], None, None]:
    """Every batch with its results on the host.

    The devices take turns. While one batch is fetched and written, each device computes another, and the images after
    that are on their way. An empty batch has no results.
    """
    devices = jax.local_devices()
    params = [jax.device_put(vit.params, device) for device in devices]
    program = _program(config, vit)
    waiting: deque[tuple[Batch, dict[str, Any]]] = deque()
    for number, batch in enumerate(stream):
        turn = number % len(devices)
        found: dict[str, Any] = {}
        if batch.keys:
            labels = translate(batch.labels)
            target = np.maximum(labels, 0) if config.target == "label" else None  # unknown labels are skipped later
            asked = _target(config, vit, target)
            maps, details = program(params[turn], *jax.device_put((batch.inputs, asked), devices[turn]))
            found = {**{f"maps/{name}": as_maps(a) for name, a in maps.items()}, **details}
            if found["target"] is None:
                found["target"] = jnp.full(len(batch.labels), -1, jnp.int32)
            for array in found.values():
                array.copy_to_host_async()
            found["label"] = labels
        waiting.append((batch, found))
        if len(waiting) > len(devices):
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _fetched(batch: Batch, found: Mapping[str, Any]) -> tuple[Batch, Found]:
    """The results on the host; with them the class that is predicted."""
    arrays = {name: np.asarray(array) for name, array in found.items()}
    if arrays:
        arrays["logits"] = arrays["logits"].astype(np.float32)
        arrays["prediction"] = arrays["logits"].argmax(-1)
    return batch, arrays


def _fill(
    fields: dict[str, np.ndarray],
    start: int,
    keys: Sequence[str],
    batch: Batch,
    found: Found,
    config: DatasetConfig,
    skipped: dict[str, str],
) -> None:
    """Put the results of a batch into its chunk, from the row `start` on; `skipped` gets what has no finite maps."""
    place = {key: i for i, key in enumerate(batch.keys)}
    skipped |= {batch.keys[i]: reason for i, reason in _unfit(found, len(place), config).items()}
    rows = [i for i, key in enumerate(keys) if key not in skipped]
    taken = [place[keys[i]] for i in rows]
    into = start + np.array(rows, int)
    for name, array in found.items() if rows else ():
        if name.startswith("maps/"):
            maps, fields[name.replace("maps/", "scale/")][into] = scaled(array[taken], config.dtype)
            fields[name][into] = maps
        else:
            fields[name][into] = array[taken]
    span = slice(start, start + len(keys))
    fields["key"][span] = encode(keys, fields["key"].shape[1])
    fields["reason"][span] = encode([skipped.get(key, "") for key in keys], REASON_BYTES)
    fields["status"][span] = SKIPPED
    fields["status"][into] = DONE


def _unfit(found: Found, count: int, config: DatasetConfig) -> dict[int, str]:
    """Places of the first `count` examples that cannot be stored, and why."""
    reasons: dict[int, str] = {}
    for name, array in found.items():
        if name == "logits" or name.startswith("maps/"):
            finite = np.isfinite(array[:count].astype(np.float32)).reshape(count, -1).all(1)
            what = "the model gives no finite logits" if name == "logits" else f"{name[5:]} gives no finite map"
            reasons |= {i: what for i in np.flatnonzero(~finite).tolist() if i not in reasons}
        if name == "label" and config.target == "label":
            reasons |= {i: "its label is no class of the model" for i in np.flatnonzero(array[:count] < 0).tolist()}
    return reasons
