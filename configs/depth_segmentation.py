"""Ablation of the depth: TokenTM aggregated over the first 1 ... 12 blocks, ImageNet-Segmentation.

    tokentm evaluate configs/depth_segmentation.py

Data: gtsegs_ijcv.mat (ImageNet-Segmentation, 4276 images) in the working folder, or --data.
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import EvaluateConfig, depth_rows

config = EvaluateConfig(
    name="depth_segmentation",
    task="segmentation",
    data="gtsegs_ijcv.mat",
    model="hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    rows=depth_rows(12),
    profile="reference",
)
