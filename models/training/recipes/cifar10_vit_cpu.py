"""CIFAR-10 from scratch on a CPU: the recipe of models/cifar10_vit.safetensors.

python -m models.training models/training/recipes/cifar10_vit_cpu.py --out runs/cifar10_cpu
"""

from models.training.recipe import TrainConfig
from tokentm_jax import sample_data

config = TrainConfig(
    name="cifar10_vit",
    train_data=sample_data("cifar10", "train"),
    test_data=sample_data("cifar10", "test"),
    model={"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10},
    epochs=30,
    warmup_epochs=2,
    batch_size=128,
    learning_rate=1.5e-3,
    weight_decay=0.05,
    label_smoothing=0.05,
    patch_drop=0.5,
    patch_drop_epochs=23,
    mimetic_init=True,
)
