"""Every method lowers for accelerators that are not here: `jax.export` makes StableHLO for them on any machine.

What this proves: no step of a method lacks a rule for a GPU or a TPU, and none calls a library, of this machine or
another: on several CPU devices, calls of LAPACK can wait for each other for ever.
What it does not: that the vendor's compiler takes the program, and how fast it is. See docs/explanation/speed.md.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow, tiny_vit
from test_contract import FAMILIES, METHODS

import tokentm_jax as tm

PLATFORMS = ("cpu", "cuda", "tpu")
# Calls that mark the placing of arrays, and are gone once it is decided.
MARKS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
SHOWN = {*FAMILIES, "kernel_shap"}  # which solves linear equations
CASES = [
    pytest.param(name, dtype, marks=[] if name in SHOWN and dtype == "bfloat16" else pytest.mark.slow)
    for name in METHODS
    for dtype in ("float32", "bfloat16")
]


def exported(module, params, method, platforms):
    explain = jax.jit(tm.explain_fn(module, method, **METHODS[method]))
    shapes = jax.eval_shape(lambda: params)
    images = jax.ShapeDtypeStruct((2, *module.img_size, 3), jnp.float32)
    target = jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.export.export(explain, platforms=platforms)(shapes, images, target), explain


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_every_method_lowers_for_all_and_calls_no_library(method, dtype):
    vit = tiny_vit(2)
    module = vit.module.clone(dtype=None if dtype == "float32" else dtype)
    found, _ = exported(module, vit.params, method, PLATFORMS)
    assert found.platforms == PLATFORMS and found.nr_devices == 1
    assert not found.disabled_safety_checks
    (maps,) = found.out_avals
    assert maps.dtype == jnp.float32 and maps.shape[0] == 2
    text = found.mlir_module()
    assert {*re.findall(r"custom_call @(\w+)", text)} <= MARKS
    assert "f64" not in text  # which a TPU lacks


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "attn_lrp"])
def test_an_exported_method_gives_the_same_maps_where_it_can_be_run(method):
    """The program for three platforms, called on this one."""
    vit = tiny_vit(2)
    found, explain = exported(vit.module, vit.params, method, PLATFORMS)
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    target = jnp.array([1, 4], jnp.int32)
    np.testing.assert_allclose(
        found.call(vit.params, images, target), explain(vit.params, images, target), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("method", mostly_slow(METHODS, ("rollout",)))
def test_an_exported_method_takes_a_batch_of_any_size(method):
    """Exported once for a batch of the symbolic size b, with the predicted class or one per sample."""
    vit = tiny_vit(2)
    explain = jax.jit(tm.explain_fn(vit.module, method, **METHODS[method]))
    (b,) = jax.export.symbolic_shape("b")
    images, classes = jax.ShapeDtypeStruct((b, 16, 24, 3), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32)
    params = jax.eval_shape(lambda: vit.params)
    photos = np.random.default_rng(0).normal(size=(3, 16, 24, 3)).astype(np.float32)
    target = jnp.array([1, 4, 0], jnp.int32)
    expected = explain(vit.params, photos, target)
    with_class = jax.export.export(explain)(params, images, classes)
    assert jax.export.export(explain)(params, images).out_avals[0].shape[0] == b
    for size in (1, 3):
        found = with_class.call(vit.params, photos[:size], target[:size])
        atol = 1e-5 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected[:size], rtol=1e-4, atol=atol)
