"""How large the transformation weights of TokenTM are, block by block: mean over the patch tokens of 32 images.

    python tests/benchmark/weights.py

Says why TokenTM and GAE differ: a block with large weights counts for more, whatever its attention says.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import parser, publish, table

import tokentm_jax as tm
from tokentm_jax.data.sources import open_source
from tokentm_jax.inputs.batches import batches
from tokentm_jax.maths.variants import TokenTM, block_terms

CASES = (
    ("deit_tiny_patch16_224", tm.sample_data("deit_tiny"), tm.sample_data("photos")),
    ("cifar10_vit", None, tm.sample_data("cifar10", "test")),
    ("cifar10_distilled", None, tm.sample_data("cifar10", "test")),
)
READINGS = {
    "length": TokenTM(direction="none"),
    "length, original=normalised": TokenTM(direction="none", original="normalised"),
}


def measure(model: str, checkpoint: str | None, data: str) -> list[list[str]]:
    vit = tm.load(model, checkpoint)
    images = next(batches(open_source(data, limit=32), vit.preprocessing, 32)).inputs.astype(np.float32) / 255
    inputs = vit.preprocessing.normalise(jnp.asarray(images))
    blocks = jax.jit(lambda p, x: tm.capture(vit.module, p, x).blocks())(vit.params, inputs)
    rows = []
    for reading, options in READINGS.items():
        _, *weights = jax.vmap(jax.vmap(partial(block_terms, options=options)))(blocks)
        for layer, found in zip(("attention", "ffn"), weights[: 2 if reading == "length" else 1], strict=False):
            means = np.asarray(found)[..., vit.module.prefix :].mean((1, 2))
            rows.append([vit.name, reading, layer, " ".join(f"{mean:.2f}" for mean in means)])
    return rows


if __name__ == "__main__":
    chosen = parser(__doc__).parse_args()
    rows = [row for case in CASES for row in measure(*case)]
    publish(chosen.out, "# Transformation weights", table(["model", "weight", "layer", "blocks 1 to L"], rows))
