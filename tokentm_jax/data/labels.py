"""Labels as text: numbers, names of classes, CSV files and label maps."""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokentm_jax.errors import InputError
from tokentm_jax.files import read_json, read_text, reason
from tokentm_jax.validation import checked

IMAGENET_1K = Path(__file__).with_name("imagenet_1k.json")  # {"wnid": [...], "name": [...]} of its 1000 classes
LabelMap = Mapping[str, str | int]


def number(text: str) -> int | None:
    """The whole number of plain digits; None for any other text. Only the first 20 digits are read."""
    if re.fullmatch("-?[0-9]+", text) is None:
        return None
    sign = "-" if text.startswith("-") else ""
    return int(sign + (text.lstrip("-").lstrip("0") or "0")[:20])


def alike(name: str) -> str:
    """A key that is equal for names that differ only in case, underscores and spaces."""
    return " ".join(name.casefold().replace("_", " ").split())


def csv_rows(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every row that is not empty. Raises InputError for a text that is not CSV."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{where} is not a CSV file: line {reader.line_num}: {reason(error)}") from None


def read_label_map(given: LabelMap | str | os.PathLike[str] | None) -> dict[str, str | int] | None:
    """A label map from a mapping or a file; None for None. Raises InputError.

    The file is a JSON object, or CSV: the data set's name of a class, and the model's name, wnid or number.
    """
    if given is None:
        return None
    if not isinstance(given, str | os.PathLike):
        return dict(checked("label_map", Mapping[str, str | int], given))
    where = f"the label map {os.fspath(given)}"
    if Path(given).suffix.lower() == ".json":
        return dict(checked(where, Mapping[str, str | int], read_json(given, what="the label map")))
    found: dict[str, str | int] = {}
    for line, row in csv_rows(read_text(given, what="the label map"), where):
        if len(row) != 2:
            raise InputError(f"{where}: line {line} must have two columns, the data set's class and the model's")
        name, value = (field.strip() for field in row)
        if found.setdefault(name, value) != value:
            raise InputError(f"{where}: line {line} gives another class for {name!r}")
    return found


Names = tuple[list[str], list[str] | None]  # of classes, and their wnids if these are known


def read_class_names(names: Sequence[Any] | str | os.PathLike[str], count: int | None) -> Names:
    """The names of `count` classes, as `load` takes them. Raises InputError for another form or number."""
    source = str(names) if isinstance(names, str | os.PathLike) else "class_names"
    found = read_names(Path(names)) if isinstance(names, str | os.PathLike) else _listed(names, source)
    if count not in (None, len(found[0])):
        raise InputError(f"{source} has {len(found[0])} class names; the model has {count} classes")
    return found


def read_names(path: Path) -> Names:
    """Class names of a `.json` or `.txt` file."""
    if path.suffix == ".json":
        return _listed(read_json(path, what="class names"), str(path))
    lines = read_text(path, what="class names").splitlines()
    return [line.strip() for line in lines if line.strip()], None


def _listed(names: Any, source: str) -> Names:
    """[name, ...], {"0": name, ...}, {"wnid": [wnid, ...], "name": [name, ...]}; a name may be [wnid, name]."""
    if isinstance(names, Mapping):
        if isinstance(names.get("name"), list):
            wnids = names.get("wnid")
            names = names["name"]
            if isinstance(wnids, list) and len(wnids) == len(names):
                names = list(zip(wnids, names, strict=True))
        elif all(str(i) in names for i in range(len(names))):
            names = [names[str(i)] for i in range(len(names))]
    if isinstance(names, list | tuple):
        pairs = [n if isinstance(n, list | tuple) and n else [None, n] for n in names]
        names, wnids = [pair[-1] for pair in pairs], [pair[0] for pair in pairs]
        if names and all(isinstance(n, str) for n in names):
            known = all(isinstance(w, str) for w in wnids) and len(set(wnids)) == len(wnids)
            return names, wnids if known else None
    raise InputError(f"{source}: expected a list of class names or a mapping from index to name")
