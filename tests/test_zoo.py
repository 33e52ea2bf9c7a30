"""Models of other libraries, unedited; those that are not installed are skipped (`pip install --group zoo`)."""

import itertools
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokentm_jax as tm

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
METHODS = ("tokentm", "attn_lrp", "libra_full_grad", "legrad", "lrp", "rollout", "tokentm_mix")


def images(height, width):
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


def check(function, params, inputs, blocks, heads, tokens, grid, prefix, read):
    """What is found, and maps that conserve: LibraGrad's FullGrad+ sums to the logit."""
    found = tm.inspect(function, params, inputs)
    assert (found.blocks, found.heads, found.tokens, found.grid, found.prefix) == (blocks, heads, tokens, grid, prefix)
    np.testing.assert_allclose(found.readout, read, atol=1e-6)
    assert set(METHODS) <= set(found.methods)
    for method in METHODS:
        explain = jax.jit(tm.explain_fn(function, method, details=True))
        maps, details = explain(params, inputs)
        assert np.isfinite(maps).all() and maps.min() < maps.max()
        np.testing.assert_allclose(details["logits"], function(params, inputs), rtol=1e-4, atol=1e-5)
        if method == "libra_full_grad":
            np.testing.assert_allclose(details["completeness_gap"], 0, atol=1e-5)


def test_flax_nnx_has_the_maps_of_the_same_weights_in_tm_vit():
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = (
                nnx.LayerNorm(16, epsilon=1e-6, use_fast_variance=False, rngs=rngs) for _ in "12"
            )
            self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Conv(3, 16, (8, 8), (8, 8), rngs=rngs)
            self.token = nnx.Param(jax.random.normal(rngs(), (1, 1, 16)))
            self.positions = nnx.Param(jax.random.normal(rngs(), (1, 7, 16)))
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.norm = nnx.LayerNorm(16, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
            self.head = nnx.Linear(16, 5, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x).reshape(len(x), 6, 16)
            token = jnp.broadcast_to(self.token[...], (len(x), 1, 16))
            x = jnp.concatenate([token, x], 1) + self.positions[...]
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    network = Network(nnx.Rngs(0))
    graph, state = nnx.split(network)
    state = jax.tree.map(lambda a: a * 2 if a.ndim > 1 else a + 0.1, state)
    network = nnx.merge(graph, state)
    function = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    inputs = images(16, 24)
    check(function, state, inputs, 2, 2, 7, (2, 3), 1, [1.0] + [0.0] * 6)

    pair = lambda layer: {"kernel": layer.kernel[...].reshape(-1, layer.kernel.shape[-1]), "bias": layer.bias[...]}  # noqa: E731
    norm = lambda layer: {"scale": layer.scale[...], "bias": layer.bias[...]}  # noqa: E731

    def weights(block):
        parts = [getattr(block.attention, name) for name in ("query", "key", "value")]
        qkv = {
            "kernel": jnp.concatenate([part.kernel[...].reshape(16, 16) for part in parts], 1),
            "bias": jnp.concatenate([part.bias[...].reshape(16) for part in parts]),
        }
        out = {"kernel": block.attention.out.kernel[...].reshape(16, 16), "bias": block.attention.out.bias[...]}
        return {
            "norm1": norm(block.norm1),
            "norm2": norm(block.norm2),
            "attn": {"qkv": qkv, "proj": out},
            "mlp": {"fc1": pair(block.up), "fc2": pair(block.down)},
        }

    module = tm.models.ViT(img_size=(16, 24), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    params = {
        "patch_embed": pair(network.embed),
        "cls_token": network.token[...],
        "pos_embed": network.positions[...],
        "blocks": jax.tree.map(lambda *a: jnp.stack(a), *map(weights, network.blocks)),
        "norm": norm(network.norm),
        "head": pair(network.head),
    }
    np.testing.assert_allclose(module.apply({"params": params}, inputs), function(state, inputs), rtol=1e-4, atol=1e-5)
    for method in METHODS:
        mine, known = (jax.jit(tm.explain_fn(f, method))(p, inputs) for f, p in ((function, state), (module, params)))
        tolerance = 1e-3 if method == "lrp" else 2e-5
        np.testing.assert_allclose(mine, known, rtol=0, atol=tolerance * float(jnp.abs(known).max()))


def test_flax_linen():
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (8, 8), (8, 8))(x).reshape(len(x), 6, 16)
            x = x + self.param("positions", nn.initializers.normal(0.5), (1, 6, 16))
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(2, deterministic=True)(nn.LayerNorm()(x))
                x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
            return nn.Dense(5)(nn.LayerNorm()(x).mean(1))

    module, inputs = Network(), images(16, 24)
    variables = module.init(jax.random.key(0), inputs)
    check(lambda v, x: module.apply(v, x), variables, inputs, 2, 2, 6, (2, 3), 0, [1 / 6] * 6)


def test_jax_nn_dot_product_attention_in_a_scan():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    w = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)  # noqa: E731
    params = {
        "embed": w(192, 16),
        "blocks": {"qkv": w(2, 16, 48), "out": w(2, 16, 16), "up": w(2, 16, 64), "down": w(2, 64, 16)},
    }
    params["head"] = w(16, 5)

    def rms(x):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def block(x, p):
        query, key, value = jnp.moveaxis((rms(x) @ p["qkv"]).reshape(*x.shape[:2], 3, 2, 8), 2, 0)
        x = x + jax.nn.dot_product_attention(query, key, value).reshape(x.shape) @ p["out"]
        return x + jax.nn.silu(rms(x) @ p["up"]) @ p["down"], None

    def function(params, x):
        x = x.reshape(len(x), 2, 8, 3, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 6, 192) @ params["embed"]
        return rms(jax.lax.scan(block, x, params["blocks"])[0]).mean(1) @ params["head"]

    check(function, params, images(16, 24), 2, 2, 6, (2, 3), 0, [1 / 6] * 6)


def test_keras():
    keras = pytest.importorskip("keras")
    layers = keras.layers
    inputs = keras.Input((16, 24, 3))
    x = layers.Reshape((6, 16))(layers.Conv2D(16, 8, 8)(inputs))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 8)(y, y)])
        x = layers.Add()([x, layers.Dense(16)(layers.Dense(64, activation="gelu")(layers.LayerNormalization()(x)))])
    outputs = layers.Dense(5)(layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x)))
    model = keras.Model(inputs, outputs)
    params = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]
    function = lambda params, x: model.stateless_call(params, fixed, x, training=False)[0]  # noqa: E731
    check(function, params, images(16, 24), 2, 2, 6, (2, 3), 0, [1 / 6] * 6)


def test_equimo():
    pytest.importorskip("equimo.models")
    import equinox as eqx
    from equimo.models import VisionTransformer

    shape = {"img_size": 16, "in_channels": 3, "dim": 16, "patch_size": 8, "num_heads": [2], "depths": [2]}
    model = VisionTransformer(**shape, num_classes=5, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_array)

    def function(arrays, x):
        network = eqx.tree_inference(eqx.combine(arrays, rest), True)
        return jax.vmap(lambda image: network(image.transpose(2, 0, 1), key=jax.random.key(0)))(x)

    check(function, arrays, images(16, 16), 2, 2, 9, (2, 2), 5, [0.0] * 5 + [0.25] * 4)


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_jimm(axes):
    jimm = pytest.importorskip("jimm")
    from flax import nnx
    from jax.sharding import AxisType

    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(getattr(AxisType, axes),) * 3)
    with jax.set_mesh(mesh):
        shape = {"img_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 32, "hidden_size": 16}
        model = jimm.VisionTransformer(num_classes=5, **shape, rngs=nnx.Rngs(0))
        model.eval()
        graph, state = nnx.split(model)
        function = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
        check(function, state, jnp.asarray(images(16, 16)), 2, 2, 5, (2, 2), 1, [1.0] + [0.0] * 4)


# ---- no attention over all tokens --------------------------------------------------------------------------------


def some_weights(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return lambda *shape: 0.3 * jax.random.normal(next(keys), shape)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def swin(window=4, heads=2, dims=(8, 16)):
    """A Swin Transformer without biases: shifted windows, relative positions, patches merged between the stages."""
    w = some_weights(0)
    per_stage = lambda d: {"qkv": w(d, 3 * d), "out": w(d, d), "up": w(d, 2 * d), "down": w(2 * d, d)}  # noqa: E731
    relative = lambda: {"relative": w(heads, window**2, window**2)}  # noqa: E731
    params = {
        "embed": w(12, dims[0]),
        "stages": [[per_stage(d) | relative() for _ in range(2 - i)] for i, d in enumerate(dims)],
        "merge": [w(4 * a, b) for a, b in itertools.pairwise(dims)],
        "head": w(dims[-1], 5),
    }

    def windows(x):
        b, h, v, d = x.shape
        x = x.reshape(b, h // window, window, v // window, window, d).swapaxes(2, 3)
        return x.reshape(-1, window**2, d)

    def attend(x, p, shift):
        b, h, v, d = x.shape
        x = windows(jnp.roll(norm(x), (-shift, -shift), (1, 2)))
        query, key, value = jnp.moveaxis((x @ p["qkv"]).reshape(-1, window**2, 3, heads, d // heads), (2, 3), (0, 2))
        scores = query @ key.swapaxes(-1, -2) + p["relative"]
        if shift:  # tokens that were not neighbours before
            places = [jnp.arange(n)[:, None] for n in (h, v)]
            zones = [(at >= jnp.array([len(at) - window, len(at) - shift])).sum(1) for at in places]
            zone = windows(jnp.broadcast_to((3 * zones[0][:, None] + zones[1])[:, :, None], (b, h, v, 1)))
            scores = scores + jnp.where(zone == zone.swapaxes(1, 2), 0.0, -100.0)[:, None]
        x = (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(-1, window**2, d) @ p["out"]
        x = x.reshape(b, h // window, v // window, window, window, d).swapaxes(2, 3).reshape(b, h, v, d)
        return jnp.roll(x, (shift, shift), (1, 2))

    def function(params, x):
        b, h, v, _ = x.shape
        x = x.reshape(b, h // 2, 2, v // 2, 2, 3).swapaxes(2, 3).reshape(b, h // 2, v // 2, 12) @ params["embed"]
        for i, stage in enumerate(params["stages"]):
            if i:
                merged = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
                x = norm(jnp.concatenate(merged, -1)) @ params["merge"][i - 1]
            for k, p in enumerate(stage):
                x = x + attend(x, p, k * window // 2 if x.shape[1] > window else 0)
                x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
        return norm(x).mean((1, 2)) @ params["head"]

    return function, params


def convnext(dims=(8, 16)):
    """A ConvNeXt without biases: depthwise convolutions, layer scale."""
    w = some_weights(0)
    stage = lambda d: {"depthwise": w(7, 7, 1, d), "up": w(d, 4 * d), "down": w(4 * d, d), "scale": w(d)}  # noqa: E731
    params = {
        "stem": w(4, 4, 3, dims[0]),
        "stages": [stage(d) for d in dims],
        "merge": [w(2, 2, a, b) for a, b in itertools.pairwise(dims)],
        "head": w(dims[-1], 5),
    }

    def convolve(x, kernel, stride=1, padding="VALID"):
        groups, numbers = x.shape[-1] // kernel.shape[2], ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
        )

    def function(params, x):
        for i, p in enumerate(params["stages"]):
            x = convolve(norm(x), params["merge"][i - 1], 2) if i else norm(convolve(x, params["stem"], 4))
            y = norm(convolve(x, p["depthwise"], padding="SAME")) @ p["up"]
            x = x + p["scale"] * (jax.nn.gelu(y) @ p["down"])
        return norm(x.mean((1, 2))) @ params["head"]

    return function, params


def check_without_attention(function, params, inputs, message, conserved):
    """The methods that need nothing of attention are right, and the others are refused with the reason."""
    found = tm.inspect(function, params, inputs)
    assert found.blocks == 0 and any(message in line for line in found.unknown)
    works = ("lrp", "input_gradient", "gradient_x_input", "smooth_grad", "integrated_gradients", "expected_gradients")
    assert found.methods == works
    text = str(found)
    assert "none" in text.splitlines()[0] and message in text and "occlusion" in text and "give it" not in text
    for method in ("tokentm", "rollout", "attn_lrp", "libra_full_grad", "legrad"):
        with pytest.raises(tm.InputError, match="what works without is " + ", ".join(works)) as error:
            tm.explain_fn(function, method)(params, inputs)
        assert message in str(error.value) or "no map of tokens" in str(error.value)

    tolerance = 1e-6 if inputs.dtype == jnp.float64 else 1e-3
    target = jnp.array([1, 3])
    score = lambda x: jnp.take_along_axis(function(params, x), target[:, None], 1)[:, 0]  # noqa: E731
    slope = jax.jit(jax.grad(lambda x: score(x).sum()))
    explain = lambda method, **options: jax.jit(tm.explain_fn(function, method, **options))(params, inputs, target)  # noqa: E731

    def equal(found, expected):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(jnp.abs(expected).max()))

    equal(explain("input_gradient"), jnp.abs(slope(inputs)).max(-1))
    equal(explain("gradient_x_input"), (slope(inputs) * inputs).sum(-1))
    if conserved:
        equal(explain("gradient_x_input", rules="libra").sum((1, 2)), score(inputs))
    shares = (np.arange(4) + 0.5) / 4
    path = sum(slope(1 + share * (inputs - 1)) for share in shares) / 4
    equal(explain("integrated_gradients", steps=4, baseline=1.0), ((inputs - 1) * path).sum(-1))
    assert np.isfinite(explain("smooth_grad", samples=2)).all()
    side = inputs.shape[1] // 2
    removed = [inputs.at[:, y : y + side, x : x + side].set(0) for y in (0, side) for x in (0, side)]
    drops = jnp.stack([score(inputs) - score(x) for x in removed], 1).reshape(-1, 2, 2)
    equal(explain("occlusion", patch=side), drops)
    equal(explain("shapley", patch=side, pairs=2).sum((1, 2)), score(inputs) - score(jnp.zeros_like(inputs)))


WINDOWS = "this attention is over windows of 16 of the 64 tokens"


@pytest.mark.parametrize(("model", "message"), [(swin, WINDOWS), (convnext, "no attention was found")])
def test_networks_without_attention_over_all_tokens(model, message):
    with jax.enable_x64(True):
        function, params = model()
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        check_without_attention(function, params, jnp.asarray(images(16, 16), jnp.float64), message, True)


def test_a_pyramid_of_attention_over_all_tokens():
    """Tokens are merged between the stages: no single stream goes through all attentions."""
    params = swin(window=8, dims=(8, 8))[1]

    def two_stages(params, x):
        x = x.reshape(len(x), 8, 2, 8, 2, 3).swapaxes(2, 3).reshape(len(x), 64, 12) @ params["embed"]
        for i, stage in enumerate(params["stages"]):
            x = x.reshape(len(x), 16, 32) @ params["merge"][0] if i else x
            for p in stage:
                query, key, value = jnp.split(norm(x) @ p["qkv"], 3, -1)
                x = x + jax.nn.softmax(query @ key.swapaxes(1, 2)) @ value @ p["out"]
        return x.mean(1) @ params["head"]

    with pytest.raises(tm.InputError, match=r"the tokens change from \[64, 8\] to \[16, 8\] between two attentions"):
        tm.explain_fn(two_stages, "tokentm")(params, images(16, 16))


def test_equimo_convnext():
    pytest.importorskip("equimo.models")
    import equinox as eqx
    from equimo.models import ConvNeXt

    model = ConvNeXt(3, depths=[1, 1], dims=[8, 16], num_classes=5, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_array)

    def function(arrays, x):
        network = eqx.tree_inference(eqx.combine(arrays, rest), True)
        return jax.vmap(lambda image: network(image.transpose(2, 0, 1), key=jax.random.key(0)))(x)

    check_without_attention(function, arrays, jnp.asarray(images(16, 16)), "no attention was found", False)
