"""The maps of a data set as a zarr v3 group, on a disk or in the cloud, written chunk by chunk through TensorStore.

    zarr.json                    the provenance, under attributes.tokentm
    maps/<method>                [n, gh, gw] or [n, H, W], each map divided by its scale
    scale/<method>               [n] float32, powers of two: the method's own map is maps * scale
    logits                       [n, classes] float32
    label, prediction, target    [n] int32 classes of the model, -1 where unknown
    key, reason                  [n, bytes] uint8: UTF-8 filled up with zeros
    checksum                     [n, arrays] uint32: CRC-32 of the example's bytes in each of the other arrays
    status                       [n] uint8: 0 not done, 1 done, 2 skipped (maps and logits NaN, and a reason)

A chunk is the same `chunk_size` examples in every array, and the unit of work. Each of its files has a checksum and
is replaced as a whole; `status` is written when all others are on the disk, and removed before any of them is.

Nothing that is read is trusted. The provenance has the type and shape of every array, and an array that differs is
refused. If the `status` of an example is done, the file of every array that is read must exist and hold what was
written: its own checksum detects a file that is cut off or altered, and `checksum` one of another example. If it is
not done, no file is read, and the values are NaN, -1 or 0.
"""

import dataclasses
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args
from zlib import crc32

import numpy as np
from annotated_types import Interval, MaxLen, MinLen
from pydantic import StringConstraints

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import as_path, opened, read_bytes, reason, size_of
from tokentm_jax.identity import require_same
from tokentm_jax.validation import checked

FORMAT = 2  # of the layout above; the first had no `checksum`, and its provenance no shapes
OPEN, DONE, SKIPPED = 0, 1, 2
Dtype = Literal["float32", "float16"]  # of the maps
DTYPES: tuple[str, ...] = get_args(Dtype)
BatchSize = Annotated[int, Interval(ge=1, le=4096)]
ChunkSize = Annotated[int, Interval(ge=1, le=65536)]
REASON_BYTES = 200
FILL: dict[str, Any] = {"float16": np.nan, "float32": np.nan, "int32": -1, "uint32": 0, "uint8": 0}
LARGEST_CHUNK = 2**29  # bytes of a chunk, all arrays together
SCHEMES = ("gs", "s3", "memory", "file")
ANSWER = 6.0  # seconds that a store may take to answer when it is opened; the variable WAIT sets another number
WAIT = "TOKENTM_STORE_WAIT"
_IN_MEMORY = 2**30  # bytes of the chunks that are filled, written or checked at a time
_GROUPS = ("maps", "scale")
_READERS = 8  # chunks checked at a time
_LARGEST_DESCRIPTION = 2**24  # bytes of a zarr.json
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 3}},
    {"name": "crc32c"},
]
_AGAIN = "run the same `tokentm dataset` command again"

Arrays = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape for one example, type)


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
    by the power of two that brings its largest value into [1, 2); which rounds nothing.
    """
    maps = maps.astype(np.float32)
    largest = np.abs(maps).max((1, 2), initial=0)
    scale = np.ones_like(largest)
    if dtype == "float16":
        good = np.isfinite(largest) & (largest > 0)
        scale[good] = np.ldexp(np.float32(1), np.frexp(largest[good])[1] - 1)
    return (maps / scale[:, None, None]).astype(dtype), scale


def checksums(array: np.ndarray) -> np.ndarray:
    """[n, ...] -> CRC-32 of the bytes of each example, uint32 [n]."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    width = flat.size // max(1, len(array))
    return np.array([crc32(flat.data[i : i + width]) for i in range(0, flat.size, width or 1)], np.uint32)


# ---- the provenance -------------------------------------------------------------------------------------------------

_METHOD = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,99}$")]  # it names a folder
_SHAPE = Annotated[list[Annotated[int, Interval(ge=1, le=2**30)]], MinLen(1), MaxLen(2)]
_FIELDS: dict[str, Any] = {
    "model.name": str,
    "model.identity": str,
    "data.name": str,
    "data.identity": str,
    "examples": Annotated[int, Interval(ge=1, le=2**26)],
    "keys": str,
    "methods": Annotated[list[_METHOD], MinLen(1)],
    "options": dict[str, bool | int | float | str | None],
    "target": str,
    "dtype": Dtype,
    "profile": str,
    "batch_size": BatchSize,
    "chunk_size": ChunkSize,
    "device": str,
    "versions": dict[str, str],
    "shapes": dict[str, _SHAPE],
}


def _check(where: str, provenance: Mapping[str, Any]) -> None:
    """InputError that names the missing or wrong field, or a chunk that is too large."""
    for name, annotation in _FIELDS.items():
        value: Any = provenance
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise InputError(f"{where}: {name!r} is missing")
            value = value[part]
        checked(f"{where}: {name!r}", annotation, value)
    methods = provenance["methods"]
    ranks = {**{f"maps/{method}": 2 for method in methods}, "logits": 1, "key": 1}
    if {name: len(shape) for name, shape in provenance["shapes"].items()} != ranks or len(ranks) < len(methods) + 2:
        raise InputError(f"{where}: 'shapes' must be those of {', '.join(ranks)}, got {provenance['shapes']}")
    if chunk_bytes(provenance) > LARGEST_CHUNK:
        count, one = provenance["chunk_size"], chunk_bytes(provenance) // provenance["chunk_size"]
        takes = f"a chunk of {count} examples takes {count * one / 2**20:.0f} MiB of memory"
        fits = f"choose a chunk size of at most {LARGEST_CHUNK // one}" if one <= LARGEST_CHUNK else "store less"
        raise InputError(f"{where}: {takes}, and {LARGEST_CHUNK / 2**20:.0f} MiB is the limit; {fits}")


def arrays_of(provenance: Mapping[str, Any]) -> Arrays:
    """The arrays of a store, in the order in which their files come to be: `status` is the last."""
    shapes = {name: tuple(shape) for name, shape in provenance["shapes"].items()}
    arrays: dict[str, tuple[tuple[int, ...], str]] = {
        **{f"maps/{method}": (shapes[f"maps/{method}"], provenance["dtype"]) for method in provenance["methods"]},
        **{f"scale/{method}": ((), "float32") for method in provenance["methods"]},
        "logits": (shapes["logits"], "float32"),
        **{name: ((), "int32") for name in ("label", "prediction", "target")},
        "key": (shapes["key"], "uint8"),
        "reason": ((REASON_BYTES,), "uint8"),
    }
    return {**arrays, "checksum": ((len(arrays) + 1,), "uint32"), "status": ((), "uint8")}


def chunk_bytes(provenance: Mapping[str, Any]) -> int:
    """Bytes that a chunk takes in memory, in all arrays."""
    arrays = arrays_of(provenance).values()
    return provenance["chunk_size"] * sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def _understood(content: bytes, path: str) -> dict[str, Any]:
    """The provenance in a zarr.json. InputError for one of another program or layout, or with a wrong field."""
    try:
        found = json.loads(content)["attributes"]["tokentm"]
        layout = found.get("format", 1)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no maps of `tokentm dataset`: its zarr.json has something else") from None
    if layout != FORMAT:
        number = layout if isinstance(layout, int) else "of another kind"
        raise InputError(f"{path} has the layout {number}, and this version has {FORMAT}: make it again")
    _check(f"{path}/zarr.json", found)
    return found


def _terms(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What may not differ; the versions one by one, so that the first that differs is told."""
    plain = {name: value for name, value in provenance.items() if name not in ("format", "versions")}
    return {**plain, **provenance["versions"]}


# ---- the files ------------------------------------------------------------------------------------------------------


def _reason(error: Exception) -> str:
    """Only the cause of an error of TensorStore, whose text also has specs and transforms."""
    if isinstance(error, TimeoutError):
        return f"no answer in {_patience():g} s; the environment variable {WAIT} sets the seconds to wait"
    if isinstance(error, OSError):
        return reason(error)
    number = re.search(r"os_error_code='(\d+)'", str(error))
    text = str(error).split(" [")[0].rsplit('"zarr3" driver: ')[-1]
    return os.strerror(int(number[1])) if number else " ".join(text.split())[:400] or type(error).__name__


def _patience() -> float:
    """Seconds that a store may take to answer when it is opened."""
    given = os.environ.get(WAIT, "").strip()
    try:
        seconds = float(given) if given else ANSWER
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86400:
        raise InputError(f"the environment variable {WAIT} must be a number of seconds up to 86400, got {given!r:.80}")
    return seconds


@cache
def _tensorstore() -> tuple[Any, Any]:
    """TensorStore, and one context for all stores, so that what "memory://" holds stays."""
    library = require("tensorstore", "stores", "a store of maps")
    return library, library.Context()


def _kvstore(path: str) -> dict[str, Any]:
    """TensorStore's description of a folder or URL. InputError for what is neither, or has none of the `SCHEMES`."""
    scheme, separator, place = path.partition("://")
    if path.partition(":")[0] in SCHEMES and not place.strip("/"):  # also s3:/maps, which pathlib makes of s3://maps
        raise InputError(f"{path} names no store: a URL is written as {path.partition(':')[0]}://BUCKET/NAME")
    if not separator:
        return {"driver": "file", "path": f"{os.path.abspath(path)}/"}
    try:
        spec = _tensorstore()[0].KvStore.Spec(f"{path}/").to_json() if scheme in SCHEMES else {}
    except ValueError as error:
        raise InputError(f"the store {path} cannot be opened: {_reason(error)}") from None
    if spec.get("driver") not in ("gcs", "s3", "memory", "file"):  # also for a chain, such as file:///a.zip|zip:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(f"{path} has an unsupported URL scheme: a store is a folder, or a URL of {known}")
    return {"path": "", **spec}


class _Place:
    """Where a store is. InputError for what is no folder or URL, or does not answer.

    TensorStore waits for pipes, reads a file of any size, and may crash over JSON that is nested without end: what it
    is to read of a folder is looked at before.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        as_path(path, "a store of maps")
        self.path = os.fspath(path).rstrip("/") or os.fspath(path)
        self.kvstore = _kvstore(self.path)
        self.folder = Path(self.kvstore["path"]) if self.kvstore["driver"] == "file" else None
        try:
            if self.folder is not None and not stat.S_ISDIR(os.stat(self.folder).st_mode):
                raise InputError(f"{self.path} is a file; the maps are in a folder")
        except FileNotFoundError:
            pass  # it may be made
        except (OSError, ValueError) as error:
            raise InputError(f"the store {self.path} cannot be opened: {reason(error)}") from None
        try:
            library, context = _tensorstore()
            self.files = library.KvStore.open(self.kvstore, context=context).result(timeout=_patience())
        except InputError:
            raise
        except Exception as error:  # TensorStore's errors have no common type
            raise InputError(f"the store {self.path} cannot be opened: {_reason(error)}") from None

    def description(self, name: str) -> bytes | None:
        """A zarr.json, None without one. InputError for one that cannot be read, is too large or is not JSON."""
        if self.folder is None:
            found = self.files.read(name).result(timeout=_patience())
            content = None if found.state == "missing" else found.value
        else:
            try:
                os.lstat(self.folder / name)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise InputError(f"{self.path}/{name} cannot be read: {reason(error)}") from None
            content = read_bytes(self.folder / name, _LARGEST_DESCRIPTION)
        try:
            json.loads(content or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}/{name} is not valid JSON ({reason(error)})") from None
        return content

    def is_empty(self) -> bool:
        """Whether nothing is there; a half-written first file, of a process at work or killed, is nothing."""
        if self.folder is None:
            return not self.files.list().result(timeout=_patience())
        return not self.folder.exists() or set(os.listdir(self.folder)) <= {"zarr.json.__lock"}


class _Arrays:
    """The open arrays of a store. With `create`, those that are not there are made.

    InputError for an array whose zarr.json differs from the provenance.
    """

    def __init__(self, place: _Place, provenance: Mapping[str, Any], *, create: bool = False) -> None:
        self.place, self.shapes = place, arrays_of(provenance)
        self.count, self.chunk_size = provenance["examples"], provenance["chunk_size"]
        self.summed = [name for name in self.shapes if name != "checksum"]  # by the columns of `checksum`
        # Memory for the chunks at work, besides one that is being filled or given back.
        self.at_a_time = max(1, _IN_MEMORY // chunk_bytes(provenance) - 1)
        self.opened = {name: self._open(name, create) for name in self.shapes}

    def _open(self, name: str, create: bool) -> Any:
        shape, dtype = self.shapes[name]
        spec = {
            "driver": "zarr3",
            "kvstore": {**self.place.kvstore, "path": f"{self.place.kvstore['path']}{name}/"},
            "metadata": {
                "shape": [self.count, *shape],
                "data_type": dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk_size, *shape]}},
                "chunk_key_encoding": {"name": "default"},
                "codecs": _CODECS,
                "fill_value": "NaN" if dtype.startswith("float") else FILL[dtype],
            },
            # Every chunk that is written has a file, whatever it holds, and one that has none is an error.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": name == "status",
        }
        file, found = f"{name}/zarr.json", None
        try:
            found = self.place.description(file)
            if found is None and not create:
                raise InputError("it does not exist")
            mode: dict[str, Any] = {"create": True} if create else {"read": True}
            library, context = _tensorstore()
            return library.open(spec, open=True, **mode, context=context).result(timeout=_patience())
        except Exception as error:
            if found is None and not isinstance(error, InputError):
                raise
            cause = error if isinstance(error, InputError) else _reason(error)
            file = f"{self.place.path}/{file}"
            if create:
                mend = "remove that file, and the same command writes it again"
                raise InputError(f"{file} is damaged ({cause}): {mend}") from None
            raise InputError(f"{file} cannot be read ({cause}): {_AGAIN}") from None

    def key(self, name: str, chunk: int) -> str:
        """The file of a chunk."""
        return f"{name}/c/{chunk}" + "/0" * len(self.shapes[name][0])

    def read(self, names: Iterable[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Those rows [k] of some arrays, by name; fill values for the examples that are not done.

        Raises InputError for a file that should be there and is not, is damaged, or is not what was written there.
        """
        status = self._load(["status"], rows)["status"]
        done = np.flatnonzero(status != OPEN)
        found = self._load([*(name for name in names if name != "status"), "checksum"], rows[done])
        sums, found["status"] = found.pop("checksum"), status[done]
        for name, values in found.items():
            other = np.flatnonzero(checksums(values) != sums[:, self.summed.index(name)])
            if len(other):
                file = self.key(name, rows[done][other[0]] // self.chunk_size)
                self._refuse(name, f"{file} is not what was written there")
        return {name: self._spread(name, found[name], done, len(rows)) for name in names}

    def _spread(self, name: str, values: np.ndarray, done: np.ndarray, count: int) -> np.ndarray:
        """The values at the places that are done, and fill values at the others."""
        if len(done) == count:
            return values
        shape, dtype = self.shapes[name]
        whole = np.full((count, *shape), FILL[dtype], dtype)
        whole[done] = values
        return whole

    def _load(self, names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Those rows of the files, which must all be there; where `status` has no file, it is 0."""
        if not len(rows):
            return {name: np.empty((0, *shape), dtype) for name in names for shape, dtype in [self.shapes[name]]}
        self._look(names, np.unique(rows // self.chunk_size))
        contiguous = rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
        index = slice(rows[0], rows[-1] + 1) if contiguous else rows
        reads = {name: self.opened[name][index].read() for name in names}
        found = {}
        for name, read in reads.items():
            try:
                found[name] = np.asarray(read.result())
            except Exception as error:
                self._refuse(name, _reason(error))
        return found

    def _look(self, names: Iterable[str], chunks: np.ndarray) -> None:
        if self.place.folder is None:
            return
        for name in names:
            for chunk in chunks.tolist():
                file = self.place.folder / self.key(name, chunk)
                if name == "status" and not os.path.lexists(file):
                    continue
                try:
                    with opened(file) as chunk_file:
                        if size_of(chunk_file) > self._largest(name):
                            raise InputError(f"{file} is larger than a chunk can be")
                except InputError as error:
                    self._refuse(name, str(error))

    def _largest(self, name: str) -> int:
        """Bytes that the file of a chunk may have: zstd adds little to what it cannot compress."""
        shape, dtype = self.shapes[name]
        return self.chunk_size * math.prod(shape) * np.dtype(dtype).itemsize * 102 // 100 + 65536

    def _refuse(self, name: str, cause: str) -> NoReturn:
        where = f"{self.place.path}/{name}"
        raise InputError(f"{where} cannot be read ({cause}): {_AGAIN}, and it is computed again") from None


# ---- writing --------------------------------------------------------------------------------------------------------


class Store:
    """A store to write into. InputError for one that holds something else, or that cannot be written.

    Args:
      path: a local folder, or a URL of gs://, s3:// or memory://.
      provenance: what the maps are of, with all that `open_maps` needs. Equal provenance, equal bytes.
    """

    def __init__(self, path: str | os.PathLike[str], provenance: Mapping[str, Any]) -> None:
        self._place = _Place(path)
        self.path = self._place.path
        _check(f"the store {self.path}", provenance)
        self._leftovers: dict[int, list[str]] = {}
        try:
            self._claim(json.loads(json.dumps(provenance)))
            self._drop_locks()
            # Listed after the root is there: nothing else of a store is written before it.
            self._listed = {key.decode(errors="surrogateescape") for key in self._place.files.list().result()}
            self._refuse_foreign(provenance)
            for name in _GROUPS:
                if f"{name}/zarr.json" not in self._listed:
                    self._place.files.write(f"{name}/zarr.json", _group({})).result()
            self._arrays = _Arrays(self._place, provenance, create=True)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the store {self.path} cannot be written: {_reason(error)}") from None
        self.count, self.chunk_size = self._arrays.count, self._arrays.chunk_size
        self.fields: Arrays = {name: self._arrays.shapes[name] for name in self._arrays.summed}
        self.at_a_time = self._arrays.at_a_time

    def _claim(self, provenance: Mapping[str, Any]) -> None:
        """Write the root where nothing is; or make sure that the existing one is equal."""
        place = self._place
        content = place.description("zarr.json")
        if content is None:
            empty = place.is_empty()
            root = place.files.read("zarr.json").result(timeout=_patience())
            if root.state == "missing" and not empty:
                raise InputError(f"{self.path} is not empty and holds no maps; choose another --out")
            if root.state == "missing":  # of several processes that start, one writes it
                made = _group({"tokentm": provenance})
                place.files.write("zarr.json", made, if_equal=root.stamp.generation).result()
            content = place.description("zarr.json")
        require_same(self.path, _terms(_understood(content or b"", self.path)), _terms(provenance))

    def _drop_locks(self) -> None:
        """Remove the half-written files of processes that were killed.

        TensorStore's local files are written as NAME.__lock and renamed. A deletion whose condition does not hold
        removes a leftover, and waits where another process holds the lock.
        """
        folder = self._place.folder
        if folder is None:
            return
        for lock in folder.rglob("*.__lock"):
            key = lock.relative_to(folder).as_posix().removesuffix(".__lock")
            self._place.files.write(key, None, if_equal=b"none").result()

    def _refuse_foreign(self, provenance: Mapping[str, Any]) -> None:
        """InputError for an array or group that is not of this store."""
        known = {"zarr.json", *(f"{name}/zarr.json" for name in (*_GROUPS, *arrays_of(provenance)))}
        foreign = sorted(key for key in self._listed - known if key.rpartition("/")[2] == "zarr.json")
        if foreign:
            raise InputError(f"{self.path}/{foreign[0]} is no part of this store; remove it, or choose another --out")

    @property
    def chunks(self) -> int:
        return -(-self.count // self.chunk_size)

    def rows(self, chunk: int) -> range:
        """The examples of a chunk."""
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, self.count))

    def _keys(self, chunk: int) -> list[str]:
        return [self._arrays.key(name, chunk) for name in self._arrays.shapes]

    def finished(self, chunks: Iterable[int], *, retry_skipped: bool = False) -> tuple[list[int], list[int]]:
        """Those of the chunks whose files are all there and pass their checksums, and those that are damaged.

        Everything is read. With `retry_skipped`, a chunk that has a skipped example does not count as finished.
        """
        chunks = list(chunks)
        with ThreadPoolExecutor(min(_READERS, self.at_a_time)) as pool:
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
        try:
            return self._arrays.read(self.fields, np.array(self.rows(chunk)))["status"]
        except InputError:  # lost, altered, unreadable: all are computed again
            return None

    def write(self, chunk: int, fields: Mapping[str, np.ndarray]) -> None:
        """Write the `fields` of a chunk and wait until it is on the disk. InputError when it cannot be written."""
        rows = self.rows(chunk)
        sums = np.stack([checksums(fields[name]) for name in self.fields], 1)
        try:
            # TensorStore would read a damaged file before it writes. Without `status`, nobody looks for the others.
            for key in reversed(self._leftovers.pop(chunk, [])):
                self._place.files.write(key, None).result()
            writes = [
                self._arrays.opened[name][rows.start : rows.stop].write(field)
                for name, field in {**fields, "checksum": sums}.items()
                if name != "status"
            ]
            for write in writes:
                write.result()
            self._arrays.opened["status"][rows.start : rows.stop].write(fields["status"]).result()
        except Exception as error:
            kept = "what was finished is kept, and the same command goes on from there"
            raise InputError(f"the store {self.path} cannot be written: {_reason(error)}; {kept}") from None


def _group(attributes: Mapping[str, Any]) -> str:
    """The zarr.json of a group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1, sort_keys=True)


# ---- reading --------------------------------------------------------------------------------------------------------


class LazyArray:
    """An array of a store that is read where it is indexed: numpy's indexing, the example axis first.

    Raises InputError where it is read, for a file that is lost, damaged, or not what was written there.
    """

    def __init__(self, arrays: _Arrays, name: str) -> None:
        self.path, self.tensorstore = f"{arrays.place.path}/{name}", arrays.opened[name]
        self.shape: tuple[int, ...] = tuple(self.tensorstore.shape)
        self.dtype: np.dtype[Any] = np.dtype(self.tensorstore.dtype.numpy_dtype)
        self._read = lambda rows: arrays.read([name], rows)[name]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        if first is Ellipsis:
            first, rest = slice(None), [first, *rest]
        rows = np.arange(len(self))[first]
        found = self._read(rows.ravel()).reshape((*rows.shape, *self.shape[1:]))
        return found[(slice(None),) * rows.ndim + tuple(rest)] if rest else found

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

    Examples that are not done, also because their part of `status` was lost, have NaN as maps, scale and logits, -1
    as classes and "" as key; `missing` counts their chunks. InputError is raised where something of an example that
    is done is read, and is lost, damaged, or not what was written there.
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

    def has(self, method: str, options: Mapping[str, Any]) -> bool:
        """Whether the store is of that method with these options."""
        made = json.dumps(self.provenance["options"], sort_keys=True)
        return method in self.maps and json.dumps(dict(options), sort_keys=True) == made

    def find(
        self, method: str, options: Mapping[str, Any], wanted: Iterable[tuple[str, int | None]]
    ) -> tuple[list[int], np.ndarray]:
        """Which of (key, explained class or None for any) are stored, and the method's own maps of those [k, ...]."""
        if not self.has(method, options):
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

    Returns:
      The maps, which are read where they are indexed.

    Raises:
      InputError: nothing there, something else, no answer, or a description that is damaged or of another layout.
    """
    place = _Place(path)
    try:
        root = place.description("zarr.json")
        if root is None:
            raise InputError(f"{place.path} holds no maps; `tokentm dataset` makes them")
        provenance = _understood(root, place.path)
        arrays = _Arrays(place, provenance)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the store {place.path} cannot be read: {_reason(error)}") from None
    maps, scale = ({m: LazyArray(arrays, f"{group}/{m}") for m in provenance["methods"]} for group in _GROUPS)
    plain = ("logits", "label", "prediction", "target", "status", "key", "reason")
    return Maps(place.path, provenance, maps, scale, *(LazyArray(arrays, name) for name in plain))
