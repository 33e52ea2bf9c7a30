"""What every method costs: products of matrices, memory and processor time, next to those of a forward pass.

    python tests/benchmark/passes.py                                    # minutes
    python tests/benchmark/passes.py --rows attcat,tokentm+gae          # only these; + joins methods of one run
    python tests/benchmark/passes.py --beside CHECKOUT_OF_BEFORE        # products and memory, before and now

Products are counted in the traced program, after what is not read is removed; a scan's body counts as often as it
runs. Memory is that of the compiled program (`memory.py`). Time is that of the processor, not of the clock, so other
programs disturb it little: the fastest of several rounds, in turns.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import names, parser, publish, random_images, random_vit, read_products, table
from memory import MIB, bytes_per_image
from ratios import forward, forward_backward

import tokentm_jax as tm
from tokentm_jax.methods.explain import compiled
from tokentm_jax.models.vit import ViT, init_params

ROWS = ["tokentm", "gae", "attcat", "libra_attcat", "conservative_lrp", "attn_lrp", "res_lrp", "pa_lrp", "lrp"]
ROWS += [
    "transformer_attribution",
    "transformer_attribution:memory=recompute",
    "libra_full_grad",
    "input_gradient",
    "gradient_x_input",
    "tokentm_mix",
]
ROWS += ["tokentm+gae", "tokentm+gae+attcat", "tokentm+gae+attcat+legrad+grad_cam+input_gradient+gradient_x_input"]
ROWS += ["libra_tokentm+libra_gae+libra_attcat+conservative_lrp"]


def program_of(module: ViT, row: str) -> Any:
    """Of `method:option=value`, or of several methods of one run, `method+method`."""
    if "+" in row:
        run = compiled(module, {name: {} for name in row.split("+")})
        return jax.jit(lambda params, images: run(params, images, None)[0])
    method, *options = row.split(":")
    chosen: dict[str, Any] = dict(option.split("=") for option in options)
    return jax.jit(tm.explain_fn(module, method, **chosen))


def flops(function: Any, module: ViT) -> float:
    """Of the traced products, for one image."""
    params = jax.eval_shape(partial(init_params, module), jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *module.img_size, 3), jnp.float32)
    return read_products(jax.make_jaxpr(function)(params, images))


def processor(calls: dict[str, Any], rounds: int, warm: bool = False) -> dict[str, float]:
    """The least processor seconds of each call. A round before them compiles, unless the calls are `warm`."""
    found: dict[str, float] = {}
    for call in [] if warm else calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = os.times()
            jax.block_until_ready(call())
            end = os.times()
            found[name] = min(found.get(name, 1e9), end.user + end.system - start.user - start.system)
    return found


def measure(model: str, rows: list[str], batch: int, rounds: int, timed: bool) -> str:
    module, params = random_vit(model)
    images = random_images(batch, module)
    functions = {"forward": forward(module), "forward and backward": forward_backward(module)}
    functions |= {row: program_of(module, row) for row in rows}
    counted = {name: flops(function, module) for name, function in functions.items()}
    kept = {name: bytes_per_image(function, module, [8, 16]) / MIB for name, function in functions.items()}
    calls = {name: partial(function, params, images) for name, function in functions.items()}
    times = processor(calls, rounds) if timed else {}
    lines = [
        [name, f"{counted[name] / 1e9:.1f}", f"{counted[name] / counted['forward']:.2f}", f"{kept[name]:.1f}"]
        + ([f"{times[name]:.2f}", f"{times[name] / times['forward']:.2f}"] if timed else [])
        for name in functions
    ]
    header = ["", "GFLOP", "/ forward", "MiB per image"] + (["processor seconds", "/ forward"] if timed else [])
    return f"**{model}**, float32, time of a batch of {batch}\n\n{table(header, lines)}"


def counts(model: str, row: str) -> list[float] | None:
    """Products in forward passes and MiB per image of one row; None for a row that this version does not have."""
    module, _ = random_vit(model)
    try:
        program = program_of(module, row)
        return [
            flops(program, module) / flops(forward(module), module),
            bytes_per_image(program, module, [8, 16]) / MIB,
        ]
    except ValueError:
        return None


def before_and_now(model: str, rows: list[str], checkout: Path) -> str:
    """Each row is counted by two processes, with the package of a checkout and with this one. Nothing is timed."""
    found: dict[str, list[list[float] | None]] = {}
    for row in rows:
        for root in (checkout, Path(__file__).resolve().parents[2]):
            command = [sys.executable, __file__, "--models", model, "--rows", row, "--counts"]
            environment = {**os.environ, "PYTHONPATH": str(root)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.setdefault(row, []).append(json.loads(done.stdout.splitlines()[-1]))
        print(row, found[row], file=sys.stderr, flush=True)
    lines = [
        [row, *("-" if each is None else f"{each[k]:.{2 - k}f}" for k in range(2) for each in own)]
        for row, own in found.items()
    ]
    header = ["", "forward passes, before", "now", "MiB per image, before", "now"]
    return f"**{model}**, float32\n\n{table(header, lines)}"


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=names, default=["deit_tiny_patch16_224", "vit_base_patch16_224"])
    arguments.add_argument("--rows", type=names, default=ROWS)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=6)
    arguments.add_argument("--untimed", type=names, default=["vit_base_patch16_224"], help="models that are not run")
    arguments.add_argument("--beside", type=Path, help="checkout of an earlier version, to compare with")
    arguments.add_argument("--counts", action="store_true", help="print products and MiB of one row as JSON")
    chosen = arguments.parse_args()
    if chosen.counts:
        print(json.dumps(counts(chosen.models[0], chosen.rows[0])))
        raise SystemExit
    if chosen.beside is None:
        timed = {model: model not in chosen.untimed for model in chosen.models}
        tables = [measure(model, chosen.rows, chosen.batch, chosen.rounds, timed[model]) for model in chosen.models]
    else:
        tables = [before_and_now(model, chosen.rows, chosen.beside) for model in chosen.models]
    publish(chosen.out, "# Cost of the methods", *tables)
