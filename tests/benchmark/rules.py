"""Backward rules as an axis: what each set of rules makes of five methods, measured on photos.

    python tests/benchmark/rules.py ../shared

DeiT-tiny is explained as a function, by `rules=`. AUC of accuracy as in `tokentm evaluate configs/perturbation.py`,
explained class predicted; maps of pixels are measured as their means by patch. The model answers in mixed precision
when pixels are removed, and is explained in float32. Cost: compiled FLOPs / those of a forward pass, from models of 2
and 4 blocks without a scan, whose body would be counted once. 20 minutes of one core for 100 photos.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import parser, publish, table
from jax import Array

import tokentm_jax as tm
from tokentm_jax import metrics
from tokentm_jax.data.sources import open_source
from tokentm_jax.inputs.batches import batches
from tokentm_jax.maths.maps import unit
from tokentm_jax.maths.mixed import linear
from tokentm_jax.models.loading import predict
from tokentm_jax.models.vit import ViT, init_params

METHODS = ("tokentm", "gae", "attcat", "grad_cam", "gradient_x_input")
RULES = ("plain", "libra", "attn_lrp", "res_lrp")
BATCH = 20
ROWS = [(method, rules) for method in METHODS for rules in RULES]


def function_of(module: ViT) -> Callable[[Any, Array], Any]:
    return lambda params, images: module.apply({"params": params}, images)


def without_scan(module: ViT) -> Callable[[Any, Array], Any]:
    """The same model with its blocks in a loop of Python."""
    block = module.block()

    def forward(params: Any, images: Array) -> Any:
        tokens = module.apply({"params": params}, images, method="embed")
        for i in range(module.depth):
            weights = jax.tree.map(lambda a: a[i], params["blocks"])  # noqa: B023
            tokens = block.apply({"params": weights}, tokens)[0]
        return module.apply({"params": params}, tokens, method="classify")

    return forward


def flops(module: ViT, program: Callable[[ViT], Callable[..., Any]]) -> float:
    """Of one image, counted on models of 2 and 4 blocks: each block more costs the same."""
    counted = []
    for depth in (2, 4):
        small = module.clone(depth=depth)
        params = jax.eval_shape(partial(init_params, small), jax.random.key(0))
        image = jax.ShapeDtypeStruct((1, *small.img_size, 3), jnp.float32)
        cost: Any = jax.jit(program(small)).lower(params, image).compile().cost_analysis()
        counted.append(cost["flops"])
    return counted[0] + (module.depth - 2) * (counted[1] - counted[0]) / 2


def costs(module: ViT) -> dict[tuple[str, str], float]:
    forward = flops(module, without_scan)

    def of(method: str, rules: str) -> float:
        return flops(module, lambda small: tm.explain_fn(without_scan(small), method, rules=rules)) / forward

    return {row: of(*row) for row in ROWS}


def hits(vit: tm.Model, photos: Any) -> dict[tuple[str, str], np.ndarray]:
    """Whether the label is the top class: [photos, 2, 10], positive and negative, of whole photos first."""
    grid, size = vit.module.grid, vit.preprocessing.size
    model = partial(predict, vit.module.clone(linear=linear), vit.preprocessing)

    @jax.jit
    def score(params: Any, pixels: Array, maps: Array, labels: Array) -> Array:
        images, answer = unit(pixels), partial(model, params)
        whole = jnp.broadcast_to((answer(images).argmax(-1) == labels)[:, None, None], (len(labels), 2, 1))
        found = metrics.perturbation(answer, images, tm.to_pixels(maps, size), labels, labels)["hit"]
        return jnp.concatenate([whole, found], 2)

    def program(method: str, rules: str) -> Callable[..., Array]:
        explain = tm.explain_fn(function_of(vit.module), method, rules=rules)
        normalise = vit.preprocessing.normalise
        return jax.jit(lambda params, pixels: metrics.coarsened(explain(params, normalise(unit(pixels))), grid))

    programs = {row: program(*row) for row in ROWS}
    found: dict[tuple[str, str], list[np.ndarray]] = {row: [] for row in ROWS}
    for batch in batches(photos, vit.preprocessing, BATCH):
        pixels, labels = jnp.asarray(batch.inputs), jnp.asarray(batch.labels)
        for row, explain in programs.items():
            maps = explain(vit.params, pixels)
            found[row].append(np.asarray(score(vit.params, pixels, maps, labels)))
    return {row: np.concatenate(parts) for row, parts in found.items()}


def cells(own: np.ndarray, plain: np.ndarray) -> list[str]:
    """Both AUCs, each with its difference from that of the plain rules and the 95 % interval."""
    text = []
    for k in range(2):
        text.append(f"{metrics.bootstrap(own[:, k], metrics.area)[0]:.2f}")
        difference, low, high = metrics.paired(own[:, k], plain[:, k], metrics.area)
        text.append("" if own is plain else f"{difference:+.2f} [{low:.2f}, {high:.2f}]")
    return text


def main(shared: Path, count: int) -> str:
    vit = tm.load("deit_tiny_patch16_224", shared / "data" / "deit_tiny_patch16_224.safetensors")
    photos = open_source(str(shared / "data" / "imagenet_sample"), limit=count)
    cost, found = costs(vit.module), hits(vit, photos)
    lines = []
    for method, rules in ROWS:
        aucs = cells(found[method, rules], found[method, "plain"])
        lines.append([f"`{method}`" if rules == "plain" else "", rules, *aucs, f"{cost[method, rules]:.2f}"])
    clean = 100 * found[ROWS[0]][:, 0, 0].mean()
    header = ["method", "rules", "positive AUC", "less plain", "negative AUC", "less plain", "FLOPs / forward"]
    return f"**deit_tiny_patch16_224**, {len(photos)} photos, clean accuracy {clean:.1f} %\n\n{table(header, lines)}"


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("shared", type=Path, nargs="?", default=Path("../shared"), help="folder with `data`")
    arguments.add_argument("--photos", type=int, default=100, help="taken at even intervals")
    chosen = arguments.parse_args()
    publish(chosen.out, "# Backward rules", main(chosen.shared, chosen.photos))
