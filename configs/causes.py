"""Known causes: relevance against a known truth; mosaics of photos, planted triggers, rendered scenes, known programs.

    tokentm evaluate configs/causes.py                          2 x 2 mosaics of photos, DeiT-tiny: whose object is it?
    tokentm evaluate configs/causes.py:question=margin          the same, and why not the next best class
    tokentm evaluate configs/causes.py:data=mosaic_3            3 x 3 mosaics
    tokentm evaluate configs/causes.py:data=cifar10             2 x 2 mosaics of CIFAR-10
    tokentm evaluate configs/causes.py:data=trigger             CIFAR-10 with a planted mark; needs the model of
                                                                models/training/recipes/cifar10_trigger.py
    tokentm evaluate configs/causes.py:data=trigger_text        sentences with a planted word; needs the model of
                                                                models/training/recipes/sst2_trigger.py
    tokentm evaluate configs/causes.py:data=trigger_audio       recordings with a planted click; needs the model of
                                                                models/training/recipes/spoken_digits_trigger.py
    tokentm evaluate configs/causes.py:data=deletion            CIFAR-10 without a patch; needs the model of
                                                                models/training/recipes/cifar10_missing.py
    tokentm evaluate configs/causes.py:data=more                rendered scenes and the effects of their parts; also
                                                                part, xor, conjunction, count, counts, position,
                                                                bystander
    tokentm evaluate configs/causes.py:data=more,methods=all    the same with all methods
    tokentm evaluate configs/causes.py:data=program_copy        all methods on weights written by hand; also
                                                                program_count, program_compare

Data: `tokentm data fetch photos deit_tiny`, `cifar10`, `sentences` or `recordings`; scenes and images of programs are
rendered. Only cells and marks whose class has a probability of 0.1 or more count (the row "clean" has their share). To
choose on half of the cases and to confirm on the other half, add `--half even` or `--half odd`: they share no photo.
Run time: on 2 busy cores, 2 to 4 minutes for 200 scenes, 25 minutes for mosaics of photos without occlusion.
"""

from typing import Literal

from tokentm_jax import METHODS, EvaluateConfig, Row, sample_data
from tokentm_jax.configs import CAUSE_ROWS, rows

FORMER = {"methods": "libra_tokentm,conservative_lrp,libra_full_grad,legrad"}
ROWS = (Row("former mix", "tokentm_mix", FORMER), *CAUSE_ROWS, *rows("beyond_intuition", "occlusion"))
ALL_ROWS = (*ROWS, *rows(*(name for name in METHODS if name not in {row.method for row in ROWS})))
DEIT, CIFAR = ("deit_tiny_patch16_224", sample_data("deit_tiny")), ("cifar10_distilled", None)
TEST = sample_data("cifar10", "test")
CASES = {  # the task, the data, the model and its checkpoint
    "mosaic": ("pointing", f"mosaic:2:{sample_data('photos')}", *DEIT),
    "mosaic_3": ("pointing", f"mosaic:3:{sample_data('photos')}", *DEIT),
    "cifar10": ("pointing", f"mosaic:2:{TEST}", *CIFAR),
    "trigger": (
        "pointing",
        f"trigger:label=airplane,size=4:{TEST}",
        None,
        "runs/trigger/cifar10_trigger_patch.safetensors",
    ),
    "trigger_text": ("pointing", f"trigger:label=1:{sample_data('sentences', 'dev')}", "runs/trigger_text", None),
    "trigger_audio": (
        "pointing",
        f"trigger:label=0,size=160,blend=0.05:{sample_data('recordings')}",
        None,
        "runs/trigger_audio/spoken_digits_trigger.safetensors",
    ),
    "deletion": ("deletion", TEST, None, "runs/missing/cifar10_missing.safetensors"),
    "program_copy": ("effects", "programs:copy", "programs:copy", None),
    "program_count": ("effects", "programs:count", "programs:count", None),
    "program_compare": ("effects", "programs:compare", "programs:compare", None),
}


def get_config(
    *,
    data: Literal[
        "mosaic",
        "mosaic_3",
        "cifar10",
        "trigger",
        "trigger_text",
        "trigger_audio",
        "deletion",
        "part",
        "conjunction",
        "xor",
        "count",
        "counts",
        "more",
        "position",
        "bystander",
        "program_copy",
        "program_count",
        "program_compare",
    ] = "mosaic",
    question: Literal["class", "margin"] = "class",
    methods: Literal["quick", "all"] = "quick",
) -> EvaluateConfig:
    scenes = ("effects", f"scenes:{data}:test", f"scenes_{data}", None)
    task, where, model, checkpoint = CASES.get(data, scenes)
    program = data.startswith("program_")
    options = {"parts": 16} if program else {"probability": 0.1} if task == "pointing" else {}
    return EvaluateConfig(
        name=f"causes_{data}" + ("_margin" if question == "margin" else "") + ("_all" if methods == "all" else ""),
        task=task,
        data=where,
        model=model,
        checkpoint=checkpoint,
        rows=rows(*METHODS) if program else ALL_ROWS if methods == "all" else ROWS,
        profile="reference",
        options=options,
        score=None if question == "class" else "margin",
        limit=100 if program else 400,
        names="*_[0-3].wav" if data == "trigger_audio" else None,  # not in the training
    )
