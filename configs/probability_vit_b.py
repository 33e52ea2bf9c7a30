"""Impact on probability (AOPC, LOdds), ViT-B on ImageNet. Its small twin is `perturbation_imagenet_sample.py`.

    tokentm evaluate configs/probability_vit_b.py

Data: ImageNet's validation images, prepared once by `tfds build imagenet2012 --file_format=array_record`.
Paper: AOPC up to 0.764 (for which of its models is not known here).
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="probability_vit_b",
    task="perturbation",
    data="tfds:imagenet2012:validation",
    model="hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    rows=PAPER_ROWS,
)
