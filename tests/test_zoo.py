"""Models of other libraries, unedited; those that are not installed are skipped (`pip install --group zoo`)."""

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

    module = tm.ViT(img_size=(16, 24), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
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
    pytest.importorskip("equimo")
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
