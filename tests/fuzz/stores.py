"""Stores of maps: lost, swapped and damaged chunks, and descriptions that lie."""

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

from fuzz.case import BAD, BASE, CHECKPOINT, EITHER, GOOD, Case, base, changed, damage, fifo, folder, link, sparse

ARRAYS = ("maps/tokentm", "maps/rollout", "scale/tokentm", "logits", "label", "prediction", "target", "key", "reason",
    "status")
AGAIN = ("dataset", "data", "--out", "store", "--checkpoint", CHECKPOINT, "--methods", "tokentm,rollout",
    "--batch-size", "2", "--chunk-size", "4")


def read() -> None:
    """Read everything of the folder `store`: an InputError, or what the undamaged store has, where it says "done"."""
    from tokentm_jax import open_maps

    good, found = open_maps(BASE / "store"), open_maps("store")
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


def anything() -> None:
    """Read everything, whatever it is: whoever changes files so that their checksums hold can write any."""
    from tokentm_jax import open_maps

    found = open_maps("store")
    repr(found), found.keys, found.skipped, [found.read(method) for method in found.maps]


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


def chunk(path: Path, array: str, number: int) -> Path:
    return next(p for p in sorted((path / array / "c").rglob("*")) if p.is_file()
        and p.relative_to(path / array / "c").parts[0] == str(number))


def at(array: str, number: int, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: change(chunk(path, array, number))


def swapped(a: str, i: int, b: str, j: int) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        first, second = chunk(path, a, i), chunk(path, b, j)
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)

    return change


def document(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        file = path / name / "zarr.json" if name else path / "zarr.json"
        content = json.loads(file.read_text())
        made = change(content)
        file.write_text(json.dumps(content if made is None else made))

    return edit


def whole(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in place of a description."""

    def change(path: Path) -> None:
        file = path / name / "zarr.json" if name else path / "zarr.json"
        file.unlink()
        make(file)

    return change


def placed(keys: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


WRONG = (None, True, -1, 0, 1e400, "x", [], {}, [1], 10**12, "\x1b[31m", "a" * 5000)


def descriptions() -> Iterator[Case]:
    codecs = ("codecs",)
    for name in ("maps/tokentm", "scale/tokentm", "logits", "label", "key", "status"):
        for kind in ("float16", "float32", "float64", "int16", "int32", "uint8", "bool", "complex64", "r16",
                "nonsense", None):
            yield from each(f"{name} of type {kind}", document(name, placed(("data_type",), kind)))
        for endian in ("big", "little", "x", None) if name not in ("key", "status") else ():
            yield from each(f"{name} {endian}-endian",
                document(name, placed((*codecs, 0, "configuration", "endian"), endian)))
        for value in ([10], [10, 2], [12, 2, 3], [10, 3, 2], [2**40, 2, 3], [0, 2, 3], [-1], [], "x", [10, 6],
                [5, 2, 3], [2**62, 2**62, 2**62]):
            yield from each(f"{name} of shape {value}", document(name, placed(("shape",), value)))
        for value in ([4, 2, 3], [10, 2, 3], [1], [5], [2**40], [0], [4, 1, 1]):
            yield from each(f"{name} in chunks of {value}", document(name,
                placed(("chunk_grid", "configuration", "chunk_shape"), value)))
        for value in ([], [{"name": "bytes"}], [{"name": "nonsense"}],
                [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}], None):
            yield from each(f"{name} with codecs {str(value)[:40]}", document(name, placed(codecs, value)))
        for value in (0, 7, "NaN", "Infinity", None, "x", "0x7fc0"):
            yield from each(f"{name} filled with {value}", document(name, placed(("fill_value",), value)))
        yield from each(f"{name}: keys of v2", document(name, placed(("chunk_key_encoding",), {"name": "v2"})))
        yield from each(f"{name}: zarr 2", document(name, placed(("zarr_format",), 2)))
    inside = ("attributes", "tokentm")
    for key in ("methods", "options", "chunk_size", "batch_size", "versions", "device", "data", "model", "target",
            "dtype", "profile"):
        for value in (*WRONG, ["../../data"], ["tokentm", "x"], 3, 1):
            yield from each(f"provenance: {key} = {str(value)[:20]!a}", document("", placed((*inside, key), value)))
        yield from each(f"provenance: without {key}", document("", lambda d, k=key: d["attributes"]["tokentm"].pop(k)
            and None))
    for key, sub in (("data", "examples"), ("data", "identity"), ("data", "name"), ("data", "keys"),
            ("model", "identity"), ("model", "name"), ("model", "preprocessing")):
        for value in WRONG:
            yield from each(f"provenance: {key}.{sub} = {str(value)[:20]!a}",
                document("", placed((*inside, key, sub), value)))


def cases(rng: random.Random) -> Iterator[Case]:
    yield from each("as it is", expect=GOOD)
    for array in ARRAYS:
        lost = EITHER if array == "status" else BAD  # without it, its examples are not done
        yield from each(f"{array}: chunk 0 lost", at(array, 0, Path.unlink), expect=lost)
        yield next(each(f"{array}: chunk 2 lost", at(array, 2, Path.unlink), expect=lost))
        yield next(each(f"{array}: chunk 1 cut", at(array, 1, lambda p: os.truncate(p, 5)), expect=BAD))
        yield next(each(f"{array}: chunk 1 empty", at(array, 1, lambda p: os.truncate(p, 0)), expect=BAD))
        yield next(each(f"{array}: chunk 1 a FIFO", at(array, 1, lambda p: (p.unlink(), fifo(p))), expect=BAD))
        yield next(each(f"{array}: chunk 1 a folder", at(array, 1, lambda p: (p.unlink(), p.mkdir())), expect=BAD))
        yield next(each(f"{array}: chunk 1 /dev/zero", at(array, 1, lambda p: (p.unlink(), p.symlink_to("/dev/zero"))),
            expect=BAD))
        yield next(each(f"{array}: chunk 1 of 10 GB", at(array, 1, lambda p: sparse(p.read_bytes(), 10**10)(p)),
            expect=BAD))
        yield next(each(f"{array}: all chunks lost", lambda p, a=array: shutil.rmtree(p / a / "c"), expect=lost))
        yield next(each(f"{array} lost", lambda p, a=array: shutil.rmtree(p / a), expect=BAD))
        files = {"store": changed("store", swapped(array, 0, array, 1))}
        yield Case(f"{array}: a chunk swapped with another", call=anything, files=files, expect=EITHER)
    for array in ARRAYS[1:9:3]:
        yield from each(f"{array}: a bit of chunk 1 flipped", at(array, 1, flip_bit), expect=BAD)
    yield from each("chunks of arrays of other types swapped", swapped("logits", 0, "status", 0), expect=BAD)
    for name in ("", "maps", "maps/tokentm", "logits", "status", "key"):
        for note, make in (("FIFO", fifo), ("/dev/zero", lambda p: p.symlink_to("/dev/zero")),
                ("self-symlink", lambda p: p.symlink_to(p.name)), ("folder", folder), ("missing", lambda p: None),
                ("empty", Path.touch), ("deep", lambda p: p.write_text("[" * 200_000)),
                           ("null", lambda p: p.write_text("null")), ("[]", lambda p: p.write_text("[]")),
                           ("noise", lambda p: p.write_bytes(bytes(range(256)))),
                           ("10 GB", lambda p: sparse(b"{", 10**10)(p)),
                           ("Latin-1", lambda p: p.write_bytes(b'{"\xe9": 1}'))):
            yield from list(each(f"{name or 'the root'}: zarr.json {note}", whole(name, make)))[:: 2 if name else 1]
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
    mine = {"store": base("store"), "store/mine.txt": "mine", "store/maps/mine.txt": "mine", "data": base("data")}
    yield Case("files of the user's in a store", AGAIN, files=mine, expect=EITHER)
    changed_photo = {"store": base("store"), "data": changed("data", lambda p: flip(p / "ant" / "0.png"))}
    yield Case("a photo replaced by another of equal size", AGAIN, files=changed_photo, expect=BAD, names="store")
    rest = list(descriptions())
    rng.shuffle(rest)
    yield from rest[:70]
    files = sorted(p.relative_to(BASE / "store") for p in (BASE / "store").rglob("*") if p.is_file())
    while True:
        name = rng.choice(files)
        content = damage((BASE / "store" / name).read_bytes(), rng)
        yield rng.choice(list(each(f"{name} damaged", lambda p, n=name, c=content: (p / n).write_bytes(c))))


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
