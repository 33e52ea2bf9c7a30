"""What mixed precision saves: forward passes of an evaluation, and steps of training.

    python tests/benchmark/mixed.py

Both of each pair have the same weights and images and are timed in turns. It saves time where the processor multiplies
bfloat16 matrices (AMX of recent Intel processors, tensor cores, TPUs).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import alternate, milliseconds, parser, publish, random_images, random_vit, spread, table

from models.training.loop import begin
from models.training.recipe import TrainConfig
from models.training.train import Batch, make_step
from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.maths.mixed import linear
from tokentm_jax.models.architectures import build
from tokentm_jax.models.vit import ViT, init_params

RECIPES = Path(__file__).resolve().parents[2] / "models/training/recipes"
FORWARD = "deit_tiny_patch16_224"


def forward(batch: int) -> dict[str, Callable[[], Any]]:
    module, params = random_vit(FORWARD)
    images = random_images(batch, module)

    def passes(module: ViT) -> Callable[[], Any]:
        compiled = jax.jit(lambda params, images: module.apply({"params": params}, images))
        return lambda: compiled(params, images)

    return {"float32": passes(module), "mixed": passes(module.clone(linear=linear))}


def step(recipe: str) -> dict[str, Callable[[], Any]]:
    """Steps of a recipe, without its teacher."""
    made = dataclasses.replace(read_recipe(RECIPES / recipe, TrainConfig), teacher=None, teacher_views=0)
    module = build(made.model)
    rows = np.zeros(made.batch_size, np.int32)
    images = np.random.default_rng(0).integers(0, 256, (made.batch_size, 32, 32, 3), np.uint8)
    batch = Batch(images, rows, rows, np.int32(0))

    def steps(mixed: bool) -> Callable[[], Any]:
        function, optimiser = make_step(dataclasses.replace(made, mixed_precision=mixed), module, 100)
        params = init_params(module, jax.random.key(0))
        states = [begin(optimiser, params, averaged=True)]

        def once() -> Any:
            state, loss = function(states.pop(), batch, None, made.patch_drop)  # which takes the state's memory
            states.append(state)
            return loss

        return once

    return {"float32": steps(False), "mixed": steps(True)}


def main(seconds: float, rounds: int) -> str:
    cases = {
        f"forward pass, {FORWARD}, batch 16": forward(16),
        f"forward pass, {FORWARD}, batch 64": forward(64),
        "step of cifar10_finetune_112.py": step("cifar10_finetune_112.py"),
        "step of cifar10_distilled.py, half of the patches": step("cifar10_distilled.py"),
    }
    rows = []
    for name, calls in cases.items():
        times = alternate(calls, seconds / len(cases), rounds)
        medians = [milliseconds(float(np.median(found))) for found in times.values()]
        rows.append([name, *medians, spread(times["mixed"] / times["float32"])])
    return table(["", "float32, ms", "mixed, ms", "mixed / float32"], rows)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=120, help="at least")
    arguments.add_argument("--rounds", type=int, default=5, help="at least")
    chosen = arguments.parse_args()
    publish(chosen.out, "# Mixed precision", main(chosen.seconds, chosen.rounds))
