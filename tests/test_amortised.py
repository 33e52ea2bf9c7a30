"""Amortised explainers: the method, and the training that makes one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import batch, tiny_bert, tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax.methods.amortised import SHAPES, Amortised, features
from tokentm_jax.methods.table import Method
from tokentm_jax.models.architectures import build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.loading import Model
from tokentm_jax.models.vit import init_params
from tokentm_jax.programs.model import function_of

SIZES = {"F": 16 * 2 + 2 * 2 + 16, "K": 3, "n": 6, "C": 5}  # of `tiny_vit(2)`


def random_weights(sizes=SIZES):
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=[sizes[axis] for axis in axes.split()]).astype(np.float32) / 10
        for name, axes in SHAPES.items()
    }


def test_an_explainer_owes_what_every_method_does(tmp_path):
    vit, weights = tiny_vit(2), random_weights()
    path = tmp_path / "explainer.safetensors"
    path.write_bytes(safetensors.numpy.save(weights))
    method = tm.amortised(path)
    explain = jax.jit(tm.explain_fn(vit.module, method, details=True))
    images = np.random.default_rng(1).normal(size=(3, 16, 24, 3)).astype(np.float32)
    target = np.array([0, 3, 4], np.int32)
    maps, details = explain(vit.params, images, target)
    assert maps.shape == (3, 2, 3) and maps.dtype == jnp.float32 and len(np.unique(maps)) > 12
    gain = details["score"] - weights["empty"][target]
    np.testing.assert_allclose(maps.sum((1, 2)), gain, rtol=1e-4, atol=1e-5)  # efficiency
    others = np.stack([-images[1], images[1], images[0]])  # other companions, another class, and one that is not
    again, _ = explain(vit.params, others, np.array([1, 3, 7], np.int32))
    np.testing.assert_allclose(again[1], maps[1], rtol=1e-4, atol=1e-6)
    assert np.isnan(again[2]).all()
    same, _ = explain(vit.params, images[[0, 1, 0]], np.array([1, 3, 0], np.int32))
    assert np.abs(same[0] - maps[0]).max() > 1e-3
    np.testing.assert_allclose(same[2], maps[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(tm.InputError, match="leave out the score"):
        jax.eval_shape(tm.explain_fn(vit.module, method, score=tm.scores.Versus(1)), vit.params, images, target)
    with pytest.raises(tm.InputError, match="another model: its 'places' is"):
        wrong = Method(Amortised({**weights, "places": weights["places"][1:]}))
        jax.eval_shape(tm.explain_fn(vit.module, wrong), vit.params, images, target)


def test_what_is_not_an_explainer_is_refused(tmp_path):
    path, weights = tmp_path / "explainer.safetensors", random_weights()
    for wrong in ({"hidden": weights["hidden"]}, {**weights, "bias": weights["hidden"]}):
        path.write_bytes(safetensors.numpy.save(wrong))
        with pytest.raises(tm.InputError, match="is not an explainer"):
            tm.amortised(path)


@pytest.mark.slow
def test_texts_are_refused():
    module, params = tiny_bert()
    texts = batch([5], 8).look_up(module, params)
    with pytest.raises(tm.InputError, match="is for images"):
        features(function_of(module).read(params, texts), params, texts)


def linear_vit():
    """Blocks that add nothing, and the mean of the tokens: the logits are linear in the image."""
    size = {"img_size": [16, 24], "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    pool = {"class_token": False, "global_pool": "avg", "fc_norm": False, "final_norm": False}
    module = build({**size, **pool})
    params = init_params(module, jax.random.key(0))
    blocks = jax.tree.map(lambda a: a, params["blocks"])
    for part, last in (("attn", "proj"), ("mlp", "fc2")):
        blocks[part][last] = jax.tree.map(jnp.zeros_like, blocks[part][last])
    params = {**params, "blocks": blocks, "head": jax.tree.map(lambda a: 30 * a + 0.1, params["head"])}
    return Model(module, params, tiny_vit(1).preprocessing, ("a", "b", "c"), "linear")


@pytest.mark.slow
def test_the_values_of_a_linear_model_have_a_closed_form():
    """Each patch adds its share of the head's product with its token; the explainer with these weights is exact."""
    vit = linear_vit()
    kernel, n = np.asarray(vit.params["head"]["kernel"]), 6
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    blank = np.zeros_like(images[:1])
    read, _ = features(function_of(vit.module).read(vit.params, blank), vit.params, blank)
    direct = np.zeros((read.shape[-1], 3), np.float32)
    direct[16:32] = kernel / n  # of the tokens at the end
    weights = {
        **random_weights({**SIZES, "F": read.shape[-1], "C": 3}),
        "direct": direct,
        "out": np.zeros((3, 3), np.float32),
        "places": -np.asarray(read[0]) @ direct,
        "empty": np.asarray(vit.module.apply({"params": vit.params}, blank))[0],
    }
    target = np.array([0, 2], np.int32)
    found = tm.explain_fn(vit.module, Method(Amortised(weights)))(vit.params, images, target)
    exact = tm.explain_fn(vit.module, "kernel_shap", pairs=31)(vit.params, images, target)
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(found, exact, atol=1e-4)


@pytest.mark.slow
def test_an_explainer_of_a_linear_model_learns_its_exact_values(tmp_path):
    """It is stopped once, and goes on; what it writes is a method that agrees with exact values."""
    from models.training.amortise import train_explainer
    from models.training.data import Data
    from models.training.recipe import AmortiseConfig

    vit = linear_vit()
    path = write_checkpoint(
        tmp_path / "linear.safetensors", vit.module, vit.params, vit.preprocessing, ("a", "b", "c")
    )
    random = np.random.default_rng(0)
    data, test = (
        Data(random.integers(0, 256, (n, 16, 24, 3), np.uint8), np.zeros(n, np.int32), ()) for n in (200, 20)
    )
    config = AmortiseConfig("toy", "train", "test", checkpoint=str(path), hidden=4, epochs=100, weight_decay=0.0)
    lines = []

    def stop(line):
        lines.append(line)
        if line.startswith("epoch 10"):
            raise KeyboardInterrupt

    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(KeyboardInterrupt):
            train_explainer(config, data, test, tmp_path / "run", stop)
        assert sum(line.startswith("Shapley values: 200 of 200") for line in lines) == 1
        lines.clear()
        assert train_explainer(config, data, test, tmp_path / "run", lines.append) > 0.99
    assert lines[0].startswith("resumed at step") and not any(line.startswith("Shapley") for line in lines)
    loaded = tm.load(checkpoint=path)
    images = test.images[:5].astype(np.float32) / 255
    found = tm.explain(loaded, images, tm.amortised(tmp_path / "run/toy.safetensors"), 1)
    exact = tm.explain(loaded, images, "kernel_shap", 1, pairs=31)
    assert np.corrcoef(np.ravel(found), np.ravel(exact))[0, 1] > 0.99
    other = dataclasses.replace(config, pairs=3)
    with pytest.raises(tm.InputError, match="was made with pairs 2"), jax.numpy_dtype_promotion("standard"):
        train_explainer(other, data, test, tmp_path / "run", lines.append)


@pytest.mark.slow
def test_a_recipe_of_an_explainer_is_run(tmp_path):
    from click.testing import CliRunner

    from models.training.__main__ import train

    vit = tiny_vit(1)
    path = write_checkpoint(tmp_path / "tiny.safetensors", vit.module, vit.params, vit.preprocessing)
    (tmp_path / "photos/a").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (24, 16), (60 * number, 9, 99)).save(tmp_path / f"photos/a/{number}.png")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from models.training.recipe import AmortiseConfig\n"
        f"config = AmortiseConfig('tiny', {str(tmp_path / 'photos')!r}, {str(tmp_path / 'photos')!r},\n"
        f"    checkpoint={str(path)!r}, epochs=2, batch_size=2, checkpoint_epochs=1)\n"
    )
    with jax.numpy_dtype_promotion("standard"):
        done = CliRunner().invoke(train, [str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0 and "correlation with held-out samples" in done.output, done.output
    method = tm.amortised(tmp_path / "run/tiny.safetensors")
    assert tm.explain(vit, np.zeros((1, 16, 24, 3), np.float32), method, 2).shape == (1, 2, 3)
