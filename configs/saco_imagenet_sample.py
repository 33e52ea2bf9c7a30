"""SaCo, the salience-guided faithfulness coefficient, DeiT-tiny on 500 photos (not in the paper).

    tokentm evaluate configs/saco_imagenet_sample.py

Data: ../shared/data/imagenet_sample and ../shared/data/deit_tiny_patch16_224.safetensors.
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="saco_imagenet_sample",
    task="saco",
    data="../shared/data/imagenet_sample",
    model="deit_tiny_patch16_224",
    checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
    rows=PAPER_ROWS,
)
