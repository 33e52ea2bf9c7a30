"""Impact on accuracy, CIFAR-10, with a ViT of one's own that was fine-tuned on it.

    tokentm evaluate configs/perturbation_cifar10.py

Data: prepared once by `tfds build cifar10 --file_format=array_record`; the model by --checkpoint.
Paper: negative AUC 74.9 (for which explained class is not known here).
Run time: not measured.
"""

from tokentm_jax.metrics.tasks import PAPER_ROWS, EvaluateConfig

config = EvaluateConfig(
    name="perturbation_cifar10",
    task="perturbation",
    data="tfds:cifar10:test",
    model="vit_base_patch16_224",
    rows=PAPER_ROWS,
    paper={("tokentm", "negative_auc_predicted"): 74.9},
)
