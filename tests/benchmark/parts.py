"""The parts of a Transformer block on a CPU: speed of their programs, next to those of PyTorch.

    python tests/benchmark/parts.py

Each part is a program of its own, timed in turns. The PyTorch side needs `pip install torch` in this Python, and is
left out without. Both use all cores.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import alternate, named_vit, names, parser, publish, table

from tokentm_jax.inputs.decoding import cores
from tokentm_jax.maths import primitives, tokentm
from tokentm_jax.models.vit import ViT

try:
    import torch
except ImportError:
    torch = None


def parts_of(module: ViT, batch: int) -> dict[str, tuple[float, Any, Any, tuple[Any, ...]]]:
    """Name -> (products in FLOP, or 0; function of JAX; function of PyTorch or None; shapes)."""
    n, d, h = module.prefix + module.grid[0] * module.grid[1], module.embed_dim, module.num_heads
    hidden, e = int(d * module.mlp_ratio), d // h
    tokens, heads, attention = (batch * n, d), (batch, h, n, e), (batch, h, n, n)
    linear, products = 2 * batch * n * d * hidden, 2 * batch * h * n * n * e
    product = lambda a, b: a @ b  # noqa: E731
    backward = lambda g, w: g @ w.T  # noqa: E731
    scores = lambda q, k: q @ k.swapaxes(-1, -2)  # noqa: E731
    gelu = lambda x: torch.nn.functional.gelu(x)  # type: ignore[union-attr]  # noqa: E731
    in_tokens = lambda a, v: jnp.moveaxis(a @ v, 1, 2).reshape(batch, n, d)  # noqa: E731
    reduced = jax.vmap(lambda a, g: jax.nn.relu(g * a).mean(0))
    return {
        "linear map": (linear, product, product, (tokens, (d, hidden))),
        "the same, backward": (linear, backward, backward, ((batch * n, hidden), (d, hidden))),
        "queries × keys": (products, scores, scores, (heads, heads)),
        "attention × values": (products, product, product, (attention, heads)),
        "the same in the order of tokens": (products, in_tokens, None, (attention, heads)),
        "the same by `primitives.mix`": (products, primitives.mix, None, (attention, heads)),
        "softmax": (0, jax.nn.softmax, lambda x: x.softmax(-1), (attention,)),
        "exact GELU by `erfc`": (0, lambda x: jax.nn.gelu(x, approximate=False), None, ((batch, n, hidden),)),
        "exact GELU": (0, primitives.gelu, gelu, ((batch, n, hidden),)),
        "mean over heads of `relu(G * A)`": (0, reduced, None, (attention, attention)),
        "the same by `tokentm.attention_map`": (
            0,
            jax.vmap(tokentm.attention_map),
            lambda a, g: (g * a).relu().mean(1),
            (attention, attention),
        ),
    }


def measure(model: str, batch: int, seconds: float) -> list[list[str]]:
    rows = []
    for name, (flop, function, other, shapes) in parts_of(named_vit(model), batch).items():
        arrays = [np.random.default_rng(i).standard_normal(shape, np.float32) for i, shape in enumerate(shapes)]
        ours, own = jax.jit(function), [jnp.asarray(array) for array in arrays]
        calls: dict[str, Any] = {"XLA": lambda ours=ours, own=own: ours(*own)}
        if torch is not None and other is not None:
            given = [torch.from_numpy(array) for array in arrays]
            np.testing.assert_allclose(ours(*own), other(*given), rtol=1e-3, atol=1e-3)
            calls["PyTorch"] = lambda theirs=other, given=given: theirs(*given)
        times = {side: float(found.min()) for side, found in alternate(calls, seconds, 20).items()}
        cells = [f"{flop / t / 1e9:.0f} GFLOP/s" if flop else f"{1e3 * t:.2f} ms" for t in times.values()]
        rows.append([model, str(batch), name, *cells, *["-"] * (2 - len(cells))])
    return rows


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=names, default=["deit_tiny_patch16_224", "vit_base_patch16_224"])
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--seconds", type=float, default=3, help="per part, at least")
    chosen = arguments.parse_args()
    if torch is not None:
        torch.set_num_threads(cores())
    rows = [row for model in chosen.models for row in measure(model, chosen.batch, chosen.seconds)]
    note = "float32; the fastest of 20 calls and more."
    publish(chosen.out, "# Parts of a block", table(["model", "batch", "part", "XLA", "PyTorch"], rows), note)
