"""Reading untrusted files, and atomic writes that keep the user's files.

All reads use `opened`: it never waits for a pipe, never reads a device, and raises one InputError with the file's name
for each fault. All writes use `replace`, which calls `require_ours`: files that this program did not write are kept,
except regular files that the user allows to overwrite. Only a checkpoint can be a folder.
"""

import errno
import json
import logging
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import Any

from tokentm_jax.errors import InputError
from tokentm_jax.samples import hint

LARGEST_TEXT = 64 * 2**20  # bytes of a text, table or description
MARK = "tokentm_jax"  # the start of the mark of texts and figures, and a key in results and weights
MAP_MEMBERS = {"map", "method", "options", "versions"}  # of every .npz that `tokentm explain` writes
# Files and folders of Orbax.
_ORBAX = re.compile(
    r"_[A-Z_]+|_sharding|commit_success\.txt|array_metadatas(/process_\d+)?"
    r"|(ocdbt\.process_\d+/)?(manifest\.ocdbt|d(/[0-9a-f]{32})?)|ocdbt\.process_\d+"
)


def reason(error: BaseException) -> str:
    """The cause of an error in a few words."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text[:200] or type(error).__name__


def as_path(value: Any, what: str) -> Path:
    """A path from a caller. InputError "{what} must be a path, got ..." for anything else, and for an empty name."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        raise InputError(f"{what} must be a path, got {value!r:.80}")
    if not text or "\0" in text:
        raise InputError(f"{what} must be a name that a file can have, got {text!r:.80}")
    return Path(text)


@contextmanager
def opened(path: str | os.PathLike[str], what: str = "") -> Iterator[BufferedReader]:
    """A regular file, open for reading.

    InputError "{what} {path} ..." for anything else, an invalid name, and every error while it is read.
    """
    name = f"{what} {os.fspath(path)}".lstrip()
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{name} is a folder" if stat.S_ISDIR(mode) else f"{name} is not a regular file")
        # Without waiting, in case it has become a pipe in the meantime.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            yield file
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist{hint(path)}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {reason(error)}") from None
    except ValueError as error:
        if "null" not in str(error):  # os.stat, for a name with a NUL
            raise
        raise InputError(f"{name} cannot be read: its name has a NUL character") from None


def size_of(file: BufferedReader) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def stored_size(file: BufferedReader) -> int:
    """Bytes of an open file on the disk, without holes, which are read as zeros."""
    number, size, stored, place = file.fileno(), size_of(file), 0, 0
    if not hasattr(os, "SEEK_HOLE"):
        return size
    while place < size:
        try:
            start = os.lseek(number, place, os.SEEK_DATA)
            place = os.lseek(number, start, os.SEEK_HOLE)
        except OSError as error:
            return stored if error.errno == errno.ENXIO else size  # no more data; not supported by the file system
        stored += place - start
    return stored


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST_TEXT, what: str = "") -> bytes:
    """The whole file. InputError as for `opened`, and for more than `largest` bytes, before they are read."""
    with opened(path, what) as file:
        content = b"" if size_of(file) > largest else file.read(largest + 1)  # it may be growing
        if len(content) > largest or size_of(file) > largest:
            raise InputError(f"{what} {os.fspath(path)} is larger than {largest / 2**20:g} MiB".lstrip())
        return content


def read_text(path: str | os.PathLike[str], largest: int = LARGEST_TEXT, what: str = "") -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. InputError as for `read_bytes`."""
    try:
        return read_bytes(path, largest, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise InputError(f"{what} {os.fspath(path)} is not UTF-8 text ({place})".lstrip()) from None


def read_json(path: str | os.PathLike[str], largest: int = LARGEST_TEXT, what: str = "") -> Any:
    """The content of a JSON file. InputError as for `read_text`, and for invalid or too deeply nested JSON."""
    text = read_text(path, largest, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {os.fspath(path)} is not valid JSON ({reason(error)})".lstrip()) from None


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, largest: int) -> bytes:
    """At most `largest` bytes of an entry; its size in the archive's directory is not trusted. Raises InputError."""
    with errors_as(f"{entry.filename} cannot be read from the zip file"):
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile does not limit the others
            raise InputError("it is neither stored nor deflated")
        with archive.open(entry) as file:
            return file.read(largest)


def replace(
    path: str | os.PathLike[str],
    write: Callable[[Path], Any],
    hint: str = "",
    *,
    overwrite: bool = False,
    folder: bool = False,
) -> None:
    """Write a file or folder atomically: `write(path)` writes it to another path, from which it is moved.

    InputError as for `require_ours`, and "{path} cannot be written: ...{hint}".
    """
    path, room = Path(path), None
    require_ours(path, overwrite, folder=folder)
    try:
        room = Path(tempfile.mkdtemp(".part", f".{MARK}-", path.parent))
        new, old = room / f"new{path.suffix}", room / "old"
        write(new)
        require_ours(path, overwrite, folder=folder)  # writing may have taken long
        try:
            if folder and path.exists():
                os.replace(path, old)
            os.replace(new, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {reason(error)}{hint}") from None
    finally:
        if room is not None:
            remove(room)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals (Ctrl-C, SIGTERM, SIGHUP) until the end of the block, while Orbax writes, in the main thread.

    Else a KeyboardInterrupt may be raised in a callback of its event loop, where it cannot be caught.
    """
    waiting: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows
        handlers = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
        handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: waiting.append((number, frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            handlers[number](number, frame)


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """No messages of a library that logs the errors which it also raises."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        found.setLevel(before)


@contextmanager
def errors_as(message: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Errors as InputError "message: reason". Of all kinds by default: readers of damaged files raise a dozen."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{message}: {reason(error)}") from None


def remove(path: Path) -> None:
    """Remove an unfinished file or folder, if possible. Repeated, as threads of a library may still write into it."""
    with suppress(OSError):
        path.unlink()
    for _ in range(20):
        if not path.is_dir():
            return
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def write_text(path: str | os.PathLike[str], text: str, hint: str = "", *, overwrite: bool = False) -> None:
    """Write a file of UTF-8 text with `replace`."""
    replace(path, lambda part: part.write_text(text, encoding="utf-8"), hint, overwrite=overwrite)


def write_json(path: str | os.PathLike[str], content: Any, hint: str = "", *, overwrite: bool = False) -> None:
    """Write a JSON document with `replace`."""
    write_text(path, json.dumps(content, indent=1) + "\n", hint, overwrite=overwrite)


# ---- what this program wrote ----------------------------------------------------------------------------------------

_GENERATOR = rb"%s [\w.+-]+(?: #([0-9a-f]{16}))?" % MARK.encode()
_CARRIERS = {  # first bytes of a file -> pattern of its mark, in its first or last bytes
    b"\x89PNG": rb"tEXtSoftware\0" + _GENERATOR,
    b"%PDF": rb"/Creator \(" + _GENERATOR + rb"\)",
    b"<?xml": rb"<cc:Agent>\s*<dc:title>" + _GENERATOR + rb"</dc:title>",  # SVG
    b"\xff\xd8": rb"(?:\xff\xfe..|Exif\0\0.{0,4000}?)" + _GENERATOR,  # JPEG: a comment, or the EXIF "Software"
    b"<!doctype html": rb'<meta name="generator" content="' + _GENERATOR + rb'">',
    b"#": rb"<!-- " + _GENERATOR + rb" -->\s*\Z",  # Markdown
}
_LOOKED_AT = 65536  # bytes at the start and at the end, where a PDF has its mark


def generator(question: str = "") -> str:
    """The mark of a text, page or figure for `ours`: program, version and, if given, the digest of a question."""
    return f"{MARK} {version_of(MARK)}{question and f' #{question}'}"


def version_of(package: str) -> str:
    """Version of an installed package; "unknown" for a clone that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def ours(path: str | os.PathLike[str]) -> bool:
    """Whether this program wrote the whole file or Orbax folder; False for a link, or a damaged file."""
    return question_in(path) is not None


def question_in(path: str | os.PathLike[str]) -> str | None:
    """The question (see `generator`) of a file or folder of this program, "" without a question; None for others."""
    path = Path(path)
    try:
        if path.is_symlink():
            return None
        if path.is_dir():
            return "" if _is_orbax(path) else None
        with opened(path) as file:
            start = file.read(_LOOKED_AT)
            for magic, carrier in _CARRIERS.items():
                if start[: len(magic)].lower() == magic.lower():
                    file.seek(max(len(start), size_of(file) - _LOOKED_AT))
                    found = re.search(carrier, start + file.read(_LOOKED_AT), re.DOTALL)
                    return found and (found[1] or b"").decode()
            file.seek(0)
            return _question_in_data(file, start)
    except Exception:  # damaged, or of another program: zipfile and JSON raise a dozen kinds
        return None


def _question_in_data(file: BufferedReader, start: bytes) -> str | None:
    """`question_in` of maps (.npz), results (JSON) or weights (safetensors)."""
    if start.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if not {f"{name}.npy" for name in MAP_MEMBERS} <= set(names):
                return None
            if "question.npy" not in names:  # of earlier versions
                return ""
            with archive.open("question.npy") as member:  # it ends with 16 characters of UTF-32
                return member.read(1000)[-64:].decode("utf-32-le")
    length, content = int.from_bytes(start[:8], "little"), {}
    if start[8:9] == b"{" and length <= LARGEST_TEXT:
        file.seek(8)
        content = json.loads(file.read(length)).get("__metadata__", {})
    elif start.startswith(b"{") and size_of(file) <= LARGEST_TEXT:
        content = json.loads(file.read())
        content |= content.get("run", content).get("versions", {})
    return "" if MARK in content else None


def _is_orbax(folder: Path) -> bool:
    """Whether a folder has a checkpoint of `write_checkpoint` and nothing else."""
    description = read_json(folder / "description.json")
    if not isinstance(description, dict) or "architecture" not in description:
        return False
    if {entry.name for entry in folder.iterdir()} != {"description.json", "params"}:
        return False
    entries = list((folder / "params").rglob("*"))
    known = (_ORBAX.fullmatch(entry.relative_to(folder / "params").as_posix()) for entry in entries)
    return not any(entry.is_symlink() for entry in (folder / "params", *entries)) and all(known)


def require_ours(path: str | os.PathLike[str], overwrite: bool = False, *, folder: bool = False) -> None:
    """The rule for all writes: InputError unless the path is free, or may be replaced.

    A file of this program may be replaced; with `overwrite`, any regular file; with `folder`, a folder of this
    program. A link, pipe or device is never replaced, and a folder is never replaced by a file.
    """
    name = os.fspath(path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be written: {reason(error)}") from None
    wanted, other = (stat.S_ISDIR, "a folder") if folder else (stat.S_ISREG, "a file")
    if not wanted(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFLNK: "a link"}
        kind = kinds.get(stat.S_IFMT(mode), "a pipe or device")
        raise InputError(f"{name} is {kind}, and {other} is to be written there: choose another name")
    if not overwrite and not ours(path):
        advice = "choose another name" + ("" if folder else ", or allow it with --overwrite (Python: overwrite=True)")
        raise InputError(f"{name} exists and was not written by this program: {advice}")
