"""The maps of a data set: a folder or a place in an object store, with one Parquet file for each shard of the input.

    tokentm.json         what is computed: model, data, methods, versions, and the columns of the parts
    manifest.parquet     a row for each shard: see `Shard`
    keys.parquet         for slices of a source: the names of its examples, a row group for each slice
    shards/00000/00000017-1000-3.parquet   the part of shard 17: 1000 examples, 3 of them skipped

A part is written under another name and moved, or uploaded as one object, so it is there as a whole or not at all: its
name is its marker, and one listing gives what is done. Its columns are `layout` of `explainer.py`: maps and logits are
tensors of a fixed shape. Pages have checksums, which are compared when they are read. Nothing that is read is trusted.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Interval, MaxLen, MinLen
from typing_extensions import TypedDict

from tokentm_jax.data.shards import Shard
from tokentm_jax.errors import InputError, require
from tokentm_jax.files import MARK, errors_as, reason
from tokentm_jax.runs import zarr
from tokentm_jax.runs.explainer import FILL, SKIPPED, BatchSize, Layout, layout, numpy_type
from tokentm_jax.runs.maps import Counts, LazyArray, Maps, MethodName, check_provenance
from tokentm_jax.runs.place import UNFINISHED, Place

FORMAT = 3  # 2 was a zarr group, see `zarr.py`
ROOT, MANIFEST, KEYS, PARTS = "tokentm.json", "manifest.parquet", "keys.parquet", "shards"
GROUP = 256  # examples of a row group, or a little more so that batches divide it
AGAIN = "run the same `tokentm dataset` command again"
DAMAGED = f"{AGAIN} with --verify, and it is computed again"
_PART = re.compile(r"(\d{8,})-(\d{1,10})-(\d{1,10})\.parquet")
_TEXT = 2**18  # bytes of a key and a reason at most: an entry of a zip has a name of 2**16
_OPEN_PARTS = 32  # files that are kept open for reading
_PAGES = {"compression": "zstd", "compression_level": 3, "write_page_checksum": True, "use_dictionary": False}
_PAGES |= {"write_statistics": False}
# Names of files that are not UTF-8 are kept in the private use area, because a column of strings is.
TO_UTF8 = {0xDC80 + i: 0xF780 + i for i in range(128)}
FROM_UTF8 = {new: old for old, new in TO_UTF8.items()}

_SHAPE = Annotated[list[Annotated[int, Interval(ge=1, le=2**30)]], MaxLen(2)]


class _Column(TypedDict):
    shape: _SHAPE
    dtype: str


_FIELDS: dict[str, Any] = {
    "model.name": str,
    "model.identity": str,
    "data.name": str,
    "data.identity": str,
    "data.spec": str,
    "shards": Annotated[int, Interval(ge=1, le=10**8)],
    "manifest": str,
    "explainer": str,
    "methods": Annotated[list[MethodName], MinLen(1)],
    "options": dict[str, bool | int | float | str | None],
    "target": str,
    "dtype": Literal["float32", "float16"],
    "profile": str,
    "logits": Literal["all", "top5", "none"],
    "batch_size": BatchSize,
    "device": str,
    "versions": dict[str, str],
    "columns": dict[str, _Column],
}


def _arrow() -> Any:
    return require("pyarrow", "stores", "a store of maps")


def _parquet() -> Any:
    return require("pyarrow.parquet", "stores", "a store of maps")


# ---- what is in it --------------------------------------------------------------------------------------------------


def understood(content: bytes, path: str) -> dict[str, Any]:
    """The content of tokentm.json. InputError for one of another program or layout, or with a wrong field."""
    with errors_as(f"{path}/{ROOT} is not valid JSON", (ValueError, RecursionError)):
        made = json.loads(content)
    if not isinstance(made, dict) or "format" not in made:
        raise InputError(f"{path} holds no maps of `tokentm dataset`: its {ROOT} has something else")
    if made["format"] != FORMAT:
        found = made["format"] if isinstance(made["format"], int) else "of another kind"
        raise InputError(f"{path} has the layout {found}, and this version has {FORMAT}: make it again")
    where = f"{path}/{ROOT}"
    check_provenance(where, _FIELDS, made)
    found = columns_of(made)
    shapes = {method: found.get(f"maps/{method}", ((), ""))[0] for method in made["methods"]}
    outputs = found.get("logits", found.get("logits/top5", ((0,), "")))[0]
    expected = layout(shapes, made["dtype"], made["logits"], sum(outputs[:1]))
    if found != dict(expected) or any(len(shape) != 2 for shape in shapes.values()):
        raise InputError(f"{where}: 'columns' must be those of {', '.join(expected)}")
    return made


def columns_of(made: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """The layout in a tokentm.json."""
    return {name: (tuple(column["shape"]), column["dtype"]) for name, column in made["columns"].items()}


class PartName(NamedTuple):
    """What the name of a part says."""

    index: int
    rows: int
    skipped: int

    @property
    def file(self) -> str:
        return self.pattern.replace("*", f"{self.rows}-{self.skipped}")

    @property
    def pattern(self) -> str:
        """Of all parts of the shard: earlier ones had more skipped examples."""
        index = f"{self.index:08}"
        return f"{PARTS}/{index[:-3]}/{index}-*.parquet"


@dataclasses.dataclass(frozen=True)
class Store:
    """A store that is written or read: its place, tokentm.json and shards."""

    place: Place
    made: Mapping[str, Any]
    shards: Sequence[Shard]

    @cached_property
    def layout(self) -> Layout:
        return columns_of(self.made)

    @cached_property
    def group(self) -> int:
        """Examples of a row group."""
        return -(-GROUP // self.made["batch_size"]) * self.made["batch_size"]

    @cached_property
    def parts(self) -> dict[int, PartName]:
        """The parts that are there, by shard, from one listing. InputError for another file among them."""
        found: dict[int, PartName] = {}
        for name in self.place.names(PARTS):
            file = name.rpartition("/")[2]
            part = _PART.fullmatch(file)
            if file.startswith(".") and file.endswith(UNFINISHED):
                continue
            named = PartName(*map(int, part.groups())) if part else None
            if named is None or named.file != f"{PARTS}/{name}" or named.index >= len(self.shards):
                raise InputError(
                    f"{self.place.path}/{PARTS}/{name} is no part of this store; remove it, or choose another --out"
                )
            best = found.setdefault(named.index, named)
            found[named.index] = min(best, named, key=lambda each: each.skipped)  # of one that was tried again
        return found

    def schema(self, shard: Shard) -> Any:
        """The columns of a part, and whose it is."""
        arrow, fields = _arrow(), []
        for name, (shape, kind) in self.layout.items():
            plain = arrow.string() if kind == "string" else arrow.from_numpy_dtype(np.dtype(kind))
            fields.append((name, arrow.fixed_shape_tensor(plain, shape) if shape else plain))
        whose = {"store": self.made["explainer"], "shard": shard.index, "url": shard.url, "identity": shard.identity}
        return arrow.schema(fields, metadata={MARK: json.dumps(whose)})


def read_manifest(place: Place) -> list[Shard] | None:
    """The shards, None without a manifest."""
    if not place.has(MANIFEST):
        return None
    with errors_as(f"{place.path}/{MANIFEST} is damaged, remove it, and {AGAIN}"), place.open(MANIFEST) as file:
        known = _parquet().ParquetFile(file, page_checksum_verification=True)
        shards: list[Shard] = []
        for batch in known.iter_batches(8192, use_threads=False):  # a whole table, and threads, take 40 MB more
            shards += map(Shard, *(batch.column(name).to_pylist() for name in Shard._fields))
        return shards


def write_manifest(place: Place, shards: Sequence[Shard]) -> None:
    table = _arrow().table(dict(zip(Shard._fields, map(list, zip(*shards, strict=True)), strict=True)))
    place.write(MANIFEST, lambda path: _parquet().write_table(table, path, **_PAGES))


def write_keys(place: Place, keys: Sequence[str], size: int) -> None:
    """The names of the examples of slices, a row group for each slice."""
    table = _arrow().table({"key": [key.translate(TO_UTF8) for key in keys]})
    place.write(KEYS, lambda path: _parquet().write_table(table, path, row_group_size=size, **_PAGES))


def read_keys(place: Place, shard: Shard) -> list[str]:
    """The names of the examples of a slice."""
    with errors_as(f"{place.path}/{KEYS} is damaged, choose another --out"), place.open(KEYS) as file:
        table = _parquet().ParquetFile(file, page_checksum_verification=True).read_row_group(shard.index)
        return [key.translate(FROM_UTF8) for key in table.column("key").to_pylist()]


# ---- parts ----------------------------------------------------------------------------------------------------------


class PartWriter:
    """Writes the part of a shard, batch by batch; it appears when it is finished."""

    def __init__(self, store: Store, shard: Shard) -> None:
        self._store, self._shard, self._schema = store, shard, store.schema(shard)
        self._path = store.place.temporary(PartName(shard.index, 0, 0).file)
        self._waiting: list[Mapping[str, np.ndarray]] = []
        self.rows = self.skipped = 0
        self._file: Any = None
        self._failed = False  # whether an earlier batch could not be written

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        self._waiting.append(columns)
        self.rows += len(columns["status"])
        self.skipped += int((columns["status"] == SKIPPED).sum())
        if sum(len(each["status"]) for each in self._waiting) >= self._store.group:
            self._flush()

    def _flush(self) -> None:
        if self._failed:
            raise InputError(f"the part of shard {self._shard.index} lacks a batch that could not be written")
        arrow, arrays, self._failed = _arrow(), [], True
        waiting, self._waiting = self._waiting, []
        for name, (shape, kind) in self._store.layout.items() if waiting else ():
            whole = np.ascontiguousarray(np.concatenate([columns[name] for columns in waiting]))
            if kind == "string":
                arrays.append(arrow.array([text.translate(TO_UTF8) for text in whole], arrow.string()))
            else:
                arrays.append(arrow.FixedShapeTensorArray.from_numpy_ndarray(whole) if shape else arrow.array(whole))
        with self._store.place.errors("written"):
            if self._file is None:
                self._file = _parquet().ParquetWriter(self._path, self._schema, **_PAGES)
            if arrays:
                self._file.write_table(arrow.Table.from_arrays(arrays, schema=self._schema))
        self._failed = False

    def finish(self) -> PartName:
        """Write the rest, and let the part appear instead of an earlier one."""
        name = PartName(self._shard.index, self.rows, self.skipped)
        try:
            self._flush()
            with self._store.place.errors("written"):
                self._file.close()
            self._store.place.commit(self._path, name.file)
        except InputError:
            self.discard()
            raise
        self._store.place.remove(name.pattern, name.file)
        return name

    def discard(self) -> None:
        """Remove what is unfinished."""
        with contextlib.suppress(Exception):
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


class PartReader:
    """An open part. InputError for one that is damaged, or not what was written there."""

    def __init__(self, store: Store, name: PartName) -> None:
        self._store, self._name = store, name
        with self._refusing():
            self._file = _parquet().ParquetFile(store.place.open(name.file), page_checksum_verification=True)
            expected = store.schema(store.shards[name.index])
            if not self._file.schema_arrow.equals(expected, check_metadata=False):
                raise InputError("its columns are not those of the store")
            if (self._file.schema_arrow.metadata or {}).get(MARK.encode()) != expected.metadata[MARK.encode()]:
                raise InputError("it is the part of another shard or store")
            counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            if sum(counts) != name.rows:
                raise InputError(f"it has {sum(counts)} examples instead of {name.rows}")
            self._starts = np.cumsum([0, *counts])

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Arrow's for damaged files have no common type
            where = f"{self._store.place.path}/{self._name.file}"
            cause = str(error) if isinstance(error, InputError) else reason(error)
            raise InputError(f"{where} cannot be read ({cause}): {DAMAGED}") from None

    def read(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Those rows of the part [k, ...]; only the row groups that have them are read."""
        shape, kind = self._store.layout[column]
        found = np.empty((len(rows), *shape), numpy_type(kind))
        groups = np.searchsorted(self._starts, rows, "right") - 1
        for group in np.unique(groups).tolist():
            with self._refusing():
                self._require_size(group)
                array = self._file.read_row_group(group, columns=[column]).column(0).combine_chunks()
                if kind == "string":
                    values = np.array([text.translate(FROM_UTF8) for text in array.to_pylist()], object)
                else:
                    values = array.to_numpy_ndarray() if shape else array.to_numpy(zero_copy_only=False)
                found[groups == group] = values[rows[groups == group] - self._starts[group]]
        return found

    def _require_size(self, group: int) -> None:
        """InputError for a row group that would unpack to more than its rows can have."""
        known = self._file.metadata.row_group(group)
        row = sum(int(np.prod(shape)) * 8 + _TEXT for shape, _ in self._store.layout.values())
        if known.num_rows > self._store.group or known.total_byte_size > known.num_rows * row + 2**20:
            raise InputError("its row groups are larger than they can be")


class Reader:
    """Columns across all parts. Tens of thousands of parts are not opened at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        known = np.array([shard.rows for shard in store.shards], np.int64)
        for index, part in store.parts.items():
            if known[index] not in (-1, part.rows):
                raise InputError(f"{store.place.path}/{part.file} is no part of this store; remove it, and {AGAIN}")
            known[index] = part.rows
        self._starts = np.cumsum([0, *np.maximum(known, 0)])
        self.part = functools.lru_cache(_OPEN_PARTS)(lambda index: PartReader(store, store.parts[index]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Those rows [k] of a column; fill values for examples that are not done."""
        shape, kind = self._store.layout[column]
        found = np.full((len(rows), *shape), FILL[kind], numpy_type(kind))
        shards = np.searchsorted(self._starts, rows, "right") - 1
        for index in np.unique(shards).tolist():
            if index in self._store.parts:
                own = shards == index
                found[own] = self.part(index).read(column, rows[own] - self._starts[index])
        return found


def is_whole(store: Store, name: PartName) -> bool:
    """Whether all of a part can be read. Reads it."""
    try:
        part = PartReader(store, name)
        for column in store.layout:
            part.read(column, np.arange(name.rows))
    except InputError:
        return False
    return True


# ---- reading --------------------------------------------------------------------------------------------------------


def store_at(place: Place) -> Store:
    """A store that was begun, with its shards. InputError for anything else."""
    content = place.read(ROOT)
    if content is None:
        raise InputError(f"{place.path} holds no maps; `tokentm dataset` makes them")
    made, shards = understood(content, place.path), read_manifest(place)
    if shards is None or len(shards) != made["shards"]:
        raise InputError(f"{place.path}/{MANIFEST} is missing, or of another store: {AGAIN}")
    return Store(place, made, shards)


def open_maps(path: str | os.PathLike[str]) -> Maps:
    """Open the maps that `tokentm dataset` has written; reads tokentm.json, the manifest, and a list of the parts.

    Args:
      path: a local folder, or a URL such as s3://bucket/maps. Also a zarr store of version 0.1.

    Returns:
      The maps, which are read where they are indexed.

    Raises:
      InputError: nothing there, something else, no answer, or a description that is damaged or of another layout.
    """
    place = Place(path)
    if place.read(ROOT) is None and place.has(zarr.ROOT):
        return zarr.open_zarr(place)
    store = store_at(place)
    reader = Reader(store)
    columns = {
        name: LazyArray(
            f"{place.path}: {name}", (len(reader), *shape), numpy_type(kind), functools.partial(reader.read, name)
        )
        for name, (shape, kind) in store.layout.items()
    }
    skipped = sum(part.skipped for part in store.parts.values())
    done = sum(part.rows for part in store.parts.values()) - skipped
    counts = Counts(done, skipped, len(store.shards) - len(store.parts), len(store.shards))
    return Maps(place.path, store.made, columns, lambda: counts)
