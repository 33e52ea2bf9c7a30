"""What one explained token of a decoder costs: products of matrices, memory and processor time, by its context.

    python tests/benchmark/next_word.py                     # products and memory, nothing is run; minutes
    python tests/benchmark/next_word.py --timed 128,512     # also the processor time for these contexts

A decoder of SmolLM2-135M's size with random weights, on which nothing here depends. The forward pass has logits after
the last token only. Products are those of the traced program (`passes.py`). Memory is what the compiled program sets
aside for one text, without the weights; the last column is what a block adds, from the program with half the blocks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from common import names, numbers, parser, publish, read_products, table
from memory import MIB
from passes import processor, program_of

import tokentm_jax as tm
from tokentm_jax.inputs.texts import Texts
from tokentm_jax.models.decoder import NextWord

METHODS = ("tokentm", "gae", "attn_lrp")
SMOLLM2: dict[str, Any] = {
    **{"vocab_size": 49152, "max_length": 8192, "embed_dim": 576, "depth": 30, "num_heads": 9, "num_kv_heads": 3},
    **{"head_dim": 64, "mlp_hidden": 1536, "rope_base": 100000.0},
}

ROWS = ["forward", *(f"{method}{memory}" for method in METHODS for memory in ("", ":memory=recompute"))]


def texts(module: NextWord, tokens: int) -> Texts:
    """One text of noise, without padding."""
    numbers = jax.random.normal(jax.random.key(1), (1, tokens, module.embed_dim), jnp.float32)
    flags = jnp.ones((1, tokens), bool)
    return Texts(numbers, flags, jnp.zeros((1, tokens), jnp.int32), ~flags)


def program(module: Any, row: str) -> Any:
    if row == "forward":
        return jax.jit(lambda params, given: module.apply({"params": params}, given))
    return program_of(module, row)


def shapes(module: NextWord, tokens: int) -> tuple[Any, Any]:
    params = jax.eval_shape(partial(tm.models.init_params, module), jax.random.key(0))
    return params, jax.eval_shape(lambda: texts(module, tokens))


def compiled(module: NextWord, row: str, tokens: int) -> Any:
    return program(module, row).lower(*shapes(module, tokens)).compile()


def buffers(run: Any) -> int:
    """Bytes of a compiled program besides its arguments."""
    found = run.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def measure(tokens: int, rows: list[str], rounds: int, timed: bool) -> list[list[str]]:
    module = NextWord(**SMOLLM2)
    half = NextWord(**SMOLLM2 | {"depth": SMOLLM2["depth"] // 2})
    runs = {row: compiled(module, row, tokens) for row in rows}
    times: dict[str, float] = {}
    if timed:
        params, given = tm.models.init_params(module, jax.random.key(0)), texts(module, tokens)
        times = processor({row: partial(run, params, given) for row, run in runs.items()}, rounds, warm=True)
    counted = {row: read_products(jax.make_jaxpr(program(module, row))(*shapes(module, tokens))) for row in rows}
    lines = []
    for row in rows:
        size = buffers(runs[row])
        block = (size - buffers(compiled(half, row, tokens))) / (module.depth - half.depth)
        time = [f"{times[row]:.2f}", f"{times[row] / times['forward']:.2f}"] if timed else ["", ""]
        cells = [f"{counted[row] / 1e9:.0f}", f"{counted[row] / counted['forward']:.2f}", *time]
        lines.append([str(tokens), row, *cells, f"{size / MIB:.0f}", f"{block / MIB:.2f}"])
    return lines


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--contexts", type=numbers, default=[128, 512, 2048], help="tokens, such as 128,512")
    arguments.add_argument("--rows", type=names, default=ROWS)
    arguments.add_argument("--timed", type=numbers, default=[], help="contexts that are run, too")
    arguments.add_argument("--rounds", type=int, default=3)
    chosen = arguments.parse_args()
    rows = [
        line
        for tokens in chosen.contexts
        for line in measure(tokens, chosen.rows, chosen.rounds, tokens in chosen.timed)
    ]
    header = ["tokens", "", "GFLOP", "/ forward", "processor seconds", "/ forward", "MiB", "MiB per block"]
    publish(chosen.out, "# One explained token of SmolLM2-135M, in float32", table(header, rows))
