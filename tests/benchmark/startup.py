"""Processor seconds of a start: of `tokentm --help`, of `tokentm explain`, and of the first heatmap in Python.

    python tests/benchmark/startup.py

    python tests/benchmark/startup.py --beside CHECKOUT

    python tests/benchmark/startup.py --calls

    python tests/benchmark/startup.py --batches

Every row is the user and system time of a whole process, the best of `--repeats`. "Empty": JAX's cache of compiled
programs is an empty folder; "warm": the same command once more. `--beside` measures another checkout (with `.venv`) in
turns with this one, as "before". The last two print the processor seconds of calls: `--calls` of those that could
compile, in two processes with one folder of programs, and `--batches` of batches of 1 to 17 photos.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from common import parser, publish, table

from tokentm_jax.models.architectures import architecture, build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.vit import init_params

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "notebooks" / "chelsea.png"
MODEL = "vit_base_patch16_224"
TINY = "deit_tiny_patch16_224"
# What a user writes: importing, reading the weights and a photo, a heatmap.
FIRST = """
import sys
import jax
import tokentm_jax as tm
vit = tm.load(*sys.argv[2:])
jax.block_until_ready(tm.explain(vit, vit.read([sys.argv[1]])))
"""
# Calls of a user, each with its processor seconds.
CALLS = """
import sys, time
import jax
import tokentm_jax as tm
vit = tm.load(sys.argv[1], sys.argv[2])
images = vit.read([sys.argv[3]] * 4)
def call(name, size=1, **options):
    start = time.process_time()
    jax.block_until_ready(tm.explain(vit, images[:size], **options))
    print(f"{name}: {time.process_time() - start:.1f}", flush=True)
print(f"start, loading: {time.process_time():.1f}")
call("first map")
call("a map")
call("a class", target=3)
for name in ("a lambda", "the same lambda"):
    call(name, score=lambda logits: logits[:, 3])
for size in (4, 3, 2):
    call(f"batch of {size}", size)
"""


# Batches of a user, with no programs kept: the first call, then another, and the distance to maps of single photos.
BATCHES = """
import os, sys, time
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
import jax, numpy as np
import tokentm_jax as tm
vit = tm.load(sys.argv[1], sys.argv[2])
images = np.repeat(vit.read([sys.argv[3]]), 17, 0) * np.linspace(1, 0.5, 17, dtype=np.float32)[:, None, None, None]
def cost(size):
    start = time.process_time()
    maps = jax.block_until_ready(tm.explain(vit, images[:size]))
    return time.process_time() - start, np.asarray(maps)
alone = np.concatenate([tm.explain(vit, images[i : i + 1]) for i in range(17)])
for size in (2, 3, 4, 5, 8, 9, 16, 17):
    first, maps = cost(size)
    again = min(cost(size)[0] for _ in range(3))
    apart = abs(maps - alone[:size]).max() / abs(alone).max()
    print(f"{size}: first {first:.1f}, then {again:.2f}; from the maps of single photos {apart:.0e}", flush=True)
"""


def run(command: list[str], root: Path, cache: Path) -> tuple[float, str]:
    """Processor seconds of a command of a checkout, and what it printed; `cache` keeps compiled programs."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def random_model(folder: str, name: str) -> str:
    """The file of a model with random weights."""
    weights = str(Path(folder) / f"{name}.safetensors")
    config, preprocessing = architecture(name)
    module = build(config)
    write_checkpoint(weights, module, init_params(module, jax.random.key(0)), preprocessing)
    return weights


def print_calls(model: str, script: str, states: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", script, model, random_model(folder, model), str(PHOTO)]
        for state in states:
            print(f"{state}\n{run(words, ROOT, Path(folder) / 'cache')[1]}")


def main(out: Path | None, repeats: int, beside: Path | None) -> None:
    checkouts = {"now": (ROOT, sys.executable)}
    if beside is not None:
        checkouts = {"before": (beside, str(beside / ".venv/bin/python")), **checkouts}
    with tempfile.TemporaryDirectory() as folder:
        tiny = [TINY, random_model(folder, TINY)]
        explain = ["-m", "tokentm_jax", "explain", str(PHOTO), "--out", str(Path(folder) / "out")]
        commands = {
            "`tokentm --help`": ["-m", "tokentm_jax", "--help"],
            "`tokentm explain`, the shipped model": explain,
            "`tokentm explain`, DeiT-tiny": [*explain, "--model", tiny[0], "--checkpoint", tiny[1]],
            "first heatmap in Python, the shipped model": ["-c", FIRST, str(PHOTO)],
            "first heatmap in Python, DeiT-tiny": ["-c", FIRST, str(PHOTO), *tiny],
        }
        rows = []
        for number, (label, words) in enumerate(commands.items()):
            times: dict[tuple[str, str], list[float]] = {(s, c): [] for s in ("empty", "warm") for c in checkouts}
            for i in range(repeats):
                for (state, checkout), found in times.items():
                    root, python = checkouts[checkout]
                    kept = Path(folder) / f"{checkout} {number}"  # an empty one is measured once
                    if state == "warm" or i == 0:
                        found.append(run([python, *words], root, kept)[0])
            rows.append([label, *(f"{min(found):.2f}" for found in times.values())])
            print(*rows[-1], flush=True)
    publish(out, "# Starting", table(["processor seconds", *(f"{s}, {c}" for s, c in times)], rows))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=3, help="of every command with a warm cache")
    arguments.add_argument("--beside", type=Path, help="another checkout, measured in turns")
    arguments.add_argument("--calls", action="store_true", help="print processor seconds of calls instead")
    arguments.add_argument("--batches", action="store_true", help="print processor seconds of batches instead")
    chosen = arguments.parse_args()
    if chosen.calls:
        print_calls(MODEL, CALLS, ("empty", "warm"))
    elif chosen.batches:
        print_calls(TINY, BATCHES, ("no programs kept",))
    else:
        main(chosen.out, chosen.repeats, chosen.beside)
