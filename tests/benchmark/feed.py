"""Whether `tokentm dataset` keeps a machine busy: its speed, and that of its stages by themselves.

    python tests/benchmark/feed.py          # 3 minutes on 2 idle cores

JPEGs of 500 x 375 in tars are read and decoded only, computed only (from what was decoded before), and explained by
`explain_dataset`, in turns. Where devices compute and cores decode, the slower stage is the bound. Here the cores do
both, so the bound is that of the sum of the work: 1 / (1 / decoding + 1 / computing).
"""

import io
import shutil
import tarfile
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import alternate, parser, publish, spread, table
from cost import photos

from tokentm_jax.data.shards import examples, find_shards
from tokentm_jax.inputs.images import IMAGENET, Preprocessing
from tokentm_jax.models.architectures import architecture, build
from tokentm_jax.models.loading import Model
from tokentm_jax.models.vit import init_params
from tokentm_jax.runs import pipeline
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.explainer import Explainer

SHARDS, ROUNDS, BATCH = 4, 5, 16
MODELS: dict[str, tuple[Any, int]] = {  # and the number of photos that take some seconds
    "1 block of width 64, 32 x 32": (dict(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2), 1024),
    "2 blocks of width 64, 64 x 64": (dict(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=2), 1024),
    "DeiT-tiny, 224 x 224": (architecture("deit_tiny_patch16_224")[0], 128),
}


def explainer(name: str) -> Explainer:
    """One with random weights."""
    module = build(MODELS[name][0])
    vit = Model(
        module, init_params(module, jax.random.key(0)), Preprocessing(module.img_size, **IMAGENET), None, "random"
    )
    return Explainer(vit, logits="top5", batch_size=BATCH)


def write_tars(folder: Path, count: int) -> None:
    files = photos(64)
    for i in range(SHARDS):
        with tarfile.open(folder / f"{i}.tar", "w") as tar:
            for j in range(count // SHARDS):
                info = tarfile.TarInfo(f"{i}-{j:06}.jpg")
                info.size = len(files[j % 64])
                tar.addfile(info, io.BytesIO(files[j % 64]))


def measured(given: Explainer, count: int) -> dict[str, np.ndarray]:
    """Photos a second [rounds] of reading and decoding, of computing, and of everything."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "maps"
        write_tars(folder, count)
        clock, shards = pipeline.Clock(), find_shards(f"{folder}/*.tar")

        def decode() -> Any:
            groups = pipeline._read(shards, examples, given.batch_size, pipeline.READING)
            return pipeline._decoded(given, groups, True, clock)

        def everything() -> None:
            shutil.rmtree(out, ignore_errors=True)
            explain_dataset(given, f"{folder}/*.tar", str(out))

        ready = [*decode()]
        calls = {
            "decoding": lambda: deque(decode(), 0),
            "computing": lambda: deque(pipeline._computed(given, ready, clock), 0),
            "everything": everything,
        }
        return {name: count / times for name, times in alternate(calls, 0, ROUNDS).items()}


def main(out: Path | None) -> None:
    rows = []
    for name, (_, count) in MODELS.items():
        found = measured(explainer(name), count)
        decoding, computing, speed = found["decoding"], found["computing"], found["everything"]
        both = 1 / (1 / decoding + 1 / computing)
        row = [*(spread(found[stage], 0 if speed.min() > 50 else 1) for stage in found)]
        rows.append([name, *row, spread(speed / np.minimum(decoding, computing)), spread(speed / both)])
    header = ["model", "decoding", "computing", "everything", "of the slower stage", "of the sum of the work"]
    notes = f"Photos/s, median of {ROUNDS} rounds (the middle half of them). `tokentm`, the top 5, batches of {BATCH}."
    publish(out, "# Feeding", table(header, rows), notes)


if __name__ == "__main__":
    main(parser(__doc__).parse_args().out)
