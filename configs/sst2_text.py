"""Explanations of a text classifier on SST-2: are they faithful, and do they select the words that people select?

    tokentm evaluate configs/sst2_text.py --out runs/sst2_text
    tokentm evaluate configs/sst2_text.py:rows=weights --out runs/sst2_weights    other weights in TokenTM

The classifier is made by `models/training/recipes/sst2_minilm.py`.
ERASER's comprehensiveness and sufficiency, by deleting and by masking, Kendall's tau with leave-one-out, and agreement
with VADER's lexicon (the extra `[evaluation]`).

Data: `tokentm data fetch sentences`.
Run time: more than two hours on two CPU cores without the Shapley values, which take about the same time
again; 20 minutes for `rows=weights`.
"""

from typing import Literal

from tokentm_jax import sample_data
from tokentm_jax.configs import TEXT_ROWS, WEIGHT_ROWS
from tokentm_jax.runs.evaluate_text import TextEvaluateConfig


def get_config(*, rows: Literal["all", "weights"] = "all", model: str = "runs/sst2_minilm") -> TextEvaluateConfig:
    return TextEvaluateConfig(
        name="sst2_text" if rows == "all" else f"sst2_text_{rows}",
        model=model,
        data=sample_data("sentences", "dev"),
        rows=TEXT_ROWS if rows == "all" else WEIGHT_ROWS,
        ratings=(-1, 1),
    )
