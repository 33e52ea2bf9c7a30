"""Impact on accuracy, the shipped model on CIFAR-10: the small twin of `perturbation_cifar10.py`.

    tokentm evaluate configs/perturbation_cifar10_sample.py

Data: ../shared/data/cifar10_test_a.zip: 5000 of the 10,000 test images, as JPEG.
Run time: 27 minutes on 2 cores.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="perturbation_cifar10_sample",
    task="perturbation",
    data="../shared/data/cifar10_test_a.zip",
    model="cifar10_vit",
    rows=PAPER_ROWS,
    batch_size=100,
)
