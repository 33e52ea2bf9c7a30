"""Stores of maps: lost, swapped and damaged parts, and descriptions that lie."""

# Tables of cases, several to a line.
# fmt: off

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.case import BAD, BASE, CHECKPOINT, EITHER, GOOD, Case, base, changed, damage, fifo, link, sparse

FILES = ("tokentm.json", "manifest.parquet", "keys.parquet")
AGAIN = ("dataset", "data", "--out", "store", "--checkpoint", CHECKPOINT, "--methods", "tokentm,rollout",
    "--batch-size", "2", "--shard-size", "4")


ZARR = Path(__file__).parents[1] / "goldens" / "zarr_store"


def read(undamaged: Path = BASE / "store") -> None:
    """Read everything of the folder `store`: an InputError, or what the undamaged store has, where it says "done"."""
    from tokentm_jax import open_maps

    good, found = open_maps(undamaged), open_maps("store")
    done = np.flatnonzero(found.status[:])
    for name in ("status", "logits", "label", "prediction", "target", "key", "reason"):
        np.testing.assert_array_equal(getattr(found, name)[:][done], getattr(good, name)[:][done], err_msg=name)
    for method in good.maps:
        np.testing.assert_array_equal(found.read(method)[done], good.read(method)[done], err_msg=method)
    assert [found.keys[i] for i in done] == [good.keys[i] for i in done]
    assert len(done) == len(good) or "missing" in repr(found), repr(found)


def some() -> None:
    """Read single examples, and find them by their names, as evaluations do."""
    from tokentm_jax import open_maps

    good, found = open_maps(BASE / "store"), open_maps("store")
    for i in np.flatnonzero(found.status[:])[::4]:
        np.testing.assert_array_equal(found.read("tokentm", [i]), good.read("tokentm", [i]), err_msg=str(i))
    rows, maps = found.find("rollout", {}, [(key, None) for key in good.keys])
    np.testing.assert_array_equal(maps, good.read("rollout", rows))


def each(note: str, *changes: Callable[[Path], object], expect: str = EITHER) -> Iterator[Case]:
    """The changed store to all that read stores. What is read is right, or refused."""
    files = {"store": changed("store", *changes)}
    yield Case(f"read: {note}", call=read, files=files, expect=expect, names="store" if expect == BAD else "")
    yield Case(f"read some: {note}", call=some, files=files, expect=EITHER)
    more = {**files, "r.py": base("evaluate.py"), "data": base("data")}
    own = ("cwd/store/*",)
    yield Case(f"evaluate --maps: {note}", ("evaluate", "r.py", "--maps", "store", "--out", "o"), files=more,
        expect=EITHER)
    yield Case(f"dataset again: {note}", AGAIN, files=more, expect=EITHER, own=own)


def part(path: Path, number: int) -> Path:
    return next((path / "shards/00000").glob(f"{number:08}-*.parquet"))


def at(name: str | int, change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A change of a file, or of the part of a shard."""
    return lambda path: change(part(path, name) if isinstance(name, int) else path / name)


def swapped(path: Path) -> None:
    first, second = part(path, 0), part(path, 1)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def document(change: Callable[[Any], Any]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        content = json.loads((path / "tokentm.json").read_text())
        made = change(content)
        (path / "tokentm.json").write_text(json.dumps(content if made is None else made))

    return edit


def placed(keys: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


WRONG = (None, True, -1, 0, 1e400, "x", [], {}, [1], 10**12, "\x1b[31m", "a" * 5000)


def descriptions() -> Iterator[Case]:
    for key in ("methods", "options", "shard_size", "batch_size", "versions", "device", "data", "model", "target",
            "dtype", "profile", "logits", "columns", "shards", "manifest", "explainer", "examples", "keys"):
        for value in (*WRONG, ["../../data"], ["tokentm", "x"], 3, 1):
            yield from each(f"tokentm.json: {key} = {str(value)[:20]!a}", document(placed((key,), value)))
        yield from each(f"tokentm.json: without {key}", document(lambda d, k=key: d.pop(k) and None))
    for key, sub in (("data", "identity"), ("data", "name"), ("data", "spec"), ("model", "identity"),
            ("model", "name"), ("columns", "logits"), ("columns", "maps/tokentm"), ("columns", "key")):
        for value in (*WRONG, {"shape": [2, 3], "dtype": "float64"}, {"shape": [2**30, 2**30], "dtype": "float16"},
                {"shape": [], "dtype": "string"}):
            yield from each(f"tokentm.json: {key}.{sub} = {str(value)[:20]!a}", document(placed((key, sub), value)))


def cases(rng: random.Random) -> Iterator[Case]:
    yield from each("as it is", expect=GOOD)
    for name in (0, 1, 2, *FILES):
        lost = EITHER if name in (0, 1, 2, "keys.parquet") else BAD  # without a part, its examples are not done
        damaged = EITHER if name == "keys.parquet" else BAD
        yield from each(f"{name} lost", at(name, Path.unlink), expect=lost)
        for note, change in (("cut", lambda p: os.truncate(p, 100)), ("empty", lambda p: os.truncate(p, 0)),
                ("a FIFO", lambda p: (p.unlink(), fifo(p))), ("a folder", lambda p: (p.unlink(), p.mkdir())),
                ("/dev/zero", lambda p: (p.unlink(), p.symlink_to("/dev/zero"))),
                ("a link to itself", lambda p: (p.unlink(), p.symlink_to(p.name))),
                ("of 10 GB", lambda p: sparse(p.read_bytes(), 10**10)(p)),
                ("deep", lambda p: p.write_text("[" * 200_000)), ("null", lambda p: p.write_text("null")),
                ("noise", lambda p: p.write_bytes(bytes(range(256)))), ("a bit flipped", flip_bit)):
            unsure = "bit" in note or (note == "a folder" and not isinstance(name, str))  # such a part is missing
            yield from list(each(f"{name} {note}", at(name, change), expect=EITHER if unsure else damaged))
    yield from each("all parts lost", lambda p: shutil.rmtree(p / "shards"), expect=EITHER)
    yield from each("two parts swapped", swapped, expect=BAD)
    for path in ("http://127.0.0.1:9/x", "http://10.255.255.1/x", "https://10.255.255.1/", "gs://nowhere-x/y",
            "s3://nowhere-x/y", "memory://", "file:///etc/", "x://y", "://", "", "\0", "x" * 5000, "nowhere",
            "canary.txt", "/dev/zero", "zip://a", "file://store|zip:", "~", "/proc/self"):
        yield Case(f"open {path[:20]!a}", call=lambda p=path: __import__("tokentm_jax").open_maps(p), expect=BAD)
        files = {"r.py": base("evaluate.py"), "data": base("data")}
        yield Case(f"--maps {path[:20]!a}", ("evaluate", "r.py", "--maps", path, "--out", "o"), files=files)
        if not path.startswith("memory"):
            yield Case(f"--out {path[:20]!a}", ("dataset", "data", "--checkpoint", CHECKPOINT, "--batch-size", "2",
                "--out", path), files=files, expect=BAD if path not in ("nowhere", "~", "", "://") else EITHER)
    for note, content in (("a run", base("run")), ("an Orbax folder", base("orbax")), ("photos", base("data")),
            ("FIFO", fifo), ("a file", "x"), ("self-symlink", link("store")), ("dangling", link("nowhere"))):
        yield Case(f"{note} as --out", AGAIN, files={"store": content, "data": base("data")}, expect=EITHER
            if note == "dangling" else BAD)
        yield Case(f"open {note}", call=lambda: __import__("tokentm_jax").open_maps("store"), files={"store": content})
    mine = {"store": base("store"), "store/mine.txt": "mine", "store/shards/mine.txt": "mine", "data": base("data")}
    yield Case("files of the user's in a store", AGAIN, files=mine, expect=EITHER)
    files_changed = {"store": base("store"), "data": changed("data", lambda p: flip(p / "ant" / "0.png"))}
    yield Case("a photo replaced by another of equal size", AGAIN, files=files_changed, expect=BAD, names="store")
    rest = list(descriptions())
    rng.shuffle(rest)
    yield from rest[:70]
    files = sorted(p.relative_to(BASE / "store") for p in (BASE / "store").rglob("*") if p.is_file())
    old = zarr(rng)
    while True:
        yield next(old)
        name = rng.choice(files)
        content = damage((BASE / "store" / name).read_bytes(), rng)
        yield rng.choice(list(each(f"{name} damaged", lambda p, n=name, c=content: (p / n).write_bytes(c))))


def zarr(rng: random.Random) -> Iterator[Case]:
    """A store of version 0.1 with one file changed."""
    files = sorted(path.relative_to(ZARR) for path in ZARR.rglob("*") if path.is_file())
    changes: tuple[Callable[[Path], object], ...] = (
        Path.unlink, lambda p: os.truncate(p, 10), lambda p: os.truncate(p, 0), lambda p: (p.unlink(), fifo(p)),
        lambda p: (p.unlink(), p.symlink_to("/dev/zero")), lambda p: sparse(p.read_bytes(), 10**10)(p), flip_bit,
        lambda p: p.write_text("[" * 200_000), lambda p: p.write_text("null"))
    while True:
        name, change = rng.choice(files), rng.choice([*changes, None, None])
        content = damage((ZARR / name).read_bytes(), rng)

        def make(path: Path, name: Path = name, change: Any = change, content: bytes = content) -> None:
            shutil.copytree(ZARR, path)
            (path / name).write_bytes(content) if change is None else change(path / name)

        yield Case(f"zarr: {name} changed", call=lambda: read(ZARR), files={"store": make}, expect=EITHER)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip(path: Path) -> None:
    """Another photo in a file of equal size."""
    from fuzz.base import png

    content = next(png(i) for i in range(100, 999) if len(png(i)) == path.stat().st_size
        and png(i) != path.read_bytes())
    path.write_bytes(content)
