"""Functions as modules of loaded models; models that are no plain ViT; which method explains which."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHEAP, mostly_slow

import tokentm_jax as tm
from tokentm_jax.inputs.images import HALF, Preprocessing
from tokentm_jax.methods.table import METHODS
from tokentm_jax.models.vit import init_params

FIELDS = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
GRID = (2, 3)
GRADIENTS = ("input_gradient", "gradient_x_input", "smooth_grad", "integrated_gradients", "expected_gradients")
REMOVAL = ("occlusion", "rise", "shapley", "kernel_shap", "mda")


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def one_vit(params, image):
    """The forward pass of tm.models.ViT for one image [H, W, 3]."""
    (gh, gw), p, d, h = GRID, 4, 8, 2
    x = dense(image.reshape(gh, p, gw, p, 3).transpose(0, 2, 1, 3, 4).reshape(gh * gw, -1), params["patch_embed"])
    x = jnp.concatenate([params["cls_token"][0], x]) + params["pos_embed"][0]
    for i in range(2):
        block = jax.tree.map(lambda a: a[i], params["blocks"])  # noqa: B023
        qkv = dense(norm(x, block["norm1"]), block["attn"]["qkv"]).reshape(-1, 3, h, d // h)
        query, key, value = jnp.moveaxis(qkv, (1, 2), (0, 1))  # each [H, N, D/H]
        attention = jax.nn.softmax(query @ key.swapaxes(-1, -2) * (d // h) ** -0.5)
        x = x + dense((attention @ value).swapaxes(0, 1).reshape(-1, d), block["attn"]["proj"])
        hidden = jax.nn.gelu(dense(norm(x, block["norm2"]), block["mlp"]["fc1"]), approximate=False)
        x = x + dense(hidden, block["mlp"]["fc2"])
    return dense(norm(x, params["norm"])[0], params["head"])


def tapped(params, image, tap):
    """As it was written for an earlier version, which had to be shown what there is."""
    return tap("logits", one_vit(params, tap("tokens", image)))


@pytest.fixture(scope="module")
def vit():
    module = tm.models.ViT(**FIELDS)
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, tm.models.init_params(module, jax.random.key(0)))
    return module, params, jax.random.normal(jax.random.key(1), (2, 8, 12, 3))


@pytest.mark.parametrize("method", mostly_slow([m for m in METHODS if m != "token_dropping"], ["tokentm"]))
def test_the_maps_of_the_vit(vit, method):
    """Of a function of one image."""
    module, params, images = vit
    maps = []
    for model in (
        module,
        *(tm.models.PlainModel(f, GRID, 1, num_classes=3, batched=False) for f in (one_vit, tapped)),
    ):
        maps.append(jax.jit(tm.explain_fn(model, method, **CHEAP.get(method, {})))(params, images))
    scale = float(jnp.abs(maps[0]).max())
    for found in maps[1:]:
        tolerance = 2e-3 if method in ("lrp", "partial_lrp", "transformer_attribution", "res_lrp") else 2e-5
        np.testing.assert_allclose(found, maps[0], rtol=1e-4, atol=tolerance * scale)


def test_it_is_a_loaded_model(vit):
    module, params, _ = vit
    pixels = np.random.default_rng(0).random((2, 8, 12, 3)).astype(np.float32)
    preprocessing = Preprocessing((8, 12), 1.0, "bilinear", **HALF)
    plain = tm.models.PlainModel(one_vit, GRID, 1, num_classes=3, batched=False)
    loaded = [tm.Model(model, params, preprocessing, ("a", "b", "c"), "own") for model in (module, plain)]
    maps = [tm.explain(model, pixels, "gae", target=1, score=tm.scores.Versus(2)) for model in loaded]
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(loaded[1].logits(pixels), loaded[0].logits(pixels), rtol=1e-5, atol=1e-6)


def windows(params, images):
    """A small hierarchical Transformer: attention within windows of 2 x 2, then merged patches and one of all."""
    b, height, width, _ = images.shape
    x = images.reshape(b, height // 2, 2, width // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, height // 2, width // 2, 12) @ params["embed"]
    for kernel in params["mix"]:
        gh, gw = x.shape[1] // 2, x.shape[2] // 2
        inside = x.reshape(b, gh, 2, gw, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, gh * gw, 4, -1)
        attention = jax.nn.softmax(inside @ inside.swapaxes(-1, -2))
        x = (inside + attention @ inside @ kernel).reshape(b, gh, gw, -1) @ params["merge"]
    return x.mean((1, 2)) @ params["head"]


def convolutions(params, images):
    for kernel in params["conv"]:
        images = jax.nn.relu(jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT))
    return images.mean((1, 2)) @ params["head"]


LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.slow
@pytest.mark.parametrize("forward", [windows, convolutions])
def test_models_without_one_attention_per_block(forward):
    """Gradients and removal work, against loops; the others say in a sentence what is missing and what works."""
    rng = np.random.default_rng(0)
    shapes = {
        windows: {"embed": (12, 8), "mix": (2, 8, 8), "merge": (32, 8), "head": (8, 3)},
        convolutions: {"conv": (2, 3, 3, 3, 3), "head": (3, 3)},
    }[forward]
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) * 0.4 for name, shape in shapes.items()}
    images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
    model = tm.models.PlainModel(forward, (4, 4), num_classes=3)
    works = tm.methods_for(model, params, images)
    assert works == ["lrp", *GRADIENTS, *REMOVAL]

    logits = jax.jit(lambda images: forward(params, images))
    whole = logits(images)
    target = whole.argmax(-1)
    program = jax.jit(lambda p, x: [tm.explain_fn(model, name)(p, x) for name in ("occlusion", "gradient_x_input")])
    occlusion, gradient = program(params, images)
    for j in range(16):
        y, x = 4 * (j // 4), 4 * (j % 4)
        left = logits(images.at[:, y : y + 4, x : x + 4].set(0))
        lost = (whole - left)[jnp.arange(2), target]
        np.testing.assert_allclose(occlusion[:, j // 4, j % 4], lost, rtol=1e-3, atol=1e-5)
    step = 1e-2 * images
    slope = (logits(images + step) - logits(images - step))[jnp.arange(2), target] / 2e-2
    np.testing.assert_allclose(gradient.sum((1, 2)), slope, rtol=2e-2, atol=1e-3)

    with pytest.raises(tm.InputError) as raised:
        tm.explain_fn(model, "rollout")(params, images)
    assert "attention" in str(raised.value) and f"; what works without is {', '.join(works)}" in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tm.models.PlainModel(one_vit, GRID, 1, "mean"),
            "readout must be 'token', 'avg' or a share for each token",
        ),
        (
            lambda: tm.models.PlainModel(one_vit, GRID, 1, (1, 0)),
            "readout must have a share for each of 1 + 6 tokens, got 2",
        ),
        (
            lambda: tm.models.PlainModel(lambda p, x: {"logits": x.sum((1, 2))}, GRID),
            "a class is explained by its logit, of logits [B, classes]; outputs [[2, 3]] need a `score`",
        ),
    ],
)
def test_refused(vit, make, message):
    with pytest.raises(tm.InputError) as raised:
        tm.explain_fn(make(), "gradient_x_input")(vit[1], vit[2])
    assert message in str(raised.value)


def test_outputs_may_be_any_pytree(vit):
    _, params, images = vit
    forward = lambda p, x: {"logits": one_logits(p, x), "mean": x.mean((1, 2, 3))}  # noqa: E731
    one_logits = jax.vmap(lambda p, x: one_vit(p, x), (None, 0))
    score = lambda outputs: outputs["logits"][:, 1] * outputs["mean"]  # noqa: E731
    explain = tm.explain_fn(tm.models.PlainModel(forward, GRID, 1), "occlusion", score=score, details=True)
    maps, details = jax.jit(explain)(params, images)
    assert maps.shape == (2, *GRID) and jnp.isfinite(maps).all()
    np.testing.assert_allclose(details["score"], details["logits"]["logits"][:, 1] * images.mean((1, 2, 3)), rtol=1e-4)


# ---- which method explains which model ------------------------------------------------------------------------------


class OwnPass(tm.models.ViT):
    """A subclass with a forward pass of its own, which sows what the parent sows."""

    def __call__(self, images):
        return super().__call__(images)


def linear(params, images):
    return images.reshape(len(images), -1)[:, :8] @ params["head"]["kernel"]


MODELS = {  # heading of the column -> a model with the parameters of tm.models.ViT
    "`tm.models.ViT`": lambda: tm.models.ViT(**FIELDS),
    "own forward pass": lambda: OwnPass(**FIELDS),
    "function": lambda: lambda p, x: jax.vmap(one_vit, (None, 0))(p, x),
    "function, no attention": lambda: tm.models.PlainModel(
        lambda p, x: x.reshape(len(x), -1)[:, :8] @ p["head"]["kernel"], GRID
    ),
}
PAGE = Path(__file__).resolve().parent.parent / "docs/reference/models.md"


@pytest.mark.slow
def test_the_page_says_which_method_explains_which_model(vit):
    _, params, images = vit
    works = {heading: tm.methods_for(make(), params, images) for heading, make in MODELS.items()}
    bert = tm.models.Bert(8, 4, 8, 1, 2, 8)
    tokens = tm.inputs.Tokens(*(np.full((1, 4), value) for value in (np.int32(1), True, np.int32(0), False)))
    works["`tm.models.Bert`"] = tm.methods_for(bert, init_params(bert, jax.random.key(0)), tokens)
    lines = [f"| method | {' | '.join(works)} |", f"|---|{'---|' * len(works)}"]
    lines += [f"| `{m}` | {' | '.join('yes' if m in found else '-' for found in works.values())} |" for m in METHODS]
    table = "\n".join(lines)
    assert table in PAGE.read_text(), f"the table of {PAGE} must be\n{table}"
