"""Parameter randomisation, cascading from the head: how much a map still resembles the model's (not in the paper).

    tokentm evaluate configs/sanity_imagenet_sample.py

Data: ../shared/data/imagenet_sample and ../shared/data/deit_tiny_patch16_224.safetensors.
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import EvaluateConfig, sanity_rows

config = EvaluateConfig(
    name="sanity_imagenet_sample",
    task="sanity",
    data="../shared/data/imagenet_sample",
    model="deit_tiny_patch16_224",
    checkpoint="../shared/data/deit_tiny_patch16_224.safetensors",
    rows=sanity_rows(12, "tokentm", "gae", "transformer_attribution"),
    limit=50,
)
