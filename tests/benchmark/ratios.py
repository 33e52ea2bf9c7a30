"""What an explanation costs, in forward passes and in forward and backward passes of the bare model.

    python tests/benchmark/ratios.py

Forward: normalised images to logits. Forward and backward: to the gradient of the predicted class's logit at the
embedded tokens, with no gradient of a weight. All are compiled, and timed in turns within one run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from common import alternate, milliseconds, names, parser, publish, random_images, random_vit, spread, table
from jax import Array

import tokentm_jax as tm
from tokentm_jax.models.vit import ViT

# Methods that read the attention, or the tokens, of the last block and its gradient.
LAST = ("grad_cam", "grad_cam_tokens", "libra_grad_cam", "partial_lrp", "beyond_intuition")
# row: (method, options, at most so many forward passes, at most so many forward and backward passes)
ROWS = {
    "tokentm": ("tokentm", {}, 2.6, 1.10),
    "tokentm, recompute": ("tokentm", {"memory": "recompute"}, None, None),
    "tokentm, each head": ("tokentm", {"heads": "each"}, None, 1.15),
    **{f"tokentm, {name}": ("tokentm", reading, None, 1.15) for name, reading in tm.configs.READINGS.items()},
    "gae": ("gae", {}, 2.6, 1.10),
    "gae, recompute": ("gae", {"memory": "recompute"}, None, None),
    "rollout": ("rollout", {}, 1.15, None),
    "raw_attention": ("raw_attention", {}, 1.15, None),
    "attn_lrp": ("attn_lrp", {}, None, None),
    "conservative_lrp": ("conservative_lrp", {}, None, None),
    "legrad": ("legrad", {}, None, None),
    "libra_full_grad": ("libra_full_grad", {}, None, None),
    "libra_tokentm": ("libra_tokentm", {}, None, None),
    **{name: (name, {}, None, None) for name in LAST},
    **{
        f"mix of {methods}, gradient {gradient}": (
            "tokentm_mix",
            {"methods": methods, "gradient": gradient},
            None,
            None,
        )
        for methods, gradient in (
            ("libra_tokentm,libra_gae,libra_full_grad,legrad", "own"),
            ("libra_tokentm,libra_full_grad", "own"),
            ("libra_tokentm,conservative_lrp,legrad", "own"),
            ("tokentm,attn_lrp,conservative_lrp,legrad", "own"),
            ("tokentm,attn_lrp,conservative_lrp,legrad", "conservative_lrp"),
            ("tokentm,attn_lrp,legrad", "attn_lrp"),
        )
    },
}


def forward(module: ViT) -> Callable[[Any, Array], Array]:
    return jax.jit(lambda params, images: module.apply({"params": params}, images))


def forward_backward(module: ViT) -> Callable[[Any, Array], Any]:
    """The bare gradient: embed once, the blocks by scan, and differentiate with respect to the embedded tokens."""
    block = module.block()

    def score(tokens: Array, params: Any) -> tuple[Array, Array]:
        def step(tokens: Array, weights: Any) -> tuple[Array, None]:
            return block.apply({"params": weights}, tokens)[0], None

        tokens = jax.lax.scan(step, tokens, params["blocks"])[0]
        logits: Any = module.apply({"params": params}, tokens, method="classify")
        return logits.max(-1).sum(), logits

    def gradient(params: Any, images: Array) -> Any:
        return jax.grad(score, has_aux=True)(module.apply({"params": params}, images, method="embed"), params)

    return jax.jit(gradient)


def measure(model: str, batch: int, seconds: float, rounds: int, rows: list[str] | None = None) -> str:
    module, params = random_vit(model)
    images = random_images(batch, module)
    functions = {"forward": forward(module), "forward and backward": forward_backward(module)}
    functions |= {
        name: jax.jit(tm.explain_fn(module, method, **options))
        for name, (method, options, *_) in ROWS.items()
        if rows is None or name in rows or method in rows
    }
    times = alternate({name: partial(f, params, images) for name, f in functions.items()}, seconds, rounds)
    bounds = {name: ROWS[name][2:] if name in ROWS else (None, None) for name in functions}

    def cells(name: str, base: str, bound: float | None) -> list[str]:
        own = name == base or name == "forward"
        return ["" if own else spread(times[name] / times[base]), "" if bound is None else f"{bound:.2f}"]

    lines = [
        [
            name,
            milliseconds(found.min()),
            milliseconds(sorted(found)[len(found) // 2]),
            *cells(name, "forward", bounds[name][0]),
            *cells(name, "forward and backward", bounds[name][1]),
        ]
        for name, found in times.items()
    ]
    header = ["", "fastest, ms", "median, ms", "/ forward", "at most", "/ forward and backward", "at most"]
    title = f"**{model}**, float32, batch {batch}, {len(times['forward'])} rounds"
    return f"{title}\n\n{table(header, lines)}"


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=names, default=["deit_tiny_patch16_224", "vit_base_patch16_224"])
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--seconds", type=float, default=90, help="per model, at least")
    arguments.add_argument("--rows", type=names, help="these rows, or those of these methods, alone")
    arguments.add_argument("--rounds", type=int, default=9, help="per model, at least")
    chosen = arguments.parse_args()
    note = "Ratios: median over the rounds, of times in the same round, with the middle half of the rounds."
    tables = [measure(model, chosen.batch, chosen.seconds, chosen.rounds, chosen.rows) for model in chosen.models]
    publish(chosen.out, "# Cost of an explanation", *tables, note)
