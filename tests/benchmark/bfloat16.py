"""How alike maps in bfloat16 and in float32 are, on photos: Spearman's rank correlation.

    python tests/benchmark/bfloat16.py

DeiT-tiny; both explain the class that float32 predicts. Weights and photos are those of ../shared/data.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import SHARED, names, parser, publish, table

import tokentm_jax as tm
from tokentm_jax import metrics
from tokentm_jax.data.sources import open_source
from tokentm_jax.inputs.batches import batches

MODEL = "deit_tiny_patch16_224"


def main(data: Path, count: int, batch: int, methods: list[str]) -> str:
    weights, photos = data / f"{MODEL}.safetensors", data / "imagenet_sample"
    if not (weights.is_file() and photos.is_dir()):
        sys.exit(f"needs {weights} and {photos}")
    single, half = (tm.load(MODEL, weights, dtype=dtype) for dtype in (None, "bfloat16"))
    correlate = jax.jit(metrics.rank_correlation)
    found: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    agree = []
    source = open_source(photos, limit=count)
    for part in batches(source, single.preprocessing, batch):
        images = jnp.asarray(part.inputs, jnp.float32) / 255
        target = single.logits(images).argmax(-1)
        agree.append((half.logits(images).argmax(-1) == target)[: len(part.keys)])
        for method in methods:
            maps = [tm.explain(vit, images, method, target) for vit in (single, half)]
            found[method].append(np.asarray(correlate(*maps))[: len(part.keys)])
    rows = []
    for method, parts in found.items():
        values = np.concatenate(parts)
        low = np.percentile(values, 5)
        share = f"{(values >= 0.98).sum()} of {len(values)}"
        rows.append([method, f"{values.mean():.4f}", f"{low:.4f}", f"{values.min():.4f}", share])
    header = ["method", "mean", "5th percentile", "least", "photos at 0.98 or more"]
    same = np.concatenate(agree)
    return f"{table(header, rows)}\n\nThe predicted class is the same in {same.sum()} of {len(same)} photos."


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, default=SHARED / "data", help="folder of weights and photos")
    arguments.add_argument("--count", type=int, default=64, help="of photos")
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--methods", type=names, default=["tokentm", "gae", "rollout"])
    chosen = arguments.parse_args()
    report = main(chosen.data, chosen.count, chosen.batch, chosen.methods)
    publish(chosen.out, "# bfloat16 and float32", report)
