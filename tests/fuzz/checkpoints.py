"""Checkpoints for `tokentm convert`: safetensors, npz, Orbax folders, .pth files, and what poses as one."""

# Tables of cases, several to a line.
# fmt: off

import collections
import importlib.util
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.base import OPTIONS, png
from fuzz.case import BAD, BASE, EITHER, GOOD, Case, base, changed, damage, damaged, fifo, folder, link, sparse

TORCH = importlib.util.find_spec("torch") is not None


def convert(note: str, content: Any, expect: str = BAD, name: str = "weights", **more: Any) -> Case:
    model = more.pop("model", ())
    files = {name: content, **more.pop("files", {})}
    command = ("convert", name, more.pop("out", "out.safetensors"), *model)
    return Case(note, command, files=files, expect=expect, names=more.pop("names", name if expect == BAD else ""),
        **more)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_description(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The tiny checkpoint with its description changed."""
    header, data = split((BASE / "tiny.safetensors").read_bytes())
    description = json.loads(header["__metadata__"]["tokentm_jax"])
    made = change(description)
    header["__metadata__"]["tokentm_jax"] = made if isinstance(made, str) else json.dumps(description if made is None
        else made)
    return joined(header, data)


WRONG = (None, True, -1, 0, 1.5, 10**30, "x", "", [], {}, [1, 2, 3], {"a": 1}, float("nan"), [None], "a" * 5000, 1e400)


def descriptions() -> Iterator[Case]:
    def at(*path: str) -> Callable[[Any, Any], None]:
        def put(description: Any, value: Any) -> None:
            for key in path[:-1]:
                description = description[key]
            description[path[-1]] = value

        return put

    places = [("architecture",), ("preprocessing",), ("class_names",), ("name",)]
    places += [("architecture", key) for key in (*OPTIONS, "mlp_ratio", "activation", "class_token", "surprise")]
    places += [("preprocessing", key) for key in ("size", "mean", "std", "crop_pct", "interpolation", "surprise")]
    for place in places:
        for value in WRONG:
            content = with_description(lambda d, p=place, v=value: at(*p)(d, v))
            yield convert(f"{'.'.join(place)} = {str(value)[:30]}", content, EITHER, "w.safetensors")
    deep: list[Any] = []
    for text in ("", "[]", "null", "{", "[" * 100_000, "{}" + " " * 11_000_000, "\ud800", '{"architecture": {}}',
            json.dumps(deep), "1" * 5000):
        yield convert(f"description {text[:20]!r}", with_description(lambda d, t=text: t), name="w.safetensors")
    for names in (["a"], ["a"] * 5, ["a", 1, 2, 3, 4], ["x" * 10**5] * 5, ["\x1b[31m"] * 5, [""] * 5, ["a\0b"] * 5,
            [["a"]] * 5):
        content = with_description(lambda d, n=names: d.update(class_names=n))
        yield convert(f"class names {str(names)[:30]}", content, EITHER, "w.safetensors")


def tensors() -> Iterator[Case]:
    """Headers of safetensors that lie."""
    header, data = split((BASE / "tiny.safetensors").read_bytes())
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        for key, value in (("dtype", "I32"), ("dtype", "F8_E4M3"), ("dtype", "X"), ("shape", []), ("shape", [2**40]),
                ("shape", [-1]),
                           ("shape", [0]), ("data_offsets", [0, 0]), ("data_offsets", [0, 10**15]),
                           ("data_offsets", [8, 4])):
            made = {**header, name: {**header[name], key: value}}
            yield convert(f"{name}: {key} = {value}", joined(made, data), EITHER, "w.safetensors")
        yield convert(f"without {name}", joined({k: v for k, v in header.items() if k != name}, data),
            name="w.safetensors")
    shapes = {name: header[name]["shape"] for name in names}
    for name, batch in (("pos_embed", 2), ("pos_embed", 0), ("cls_token", 2), ("head.weight", 3), ("head.weight", 0),
            ("pos_embed", 7)):
        content = save({n: np.zeros([batch, *s[1:]] if n == name else s, np.float32) for n, s in shapes.items()})
        yield convert(f"{name} of batch {batch}", content, EITHER, "w.safetensors",
            model=("--model", "deit_tiny_patch16_224"))
        yield convert(f"{name} of batch {batch}, described", described(content), EITHER, "w.safetensors")
    for value in (np.nan, np.inf, -np.inf):
        content = save({n: np.full(s, value, np.float32) for n, s in shapes.items()})
        yield convert(f"weights of {value}", described(content), name="w.safetensors")
    for start in (b"\xff" * 8, struct.pack("<Q", 10**12), struct.pack("<Q", 0), struct.pack("<Q", 2**63)):
        yield convert(f"header length {start!r}", start + b"{}" + data, name="w.safetensors")
    yield convert("a header nested 100,000 deep", joined(b'{"a":' * 100_000, data), name="w.safetensors")
    yield convert("a header of 60 MB", sparse(struct.pack("<Q", 60_000_000) + b"{", 61_000_000), name="w.safetensors")


def save(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save(arrays, metadata)


def described(content: bytes) -> bytes:
    metadata = split((BASE / "tiny.safetensors").read_bytes())[0]["__metadata__"]
    header, data = split(content)
    return joined({"__metadata__": metadata, **header}, data)


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


class Payload:
    """What a pickle runs when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def torch_zip(pickled: bytes, prefix: str = "archive", **more: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **more}.items():
            archive.writestr(f"{prefix}/{name}", content)
    return stream.getvalue()


def pickles() -> Iterator[Case]:
    """.pth files whose pickles would write a file EXECUTED."""
    payloads = {
        "os.system": Payload(os.system, "touch EXECUTED"),
        "eval": Payload(eval, "open('EXECUTED', 'w')"),
        "exec": Payload(exec, "open('EXECUTED', 'w')"),
        "open": Payload(open, "EXECUTED", "w"),
        "Path.touch": Payload(Path.touch, Path("EXECUTED")),
        "mkdir": Payload(os.mkdir, "EXECUTED"),
        "numpy": np.arange(3),
        "a set": {1, 2},
        "an OrderedDict": collections.OrderedDict(a=1),
        "a dictionary": {"model": {"a": 1}},
        "a list": [1, 2],
        "None": None,
        "text": "x",
        "nested": Payload(pickle.loads, pickle.dumps(Payload(os.system, "touch EXECUTED"))),
    }
    for note, payload in payloads.items():
        for protocol in (0, 2, 4):
            for wrap in (payload, {"state_dict": {"head.weight": payload}}):
                content = pickle.dumps(wrap, protocol)
                yield convert(f"pickle of {note}, protocol {protocol}", content, name="w.pth")
                yield convert(f"torch zip of {note}, protocol {protocol}", torch_zip(content), name="w.pth")
        old = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True},
            payload))
        yield convert(f"old torch file of {note}", old, name="w.pth")
    yield convert("object array in npz", npz(a=np.array([Payload(os.system, "touch EXECUTED")], object)), name="w.npz")
    if TORCH:
        yield from with_torch()


def with_torch() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of kinds of tensors that it will drop
        return list(pth_files())


def pth_files() -> Iterator[Case]:
    """Real .pth files, where PyTorch is there."""
    import torch
    from safetensors.numpy import load

    arrays = {name: torch.from_numpy(a.copy()) for name, a in load((BASE / "tiny.safetensors").read_bytes()).items()}
    options = ("--model", "deit_tiny_patch16_224")
    for note, made in (
        ("tensors", arrays),
        ("state_dict", {"state_dict": arrays}),
        ("half", {n: t.half() for n, t in arrays.items()}),
        ("complex", {n: t.to(torch.complex64) for n, t in arrays.items()}),
        ("sparse", {n: t.to_sparse() for n, t in arrays.items()}),
        ("meta", {n: t.to("meta") for n, t in arrays.items()}),
        ("quantised", {n: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) for n, t in arrays.items()}),
        ("bfloat16", {n: t.bfloat16() for n, t in arrays.items()}),
        ("expanded", {"head.weight": torch.zeros(1).expand(10**6, 10**6)}),
    ):
        for legacy in (False, True):
            stream = io.BytesIO()
            torch.save(made, stream, _use_new_zipfile_serialization=not legacy)
            yield convert(f".pth of {note} of another model, legacy {legacy}", stream.getvalue(), name="w.pth",
                model=options)


def folders() -> Iterator[Case]:
    """Orbax folders, and what stands at the place of the output."""
    yield convert("Orbax", base("orbax"), GOOD)
    yield convert("Orbax to Orbax", base("orbax"), GOOD, out="new")
    for inside in ("description.json", "params", "params/_METADATA", "params/manifest.ocdbt"):
        for note, change in (("removed", remove), ("a FIFO", pipe), ("a folder", empty_folder), ("/dev/zero", zero),
                ("a loop", loop), ("deep", deep), ("empty", empty)):
            content = changed("orbax", lambda path, c=change, i=inside: c(path / i))
            yield convert(f"Orbax: {inside} {note}", content, EITHER)
    for shape in ({"a": np.zeros(3)}, {"blocks": np.zeros(3)}, {"blocks": {"attn": np.zeros((1, 2))}},
            {"head": {"kernel": np.float32(1)}}, [np.zeros(2)]):
        yield convert(f"Orbax tree {str(shape)[:30]}", changed("orbax", lambda path, s=shape: other_tree(path, s)))
    for out in ("orbax", "mine"):
        files = {"orbax": base("orbax"), "orbax/mine.txt": "mine", "mine/a.txt": "mine"}
        own = ("cwd/orbax/description.json", "cwd/orbax/params", "cwd/orbax/params/*")
        yield convert(f"onto the folder {out}, which has the user's own", base("orbax"), EITHER, out=out, files=files,
            own=own)
    for out, mine in (("w.safetensors", "text"), ("w.safetensors", folder), ("w.safetensors", link("canary.txt")),
            ("w", "text"), ("w", link("d"))):
        yield convert(f"onto {out}, {mine!r:.20}", base("orbax"), EITHER, out=out, files={out: mine, "d": folder})
    for out in ("", "out.bin", "a/b/c.safetensors", "x" * 300 + ".safetensors", "a\0.safetensors",
            "/proc/x.safetensors", "weights", "..", ".", "canary.txt/x"):
        yield convert(f"to {out[:20]!r}", base("tiny.safetensors"), EITHER, out=out, own=("cwd/weights",))


def remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        remove(path)
        make(path)

    return change


pipe, empty_folder, empty = replaced(fifo), replaced(folder), replaced(Path.touch)
zero = replaced(lambda path: path.symlink_to("/dev/zero"))
loop = replaced(lambda path: path.symlink_to(path.name))
deep = replaced(lambda path: path.write_text("[" * 100_000))


def other_tree(path: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    remove(path / "params")
    with ocp.PyTreeCheckpointer() as writer:
        writer.save((path / "params").resolve(), tree)


HOLE = b'{"head.weight": {"dtype": "F32", "shape": [2500, 1000000], "data_offsets": [0, 10000000000]}}'


def cases(rng: random.Random) -> Iterator[Case]:
    for name in ("tiny.safetensors", "orbax"):
        yield convert(f"as it is: {name}", base(name), GOOD, "w.safetensors" if "." in name else "w")
    yield convert("Google's", base("google.npz"), BAD, "w.npz", model=("--model", "deit_tiny_patch16_224"))
    yield convert("Google's without model", base("google.npz"), BAD, "w.npz")
    for note, content in (("empty", b""), ("text", "hello"), ("a photo", png(0)), ("a zip", base("classes.zip")),
            ("a .mat", base("seg.mat")), ("zeros", b"\0" * 99),
                          ("FIFO", fifo), ("folder", folder), ("/dev/zero", link("/dev/zero")),
                          ("self-symlink", link("weights")), ("zip start", b"PK\3\4"),
                          ("store", base("store")), ("run", base("run")), ("noise", rng.randbytes(999)),
                          ("10 GB of zeros", sparse(b"", 10**10)),
                          ("10 GB of safetensors", sparse(struct.pack("<Q", 2) + b"{}", 10**10)),
                          ("10 GB of one tensor", sparse(struct.pack("<Q", len(HOLE)) + HOLE, 8 + len(HOLE) + 10**10)),
                          ("/dev/random", link("/dev/random"))):
        yield convert(note, content)
        if callable(content) or len(content) > 6:
            yield convert(f"{note}, to explain", content, names="weights", files={"a.png": png(0)})
    for note, arrays in (("empty", {}), ("one array", {"a": np.zeros(3)}),
            ("kernel", {"embedding/kernel": np.zeros((8, 8, 3, 16))}),
            ("scalar", {"embedding/kernel": np.float32(1)})):
        yield convert(f"npz: {note}", npz(**arrays), name="w.npz")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding/kernel.npy", npz_header((10**5, 10**4)) + b"\0" * 10**8)
    yield convert("npz bomb", bomb.getvalue(), name="w.npz")
    for shape in ((10**9, 10**9), (-1,), (0,), (2**70,)):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("embedding/kernel.npy", npz_header(shape))
        yield convert(f"npz whose array says {shape}", stream.getvalue(), name="w.npz")
    groups = [list(group) for group in (folders(), pickles(), tensors(), descriptions())]
    for group in groups[1:]:
        rng.shuffle(group)  # they have more cases than there is time for
    yield from groups[0]
    for group, count in zip(groups[1:], (50, 50, 60), strict=True):
        yield from group[:count]
    content = {name: (BASE / name).read_bytes() for name in ("tiny.safetensors", "google.npz")}
    while True:
        kind = rng.choice(("tiny.safetensors", "google.npz", "orbax"))
        if kind == "orbax":
            yield convert("damaged Orbax", damaged("orbax", rng.getrandbits(32)), EITHER)
        else:
            yield convert(f"damaged {kind}", damage(content[kind], rng), EITHER, f"w{Path(kind).suffix}")


def npz_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()
