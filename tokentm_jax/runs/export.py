"""`export_maps`: the maps of a store as plain Parquet files, also in the layout of Hugging Face's `datasets`."""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tokentm_jax.errors import InputError, printable, require, suggest
from tokentm_jax.runs.explainer import OPEN
from tokentm_jax.runs.place import Place
from tokentm_jax.runs.store import TO_UTF8, open_maps

FORMATS = ("parquet", "huggingface")
LARGEST_FILE = 2**28  # bytes before it is compressed
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# Maps

Maps of {model} on {data}, by {methods}, made with `tokentm dataset`. `target` is the explained class.
"""


def export_maps(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "parquet",
    report: Callable[[int, int, int], None] | None = None,
) -> int:
    """Write the finished maps of a store as plain Parquet, which needs no Python package of ours to be read.

    The columns are those of the store, except that the column with the name of a method has its own values: lists of
    lists of float32, multiplied by the scale.

    Args:
      store: as for `open_maps`.
      out: a new or empty folder, or a URL such as s3://bucket/maps.
      to: "parquet", or "huggingface" for data/*.parquet and a README.md: `datasets.load_dataset` reads the folder, and
        it can be uploaded as it is.
      report: called with (examples done, examples in all, 0).

    Returns:
      The number of Parquet files.

    Raises:
      InputError: no store, a damaged part, or an `out` that is not empty or cannot be written. What was written is
        removed then.
    """
    if to not in FORMATS:
        raise suggest("format", to, FORMATS)
    maps, target, written = open_maps(store), Place(out, "the export"), list[str]()
    if not target.is_empty():
        raise InputError(f"{target.path} is not empty; choose another --out")
    unit = max(1, min(8192, LARGEST_FILE // sum(math.prod(array.shape[1:]) * 4 for array in maps.columns.values())))

    def write(name: str, content: Callable[[Any], Any]) -> None:
        written.append(name)
        target.write(name, content)

    arrow, parquet = (require(name, "stores", "an export") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        for start in range(0, len(maps), unit):
            rows = np.arange(start, min(start + unit, len(maps)))
            rows = rows[maps.status[rows] != OPEN]
            if len(rows):
                plain = [name for name in maps.columns if not name.startswith(("maps/", "scale/"))]
                values = {name: maps.columns[name][rows] for name in plain}
                values |= {method: maps.read(method, rows) for method in maps.maps}
                table = arrow.table({name: _column(arrow, array) for name, array in values.items()})
                name = f"{len(written):05}.parquet" if to == "parquet" else f"data/train-{len(written):05}.parquet"
                write(name, lambda file, table=table: parquet.write_table(table, file, compression="zstd"))
            if report is not None:
                report(min(start + unit, len(maps)), len(maps), 0)
        count = len(written)
        if not count:
            raise InputError(f"{maps.path} has no finished example")
        if to == "huggingface":
            made = maps.provenance
            model, data = (printable(made[what]["name"]) for what in ("model", "data"))
            card = CARD.format(model=model, data=data, methods=", ".join(made["methods"]))
            write("README.md", lambda file: file.write_text(card, encoding="utf-8"))
    except BaseException:
        for name in written:
            with contextlib.suppress(InputError):
                target.remove(name)
        raise
    return count


def _column(arrow: Any, values: np.ndarray) -> Any:
    """[n] or [n, ...] -> a column of numbers, texts, or lists of a fixed length."""
    if values.dtype == object:
        return arrow.array([text.translate(TO_UTF8) for text in values], arrow.string())
    flat = arrow.array(values.ravel())
    for length in values.shape[:0:-1]:
        flat = arrow.FixedSizeListArray.from_arrays(flat, length)
    return flat
