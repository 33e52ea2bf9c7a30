"""What the maps of 10^6, 10^8 and 10^9 photos cost: chips, cores, requests and bytes.

    python tests/benchmark/cost.py          # a minute

Measured here, in seconds of one core: reading a tar and decoding its JPEGs for a ViT-B/16, and
writing a part. The speed of chips is assumed: the roofline's (`roofline.py`), at 40 % of it, not measured.
"""

import io
import math
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import parser, publish, table
from PIL import Image

from tokentm_jax.data.shards import Shard, examples, find_shards
from tokentm_jax.inputs.decoding import Setup, decode_all
from tokentm_jax.inputs.images import IMAGENET, Preprocessing
from tokentm_jax.runs import store
from tokentm_jax.runs.explainer import FILL, layout, numpy_type

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = [*sorted((ROOT / "notebooks").glob("*.jpg")), ROOT / "notebooks" / "chelsea.png"]
SIZE, KILOBYTES = (500, 375), 110  # of ImageNet's photos, on average
SHARD = 10_000  # photos of a tar
REQUESTS = 3  # of a shard, besides those for its blocks: counted in the log of an emulator of S3
BLOCK = 50 * 2**20  # bytes that s3fs reads or writes at a time
CHIPS = {"H100": 1950, "TPU v5e": 477}  # maps/s of TokenTM, ViT-B/16, bfloat16: assumed
JOBS = {10**6: 1, 10**8: 16, 10**9: 128}  # photos -> chips


def photos(count: int) -> list[bytes]:
    """JPEGs of the size of ImageNet's, of several contents."""
    made = []
    for i in range(count):
        image = Image.open(PHOTOS[i % len(PHOTOS)]).convert("RGB").resize(SIZE)
        rng = np.random.default_rng(i)
        noisy = np.clip(np.asarray(image, np.float32) + rng.normal(0, 12, (*SIZE[::-1], 1)), 0, 255).astype(np.uint8)
        made.append(min(
            (jpeg(noisy, quality) for quality in range(70, 98, 3)), key=lambda file: abs(len(file) - KILOBYTES * 1000)
        ))  # fmt: skip
    return made


def jpeg(array: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality)
    return file.getvalue()


def seconds(call: Any) -> float:
    """Processor time, so that other programs disturb it little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def decoding(folder: Path) -> tuple[float, float]:
    """Photos that one core reads and decodes in a second, and bytes of a photo."""
    files = photos(64)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, file in enumerate(files):
            info = tarfile.TarInfo(f"{i:06}.jpg")
            info.size = len(file)
            tar.addfile(info, io.BytesIO(file))
    reader: Any = Preprocessing((224, 224), **IMAGENET)
    setup = Setup(reader, "default", None)
    (shard,) = find_shards(str(folder / "a.tar"))
    times = [seconds(lambda: decode_all(setup, [*examples(shard)])) for _ in range(5)]
    return len(files) / min(times[1:]), float(np.mean([len(file) for file in files]))


def writing(folder: Path, logits: str) -> tuple[float, float]:
    """Photos that one core writes in a second, and bytes of a photo: two methods on a ViT-B/16 with 1000 classes."""
    count, rng = 2048, np.random.default_rng(0)
    columns = layout({"tokentm": (14, 14), "gae": (14, 14)}, "float16", logits, 1000)
    made = {
        "explainer": "",
        "batch_size": 64,
        "columns": {name: {"shape": list(shape), "dtype": kind} for name, (shape, kind) in columns.items()},
    }
    shard = Shard(0, "a.tar", "tar", -1, -1, -1, "")
    place = store.Store(store.Place(folder / logits), made, [shard])
    batches = []
    for start in range(0, count, 64):
        batch = {}
        for name, (shape, kind) in columns.items():
            batch[name] = np.full((64, *shape), FILL[kind], numpy_type(kind))
            if kind.startswith("float"):  # random numbers, which hardly pack: real maps are smaller
                batch[name] = rng.lognormal(size=(64, *shape)).astype(kind)
        batch["key"][:] = [f"n01440764/{start + i:08}" for i in range(64)]
        batches.append(batch)

    def write() -> None:
        part = store.PartWriter(place, shard)
        for batch in batches:
            part.write(batch)
        part.finish()

    best = min(seconds(write) for _ in range(3))
    (file,) = (folder / logits / store.PARTS).rglob("*.parquet")
    return count / best, file.stat().st_size / count


def scaled(number: float) -> str:
    for size, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g} "


def main(out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        decoded, read = decoding(Path(name))
        written = {kind: writing(Path(name), kind) for kind in ("all", "top5", "none")}
    stored = [(f"write, --logits {name}", f"{rate:,.0f}", f"{size:,.0f}") for name, (rate, size) in written.items()]
    reading = ("read a tar and decode", f"{decoded:.0f}", f"{read:,.0f}")
    rates = table(["of one core", "photos/s", "bytes of a photo"], [reading, *stored])
    rows = []
    for count, chips in JOBS.items():
        shards = math.ceil(count / SHARD)
        blocks = math.ceil(SHARD * read / BLOCK) + math.ceil(SHARD * written["top5"][1] / BLOCK)
        for chip, speed in CHIPS.items():
            hours = count / speed / 3600
            sizes = [read, written["top5"][1], written["all"][1]]
            row = [f"{count:,}", f"{chips} {chip}", f"{hours / chips:.2g} h", f"{hours:,.1f}"]
            row += [f"{math.ceil(chips * speed / decoded):,}", f"{shards:,}", scaled(shards * (REQUESTS + blocks))]
            rows.append([*row, *(f"{scaled(count * size)}B" for size in sizes)])
    header = [
        "photos",
        "chips",
        "time",
        "chip hours",
        "cores",
        "shards",
        "requests",
        "read",
        "written, top5",
        "written, all",
    ]
    costs = table(header, rows)
    notes = (
        f"ViT-B/16 with 1000 classes, `tokentm` and `gae` as float16; photos of {SIZE[0]} x {SIZE[1]} and "
        f"{read / 1000:.0f} kB, {SHARD:,} in a tar. Chips are assumed: 40 % of the roofline for `tokentm` only. "
        "Cores keep those chips busy with photos."
    )
    publish(out, "# Cost", rates, costs, notes)


if __name__ == "__main__":
    main(parser(__doc__).parse_args().out)
