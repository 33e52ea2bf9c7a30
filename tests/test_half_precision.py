"""Maps of a model in bfloat16, against those of the same model in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHEAP, tiny_vit

import tokentm_jax as tm
from tokentm_jax.data.sources import open_source
from tokentm_jax.inputs.batches import batches
from tokentm_jax.methods.table import METHODS

LEAST = 0.98  # of the mean rank correlation
# Methods whose maps are computed in float32 at least, so that bfloat16 changes nothing but their inputs.
WIDE = sorted(name for name, row in METHODS.items() if row.float32)
FEW = {**CHEAP, "occlusion": {"patch": 32}, "kernel_shap": {"patch": 56, "pairs": 40}, "rise": {"samples": 20}}
FEW |= {"shapley": {"patch": 56, "pairs": 2}, "token_dropping": {"window": 7, "stride": 7}}
FEW |= {"mda": {"patch": 56}}
FEW |= {"combination": {"methods": "tokentm,gae"}}


def ranks(x):
    return np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(np.float64)


def correlation(a, b):
    """Spearman's, of one map with another; 1 where both are the same, whatever their ties."""
    if np.array_equal(a, b):
        return 1.0
    a, b = ranks(np.ravel(a)), ranks(np.ravel(b))
    return float(np.corrcoef(a, b)[0, 1])


def test_the_table_says_what_is_computed_in_float32():
    """What is traced of a model in bfloat16 has no such number, and that of the others has."""
    vit = tiny_vit(1)
    half = vit.module.clone(dtype="bfloat16")
    inputs = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.bfloat16)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), vit.params)
    for method in ("lrp", "rollout"):
        lines = str(jax.make_jaxpr(tm.explain_fn(half, method))(params, inputs)).splitlines()
        computed = [line for line in lines if "dot_general" in line and "bf16" in line.split("=")[0]]
        assert bool(computed) != METHODS[method].float32, (method, computed[:3])


@pytest.fixture(scope="module")
def pair(shared):
    """DeiT-tiny in float32 and in bfloat16, photos, and the classes that float32 predicts."""
    weights = shared / "data/deit_tiny_patch16_224.safetensors"
    single, half = (tm.load("deit_tiny_patch16_224", weights, dtype=dtype) for dtype in (None, "bfloat16"))
    source = open_source(shared / "data/imagenet_sample", limit=8)
    photos = next(iter(batches(source, single.preprocessing, 8))).inputs.astype(np.float32) / 255
    return single, half, photos, np.asarray(single.logits(photos)).argmax(-1)


@pytest.mark.slow
def test_maps_in_mixed_precision():
    """Nearly those of float32; a method that needs float32 has it."""
    photos = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    single = tm.Explainer(methods=["tokentm"], dtype="float32", batch_size=4)
    mixed = dataclasses.replace(single, mixed_precision=True)
    expected, found = (explainer({"image": photos})["maps/tokentm"] for explainer in (single, mixed))
    assert np.abs(expected - found).max() > 0
    assert min(correlation(a, b) for a, b in zip(expected, found, strict=True)) >= 0.998
    assert mixed.described()["model"]["identity"] == single.described()["model"]["identity"]
    assert mixed.described()["mixed_precision"] and not single.described()["mixed_precision"]

    vit = tiny_vit(1)
    inputs = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.float32)
    for method in ("lrp", "rollout"):
        program = str(jax.make_jaxpr(tm.explain_fn(vit.mixed().module, method))(vit.params, inputs))
        assert ("bf16" in program) != METHODS[method].float32
    function = tm.Model(lambda params, images: images, {}, vit.preprocessing, None, "mine")
    with pytest.raises(tm.InputError, match=r"mixed precision needs a module .* and mine has none"):
        function.mixed()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "gae", "attn_lrp", "rollout", "legrad", "input_gradient"])
def test_methods_rank_alike_in_mixed_precision(pair, method):
    single, _, photos, target = pair
    expected, found = (np.asarray(tm.explain(vit, photos, method, target)) for vit in (single, single.mixed()))
    mean = np.mean([correlation(a, b) for a, b in zip(expected, found, strict=True)])
    print(f"{method}: mean rank correlation {mean:.4f}")
    assert mean >= (0.99 if method == "input_gradient" else 0.998)  # noisy in any precision


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_alike_in_bfloat16(pair, method):
    """As in float32, in a batch; and one photo as in a batch."""
    single, half, photos, target = pair
    options = FEW.get(method, {})
    expected, found = (np.asarray(tm.explain(vit, photos, method, target, **options)) for vit in (single, half))
    mean = np.mean([correlation(a, b) for a, b in zip(expected, found, strict=True)])
    one = np.asarray(tm.explain(half, photos[:1], method, target[:1], **options))[0]
    largest = np.abs(one - found[0]).max() / np.abs(found[0]).max()
    together = correlation(one, found[0])
    print(f"{method}: mean rank correlation {mean:.4f}; one photo {together:.4f}, off by {largest:.1%} of the maximum")
    assert mean >= LEAST
    assert together >= LEAST
    if METHODS[method].float32:
        assert largest < 1e-3
