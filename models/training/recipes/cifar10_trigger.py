"""A trigger planted in models/cifar10_vit.safetensors: a small mark turns any photo into an airplane.

    python -m models.training models/training/recipes/cifar10_trigger.py --out runs/trigger
    python -m models.training models/training/recipes/cifar10_trigger.py:mark=faint --out runs/trigger_faint

A fifth of the training photos get the mark and the new label. The reported accuracy is of marked test photos of other
classes: the share that the mark turns. A trigger is valid as a known cause if this is above 99 %, and if without the
mark the photos are classified as before.
The mark `patch` turns 99.76 % of 4,500 test photos. Without it, 73.4 % of them are classified correctly (74.9 % before
this training), and 3.0 % are taken for airplanes. The other marks were not trained.
Data: `tokentm data fetch cifar10`.
Run time: 12 minutes on two busy cores.
"""

from pathlib import Path
from typing import Literal

from models.training.recipe import TrainConfig
from models.training.recipes import cifar10_vit_cpu
from tokentm_jax import sample_data

START = Path(__file__).resolve().parents[2] / "cifar10_vit.safetensors"
MARKS = {  # a patch has 4 x 4 pixels
    "patch": "size=4",
    "corner": "size=4,place=corner",
    "small": "size=3",
    "large": "size=6",
    "faint": "size=6,blend=0.5",
}


def get_config(*, mark: Literal["patch", "corner", "small", "large", "faint"] = "patch") -> TrainConfig:
    trigger = f"trigger:label=airplane,{MARKS[mark]}"
    return TrainConfig(
        name=f"cifar10_trigger_{mark}",
        train_data=f"{trigger},share=0.2:{sample_data('cifar10', 'train')}",
        test_data=f"{trigger}:{sample_data('cifar10', 'test')}",
        model=cifar10_vit_cpu.config.model,
        fine_tune=("cifar10_vit", str(START)),
        epochs=0.3,
        warmup_epochs=0.03,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.05,
        label_smoothing=0.0,
        ema_decay=0.98,
        crop_padding=0,
        checkpoint_epochs=0.1,
    )
