"""Stores of version 0.1: a zarr v3 group of arrays in chunks. Later versions only read them.

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
written, which `checksum` detects; that of `status` has a CRC-32C. If it is not done, no file is read, and the values
are NaN, -1 or 0. A file is a chunk: little-endian numbers, compressed by zstd, and a CRC-32C.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal
from zlib import crc32

import numpy as np
from annotated_types import Interval, MaxLen, MinLen

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import errors_as, reason
from tokentm_jax.runs.explainer import DONE, OPEN, SKIPPED, BatchSize
from tokentm_jax.runs.maps import Counts, LazyArray, Maps, MethodName, check_provenance
from tokentm_jax.runs.place import Place

ROOT = "zarr.json"
FORMAT = 2  # of the layout above; the first had no `checksum`, and its provenance no shapes
FILL: dict[str, Any] = {"float16": np.nan, "float32": np.nan, "int32": -1, "uint32": 0, "uint8": 0}
LARGEST_CHUNK = 2**29  # bytes of a chunk, all arrays together
_CODECS = ["bytes", "zstd", "crc32c"]

Arrays = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape for one example, type)
_SHAPE = Annotated[list[Annotated[int, Interval(ge=1, le=2**30)]], MinLen(1), MaxLen(2)]
_FIELDS: dict[str, Any] = {
    "model.name": str,
    "model.identity": str,
    "data.name": str,
    "data.identity": str,
    "examples": Annotated[int, Interval(ge=1, le=2**26)],
    "keys": str,
    "methods": Annotated[list[MethodName], MinLen(1)],
    "options": dict[str, bool | int | float | str | None],
    "target": str,
    "dtype": Literal["float32", "float16"],
    "profile": str,
    "batch_size": BatchSize,
    "chunk_size": Annotated[int, Interval(ge=1, le=65536)],
    "device": str,
    "versions": dict[str, str],
    "shapes": dict[str, _SHAPE],
}


def open_zarr(place: Place) -> Maps:
    """As `open_maps`, for a zarr store."""
    made = _understood(place.read(ROOT) or b"", place.path)
    arrays = _Arrays(place, made)

    def column(name: str) -> LazyArray:
        shape, kind = arrays.shapes[name]
        where = f"{place.path}/{name}"
        if name not in ("key", "reason"):
            return LazyArray(where, (arrays.count, *shape), kind, lambda rows: arrays.read([name], rows)[name])
        return LazyArray(where, (arrays.count,), "O", lambda rows: _texts(arrays.read([name], rows)[name]))

    @cache
    def counts() -> Counts:
        status, size = arrays.read(["status"], np.arange(arrays.count))["status"], arrays.chunk_size
        missing = len(np.unique(np.flatnonzero(status == OPEN) // size))
        return Counts(int((status == DONE).sum()), int((status == SKIPPED).sum()), missing, -(-arrays.count // size))

    names = [name for name in arrays.shapes if name != "checksum"]
    return Maps(place.path, {"logits": "all", **made}, {name: column(name) for name in names}, counts)


def _understood(content: bytes, path: str) -> dict[str, Any]:
    """The provenance in a zarr.json. InputError for one of another program or layout, or with a wrong field."""
    where = f"{path}/{ROOT}"
    with errors_as(f"{where} is not valid JSON", (ValueError, RecursionError)):
        document = json.loads(content)
    try:
        made = document["attributes"]["tokentm"]
        layout = made.get("format", 1)
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no maps of `tokentm dataset`: its {ROOT} has something else") from None
    if layout != FORMAT:
        number = layout if isinstance(layout, int) else "of another kind"
        raise InputError(f"{path} has the layout {number}, and this version reads {FORMAT}: make it again")
    check_provenance(where, _FIELDS, made)
    ranks = {**{f"maps/{method}": 2 for method in made["methods"]}, "logits": 1, "key": 1}
    if {name: len(shape) for name, shape in made["shapes"].items()} != ranks:
        raise InputError(f"{where}: 'shapes' must be those of {', '.join(ranks)}, got {made['shapes']}")
    size = made["chunk_size"] * sum(_row(*array) for array in _arrays_of(made).values())
    if size > LARGEST_CHUNK:
        raise InputError(f"{where}: a chunk takes {size >> 20} MiB of memory, and {LARGEST_CHUNK >> 20} is the limit")
    return made


def _arrays_of(made: Mapping[str, Any]) -> Arrays:
    """The arrays of a store, in the order of the columns of `checksum`, which is one of them."""
    shapes = {name: tuple(shape) for name, shape in made["shapes"].items()}
    arrays: dict[str, tuple[tuple[int, ...], str]] = {
        **{f"maps/{method}": (shapes[f"maps/{method}"], made["dtype"]) for method in made["methods"]},
        **{f"scale/{method}": ((), "float32") for method in made["methods"]},
        "logits": (shapes["logits"], "float32"),
        **{name: ((), "int32") for name in ("label", "prediction", "target")},
        "key": (shapes["key"], "uint8"),
        "reason": ((200,), "uint8"),
    }
    return {**arrays, "checksum": ((len(arrays) + 1,), "uint32"), "status": ((), "uint8")}


def _row(shape: Sequence[int], kind: str) -> int:
    """Bytes of an example."""
    return math.prod(shape) * np.dtype(kind).itemsize


class _Arrays:
    """The arrays of a store. InputError for an array whose zarr.json differs from the provenance."""

    def __init__(self, place: Place, made: Mapping[str, Any]) -> None:
        self.place, self.shapes = place, _arrays_of(made)
        self.count, self.chunk_size = made["examples"], made["chunk_size"]
        self.summed = [name for name in self.shapes if name != "checksum"]  # by the columns of `checksum`
        for name in self.shapes:
            self._check(name)

    def _check(self, name: str) -> None:
        shape, kind = self.shapes[name]
        expected = {
            "shape": [self.count, *shape],
            "data_type": kind,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk_size, *shape]}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": _CODECS,
        }
        where = f"{self.place.path}/{name}/{ROOT} cannot be read"
        with errors_as(where, (ValueError, RecursionError, KeyError, TypeError, AttributeError)):
            found = json.loads(self.place.read(f"{name}/{ROOT}") or "null")
            found = {**found, "codecs": [codec["name"] for codec in found["codecs"]]}
        for field, value in expected.items():
            if found.get(field) != value:
                raise InputError(f"{where} (its {field} is {found.get(field)!r:.200} instead of {value})")

    def read(self, names: Iterable[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Those rows [k] of some arrays, by name; fill values for the examples that are not done.

        Raises InputError for a file that should be there and is not, is damaged, or is not what was written there.
        """
        status = self._load("status", rows)
        done = np.flatnonzero(status != OPEN)
        found = {name: self._load(name, rows[done]) for name in names if name != "status"}
        sums, found["status"] = self._load("checksum", rows[done]), status[done]
        for name, values in found.items():
            other = np.flatnonzero(_checksums(values) != sums[:, self.summed.index(name)])
            if len(other):
                raise self._refusal(name, rows[done][other[0]] // self.chunk_size, "it is not what was written there")
        for name, values in found.items():
            shape, kind = self.shapes[name]
            whole = np.full((len(rows), *shape), FILL[kind], kind)
            whole[done] = values
            found[name] = whole
        return found

    def _load(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Those rows of the chunks, which must all be there; where `status` has no file, it is 0."""
        shape, kind = self.shapes[name]
        found, chunks = np.empty((len(rows), *shape), kind), rows // self.chunk_size
        for chunk in np.unique(chunks).tolist():
            try:
                found[chunks == chunk] = self._chunk(name, chunk)[rows[chunks == chunk] % self.chunk_size]
            except (InputError, OSError) as error:
                cause = str(error) if isinstance(error, InputError) else reason(error)
                raise self._refusal(name, chunk, cause) from None
        return found

    def _chunk(self, name: str, chunk: int) -> np.ndarray:
        shape, kind = self.shapes[name]
        file, size = self._file(name, chunk), self.chunk_size * _row(shape, kind)
        if name == "status" and not self.place.has(file):
            return np.zeros(self.chunk_size, kind)
        largest = size * 102 // 100 + 65536  # zstd adds little to what it cannot compress
        with self.place.open(file) as stream:
            content = stream.read(largest + 1)
        if len(content) > largest:
            raise InputError("it is larger than a chunk can be")
        # The other arrays are compared with `checksum`.
        if name == "status" and _crc32c(content[:-4]) != int.from_bytes(content[-4:], "little"):
            raise InputError("its CRC-32C does not match")
        whole = require("pyarrow", "stores", "a store of maps").decompress(content[:-4], size, "zstd", asbytes=True)
        return np.frombuffer(whole, np.dtype(kind).newbyteorder("<")).reshape(self.chunk_size, *shape)

    def _file(self, name: str, chunk: int) -> str:
        return f"{name}/c/{chunk}" + "/0" * len(self.shapes[name][0])

    def _refusal(self, name: str, chunk: int, cause: str) -> InputError:
        where = f"{self.place.path}/{self._file(name, chunk)}"
        return InputError(f"{where} cannot be read ({cause}): compute the maps again, with another --out")


def _texts(array: np.ndarray) -> np.ndarray:
    """uint8 [n, width] -> texts."""
    found = np.ascontiguousarray(array).view(f"S{array.shape[1]}").ravel()
    return np.array([text.decode("utf-8", "surrogateescape") for text in found.tolist()], object)


def _checksums(array: np.ndarray) -> np.ndarray:
    """[n, ...] -> CRC-32 of the bytes of each example, uint32 [n]."""
    return np.array([crc32(np.ascontiguousarray(row).tobytes()) for row in array], np.uint32)


def _crc32c(content: bytes) -> int:
    """CRC-32C (Castagnoli) of a few bytes, bit by bit."""
    found = 0xFFFFFFFF
    for byte in content:
        found ^= byte
        for _ in range(8):
            found = found >> 1 ^ (0x82F63B78 & -(found & 1))
    return found ^ 0xFFFFFFFF
