"""Results per image on disk: files that only grow, and never hold half of anything."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le, Len
from typing_extensions import TypedDict

from tokentm_jax.configs import EvaluateConfig, Row
from tokentm_jax.errors import InputError
from tokentm_jax.files import opened, reason, require_ours
from tokentm_jax.identity import digest
from tokentm_jax.metrics.task import CLEAN, PREDICTED, TARGET, Fields, LogProbability, Number
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.validation import checked, lists_of

LONGEST_LINE = 64 * 2**20  # bytes
IMAGES = 256  # of a line, at most
EXAMPLES = "records/examples.json"  # the keys of those that the results are of
KEPT = "; what was finished is kept, and the same command goes on from there"


Count = Annotated[int, Ge(0), Le(2**31 - 1)]


def clean_fields(config: EvaluateConfig) -> Fields:
    """What is recorded of whole images; `counted` where a task is not of all of them."""
    label = lists_of(Annotated[int, Ge(-1), Le(2**31 - 1)])
    scored = config.score is not None
    followed = {"score": lists_of(Number)} if scored else {"log_probability": lists_of(LogProbability)}
    counted = {"counted": lists_of(bool)} if TASKS[config.task].counts else {}
    return {"predicted": lists_of(Count), "label": label, **followed, "hit": lists_of(bool), **counted}


class Line(TypedDict):
    """One line of a file of records: arrays [n, ...] as lists, for n pairs (key of the example, explained class)."""

    keys: Annotated[list[Annotated[list[str], Len(2, 2)]], Len(1)]
    fields: dict[str, list[Any]]


class Records:
    """Results per image of one row: a few lines of JSON per finished batch, in a file that only grows.

    A last line without an end was being written when a run stopped, or is being written by another process just now.
    It is ignored; `append`, which is for the process that holds the folder, puts its own in its place.

    Args:
      path: of the file, which may be missing.
      fields: the annotation of every array. A line that does not meet it is an InputError that names it.
      explained: the explained classes that its keys may have.
    """

    def __init__(self, path: Path, fields: Fields, explained: Sequence[str] = (PREDICTED, TARGET)) -> None:
        self.path = path
        self.places: dict[tuple[str, str], int] = {}  # (key of the example, explained class) -> place
        self._annotations, self._explained = fields, explained
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in fields}
        self._end = 0  # bytes of whole lines
        if not os.path.lexists(path):
            return
        with opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                where = f"{path}: line {number}"
                if not line.endswith(b"\n"):
                    if len(line) == LONGEST_LINE:
                        raise InputError(f"{where} is longer than {LONGEST_LINE >> 20} MiB")
                    break
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where} is not valid JSON ({reason(error)}); {_DAMAGED}") from None
                self._add(content, where)
                self._end += len(line)

    def append(self, keys: Sequence[tuple[str, str]], fields: Mapping[str, np.ndarray]) -> None:
        """Keep arrays [n, ...] for the n keys. Raises InputError when the file cannot be written."""
        parts = [slice(i, i + IMAGES) for i in range(0, len(keys), IMAGES)]
        lines = [
            {"keys": list(map(list, keys[s])), "fields": {name: a[s].tolist() for name, a in fields.items()}}
            for s in parts
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)  # ASCII
        require_ours(self.path, overwrite=True)  # what is there was read; a link would lead elsewhere
        try:
            with self.path.open("a") as file:
                file.truncate(self._end)
                file.write(text)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, self._end)
            raise InputError(f"{self.path} cannot be written: {reason(error)}{KEPT}") from None
        self._end += len(text)
        for line in lines:
            self._add(line, str(self.path))

    def _add(self, content: Any, where: str) -> None:
        """Take a line of JSON. InputError for anything else than `Line`, these fields and new keys."""
        line = checked(where, Line, content)
        count, known = len(line["keys"]), len(self.places)
        for place, (key, explained) in enumerate(line["keys"], known):
            if explained not in self._explained:
                raise InputError(f"{where}: {explained!r} is not one of {', '.join(self._explained)}; {_DAMAGED}")
            if self.places.setdefault((key, explained), place) != place:
                raise InputError(f"{where}: the results of {key} ({explained}) are there twice; {_DAMAGED}")
        if line["fields"].keys() != self._annotations.keys():
            found, wanted = (", ".join(sorted(names)) for names in (line["fields"], self._annotations))
            raise InputError(f"{where}: the fields must be {wanted}, and are {found or 'none'}; {_DAMAGED}")
        for name, annotation in self._annotations.items():
            values = checked(f"{where}: {name!r}", annotation, line["fields"][name])
            if len(values) != count:
                raise InputError(f"{where}: {name!r} has {len(values)} rows for {count} keys; {_DAMAGED}")
            self._parts[name].append(np.asarray(values))

    def take(self, name: str, keys: Sequence[tuple[str, str]]) -> np.ndarray:
        """The field of those keys, [n, ...]."""
        self._parts[name] = [np.concatenate(self._parts[name])]
        return self._parts[name][0][[self.places[key] for key in keys]]

    @property
    def fields(self) -> list[str]:
        return list(self._parts)


_DAMAGED = "remove the file, and this part is computed again"


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
    name = name.encode()[:200].decode(errors="ignore")  # and the whole stays within the 255 bytes of a file's name
    made = (row.name, row.method, dict(row.options), row.random_blocks, *(["by patch"] if row.by_patch else []))
    return out / "records" / f"{name}-{digest(*made)[:8]}.jsonl"
