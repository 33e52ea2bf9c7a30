"""Zip files of class folders for `tokentm dataset`, `evaluate` and `train`."""

# Tables of cases, several to a line.
# fmt: off

import io
import random
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from fuzz.base import NAMES, png
from fuzz.case import BAD, BASE, CHECKPOINT, EITHER, GOOD, Case, base, damage, fifo, folder, link, sparse

OUT = ("--checkpoint", CHECKPOINT, "--out", "out", "--batch-size", "2")


def pack(entries: Any, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, content)
    return stream.getvalue()


def each(note: str, content: Any, expect: str = BAD, **more: Any) -> Iterator[Case]:
    """The same zip to the commands that read one."""
    names = more.pop("names", "a.zip" if expect == BAD else "")
    files = {"a.zip": content, "r.py": base("evaluate.py"), "t.py": base("train.py")}
    yield Case(f"dataset: {note}", ("dataset", "a.zip", *OUT), files=files, expect=expect, names=names, **more)
    command = ("evaluate", "r.py", "--data", "a.zip", "--methods", "rollout", "--out", "o")
    yield Case(f"evaluate: {note}", command, files=files, expect=expect, names=names, **more)
    if expect != GOOD:
        command = ("train", "t.py", "--train", "a.zip", "--test", "a.zip", "--out", "o")
        yield Case(f"train: {note}", command, files=files, expect=expect, names=names, **more)


PHOTOS = {f"{name}/{i}.png": png(i) for i, name in enumerate(NAMES)}
PLAIN = pack(PHOTOS)


def header(content: bytes, **fields: int) -> bytes:
    """Fields of all local headers and all entries of the directory overwritten: (offset there, offset here, size)."""
    places = {
        "version": (4, 6, 2), "made_by": (None, 4, 2), "flags": (6, 8, 2), "method": (8, 10, 2), "crc": (14, 16, 4),
        "packed": (18, 20, 4),
        "size": (22, 24, 4), "name": (26, 28, 2), "extra": (28, 30, 2), "disk": (None, 34, 2), "offset": (None, 42, 4),
    }
    made = bytearray(content)
    for field, value in fields.items():
        local, directory, size = places[field]
        for mark, place in ((b"PK\3\4", local), (b"PK\1\2", directory)):
            start = made.find(mark)
            while start >= 0 and place is not None:
                made[start + place : start + place + size] = value.to_bytes(size, "little")
                start = made.find(mark, start + 4)
    return bytes(made)


def cases(rng: random.Random) -> Iterator[Case]:
    yield from each("as it is", base("classes.zip"), GOOD)
    for field, values in (
        ("version", (0, 63, 99, 65535)), ("made_by", (0, 65535)), ("flags", (1, 0x20, 0x40, 0x800, 0x2000, 65535)),
        ("method", (1, 6, 9, 12, 14, 93, 99, 65535)),
        ("crc", (0, 1, 2**32 - 1)), ("packed", (0, 1, 2**32 - 1)), ("size", (0, 1, 2**32 - 1, 2**31)),
        ("name", (0, 3, 65535)), ("extra", (1, 65535)),
        ("disk", (1, 65535)), ("offset", (0, 7, 2**32 - 1)),
    ):
        for value in values:
            yield from each(f"{field} = {value}", header(PLAIN, **{field: value}), EITHER)
    utf8 = header(pack({**PHOTOS, "ant/xx.png": png(9)}), flags=0x800).replace(b"xx.png", b"\xff\xfe.png")
    yield from each("names that are not the UTF-8 that they say", utf8, EITHER)
    for name in ("/etc/passwd.png", "../../x.png", "ant/../../../x.png", "C:\\x\\y.png", "ant\\b.png", "ant/\0.png",
            "/.png", "ant//x.png", "./ant/x.png", "ant/./x.png", "../x.png",
                 "ant/" + "b" * 5000 + ".png", "a/" * 2000 + "x.png", "\x1b[31m/x.png", "ant/.png", "ant/x.png/",
                 " / .png", "ant/x.PNG", "é/ü.png", "..", "x.png"):
        yield from each(f"the name {name[:30]!a}", pack([*PHOTOS.items(), (name, png(3))]), EITHER)
        yield from each(f"the name {name[:30]!a} alone", pack([(name, png(3))]), EITHER)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from each("duplicates", pack([*PHOTOS.items(), *PHOTOS.items()]), EITHER)
    bomb = pack({**PHOTOS, "ant/bomb.png": b"\0" * 300_000_000})
    yield from each("an entry that unpacks to 300 MB", bomb, EITHER)
    lies = bomb.replace(struct.pack("<I", 300_000_000), struct.pack("<I", 100))
    yield from each("an entry of 300 MB that says 100 bytes", lies, EITHER)
    yield from each("100,000 entries", pack({f"c{i % 7}/{i}.txt": b"" for i in range(100_000)}, zipfile.ZIP_STORED))
    huge = {f"ant/{i}.png": png(0, (1, 1))[:33] for i in range(20_000)}
    yield from each("20,000 damaged photos", pack(huge, zipfile.ZIP_STORED), names="")
    yield from each("nested", pack({"ant/inner.zip": PLAIN}))
    yield from each("folders alone", pack({"ant/": b"", "bee/": b""}))
    yield from each("no entries", pack({}))
    yield from each("texts", pack({"ant/a.txt": b"x"}))
    yield from each("photos without folders", pack({"a.png": png(0), "b.png": png(1)}), EITHER)
    yield from each("damaged photos alone", pack({"ant/a.png": b"x", "bee/b.png": b""}), names="")
    other = pack({f"{name}/{i}.png": png(i) for i, name in enumerate(("ANT", "bee", "cat", "dog", "eels"))})
    yield Case("evaluate: other class names", ("evaluate", "r.py", "--data", "a.zip", "--out", "o"),
        files={"a.zip": other, "r.py": base("evaluate.py")}, names="eels")
    yield Case("dataset: other class names, labels explained", ("dataset", "a.zip", *OUT, "--target", "label"),
        files={"a.zip": other}, names="eels")
    many = pack({f"c{i:04}/{i}.png": png(0) for i in range(300)})
    yield from each("300 classes", many, EITHER)
    yield from each("sizes that differ", pack({**PHOTOS, "ant/z.png": png(1, (17, 40))}), EITHER)
    for note, content in (("empty", b""), ("text", "x"), ("FIFO", fifo), ("folder", folder),
            ("/dev/zero", link("/dev/zero")), ("self-symlink", link("a.zip")), ("end alone", PLAIN[-22:]),
                          ("10 GB of zeros", sparse(b"PK\3\4", 10**10)), ("a .mat", base("seg.mat")),
                          ("a comment of 65,535 bytes", PLAIN[:-2] + b"\xff\xff" + b"x" * 65535)):
        yield from each(note, content, BAD if "comment" not in note else EITHER)
    content = (BASE / "classes.zip").read_bytes()
    while True:
        yield from each("damaged", damage(content, rng), EITHER)
