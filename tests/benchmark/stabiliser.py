"""How the epsilon of the signed stabiliser was chosen: DeiT-tiny, the two photos of the goldens.

    python tests/benchmark/stabiliser.py ../shared

For each epsilon: how far float32 is from float64 (share of the map's maximum, and rank correlation), and the rank
correlation with the published rule in float64. Some minutes on 2 cores.
"""

import sys
from pathlib import Path

import jax
import numpy as np

import tokentm_jax as tm
from tokentm_jax.maths import relevance
from tokentm_jax.methods.explain import explain_fn


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    one, other = (x.ravel().argsort().argsort() for x in (a, b))
    return float(np.corrcoef(one, other)[0, 1])


def main(shared: Path) -> None:
    vit = tm.load("deit_tiny_patch16_224", shared / "data" / "deit_tiny_patch16_224.safetensors")
    goldens = np.load(shared / "goldens" / "deit_tiny.npz")
    mean, std = (np.asarray(v, np.float32) for v in (vit.preprocessing.mean, vit.preprocessing.std))
    inputs = (goldens["pixels"].astype(np.float32) / np.float32(255) - mean) / std
    print("| epsilon | method | difference | rank, float32 and float64 | rank with the published rule |")
    print("|---|---|---|---|---|")
    for epsilon in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        relevance.SIGNED_EPSILON = epsilon
        for method, key in (("lrp", "lrp_full"), ("transformer_attribution", "transformer_attribution_s0")):
            relevance.lrp.cache_clear()
            jax.clear_caches()
            run = jax.jit(explain_fn(vit.module, method))
            single, double = (
                np.asarray(
                    run(jax.tree.map(lambda a, t=t: np.asarray(a, t), vit.params), inputs.astype(t), goldens["target"])
                )
                for t in (np.float32, np.float64)
            )
            published = goldens[key].reshape(double.shape)
            worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(single, double, strict=True))
            rank = min(map(rank_correlation, single, double))
            against = [rank_correlation(a, b) for a, b in zip(double, published, strict=True)]
            listed = ", ".join(f"{r:.3f}" for r in against)
            print(f"| {epsilon:g} | {method} | {worst:.1e} | {rank:.4f} | {listed} |", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared"))
