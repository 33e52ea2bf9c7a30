"""Labels as text: numbers, names of classes, CSV files and label maps."""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

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
