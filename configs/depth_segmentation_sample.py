"""Ablation of the depth: TokenTM aggregated over the first 1 ... 12 blocks, DeiT-tiny on 33 images.

    tokentm evaluate configs/depth_segmentation_sample.py

Data: ../shared/data/segmentation_a.mat: 33 COCO images chosen by this very model's predictions, so its class is in
every picture, and the figures say nothing about other data.
Run time: 1 minute on 2 cores.
"""

from tokentm_jax.metrics.tasks import EvaluateConfig, depth_rows

config = EvaluateConfig(
    name="depth_segmentation_sample",
    task="segmentation",
    data="../shared/data/segmentation_a.mat",
    model="deit_tiny_patch16_224",
    checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
    rows=depth_rows(12),
    profile="reference",
)
