"""Arrays that take hours to compute, kept in an .npz beside the identity of what they depend on."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tokentm_jax.errors import InputError
from tokentm_jax.files import reason, replace


def keep(path: Path, name: str, identity: str, values: np.ndarray) -> None:
    """Write the file, which replaces the one that `kept` has read. Raises InputError where it cannot be written."""
    replace(path, partial(_write, name, identity, values), overwrite=True)


def _write(name: str, identity: str, values: np.ndarray, path: Path) -> None:
    arrays: dict[str, Any] = {"identity": np.array(identity), name: values}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def kept(path: Path, name: str, identity: str, shape: tuple[int, ...], again: str, others: str) -> list[np.ndarray]:
    """What a file holds, each float16 [*shape]; nothing where there is no file.

    Args:
      again: what happens where the file is removed.
      others: what a file of another identity holds.

    Raises InputError for a file of another identity, or that is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            made, values = str(file["identity"]), file[name]
        if values.dtype != np.float16 or values.shape[1:] != shape:
            raise ValueError(f"it holds {values.dtype} {values.shape}")
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged archives
        raise InputError(f"{path} is damaged ({reason(error)}); remove it, and {again}") from None
    if made != identity:
        raise InputError(f"{path} holds {others}; remove it")
    return [*values]
