"""Eight virtual devices: the same maps as on one, with no collective where only the batch is sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHEAP, mostly_slow
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tokentm_jax as tm
from tokentm_jax.methods.table import METHODS

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
QUICK = ("tokentm", "rollout")
CASES = mostly_slow(METHODS, QUICK)


@pytest.fixture(scope="module")
def model():
    if jax.device_count() != 8:
        pytest.skip("needs 8 devices")
    vit = tm.models.ViT(img_size=(16, 16), patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=5)
    inputs = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    return vit, tm.models.init_params(vit, jax.random.key(0)), inputs, jnp.arange(8) % 5


def error(found, expected):
    return np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in (AxisType.Auto, AxisType.Explicit)]
)
@pytest.mark.parametrize("method", CASES)
def test_a_sharded_batch_needs_no_collective(model, method, kind):
    vit, params, inputs, target = model
    explain = tm.explain_fn(vit, method, **CHEAP.get(method, {}))
    expected = jax.jit(explain)(params, inputs, target)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        spread, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
        placed = (jax.device_put(params, replicated), *jax.device_put((inputs, target), spread))
        program = jax.jit(explain).lower(*placed).compile()
        maps = program(*placed)
    assert len(maps.sharding.device_set) == 8
    assert maps.addressable_shards[0].data.shape[0] == 1
    assert not [name for name in COLLECTIVES if name in program.as_text()]
    assert error(maps, expected) < 1e-5


@pytest.mark.slow
def test_an_explicit_mesh_that_is_not_set(model):
    vit, params, inputs, target = model
    explain = jax.jit(tm.explain_fn(vit))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    params_there = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    spread = NamedSharding(mesh, PartitionSpec("batch"))
    maps = explain(params_there, *jax.device_put((inputs, target), spread))
    assert len(maps.sharding.device_set) == 8
    assert error(maps, explain(params, inputs, target)) < 1e-5
    predicted = explain(params_there, jax.device_put(inputs, spread))
    assert error(predicted, explain(params, inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 11])
def test_any_batch_size_over_all_devices(model, size):
    vit, params, inputs, target = model
    inputs, target = jnp.concatenate([inputs, inputs])[:size], jnp.concatenate([target, target])[:size]
    explain = tm.explain_fn(vit, details=True)
    maps, details = tm.models.over_devices(explain)(params, inputs, target)
    expected, more = jax.jit(explain)(params, inputs, target)
    assert maps.shape == expected.shape
    assert error(maps, expected) < 1e-5
    assert (details["target"] == target).all()
    assert error(details["logits"], more["logits"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parameters_sharded_along_the_width(model, kind):
    vit, params, inputs, target = model
    explain = jax.jit(tm.explain_fn(vit))
    expected = explain(params, inputs, target)
    mesh = jax.make_mesh((2, 4), ("batch", "width"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        placed = tm.models.over_width(params, mesh)
        kernel = placed["blocks"]["attn"]["qkv"]["kernel"]
        assert kernel.addressable_shards[0].data.shape[-1] == kernel.shape[-1] // 4
        maps = explain(placed, *jax.device_put((inputs, target), NamedSharding(mesh, PartitionSpec("batch"))))
    assert error(maps, expected) < 1e-5


def test_a_width_that_the_devices_do_not_divide(model):
    _, params, _, _ = model
    mesh = jax.make_mesh((1, 3), ("batch", "width"), devices=jax.devices()[:3], axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(tm.InputError, match="3 devices do not divide"):
        tm.models.over_width(params, mesh)
    with pytest.raises(tm.InputError, match="no axis 'model'"):
        tm.models.over_width(params, mesh, "model")
