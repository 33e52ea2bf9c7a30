"""What the benchmarks share: models with random weights, timing in turns, tables in Markdown."""

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from tokentm_jax.inputs.decoding import cores
from tokentm_jax.models.architectures import architecture, build
from tokentm_jax.models.vit import ViT, init_params

SHARED = Path(__file__).resolve().parents[3] / "shared"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark, with the one that all have: `--out`."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_argument("--out", type=Path, metavar="FILE", help="write the report to this file, too")
    return arguments


def names(text: str) -> list[str]:
    """The type of an argument that is a list with commas between."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def named_vit(name: str, dtype: str | None = None) -> ViT:
    return build(architecture(name)[0], dtype=dtype)


def hand_flops(module: ViT, forwards: int, backwards: int) -> float:
    """Products of matrices of one image, a multiplication and an addition each.

    The backward pass, to the tokens and to no weight, costs a linear map as much as the forward pass and a product of
    two activations twice as much; the patch embedding has none.
    """
    d, hidden = module.embed_dim, int(module.embed_dim * module.mlp_ratio)
    patches = module.grid[0] * module.grid[1]
    n = module.prefix + patches
    linear = 2 * n * d * (3 * d + d + 2 * hidden)
    products = 2 * 2 * n * n * d
    embedding = 2 * patches * 3 * math.prod(module.tiling.patch) * d
    head = 2 * d * module.num_classes
    blocks = module.depth * (forwards * (linear + products) + backwards * (linear + 2 * products))
    return blocks + forwards * (embedding + head) + backwards * head


def products(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, Any]]:
    """(times, equation) of every product of matrices, however deep; a scan's body counts as often as it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield times, equation
        runs = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner, runs)


def flops_of(found: Iterable[tuple[int, Any]]) -> int:
    """A multiplication and an addition for each factor of each product."""
    total = 0
    for times, equation in found:
        left = equation.invars[0].aval.shape
        (contracted, _), _ = equation.params["dimension_numbers"]
        out = equation.outvars[0].aval.shape
        total += times * 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    return total


def read_products(closed: Any) -> int:
    """FLOP of the products of a traced program whose results are read."""
    return flops_of(products(dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))[0]))


def random_vit(name: str) -> tuple[ViT, Any]:
    """A model with random weights, on which its speed does not depend."""
    module = named_vit(name)
    return module, init_params(module, jax.random.key(0))


def random_images(batch: int, module: ViT) -> jax.Array:
    """Normalised images [B, H, W, 3] of noise."""
    return jax.random.normal(jax.random.key(1), (batch, *module.img_size, 3), jnp.float32)


def alternate(
    calls: dict[Any, Callable[[], Any]], seconds: float, rounds: int, warm: bool = False
) -> dict[Any, np.ndarray]:
    """Seconds [rounds] of every call, timed in turns A B C A B C ..., so that a disturbance hits all alike.

    Goes on until so many `seconds` are over and there are so many `rounds`. A round before them compiles, unless the
    calls are `warm`.
    """
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for call in [] if warm else calls.values():
        jax.block_until_ready(call())
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < rounds:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in found.items()}


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Median with the middle half of the rounds."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine() -> str:
    """One line on the machine and the versions."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"Machine: {cores()} cores ({cpu}){kind}; Python {platform.python_version()}, JAX {jax.__version__}."


def publish(out: Path | None, *parts: str) -> None:
    """Print the report and, if asked for, write it."""
    text = "\n\n".join(part.strip() for part in (*parts, machine())) + "\n"
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
