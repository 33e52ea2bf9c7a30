"""Insertion and deletion by blurring, DeiT-tiny on 500 photos (not in the paper).

    tokentm evaluate configs/insertion_imagenet_sample.py

Data: ../shared/data/imagenet_sample and ../shared/data/deit_tiny_patch16_224.safetensors.
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="insertion_imagenet_sample",
    task="insertion",
    data="../shared/data/imagenet_sample",
    model="deit_tiny_patch16_224",
    checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
    rows=PAPER_ROWS,
    options={"fill": "blur"},
)
