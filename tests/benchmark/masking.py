"""What the perturbation test costs beside its forward passes.

    python tests/benchmark/masking.py

The compiled program that scores a batch (map to pixels, ranking, 18 times masking and a forward pass, scores) against
18 compiled forward passes of the same model on the same batch, from uint8 pixels to logits, timed in turns.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import alternate, milliseconds, parser, publish, random_vit, spread, table

import tokentm_jax as tm
from tokentm_jax import metrics
from tokentm_jax.models.architectures import architecture
from tokentm_jax.models.loading import predict
from tokentm_jax.runs.programs import _score_program

PASSES = 2 * metrics.STEPS


def main(model: str, batch: int, seconds: float, rounds: int) -> str:
    module, params = random_vit(model)
    _, preprocessing = architecture(model)
    random = np.random.default_rng(0)
    pixels = jnp.asarray(random.integers(0, 256, (batch, *module.img_size, 3), np.uint8))
    maps = jnp.asarray(random.random((batch, *module.grid), np.float32))
    classes = jnp.zeros(batch, jnp.int32)
    score = _score_program.__wrapped__(module, preprocessing, "perturbation", (), None, by_patch=False, mixed=False)
    model_of = partial(predict, module, preprocessing)
    bare = jax.jit(lambda params, pixels: model_of(params, pixels.astype(jnp.float32) / 255))
    rank = jax.jit(lambda maps: metrics.rank_pixels(tm.to_pixels(maps, module.img_size)))
    calls = {
        f"{PASSES} bare forward passes": lambda: [bare(params, pixels) for _ in range(PASSES)],
        "perturbation test": lambda: score(params, pixels, classes, classes, None, maps, *(None,) * 4),
        "of which: ranking the pixels, alone": lambda: rank(maps),
    }
    times = alternate(calls, seconds, rounds)
    first = next(iter(times.values()))
    rows = []
    for name, found in times.items():
        test = name == "perturbation test"
        passes = f"{batch * PASSES / np.median(found):.1f}" if len(rows) < 2 else ""
        share = spread(100 * first / found, 1) if test else ""
        rows.append([name, milliseconds(found.min()), milliseconds(float(np.median(found))), passes, share])
    header = ["", "fastest, ms", "median, ms", "image passes / s", "share of bare, % (at least 90)"]
    return f"**{model}**, float32, batch {batch}, {len(first)} rounds\n\n{table(header, rows)}"


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="deit_tiny_patch16_224")
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--seconds", type=float, default=90, help="at least")
    arguments.add_argument("--rounds", type=int, default=7, help="at least")
    chosen = arguments.parse_args()
    report = main(chosen.model, chosen.batch, chosen.seconds, chosen.rounds)
    publish(chosen.out, "# Cost of masking", report)
