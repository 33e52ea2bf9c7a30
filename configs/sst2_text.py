"""Explanations of a text classifier on SST-2: are they faithful, and do they select the words that people select?

    tokentm leaderboard configs/sst2_text.py --out runs/sst2_text
    tokentm leaderboard configs/sst2_text.py:rows=weights --out runs/sst2_weights    other weights in TokenTM

The classifier is made by `models/training/recipes/sst2_minilm.py`.
ERASER's comprehensiveness and sufficiency, by deletion and with the model's mask, Kendall's tau with leave-one-out,
and agreement with VADER's lexicon (the extra `[evaluation]`).

Data: `tokentm data fetch sentences`.
Run time: hours on two CPU cores; much less without the Shapley values, or for `rows=weights`.
"""

from typing import Literal

from tokentm_jax import EvaluateConfig, LeaderboardConfig, sample_data
from tokentm_jax.configs import TEXT_ROWS, WEIGHT_ROWS


def get_config(*, rows: Literal["all", "weights"] = "all", model: str = "runs/sst2_minilm") -> LeaderboardConfig:
    data = sample_data("sentences", "dev")
    chosen = TEXT_ROWS if rows == "all" else WEIGHT_ROWS

    def run(name: str, task: str, data: str = data, **options: str) -> EvaluateConfig:
        return EvaluateConfig(name, task, data, chosen, model, options=options, batch_size=32)

    runs = [
        run("deletion", "eraser"),
        run("mask", "eraser", fill="mask"),
        run("leave_one_out", "leave_one_out"),
        run("people", "people", f"vader:{data}", signs="-1,1"),
    ]
    return LeaderboardConfig(f"sst2_text_{rows}", runs, ("deletion", "comprehensiveness"))
