"""A small vision-language model of questions about rendered scenes: the recipe of models/scenes_words.

    python -m models.training models/training/recipes/scenes_words.py --out runs/scenes_words

A ViT and a decoder from nothing, as one Gemma 3 of 0.3 million parameters.

Data: rendered, and never stored.
Run time: 20 minutes of processor time.
"""

from models.training.recipe import QuestionTrainConfig

config = QuestionTrainConfig(
    name="scenes_words",
    vision={"img_size": (64, 64), "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
    text={
        **{"embed_dim": 64, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_hidden": 128},
        "max_length": 128,
    },
    scenes=16_000,
    test_scenes=400,
    tower_epochs=5.0,
    epochs=12.0,
    warmup_epochs=0.2,
    batch_size=16,
    questions=4,
    checkpoint_epochs=0.5,
)
