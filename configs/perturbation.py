"""Impact of removing pixels on accuracy and on probability: the paper's perturbation tables and their ablations.

    tokentm evaluate configs/perturbation.py                                   500 photos, DeiT-tiny
    tokentm evaluate configs/perturbation.py:rows=components                   ablation of the components (Table 6)
    tokentm evaluate configs/perturbation.py:rows=depth                        ablation of the depth
    tokentm evaluate configs/perturbation.py:rows=choices                      choices that the paper leaves open
    tokentm evaluate configs/perturbation.py:rows=readings                     readings of TokenTM and public codes
    tokentm evaluate configs/perturbation.py:rows=mixes                        candidates of tokentm_mix
    tokentm evaluate configs/perturbation.py:rows=weights                      other weights in TokenTM
    tokentm evaluate configs/perturbation.py:rows=pixels                       pixel maps, and their means by patch
    tokentm evaluate configs/perturbation.py:rows=readings,half=even           only on half of the photos
    tokentm evaluate configs/perturbation.py:data=cifar10_sample               5000 test images, cifar10_vit

    tokentm evaluate configs/perturbation.py:data=imagenet,model=vit_base      the paper's table, also with rows=...
    tokentm evaluate configs/perturbation.py:data=imagenet,model=vit_large
    tokentm evaluate configs/perturbation.py:data=cifar10 --checkpoint FILE    your ViT-B, fine-tuned on it
    tokentm evaluate configs/perturbation.py:data=cifar100 --checkpoint FILE

Data: `tokentm data fetch photos deit_tiny`, or cifar10 for cifar10_sample. Prepare the others once with
`tfds build imagenet2012 --file_format=array_record` (or cifar10, cifar100).
Paper: negative AUC up to 58.1 (ImageNet), 74.9 (CIFAR-10) and 54.8 (CIFAR-100), AOPC up to 0.764; the explained class
and the model are not known.
Run time: on 2 cores 2 to 3 minutes a row for the photos, 27 minutes in all for cifar10_sample; the others are not
measured.
"""

from typing import Literal

from tokentm_jax import EvaluateConfig, sample_data
from tokentm_jax.configs import (
    CHOICE_ROWS,
    COMPONENT_ROWS,
    MIX_ROWS,
    PAPER_ROWS,
    PIXEL_ROWS,
    READING_ROWS,
    WEIGHT_ROWS,
    depth_rows,
)

DATA = {  # its path, and the default model
    "photos": (sample_data("photos"), "deit_tiny"),
    "cifar10_sample": (sample_data("cifar10", "test"), "cifar10_vit"),
    "imagenet": ("tfds:imagenet2012:validation", "vit_base"),
    "cifar10": ("tfds:cifar10:test", "own"),
    "cifar100": ("tfds:cifar100:test", "own"),
}
MODELS = {  # name, and checkpoint if it is not the default one of the name
    "deit_tiny": ("deit_tiny_patch16_224", sample_data("deit_tiny")),
    "cifar10_vit": ("cifar10_vit", None),
    "cifar10_distilled": ("cifar10_distilled", None),
    "vit_base": ("hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k", None),
    "vit_large": ("hf-hub:timm/vit_large_patch16_224.augreg_in21k_ft_in1k", None),
    "own": ("vit_base_patch16_224", None),
}
ROWS = {
    "paper": PAPER_ROWS,
    "components": COMPONENT_ROWS,
    "choices": CHOICE_ROWS,
    "readings": READING_ROWS,
    "mixes": MIX_ROWS,
    "weights": WEIGHT_ROWS,
    "pixels": PIXEL_ROWS,
    "depth": depth_rows(12),
}
PAPER = {"imagenet": 58.1, "cifar10": 74.9, "cifar100": 54.8}


def get_config(
    *,
    data: Literal["photos", "cifar10_sample", "imagenet", "cifar10", "cifar100"] = "photos",
    model: Literal["deit_tiny", "cifar10_vit", "cifar10_distilled", "vit_base", "vit_large", "own"] | None = None,
    rows: Literal["paper", "components", "choices", "readings", "mixes", "weights", "pixels", "depth"] = "paper",
    half: Literal["even", "odd"] | None = None,
) -> EvaluateConfig:
    where, default = DATA[data]
    name, checkpoint = MODELS[model or default]
    known = data in PAPER and rows == "paper" and model in (None, default)
    return EvaluateConfig(
        name="_".join(["perturbation", data, *(part for part in (model, rows, half) if part not in (None, "paper"))]),
        task="perturbation",
        data=where,
        model=name,
        checkpoint=checkpoint,
        rows=ROWS[rows],
        paper={("tokentm", "negative_auc_predicted"): PAPER[data]} if known else {},
        half=half,
        batch_size=100 if data == "cifar10_sample" else 16,
    )
