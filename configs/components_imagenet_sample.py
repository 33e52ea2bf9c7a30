"""Ablation of the components: off (that is GAE), + length, + NECC, + aggregation, DeiT-tiny on 500 photos.

    tokentm evaluate configs/components_imagenet_sample.py

Data: ../shared/data/imagenet_sample and ../shared/data/deit_tiny_patch16_224.safetensors.
Run time: 2 to 3 minutes a row on 2 cores.
"""

from tokentm_jax.metrics.tasks import COMPONENT_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="components_imagenet_sample",
    task="perturbation",
    data="../shared/data/imagenet_sample",
    model="deit_tiny_patch16_224",
    checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
    rows=COMPONENT_ROWS,
)
