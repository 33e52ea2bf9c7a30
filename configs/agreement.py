"""Which metrics rank the methods as known causes do? Metrics of removal and known causes of one model, in one folder.

    tokentm leaderboard configs/agreement.py                 rendered scenes, rule xor; also part, more, count,
                                                             counts, conjunction, position, bystander
    tokentm leaderboard configs/agreement.py:data=cifar10    mosaics of CIFAR-10, the shipped model
    tokentm leaderboard configs/agreement.py:data=photos     mosaics of photos, DeiT-tiny
    python tests/benchmark/agreement.py runs/agreement_*     Kendall's tau of every metric with every cause

Removal is measured with several fills. Predictions for changed images are in mixed precision.
Data: scenes are rendered; `tokentm data fetch cifar10` or `photos deit_tiny`.
Run time: 5 to 10 minutes on 2 cores for 64 to 100 scenes (--limit); cifar10 about 2 hours on 2 busy cores; photos was
not run.
"""

from typing import Any, Literal

from tokentm_jax import EvaluateConfig, LeaderboardConfig, sample_data
from tokentm_jax.configs import CAUSE_ROWS, rows

ROWS = (*CAUSE_ROWS, *rows("raw_attention"))
IMAGES = {"cifar10": 100, "photos": 32}  # of the metrics of removal; 300 scenes
CELLS = {"cifar10": 600, "photos": 160}


def get_config(
    *,
    data: Literal[
        "part", "xor", "more", "count", "counts", "conjunction", "position", "bystander", "cifar10", "photos"
    ] = "xor",
) -> LeaderboardConfig:
    if data in ("cifar10", "photos"):
        where = sample_data(*(("cifar10", "test") if data == "cifar10" else ("photos",)))
        small = {"model": "cifar10_distilled", "checkpoint": None}
        large = {"model": "deit_tiny_patch16_224", "checkpoint": sample_data("deit_tiny"), "batch_size": 8}
        model: dict[str, Any] = small if data == "cifar10" else large
        mosaics = ("mosaic_2", 2), ("mosaic_3", 3)
        causes = [(name, "pointing", f"mosaic:{k}:{where}", {"probability": 0.1}) for name, k in mosaics]
    else:
        where, model = f"scenes:{data}:test", {"model": f"scenes_{data}"}
        causes = [("effects", "effects", where, {})]
    images = IMAGES.get(data, 300)
    given: dict[str, Any] = {**model, "rows": ROWS, "profile": "reference", "mixed_precision": True}

    def run(name: str, task: str, **changes: Any) -> EvaluateConfig:
        return EvaluateConfig(**{"name": name, "task": task, "data": where, "limit": images, **given, **changes})

    runs = [
        *(run(name, task, data=d, options=o, limit=CELLS.get(data, images)) for name, task, d, o in causes),
        run("perturbation_black", "perturbation"),
        *(run(f"srg_{fill}", "srg", options={"fill": fill}) for fill in ("mean", "black", "blur")),
        *(run(f"insertion_{fill}", "insertion", options={"fill": fill}) for fill in ("black", "blur")),
        run("road", "road"),
        run("saco", "saco"),
        run("infidelity", "infidelity"),
    ]
    return LeaderboardConfig(f"agreement_{data}", runs, ("perturbation_black", "aopc"))
