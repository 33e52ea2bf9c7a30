"""An amortised explainer: one forward pass for what sampled Shapley values need hundreds of.

    python -m models.training models/training/recipes/explainer.py --out runs/explainer
    python -m models.training models/training/recipes/explainer.py:model=scenes_more --out runs/explainer_scenes

The samples are those of the method `shapley` with two pairs of orders, for all classes at once: 254 passes for each
image. Nearly all of the time is theirs, and a run that stops goes on with those that it has.

Data: `tokentm data fetch cifar10`; scenes are rendered.
Run time: 1 hour on 2 busy cores for CIFAR-10.
"""

from typing import Literal

from models.training.recipe import AmortiseConfig
from tokentm_jax import sample_data


def get_config(*, model: Literal["cifar10_distilled", "scenes_more"] = "cifar10_distilled") -> AmortiseConfig:
    scenes = model != "cifar10_distilled"
    return AmortiseConfig(
        name=f"{model}_explainer",
        model=model,
        train_data="scenes:more:train" if scenes else sample_data("cifar10", "train"),
        test_data="scenes:more:test" if scenes else sample_data("cifar10", "test"),
    )
