"""How long one waits: for `tokentm --help`, for the first heatmap of a ViT-B, and for `make demo`.

    python tests/benchmark/startup.py

    python tests/benchmark/startup.py --calls

The second prints the processor seconds of calls that could compile, in two processes with one folder of programs.

Every figure is of a fresh process. "Empty": JAX's cache of compiled programs is an empty folder; "warm": the same
command once more. The ViT-B has random weights, written to a file first.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from common import parser, publish, table

from tokentm_jax.models.architectures import architecture, build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.vit import init_params

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "notebooks" / "chelsea.png"
MODEL = "vit_base_patch16_224"
# What a user writes, with a stopwatch: importing, reading the weights and a photo, the first heatmap and the second.
FIRST = """
import os, sys, time
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"]
times = [time.perf_counter()]
import jax
import tokentm_jax as tm
tm.load, tm.explain
times.append(time.perf_counter())
vit = tm.load(sys.argv[1], sys.argv[2])
images = vit.read([sys.argv[3]])
times.append(time.perf_counter())
for _ in range(2):
    jax.block_until_ready(tm.explain(vit, images))
    times.append(time.perf_counter())
print(*(f"{b - a:.1f}" for a, b in zip(times, times[1:])))
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


def run(command: list[str], cache: Path) -> tuple[float, str]:
    """Wall time of a command, and what it printed; `cache` is where compiled programs are kept."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return wall, done.stdout


def random_model(folder: str) -> str:
    """The file of a ViT-B with random weights."""
    weights = str(Path(folder) / "vit_base.safetensors")
    config, preprocessing = architecture(MODEL)
    module = build(config)
    write_checkpoint(weights, module, init_params(module, jax.random.key(0)), preprocessing)
    return weights


def print_calls() -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", CALLS, MODEL, random_model(folder), str(PHOTO)]
        for state in ("empty", "warm"):
            print(f"{state}\n{run(words, Path(folder) / 'cache')[1]}")


def main(out: Path | None, repeats: int) -> None:
    command = [sys.executable, "-m", "tokentm_jax"]
    with tempfile.TemporaryDirectory() as folder:
        weights = random_model(folder)
        subprocess.run(["make", ".venv/ready"], cwd=ROOT, check=True, capture_output=True)  # the set-up is not timed
        explain = ["explain", str(PHOTO), "--model", MODEL, "--checkpoint", weights, "--out", folder]
        waits = {
            "`tokentm --help`": ([*command, "--help"], 1),
            "`tokentm explain` with a ViT-B": ([*command, *explain], 15),
            "first heatmap of a ViT-B in Python": ([sys.executable, "-c", FIRST, MODEL, weights, str(PHOTO)], 15),
            "`make demo`": (["make", "demo"], 15),
        }
        rows, printed = [], ""
        for label, (words, bound) in waits.items():
            times = {"empty": [], "warm": []}
            for i in range(repeats):
                for state, found in times.items():
                    wall, printed_now = run(words, Path(folder) / f"cache {label} {i}".replace("/", ""))
                    found.append(wall)
                    if words[1] == "-c":
                        import_, load, first, second = printed_now.split()
                        printed += f"\n- {state}: import {import_}, load {load}, first {first}, second {second}"
            rows.append([label, *(f"{min(t):.1f} to {max(t):.1f}" for t in times.values()), bound])
            print(*rows[-1], flush=True)
    header = ["", "empty cache, s", "warm cache, s", "at most, s"]
    details = f"Seconds of the parts of the third row, in the order they were run:\n{printed}"
    publish(out, "# Waiting", table(header, rows), details)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=3, help="of every command, with either cache")
    arguments.add_argument("--calls", action="store_true", help="print processor seconds of calls instead")
    chosen = arguments.parse_args()
    print_calls() if chosen.calls else main(chosen.out, chosen.repeats)
