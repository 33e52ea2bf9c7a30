"""The choices that the paper's text leaves open, DeiT-tiny on 33 images.

    tokentm evaluate configs/choices_segmentation_sample.py

Data: ../shared/data/segmentation_a.mat: 33 COCO images chosen by this very model's predictions, so its class is in
every picture, and the figures say nothing about other data.
Run time: 1 minute on 2 cores.
"""

from tokentm_jax.metrics.tasks import CHOICE_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="choices_segmentation_sample",
    task="segmentation",
    data="../shared/data/segmentation_a.mat",
    model="deit_tiny_patch16_224",
    checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
    rows=CHOICE_ROWS,
    profile="reference",
)
