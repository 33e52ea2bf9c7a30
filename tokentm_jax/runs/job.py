"""The store of a job: `begin` makes or checks it, and `run_shard` explains one of its shards."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from typing import Any

from tokentm_jax.data.examples import Source
from tokentm_jax.data.labels import read_label_map
from tokentm_jax.data.shards import Shard, find_shards, kind_of_shards, slices
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.identity import digest, environment, require_same
from tokentm_jax.models.classes import known_classes, translation
from tokentm_jax.runs import store as stores
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.pipeline import run_shards
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import GROUP, PartName, Store, store_at, understood

SLICES = 10_000  # of a source at most, unless a size is given


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
        what = explainer.described()
        columns = {name: {"shape": shape, "dtype": kind} for name, (shape, kind) in explainer.layout().items()}
        made = {"format": stores.FORMAT, **what, "explainer": digest(what), **environment(), "columns": columns}
        made |= _listed(data, spec, shards, size)  # no times: equal runs give equal bytes
        place.write(stores.ROOT, lambda path: path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))
        content = place.read(stores.ROOT) or b""
    made = understood(content, place.path)
    store, explainer = _joined(explainer, Store(place, made, []))
    if data is not None:
        size = made.get("shard_size", size) if shard_size is None else size
        now = _listed(data, spec, [], size)
        require_same(place.path, made, {name: now[name] for name in ("data", "examples", "keys", "shard_size")})
    elif spec != made["data"]["spec"]:
        earlier = f"{place.path} was made with data {made['data']['spec']}"
        raise InputError(f"{earlier}, and this command has {spec}; choose another --out")
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


def _joined(explainer: Explainer, store: Store) -> tuple[Store, Explainer]:
    """The explainer of a store, with the store's length of texts. InputError if it computes something else."""
    made = store.made
    if explainer.length is None and made.get("length") is not None:
        explainer = dataclasses.replace(explainer, length=made["length"])
    wanted = json.loads(json.dumps({**explainer.described(), **environment()}))
    made = {"mixed_precision": False, **made}  # an earlier version had no other precision
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


def run_shard(explainer: Explainer, shard: Shard, out: str) -> PartName:
    """Explain one shard and write its part to a store that `begin` made. A function of its arguments only.

    Returns:
      The name of the part, with its numbers of examples and of skipped ones.

    Raises:
      InputError: a shard that has changed or cannot be read, a store of something else, a full disk.
    """
    store, explainer = _store_of(explainer, out)
    (part,) = (step for step in run_shards(explainer, [shard], store) if isinstance(step, PartName))
    return part


def _store_of(explainer: Explainer, out: str) -> tuple[Store, Explainer]:
    """The store that `begin` made, read once for an explainer."""
    known = explainer.__dict__.setdefault("_stores", {})  # not pickled
    if out not in known:
        known[out] = _joined(explainer, store_at(Place(out)))
    return known[out]
