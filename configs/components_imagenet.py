"""Ablation of the components: off (that is GAE), + length, + NECC, + aggregation, ImageNet.

    tokentm evaluate configs/components_imagenet.py

Data: ImageNet's validation images, prepared once by `tfds build imagenet2012 --file_format=array_record`.
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import COMPONENT_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="components_imagenet",
    task="perturbation",
    data="tfds:imagenet2012:validation",
    model="hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    rows=COMPONENT_ROWS,
)
