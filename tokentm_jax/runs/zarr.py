"""Stores of version 0.1: a zarr v3 group of arrays in chunks, read through TensorStore. Later versions only read them.

    zarr.json                    the provenance, under attributes.tokentm
    maps/<method>                [n, gh, gw] or [n, H, W], each map divided by its scale
    scale/<method>               [n] float32, powers of two
    logits                       [n, classes] float32
    label, prediction, target    [n] int32 classes of the model, -1 where unknown
    key, reason                  [n, bytes] uint8: UTF-8 filled up with zeros
    checksum                     [n, arrays] uint32: CRC-32 of the example's bytes in each of the other arrays
    status                       [n] uint8: 0 not done, 1 done, 2 skipped

Nothing that is read is trusted. The provenance has the type and shape of every array, and an array that differs is
refused. If the `status` of an example is done, the file of every array that is read must exist and hold what was
written: its own checksum detects a file that is cut off or altered, and `checksum` one of another example. If it is
not done, no file is read, and the values are NaN, -1 or 0.
"""

import importlib.util
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from zlib import crc32

import numpy as np
from annotated_types import Interval, MaxLen, MinLen
from pydantic import StringConstraints

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import as_path, opened, read_bytes, reason, size_of
from tokentm_jax.runs.explainer import DONE, OPEN, SKIPPED
from tokentm_jax.runs.maps import Counts, LazyArray, Maps
from tokentm_jax.validation import checked

FORMAT = 2  # of the layout above; the first had no `checksum`, and its provenance no shapes
Dtype = Literal["float32", "float16"]  # of the maps
BatchSize = Annotated[int, Interval(ge=1, le=4096)]
ChunkSize = Annotated[int, Interval(ge=1, le=65536)]
FILL: dict[str, Any] = {"float16": np.nan, "float32": np.nan, "int32": -1, "uint32": 0, "uint8": 0}
LARGEST_CHUNK = 2**29  # bytes of a chunk, all arrays together
SCHEMES = ("gs", "s3", "memory", "file")
ANSWER = 6.0  # seconds that a store may take to answer when it is opened; the variable WAIT sets another number
WAIT = "TOKENTM_STORE_WAIT"
_LARGEST_DESCRIPTION = 2**24  # bytes of a zarr.json
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 3}},
    {"name": "crc32c"},
]

Arrays = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape for one example, type)


def _decoded(array: np.ndarray) -> np.ndarray:
    """uint8 [n, width] -> texts."""
    found = np.ascontiguousarray(array).view(f"S{array.shape[1]}").ravel()
    return np.array([text.decode("utf-8", "surrogateescape") for text in found.tolist()], object)


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
        "reason": ((200,), "uint8"),
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
    library = require("tensorstore", "zarr", "a store of version 0.1")
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


class _Arrays:
    """The open arrays of a store. InputError for an array whose zarr.json differs from the provenance."""

    def __init__(self, place: _Place, provenance: Mapping[str, Any]) -> None:
        self.place, self.shapes = place, arrays_of(provenance)
        self.count, self.chunk_size = provenance["examples"], provenance["chunk_size"]
        self.summed = [name for name in self.shapes if name != "checksum"]  # by the columns of `checksum`
        self.opened = {name: self._open(name) for name in self.shapes}

    def _open(self, name: str) -> Any:
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
            if found is None:
                raise InputError("it does not exist")
            library, context = _tensorstore()
            return library.open(spec, open=True, read=True, context=context).result(timeout=_patience())
        except Exception as error:
            if found is None and not isinstance(error, InputError):
                raise
            cause = error if isinstance(error, InputError) else _reason(error)
            raise InputError(f"{self.place.path}/{file} cannot be read ({cause})") from None

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
        raise InputError(f"{where} cannot be read ({cause}): compute the maps again, with another --out") from None


# ---- reading --------------------------------------------------------------------------------------------------------


def holds(path: str | os.PathLike[str]) -> bool:
    """Whether TensorStore is installed, which also reads gs:// and s3://."""
    return importlib.util.find_spec("tensorstore") is not None and "://" in os.fspath(path)


def open_zarr(path: str | os.PathLike[str]) -> Maps:
    """As `open_maps`, for a zarr store."""
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

    def column(name: str) -> LazyArray:
        shape, kind = arrays.shapes[name]
        where = f"{place.path}/{name}"
        if name not in ("key", "reason"):
            return LazyArray(where, (arrays.count, *shape), kind, lambda rows: arrays.read([name], rows)[name])
        return LazyArray(where, (arrays.count,), "O", lambda rows: _decoded(arrays.read([name], rows)[name]))

    @cache
    def counts() -> Counts:
        status, size = arrays.read(["status"], np.arange(arrays.count))["status"], arrays.chunk_size
        missing = len(np.unique(np.flatnonzero(status == OPEN) // size))
        return Counts(int((status == DONE).sum()), int((status == SKIPPED).sum()), missing, -(-arrays.count // size))

    names = [name for name in arrays.shapes if name != "checksum"]
    return Maps(place.path, {"logits": "all", **provenance}, {name: column(name) for name in names}, counts)
