"""What every method owes on every kind of model. A new method adds one row to `METHODS` here."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow, tiny_vit

import tokentm_jax as tm
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.methods.table import METHODS as TABLE
from tokentm_jax.models.vit import ViT, init_params

# method: options that keep it cheap here
METHODS = {
    "tokentm": {},
    "gae": {},
    "transformer_attribution": {},
    "attcat": {},
    "conservative_lrp": {},
    "lrp": {},
    "partial_lrp": {},
    "rollout": {"discard_ratio": 0.2},
    "value_zeroing": {},
    "raw_attention": {},
    "grad_cam": {},
    "grad_cam_tokens": {},
    "attn_lrp": {},
    "res_lrp": {},
    "pa_lrp": {},
    "libra_full_grad": {},
    "libra_attcat": {},
    "libra_tokentm": {},
    "libra_gae": {},
    "libra_grad_cam": {},
    "beyond_intuition": {"steps": 2},
    "legrad": {},
    "input_gradient": {},
    "gradient_x_input": {},
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"steps": 2},
    "expected_gradients": {"samples": 2},
    "occlusion": {"window": 2, "chunk": 4},
    "token_dropping": {"window": 2},
    "rise": {"samples": 6, "chunk": 4},
    "shapley": {"pairs": 2, "chunk": 20},
    "kernel_shap": {"pairs": 13},
    "mda": {"candidates": 2, "chunk": 4},
    "caap": {"chunk": 4},
    "tokentm_mix": {},
    "combination": {"methods": "gae,grad_cam"},
}
# Forward passes, as those of occlusion (see test_perturbation.py); variants of AttnLRP and of Integrated Gradients.
SLOW = ("value_zeroing", "rise", "shapley", "kernel_shap", "mda", "caap", "pa_lrp", "expected_gradients")
FAMILIES = ("tokentm", "rollout", "partial_lrp", "input_gradient")  # one of each; `.ci/run` names them, too
QUICK = ("tokentm",)  # by default, where all would take long
BASE = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS = {  # all of them on images that are not square
    "class_token": {"pre_norm": True},
    "distilled": {"distilled": True, "init_values": 0.5},
    "registers_average_pooled": {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg"},
    "bfloat16": {"dtype": jnp.bfloat16},
    "attention_pooled_rotary_gated": {
        **{"class_token": False, "global_pool": "map", "reg_tokens": 1, "pos_embed": "none", "qk_norm": True},
        **{"rope_type": "cat", "k_bias": False, "mlp_layer": "swiglu", "scale_mlp_norm": True},
    },
    "spectrogram": {"patch_size": (10, 12), "stride": 6, "in_chans": 1, "reg_tokens": 1, "global_pool": "prefix"},
}
SEEDS = {"spectrogram": 12}  # of a model for which Grad-CAM has maps; of most, its heads count against the classes
TARGET = jnp.array([0, 3, 4], jnp.int32)


# By default all methods on one kind, and the quick one on the others.
ONE = ("registers_average_pooled", *(name for name in METHODS if name not in SLOW))
CASES = [
    pytest.param(kind, name, marks=[] if {kind, name} <= set(ONE) or name in QUICK else pytest.mark.slow)
    for kind in KINDS
    for name in METHODS
    if (kind, name) != ("attention_pooled_rotary_gated", "token_dropping")  # which refuses it
]


@functools.cache
def model_of(kind):
    module = ViT(**{**BASE, **KINDS[kind]})
    params = jax.tree.map(
        lambda a: a * 8 if a.ndim > 2 else a, init_params(module, jax.random.key(SEEDS.get(kind, 0)))
    )
    images = np.random.default_rng(0).normal(size=(3, 16, 24, module.in_chans)).astype(np.float32)
    return module, params, images


def test_the_table_and_this_file_agree():
    assert set(METHODS) == set(TABLE)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_contract(kind, method):
    module, params, images = model_of(kind)
    explain = explain_fn(module, method, **METHODS[method])
    compiled = jax.jit(explain)
    maps = compiled(params, images, TARGET)
    assert maps.dtype == jnp.float32
    assert maps.shape == (3, *((16, 24) if TABLE[method].output == "pixel map" else module.grid))
    assert np.isfinite(maps).all()
    assert maps.min() < maps.max()

    # Deterministic, and other companions in the batch, with other classes, change nothing for a sample.
    np.testing.assert_array_equal(maps, compiled(params, images, TARGET))
    others = np.stack([images[0], 5 * images[2], -3 * images[1]])
    again = compiled(params, others, jnp.array([0, 1, 2], jnp.int32))
    # bfloat16 products may be blocked in another way, with another rounding.
    tolerance = {"rtol": 5e-2, "atol": 2e-2 * float(jnp.abs(maps[0]).max())} if kind == "bfloat16" else {"rtol": 1e-4}
    np.testing.assert_allclose(again[0], maps[0], **{"atol": 1e-6 * float(jnp.abs(maps[0]).max()), **tolerance})
    # A class per sample: another class for sample 1 leaves the others, and other classes change the maps of a method
    # that looks at the class (not each: a rectified map may be zero for both).
    changed = compiled(params, images, jnp.array([0, 1, 4], jnp.int32))
    np.testing.assert_array_equal(changed[::2], maps[::2])
    other_classes = compiled(params, images, jnp.array([1, 0, 2], jnp.int32))
    assert (np.abs(other_classes - maps).max() > 0) == TABLE[method].looks_at_class(METHODS[method])
    assert compiled._cache_size() == 1

    # What has no map is NaN as a whole, and nothing else in the batch sees it.
    for bad in (np.nan, np.inf):
        broken = images.copy()
        broken[1, 3, 4, -1] = bad
        marked = compiled(params, broken, jnp.array([0, 3, 5 if bad == np.inf else -1], jnp.int32))
        np.testing.assert_array_equal(marked[0], maps[0])
        assert np.isnan(marked[1:]).all()


# Another shape is another program to compile.
@pytest.mark.parametrize("method", mostly_slow(METHODS, QUICK))
def test_a_sample_alone(method):
    """The same map alone, for a few not compiled as a whole, and in a batch."""
    module, params, images = model_of("registers_average_pooled")
    explain = explain_fn(module, method, **METHODS[method])
    compiled = jax.jit(explain)
    maps = compiled(params, images, TARGET)
    alone = (explain if method in FAMILIES else compiled)(params, images[1:2], TARGET[1:2])
    np.testing.assert_allclose(alone[0], maps[1], rtol=1e-4, atol=1e-5 * float(jnp.abs(maps[1]).max()))


@pytest.mark.slow
def test_the_contract_holds_for_the_programs_that_users_run():
    """All methods on all kinds once more, with XLA's optimisations on."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-k", "test_contract[", __file__]
    done = subprocess.run(command, env={**os.environ, "TEST_OPTIMISED": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(KINDS) * len(METHODS)} passed" in done.stdout


@pytest.fixture(scope="module")
def plain():
    module = ViT(**BASE)
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, init_params(module, jax.random.key(0)))
    return module, params, np.random.default_rng(0).normal(size=(3, 16, 24, 3)).astype(np.float32)


def test_the_predicted_class_is_the_default(plain):
    module, params, images = plain
    function = jax.jit(explain_fn(module, "gae", details=True))
    maps, details = function(params, images)
    np.testing.assert_array_equal(details["target"], details["logits"].argmax(-1))
    np.testing.assert_array_equal(maps, function(params, images, details["logits"].argmax(-1))[0])


# The derivative of a map is that of a gradient: long to compile, so all are with the slow tests.
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_true_derivatives_or_none(plain, method):
    module, params, images = plain
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        image = jnp.asarray(images[:1], jnp.float64)
        target = jnp.array([3], jnp.int32)
        function = explain_fn(module, method, **METHODS[method])
        weights = jnp.asarray(np.random.default_rng(1).normal(size=(16, 24)))
        direction = jnp.asarray(np.random.default_rng(2).normal(size=image.shape))

        def total(function, image):
            maps = function(params, image, target)
            return (maps * weights[: maps.shape[1], : maps.shape[2]]).sum()

        def slopes(function):
            both = jax.jit(jax.value_and_grad(functools.partial(total, function)))
            value, gradient = both(image)
            step = 1e-6
            differences = [both(image + sign * step * direction)[0] for sign in (1, -1)]
            return value, (gradient * direction).sum(), (differences[0] - differences[1]) / (2 * step)

        if TABLE[method].has_derivative(METHODS[method]):
            value, slope, expected = slopes(function)
            np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-7 * abs(float(value)))
        else:
            with pytest.raises(tm.InputError, match=f"maps of '{method}' have no true derivative"):
                slopes(function)
            _, slope, expected = slopes(explain_fn(module, method, differentiate_anyway=True, **METHODS[method]))
            assert abs(slope - expected) > 1e-3 * abs(expected)  # it is refused for a reason


REFUSING = {
    "conservative_lrp": {},
    "attn_lrp": {},
    "tokentm_mix": {},
    "combination": {"methods": "libra_gae,rollout"},
}


@pytest.mark.parametrize("method", mostly_slow(REFUSING, ("conservative_lrp",)))
def test_maps_without_a_derivative_refuse_to_be_differentiated(plain, method):
    module, params, images = plain
    explain = explain_fn(module, method, **REFUSING[method])
    refused = pytest.raises(tm.InputError, match=f"maps of '{method}' have no true derivative.*differentiate_anyway")
    score = explain_fn(module, method, details=True, **REFUSING[method])
    for differentiated in (
        jax.grad(lambda params, x: explain(params, x, TARGET).sum(), 1),
        lambda params, x: jax.jvp(lambda x: jax.jit(explain)(params, x), (x,), (x,)),
        jax.grad(lambda params, x: score(params, x)[1]["score"].sum()),
    ):
        with refused:
            jax.eval_shape(differentiated, params, images)
    assert not TABLE[method].has_derivative(REFUSING[method])


def test_what_does_not_differentiate_meets_no_refusal(plain):
    """Of a map that refuses: jit, vmap, scan, export; and no derivative is asked for behind a stop_gradient."""
    module, params, images = plain
    explain = explain_fn(module, "conservative_lrp")
    still = jax.lax.stop_gradient(params)

    def program(images, target):
        maps = explain(params, images, target)
        mapped = jax.vmap(lambda x, t: explain(params, x[None], t[None])[0])(images, target)
        turns = jax.lax.map(lambda one: explain(params, one[0][None], one[1][None])[0], (images, target))

        def loss(x):
            noted = explain(still, jax.lax.stop_gradient(x), target)
            return jnp.square(x).sum() + noted.sum(), noted

        return maps, mapped, turns, jax.value_and_grad(loss, has_aux=True)(images)

    found = jax.export.export(jax.jit(program))(images, TARGET).call(images, TARGET)
    maps, mapped, turns, ((_, noted), gradient) = found
    for same in (mapped, turns, noted):
        np.testing.assert_allclose(same, maps, rtol=1e-4, atol=1e-6 * float(jnp.abs(maps).max()))
    np.testing.assert_allclose(gradient, 2 * images)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["x64", "float16", "function"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_other_modes(plain, method, mode):
    """Where float64 exists, in half precision, and on a function; never a NaN on the way (an image of one
    colour is among them)."""
    module, params, images = plain
    images = np.stack([images[0], 0 * images[0]])
    target = np.array([0, 3], np.int32)
    if mode == "float16":
        module = module.clone(dtype="float16")
    if mode == "function":
        from test_plain import FIELDS, GRID, one_vit

        module, images = tm.models.PlainModel(one_vit, GRID, 1, batched=False), images[:, :8, :12]
        params, target = tm.models.init_params(ViT(**FIELDS), jax.random.key(0)), target % 3
        if method == "token_dropping":
            with pytest.raises(tm.InputError, match="what works without is"):
                explain_fn(module, method)(params, images, target)
            return
    with jax.enable_x64(mode == "x64"), jax.debug_nans(True):
        maps = jax.jit(explain_fn(module, method, **METHODS[method]))(params, images, target)
        assert maps.dtype == jnp.float32 and np.isfinite(maps).all()


def test_options_with_which_the_class_does_not_matter(plain):
    module, params, images = plain
    for method, options in (
        ("tokentm", {"attention": "plain"}),
        ("combination", {"methods": "rollout, raw_attention"}),
    ):
        assert TABLE[method].class_specific and not TABLE[method].looks_at_class(options)
        compiled = jax.jit(explain_fn(module, method, **options))
        np.testing.assert_array_equal(compiled(params, images, TARGET), compiled(params, images, TARGET[::-1]))
    # Whose weights read the gradient of the class.
    assert TABLE["tokentm"].looks_at_class({"attention": "plain", "weights": "alignment"})
    assert not TABLE["tokentm"].looks_at_class({"attention": "plain", "weights": "entropy"})


def test_another_function_under_the_same_name_is_another_program(monkeypatch):
    vit, images = tiny_vit(2), np.full((1, 16, 24, 3), 0.5, np.float32)
    monkeypatch.setitem(TABLE, "mine", TABLE["raw_attention"])
    first = tm.explain(vit, images, "mine")
    np.testing.assert_array_equal(first, tm.explain(vit, images, "raw_attention"))

    def twice(module, params, inputs, target):
        maps, details = TABLE["raw_attention"].function(module, params, inputs, target)
        return 2 * maps, details

    monkeypatch.setitem(TABLE, "mine", dataclasses.replace(TABLE["mine"], function=twice))
    np.testing.assert_array_equal(tm.explain(vit, images, "mine"), 2 * first)


def test_constant_images_and_zero_weights_stay_finite(plain):
    module, params, images = plain
    functions = [explain_fn(module, method) for method in ("tokentm", "transformer_attribution")]
    compiled = jax.jit(lambda *arguments: [f(*arguments) for f in functions])
    for arguments in ((params, np.zeros_like(images)), (jax.tree.map(jnp.zeros_like, params), images)):
        assert all(np.isfinite(maps).all() for maps in compiled(*arguments, TARGET))


def test_options_are_checked(plain):
    module, params, images = plain
    for method, options, message in (
        ("tokentn", {}, "did you mean 'tokentm'"),
        ("tokentm", {"fnn": False}, "did you mean 'ffn'"),
        ("tokentm", {"ffn": "no"}, "'ffn' of the method 'tokentm' must be a valid boolean, got 'no'"),
        ("tokentm", {"ffn": 1}, "'ffn' of the method 'tokentm' must be a valid boolean, got 1"),
        ("tokentm", {"direction": "up"}, "'direction' .* must be 'necc', 'softmax', 'cosine' or 'none'"),
        ("tokentm", {"first_block": True}, "'first_block' of the method 'tokentm' must be a valid integer, got True"),
        ("tokentm", {"first_block": 1.0}, "'first_block' .* must be a valid integer"),
        ("tokentm", {"first_block": -1}, "'first_block' .* must be greater than or equal to 0"),
        ("tokentm", {"end_block": True}, "'end_block' of the method 'tokentm' must be a valid integer, got True"),
        ("tokentm", {"end_block": "2"}, "'end_block' of the method 'tokentm' must be a valid integer, got '2'"),
        ("tokentm", {"first_block": 1, "end_block": 1}, r"end_block must be past first_block \(1\), got 1"),
        ("tokentm", {"heads": "each", "transformed": "stream"}, "method 'tokentm': heads='each' needs"),
        ("tokentm", {"end_block": 3}, "'end_block' must be at most 2"),
        ("tokentm", {"memory": "disk"}, "'memory' of the method 'tokentm' must be 'recompute' or 'store'"),
        ("gae", {"memory": "disk"}, "'memory' of the method 'gae' must be 'recompute' or 'store'"),
        ("raw_attention", {"first_block": 1}, "unknown option 'first_block' of the method 'raw_attention'"),
        ("rollout", {"first_block": 2}, "'first_block' must be from 0 to 1"),
        ("rollout", {"fusion": "sum"}, "'fusion' of the method 'rollout' must be 'mean', 'max' or 'min'"),
        ("rollout", {"discard_ratio": 1.5}, "'discard_ratio' .* must be less than 1"),
        ("rollout", {"discard_ratio": float("nan")}, "'discard_ratio' .* must be a finite number"),
        ("lrp", {"stabiliser": "none"}, "'stabiliser' of the method 'lrp' must be 'signed' or 'reference'"),
        ("conservative_lrp", {"activation": "relu"}, "must be 'identity' or 'gradient'"),
        ("beyond_intuition", {"variant": "both"}, "must be 'head' or 'token'"),
        ("beyond_intuition", {"steps": 0}, "'steps' .* must be greater than or equal to 1"),
        ("smooth_grad", {"samples": 0}, "'samples' .* must be greater than or equal to 1"),
        ("expected_gradients", {"references": "photos"}, "'references' .* must be an array of finite numbers"),
        ("integrated_gradients", {"steps": 0}, "'steps' .* must be greater than or equal to 1"),
        ("combination", {"methods": "gae,gea"}, "did you mean 'gae'"),
        ("tokentm_mix", {"methods": "gae,combination"}, "unknown method 'combination'"),
        ("tokentm_mix", {"methods": "gae,gae"}, "named once"),
        ("tokentm_mix", {"weights": "1,x,1,1"}, "must be numbers with commas between"),
        ("tokentm_mix", {"power": 0}, "'power' of the method 'tokentm_mix' must be greater than 0"),
        ("combination", {"how": "sum"}, "'how' of the method 'combination' must be 'product' or 'mean'"),
    ):
        with pytest.raises(tm.InputError, match=message):
            explain_fn(module, method, **options)(params, images)


def test_options_may_be_numpy_scalars():
    for method, options in (
        ("tokentm", {"first_block": np.int64(1), "end_block": np.int32(2), "ffn": np.bool_(False)}),
        ("rollout", {"discard_ratio": np.float32(0.5)}),
        ("rollout", {"discard_ratio": 0}),
        ("smooth_grad", {"samples": np.uint8(2), "noise": np.float64(0.1)}),
    ):
        chosen = TABLE[method].check(method, options)
        assert chosen == {key: pytest.approx(value) for key, value in options.items()}
        assert {type(value) for value in chosen.values()} <= {int, float, bool}
        explain_fn(tm.models.ViT(**BASE), method, **options)


def test_equal_options_of_another_type_are_not_confused(plain):
    """1 and True are equal keys of a cache of programs; only one is a block."""
    vit = tiny_vit(2)
    images = np.full((1, 16, 24, 3), 0.5, np.float32)
    tm.explain(vit, images, "raw_attention")
    tm.explain(vit, images, "rollout", first_block=1)
    with pytest.raises(tm.InputError, match="valid integer, got True"):
        tm.explain(vit, images, "rollout", first_block=True)


def test_completeness_of_integrated_gradients(plain):
    module, params, images = plain
    gaps = []
    for steps in (2, 64):
        _, details = jax.jit(explain_fn(module, "integrated_gradients", details=True, steps=steps))(params, images)
        gaps.append(np.abs(details["completeness_gap"]).max())
    assert gaps[1] < 0.05 * gaps[0]


def test_a_module_without_attention_is_refused():
    import flax.linen as nn

    class Silent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.reshape(len(x), -1))

    images = np.ones((1, 4, 4, 3), np.float32)
    params = Silent().init(jax.random.key(0), images)["params"]
    with pytest.raises(
        tm.InputError, match="no attention was found in this function; what works without is lrp, input_gradient"
    ):
        explain_fn(Silent(), "gae")(params, images)
    maps = explain_fn(Silent(), "input_gradient")(params, images)  # needs no attention
    assert maps.shape == (1, 4, 4)
