"""Results per image on disk: files that only grow, and never hold half of anything."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokentm_jax.errors import InputError
from tokentm_jax.tasks import CLEAN, PREDICTED, Row


class Records:
    """Results per image of one row, in a file that only grows: one line of JSON per finished batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[tuple[str, str], int] = {}  # (key of the example, explained class) -> place
        self._parts: dict[str, list[np.ndarray]] = {}
        self._count = 0
        if not path.exists():
            return
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):  # a line that was being written when the run ended
            os.truncate(path, end)
        for line in content[:end].splitlines():
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path} is damaged: remove it, and its part is computed again") from None

    def append(self, keys: Sequence[tuple[str, str]], fields: Mapping[str, np.ndarray]) -> None:
        """Keep arrays [n, ...] for the n keys. Raises InputError when the file cannot be written."""
        line = json.dumps({"keys": list(keys), "fields": {name: a.tolist() for name, a in fields.items()}}) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            raise unwritten(self.path, error) from None
        self._add(json.loads(line))

    def _add(self, record: Mapping[str, Any]) -> None:
        for place, key in enumerate(record["keys"], self._count):
            self.places[tuple(key)] = place
        self._count += len(record["keys"])
        for name, values in record["fields"].items():
            self._parts.setdefault(name, []).append(np.asarray(values))

    def take(self, name: str, keys: Sequence[tuple[str, str]]) -> np.ndarray:
        """The field of those keys, [n, ...]."""
        self._parts[name] = [np.concatenate(self._parts[name])]
        return self._parts[name][0][[self.places[key] for key in keys]]

    @property
    def fields(self) -> list[str]:
        return list(self._parts)


def table_of(
    row: Row, explained: Sequence[str], clean: Records, records: Records, keys: Iterable[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Those of the examples that are finished, sorted, and their arrays: "clean_...", "predicted_...", "target_...".

    Where the predicted class is the target, or the method does not look at the class, one explanation is both.
    """
    listed = sorted((key, CLEAN) for key in keys)
    same = clean.take("predicted", listed) == clean.take("label", listed)
    places = {
        key: [(key, PREDICTED if is_same or not row.class_specific else e) for e in explained]
        for (key, _), is_same in zip(listed, same, strict=True)
    }
    places = {key: wanted for key, wanted in places.items() if all(w in records.places for w in wanted)}
    if not places:
        return [], {}
    table = {f"clean_{name}": clean.take(name, [(key, CLEAN) for key in places]) for name in clean.fields}
    for e, wanted in zip(explained, zip(*places.values(), strict=True), strict=True):
        table |= {f"{e}_{name}": records.take(name, wanted) for name in records.fields}
    return list(places), table


def record_file(out: Path, row: Row) -> Path:
    """The records of a row: another method or option under the same name has another file."""
    name = "".join(c if c.isalnum() else "-" for c in row.name)[:80]
    return out / "records" / f"{name}-{digest(row.name, row.method, dict(row.options), row.random_blocks)[:8]}.jsonl"


def digest(*parts: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file as a whole by what `write` puts into a file beside it."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise unwritten(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def unwritten(path: Path, error: OSError) -> InputError:
    reason = f"{path} cannot be written: {error.strerror}"
    return InputError(f"{reason}; what was finished is kept, and the same command goes on from there")
