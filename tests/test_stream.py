"""Rules inside the backward pass against the same rules over a stored trace."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow

from tokentm_jax.data.sources import open_source
from tokentm_jax.inputs.batches import batches
from tokentm_jax.inputs.values import token_map
from tokentm_jax.maths.variants import READINGS, TokenTM, contributions, sample_axes
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.metrics import rank_correlation
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.programs.capture import KERNELS, SHOWN, capture
from tokentm_jax.programs.model import function_of
from tokentm_jax.programs.rules import ATTN_LRP, lrp, res_lrp

BASE = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
KINDS = {
    "distilled": {"distilled": True, "init_values": 0.5},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "pre_norm": True},
}
OFF = {"length": False, "direction": "none", "initialise": False, "ffn": False}
CASES = (
    ("registers", {"first_block": 1, "end_block": 2}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("distilled", {}),
            ("registers", {"attention": "plain"}),
            ("distilled", {**OFF, "original": "normalised", "direction": "cosine"}),
            ("distilled", {"heads": "each"}),
            ("registers", {"heads": "each", "transformed": "linear", "original": "normalised", "attention": "plain"}),
            ("registers", READINGS["decompv"]),
            ("distilled", READINGS["featuregradientgate"]),
        )
    ),
)


def over_a_trace(module, params, images, target, options):
    """The definition: the same rule over arrays of all blocks."""
    trace = capture(module, params, images, target, (*SHOWN, *KERNELS, "attention_grad"))
    row = jnp.asarray(module.readout, jnp.float32)
    rule = partial(contributions, rows=row, options=options)
    rows = jax.vmap(lambda blocks: rule(blocks, blocks.tokens[0]), in_axes=(sample_axes(1),))(trace.blocks())
    return token_map(module, rows), trace.details()


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_inside_the_passes_equals_over_a_trace(kind, options):
    module = ViT(**BASE, **KINDS[kind])
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, init_params(module, jax.random.key(0)))
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    target = jnp.array([1, 4])
    expected, more = jax.jit(partial(over_a_trace, module, options=TokenTM(**options)))(params, images, target)
    for memory in ("recompute", "store") if {"attention", "heads"}.isdisjoint(options) else ("recompute",):
        explain = jax.jit(explain_fn(module, details=True, memory=memory, **options))
        found, details = explain(params, images, target)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(details["logits"], more["logits"], rtol=1e-5)
        assert (details["target"] == target).all()


def relevance_over_a_trace(module, params, images, target, method):
    """The definitions, over arrays of all blocks."""
    function = function_of(module)
    model = function.read(params, images)
    rules = {"attn_lrp": ATTN_LRP, "res_lrp": res_lrp(1.0)}.get(method, {})
    trace = capture(model.by(rules), params, images, target)
    effects = (trace.tokens * trace.token_grads).sum(-1)
    if method == "attcat":
        return token_map(module, (trace.attention.mean((2, 3)) * effects[:-1]).sum(0)), None
    if method != "transformer_attribution":
        return token_map(module, effects[0]), effects.sum(-1).T
    relevance = capture(model.by(lrp("ours", "signed")), params, images, target)
    rows = jnp.broadcast_to(jnp.asarray(module.readout), trace.tokens.shape[1:3])
    for gradient, carried in zip(trace.attention_grad[::-1], relevance.attention_grad[::-1], strict=True):
        rows = rows + jnp.einsum("bq,bqk->bk", rows, jax.nn.relu(gradient * carried).mean(1))
    return token_map(module, rows), relevance.token_grads.sum((2, 3)).T


RELEVANCE = ("attcat", "attn_lrp", "res_lrp", "transformer_attribution")


@pytest.mark.parametrize("method", mostly_slow(RELEVANCE, ("transformer_attribution",)))
def test_relevance_inside_the_passes_equals_over_a_trace(method):
    module = ViT(**BASE, **KINDS["registers"])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: np.asarray(a * 8, np.float64), init_params(module, jax.random.key(0)))
        images = np.random.default_rng(0).normal(size=(2, 16, 24, 3))
        target = jnp.array([1, 4])

        @jax.jit
        def run(params):
            both = [explain_fn(module, method, details=True, memory=m) for m in ("recompute", "store")]
            found = [explain(params, images, target) for explain in both]
            return found, relevance_over_a_trace(module, params, images, target, method)

        found, (expected, relevance) = run(params)
        for maps, details in found:
            np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
            if relevance is not None:
                np.testing.assert_allclose(details["relevance"], relevance, atol=1e-11 * np.abs(relevance).max())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", *RELEVANCE, "lrp", "libra_full_grad", "pa_lrp", "gradient_x_input"])
@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_no_method_keeps_the_attention_of_all_blocks(method, memory):
    """More blocks need less than an array [H, N, N] each, from the compiled programs."""
    size = {"img_size": (64, 64), "patch_size": 4, "embed_dim": 16, "num_heads": 4, "num_classes": 5}
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def kept(depth):
        module = ViT(**size, depth=depth)
        params = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
        program = jax.jit(explain_fn(module, method, memory=memory)).lower(params, images).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert (kept(9) - kept(5)) / 4 < 4 * 257**2 * 4 / 2


@pytest.mark.slow
def test_memory_per_image():
    """At least four times less than where all is kept, from the compiled programs."""
    module = ViT(img_size=(112, 112), patch_size=8, embed_dim=64, depth=12, num_heads=4, num_classes=5)
    params = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))

    def megabytes(explain):
        inputs = [jax.ShapeDtypeStruct((size, 112, 112, 3), jnp.float32) for size in (1, 2)]
        programs = [jax.jit(explain).lower(params, x, None).compile() for x in inputs]
        one, two = (program.memory_analysis().temp_size_in_bytes / 1e6 for program in programs)
        return two - one

    recompute, store = (megabytes(explain_fn(module, memory=memory)) for memory in ("recompute", "store"))
    everything = megabytes(partial(over_a_trace, module, options=TokenTM()))
    linear = 12 * (3 + 4) * 64 * 197 * 4 / 1e6  # queries, keys, values and hidden channels of 12 blocks
    assert store == pytest.approx(recompute + linear, rel=0.2)  # and no second copy of weights or attention
    assert recompute < everything / 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "gae", "rollout"])
def test_bfloat16_on_photos(deit, shared, method):
    photos = open_source(shared / "data/imagenet_sample", limit=32, seed=0)
    images = np.concatenate([batch.inputs for batch in batches(photos, deit.preprocessing, 16)])
    inputs = deit.preprocessing.normalise(images.astype(np.float32) / 255)
    target = deit.module.apply({"params": deit.params}, inputs).argmax(-1)
    half = explain_fn(deit.module.clone(dtype=jnp.bfloat16), method)
    maps = [jax.jit(f)(deit.params, inputs, target) for f in (explain_fn(deit.module, method), half)]
    assert maps[1].dtype == jnp.float32
    correlation = np.asarray(rank_correlation(*maps))
    assert correlation.mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"memory": "recompute", "first_block": 1, "end_block": 2}])
def test_the_maps_own_derivative_in_both_modes(options):
    """The weights get no cotangent in the pass that makes the map, and yet are differentiated with it."""
    module = ViT(**BASE)
    with jax.enable_x64(True):
        params = init_params(module, jax.random.key(0))
        params = jax.tree.map(lambda a: jnp.asarray(a * 8 if a.ndim > 2 else a, jnp.float64), params)
        x, v = (jnp.asarray(np.random.default_rng(seed).normal(size=(1, 16, 24, 3))) for seed in (0, 1))
        explain, weights = explain_fn(module, **options), jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 3)))
        total = lambda x: (explain(params, x, jnp.array([3])) * weights).sum()  # noqa: E731
        run = jax.jit(lambda x: (total(x), jax.jvp(total, (x,), (v,))[1], (jax.grad(total)(x) * v).sum()))
        _, forward, reverse = run(x)
        slope = (run(x + 1e-6 * v)[0] - run(x - 1e-6 * v)[0]) / 2e-6
        np.testing.assert_allclose([forward, reverse], slope, rtol=1e-5)
