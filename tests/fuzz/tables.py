"""`labels.csv` of a folder, and files of class names."""

# Tables of cases, several to a line.
# fmt: off

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

from fuzz.base import NAMES, png
from fuzz.case import BAD, CHECKPOINT, EITHER, GOOD, Case, base, damage, fifo, folder, link, sparse

OUT = ("--checkpoint", CHECKPOINT, "--out", "out", "--batch-size", "2")
PHOTOS = {f"d/{i}.png": png(i) for i in range(4)}
TABLE = "file,class_index\n0.png,0\n1.png,1\n2.png,2\n3.png,3\n"


def labels(note: str, content: Any, expect: str = BAD, names: str = "labels.csv") -> Iterator[Case]:
    files = {**PHOTOS, "d/labels.csv": content, "r.py": base("evaluate.py")}
    names = names if expect == BAD else ""
    yield Case(f"dataset: {note}", ("dataset", "d", *OUT), files=files, expect=expect, names=names)
    command = ("evaluate", "r.py", "--data", "d", "--methods", "rollout", "--out", "o")
    yield Case(f"evaluate: {note}", command, files=files, expect=expect, names=names)


def rows(*lines: str, head: str = "file,class_index") -> str:
    return "\n".join([head, *lines]) + "\n"


def tables() -> Iterator[Case]:
    for note, content in (
        ("as it is", TABLE), ("BOM", "\ufeff" + TABLE), ("CRLF", TABLE.replace("\n", "\r\n")),
        ("CR", TABLE.replace("\n", "\r")), ("another column", rows("x,0.png,1", head="id,file,class_index")),
        ("empty lines", TABLE.replace("\n", "\n\n")), ("quoted", TABLE.replace("0.png", '"0.png"')),
        ("the same row twice", TABLE + "0.png,0\n"),
    ):
        yield from labels(note, content, GOOD)
    for value in ("1_0", "1_2", "2_", "+1", "٣", "¹", "1.0", "0x1", "1e0", "", " ", "-1", "5", "99", "2147483648",
            "9" * 30, "9" * 5000, "nan", "None", "ant", "1 2", "1\0", "0b1", "--1", "True", "٢"):
        expect = EITHER if value in ("+1", "٣", "٢") else BAD
        named = "" if value in ("-1", "5", "99") else "labels.csv"
        for case in labels(f"class number {value[:20]!a}", rows(f"0.png,{value}", "1.png,1"), expect, named):
            if value in ("-1", "5", "99") and case.command[0] == "dataset":
                case = dataclasses.replace(case, expect=EITHER)  # unknown labels are not explained there
            yield case
    yield from labels("spaces about a number", rows("0.png, 1", "1.png,1 "), EITHER)
    yield from labels("a leading zero", rows("0.png,01"), EITHER)
    yield from labels("two classes for one file", rows("0.png,0", "1.png,1", "0.png,2"))
    yield from labels("two classes for one file, written differently", rows("0.png,0", "1.png,1", "./0.png,2"), EITHER)
    vague = ("no rows", "no head", "empty", "zeros", "no file", "FIFO", "/dev/zero", "quote never closed")
    for note, content in (
        ("no rows", "file,class_index\n"), ("no columns", "a,b\n1,2\n"), ("one column", "file\n0.png\n"),
        ("no head", "0.png,1\n"), ("empty", ""), ("short row", rows("0.png")),
        ("short row later", rows("0.png,1", "1.png")), ("short row without comma", rows("0.png,1", "x", "y,1")),
        ("no file", rows(",1")), ("quote never closed", rows('"0.png,1', "1.png,1")),
        ("NUL in the head", "file\0,class_index\n0.png,1\n"), ("columns twice",
        rows("0.png,1,2", head="file,class_index,class_index")),
        ("columns of other case", rows("0.png,1", head="File,Class_Index")),
        ("semicolons", rows("0.png;1", head="file;class_index")), ("a field of 200 KB", rows("a" * 200_000 + ",1")),
        ("UTF-16", TABLE.encode("utf-16")), ("Latin-1", rows("é.png,1").encode("latin-1")), ("zeros", b"\0" * 999),
        ("a photo", png(0)), ("FIFO", fifo), ("folder", folder),
        ("/dev/zero", link("/dev/zero")), ("self-symlink", link("labels.csv")), ("dangling", link("nowhere")),
        ("10 GB", sparse(TABLE.encode(), 10**10)),
    ):
        yield from labels(note, content, EITHER if note in ("columns twice", "folder", "dangling", "self-symlink")
            else BAD, names="d" if note in vague else "labels.csv")
    yield from labels("a NUL for a name", rows("0.png,1", "\0,1"), EITHER)
    yield from labels("long row", rows("0.png,1,2,3,4", "1.png,1"), EITHER)
    for name in ("/etc/passwd", "../canary.txt", "x/../../canary.txt", "missing.png", "a" * 300 + ".png", "a\0.png",
            "", ".", "labels.csv", "\x1b[31m.png", "~/x.png", "C:\\x.png", "d", "é.png", "x/" * 3000):
        yield from labels(f"the file {name[:20]!a}", rows("0.png,0", f'"{name}",1'), EITHER)
        yield from labels(f"the file {name[:20]!a} alone", rows(f'"{name}",1'), names="")
    yield from labels("5,000 rows of missing files", rows(*(f"{i}.png,1" for i in range(5000))), EITHER)


def class_names(note: str, content: Any, expect: str = BAD, name: str = "names.json") -> Iterator[Case]:
    files = {"photo.png": base("photo.png"), "t.safetensors": base("tiny.safetensors"), name: content}
    named = name if expect == BAD else ""
    for command in (("explain", "photo.png", "--checkpoint", CHECKPOINT),
            ("convert", "t.safetensors", "u.safetensors")):
        yield Case(f"{command[0]}: {note}", (*command, "--classes", name), files=files, expect=expect, names=named)


def names() -> Iterator[Case]:
    plain = json.dumps(NAMES)
    for note, content in (("a list", plain), ("BOM", "\ufeff" + plain),
            ("numbers to names", json.dumps(dict(enumerate(NAMES)))),
            ("wnids", json.dumps({str(i): [f"n{i}", n] for i, n in enumerate(NAMES)}))):
        yield from class_names(note, content, GOOD)
    for value in (None, True, 0, 1e400, "x", [], {}, [1, 2, 3, 4, 5], [*NAMES, "x"], NAMES[:4],
            ["a", "b", "c", "d", None], [[]] * 5, [["a", 1]] * 5, {"1": "a"}, {"name": 3}, {"a": "b"}, [{}] * 5,
            ["x" * 10**6]):
        yield from class_names(f"{str(value)[:30]}", json.dumps(value))
    for note, content in (("deep", "[" * 200_000), ("deeper", '{"a":' * 100_000 + "1" + "}" * 100_000),
            ("a number of 10,000 digits", "1" * 10_000), ("cut", plain[:-1]), ("UTF-16", plain.encode("utf-16")),
                          ("two documents", plain + plain), ("empty", ""),
                          ("surrogates", '["\\ud800", "b", "c", "d", "e"]'),
                          ("the same name", '["a", "a", "a", "a", "a"]'), ("empty names", '["", "", "", "", ""]'),
                          ("escapes", '["\\u001b[31m", "\\u0000", "\\n", "\\u202e", "$x^$"]'),
                          ("same key twice", '{"0":"a","0":"b","1":"c","2":"d","3":"e","4":"f"}'),
                          ("markup", '["[red]", "[/red]", "[b", "]", "\\\\["]'),
                          ("long names", json.dumps(["x" * 10_000] * 5))):
        easy = note in ("surrogates", "the same name", "empty names", "escapes", "same key twice", "markup",
            "long names")
        yield from class_names(note, content, EITHER if easy else BAD)
    for note, content in (("lines", "\n".join(NAMES)), ("BOM", "\ufeff" + "\n".join(NAMES)),
            ("CRLF", "\r\n".join(NAMES)), ("spaces", " \n".join(NAMES)), ("empty lines", "\n\n".join(NAMES))):
        yield from class_names(f"text: {note}", content, GOOD, "names.txt")
    for note, content in (("too few", "a\nb"), ("empty", ""), ("Latin-1", b"\xe9\nb\nc\nd\ne"),
            ("UTF-16", "\n".join(NAMES).encode("utf-16")), ("zeros", b"\0" * 99), ("FIFO", fifo), ("folder", folder),
            ("/dev/zero", link("/dev/zero")),
                          ("self-symlink", link("names.txt")), ("dangling", link("nowhere")),
                          ("10 GB", sparse(b"a\n", 10**10)), ("a line separator", "a\u2028b\u2029c\x85d\x0be")):
        yield from class_names(f"text: {note}", content, EITHER if note == "a line separator" else BAD, "names.txt")
    for name in ("", "a\0.json", "x" * 300 + ".json", "\x1b[31m.json", "missing.json", ".", "/dev/zero", "/dev/stdin",
            "canary.txt"):
        command = ("explain", "photo.png", "--checkpoint", CHECKPOINT, "--classes", name)
        yield Case(f"--classes {name[:20]!a}", command, files={"photo.png": base("photo.png")})
    # The BOM must not become part of the first name.
    files = {"photo.png": base("photo.png"), "names.txt": "\ufeff" + "\n".join(NAMES)}
    command = ("explain", "photo.png", "--checkpoint", CHECKPOINT, "--classes", "names.txt", "--target", "ant")
    yield Case("--target is the first name of a file with a BOM", command, files=files, expect=GOOD)
    beside = {"photo.png": base("photo.png"), "t.safetensors": base("tiny.safetensors")}
    for note, content in (("FIFO", fifo), ("/dev/zero", link("/dev/zero")), ("deep", "[" * 99_999),
            ("noise", b"\xff\xfe"), ("10 GB", sparse(b"[", 10**10)), ("self", link("imagenet_classes.json"))):
        files = {**beside, "imagenet_classes.json": content}
        yield Case(f"imagenet_classes.json beside: {note}", ("explain", "photo.png", "--checkpoint", "t.safetensors"),
            files=files, expect=EITHER)


def cases(rng: random.Random) -> Iterator[Case]:
    yield from tables()
    yield from names()
    document = json.dumps(dict(enumerate(NAMES)), indent=1).encode()
    while True:
        yield from labels("damaged", damage(TABLE.encode(), rng), EITHER)
        yield from class_names("damaged", damage(document, rng), EITHER)
