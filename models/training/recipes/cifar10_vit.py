"""CIFAR-10 from scratch on a GPU.

    python -m models.training models/training/recipes/cifar10_vit.py --out runs/cifar10

Meant for 90 % or more after about 300 epochs with strong augmentation. Not measured, for want of a GPU.
"""

from models.training.recipe import TrainConfig
from tokentm_jax import sample_data

config = TrainConfig(
    name="cifar10_vit",
    train_data=sample_data("cifar10", "train"),
    test_data=sample_data("cifar10", "test"),
    model={"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 3, "num_classes": 10},
    epochs=300,
    warmup_epochs=10,
    batch_size=512,
    learning_rate=2e-3,
    weight_decay=0.1,
    label_smoothing=0.1,
    affine_colour=0.6,
    cutmix=0.5,
    mimetic_init=True,
    ema_decay=0.9995,
    checkpoint_epochs=10,
)
