"""Heatmaps per second: this library and what a PyTorch user writes, with the same weights in one run.

    python tests/benchmark/throughput.py

On a GPU where JAX has one (PyTorch then needs it, too), else on all cores. The PyTorch side (`pytorch.py`) is timm in
eager mode with hooks and autograd; it needs `pip install torch timm` in this Python, and is left out without. Before
anything is timed both sides must give the same maps. Batch 1 is one image at a time. Keep the machine free of other
work: PyTorch's threads wait for one another at every step, so that it loses more by it than JAX.

Share of peak: the operations of one forward pass and of the backward pass to the tokens (no weight gradients), by
formula, over what the chip can do: its data sheet, or on a CPU the fastest product of two large matrices, by either.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    SHARED,
    alternate,
    hand_flops,
    named_vit,
    names,
    numbers,
    parser,
    publish,
    random_images,
    spread,
    table,
)

import tokentm_jax as tm
from tokentm_jax import metrics
from tokentm_jax.inputs.decoding import cores
from tokentm_jax.models.checkpoint import read_tensors
from tokentm_jax.models.params import to_params, to_timm
from tokentm_jax.models.vit import ViT, init_params

try:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or PyTorch's idle threads take the cores while JAX is timed
    import pytorch
except ImportError:
    pytorch = None

MODELS = ["deit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"]
METHODS = ("tokentm", "gae")
JAX, TORCH = "JAX", "PyTorch"
# Of products of matrices in float32; JAX takes TF32 on a GPU by default, PyTorch does not.
PRECISION = {"float32": "highest", "tf32": "high", "bfloat16": "highest"}
LEAST_AGREEMENT = {"float32": 0.999, "tf32": 0.95, "bfloat16": 0.8}  # rank correlation of the maps
# Dense, in TFLOP/s.
PEAKS = {
    "H200": {"bfloat16": 989, "tf32": 494, "float32": 67},
    "H100 PCIe": {"bfloat16": 756, "tf32": 378, "float32": 51},
    "H100": {"bfloat16": 989, "tf32": 494, "float32": 67},
    "A100": {"bfloat16": 312, "tf32": 156, "float32": 19.5},
}
ALONE = "PyTorch is left out: this Python lacks torch or timm (`pip install torch timm`)."


def peak(kind: str) -> tuple[float, str]:
    """FLOP/s of the chip, and where that is from: `PEAKS`, or a measurement."""
    device = jax.devices()[0]
    known = next((peaks for name, peaks in PEAKS.items() if name in device.device_kind), None)
    if known is not None:
        return known[kind] * 1e12, "data sheet"
    side = 2048 if device.platform == "cpu" else 8192
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    square = jnp.full((side, side), 0.5, dtype)
    product = jax.jit(jnp.matmul)
    calls: dict[str, Callable[[], Any]] = {JAX: lambda: product(square, square)}
    if pytorch is not None and device.platform == "cpu":
        other = pytorch.torch.full((side, side), 0.5, dtype=getattr(pytorch.torch, dtype))
        calls[TORCH] = lambda: other @ other
    fastest = {name: 2 * side**3 / times.min() for name, times in alternate(calls, 3, 5).items()}
    return max(fastest.values()), "measured: " + ", ".join(f"{n} {f / 1e12:.3g}" for n, f in fastest.items())


def attempt(call: Callable[[], Any]) -> Any:
    """What the call gives, or None where the device's memory is not enough."""
    try:
        return jax.block_until_ready(call())
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            return None
        raise


def agreement(a: Any, b: Any) -> tuple[float, float]:
    """Least rank correlation over the batch, and largest difference in units of the map's maximum."""
    a, b = np.asarray(a, np.float32), b.cpu().float().numpy()
    rank = float(np.asarray(metrics.rank_correlation(jnp.asarray(a), jnp.asarray(b))).min())
    return rank, float((np.abs(a - b).max((1, 2)) / np.abs(b).max((1, 2))).max())


def weights_of(name: str, module: ViT, data: Path) -> dict[str, np.ndarray]:
    """Real ones if `data` has them, else random ones, by timm's names."""
    if (data / f"{name}.safetensors").is_file():
        return read_tensors(data / f"{name}.safetensors")
    return to_timm(init_params(module, jax.random.key(0))) if pytorch is None else pytorch.random_weights(name)


def bind(params: Any, functions: dict[str, Any], explainer: Any, images: jax.Array) -> dict[Any, Callable[[], Any]]:
    """(side, method) -> a call that makes the heatmaps of `images`, which wait on the device."""
    calls: dict[Any, Callable[[], Any]] = {(JAX, m): partial(f, params, images) for m, f in functions.items()}
    if explainer is not None:
        inputs = explainer.inputs(images)
        calls |= {(TORCH, m): partial(explainer.explain, inputs, m) for m in functions}
    return calls


def measure(
    name: str, kind: str, limit: float, batches: list[int], data: Path, seconds: float, rounds: int
) -> list[list[Any]]:
    """Rows of the table for one model and type, up to the batch that fits on neither side."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    module = named_vit(name, dtype)
    weights = weights_of(name, module, data)
    params = jax.device_put(to_params(module, weights, name))
    functions = {method: jax.jit(tm.explain_fn(module, method)) for method in METHODS}
    explainer = None if pytorch is None else pytorch.Explainer(name, weights, dtype)
    rows: list[list[Any]] = []
    for batch in batches:
        calls = bind(params, functions, explainer, random_images(batch, module))
        maps = {key: found for key, call in calls.items() if (found := attempt(call)) is not None}
        if not maps:
            break
        both = [m for m in METHODS if (JAX, m) in maps and (TORCH, m) in maps]
        agreed = {m: agreement(maps[JAX, m], maps[TORCH, m]) for m in both}
        for m, (rank, difference) in agreed.items():
            if not rank >= LEAST_AGREEMENT[kind]:
                sys.exit(f"{name}, {kind}, {m}: the maps differ, rank correlation {rank:.3f}, by {difference:.0e}")
        times = alternate({key: calls[key] for key in maps}, seconds, rounds, warm=True)
        for method in METHODS:
            row = [name, kind, batch, method]
            for side in (JAX, TORCH):
                found = times.get((side, method))
                rate = None if found is None else batch / float(np.median(found))
                row += (
                    ["-", "-"]
                    if rate is None
                    else [f"{rate:.4g}", f"{100 * rate * hand_flops(module, 1, 1) / limit:.0f}"]
                )
            ratio = spread(times[TORCH, method] / times[JAX, method]) if method in both else "-"
            alike = "{:.4f}; {:.0e}".format(*agreed[method]) if method in both else "-"
            rows.append([*row, ratio, alike])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return rows


def main(chosen: Any) -> None:
    # Each side gets its half of the GPU's memory, so that neither crowds the other out.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9" if pytorch is None else "0.45")
    gpu = jax.devices()[0].platform != "cpu"
    sides = ALONE
    if pytorch is not None:
        if gpu != pytorch.torch.cuda.is_available():
            sys.exit("JAX and PyTorch must run on the same device: one sees a GPU and the other does not")
        if gpu:
            pytorch.torch.cuda.set_per_process_memory_fraction(0.45)
        pytorch.torch.set_num_threads(cores())
        versions = f"PyTorch {pytorch.torch.__version__}, timm {pytorch.timm.__version__}"
        sides = f"{versions}, eager; both sides use all cores."
    else:
        print(ALONE, file=sys.stderr)
    batches = chosen.batches or ([1, 8, 64, 256, 512, 1024, 2048, 4096] if gpu else [1, 8])
    kinds = chosen.types or (["float32", "tf32", "bfloat16"] if gpu else ["float32", "bfloat16"])
    rows, peaks = [], []
    for kind in kinds:
        jax.config.update("jax_default_matmul_precision", PRECISION[kind])
        if pytorch is not None:
            pytorch.torch.set_float32_matmul_precision(PRECISION[kind])
        limit, source = peak(kind)
        peaks.append(f"{kind} {limit / 1e12:.3g} TFLOP/s ({source})")
        for name in chosen.models:
            rows += measure(name, kind, limit, batches, chosen.data, chosen.seconds, chosen.rounds)
    header = ["model", "type", "batch", "method", "JAX, images/s", "% of peak", "PyTorch, images/s", "% of peak"]
    header += ["JAX / PyTorch", "least rank correlation; largest difference"]
    notes = f"""{sides} Speeds are medians over the rounds; the ratio is of speeds in the same round, with the middle
half of the rounds. The last column compares the maps of the two sides, differences in units of the maximum. A dash:
does not fit, or was not run. Peak: {"; ".join(peaks)}."""
    publish(chosen.out, "# Heatmaps per second", table(header, rows), notes)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=names, default=MODELS)
    arguments.add_argument("--types", type=names, help=f"of {','.join(PRECISION)}; default: those that the chip has")
    arguments.add_argument("--batches", type=numbers, help="default: 1,8 on a CPU, up to the largest on a GPU")
    arguments.add_argument("--data", type=Path, default=SHARED / "data", help="NAME.safetensors there is used")
    arguments.add_argument("--seconds", type=float, default=8, help="per model, type and batch, at least")
    arguments.add_argument("--rounds", type=int, default=3, help="per model, type and batch, at least")
    main(arguments.parse_args())
