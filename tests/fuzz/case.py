"""What a case is, and small makers of hostile files."""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Content = bytes | str | Callable[[Path], object]  # of a file, or what makes the file, link or folder

BASE = Path(os.environ.get("FUZZ_BASE", "/nonexistent"))  # what `base.py` made, read only
CHECKPOINT = str(BASE / "tiny.safetensors")
GOOD, BAD, EITHER = "good", "bad", "either"


@dataclass(frozen=True)
class Case:
    """One case. Exactly one of `command`, `call` and `process` says what happens.

    A good answer to a command is exit code 0 where `expect` is "good", 2 and one line "Error: ..." where it is "bad",
    and one of the two where it is "either". What a good answer is beyond that, see `runner.judge`.
    """

    note: str  # what is special about it
    command: tuple[str, ...] = ()  # arguments of `tokentm`, run in the folder of the case
    call: Callable[[], object] | None = None  # a library call in the worker; InputError is a good answer if not GOOD
    process: Callable[[Path], object] | None = None  # starts processes itself; AssertionError for a bad answer
    files: Mapping[str, Content] = field(default_factory=dict)  # path in the folder -> content
    expect: str = BAD
    names: str = ""  # what one line of error must hold, such as the file's name
    own: tuple[str, ...] = ()  # patterns of files that were there before and that the command may change or remove
    seconds: float = 10
    documented: Callable[..., object] | None = None  # a function whose docstring names the exceptions it may raise


def write(path: Path, content: Content) -> None:
    """Make one file of a case, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link(target: str) -> Content:
    return lambda path: path.symlink_to(target)


def base(name: str) -> Content:
    """A copy of something of `base.py`."""

    def copy(path: Path) -> None:
        source = BASE / name
        shutil.copytree(source, path) if source.is_dir() else shutil.copyfile(source, path)

    return copy


def changed(name: str, *changes: Callable[[Path], object]) -> Content:
    """A copy of something of `base.py`, after the changes."""

    def copy(path: Path) -> None:
        base(name)(path)  # pyright: ignore[reportCallIssue]
        for change in changes:
            change(path)

    return copy


def sparse(start: bytes, size: int) -> Content:
    """A file of `size` bytes that takes no space: its start, then zeros."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def damage(content: bytes, rng: random.Random) -> bytes:
    """A random fault: bytes flipped, cut off, left out, repeated, or overwritten with noise."""
    if not content:
        return rng.randbytes(20)
    kind, place = rng.randrange(6), rng.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place + rng.randrange(1, 64) :]
    if kind == 2:
        return content[:place] + content[place : place + 64] * rng.randrange(2, 9) + content[place + 64 :]
    if kind == 3:
        noise = rng.randbytes(rng.randrange(1, 64))
        return content[:place] + noise + content[place + len(noise) :]
    flipped = bytearray(content)
    for _ in range(1 if kind == 4 else 30):
        flipped[rng.randrange(min(len(flipped), 200) if kind == 5 else len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def damaged(name: str, seed: int) -> Content:
    """A damaged copy of a file of `base.py`, or of a folder of which one file is damaged."""

    def make(path: Path) -> None:
        base(name)(path)  # pyright: ignore[reportCallIssue]
        rng = random.Random(seed)
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        file = rng.choice(inside)
        file.write_bytes(damage(file.read_bytes(), rng))

    return make
