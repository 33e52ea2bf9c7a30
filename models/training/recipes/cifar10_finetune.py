"""Fine-tune an ImageNet checkpoint on CIFAR-10 at 224 pixels: how the paper's CIFAR models are made.

    python -m models.training models/training/recipes/cifar10_finetune.py --out runs/finetune

For another backbone change `model` and `fine_tune`; for CIFAR-100 also `num_classes` and the data. Not measured:
it wants a GPU.
"""

from models.training.recipe import TrainConfig
from tokentm_jax import sample_data

config = TrainConfig(
    name="deit_tiny_cifar10",
    train_data=sample_data("cifar10", "train"),
    test_data=sample_data("cifar10", "test"),
    model={"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "num_classes": 10},
    fine_tune=("deit_tiny_patch16_224", sample_data("deit_tiny")),
    epochs=10,
    warmup_epochs=1,
    batch_size=256,
    learning_rate=1e-4,
    weight_decay=0.05,
    cutmix=0.5,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
