"""Peak memory of TokenTM per image against the number of tokens, with attention as a whole and in pieces of queries.

    python tests/benchmark/resolution.py

As `memory.py`, from the compiled programs at batch sizes 1 and 2, which are not run. With `--figure FILE`, also as a
plot. With `--run N`, the first blocks of the model also explain one image of the last size, which takes minutes. With
`--rows`, the table has methods at the last size instead, with their cost:

    python tests/benchmark/resolution.py --rows rollout,raw_attention,grad_cam,tokentm:attention=plain
"""

import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from common import named_vit, names, numbers, parser, publish, table
from matplotlib.figure import Figure
from memory import MIB, bytes_per_image
from passes import flops, program_of
from ratios import forward, forward_backward

import tokentm_jax as tm
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.programs import pieces

WHOLE, LARGE = 2**62, pieces.LARGE
COLUMNS = [(memory, large) for large in (WHOLE, LARGE) for memory in ("store", "recompute")]


def measure(model: str, size: int) -> list[str]:
    module = named_vit(model).clone(img_size=(size, size))
    tokens = module.prefix + module.grid[0] * module.grid[1]
    found: dict[tuple[str, int], float] = {}
    for memory, large in COLUMNS:
        if large == LARGE and module.num_heads * tokens**2 <= LARGE:  # it runs as a whole
            found[memory, large] = found[memory, WHOLE]
            continue
        pieces.LARGE = large
        found[memory, large] = bytes_per_image(jax.jit(tm.explain_fn(module, memory=memory)), module, [1, 2])
    bare = bytes_per_image(forward_backward(module), module, [1, 2])
    weights = module.num_heads * tokens**2 * 4
    return [f"{size} px", str(tokens), *(f"{b / MIB:.0f}" for b in (weights, bare, *(found[c] for c in COLUMNS)))]


def plot(rows: list[list[str]], labels: list[str]) -> Figure:
    """MiB against tokens, both logarithmic: a curve for each column behind that of the tokens."""
    figure = Figure(layout="constrained", dpi=120, figsize=(7, 4.5))
    axes = figure.add_subplot(xlabel="tokens", ylabel="MiB per image", xscale="log", yscale="log")
    tokens = [int(row[1]) for row in rows]
    styles = ["k:", "k-", "C1--", "C0--", "C1-", "C0-"]
    for label, style, *found in zip(labels, styles, *(row[2:] for row in rows), strict=True):
        axes.plot(tokens, [float(cell) for cell in found], style, marker="o", markersize=3, label=label)
    axes.set_xticks(tokens, [f"{n:,}\n{row[0]}" for n, row in zip(tokens, rows, strict=True)], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def method(module: ViT, row: str) -> list[str]:
    """The cells of one method: memory and products in forward passes, as a whole and in pieces."""
    cells = []
    for pieces.LARGE in (WHOLE, LARGE):
        program = program_of(module, row)
        passes = flops(program, module) / flops(forward(module), module)
        cells += [f"{bytes_per_image(program, module, [1, 2]) / MIB:.0f}", f"{passes:.2f}"]
    return [f"`{row}`", *cells]


def run(module: ViT) -> str:
    params, image = init_params(module, jax.random.key(0)), jnp.zeros((1, *module.img_size, 3))
    explain = jax.jit(tm.explain_fn(module, memory="recompute")).lower(params, image, None).compile()
    before = time.process_time()
    jax.block_until_ready(explain(params, image, None))
    seconds, most = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    where = f"{module.depth} blocks at {module.img_size[0]} px"
    return f"{where}: {seconds:.0f} processor seconds, at most {most:.1f} GiB in the process."


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="vit_base_patch16_224")
    arguments.add_argument("--sizes", type=numbers, default=[224, 384, 512, 1024], help="of images, in pixels")
    arguments.add_argument("--figure", type=Path, metavar="FILE", help="draw the table to this PNG file")
    arguments.add_argument("--run", type=int, default=0, help="number of blocks to run at the last size")
    arguments.add_argument("--rows", type=names, default=[], help="methods, as of passes.py")
    chosen = arguments.parse_args()
    if chosen.rows:
        module = named_vit(chosen.model).clone(img_size=(chosen.sizes[-1],) * 2)
        header = ["", "MiB, whole", "forward passes", "MiB, pieces", "forward passes"]
        cells = [method(module, row) for row in chosen.rows]
        publish(chosen.out, f"# Methods at {chosen.sizes[-1]} px", table(header, cells))
        raise SystemExit
    rows = [measure(chosen.model, size) for size in chosen.sizes]
    header = ["image", "tokens", "one block's attention", "bare forward and backward"]
    header += [f"`{memory}`, {'whole' if large == WHOLE else 'pieces'}" for memory, large in COLUMNS]
    if chosen.figure:
        plot(rows, [label.replace("`", "") for label in header[2:]]).savefig(chosen.figure)
    size = (chosen.sizes[-1],) * 2
    ran = [run(named_vit(chosen.model).clone(img_size=size, depth=chosen.run))] if chosen.run else []
    note = f"MiB per image of {chosen.model} in float32. Attention of at most {LARGE} weights runs as a whole."
    publish(chosen.out, "# Memory against tokens", table(header, rows), note, *ran)
