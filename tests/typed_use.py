# pyright: strict
"""A user's program, for `pyright` in strict mode: every public name has types that are known. Nobody runs it."""

from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np

import tokentm_jax as tm


def loading(path: Path) -> tm.Model:
    vit = tm.load("deit_tiny_patch16_224", path, class_names=["cat", "dog"], dtype="bfloat16")
    assert_type(vit, tm.Model)
    module: tm.models.ViT = vit.module
    assert_type(module.depth, int)
    preprocessing: tm.inputs.Preprocessing = vit.preprocessing
    assert_type(preprocessing.crop_pct, float)
    assert_type(vit.class_index("cat"), int)
    assert_type(vit.class_name(3), str)
    assert_type(vit.logits(vit.read(path)), jax.Array)
    module = tm.models.build({"depth": 2})
    assert_type(tm.models.ARCHITECTURES[next(iter(tm.models.ARCHITECTURES))][1], tm.inputs.Preprocessing)
    tm.models.init_params(module, jax.random.key(0))
    params: Any = tm.models.read_checkpoint(module, path)
    tm.models.write_checkpoint(path, module, params, vit.preprocessing)
    return vit


def network(params: Any, images: jax.Array) -> jax.Array:
    return images @ params


def explaining(vit: tm.Model, path: Path) -> jax.Array:
    images = vit.read([path])
    maps: jax.Array = tm.explain(vit, images, "tokentm", target=3, score=tm.scores.Versus(4))
    explain = tm.explain_fn(vit.module, "gae", score=tm.scores.class_logit, fused_attention=True)
    maps = explain(vit.params, images, np.array([3]))
    assert_type(tm.methods_for(vit.module, vit.params, images), list[str])
    found = tm.inspect(network, vit.params, images, grid=(8, 8))
    assert_type(found.blocks, int)
    row: tm.Method = tm.METHODS["tokentm"]
    assert_type(tm.amortised(path), tm.Method)
    assert_type(row.passes, str)
    assert_type(tm.to_pixels(maps, (32, 32)), jax.Array)
    both = tm.combine([maps, maps], "mean")
    figure = tm.show(path, vit, ["tokentm"], maps=(maps, {}))
    assert_type(figure.rows[0][0].title, str)
    figure.save(path)
    stored = tm.open_maps(path)
    assert_type(len(stored), int)
    assert_type(tm.export_maps(path, path), int)
    return both


def reading(folder: Path) -> list[list[tm.inputs.Word]]:
    text = tm.load(folder)
    assert_type(text, tm.Model)
    module: tm.models.Bert = text.module
    assert_type(module.depth, int)
    tokens: tm.inputs.Tokens = text.read(["a funny film", "it is dull"])
    assert_type(text.logits(tokens), jax.Array)
    scores: jax.Array = tm.explain(text, tokens, "tokentm", weights=tm.weights.entropy)
    found = tm.words(text, ["a funny film", "it is dull"], scores)
    assert_type(found[0][0].text, str)
    assert_type(tm.inputs.Spectrogram(sampling_rate=8000).hop, int)
    return found


def writing(path: Path) -> list[str]:
    model = tm.load(path)
    decoder: tm.models.Decoder = model.module
    assert_type(decoder.num_kv_heads, int)
    answer: tm.inputs.Tokens = tm.models.generate(model, "The capital of France is", 8, temperature=0.5, seed=1)
    written: list[str] = model.preprocessing.decode(answer)
    score = tm.scores.Token(5, 7042, against=4528)
    assert_type(score.of_next().open, bool)
    reasons: tm.Reasons = tm.explain_words(model, "The capital of France is", " Paris", "gae", against="London")
    assert_type(reasons.answer, str)
    assert_type(
        tm.explain_words(model, ["The capital of France is", "of"], " Paris", against=[7, " of"]), list[tm.Reasons]
    )
    if isinstance(decoder, tm.models.VisionDecoder):
        assert_type(decoder.image_grid, tuple[int, int])
        prompt: tm.inputs.Prompts = model.read([("scene.png", "What is there?")])
        followed: tm.inputs.Prompts = tm.models.generate(model, prompt, 4)
        seen = tm.explain_words(model, "What is there?", image="scene.png")
        return seen.pieces + model.preprocessing.decode(followed.tokens)
    return written + reasons.pieces


def mathematics(vit: tm.Model, images: jax.Array) -> tm.Trace:
    assert_type(tm.TokenTM(ffn=False).ffn, bool)
    options: Any = tm.configs.READINGS[next(iter(tm.configs.READINGS))]
    trace = tm.capture(vit.module, vit.params, images)
    fields: Any = trace
    blocks: tm.Blocks = fields
    assert_type(tm.maths.contributions(blocks, None, images), jax.Array)

    def forward(params: Any, images: jax.Array, tap: Any) -> jax.Array:
        return images

    tm.explain_fn(tm.models.PlainModel(forward, (2, 3)), "occlusion", **options)
    return trace


def runs(mesh: jax.sharding.Mesh, vit: tm.Model) -> None:
    own = tm.configs
    assert_type(tm.metrics.TASKS["srg"], tm.metrics.Task)
    rows: list[tm.Row] = [*own.PAPER_ROWS, *own.COMPONENT_ROWS, *own.CHOICE_ROWS, *own.READING_ROWS, *own.MIX_ROWS]
    rows += [*own.WEIGHT_ROWS, *own.TEXT_ROWS, *own.PIXEL_ROWS]
    rows += [*own.rows("gae"), *own.depth_rows(12), *own.sanity_rows(12, "gae")]
    for config in (tm.EvaluateConfig, tm.LeaderboardConfig):
        assert_type(config.__name__, str)
    assert_type(tm.sample_data("photos"), str)
    results: dict[str, Any] = tm.evaluate(
        tm.EvaluateConfig("mine", "srg", "photos", own.rows("gae")), vit, out="runs/mine"
    )
    results |= tm.leaderboard(tm.LeaderboardConfig("board", [], ("srg", "srg")))
    assert_type(tm.compare(["runs/mine"]), list[dict[str, Any]])
    assert_type(tm.explain_dataset(tm.Explainer(methods=["gae"]), "photos", "maps").shards, int)
    tm.models.over_devices(tm.explain_fn(vit.module))
    tm.models.over_width(vit.params, mesh)
    try:
        loading(Path("weights.safetensors"))
    except tm.InputError as error:
        assert_type(str(error), str)
    assert_type(tm.__version__, str)
