"""Impact on accuracy, ImageNet.

    tokentm evaluate configs/perturbation_imagenet.py

Data: ImageNet's validation images, prepared once by `tfds build imagenet2012 --file_format=array_record`.
Paper: negative AUC up to 58.1 (for which explained class and model is not known here).
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="perturbation_imagenet",
    task="perturbation",
    data="tfds:imagenet2012:validation",
    model="hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    rows=PAPER_ROWS,
    paper={("tokentm", "negative_auc_predicted"): 58.1},
)
