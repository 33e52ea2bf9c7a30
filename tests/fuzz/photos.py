"""Photos for `tokentm explain`: formats, modes, bombs, damage, names, and things that are no files."""

# Tables of cases, several to a line.
# fmt: off

import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from fuzz.base import png
from fuzz.case import BAD, CHECKPOINT, EITHER, GOOD, Case, base, damage, fifo, folder, link, sparse

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B")
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm"}


def picture(mode: str, size: tuple[int, int] = (30, 20), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = rng.integers(0, 60000, size[::-1])
        kinds: dict[str, Any] = {"I": np.int32, "F": np.float32, "I;16": np.uint16, "I;16B": np.dtype(">u2")}
        return Image.fromarray((values / 60000 if mode == "F" else values).astype(kinds[mode]))
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    if mode in ("LAB", "PA", "RGBa"):
        steps = {"LAB": ("RGB",), "PA": ("P",), "RGBa": ("RGBA",)}[mode]
        for step in steps:
            image = image.convert(step)
        return Image.frombytes("LAB", size, image.tobytes()) if mode == "LAB" else image.convert(mode)
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes | None:
    """The file, or None where the format has no such mode."""
    stream = io.BytesIO()
    try:
        image.save(stream, kind, **options)
    except (OSError, ValueError, KeyError):
        return None
    return stream.getvalue()


def explain(note: str, name: str, content: Any, expect: str = BAD, **more: Any) -> Case:
    files = {name: content, **more.pop("files", {})}
    return Case(
        note,
        ("explain", *more.pop("before", ()), more.pop("argument", name), "--checkpoint", CHECKPOINT, "--json"),
        files={k: v for k, v in files.items() if v is not None},
        expect=expect,
        names=more.pop("names", name if expect == BAD else ""),
        **more,
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return start + chunk(b"IDAT", data or zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int = 8, kind: int = 1, white_is_zero: bool = False, size: int = 0) -> Any:
    """A grey TIFF of one strip of zeros, whose pixels take no space on the disk."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1)]
    entries += [(273, 4, 200), (277, 3, 1), (278, 4, height), (279, 4, width * height * bits // 8), (339, 3, kind)]
    body = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in entries)
    start = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + b"\0\0\0\0"
    return sparse(start, size or 200 + width * height * bits // 8)


def exif(orientation: Any) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


def cases(rng: random.Random) -> Iterator[Case]:
    good = png(0)
    for kind, suffix in FORMATS.items():
        for mode in MODES:
            content = saved(picture(mode), kind)
            if content is not None:
                yield explain(f"{kind} of mode {mode}", f"a.{suffix}", content, GOOD)
    frames = [picture("RGB", seed=i) for i in range(3)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        yield explain(f"animated {kind}", f"a.{FORMATS[kind]}", content, GOOD)
    for size in ((1, 1), (1, 100), (100, 1), (200, 1), (2, 3), (3000, 20)):
        yield explain(f"{size}", "a.png", png(0, size), GOOD)
    for size in ((1, 201), (1000, 1), (20, 5000)):
        yield explain(f"strip {size}", "a.png", png(0, size))
    for width, height in ((100_001, 1000), (2**31 - 1, 2**31 - 1), (0, 5), (5, 0), (0, 0), (2**32 - 1, 1),
            (10**4, 10**4)):
        yield explain(f"PNG header of {width} x {height}", "a.png", png_header(width, height))
    for bits, kind in ((32, 3), (32, 1), (16, 1), (8, 1), (64, 3)):
        yield explain(f"TIFF of 9999 x 10000, {bits} bits, kind {kind}", "a.tif", tiff(9999, 10000, bits, kind),
            EITHER)
        yield explain(f"TIFF of 10001 x 10000, {bits} bits", "a.tif", tiff(10001, 10000, bits, kind))
        yield explain(f"min-is-white, {bits} bits", "a.tif", tiff(30, 20, bits, kind, white_is_zero=True), EITHER)
        yield explain(f"TIFF of {bits} bits, cut off", "a.tif", tiff(3000, 2000, bits, kind, size=300), EITHER)
    yield explain("PNG of 9999 x 10000, 16 bits", "a.png", png_header(9999, 10000, depth=16, colour=6), EITHER)
    for value in ("NaN", "inf", "huge", "negative"):
        values = np.full((20, 30), {"NaN": np.nan, "inf": np.inf, "huge": 3e38, "negative": -5}[value], np.float32)
        yield explain(f"float TIFF of {value}", "a.tif", saved(Image.fromarray(values), "TIFF"), EITHER)
    for orientation in (*range(10), 255, 65535):
        yield explain(f"EXIF orientation {orientation}", "a.jpg", saved(frames[0], "JPEG", exif=exif(orientation)),
            GOOD)
    for note, raw in (("noise", rng.randbytes(500)), ("empty", b""), ("cut", exif(6)[:9]), ("long", exif(6) * 900)):
        yield explain(f"EXIF {note}", "a.jpg", saved(frames[0], "JPEG", exif=b"Exif\0\0" + raw), GOOD)
    many = TiffImagePlugin.ImageFileDirectory_v2()
    many[270] = "x" * 10**6
    yield explain("TIFF with a long tag", "a.tif", saved(frames[0], "TIFF", tiffinfo=many), GOOD)
    text_bomb = good[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 50_000_000)) + good[33:]
    yield explain("PNG whose text unpacks to 50 MB", "a.png", text_bomb, EITHER)
    profile = good[:33] + chunk(b"iCCP", b"k\0\0" + zlib.compress(b"\0" * 200_000_000)) + good[33:]
    yield explain("PNG whose profile unpacks to 200 MB", "a.png", profile, EITHER)
    for note, content in (
        ("empty", b""), ("one byte", b"\x89"), ("text", "hello"), ("zeros", b"\0" * 1000), ("HTML", "<html></html>"),
        ("SVG", "<svg/>"), ("EPS", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) =\n"),
        ("noise", rng.randbytes(999)),
        ("PDF", "%PDF-1.4"), ("ICO", b"\0\0\1\0\1\0\x10\x10"), ("GIF start", b"GIF89a"),
        ("RIFF", b"RIFF\xff\xff\xff\xffWEBPVP8 "),
        ("PPM without size", "P6\n"), ("PPM of letters", "P6 a b c\n"), ("PPM too short", "P6 9 9 255\nx"),
        ("PPM of a huge number", "P6 " + "9" * 5000 + " 1 255\n"), ("PPM plain", "P3 1 2 255 1 2 3 4 5 999999"),
        ("JPEG start", b"\xff\xd8\xff"),
    ):
        for name in ("a.png", "a.jpg"):
            yield explain(f"{note} as {name}", name, content)
    yield explain("a JPEG called .png", "a.png", saved(frames[0], "JPEG"), GOOD)
    yield explain("without suffix", "photo", good, GOOD)
    for note, content in (("FIFO", fifo), ("folder", folder), ("self-symlink", link("a.png")),
            ("/dev/zero", link("/dev/zero"))):
        expected = "a.png" if note != "folder" else ""
        yield explain(note, "a.png", content, names=expected)
        for argument in ("d", "d/*.png", "**/*.png", "d/**"):
            files = {"d/good.png": good, "d/x/y.png": good}
            yield explain(f"{note} beside others, as {argument}", "d/a.png", content, EITHER, argument=argument,
                files=files, names="")
        yield explain(f"{note} after a good one", "a.png", content, before=("good.png",), files={"good.png": good},
            names=expected)
    for note, content in (("/dev/tty", link("/dev/tty")), ("dangling", link("nowhere")),
            ("/proc/self/mem", link("/proc/self/mem")),
                          ("/dev/random", link("/dev/random")), ("link to folder", link("."))):
        yield explain(note, "a.png", content, names="a.png" if note != "link to folder" else "")
    yield explain("a loop of folders", "d/loop", link(".."), EITHER, argument="**/*.png", files={"d/a.png": good})
    loops = {f"d/{i}": link("..") for i in range(4)}
    yield explain("four loops of folders", "d/a.png", good, EITHER, argument="**/*.png", files=loops)
    yield explain("link to a photo", "a.png", link("b.png"), GOOD, files={"b.png": good})
    yield from names(good)
    yield from kept(good)
    files = [saved(picture("RGB"), kind) for kind in FORMATS] + [saved(picture("P"), "PNG"),
        saved(picture("F"), "TIFF")]
    while True:
        place = rng.randrange(len(files))
        suffix = [*FORMATS.values(), "png", "tif"][place]
        content = damage(files[place] or b"", rng)
        yield explain("damaged", f"a.{suffix}", content, EITHER, names="")


def names(good: bytes) -> Iterator[Case]:
    """Names of photos."""
    for name in (
        "with space.png", " .png", "-rf.png", "--json.png", "\x1b[31mred.png", "new\nline.png", "tab\t.png", "ü.png",
        "\udcff\udcfe.png", "写真.png", "‮gnp.png", "a" * 250 + ".png", "é" * 125 + ".png", "%s%n.png", "[a].png",
        "a*.png", "'\".png",
        "$(touch EXECUTED).png", "{x}.png", "\\.png", ".hidden.png", "..png", "a.PNG", "con.png", "[red]x[/red].png",
        "\u200b.png", "$x^2$.png",
        "sheet.png", "a\x07b.png", "\x85.png", "\u2028.png",
    ):
        argument = f"./{name}" if name.startswith("-") else name
        yield explain(f"the name {name[:20]!a}", name, good, GOOD, argument=argument)
        yield explain(f"damaged, the name {name[:20]!a}", name, b"x", argument=argument, names="")
    for name in ("a\0b.png", "b" * 300 + ".png", "c/" * 3000 + "d.png", "\0", "", " ", ".", "..", "/", "~", "*", "?",
            "[", "**", "[a",
                 "http://x/a.png", "/etc/passwd", "a.png/", "a.png/b.png", "-", "/dev/stdin", "/dev/fd/0",
                 "file:///a.png"):
        after = ("--", name) if name.startswith("-") else (name,)
        common = ("--checkpoint", CHECKPOINT, "--json")
        yield Case(f"the name {name[:20]!a} alone", ("explain", *common, *after), files={"a.png": good}, expect=EITHER
            if name in (".", "*", "?", "**", "a.png/") else BAD)
        yield Case(f"the name {name[:20]!a} after a good one", ("explain", *common, "a.png", *after),
            files={"a.png": good}, expect=EITHER)


def kept(good: bytes) -> Iterator[Case]:
    """What the user has in the output folder stays."""
    for method in ("tokentm", "tokentm,rollout"):
        for out in ("d", "e"):
            for mine in ("sheet.png", "a.png", "a.npz", "a.tokentm.npz", "b.png", "sheet-1.png"):
                common = ("--checkpoint", CHECKPOINT, "--method", method)
                files = {"d/a.png": good, "d/b.png": png(1), f"{out}/{mine}": png(2)}
                yield Case(
                    f"{mine} of the user's in --out {out}, {method}",
                    ("explain", "d/a.png", "d/b.png", "--out", out, *common),
                    files=files, expect=EITHER,
                )
    for out in ("a.png", "d/a.png", "missing/deep/er", "link", "dangling", "d", ""):
        files = {"a.png": good, "d/a.png": good, "link": link("d"), "dangling": link("nowhere/x"), "fifo": fifo}
        yield Case(f"--out {out!r}", ("explain", "a.png", "--out", out, "--checkpoint", CHECKPOINT), files=files,
            expect=EITHER)
    more = {"photo.png": base("photo.png")}
    yield Case("twice into one folder", ("explain", "photo.png", "photo.png", "--checkpoint", CHECKPOINT), files=more,
        expect=GOOD)
