"""An amortised explainer beside sampled Shapley values: how many orders is its one forward pass worth?

    python tests/benchmark/amortised.py models/cifar10_distilled_explainer.safetensors --out FILE

Sampled values have noise of a known size, which is taken off: the mean squared difference to the explainer, minus the
mean squared standard error, estimates the explainer's own mean squared error.
"""

from pathlib import Path

import numpy as np
from common import parser, publish, table

import tokentm_jax as tm
from tokentm_jax import sample_data
from tokentm_jax.data.sources import open_source

NOTES = """The class is the predicted one. Errors are root mean squares over patches, in units of the logit, without
the noise of the sampled values; the interval is over images."""


def passes(pairs: int, maps: np.ndarray) -> int:
    """Forward passes of this number of pairs of orders: each patch but the last of each order, and both ends."""
    return 2 * pairs * (maps[0].size - 1) + 2


def main(path: str, model: str, data: str | None, limit: int, pairs: int, out: Path | None) -> None:
    vit, explainer = tm.load(model), tm.amortised(path)
    source = open_source(data or sample_data("cifar10", "test"), limit=limit, seed=1)
    images = np.stack([np.asarray(source[i].content.convert("RGB")) for i in range(len(source))])
    inputs = images / np.float32(255)
    given = np.asarray(tm.explain(vit, inputs, explainer))
    sampled, details = [], []
    for i in range(len(inputs)):
        found, about = tm.explain(vit, inputs[i : i + 1], "shapley", details=True, pairs=pairs, seed=i)
        sampled.append(np.asarray(found[0]))
        details.append(np.asarray(about["standard_error"][0]))
        print(f"{i + 1} of {len(inputs)}", flush=True)
    sampled, noise = np.stack(sampled), np.square(np.stack(details)).mean((1, 2))
    gap = np.square(given - sampled).mean((1, 2)) - noise
    size = np.square(sampled).mean((1, 2)) - noise
    one = noise * pairs  # of a single pair of orders
    drawn = np.random.default_rng(0).integers(len(gap), size=(1000, len(gap)))
    worth = one[drawn].mean(1) / gap[drawn].mean(1)
    rows = [
        ["size of the values", f"{np.sqrt(size.mean()):.4f}"],
        ["error of the explainer, 1 F", f"{np.sqrt(gap.mean()):.4f}"],
        *(
            [f"standard error of `shapley`, pairs={k}, {passes(k, given)} F", f"{(one.mean() / k) ** 0.5:.4f}"]
            for k in (2, 4, 8, 16)
        ),
        [
            "pairs of orders with the explainer's error",
            f"{one.mean() / gap.mean():.1f} [{np.percentile(worth, 2.5):.1f}, {np.percentile(worth, 97.5):.1f}]",
        ],
        [
            "differences below two standard errors of pairs=8 [%]",
            f"{100 * (np.abs(given - sampled) < 2 * np.stack(details) * (pairs / 8) ** 0.5).mean():.1f}",
        ],
        ["correlation with the sampled values", f"{np.corrcoef(given.ravel(), sampled.ravel())[0, 1]:.3f}"],
    ]
    title = f"# An amortised explainer of {vit.name}, {len(inputs)} images of {source.name}, pairs={pairs}"
    publish(out, title, NOTES, table(["", ""], rows))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("explainer", help="a file, or the name of a shipped model")
    arguments.add_argument("--model", default="cifar10_distilled")
    arguments.add_argument("--data", default=None, help="default: the test photos of CIFAR-10")
    arguments.add_argument("--limit", type=int, default=60)
    arguments.add_argument("--pairs", type=int, default=16)
    given = arguments.parse_args()
    main(given.explainer, given.model, given.data, given.limit, given.pairs, given.out)
