"""Files that nobody has checked, and files that appear whole or not at all.

Everything that is read from a path goes through `opened`: it never waits for a pipe, never reads a device, and turns
each fault into one InputError that names the file. Everything that is written goes through `replace`; where it could
meet a file of the user, `ours` tells whether this program wrote what stands there.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import Any

from tokentm_jax.errors import InputError

LARGEST_TEXT = 64 * 2**20  # bytes of a text, table or description
MARK = "tokentm_jax"  # in PNG files the start of their tEXt "Software", in safetensors files a key of the header
MAP_MEMBERS = {"map", "method", "options", "versions"}  # of every .npz that `tokentm explain` writes
# What Orbax puts into a folder.
_ORBAX = re.compile(r"_\w+|array_metadatas|commit_success\.txt|d|manifest\.ocdbt|ocdbt\.process_\d+")


def reason(error: BaseException) -> str:
    """The cause alone of an error, in a few words."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text[:200] or type(error).__name__


def as_path(value: Any, what: str) -> Path:
    """A path from a caller. InputError "{what} must be a path, got ..." for anything else, and for no name at all."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        raise InputError(f"{what} must be a path, got {value!r:.80}")
    if not text or "\0" in text:
        raise InputError(f"{what} must be a name that a file can have, got {text!r:.80}")
    return Path(text)


@contextmanager
def opened(path: str | os.PathLike[str], what: str = "") -> Iterator[BufferedReader]:
    """A regular file, open for reading. InputError "{what} {path} ..." for a missing file, a folder, a pipe or device,
    a name that no file can have, and for every error while it is read."""
    name = f"{what} {os.fspath(path)}".lstrip()
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{name} is a folder" if stat.S_ISDIR(mode) else f"{name} is no regular file")
        # Without waiting, should it have become a pipe in the meantime.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            yield file
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {reason(error)}") from None
    except ValueError as error:
        if "null" not in str(error):  # os.stat, for a name with a NUL
            raise
        raise InputError(f"{name} cannot be read: its name holds a NUL character") from None


def size_of(file: BufferedReader) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def stored_size(file: BufferedReader) -> int:
    """Bytes of an open file without its holes, which read as zeros and take no room on the disk."""
    number, size, stored, place = file.fileno(), size_of(file), 0, 0
    if not hasattr(os, "SEEK_HOLE"):
        return size
    while place < size:
        try:
            start = os.lseek(number, place, os.SEEK_DATA)
            place = os.lseek(number, start, os.SEEK_HOLE)
        except OSError as error:
            return stored if error.errno == errno.ENXIO else size  # no more data; a file system that cannot tell
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
    """The content of a JSON file. InputError as for `read_text`, and for what is not JSON or nested without end."""
    text = read_text(path, largest, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {os.fspath(path)} is not valid JSON ({reason(error)})".lstrip()) from None


def replace(path: str | os.PathLike[str], write: Callable[[Path], Any], hint: str = "") -> None:
    """Replace a file or folder as a whole by what `write` makes of the path that it is given.

    Either all of it is there afterwards, or what was there before. InputError "{path} cannot be written: ...{hint}".
    """
    path = Path(path)
    tail = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]  # the name itself may leave no room for more
    part, old = (path.with_name(f".{os.getpid()}-{tail}.{kind}") for kind in ("part", "old"))
    try:
        write(part)
        if path.is_dir() and not path.is_symlink():
            os.replace(path, old)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {reason(error)}{hint}") from None
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (part, old):
            remove(left)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that Python code handles (Ctrl-C, SIGTERM) wait for the end of the block: for Orbax's short writing.

    A KeyboardInterrupt may be raised in a callback of its event loop, where nobody can take it. Without effect
    outside the main thread, where none is raised.
    """
    waiting: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, lambda number, frame: waiting.append((number, frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            handlers[number](number, frame)


def remove(path: Path) -> None:
    """Remove an unfinished file or folder, if it is there, as far as that is possible.

    Threads of a library whose writing failed or was interrupted may write on for a moment and make the folder anew:
    a folder is gone when it has not come back.
    """
    with suppress(OSError):
        path.unlink()
    for _ in range(20):
        if not path.is_dir():
            return
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def write_text(path: str | os.PathLike[str], text: str, hint: str = "") -> None:
    """Replace a file by a UTF-8 text, as a whole."""
    replace(path, lambda part: part.write_text(text, encoding="utf-8"), hint)


def write_json(path: str | os.PathLike[str], content: Any, hint: str = "") -> None:
    """Replace a file by a JSON document, as a whole."""
    write_text(path, json.dumps(content, indent=1) + "\n", hint)


def ours(path: str | os.PathLike[str]) -> bool:
    """Whether this program wrote the file or Orbax folder, as a whole; False for a link, and for what is damaged."""
    path = Path(path)
    if path.is_symlink():
        return False
    try:
        if path.is_dir():
            inside = {entry.name for entry in path.iterdir()}
            params = [entry.name for entry in (path / "params").iterdir()]
            description = read_json(path / "description.json")
            known = isinstance(description, dict) and "architecture" in description
            return inside == {"description.json", "params"} and known and all(map(_ORBAX.fullmatch, params))
        with opened(path) as file:
            start = file.read(1024)
            if start.startswith(b"\x89PNG"):  # the mark comes before the picture
                return f"tEXtSoftware\0{MARK} ".encode() in start
            if start.startswith(b"PK"):
                with zipfile.ZipFile(file) as archive:
                    return {f"{name}.npy" for name in MAP_MEMBERS} <= set(archive.namelist())
            length = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{" or length > LARGEST_TEXT:
                return False
            file.seek(8)
            return MARK in json.loads(file.read(length)).get("__metadata__", ())
    except Exception:  # damaged in some way, or of another program: zipfile and JSON raise a dozen kinds
        return False


def require_ours(path: str | os.PathLike[str]) -> None:
    """InputError for a place where something stands that this program did not write."""
    if os.path.lexists(path) and not ours(path):
        raise InputError(f"{os.fspath(path)} is there and was not written by this program: choose another name")
