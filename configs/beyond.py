"""Beyond the paper: insertion and deletion, SaCo, and the randomisation of parameters, DeiT-tiny on 500 photos.

    tokentm evaluate configs/beyond.py                       insertion and deletion by blurring
    tokentm evaluate configs/beyond.py:task=saco             the salience-guided faithfulness coefficient
    tokentm evaluate configs/beyond.py:task=sanity           how much a map still resembles the model's, on 50 photos,
                                                             when its parameters become random from the head down

Data: ../shared/data/imagenet_sample and ../shared/data/deit_tiny_patch16_224.safetensors.
Run time: not measured.
"""

from typing import Literal

from tokentm_jax import PAPER_ROWS, EvaluateConfig, sanity_rows


def get_config(task: Literal["insertion", "saco", "sanity"] = "insertion") -> EvaluateConfig:
    return EvaluateConfig(
        name=f"{task}_photos",
        task=task,
        data="../shared/data/imagenet_sample",
        model="deit_tiny_patch16_224",
        checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
        rows=sanity_rows(12, "tokentm", "gae", "transformer_attribution") if task == "sanity" else PAPER_ROWS,
        options={"fill": "blur"} if task == "insertion" else {},
        limit=50 if task == "sanity" else None,
    )
