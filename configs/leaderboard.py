"""All methods with all metrics in one table, with their cost, and a picture of faithfulness against cost.

    tokentm leaderboard configs/leaderboard.py                        500 photos and 33 masks, DeiT-tiny
    tokentm leaderboard configs/leaderboard.py:data=cifar10           1000 test images, the shipped model
    tokentm leaderboard configs/leaderboard.py:data=cifar10_112       the same, DeiT-tiny fine-tuned at 112 pixels
    tokentm leaderboard configs/leaderboard.py:methods=fast           without methods of a pass for each patch
    tokentm leaderboard configs/leaderboard.py:precision=mixed        predictions for changed images in mixed precision

Pixel maps are measured as their means by patch (docs/explanation/metrics.md explains why). Perturbation uses all
images, most metrics 200 of them, ROAD 50 of the photos, and metrics that explain an image many times 50.
Max-sensitivity and the randomisation of parameters are only for the fast methods.
Data: `tokentm data fetch photos masks deit_tiny`, or cifar10. The weights of cifar10_112 are custom ones:
runs/finetune_112, fine-tuned by models/training/recipes/cifar10_finetune_112.py, or --checkpoint FILE.
Run time: with methods=fast and precision=mixed on 2 cores, 50 minutes for cifar10, 90 for cifar10_112 and five hours
for the photos. Methods of a pass for each patch, or more, take 7 s for an image of cifar10 and over a minute for a
photo: use --limit and --batch-size 4.
"""

from dataclasses import replace
from typing import Any, Literal

from tokentm_jax import METHODS, EvaluateConfig, LeaderboardConfig, Row, sample_data
from tokentm_jax.configs import PAPER_ROWS, PIXEL_ROWS

SLOW = ("occlusion", "token_dropping", "rise", "shapley", "kernel_shap", "mda", "caap")
PUBLISHED = {row.name: row for row in PAPER_ROWS}  # first blocks omitted, as in the published evaluation
BY_PATCH = {row.method: row for row in PIXEL_ROWS if row.by_patch}
ALL = tuple(BY_PATCH.get(name) or PUBLISHED.get(name) or Row(name, name) for name in METHODS)
FAST = tuple(row for row in ALL if row.method not in SLOW)
DATA: dict[str, dict[str, Any]] = {
    "photos": {
        "data": sample_data("photos"),
        "model": "deit_tiny_patch16_224",
        "checkpoint": sample_data("deit_tiny"),
        "batch_size": 16,
    },
    "cifar10": {"data": sample_data("cifar10", "test"), "model": "cifar10_distilled", "batch_size": 50},
    "cifar10_112": {
        "data": sample_data("cifar10", "test"),
        "checkpoint": "runs/finetune_112/deit_tiny_cifar10_112.safetensors",
        "batch_size": 50,
    },
}
IMAGES = {"photos": None, "cifar10": 1000, "cifar10_112": 1000}
DEPTH = {"photos": 12, "cifar10": 7, "cifar10_112": 12}
SQUARE = {"photos": 32, "cifar10": 4, "cifar10_112": 16}  # 49 or 64 players of the Shapley values
SOME, FEW = 200, 50
IMPUTED = {"photos": FEW, "cifar10": SOME, "cifar10_112": SOME}  # a large image takes longer to fill than to classify


def get_config(
    *,
    data: Literal["photos", "cifar10", "cifar10_112"] = "photos",
    methods: Literal["all", "fast"] = "all",
    precision: Literal["float32", "mixed"] = "float32",
) -> LeaderboardConfig:
    rows = ALL if methods == "all" else FAST
    given = {**DATA[data], "mixed_precision": precision == "mixed"}

    def run(task: str, limit: int | None, own: tuple[Row, ...] = rows, **changes: Any) -> EvaluateConfig:
        return EvaluateConfig(**{**given, "name": task, "task": task, "rows": own, "limit": limit, **changes})

    randomised = tuple(replace(row, random_blocks=DEPTH[data]) for row in FAST)
    shapley: dict[str, Any] = {"patch": SQUARE[data], "value": "probability", "pairs": 16}
    if methods == "all" and data != "photos":
        shapley["seed"] = 1  # the row `shapley` has the same patches: its reference must have other orders
    runs = [
        run("perturbation", IMAGES[data]),
        run("srg", SOME),
        run("insertion", SOME, options={"fill": "blur"}),
        run("road", IMPUTED[data]),
        run("saco", SOME),
        run("infidelity", SOME),
        run("shapley", FEW, options=shapley),
        run("sensitivity", FEW, FAST),
        run("sanity", FEW, randomised),
        run("complexity", SOME),
    ]
    if data == "photos":
        masks = sample_data("masks")
        runs.append(run("segmentation", None, data=masks, profile="reference"))
    suffix = ("" if methods == "all" else f"_{methods}") + ("_mixed" if precision == "mixed" else "")
    return LeaderboardConfig(f"leaderboard_{data}{suffix}", runs, ("perturbation", "aopc"))
