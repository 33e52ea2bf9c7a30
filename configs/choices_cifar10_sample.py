"""The choices that the paper's text leaves open and the components, the shipped model on CIFAR-10 test images.

    tokentm evaluate configs/choices_cifar10_sample.py

Data: ../shared/data/cifar10_test_a.zip: 1000 of its 5000 images.
Run time: 6 minutes on 2 cores.
"""

from tokentm_jax.metrics.tasks import CHOICE_ROWS, COMPONENT_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="choices_cifar10_sample",
    task="perturbation",
    data="../shared/data/cifar10_test_a.zip",
    model="cifar10_vit",
    rows=(*COMPONENT_ROWS[:-1], *CHOICE_ROWS),
    batch_size=100,
    limit=1000,
)
