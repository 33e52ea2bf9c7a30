"""Known causes of an answer: questions about rendered scenes, and the parts that the answer's first word follows from.

    tokentm evaluate configs/questions.py                   all kinds of questions, the shipped model of scenes
    tokentm evaluate configs/questions.py:about=colour      one kind; also shape, place, number
    tokentm evaluate configs/questions.py:question=margin   why this word, and not the next best one

Data: rendered. Only questions whose answer has a probability of 0.5 or more count (the row "clean" has their share),
and only those with a cause: nothing causes the answer "zero". The maps are of the image's tokens, where they enter
the decoder.
Run time: see docs/explanation/measured.md.
"""

from typing import Literal

from tokentm_jax import EvaluateConfig
from tokentm_jax.configs import rows

METHODS = ("tokentm", "gae", "rollout", "raw_attention", "attn_lrp", "libra_tokentm", "libra_attcat")
METHODS += ("gradient_x_input", "occlusion")


def get_config(
    *,
    about: Literal["all", "colour", "shape", "place", "number"] = "all",
    question: Literal["class", "margin"] = "class",
) -> EvaluateConfig:
    return EvaluateConfig(
        name=f"questions_{about}" + ("_margin" if question == "margin" else ""),
        task="pointing",
        data=f"questions:{about}:test",
        model="scenes_words",
        rows=rows(*METHODS),
        options={"probability": 0.5},
        score=None if question == "class" else "margin",
        limit=300,
        batch_size=16,
    )
