"""Files that are shards for `tokentm dataset`: tars, Parquet and ArrayRecord."""

# Tables of cases, several to a line.
# fmt: off

import io
import random
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuzz.base import png
from fuzz.case import BAD, CHECKPOINT, EITHER, GOOD, Case, damage, fifo, folder, link, sparse

COMMAND = ("--out", "out", "--checkpoint", CHECKPOINT, "--batch-size", "2", "--methods", "rollout")


def each(note: str, name: str, content: Any, expect: str = EITHER, **more: Any) -> Iterator[Case]:
    """The file by itself, and as a shard after a good one: whatever is in it, the good one is explained."""
    yield Case(note, ("dataset", name, *COMMAND), files={name: content}, expect=expect, **more)
    suffix = name.partition(".")[2]
    files = {f"s-0.{suffix}": GOODS[suffix](), f"s-1.{suffix}": content}
    yield Case(f"{note}, second", ("dataset", f"s-{{0..1}}.{suffix}", *COMMAND), files=files, expect=expect, **more)


# ---- tars -----------------------------------------------------------------------------------------------------------


def member(name: str, content: bytes = b"", form: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    """One member of a tar with its header; `fields` may lie."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form, "utf-8", "surrogateescape") + content + b"\0" * (-len(content) % 512)


def tar(*members: bytes, end: bytes = b"\0" * 1024) -> bytes:
    return b"".join(members) + end


def header(name: bytes, kind: bytes, size: int, content: bytes = b"") -> bytes:
    """A header with any size, of base 256 where it is large, and the right checksum."""
    large = (b"\x80" if size >= 0 else b"\xff") + (size % 2**88).to_bytes(11)
    digits = b"%011o\0" % size if 0 <= size < 8**11 else large
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + digits + b"0" * 11 + b"\0" + b" " * 8 + kind)
    block = block.ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + b"\0" * (-len(content) % 512)


def pax(**fields: str) -> bytes:
    """A header of fields for the next member."""
    records = b""
    for name, value in fields.items():
        record = f" {name.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        size = len(record) + len(str(len(record)))
        records += str(size + (len(str(size)) > len(str(len(record))))).encode() + record
    return header(b"pax", b"x", len(records), records)


PHOTOS = tuple(member(f"a/{i}.png", png(i)) + member(f"a/{i}.cls", b"%d" % i) for i in range(3))
HUGE = 10**12


def tars() -> Iterator[Case]:
    yield from each("a tar", "s.tar", tar(*PHOTOS), GOOD)
    for name in ("../../x.png", "/etc/x.png", "a/../../../x.png", "C:\\x.png", "a\\b.png", "x", "", ".", "..", "/",
            ".png",
            "a/.png", "a" * 90_000 + ".png", "a/" * 40_000 + "x.png", "\x1b[31m.png", "\udcff\udc80.png", "é/ü.png",
            "a\n.png",
            "a/0.png", "x.PNG", "x.jpg", "x.pickle", "x.pyd", "x.npy", "x.txt", "x.flac", "x.png.exe"):
        yield from each(f"the name {name[:20]!a}", "s.tar", tar(*PHOTOS, member(name, png(5))))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
            tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z", b"V", b"M", b"D"):
        for target in ("/etc/passwd", "../../canary.txt", "a/0.png", "x.png"):
            content = tar(*PHOTOS, member("x.png", type=kind, linkname=target), *PHOTOS)
            yield from each(f"a member of type {kind!r} to {target}", "s.tar", content)
    for kind in (b"0", b"L", b"K", b"x", b"g", b"X", b"S", b"2", b"5", b"7"):
        for size in (1, 511, 2**20 + 1, 2**26 + 1, 8**11 - 1, HUGE, 2**62, 2**80, -1, -512):
            yield from each(f"a member of type {kind!r} of {size} bytes that are not there", "s.tar",
                tar(*PHOTOS, header(b"x.png", kind, size), *PHOTOS))
        large = tar(*PHOTOS, header(b"x.png", kind, 4 * 10**9), end=b"")
        yield from each(f"a member of type {kind!r} of 4 GB of zeros", "s.tar", sparse(large, 4 * 10**9 + 2**20),
            seconds=60)
    for fields in ({"size": "99999999999999"}, {"size": "-5"}, {"size": "x"}, {"path": "../../x.png"},
            {"path": "x" * 200_000},
            {"path": "x" * 2_000_000}, {"hdrcharset": "nonsense"}, {"linkpath": "/etc/passwd"}, {"mtime": "nan"},
                {"uid": "1e400"},
            {"GNU__sparse__size": "99999999999"}, {"GNU__sparse__map": "0,1," * 1000}, {"GNU__sparse__map": "x"},
            {"GNU__sparse__major": "1", "GNU__sparse__minor": "0", "GNU__sparse__realsize": str(HUGE)},
            {"GNU__sparse__major": "1", "GNU__sparse__minor": "0", "GNU__sparse__name": "../../x.png"}):
        note = f"fields {str(fields)[:60]}"
        yield from each(note, "s.tar", tar(*PHOTOS, pax(**fields), member("x.png", png(5)), *PHOTOS))
    yield from each("a large photo", "s.tar", tar(member("x.png", b"\0" * (2**26 + 1)), *PHOTOS))
    all_kinds = [member(f"x.{suffix}", b"\0" * 2**25) for suffix in ("jpg", "png", "gif", "bmp", "webp", "tiff",
        "wav", "flac")]
    yield from each("one example with eight large photos", "s.tar", tar(*all_kinds, *PHOTOS), seconds=30)
    many = b"".join(member(f"{i}.json", b"{}") for i in range(20_000))
    yield from each("20,000 members without a photo", "s.tar", tar(many), seconds=60)
    yield from each("a photo in 20,000 other members", "s.tar", tar(*(member(f"0.{i}",
        b"{}") for i in range(20_000)), *PHOTOS))
    for label in (b"", b"99999999999999999999", b"-1", b"nan", b"ant", b"\xff\xfe", b"x" * 10**6, b"\0", b"3\n",
            b"1e5"):
        yield from each(f"the class {label[:20]!r}", "s.tar", tar(*PHOTOS, member("x.cls", label), member("x.png",
            png(5))))
    yield from each("no members", "s.tar", tar())
    yield from each("nothing", "s.tar", b"", BAD)
    yield from each("a zip", "s.tar", b"PK\3\4" + b"\0" * 600)
    yield from each("compressed", "s.tar", b"\x1f\x8b\x08" + b"\0" * 600)
    for note, content in (("FIFO", fifo), ("a folder", folder), ("dangling", link("nowhere")), ("/dev/zero",
            link("/dev/zero"))):
        yield from each(note, "s.tar", content, BAD)


# ---- Parquet --------------------------------------------------------------------------------------------------------


def table(**columns: Any) -> bytes:
    return packed(pa.table(columns))


def packed(made: pa.Table, **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(made, stream, **options)
    return stream.getvalue()


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = pa.StructArray.from_arrays([value], ["bytes"])
    return value


IMAGES = [png(i) for i in range(3)]


def parquets() -> Iterator[Case]:
    yield from each("Parquet", "s.parquet", table(image=IMAGES, label=[0, 1, 2]), GOOD)
    structs = [{"bytes": image, "path": "../../x.png"} for image in IMAGES]
    yield from each("structs", "s.parquet", table(image=structs), GOOD)
    for note, column in {
        "numbers": pa.array([1, 2, 3]), "null": pa.nulls(3), "lists": pa.array([[1], [2], []]),
        "bools": pa.array([True, False, None]),
        "paths": pa.array(["/etc/passwd", "../../canary.txt", "http://127.0.0.1:9/x.png"]), "floats": pa.array([1.5,
        float("nan"), None]),
        "large": pa.array(IMAGES, pa.large_binary()), "fixed": pa.array([b"abcd"] * 3, pa.binary(4)),
        "dictionary": pa.array(IMAGES).dictionary_encode(), "some null": pa.array([IMAGES[0], None, IMAGES[2]]),
        "structs without bytes": pa.array([{"path": "/etc/passwd"}] * 3),
        "structs of null": pa.array([{"bytes": None}] * 3),
        "structs of structs": nested(pa.array(IMAGES), 5), "deep structs": nested(pa.array(IMAGES), 200),
        "deeper structs": nested(pa.array(IMAGES), 2000), "lists of images": pa.array([[image] for image in IMAGES]),
        "maps": pa.array([[("bytes", IMAGES[0])]] * 3, pa.map_(pa.string(), pa.binary())),
        "dates": pa.array([1, 2, 3], pa.timestamp("ns")), "decimals": pa.array([1, 2, 3], pa.decimal128(5, 2)),
        "large structs": pa.array([{"bytes": image, "other": [[1] * 1000] * 100} for image in IMAGES]),
        "texts": pa.array(["a text", "\x1b[31m", ""]),
    }.items():
        yield from each(f"images that are {note}", "s.parquet", packed(pa.table({"image": column})))
        yield from each(f"labels that are {note}", "s.parquet", packed(pa.table({"image": IMAGES, "label": column})))
        yield from each(f"keys that are {note}", "s.parquet", packed(pa.table({"image": IMAGES, "key": column})))
    for value in (2**62, -(2**62), -1, 5):
        yield from each(f"the label {value}", "s.parquet", table(image=IMAGES, label=[value] * 3))
    yield from each("long keys", "s.parquet", table(image=IMAGES, key=["x" * 10**6] * 3))
    yield from each("equal keys", "s.parquet", table(image=IMAGES, key=["x"] * 3))
    yield from each("no rows", "s.parquet", packed(pa.table({"image": pa.array([], pa.binary())})))
    yield from each("no columns", "s.parquet", packed(pa.table({})))
    yield from each("no images", "s.parquet", table(x=[1]), BAD, names="parquet")
    yield from each("two columns of one name", "s.parquet", packed(pa.Table.from_arrays([pa.array(IMAGES)] * 2,
        ["image"] * 2)))
    yield from each("10,000 columns", "s.parquet", packed(pa.table({f"c{i}": [i] for i in range(10_000)})), seconds=60)
    zeros = pa.table({"image": pa.array([b"\0" * 2**20] * 600)})
    bomb = packed(zeros, compression="zstd", use_dictionary=False)
    yield from each("a row group that unpacks to 600 MB", "s.parquet", bomb, seconds=60)
    one = packed(pa.table({"image": pa.array([b"\0" * 7 * 10**8])}), compression="zstd", use_dictionary=False)
    yield from each("an image that unpacks to 700 MB", "s.parquet", one, seconds=60)
    random_rows = packed(pa.table({"image": pa.array([random.Random(i).randbytes(2**20) for i in range(300)])}))
    yield from each("noise of 300 MB in a row group", "s.parquet", random_rows, seconds=60)


# ---- ArrayRecord ----------------------------------------------------------------------------------------------------


def array_record(*records: bytes, options: str = "group_size:1") -> bytes:
    import tempfile
    from pathlib import Path

    from array_record.python.array_record_module import ArrayRecordWriter

    with tempfile.NamedTemporaryFile() as file:
        writer = ArrayRecordWriter(file.name, options)
        for record in records:
            writer.write(record)
        writer.close()
        return Path(file.name).read_bytes()


def array_records() -> Iterator[Case]:
    yield from each("ArrayRecord", "s.array_record", array_record(*IMAGES), GOOD)
    for record in (b"", b"\0" * 10, b"\x0a" * 1000, b"\x0a\xff\xff\xff\xff\x0f", b"{" * 1000, b"\x80" * 100,
            b"\xff\xd8", b"RIFF"):
        yield from each(f"the record {record[:8]!r}", "s.array_record", array_record(*IMAGES, record))
    zeros = array_record(b"\0" * 5 * 10**8, options="group_size:1,zstd:1")
    yield from each("a record that unpacks to 500 MB", "s.array_record", zeros, seconds=60)
    yield from each("no records", "s.array_record", array_record())
    yield from each("nothing", "s.array_record", b"")
    yield from each("noise", "s.array_record", bytes(range(256)) * 300)
    yield from each("10 GB", "s.array_record", sparse(array_record(*IMAGES), 10**10), seconds=60)


GOODS: dict[str, Any] = {
    "tar": lambda: tar(*PHOTOS), "parquet": lambda: table(image=IMAGES), "array_record": lambda: array_record(*IMAGES),
}


def cases(rng: random.Random) -> Iterator[Case]:
    yield from parquets()
    yield from array_records()
    made = list(tars())
    yield from made[:60]
    rest = made[60:]
    rng.shuffle(rest)
    yield from rest[:140]
    while True:
        kind = rng.choice([*GOODS])
        yield rng.choice(list(each(f"{kind} damaged", f"s.{kind}", damage(GOODS[kind](), rng))))
