"""Known causes: relevance against a truth that is known, on mosaics of photos.

    tokentm evaluate configs/causes.py                          2 x 2 mosaics of photos, DeiT-tiny: whose object is it?
    tokentm evaluate configs/causes.py:question=margin          the same, and why not the next best class
    tokentm evaluate configs/causes.py:data=mosaic_3            3 x 3 mosaics
    tokentm evaluate configs/causes.py:data=cifar10             2 x 2 mosaics of CIFAR-10

Data: `tokentm data fetch photos deit_tiny` or `cifar10`. Only cells whose class has a probability of 0.1 or more
count (the column "counted" has their share). To choose on half of the cases and to confirm
on the other half, add `--half even` or `--half odd`: they share no photo.
Run time: not measured.
"""

from typing import Literal

from tokentm_jax import EvaluateConfig, sample_data
from tokentm_jax.configs import rows

ROWS = rows(
    "tokentm_mix",
    "tokentm",
    "gae",
    "libra_tokentm",
    "libra_gae",
    "libra_attcat",
    "libra_full_grad",
    "legrad",
    "conservative_lrp",
    "attn_lrp",
    "beyond_intuition",
    "transformer_attribution",
    "attcat",
    "rollout",
    "occlusion",
)
DEIT, CIFAR = ("deit_tiny_patch16_224", sample_data("deit_tiny")), ("cifar10_distilled", None)
MOSAICS = {
    "mosaic": (f"mosaic:2:{sample_data('photos')}", *DEIT),
    "mosaic_3": (f"mosaic:3:{sample_data('photos')}", *DEIT),
    "cifar10": (f"mosaic:2:{sample_data('cifar10', 'test')}", *CIFAR),
}


def get_config(
    *, data: Literal["mosaic", "mosaic_3", "cifar10"] = "mosaic", question: Literal["class", "margin"] = "class"
) -> EvaluateConfig:
    where, model, checkpoint = MOSAICS[data]
    return EvaluateConfig(
        name=f"causes_{data}" + ("_margin" if question == "margin" else ""),
        task="pointing",
        data=where,
        model=model,
        checkpoint=checkpoint,
        rows=ROWS,
        profile="reference",
        options={"probability": 0.1},
        score=None if question == "class" else "margin",
        limit=400,
    )
