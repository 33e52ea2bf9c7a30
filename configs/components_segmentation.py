"""Ablation of the components: off (that is GAE), + length, + NECC, + aggregation, ImageNet-Segmentation.

    tokentm evaluate configs/components_segmentation.py

Data: gtsegs_ijcv.mat (ImageNet-Segmentation, 4276 images) in the working folder, or --data.
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import COMPONENT_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="components_segmentation",
    task="segmentation",
    data="gtsegs_ijcv.mat",
    model="hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    rows=COMPONENT_ROWS,
    profile="reference",
)
