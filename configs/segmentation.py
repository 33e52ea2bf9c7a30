"""Localisation: the paper's table on ImageNet-Segmentation and its ablations.

    tokentm evaluate configs/segmentation.py                                   33 photos, DeiT-tiny
    tokentm evaluate configs/segmentation.py:rows=components                   ablation of the components (Table 6)
    tokentm evaluate configs/segmentation.py:rows=depth                        ablation of the depth
    tokentm evaluate configs/segmentation.py:rows=choices                      choices that the paper leaves open
    tokentm evaluate configs/segmentation.py:rows=readings                     readings of TokenTM and public codes
    tokentm evaluate configs/segmentation.py:rows=mixes                        candidates of tokentm_mix
    tokentm evaluate configs/segmentation.py:rows=weights                      other weights in TokenTM

    tokentm evaluate configs/segmentation.py:data=imagenet                     the paper's table, ViT-B; with rows=...

Data: `tokentm data fetch masks deit_tiny`. They are 33 COCO images, chosen by the predictions of this model, so
its class is in every picture. The results do not hold for other data. For imagenet: gtsegs_ijcv.mat
(ImageNet-Segmentation, 4276 images) in the working folder, or --data.
Paper: pixel accuracy up to 81.8 (its model is not known).
Run time: about a minute for the sample on 2 cores; imagenet is not measured.
"""

from typing import Literal

from tokentm_jax import EvaluateConfig, sample_data
from tokentm_jax.configs import (
    CHOICE_ROWS,
    COMPONENT_ROWS,
    MIX_ROWS,
    PAPER_ROWS,
    READING_ROWS,
    WEIGHT_ROWS,
    depth_rows,
)

DATA = {  # its path, and the model, with a checkpoint if it is not the default one of the name
    "sample": (
        sample_data("masks"),
        "deit_tiny_patch16_224",
        sample_data("deit_tiny"),
    ),
    "imagenet": ("gtsegs_ijcv.mat", "hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k", None),
}
ROWS = {
    "paper": PAPER_ROWS,
    "components": COMPONENT_ROWS,
    "choices": CHOICE_ROWS,
    "readings": READING_ROWS,
    "mixes": MIX_ROWS,
    "weights": WEIGHT_ROWS,
    "depth": depth_rows(12),
}


def get_config(
    *,
    data: Literal["sample", "imagenet"] = "sample",
    rows: Literal["paper", "components", "choices", "readings", "mixes", "weights", "depth"] = "paper",
) -> EvaluateConfig:
    where, model, checkpoint = DATA[data]
    return EvaluateConfig(
        name="_".join(["segmentation", data, *([rows] if rows != "paper" else [])]),
        task="segmentation",
        data=where,
        model=model,
        checkpoint=checkpoint,
        rows=ROWS[rows],
        profile="reference",
        paper={("tokentm", "pixel_accuracy"): 81.8} if (data, rows) == ("imagenet", "paper") else {},
    )
