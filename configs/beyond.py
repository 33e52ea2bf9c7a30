"""Metrics that are not in the paper: insertion and deletion, SaCo, SRG, ROAD and others; DeiT-tiny on 500 photos.

    tokentm evaluate configs/beyond.py                       insertion and deletion by blurring
    tokentm evaluate configs/beyond.py:task=saco             the salience-guided faithfulness coefficient
    tokentm evaluate configs/beyond.py:task=sanity           similarity of the map to the original map when parameters
                                                             are randomised from the head down, on 50 photos
    tokentm evaluate configs/beyond.py:task=srg              symmetric relevance gain
    tokentm evaluate configs/beyond.py:task=road             accuracy with removed pixels imputed from their neighbours
    tokentm evaluate configs/beyond.py:task=sensitivity      change of maps under noise, on 50 photos
    tokentm evaluate configs/beyond.py:task=infidelity       whether relevance predicts the cost of random removal
    tokentm evaluate configs/beyond.py:task=complexity       sparseness and entropy of maps
    tokentm evaluate configs/beyond.py:task=shapley          agreement with Shapley values of 7 x 7 squares, 50 photos
    tokentm evaluate configs/beyond.py:task=saco,rows=mixes  candidates of tokentm_mix

Data: `tokentm data fetch photos deit_tiny`.
Run time: not measured.
"""

from typing import Any, Literal

from tokentm_jax import EvaluateConfig, Row, sample_data
from tokentm_jax.configs import MIX_ROWS, PAPER_ROWS, sanity_rows

SHAPLEY: dict[str, Any] = {"patch": 32, "value": "probability", "pairs": 16}
OPTIONS: dict[str, dict[str, Any]] = {"insertion": {"fill": "blur"}, "shapley": SHAPLEY}
FEW = ("sanity", "sensitivity", "shapley")  # slow tasks


def get_config(
    *,
    task: Literal[
        "insertion", "saco", "sanity", "srg", "road", "sensitivity", "infidelity", "complexity", "shapley"
    ] = "insertion",
    rows: Literal["paper", "mixes"] = "paper",
) -> EvaluateConfig:
    chosen = MIX_ROWS if rows == "mixes" else PAPER_ROWS
    if task == "sanity":
        chosen = sanity_rows(12, "tokentm", "gae", "transformer_attribution")
    if task == "shapley":
        chosen = (*chosen, Row("shapley, other orders", "shapley", {**SHAPLEY, "seed": 1}))
    return EvaluateConfig(
        name="_".join([task, "photos", *([rows] if rows != "paper" else [])]),
        task=task,
        data=sample_data("photos"),
        model="deit_tiny_patch16_224",
        checkpoint=sample_data("deit_tiny"),
        rows=chosen,
        options=OPTIONS.get(task, {}),
        limit=50 if task in FEW else None,
    )
