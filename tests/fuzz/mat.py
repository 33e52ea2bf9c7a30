"""ImageNet-Segmentation files (.mat, HDF5) for `tokentm dataset` and `tokentm evaluate`."""

# Tables of cases, several to a line.
# fmt: off

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fuzz.case import BAD, BASE, CHECKPOINT, EITHER, GOOD, Case, base, changed, damage, fifo, folder, link, sparse

RECIPE = """
from tokentm_jax import EvaluateConfig
from tokentm_jax.configs import rows
config = EvaluateConfig("t", "segmentation", "a.mat", rows("rollout"), checkpoint={!r}, batch_size=2)
"""
SIZES = ("--batch-size", "2", "--chunk-size", "2", "--checkpoint", CHECKPOINT, "--out", "out")


def both(note: str, content: Any, expect: str = BAD, names: str = "a.mat", **more: Any) -> Iterator[Case]:
    names = names if expect == BAD else ""
    yield Case(f"dataset: {note}", ("dataset", "a.mat", *SIZES), files={"a.mat": content}, expect=expect, names=names,
        **more)
    files = {"a.mat": content, "r.py": RECIPE.format(CHECKPOINT)}
    yield Case(f"evaluate: {note}", ("evaluate", "r.py", "--out", "o"), files=files, expect=expect, names=names,
        **more)


def edited(change: Callable[[h5py.File], object]) -> Any:
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return changed("seg.mat", edit)


def instead(name: str, **dataset: Any) -> Callable[[h5py.File], None]:
    """Another data set in place of one."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **dataset)
        kind, number = name.rstrip("0123456789"), int(name[-1]) if name[-1].isdigit() else 0
        if kind in ("refs/img", "refs/gt"):
            file[f"value/{kind[5:]}"][number, 0] = file[name].ref
        if kind == "refs/mask":
            file[f"refs/gt{number}"][0, 0] = file[name].ref

    return change


def to_itself(file: h5py.File) -> None:
    file["refs/gt0"][0, 0] = file["refs/gt0"].ref


def in_a_circle(file: h5py.File) -> None:
    file["refs/gt0"][0, 0] = file["refs/gt1"].ref
    file["refs/gt1"][0, 0] = file["refs/gt0"].ref


def chain(file: h5py.File) -> None:
    last = file["refs/mask0"]
    for i in range(2000):
        made = file.create_dataset(f"chain/{i}", (1, 1), h5py.ref_dtype)
        made[0, 0] = last.ref
        last = made
    file["value/gt"][0, 0] = last.ref


def to_group(file: h5py.File) -> None:
    file["value/img"][0, 0] = file["refs"].ref
    file["value/gt"][1, 0] = file["value"].ref


def null(file: h5py.File) -> None:
    del file["value/img"]
    file.create_dataset("value/img", (3, 1), h5py.ref_dtype)


def linked(name: str, target: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = target

    return change


def cases(rng: random.Random) -> Iterator[Case]:
    yield from both("as it is", base("seg.mat"), GOOD)
    for note, change in (("itself", to_itself), ("a circle", in_a_circle), ("a chain of 2,000", chain),
            ("groups", to_group), ("nothing", null)):
        yield from both(f"references to {note}", edited(change), EITHER)
    for name in ("value", "value/img", "value/gt", "refs/img0", "refs/gt0"):
        for target in (h5py.SoftLink(f"/{name}"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("/etc/passwd", "/"),
                h5py.ExternalLink("a.mat", f"/{name}"),
                       h5py.ExternalLink("/dev/zero", "/"), h5py.SoftLink("/")):
            what = f"{name} links to {target!r:.60}"
            yield from both(what, edited(linked(name, target)), EITHER)
    fill = dict(shape=(3, 25000, 25000), dtype=np.uint8, chunks=(1, 1000, 1000), fillvalue=7)
    yield from both("an image of 25000 x 25000 by its fill value", edited(instead("refs/img0", **fill)), EITHER)
    fill = dict(shape=(25000, 25000), dtype=np.float64, chunks=(1000, 1000), fillvalue=7)
    yield from both("a mask of 25000 x 25000 by its fill value", edited(instead("refs/mask0", **fill)), EITHER)
    yield from both("masks of 2**40 elements", edited(instead("refs/mask0", shape=(2**20, 2**20), dtype=np.uint8,
        chunks=(99, 99))), EITHER)
    yield from both("a table of 2**33 references", edited(instead("value/img", shape=(2**33, 1), dtype=h5py.ref_dtype,
        chunks=(1000, 1))))
    yield from both("a table of numbers of 2**33", edited(instead("value/img", shape=(2**33, 1), dtype=np.uint8,
        chunks=(1000, 1))))
    every = [np.uint8, np.int8, np.int32, np.float32, np.float64, np.complex64, bool, "S3", h5py.string_dtype(),
        np.dtype([("a", "i4")]), h5py.ref_dtype, h5py.vlen_dtype(np.int32)]
    for kind in every:
        for name, shape in (("refs/img0", (3, 24, 16)), ("refs/mask0", (24, 16)), ("refs/gt0", (1, 1)),
                ("value/img", (3, 1)), ("value/gt", (3, 1))):
            yield from both(f"{name} of type {kind!s:.30}", edited(instead(name, shape=shape, dtype=kind)), EITHER)
    for name, shapes in (("refs/img0", ((3, 0, 0), (0,), (), (3, 16), (1, 24, 16), (3, 1, 1), (3, 24, 16, 1), (3, 1,
            3000), (4, 24, 16), (3, 0, 5))),
                         ("refs/mask0", ((0, 0), (), (16, 24), (24,), (24, 16, 1), (1, 1))),
                         ("value/gt", ((2, 1), (0, 1), ()))):
        for shape in shapes:
            kind = h5py.ref_dtype if name.startswith("value") else np.uint8
            yield from both(f"{name} of shape {shape}", edited(instead(name, shape=shape, dtype=kind)), EITHER)
    yield from both("no values", edited(linked("value", np.zeros(3))))
    yield from both("no examples", edited(lambda f: (instead("value/img", shape=(0, 1), dtype=h5py.ref_dtype)(f),
        instead("value/gt", shape=(0, 1), dtype=h5py.ref_dtype)(f))))
    yield from both("NaN masks", edited(instead("refs/mask0", data=np.full((24, 16), np.nan))), EITHER)
    for note, content in (("empty", b""), ("text", "x"), ("zip", base("classes.zip")), ("FIFO", fifo),
            ("folder", folder), ("/dev/zero", link("/dev/zero")), ("self-symlink", link("a.mat")),
                          ("MATLAB 5", b"MATLAB 5.0 MAT-file" + b"\0" * 200),
                          ("10 GB", sparse(b"\x89HDF\r\n\x1a\n", 10**10)), ("HDF5 start", b"\x89HDF\r\n\x1a\n")):
        yield from both(note, content, names="a.mat" if note != "folder" else "")
    content = (BASE / "seg.mat").read_bytes()
    while True:
        yield from both("damaged", damage(content, rng), EITHER)
