"""Impact on accuracy and probability, DeiT-tiny on 500 photos: the small twin of `perturbation_imagenet.py`.

    tokentm evaluate configs/perturbation_imagenet_sample.py

Data: ../shared/data/imagenet_sample and ../shared/data/deit_tiny_patch16_224.safetensors.
Run time: 3 minutes a row on 2 cores.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="perturbation_imagenet_sample",
    task="perturbation",
    data="../shared/data/imagenet_sample",
    model="deit_tiny_patch16_224",
    checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
    rows=PAPER_ROWS,
)
