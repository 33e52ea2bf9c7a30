"""The maps of a data set as a zarr v3 group, on a disk or in the cloud, written chunk by chunk through TensorStore.

    zarr.json                    the provenance, under attributes.tokentm
    maps/<method>                [n, gh, gw] or [n, H, W], each map divided by its scale
    scale/<method>               [n] float32, powers of two: the method's own map is maps * scale
    logits                       [n, classes] float32
    label, prediction, target    [n] int32 classes of the model, -1 where unknown
    key, reason                  [n, bytes] uint8: UTF-8 filled up with zeros
    status                       [n] uint8: 0 not done, 1 done, 2 skipped (maps and logits NaN, and a reason)

A chunk is the same `chunk_size` examples in every array, and the unit of work. Each of its files has a checksum and
is replaced as a whole; `status` is written when all others are on the disk.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from tokentm_jax.errors import InputError

OPEN, DONE, SKIPPED = 0, 1, 2
DTYPES = ("float16", "float32")
REASON_BYTES = 200
FILL: dict[str, Any] = {"float16": np.nan, "float32": np.nan, "int32": -1, "uint8": 0}
_GROUPS = ("maps", "scale")
_READERS = 8  # chunks checked at a time
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 3}},
    {"name": "crc32c"},
]
_CONTEXT = ts.Context()  # one for all, so that what "memory://" holds stays

Arrays = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape for one example, type)


def _kvstore(path: str | os.PathLike[str]) -> dict[str, Any]:
    """TensorStore's description of a folder: a local path, or a URL such as gs://bucket/maps."""
    if "://" not in str(path):
        return {"driver": "file", "path": f"{Path(path).resolve()}/"}
    spec = ts.KvStore.Spec(f"{str(path).rstrip('/')}/").to_json()
    return {"path": "", **spec}


def _reason(error: Exception) -> str:
    """The cause alone, of an error of TensorStore, whose text also has specs and transforms."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else " ".join(str(error).split(" [")[0].split())[:200]


def encode(texts: Sequence[str], width: int) -> np.ndarray:
    """Texts -> uint8 [n, width], cut off and filled up with zeros."""
    cut = [text.encode("utf-8", "surrogateescape")[:width] for text in texts]
    return np.array(cut, f"S{width}").view(np.uint8).reshape(len(texts), width)


def decode(array: np.ndarray) -> list[str]:
    """uint8 [n, width] -> texts."""
    found = np.ascontiguousarray(array).view(f"S{array.shape[1]}").ravel()
    return [text.decode("utf-8", "surrogateescape") for text in found.tolist()]


def scaled(maps: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Maps [n, h, w] -> what is stored of them and the scale [n] to multiply it with.

    float32 is stored as it is. For float16, whose range some methods leave by orders of magnitude, each map is divided
    by the power of two that brings its largest value into [1, 2); that alone rounds nothing.
    """
    maps = maps.astype(np.float32)
    largest = np.abs(maps).max((1, 2), initial=0)
    scale = np.ones_like(largest)
    if dtype == "float16":
        good = np.isfinite(largest) & (largest > 0)
        scale[good] = np.ldexp(np.float32(1), np.frexp(largest[good])[1] - 1)
    return (maps / scale[:, None, None]).astype(dtype), scale


# ---- writing --------------------------------------------------------------------------------------------------------


class Store:
    """A store to write into. InputError for one that holds something else, or that cannot be written.

    Args:
      path: a local folder, or any URL that TensorStore knows.
      provenance: what the maps are of; with `chunk_size` and `data.examples`. Equal provenance, equal bytes.
      arrays: name -> (shape for one example, type).
    """

    def __init__(self, path: str | os.PathLike[str], provenance: Mapping[str, Any], arrays: Arrays) -> None:
        self.path, self.shapes = str(path), arrays
        self.count, self.chunk_size = provenance["data"]["examples"], provenance["chunk_size"]
        self._leftovers: dict[int, list[str]] = {}
        if Path(path).is_file():
            raise InputError(f"{self.path} is a file; the maps go to a folder")
        try:
            base = _kvstore(path)
            self._files = ts.KvStore.open(base, context=_CONTEXT).result()
            # Listed before the root is read: another process that starts now writes the root first.
            self._listed = {key.decode(errors="surrogateescape") for key in self._files.list().result()}
            self._claim(provenance)
            self._drop_locks(base)
            self.arrays = {name: self._create(base, name, *spec) for name, spec in arrays.items()}
        except InputError:
            raise
        except Exception as error:  # TensorStore's errors have no common type
            raise InputError(f"the store {self.path} cannot be written: {_reason(error)}") from None

    def _claim(self, provenance: Mapping[str, Any]) -> None:
        root = self._files.read("zarr.json").result()
        if root.state == "missing":
            if self._listed:
                raise InputError(f"{self.path} is not empty and holds no maps; choose another --out")
            group: dict[str, Any] = {"zarr_format": 3, "node_type": "group"}
            content = json.dumps({**group, "attributes": {"tokentm": provenance}}, indent=1, sort_keys=True)
            self._files.write("zarr.json", content, if_equal=root.stamp.generation).result()
            root = self._files.read("zarr.json").result()
        found = _provenance(root.value, self.path)
        wanted, made = _terms(provenance), _terms(found)
        for what, (identity, text) in wanted.items():
            if made[what][0] != identity:
                other = f"of {what} {made[what][1]}, and this command has {text}"
                raise InputError(f"{self.path} holds maps {other}; choose another --out")
        for name in _GROUPS:
            if f"{name}/zarr.json" not in self._listed:
                group = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
                self._files.write(f"{name}/zarr.json", json.dumps(group, indent=1, sort_keys=True)).result()

    def _drop_locks(self, base: Mapping[str, Any]) -> None:
        """Remove the half-written files of processes that were killed.

        TensorStore's local files are written as NAME.__lock and renamed. A deletion whose condition does not hold
        removes a leftover, and waits where another process holds the lock.
        """
        if base["driver"] != "file":
            return
        folder = Path(base["path"])
        for lock in folder.rglob("*.__lock"):
            key = lock.relative_to(folder).as_posix().removesuffix(".__lock")
            self._files.write(key, None, if_equal=b"none").result()

    def _create(self, base: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: str) -> ts.TensorStore:
        fill = "NaN" if dtype.startswith("float") else FILL[dtype]
        spec = {
            "driver": "zarr3",
            "kvstore": {**base, "path": f"{base['path']}{name}/"},
            "metadata": {
                "shape": [self.count, *shape],
                "data_type": dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk_size, *shape]}},
                "codecs": _CODECS,
                "fill_value": fill,
            },
            "store_data_equal_to_fill_value": True,  # else a file that is lost would read as a finished one
        }
        try:
            return ts.open(spec, create=True, open=True, context=_CONTEXT).result()
        except Exception as error:
            if f"{name}/zarr.json" not in self._listed:
                raise
            where = f"{self.path}/{name}/zarr.json"
            raise InputError(
                f"{where} is damaged ({_reason(error)}): remove that file, and the same command writes it again"
            ) from None

    @property
    def chunks(self) -> int:
        return -(-self.count // self.chunk_size)

    def rows(self, chunk: int) -> range:
        """The examples of a chunk."""
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, self.count))

    def _keys(self, chunk: int) -> list[str]:
        return [f"{name}/c/{chunk}" + "/0" * len(shape) for name, (shape, _) in self.shapes.items()]

    def finished(self, chunks: Iterable[int], *, retry_skipped: bool = False) -> tuple[list[int], list[int]]:
        """Those of the chunks whose files are all there and pass their checksums, and those that are damaged.

        Everything is read. With `retry_skipped`, a chunk that has a skipped example does not count as finished.
        """
        chunks = list(chunks)
        with ThreadPoolExecutor(_READERS) as pool:
            states = dict(zip(chunks, pool.map(self._status, chunks), strict=True))
        done = [c for c, s in states.items() if s is not None and (s == DONE if retry_skipped else s != OPEN).all()]
        for chunk in set(chunks) - set(done):
            self._leftovers[chunk] = [key for key in self._keys(chunk) if key in self._listed]
        ended = [c for c in chunks if f"status/c/{c}" in self._listed]  # `status` is written last
        return done, [c for c in ended if states[c] is None]

    def _status(self, chunk: int) -> np.ndarray | None:
        """Status [rows] of a chunk; None unless all of its files are there and can be read."""
        if not self._listed.issuperset(self._keys(chunk)):
            return None
        rows = self.rows(chunk)
        reads = {name: array[rows.start : rows.stop].read() for name, array in self.arrays.items()}
        try:
            return np.asarray({name: read.result() for name, read in reads.items()}["status"])
        except Exception:  # another checksum, cut off, unreadable: all are computed again
            return None

    def write(self, chunk: int, fields: Mapping[str, np.ndarray]) -> None:
        """Write a chunk and wait until it is on the disk. InputError with the reason when it cannot be written."""
        rows = self.rows(chunk)
        try:
            for key in self._leftovers.pop(chunk, []):  # TensorStore would read a damaged file before it writes
                self._files.write(key, None).result()
            writes = [
                self.arrays[name][rows.start : rows.stop].write(field)
                for name, field in fields.items()
                if name != "status"
            ]
            for write in writes:
                write.result()
            self.arrays["status"][rows.start : rows.stop].write(fields["status"]).result()
        except Exception as error:
            kept = "what was finished is kept, and the same command goes on from there"
            raise InputError(f"the store {self.path} cannot be written: {_reason(error)}; {kept}") from None


def _provenance(content: bytes, path: str) -> dict[str, Any]:
    try:
        found = json.loads(content)["attributes"]["tokentm"]
        _terms(found)
        return found
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} holds no maps of `tokentm dataset`: its zarr.json says something else") from None


def _terms(provenance: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """What may not differ: name -> (to compare, to show). The first that differs is told."""
    model, data, versions = provenance["model"], provenance["data"], provenance["versions"]
    terms = {
        "the model": (model["identity"], f"{model['name']} ({model['identity']})"),
        "the data set": (data["identity"], f"{data['name']} ({data['identity']})"),
        "the examples": (data["keys"], f"{data['examples']} ({data['keys']})"),
        "the methods": (provenance["methods"], ",".join(provenance["methods"])),
        "the options": (provenance["options"], json.dumps(provenance["options"], sort_keys=True)),
    }
    for name in ("target", "dtype", "profile", "batch_size", "chunk_size", "device"):
        terms[f"the {name.replace('_', ' ')}"] = (provenance[name], str(provenance[name]))
    return terms | {name: (found, str(found)) for name, found in sorted(versions.items())}


# ---- reading --------------------------------------------------------------------------------------------------------


class LazyArray:
    """An array of a store that is read where it is indexed: numpy's indexing, the example axis first."""

    def __init__(self, path: str, array: ts.TensorStore) -> None:
        self.path, self.tensorstore = path, array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype[Any] = np.dtype(array.dtype.numpy_dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        if first is Ellipsis:
            first, rest = slice(None), [first, *rest]
        rows = np.arange(len(self))[first]
        try:
            found = np.asarray(self.tensorstore[rows].read().result())
        except Exception as error:
            again = "run the same `tokentm dataset` command again, and it is computed anew"
            raise InputError(f"{self.path} cannot be read ({_reason(error)}): {again}") from None
        return found[(slice(None),) * np.ndim(rows) + tuple(rest)] if rest else found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __repr__(self) -> str:
        return f"LazyArray({self.path!r}, shape={self.shape}, dtype={self.dtype})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Maps:
    """A data set's maps, from `open_maps`. The arrays are read where they are indexed.

    `maps[method]` [n, gh, gw] or [n, H, W] is what is stored: each map divided by its `scale[method]` [n]. `read`
    gives the method's own values. `logits` [n, classes], `label`, `prediction` and `target` [n] are classes of the
    model, -1 where unknown; `status` [n] is 0 where not done, 1 done, 2 skipped.
    """

    path: str
    provenance: Mapping[str, Any]
    maps: Mapping[str, LazyArray]
    scale: Mapping[str, LazyArray]
    logits: LazyArray
    label: LazyArray
    prediction: LazyArray
    target: LazyArray
    status: LazyArray
    key: LazyArray
    reason: LazyArray

    def __len__(self) -> int:
        return len(self.status)

    def read(self, method: str, index: Any = slice(None)) -> np.ndarray:
        """The method's own maps of those examples, float32. Raises InputError for a damaged chunk."""
        scale = np.asarray(self.scale[method][index])
        return self.maps[method][index].astype(np.float32) * scale[..., None, None]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The name of every example in its data set, "" where not done."""
        return tuple(decode(self.key[:]))

    @cached_property
    def skipped(self) -> dict[str, str]:
        """The examples that could not be explained, and why."""
        rows = np.flatnonzero(self.status[:] == SKIPPED)
        return dict(zip((self.keys[i] for i in rows), decode(self.reason[rows]), strict=True))

    @cached_property
    def missing(self) -> int:
        """How many chunks are not finished."""
        rows = np.flatnonzero(self.status[:] == OPEN)
        return len(np.unique(rows // self.provenance["chunk_size"]))

    def find(
        self, method: str, options: Mapping[str, Any], wanted: Iterable[tuple[str, int | None]]
    ) -> tuple[list[int], np.ndarray]:
        """Which of (key, explained class or None for any) are stored, and the method's own maps of those [k, ...]."""
        made = self.provenance["options"]
        if method not in self.maps or json.dumps(dict(options), sort_keys=True) != json.dumps(made, sort_keys=True):
            return [], np.empty((0, 1, 1), np.float32)
        rows: dict[int, int] = {}
        for i, (key, explained) in enumerate(wanted):
            row, target = self._places.get(key, (-1, -1))
            if row >= 0 and explained in (None, target):
                rows[i] = row
        return list(rows), self.read(method, np.array(list(rows.values()), int))

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Key -> (row, explained class) of what is done."""
        targets = self.target[:].tolist()
        return {self.keys[i]: (i, targets[i]) for i in np.flatnonzero(self.status[:] == DONE).tolist()}

    def __repr__(self) -> str:
        made, status = self.provenance, self.status[:]
        counts = [f"{len(self)} examples", f"{(status == DONE).sum()} done", f"{(status == SKIPPED).sum()} skipped"]
        chunks = -(-len(self) // made["chunk_size"])
        counts.append(f"{self.missing} of {chunks} chunks missing" if self.missing else "complete")
        shapes = ", ".join(f"{name} {list(array.shape[1:])}" for name, array in self.maps.items())
        return (
            f"{self.path}: {', '.join(counts)}\n"
            f"{made['model']['name']} on {made['data']['name']}, target {made['target']}\n"
            f"{made['dtype']} maps: {shapes}"
        )


def open_maps(path: str | os.PathLike[str]) -> Maps:
    """Open the maps that `tokentm dataset` has written; nothing but their descriptions is read.

    Args:
      path: a local folder, or a URL such as gs://bucket/maps.

    Raises:
      InputError: nothing there, something else, or a damaged description.
    """
    try:
        base = _kvstore(path)
        root = ts.KvStore.open(base, context=_CONTEXT).result().read("zarr.json").result()
    except Exception as error:
        raise InputError(f"the store {path} cannot be read: {_reason(error)}") from None
    if root.state == "missing":
        raise InputError(f"{path} holds no maps; `tokentm dataset` makes them")
    provenance = _provenance(root.value, str(path))

    def array(name: str) -> LazyArray:
        spec = {"driver": "zarr3", "kvstore": {**base, "path": f"{base['path']}{name}/"}}
        where = f"{str(path).rstrip('/')}/{name}"
        try:
            return LazyArray(where, ts.open(spec, open=True, read=True, context=_CONTEXT).result())
        except Exception as error:
            again = "run the same `tokentm dataset` command again"
            raise InputError(f"{where}/zarr.json cannot be read ({_reason(error)}): {again}") from None

    maps, scale = ({m: array(f"{group}/{m}") for m in provenance["methods"]} for group in _GROUPS)
    plain = ("logits", "label", "prediction", "target", "status", "key", "reason")
    return Maps(str(path), provenance, maps, scale, *map(array, plain))
