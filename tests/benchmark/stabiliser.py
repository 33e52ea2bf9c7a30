"""How the epsilon of the signed stabiliser was chosen: DeiT-tiny, the two photos of the goldens.

    python tests/benchmark/stabiliser.py ../shared

For each epsilon, and for the published rule: how far float32 is from float64 (the largest difference as a share of the
map's maximum, and the rank correlations: median, lowest tenth, lowest), over 24 roundings of the photos (a last bit
more or less), and the rank correlation with the published rule in float64. Three minutes on 2 cores.
"""

import sys
from pathlib import Path

import jax
import numpy as np

import tokentm_jax as tm
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.programs import rules as relevance

ROUNDINGS = 24


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    one, other = (x.ravel().argsort().argsort() for x in (a, b))
    return float(np.corrcoef(one, other)[0, 1])


def main(shared: Path) -> None:
    vit = tm.load("deit_tiny_patch16_224", shared / "data" / "deit_tiny_patch16_224.safetensors")
    goldens = np.load(shared / "goldens" / "deit_tiny.npz")
    mean, std = (np.asarray(v, np.float32) for v in (vit.preprocessing.mean, vit.preprocessing.std))
    inputs = (goldens["pixels"].astype(np.float32) / np.float32(255) - mean) / std
    last_bit = np.random.default_rng(0).choice([-1, 0, 1], (ROUNDINGS, *inputs.shape)) * np.finfo(np.float32).eps
    last_bit[0] = 0
    rounded = (inputs * (1 + last_bit)).astype(np.float32)
    print("| epsilon | method | difference | ranks of float32 and float64 | rank with the published rule |")
    print("|---|---|---|---|---|")
    for epsilon in (None, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        if epsilon is not None:
            relevance.SIGNED_EPSILON = epsilon
        for method, key in (("lrp", "lrp_full"), ("transformer_attribution", "transformer_attribution_s0")):
            relevance.lrp.cache_clear()
            jax.clear_caches()
            run = jax.jit(explain_fn(vit.module, method, stabiliser="signed" if epsilon else "reference"))
            single = [np.asarray(run(vit.params, x, goldens["target"])) for x in rounded]
            params = jax.tree.map(lambda a: np.asarray(a, np.float64), vit.params)
            double = np.asarray(run(params, inputs.astype(np.float64), goldens["target"]))
            published = goldens[key].reshape(double.shape)
            pairs = [(a, b) for maps in single for a, b in zip(maps, double, strict=True)]
            worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)
            ranks = ", ".join(
                f"{r:.5f}" for r in np.quantile([rank_correlation(a, b) for a, b in pairs], (0.5, 0.1, 0))
            )
            against = ", ".join(f"{rank_correlation(a, b):.3f}" for a, b in zip(double, published, strict=True))
            print(f"| {epsilon or 'published'} | {method} | {worst:.1e} | {ranks} | {against} |", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared"))
