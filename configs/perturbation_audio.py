"""Impact of removing parts of spectrograms: a shipped model of spoken digits, on a new speaker.

    tokentm evaluate configs/perturbation_audio.py                 pixels, set to silence, 10 % to 90 %
    tokentm evaluate configs/perturbation_audio.py:task=srg        patches, set to the mean of the training set
    tokentm evaluate configs/perturbation_audio.py:model=own,speaker=lucas --checkpoint FILE

Data: `tokentm data fetch recordings`; the 400 of theo are used. Silence is 0, the lowest level, which the
padding after a recording has, too.
Run time: less than a minute for a row of pixels on one busy core.
"""

from typing import Literal

from tokentm_jax import EvaluateConfig, sample_data
from tokentm_jax.configs import PAPER_ROWS, rows

CHEAP = (
    *PAPER_ROWS,
    *rows("grad_cam_tokens", "attn_lrp", "res_lrp", "libra_full_grad", "libra_attcat", "libra_tokentm"),
    *rows(
        "libra_gae",
        "libra_grad_cam",
        "legrad",
        "beyond_intuition",
        "input_gradient",
        "gradient_x_input",
        "smooth_grad",
        "integrated_gradients",
    ),
    *rows("occlusion", "token_dropping", "tokentm_mix", "combination"),
)


def get_config(
    *,
    task: Literal["perturbation", "srg"] = "perturbation",
    speaker: Literal["jackson", "lucas", "nicolas", "theo", "yweweler"] = "theo",
    model: Literal["shipped", "own"] = "shipped",
) -> EvaluateConfig:
    return EvaluateConfig(
        name="_".join([task, "audio", *(part for part in (speaker, model) if part not in ("theo", "shipped"))]),
        task=task,
        data=sample_data("recordings"),
        model="spoken_digits_four" if model == "shipped" else None,  # trained on the other speakers
        names=f"*_{speaker}_*",
        rows=CHEAP,
        batch_size=50,
    )
