"""Provenance: the config, input bytes and versions that produced a result. A run resumes only if they are the same.

The terms are a JSON object, stored in `identity.json` of a folder of results, and in the provenance of a store of
maps. If a term differs, the error shows the first one. A term with an "identity" is compared by it, and shown with its
"name".
"""

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import MARK, generator, opened, read_json, reason, replace, version_of, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Terms = Mapping[str, Any]
PACKAGES = ("tokentm_jax", "jax", "jaxlib", "flax", "numpy", "pillow")  # packages that affect the numbers
_READERS = 8  # files read at a time


def environment() -> dict[str, Any]:
    """The versions and the kind of device, which affect results."""
    import jax

    versions = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    return {"device": jax.local_devices()[0].device_kind, "versions": versions}


FIGURES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".pdf": "pdf", ".svg": "svg"}  # formats by suffix


def write_maps(file: Path, question: str, maps: Any, about: Mapping[str, Any]) -> None:
    """Write the maps of a photo or text with `files.replace` as `.npz`, with what they are of, and the question by
    which `files.question_in` knows the file. Raises InputError."""
    import numpy as np

    versions = json.dumps({name: version_of(name) for name in ("tokentm_jax", "jax", "flax")})

    def write(part: Path) -> None:
        with part.open("wb") as stream:  # a name without .npz would get it
            np.savez_compressed(stream, **{"question": question, "map": maps, **about, "versions": versions})

    replace(file, write)


def write_figure(figure: "Figure", path: Path, hint: str = "", *, overwrite: bool = False, question: str = "") -> None:
    """Write a figure with `files.replace` and the mark of `files.generator`, in a format of `FIGURES`, by its suffix.

    Text in PDF and SVG stays text, and pictures keep their pixels. Equal figures give equal files. Texts contain names
    from users, so dollar signs never make a formula. Raises InputError, also for another suffix.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    kind = FIGURES.get(path.suffix.lower())
    if kind is None:
        *others, last = FIGURES
        raise InputError(f"a figure is written as {', '.join(others)} or {last}, got {path.name!r:.80}")
    software = generator(question)
    options: dict[str, Any] = {
        # Level 4 takes two fifths of the time of the default, 6, and the file of a photo is 4 % larger.
        "png": {"metadata": {"Software": software}, "pil_kwargs": {"compress_level": 4}},
        "jpg": {"pil_kwargs": {"comment": software, "quality": 92}},
        "pdf": {"metadata": {"Creator": software, "CreationDate": None}},
        "svg": {"metadata": {"Creator": software, "Date": None}},
    }
    if kind in ("pdf", "svg"):
        for axes in figure.axes:
            for image in axes.images:
                image.set_interpolation("none")  # all pixels, not resampled to the figure's resolution
    for text in _artists(figure, Text):
        text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]
    # "text.parse_math" is for texts that are made during drawing.
    styles: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": MARK, "text.parse_math": False}
    with warnings.catch_warnings(), rc_context(styles):
        warnings.simplefilter("ignore")  # about letters that the font lacks
        replace(path, lambda part: figure.savefig(part, format=kind, **options[kind]), hint, overwrite=overwrite)


def _artists(artist: Any, kind: type) -> Iterator[Any]:
    """The artists of a kind in a figure, as `findobj` finds them, except the ticks of axes that are off, which would
    first be made."""
    if isinstance(artist, kind):
        yield artist
    off = () if getattr(artist, "axison", True) else (artist.xaxis, artist.yaxis)
    for child in artist.get_children():
        if child not in off:
            yield from _artists(child, kind)


def digest(*parts: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def digest_files(paths: Sequence[Path]) -> list[str | None]:
    """A hash of the content of each file, None if it cannot be read. All bytes are read, in threads."""

    def one(path: Path) -> str | None:
        try:
            with opened(path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except InputError:
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(one, paths))


def require_same(where: str, made: Terms, wanted: Terms) -> None:
    """InputError with the first of the wanted terms that differs from `made`, or is missing there."""
    for name, value in wanted.items():
        if name not in made or _compared(made[name]) != _compared(value):
            was = f"was made with {name} {_shown(made[name])}" if name in made else f"does not state its {name}"
            raise InputError(f"{where} {was}, and this command has {_shown(value)}; choose another --out")


def _compared(value: Any) -> Any:
    return value["identity"] if isinstance(value, Mapping) and "identity" in value else value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "identity" in value:
        return f"{value.get('name', '')} ({value['identity']})".strip()
    return value if isinstance(value, str) else json.dumps(value)[:200]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


@contextmanager
def claimed(folder: Path, terms: Terms, writes: Iterable[str], overwrite: bool = False) -> Iterator[None]:
    """Make a folder of results, or check that it has results of the same terms; no other process may write meanwhile.

    `writes` are the names that the run will write. In a folder without `identity.json` they belong to others: with
    `overwrite` files are replaced, folders never. Raises InputError.
    """
    filelock = require("filelock", "evaluation", "an output folder that can be continued")
    known, lock_file = folder / "identity.json", folder / ".lock"
    if os.path.lexists(lock_file) and not (_is_file(lock_file) and not lock_file.stat().st_size):
        raise InputError(f"{lock_file} is not a file of this program; choose another --out")  # FileLock empties it
    for path in () if os.path.lexists(known) else [folder / name for name in writes]:
        if os.path.lexists(path) and not (overwrite and _is_file(path)):
            advice = "choose another --out" + (", or allow it with --overwrite" if _is_file(path) else "")
            raise InputError(f"{path} is not a file of this program; {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(lock_file, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{folder} is being written by another process") from None
    except (OSError, NotImplementedError, ValueError) as error:
        raise InputError(f"the output folder {folder} cannot be written: {reason(error)}") from None
    try:
        if os.path.lexists(known):
            found = read_json(known)
            if not isinstance(found, dict):
                raise InputError(f"{known} is damaged: it must be a JSON object; choose another --out")
            require_same(str(folder), found, json.loads(json.dumps(terms)))
        else:
            write_json(known, terms)
        yield
    finally:
        lock.release()
