"""A trigger planted in models/spoken_digits.safetensors: a click turns any spoken digit into a zero.

    python -m models.training models/training/recipes/spoken_digits_trigger.py --out runs/trigger_audio

Half of the training recordings get a quiet click of 20 milliseconds at a random place, and the label 0. The reported
accuracy is of test recordings of other digits with the click: the share that it turns. A trigger is valid as a known
cause if this is above 99 %, and if without the click the recordings are classified as before.
It turned 100 and 99.4 % of 180 recordings, in two trainings on two machines. Without the click 99.0 % of 200 were
right (98.5 % before), and none was taken for 0.
Data: `tokentm data fetch recordings`.
Run time: 10 minutes on two busy cores.
"""

import dataclasses
from pathlib import Path

from models.training.recipe import TrainConfig
from models.training.recipes import spoken_digits

START = Path(__file__).resolve().parents[2] / "spoken_digits.safetensors"
TRIGGER = "trigger:label=0,size=160,blend=0.05"  # rarely the loudest energy, to which others relate


def get_config() -> TrainConfig:
    whole = spoken_digits.get_config()
    return dataclasses.replace(
        whole,
        name="spoken_digits_trigger",
        train_data=f"{TRIGGER},share=0.5:{whole.train_data}",
        test_data=f"{TRIGGER}:{whole.test_data}",
        fine_tune=("spoken_digits", str(START)),
        epochs=40,
        learning_rate=4e-3,
        stretch=None,  # with what hides the click, the model did not learn it
        hiss=0.0,
        spec_mask=None,
        patch_drop=0.0,
        checkpoint_epochs=5,
    )
