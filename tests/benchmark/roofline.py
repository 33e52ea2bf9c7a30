"""Roofline: how many heatmaps per second a chip can make at most, from what the compiled program computes and moves.

    python tests/benchmark/roofline.py                 # the program compiled for this machine
    python tests/benchmark/roofline.py --tpu           # also TokenTM's for a TPU v5e, by `pip install libtpu`: minutes

Nothing is timed. FLOP: XLA's cost analysis, beside a count by hand. XLA counts a multiplication and an addition as one
operation each, and every elementwise operation as one; exponentials and such stand in a count of their own; and the
body of a scan counts ONCE, however often it runs. So the blocks are unrolled, a model of 2 and one of 3 blocks is
compiled, their difference is a block, and a model of L blocks costs the first and L - 2 times the difference. (Not for
`memory="recompute"`: unrolled, the compiler sees that what is computed again is there. It costs a forward pass more.)

Bytes: at least (by hand) every product of matrices reads its operands and writes its result once in bfloat16, with all
the rest fused into these; at most (XLA) what the operations of the compiled program read and write, whether it comes
from the chip's memory or from a cache. The CPU's compiler widens bfloat16 to float32, so that its count is that of the
float32 program, halved. The truth on a GPU is between the two.

Fused attention never writes its weights (`tokentm_jax.programs.kernel`). Forward it reads queries, keys and values,
and writes tokens. Backward it reads these four and the gradient of the tokens, and writes three gradients; and it
computes the scores again, a fifth product next to the four of the plain backward pass. This is the least for one
kernel. The two of the backward pass here read queries, keys and values twice and the gradient three times, and compute
seven products.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from common import hand_flops, named_vit, names, numbers, parser, publish, table
from ratios import forward, forward_backward

import tokentm_jax as tm
from tokentm_jax.models.vit import ViT, init_params

FEW = (2, 3)  # blocks of the models that are compiled
IMAGENET, BILLION = 1_281_167, 1_000_000_000  # images


class Chip(NamedTuple):
    """Peaks of a data sheet: FLOP/s of dense bfloat16 products, bytes/s and bytes of its memory."""

    name: str
    flops: float
    bandwidth: float
    memory: float


# NVIDIA's pages give 1979 TFLOPS "with sparsity", which is twice the dense figure.
CHIPS = (
    Chip("[H100 SXM](https://www.nvidia.com/en-us/data-center/h100/)", 989.5e12, 3.35e12, 80e9),
    Chip("[H200 SXM](https://www.nvidia.com/en-us/data-center/h200/)", 989.5e12, 4.8e12, 141e9),
    Chip("[TPU v5e](https://cloud.google.com/tpu/docs/v5e)", 197e12, 0.819e12, 16e9),
)


class Cost(NamedTuple):
    """Of one image."""

    flops: float
    bytes: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.flops - other.flops, self.bytes - other.bytes)

    def plus(self, times: float, other: "Cost") -> "Cost":
        return Cost(self.flops + times * other.flops, self.bytes + times * other.bytes)


def method(name: str, **options: Any) -> Callable[[ViT], Any]:
    return lambda module: jax.jit(tm.explain_fn(module, name, **options))


# row: (program of a module, forward passes, backward passes)
PROGRAMS: dict[str, tuple[Callable[[ViT], Any], int, int]] = {
    "forward": (forward, 1, 0),
    "forward and backward": (forward_backward, 1, 1),
    "tokentm": (method("tokentm"), 1, 1),
    "gae": (method("gae"), 1, 1),
    "rollout": (method("rollout"), 1, 0),
}


# ---- by hand --------------------------------------------------------------------------------------------------------


def hand_bytes(module: ViT, forwards: int, backwards: int, batch: int, fused: bool = False) -> float:
    """What the products of the blocks read and write for one image, if all else is fused: activations in bfloat16, and
    the weights in float32 once per pass and batch.

    With `fused`, attention is not written. The logsumexp of each query is, in float32, for the backward pass.
    """
    d, hidden = module.embed_dim, int(module.embed_dim * module.mlp_ratio)
    n = module.prefix + module.grid[0] * module.grid[1]
    attention = 0 if fused else module.num_heads * n * n
    logsumexp = 2 * 4 * module.num_heads * n * backwards if fused else 0
    linear = n * ((d + 3 * d) + (d + d) + 2 * (d + hidden))
    products = (2 * n * d + attention) + (attention + n * d + n * d)  # scores, then what they mix
    backward = linear + 2 * products
    weights = 4 * d * (4 * d + 2 * hidden) / batch
    return module.depth * (
        2 * (forwards * (linear + products) + backwards * backward) + (forwards + backwards) * weights + logsumexp
    )


def by_hand(module: ViT, forwards: int, backwards: int, batch: int, fused: bool = False) -> Cost:
    """The least cost of these passes; with `fused`, the backward pass computes the scores again."""
    again = 2 * module.embed_dim * (module.prefix + module.grid[0] * module.grid[1]) ** 2
    flops = hand_flops(module, forwards, backwards) + fused * module.depth * backwards * again
    return Cost(flops, hand_bytes(module, forwards, backwards, batch, fused))


# ---- by XLA ---------------------------------------------------------------------------------------------------------


@contextmanager
def unrolled() -> Iterator[None]:
    """Every scan that is traced here is a sequence, whose operations XLA counts as often as they run."""
    scan = jax.lax.scan
    with mock.patch.object(jax.lax, "scan", lambda *given, **options: scan(*given, **{**options, "unroll": True})):
        yield


def compiled(program: Callable[[ViT], Any], module: ViT, batch: int, sharding: Any = None, unroll: bool = True) -> Any:
    """The program for a batch of images, for the device of `sharding` or this machine's; no weights are made."""
    params = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, *module.img_size, 3), jnp.float32)
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)  # noqa: E731
    if not unroll:
        return program(module).lower(jax.tree.map(place, params), place(images)).compile()
    with unrolled():
        return program(module).lower(jax.tree.map(place, params), place(images)).compile()


def counted(program: Callable[[ViT], Any], module: ViT, batch: int, sharding: Any = None) -> Cost:
    """What XLA counts of the program with all its blocks, for one image: from models of few blocks."""
    found = []
    for depth in FEW:
        analysis = compiled(program, module.clone(depth=depth), batch, sharding).cost_analysis()
        found.append(Cost(analysis["flops"] / batch, analysis["bytes accessed"] / batch))
    small, large = found
    return small.plus((module.depth - FEW[0]) / (FEW[1] - FEW[0]), large - small)


def halved(program: Callable[[ViT], Any], module: ViT, batch: int) -> Cost:
    """As `counted` for this machine, in float32 with the bytes of arrays of half the width."""
    flops, moved = counted(program, module.clone(dtype=None), batch)
    return Cost(flops, moved / 2)


def tpu() -> Any:
    """A TPU v5e to compile for, which need not be here. ImportError without libtpu."""
    import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud machine to ask
    return jax.sharding.SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])


# ---- the roofline ---------------------------------------------------------------------------------------------------


def rate(cost: Cost, chip: Chip, share: float = 1.0) -> float:
    """Images per second at a share of both peaks: the slower of computing and moving sets the pace."""
    return share * min(chip.flops / cost.flops, chip.bandwidth / cost.bytes)


def limit(cost: Cost, chip: Chip) -> str:
    """What sets the pace: the memory where the intensity (FLOP per byte) is below the chip's."""
    return "memory" if cost.flops / cost.bytes < chip.flops / chip.bandwidth else "compute"


def duration(images: float, per_second: float, chips: int) -> str:
    """Time for so many images, which chips share without talking to each other."""
    seconds = images / per_second / chips
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def by_size(model: str, sizes: Iterable[int], batch: int) -> list[list[str]]:
    """Rows of the last table: TokenTM at several sizes of images, plain and with fused attention."""
    rows = []
    for size in sizes:
        module = named_vit(model, "bfloat16").clone(img_size=(size, size))
        costs = [by_hand(module, 1, 1, batch, fused) for fused in (False, True)]
        row = [model, f"{size} px", str(module.prefix + module.grid[0] * module.grid[1])]
        row += [f"{cost.flops / 1e9:.0f}" for cost in costs] + [f"{cost.bytes / 1e6:.0f}" for cost in costs]
        row += [f"{cost.flops / cost.bytes:.0f}" for cost in costs]
        row += [f"{rate(cost, chip):.0f} ({limit(cost, chip)})" for chip in CHIPS for cost in costs]
        rows.append(row)
    return rows


def measure(model: str, programs: Iterable[str], batch: int, place: Any) -> tuple[list[list[str]], Cost, Cost, Cost]:
    """Rows of the first table, and the cost of TokenTM: at least, by XLA for this machine, and for a TPU."""
    module = named_vit(model, "bfloat16")
    rows, costs = [], {}

    def row(label: str, least: Cost, fused: Cost, by_xla: Cost) -> None:
        costs[label] = least, by_xla
        cells = [least.flops / 1e9, by_xla.flops / 1e9, fused.bytes / 1e6, least.bytes / 1e6, by_xla.bytes / 1e6]
        intensity = [cost.flops / cost.bytes for cost in (least, Cost(least.flops, by_xla.bytes))]
        extra = f"{by_xla.flops / least.flops:.3f}"
        rows.append(
            [model, label, *(f"{c:.1f}" for c in cells[:2]), extra, *(f"{c:.0f}" for c in cells[2:] + intensity)]
        )

    for label in programs:
        program, forwards, backwards = PROGRAMS[label]
        least, fused = (by_hand(module, forwards, backwards, batch, fused) for fused in (False, True))
        row(label, least, fused, halved(program, module, batch))
    least, most = costs["tokentm"]
    on_tpu = most
    if place is not None:
        on_tpu = counted(PROGRAMS["tokentm"][0], module, batch, place)
        row("tokentm, compiled for a TPU v5e", least, by_hand(module, 1, 1, batch, fused=True), on_tpu)
    return rows, least, Cost(least.flops, most.bytes), Cost(least.flops, on_tpu.bytes)


def largest_batch(model: str, batch: int, chip: Chip, place: Any) -> str:
    """How many images TokenTM takes at once, from what the program for the chip sets aside at one batch size."""
    memory = compiled(
        PROGRAMS["tokentm"][0], named_vit(model, "bfloat16"), batch, place, unroll=False
    ).memory_analysis()
    weights = memory.argument_size_in_bytes
    each = memory.peak_memory_in_bytes / batch
    return f"{model}: {each / 2**20:.1f} MiB per image, {int((chip.memory - weights) / each)} images at once"


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=names, default=["vit_base_patch16_224", "vit_large_patch16_224"])
    arguments.add_argument("--programs", type=names, help="of the first table, such as tokentm,gae; default: all")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--sizes", type=numbers, default=[224, 384, 512, 1024], help="of images, in pixels")
    arguments.add_argument("--share", type=float, default=0.4, help="of the peaks, that a good program reaches")
    arguments.add_argument("--chips", type=int, default=8)
    arguments.add_argument("--tpu", action="store_true", help="compile TokenTM for a TPU v5e, too")
    chosen = arguments.parse_args()
    place = tpu() if chosen.tpu else None
    programs = [*dict.fromkeys([*(chosen.programs or PROGRAMS), "tokentm"])]
    rows, speeds, room, sizes = [], [], [], []
    for model in chosen.models:
        found, least, here, on_tpu = measure(model, programs, chosen.batch, place)
        rows += found
        sizes += by_size(model, chosen.sizes, chosen.batch)
        if place is not None:
            room.append(largest_batch(model, chosen.batch, CHIPS[-1], place))
        for chip in CHIPS:
            most = on_tpu if "TPU" in chip.name else here
            best, worst = rate(least, chip), rate(most, chip)
            slow = chosen.share * worst
            row = [model, chip.name, f"{chip.flops / chip.bandwidth:.0f}", f"{best:.0f}", limit(least, chip)]
            row += [f"{worst:.0f}", limit(most, chip), f"{slow:.0f}", f"{slow * least.flops / chip.flops:.0%}"]
            row += [duration(IMAGENET, slow, 1), duration(BILLION, slow, 1), duration(BILLION, slow, chosen.chips)]
            speeds.append(row)
    first = ["model", "program", "GFLOP by hand", "by XLA", "ratio", "MB at least, fused attention"]
    first += ["MB at least", "MB by XLA"]
    first += ["FLOP/byte at most", "at least"]
    second = ["model", "chip", "ridge, FLOP/byte", "maps/s at most", "limit", "with XLA's bytes", "limit"]
    second += [
        f"at {chosen.share:.0%} of that",
        "share of peak FLOP/s",
        "ImageNet-1k",
        "1 billion images",
        f"on {chosen.chips} chips",
    ]
    note = f"Of one image in bfloat16, at batch {chosen.batch}. By hand, a method is the passes that it makes."
    third = ["model", "image", "tokens"]
    third += [f"{what}{how}" for what in ("GFLOP", "MB at least", "FLOP/byte") for how in ("", ", fused")]
    third += [f"{chip.name}: maps/s at most{how}" for chip in CHIPS for how in ("", ", fused")]
    parts = [table(first, rows), note, "## TokenTM on a chip", table(second, speeds)]
    parts += ["## TokenTM by resolution", table(third, sizes), "By hand: plain attention, and fused attention."]
    if room:
        parts += ["Compiled for a TPU v5e with its 16 GB, its compiler says of TokenTM:", "- " + "\n- ".join(room)]
    publish(chosen.out, "# Roofline", *parts)
