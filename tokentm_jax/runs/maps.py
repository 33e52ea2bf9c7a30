"""`Maps`: the arrays of a store, read where they are indexed; see `store.py` and, for earlier versions, `zarr.py`."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import StringConstraints

from tokentm_jax.errors import InputError
from tokentm_jax.runs.explainer import DONE, SKIPPED
from tokentm_jax.validation import checked

MethodName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,99}$")]  # it may name a folder


def check_provenance(where: str, fields: Mapping[str, Any], provenance: Any) -> None:
    """InputError that names the missing or wrong field; `fields` are types by "name" or "name.name"."""
    for name, annotation in fields.items():
        value: Any = provenance
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise InputError(f"{where}: {name!r} is missing")
            value = value[part]
        checked(f"{where}: {name!r}", annotation, value)


class Counts(NamedTuple):
    """Examples that are done and skipped, and units (shards, or chunks of a zarr store) that are missing, of all."""

    done: int
    skipped: int
    missing: int
    units: int


class LazyArray:
    """An array of a store that is read where it is indexed: numpy's indexing, the example axis first.

    Raises InputError where it is read, for a file that is lost, damaged, or not what was written there.
    """

    def __init__(
        self, path: str, shape: tuple[int, ...], dtype: Any, read: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.path, self.shape, self.dtype, self._read = path, shape, np.dtype(dtype), read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        if first is Ellipsis:
            first, rest = slice(None), [first, *rest]
        rows = self._rows(first)
        found = self._read(rows.ravel()).reshape((*rows.shape, *self.shape[1:]))
        found = found[(slice(None),) * rows.ndim + tuple(rest)] if rest else found
        return found[()] if not found.shape else found

    def _rows(self, index: Any) -> np.ndarray:
        """The numbers of the examples; without an array of all of them, which may be 10^9."""
        count = len(self)
        if isinstance(index, slice):
            return np.arange(*index.indices(count))
        rows = np.asarray(index)
        if rows.dtype == bool:
            if rows.shape != (count,):
                raise IndexError(f"a mask of {list(rows.shape)} for {count} examples")
            return np.flatnonzero(rows)
        if not rows.size:
            return rows.astype(int)
        if rows.dtype.kind not in "iu":
            raise IndexError(f"examples are indexed by whole numbers, got {rows.dtype}")
        if rows.min() < -count or rows.max() >= count:
            raise IndexError(f"example {rows.max()} of {count}")
        return np.where(rows < 0, rows + count, rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __repr__(self) -> str:
        return f"LazyArray({self.path!r}, shape={self.shape}, dtype={self.dtype})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Maps:
    """A data set's maps, from `open_maps`. The arrays in `columns` are read where they are indexed.

    `maps[method]` [n, gh, gw] or [n, H, W] is what is stored: each map divided by its `scale[method]` [n]. `read`
    gives the method's own values. `logits` [n, classes], `label`, `prediction` and `target` [n] are classes of the
    model, -1 where unknown; `status` [n] is 0 where not done, 1 done, 2 skipped; `key` and `reason` [n] are texts.

    Examples that are not done have NaN as maps, scale and logits, -1 as classes and "" as key; `missing` counts their
    shards, which are not counted in n where only reading them can tell. InputError is raised where something of an
    example that is done is read, and is lost, damaged, or not what was written there.
    """

    path: str
    provenance: Mapping[str, Any]
    columns: Mapping[str, LazyArray]
    count: Callable[[], Counts]

    @cached_property
    def maps(self) -> dict[str, LazyArray]:
        return {method: self.columns[f"maps/{method}"] for method in self.provenance["methods"]}

    @cached_property
    def scale(self) -> dict[str, LazyArray]:
        return {method: self.columns[f"scale/{method}"] for method in self.provenance["methods"]}

    @property
    def logits(self) -> LazyArray:
        """Raises InputError for a store without all of them; `columns` may have "logits/top5" and "classes/top5"."""
        if "logits" not in self.columns:
            made = self.provenance["logits"]
            raise InputError(f"{self.path} was made with --logits {made}: it does not have all logits")
        return self.columns["logits"]

    label = property(lambda self: self.columns["label"])
    prediction = property(lambda self: self.columns["prediction"])
    target = property(lambda self: self.columns["target"])
    status = property(lambda self: self.columns["status"])
    key = property(lambda self: self.columns["key"])
    reason = property(lambda self: self.columns["reason"])

    def __len__(self) -> int:
        return len(self.columns["status"])

    def read(self, method: str, index: Any = slice(None)) -> np.ndarray:
        """The method's own maps of those examples, float32. Raises InputError for a damaged part."""
        scale = np.asarray(self.scale[method][index])
        return self.maps[method][index].astype(np.float32) * scale[..., None, None]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The name of every example in its data set, "" where not done."""
        return tuple(self.columns["key"][:].tolist())

    @cached_property
    def skipped(self) -> dict[str, str]:
        """The examples that could not be explained, and why."""
        rows = np.flatnonzero(self.columns["status"][:] == SKIPPED)
        return dict(zip((self.keys[i] for i in rows), self.columns["reason"][rows].tolist(), strict=True))

    @property
    def missing(self) -> int:
        """How many shards are not finished."""
        return self.count().missing

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
        targets, status = self.columns["target"][:].tolist(), self.columns["status"][:]
        return {self.keys[i]: (i, targets[i]) for i in np.flatnonzero(status == DONE).tolist()}

    def __repr__(self) -> str:
        made, counts = self.provenance, self.count()
        unit = "shards" if "shards" in made else "chunks"
        said = [f"{len(self)} examples", f"{counts.done} done", f"{counts.skipped} skipped"]
        said.append(f"{counts.missing} of {counts.units} {unit} missing" if counts.missing else "complete")
        shapes = ", ".join(f"{name} {list(array.shape[1:])}" for name, array in self.maps.items())
        return (
            f"{self.path}: {', '.join(said)}\n"
            f"{made['model']['name']} on {made['data']['name']}, target {made['target']}\n"
            f"{made['dtype']} maps: {shapes}"
        )
