"""TokenTM on a GPU or TPU, with attention as XLA compiles it and with the kernel: speed, share of peak, memory.

    make bench-gpu                             # ten minutes at most, into tests/benchmark/results/gpu.md
    python tests/benchmark/gpu.py --smoke      # a model of two small blocks on any device, in seconds

Each row is written when it is measured, and a second run measures only the rows that are missing: `--state` has them
with the device and the versions. After `--seconds`, no row is begun. Models have random weights, in bfloat16. Each
batch waits on the device; a call is timed until its maps are there, and the speed is the median over calls.

Share of peak: the operations of one forward pass and of the backward pass to the tokens by formula, with plain
attention, over what the chip can do (its data sheet). So both rows of a model count the same work. Memory: temporary
buffers and results of the compiled program, per image. Agreement: rank correlation of the first image's map with that
of plain attention.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import alternate, hand_flops, named_vit, names, numbers, parser, publish, random_images, spread, table
from throughput import attempt, peak

import tokentm_jax as tm
from tokentm_jax import metrics
from tokentm_jax.models.vit import ViT, init_params

MODELS = ["vit_base_patch16_224", "vit_large_patch16_224"]
SIZES = [224, 1024, 512, 384]  # pixels; the most different ones first, if the time is short
BATCHES = {224: 128, 384: 32, 512: 16, 1024: 2}  # about as many tokens each, which fit on 80 GB with plain attention
SMOKE = ViT((32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
HEADER = [
    "model",
    "image",
    "batch",
    "attention",
    "images/s",
    "% of peak",
    "MiB per image",
    "compiling, s",
    "agreement",
]
CALLS = 10  # timed, at least

Row = dict[str, Any]


def module_of(model: str, size: int) -> ViT:
    module = SMOKE if model == "smoke" else named_vit(model, "bfloat16")
    return module.clone(img_size=(size, size))


def measure(model: str, size: int, fused: bool, seconds: float) -> Row:
    """One row: its results, or an error instead."""
    module, batch = module_of(model, size), BATCHES.get(size, 2)
    params = jax.jit(lambda key: init_params(module, key))(jax.random.key(0))
    images, start = random_images(batch, module), time.perf_counter()
    try:
        program = (
            jax.jit(tm.explain_fn(module, "tokentm", fused_attention=fused)).lower(params, images, None).compile()
        )
        compiling, memory = time.perf_counter() - start, program.memory_analysis()
        assert memory is not None
        maps = attempt(lambda: program(params, images, None))
    except Exception as error:  # the kernel has not run on every device: its row states what failed
        return {"batch": batch, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    if maps is None:
        return {"batch": batch, "error": "does not fit"}
    times = alternate({"": lambda: program(params, images, None)}, seconds, CALLS, warm=True)[""]
    return {
        "batch": batch,
        "rate": spread(batch / times, 1),
        "flops": float(np.median(batch / times)) * hand_flops(module, 1, 1),
        "mib": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / batch / 2**20,
        "compiling": compiling,
        "map": np.asarray(maps[0], np.float32).tolist(),
    }


def agreement(row: Row, plain: Row | None) -> str:
    if plain is None or "map" not in row or "map" not in plain:
        return "-"
    return f"{float(metrics.rank_correlation(*(np.asarray(r['map'], np.float32)[None] for r in (row, plain)))[0]):.4f}"


def shown(found: dict[str, Row], limit: float | None) -> list[list[str]]:
    """Rows of the table."""
    lines = []
    for key, row in found.items():
        model, size, how = key.split(" ")
        line = [model, f"{size} px", str(row["batch"]), how]
        if "error" in row:
            lines.append([*line, row["error"].replace("|", " ").replace("\n", " "), *["-"] * 4])
            continue
        share = "-" if limit is None else f"{100 * row['flops'] / limit:.1f}"
        same = "-" if how == "plain" else agreement(row, found.get(f"{model} {size} plain"))
        lines.append([*line, row["rate"], share, f"{row['mib']:.1f}", f"{row['compiling']:.0f}", same])
    return lines


def main(chosen: argparse.Namespace) -> None:
    """Raises SystemExit without a GPU or TPU, except with `--smoke`."""
    device = jax.devices()[0]
    if device.platform == "cpu" and not chosen.smoke:
        sys.exit("JAX has no GPU or TPU here: --smoke runs a small model on this CPU")
    limit, source = (None, "not measured") if chosen.smoke else peak("bfloat16")
    machine = f"{device.device_kind}, JAX {jax.__version__}"
    known = json.loads(chosen.state.read_text()) if chosen.state.is_file() else {}
    found: dict[str, Row] = known.setdefault(machine, {})
    models, sizes = (["smoke"], [32, 48]) if chosen.smoke else (chosen.models, chosen.sizes)
    end = time.monotonic() + chosen.seconds
    for model in models:
        for size in sizes:
            for how in ("plain", "kernel"):
                key = f"{model} {size} {how}"
                if key in found or time.monotonic() > end:
                    continue
                found[key] = measure(model, size, how == "kernel", chosen.row_seconds)
                print(key, found[key].get("rate", found[key].get("error")), file=sys.stderr, flush=True)
                chosen.state.parent.mkdir(parents=True, exist_ok=True)
                chosen.state.write_text(json.dumps(known))
    missing = len(models) * len(sizes) * 2 - len(found)
    top = "not known" if limit is None else f"{limit / 1e12:.4g} TFLOP/s ({source})"
    note = f'bfloat16, `tokentm` with `memory="store"`. {machine}. Peak: {top}. Rows not measured yet: {missing}.'
    publish(chosen.out, "# TokenTM on an accelerator", table(HEADER, shown(found, limit)), note)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=names, default=MODELS)
    arguments.add_argument("--sizes", type=numbers, default=SIZES, help="of images, in pixels")
    arguments.add_argument("--seconds", type=float, default=480, help="no row is begun after these")
    arguments.add_argument("--row-seconds", type=float, default=3, help="of timing a row, at least")
    arguments.add_argument("--state", type=Path, default=Path("out/gpu.json"), help="the rows that are measured")
    arguments.add_argument("--smoke", action="store_true", help="a small model, on any device")
    main(arguments.parse_args())
