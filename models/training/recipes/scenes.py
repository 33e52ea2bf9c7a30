"""Rendered scenes from scratch, one model for each rule: the recipe of models/scenes_*.safetensors.

    python -m models.training models/training/recipes/scenes.py --out runs/scenes_counts
    python -m models.training models/training/recipes/scenes.py:rule=xor --out runs/scenes_xor

The first model counts red discs and blue squares; the others start from it, since some rules (exclusive or) are hard
to learn from nothing.

Data: rendered, and never stored.
Run time: see models/README.md.
"""

from pathlib import Path
from typing import Literal

from models.training.recipe import TrainConfig

START = Path(__file__).resolve().parents[2] / "scenes_counts.safetensors"
CLASSES = {"counts": 16, "count": 4, "more": 3, "position": 3}


def get_config(
    *, rule: Literal["counts", "part", "conjunction", "xor", "count", "more", "position", "bystander"] = "counts"
) -> TrainConfig:
    first = rule == "counts"
    return TrainConfig(
        name=f"scenes_{rule}",
        train_data=f"scenes:{rule}:train",
        test_data=f"scenes:{rule}:test",
        model={
            "img_size": 64,
            "patch_size": 8,
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "num_classes": CLASSES.get(rule, 2),
        },
        fine_tune=None if first else ("scenes_counts", str(START)),
        epochs={"counts": 5, "more": 3}.get(rule, 1),
        warmup_epochs=1 if first else 0.1,
        batch_size=64,
        optimiser="muon",
        learning_rate=6e-3 if first else 3e-3,
        weight_decay=0.1,
        label_smoothing=0.0,
        ema_decay=0.995,
        crop_padding=0,
        flip=rule != "position",
        mimetic_init=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        checkpoint_epochs=1.0 if first else 0.5,
    )
