"""`Place`: the files of a store in a folder, or in an object store through fsspec."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokentm_jax.data.shards import filesystem
from tokentm_jax.errors import InputError, require
from tokentm_jax.files import as_path, opened, read_bytes, reason

UNFINISHED = ".part"
STORE = "the store"
LARGEST_DESCRIPTION = 2**24  # bytes of tokentm.json
_KEPT = "; what was finished is kept, and the same command resumes there"


class Place:
    """Where a store is: a folder, or a URL. InputError for anything else, and for errors of reading and writing."""

    def __init__(self, path: str | os.PathLike[str], what: str = STORE) -> None:
        as_path(path, "a store of maps")
        self.what = what
        self.path = os.fspath(path).rstrip("/") or os.fspath(path)
        self.files, self.root = filesystem(self.path, "a store")
        self.folder = Path(self.root) if "file" in self.files.protocol else None
        if self.folder is not None:
            with self.errors("opened"), contextlib.suppress(FileNotFoundError):  # it may be made
                if os.stat(self.folder) and not os.path.isdir(self.folder):
                    raise InputError(f"{self.path} is a file; the maps are in a folder")

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Errors as InputError "the store ... cannot be read"; those of object stores have no common type."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None  # Arrow's own text has more than that
            cause, kept = os.strerror(number) if number else reason(error), what == "written" and self.what == STORE
            raise InputError(f"{self.what} {self.path} cannot be {what}: {cause}{_KEPT if kept else ''}") from None

    def read(self, name: str) -> bytes | None:
        """A small file, None without one."""
        with self.errors("read"), contextlib.suppress(FileNotFoundError):
            if self.folder is None:
                return self.files.cat_file(f"{self.root}/{name}", start=0, end=LARGEST_DESCRIPTION)
            if os.path.lexists(self.folder / name):
                return read_bytes(self.folder / name, LARGEST_DESCRIPTION)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        with self.errors("read"):
            return bool(self.files.exists(f"{self.root}/{name}"))

    def open(self, name: str) -> Any:
        """A file for reading."""
        if self.folder is not None:
            with opened(self.folder / name):  # it is there, and no pipe
                return require("pyarrow", "stores", "a store of maps").OSFile(str(self.folder / name))
        with self.errors("read"):
            return self.files.open(f"{self.root}/{name}", "rb")

    def names(self, folder: str) -> list[str]:
        """The names of all files below a folder, relative to it."""
        top = f"{self.root}/{folder}"
        with self.errors("read"), contextlib.suppress(FileNotFoundError):
            if self.folder is not None:
                return list(_walked(top))
            self.files.invalidate_cache()  # other processes write, too
            return [name.partition(top.lstrip("/") + "/")[2] for name in self.files.find(top)]
        return []

    def is_empty(self) -> bool:
        """Whether nothing is there; unfinished files are nothing."""
        if self.folder is None:
            return not self.files.find(self.root, maxdepth=1)
        return not self.folder.exists() or all(name.endswith(UNFINISHED) for name in os.listdir(self.folder))

    # ---- writing ----

    def temporary(self, name: str) -> Path:
        """A new path on the disk, to write what becomes `name`."""
        part = f".{Path(name).name.partition('-')[0]}.{uuid.uuid4().hex}{UNFINISHED}"
        if self.folder is None:
            return Path(tempfile.gettempdir(), part)
        with self.errors("written"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return (self.folder / name).with_name(part)

    def commit(self, part: Path, name: str) -> None:
        """The file appears under its name as a whole. Unfinished ones that killed processes left there are removed."""
        with self.errors("written"):
            if self.folder is None:
                self.files.put_file(str(part), f"{self.root}/{name}")
                part.unlink()
                return
            final = self.folder / name
            with contextlib.suppress(FileNotFoundError):  # removed by another process, which has written the same
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(part, final)
            os.stat(final)
            for left in final.parent.glob(f".{final.name.partition('-')[0]}.*{UNFINISHED}"):
                left.unlink(missing_ok=True)

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a small file."""
        part = self.temporary(name)
        try:
            with self.errors("written"):
                write(part)
            self.commit(part, name)
        finally:
            part.unlink(missing_ok=True)

    def remove(self, pattern: str, kept: str = "") -> None:
        """Remove the files of a pattern, except the one that is kept."""
        with self.errors("written"):
            for other in self.files.glob(f"{self.root}/{pattern}"):
                if not kept or not other.endswith(kept):
                    self.files.rm_file(other)


def _walked(top: str, prefix: str = "") -> Iterator[str]:
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walked(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name
