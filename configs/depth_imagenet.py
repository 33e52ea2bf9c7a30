"""Ablation of the depth: TokenTM aggregated over the first 1 ... 12 blocks, ImageNet.

    tokentm evaluate configs/depth_imagenet.py

Data: ImageNet's validation images, prepared once by `tfds build imagenet2012 --file_format=array_record`.
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import EvaluateConfig, depth_rows

config = EvaluateConfig(
    name="depth_imagenet",
    task="perturbation",
    data="tfds:imagenet2012:validation",
    model="hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    rows=depth_rows(12),
)
