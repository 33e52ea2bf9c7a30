"""Spoken digits from scratch: the recipe of the audio model that the project ships.

    python -m models.training models/training/recipes/spoken_digits.py
    python -m models.training models/training/recipes/spoken_digits.py:speaker=lucas

The first trains on all five speakers, and tests on 200 of their recordings; the second leaves lucas out, to test on.

A Vision Transformer of one channel on spectrograms of 40 mel bins and 0.97 seconds. There are five voices to learn
from, so the training changes them: other scales of frequency and of time, other starts, other microphones, and noise.
Data: `tokentm data fetch recordings`.
Run time: 80 seconds of one core.
"""

from typing import Literal

from models.training.recipe import TrainConfig
from tokentm_jax import sample_data
from tokentm_jax.inputs import Spectrogram

DATA = sample_data("recordings")  # 0/0_theo_12.wav: the digit, the speaker, the number


def get_config(
    *, speaker: Literal["nobody", "jackson", "lucas", "nicolas", "theo", "yweweler"] = "nobody"
) -> TrainConfig:
    return TrainConfig(
        name="spoken_digits" if speaker == "nobody" else f"spoken_digits_{speaker}",
        train_data=DATA,
        test_data=DATA,
        held_out="*_[0-3].wav" if speaker == "nobody" else f"*_{speaker}_*",
        audio=Spectrogram(
            sampling_rate=8000,
            window=200,
            hop=80,
            fft=512,
            lowest_frequency=60.0,
            floor=-14.0,
            ceiling=0.0,
            relative=True,
        ),
        model={
            "img_size": (40, 96),
            "patch_size": (8, 8),
            "in_chans": 1,
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_ratio": 3.0,
            "num_classes": 10,
            "class_token": False,
            "global_pool": "avg",
        },
        epochs=60,
        warmup_epochs=2,
        batch_size=32,
        optimiser="muon",
        learning_rate=4e-3,
        weight_decay=0.1,
        label_smoothing=0.05,
        ema_decay=0.99,
        crop_padding=0,
        flip=False,
        delay=(0.04, 0.15),
        stretch=(0.2, 0.3),
        tilt=0.3,
        hiss=0.25,
        spec_mask=(0.15, 0.1),
        patch_drop=0.25,
        patch_drop_epochs=60,
        mimetic_init=True,
        mean=(0.2,),
        std=(0.28,),
        checkpoint_epochs=15,
    )
