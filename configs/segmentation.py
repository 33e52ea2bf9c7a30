"""Localisation on ImageNet-Segmentation: the paper's segmentation table.

    tokentm evaluate configs/segmentation.py

Data: gtsegs_ijcv.mat (ImageNet-Segmentation, 4276 images) in the working folder, or --data.
Paper: pixel accuracy up to 81.8 (which of its models has it is not known here).
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="segmentation",
    task="segmentation",
    data="gtsegs_ijcv.mat",
    model="hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    rows=PAPER_ROWS,
    profile="reference",
    paper={("tokentm", "pixel_accuracy"): 81.8},
)
