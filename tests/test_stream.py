"""Rules inside the backward pass against the same rules over a stored trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokentm_jax.interface import explain_fn
from tokentm_jax.metrics import rank_correlation
from tokentm_jax.sources import batches, open_source
from tokentm_jax.vit import ViT, init_params

BASE = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
KINDS = {
    "distilled": {"distilled": True, "init_values": 0.5},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "pre_norm": True},
}
CASES = (
    ("distilled", "tokentm", {}),
    ("registers", "gae", {}),
    ("registers", "tokentm", {"first_block": 1, "end_block": 2}),
    ("distilled", "tokentm", {"original": "normalised", "direction": "cosine", "initialise": False}),
    ("registers", "tokentm", {"attention": "plain"}),
)


@pytest.mark.parametrize(("kind", "method", "options"), CASES)
def test_recomputed_equals_stored(kind, method, options):
    module = ViT(**BASE, **KINDS[kind])
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, init_params(module, jax.random.key(0)))
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    target = jnp.array([1, 4])
    results = []
    for memory in ("recompute", "store"):
        explain = jax.jit(explain_fn(module, method, details=True, memory=memory, **options))
        results.append(explain(params, images, target))
    (found, details), (expected, more) = results
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(details["logits"], more["logits"], rtol=1e-5)
    assert (details["target"] == target).all() and (more["target"] == target).all()


def test_memory_per_image():
    """At least four times less than where all is kept, from the compiled programs."""
    module = ViT(img_size=(112, 112), patch_size=8, embed_dim=64, depth=12, num_heads=4, num_classes=5)
    params = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))

    def megabytes(memory):
        inputs = [jax.ShapeDtypeStruct((size, 112, 112, 3), jnp.float32) for size in (1, 2)]
        programs = [jax.jit(explain_fn(module, memory=memory)).lower(params, x).compile() for x in inputs]
        one, two = (program.memory_analysis().temp_size_in_bytes / 1e6 for program in programs)
        return two - one

    assert 4 * megabytes("recompute") < megabytes("store")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "gae", "rollout"])
def test_bfloat16_on_photos(deit, shared, method):
    photos = open_source(shared / "data/imagenet_sample", limit=32, seed=0)
    images = np.concatenate([batch.images for batch in batches(photos, deit.preprocessing, 16)])
    inputs = deit.preprocessing.normalise(images.astype(np.float32) / 255)
    target = deit.module.apply({"params": deit.params}, inputs).argmax(-1)
    half = explain_fn(deit.module.clone(dtype=jnp.bfloat16), method)
    maps = [jax.jit(f)(deit.params, inputs, target) for f in (explain_fn(deit.module, method), half)]
    assert maps[1].dtype == jnp.float32
    correlation = np.asarray(rank_correlation(*maps))
    assert correlation.mean() > 0.98
