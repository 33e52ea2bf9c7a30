"""Peak memory per image: what the compiled program sets aside, without running it.

    python tests/benchmark/memory.py

From XLA's memory analysis of the compiled program at two batch sizes: temporary buffers and results, the larger
batch minus the smaller, per image. What does not grow with the batch (the weights) is thus left out. Compared with
the attention of all blocks and its gradient in float32, 2 L H N^2 4 bytes, and with the program that keeps them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from common import named_vit, names, numbers, parser, publish, table
from ratios import LAST, forward, forward_backward

import tokentm_jax as tm
from tokentm_jax.maths.primitives import wide
from tokentm_jax.models.vit import ViT, init_params

STORE, RECOMPUTE = {"memory": "store"}, {"memory": "recompute"}
# The rows: (method, options).
VARIANTS = [("tokentm", RECOMPUTE), ("tokentm", STORE), ("gae", RECOMPUTE), ("gae", STORE), ("rollout", {})]
VARIANTS += [(method, {}) for method in LAST]
KEPT = "TokenTM over a trace of all blocks"
MIB = 2**20


def over_a_trace(module: ViT) -> Any:
    """The way of most implementations: keep all attention and gradients, then apply the rule."""

    def explain(params: Any, images: Any) -> Any:
        blocks = tm.capture(module, params, images).blocks()
        row = jnp.asarray(module.readout, jnp.float32)
        rule = lambda one: tm.maths.contributions(jax.tree.map(wide, one), wide(one.tokens[0]), row)  # noqa: E731
        return jax.vmap(rule, in_axes=1)(blocks)

    return jax.jit(explain)


def bytes_per_image(function: Any, module: ViT, batches: list[int]) -> float:
    """Growth of the compiled program's buffers from the first batch size to the second, per image."""
    params = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))

    def buffers(batch: int) -> int:
        images = jax.ShapeDtypeStruct((batch, *module.img_size, 3), jnp.float32)
        found = function.lower(params, images).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    small, large = batches
    return (buffers(large) - buffers(small)) / (large - small)


def measure(model: str, dtype: str, batches: list[int]) -> list[list[str]]:
    module = named_vit(model, None if dtype == "float32" else dtype)
    tokens = module.prefix + module.grid[0] * module.grid[1]
    everything = 2 * module.depth * module.num_heads * tokens**2 * 4
    functions = {"forward": forward(module), "forward and backward": forward_backward(module)}
    for method, options in VARIANTS:
        label = ", ".join([method, *(f"{k}={v}" for k, v in options.items())])
        functions[label] = jax.jit(tm.explain_fn(module, method, **options))
    functions[KEPT] = over_a_trace(module)
    found = {label: bytes_per_image(function, module, batches) for label, function in functions.items()}
    kept = found[KEPT]
    columns = [(f"{size / MIB:.1f}", f"{everything / size:.1f}", f"{kept / size:.1f}") for size in found.values()]
    return [[model, dtype, label, *cells] for label, cells in zip(found, columns, strict=True)]


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=names, default=["vit_base_patch16_224", "vit_large_patch16_224"])
    arguments.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    arguments.add_argument("--batches", type=numbers, default=[8, 16], help="two, such as 8,16")
    chosen = arguments.parse_args()
    rows = [r for model in chosen.models for dtype in chosen.dtypes for r in measure(model, dtype, chosen.batches)]
    header = ["model", "type", "", "MiB per image", "times less: arrays alone", "times less: program"]
    small, large = chosen.batches
    note = f"""From the difference between batch {small} and batch {large}, on {jax.devices()[0].platform.upper()}. The
last columns: so many times less than the attention and gradients of all blocks in float32, as arrays alone; and than
the program that keeps them."""
    publish(chosen.out, "# Memory per image", table(header, rows), note)
