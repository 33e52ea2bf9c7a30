"""Functions that this package has never seen: their maps are those of the module, or of a slow loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas
from test_contract import KINDS, METHODS, TARGET, model_of

import tokentm_jax as tm
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.methods.table import METHODS as TABLE
from tokentm_jax.programs.flat import flatten
from tokentm_jax.programs.reading import read
from tokentm_jax.programs.rules import RULES
from tokentm_jax.programs.running import Evaluation, Plan

# A quotient near zero makes much of a last bit.
QUOTIENTS = ("lrp", "partial_lrp", "transformer_attribution", "res_lrp")
LEFT_OUT = {
    "spectrogram": (
        "occlusion",
        "rise",
        "shapley",
        "kernel_shap",
        "mda",
        "pa_lrp",
    ),  # overlap is seen of a convolution, not of a gather
    # Ties among discarded attentions; differences of rounded numbers.
    "bfloat16": ("rollout", "grad_cam_tokens"),
}
QUICK = {("registers_average_pooled", name) for name in ("tokentm", "lrp", "libra_full_grad")}
CASES = [
    pytest.param(kind, name, marks=[] if (kind, name) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for name in METHODS
    if name != "token_dropping" and name not in LEFT_OUT.get(kind, ())
]


@functools.cache
def function_of(kind):
    module = model_of(kind)[0]
    return lambda params, images: module.apply({"params": params}, images)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_maps_of_the_module_as_an_unknown_function(kind, method, briefly):
    module, params, images = model_of(kind)
    if kind == "bfloat16" and TABLE[method].float32:  # it casts what it is given, so it cannot be made to
        with pytest.raises(tm.InputError, match="a function that computes in float32; this one computes in bfloat16"):
            explain_fn(function_of(kind), method, **METHODS[method])(params, images, TARGET)
        return
    expected = jax.jit(explain_fn(module, method, **METHODS[method]))(params, images, TARGET)
    maps = jax.jit(explain_fn(function_of(kind), method, **METHODS[method]))(params, images, TARGET)
    tolerance = 1e-3 if method in QUOTIENTS else 1e-5
    if kind == "bfloat16":  # products are rounded in another order
        tolerance = 5e-2
    np.testing.assert_allclose(maps, expected, rtol=0, atol=tolerance * float(jnp.abs(expected).max()))


def layer_norm(x, scale=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) * scale + bias


def layers_of(depth, rng, d=8, n=6, scan=True, norm=layer_norm):
    """A small pre-norm Transformer in plain JAX, its blocks in a scan, a "reverse" one, or a loop."""
    w = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.4)  # noqa: E731
    params = {
        "embed": w(48, d), "position": w(n, d), "qkv": w(depth, d, 3 * d), "out": w(depth, d, d),
        "up": w(depth, d, 2 * d), "down": w(depth, 2 * d, d), "head": w(d, 5),
    }  # fmt: skip

    def block(x, p):
        q, k, v = jnp.split(norm(x) @ p["qkv"], 3, -1)
        attention = jax.nn.softmax(q @ k.swapaxes(-1, -2) / d**0.5)
        x = x + (attention @ v) @ p["out"]
        return x + jax.nn.gelu(norm(x) @ p["up"], approximate=True) @ p["down"], None

    def forward(params, images):
        b = len(images)
        x = images.reshape(b, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, n, 48)
        x = x @ params["embed"] + params["position"]
        stacked = {name: params[name] for name in ("qkv", "out", "up", "down")}
        if scan == "reverse":
            x, _ = jax.lax.scan(block, x, jax.tree.map(lambda a: a[::-1], stacked), reverse=True)
        elif scan:
            x, _ = jax.lax.scan(block, x, stacked)
        else:
            for i in range(depth):
                x, _ = block(x, jax.tree.map(lambda a: a[i], stacked))  # noqa: B023
        return norm(x).mean(1) @ params["head"]

    return params, forward


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 3))


@pytest.mark.slow
def test_scan_and_loop_give_one_map(images):
    images = images.astype(np.float32)
    for method in ("tokentm", "attcat", "rollout", "raw_attention", "grad_cam", "value_zeroing"):
        maps = []
        for scan in (True, False, "reverse"):
            params, forward = layers_of(3, np.random.default_rng(1), scan=scan)
            params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
            maps.append(jax.jit(explain_fn(forward, method))(params, images, 1))
        for other in maps[1:]:
            np.testing.assert_allclose(other, maps[0], rtol=1e-4, atol=1e-6)


def test_a_scan_is_traced_once(images):
    """The program does not grow with depth."""
    sizes = []
    for depth in (2, 6):
        params, forward = layers_of(depth, np.random.default_rng(1))
        sizes.append(len(jax.jit(explain_fn(forward, "tokentm")).lower(params, images, None).as_text()))
    assert sizes[1] < 1.05 * sizes[0]


def test_overlapping_patches_of_a_convolution():
    """Removed patches are those that the convolution reads."""
    from tokentm_jax.programs.model import Function

    def forward(params, images):
        x = jax.lax.conv_general_dilated(images, params, (6, 6), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = x.reshape(len(images), 6, 8)
        return (x + jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x).mean(1)

    kernel = np.random.default_rng(0).normal(size=(10, 12, 3, 8)).astype(np.float32)
    found = Function(forward).read(kernel, np.zeros((1, 16, 24, 3), np.float32))
    assert (found.grid, found.prefix, found.tiling) == ((2, 3), 0, ((10, 12), (6, 6)))


@pytest.mark.slow
def test_methods_for_a_function(images):
    params, forward = layers_of(2, np.random.default_rng(1), scan=False)
    found = tm.methods_for(forward, params, images)
    assert set(TABLE) - set(found) == {"token_dropping"}
    assert tm.inspect(forward, params, images).methods == tuple(found)


def test_inspection(images, briefly):
    params, forward = layers_of(2, np.random.default_rng(1), scan=False)
    found = tm.inspect(forward, params, images)
    assert (found.blocks, found.heads, found.tokens, found.prefix, found.grid) == (2, 1, 6, 0, (2, 3))
    np.testing.assert_allclose(found.readout, np.full(6, 1 / 6))
    assert found.unknown == ()
    text = str(found)
    assert "test_programs.py:" in text and "softmax" in text and "mean of 6 tokens" in text


@pytest.mark.slow
def test_what_cannot_be_told_is_asked_for(images, briefly):
    params, forward = layers_of(2, np.random.default_rng(1))

    def tokens_first(params, tokens):  # tokens come in as they are: no image, so no grid
        def block(x, p):
            q, k, v = jnp.split(x @ p["qkv"], 3, -1)
            x = x + (jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v) @ p["out"]
            return x + jnp.tanh(x @ p["up"]) @ p["down"], None

        stacked = {name: params[name] for name in ("qkv", "out", "up", "down")}
        return jax.lax.scan(block, tokens, stacked)[0].mean(1) @ params["head"]

    tokens = np.random.default_rng(0).normal(size=(2, 6, 8))
    with pytest.raises(tm.InputError, match="the grid of patches of this function is unknown: specify grid="):
        explain_fn(tokens_first, "tokentm")(params, tokens)
    assert explain_fn(tokens_first, "tokentm", grid=(2, 3), prefix=0)(params, tokens).shape == (2, 2, 3)
    for wrong, message in (
        ({"grid": (3, 2)}, r"grid must be \(2, 3\), as this function cuts its input, got \(3, 2\)"),
        ({"prefix": 1}, "grid and prefix must make the 6 tokens"),
        ({"readout": "token"}, "readout is not how this function reads its tokens"),
        ({"readout": (1.0, 0.0)}, "a share for each of 6 tokens"),
    ):
        with pytest.raises(tm.InputError, match=message):
            explain_fn(forward, "tokentm", **wrong)(params, images)


def test_refusals_name_the_operation_and_the_line(images, briefly):
    params, forward = layers_of(2, np.random.default_rng(1))

    def with_while(params, images):
        return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x + 1, forward(params, images))

    def sorted_logits(params, images):
        return jnp.sort(forward(params, images), -1)

    def fused(params, images):
        def kernel(x, y):
            y[...] = jax.nn.softmax(x[...])

        logits = forward(params, images)
        return pallas.pallas_call(kernel, jax.ShapeDtypeStruct(logits.shape, logits.dtype), interpret=True)(logits)

    def recurrent(params, images):
        def step(state, row):
            return jnp.tanh(state @ params["embed"][:8] + row @ params["embed"][8:44]), None

        rows = images.reshape(len(images), 8, 36).swapaxes(0, 1)
        return jax.lax.scan(step, jnp.zeros((len(images), 8)), rows)[0] @ params["head"]

    def no_attention(params, images):
        return jnp.tanh(images.reshape(len(images), -1)[:, :48] @ params["embed"]) @ params["head"]

    for function, method, message in (
        (with_while, "tokentm", r"test_programs.py:\d+ .*while loop"),
        (sorted_logits, "lrp", r"test_programs.py:\d+ .*sort"),
        (fused, "lrp", r"test_programs.py:\d+ .*fused\): a Pallas kernel hides its attention: switch the fused"),
        (no_attention, "tokentm", "no attention was found"),
        (recurrent, "tokentm", "no attention was found in this function"),
    ):
        with pytest.raises(tm.InputError, match=message):
            explain_fn(function, method)(params, images)
    slope = jax.grad(lambda x: recurrent(params, x).max(-1).sum())(images)
    found = explain_fn(recurrent, "input_gradient")(params, images)
    np.testing.assert_allclose(found, np.abs(slope).max(-1), rtol=1e-5)
    assert explain_fn(no_attention, "input_gradient")(params, images).shape == (2, 8, 12)
    assert explain_fn(no_attention, "attn_lrp", pixels=True, grid=(2, 3))(params, images).shape == (2, 8, 12)


@pytest.mark.slow
def test_batches_classes_transformations(images):
    """Alone or in a batch, a class per sample, under jit, vmap and grad."""
    params, forward = layers_of(2, np.random.default_rng(1))
    explain = explain_fn(forward, "tokentm")
    both = explain(params, images, jnp.array([1, 4]))
    alone = explain(params, images[1:], jnp.array([4]))
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-4)
    stacked = jax.vmap(lambda x: explain(params, x[None], jnp.array([4]))[0])(images)
    np.testing.assert_allclose(stacked[1], both[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "lrp"])
def test_maps_are_differentiated(images, method):
    with jax.enable_x64(True):
        params, forward = layers_of(2, np.random.default_rng(1))
        explain = explain_fn(forward, method)
        total = lambda x: (explain(params, x, jnp.array([1, 4])) ** 2).sum()  # noqa: E731
        x, step = jnp.asarray(images), 1e-6
        direction = jnp.asarray(np.random.default_rng(3).normal(size=images.shape))
        slope = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
        np.testing.assert_allclose((jax.grad(total)(x) * direction).sum(), slope, rtol=1e-3)


def test_rules_are_an_option_of_methods_of_gradients(images):
    params, forward = layers_of(2, np.random.default_rng(1))
    explain = lambda method, **options: jax.jit(explain_fn(forward, method, **options))(params, images)  # noqa: E731
    libra = explain("gae", rules="libra")
    np.testing.assert_array_equal(libra, explain("libra_gae"))
    constant = lambda f, scores: jax.lax.stop_gradient(f(scores))  # noqa: E731
    custom = {"softmax": constant, "norm": RULES["libra"]["norm"], "activation": RULES["libra"]["activation"]}
    np.testing.assert_allclose(explain("gae", rules=custom), libra, rtol=1e-6)
    assert np.abs(explain("gae", rules="plain") - libra).max() > 0
    for wrong, method, message in (
        ("libre", "gae", "option 'rules' of the method 'gae' must be"),
        ("libra", "rollout", "unknown option 'rules' of the method 'rollout'"),
        ({"softmx": constant}, "gae", "unknown kind of step 'softmx'; did you mean 'softmax'"),
        ({"softmax": 3}, "gae", r"the rule of 'softmax' must be a function rule\(f, \*inputs\), got 3"),
    ):
        with pytest.raises(tm.InputError, match=message):
            explain(method, rules=wrong)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(("gradient_x_input", {"rules": name}) for name in RULES if name != "conservative"),
        ("libra_full_grad", {}),
        pytest.param("tokentm", {"original": "normalised"}, marks=pytest.mark.slow),
        pytest.param("lrp", {"stabiliser": "reference"}, marks=pytest.mark.slow),
    ],
)
def test_a_norm_that_multiplies_before_it_subtracts(images, method, options):
    """As Keras writes LayerNorm: `x * s + (bias - mean * s)`. It is one norm by every set of rules."""
    scale, bias = np.random.default_rng(2).normal(size=(2, 8))

    def keras_norm(x):
        inverse = jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * scale
        return x * inverse + (bias - x.mean(-1, keepdims=True) * inverse)

    with jax.enable_x64(True):
        maps, gaps = [], []
        for norm in (functools.partial(layer_norm, scale=scale, bias=bias), keras_norm):
            params, forward = layers_of(2, np.random.default_rng(1), norm=norm)
            explain = jax.jit(explain_fn(forward, method, details=True, **options))
            found, details = explain(params, images, jnp.array([1, 4]))
            maps.append(found)
            gaps.append(details.get("completeness_gap", 0.0))
        tolerance = 1e-6 if "lrp" in (method, options.get("rules")) else 1e-9
        np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=tolerance * float(jnp.abs(maps[0]).max()))
        np.testing.assert_allclose(gaps, 0, atol=1e-9)


# ---- random programs ---------------------------------------------------------------------------------------------


def heads(x, value):
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.einsum("qhd,khd->hqk", x, x)), value)


STEPS = {
    "linear": lambda x, r: x @ r(6, 6),
    "bias": lambda x, r: x + r(6),
    "scale": lambda x, r: x * r(6),
    "gelu": lambda x, r: jax.nn.gelu(x, approximate=True),
    "erf": lambda x, r: jax.nn.gelu(x, approximate=False),
    "silu": lambda x, r: jax.nn.silu(x),
    "relu": lambda x, r: jax.nn.relu(x + r(6)),
    "norm": lambda x, r: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "late": lambda x, r: (
        x * (s := jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * r(6)) + (r(6) - x.mean(-1, keepdims=True) * s)
    ),
    "rms": lambda x, r: x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * r(6),
    "gate": lambda x, r: jax.nn.silu(x @ r(6, 6)) * (x @ r(6, 6)),
    "product": lambda x, r: (x @ r(6, 6)) * (x @ r(6, 6)),
    "residual": lambda x, r: x + jnp.tanh(x @ r(6, 6)) @ r(6, 6),
    "attention": lambda x, r: x + jax.nn.softmax((x @ r(6, 6)) @ (x @ r(6, 6)).T) @ (x @ r(6, 6)),
    "heads": lambda x, r: heads(x.reshape(4, 2, 3), (x @ r(6, 6)).reshape(4, 2, 3)).reshape(4, 6),
    "turn": lambda x, r: x * jnp.cos(r(6)) + jnp.roll(x, 3, -1) * jnp.sin(r(6)),
    "scan": lambda x, r: jax.lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x, r(3, 6, 6))[0],
    "cond": lambda x, r: jax.lax.cond(r()[()] > 0, lambda x: jax.nn.gelu(x), lambda x, w=r(6, 6): x @ w, x),
    "stack": lambda x, r: jnp.stack([row * r(6) for row in x]),
    "transpose": lambda x, r: (x.T @ r(4, 4)).T,
}  # fmt: skip


def program_of(names, seed):
    def f(x):
        rng = np.random.default_rng(seed)
        weights = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.5, x.dtype)  # noqa: E731
        for name in names:
            x = STEPS[name](x, weights)
        return x

    return f


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_rules_leave_the_values_of_random_programs(names, seed):
    """To the bit, by every set of rules; and the plain evaluation has the derivative of the function."""
    f = program_of(names, seed)
    x = jnp.asarray(np.random.default_rng([seed, 1]).normal(size=(4, 6)), jnp.float32)
    flat = flatten(jax.make_jaxpr(f)(x))
    reading = read(flat, flat.inputs)
    run = lambda rules, x: Evaluation(reading, Plan(rules), [x]).run().outputs[0]  # noqa: E731
    with jax.disable_jit():  # step by step: what is compiled as a whole may be rounded in another way
        expected = f(x)
        for name, rules in RULES.items():
            np.testing.assert_array_equal(jax.vjp(functools.partial(run, rules), x)[0], expected, err_msg=name)
    with jax.enable_x64(True):  # in float32 a derivative that is zero is a matter of rounding
        x = jnp.asarray(np.asarray(x), jnp.float64)
        value, pull = jax.vjp(f, x)
        flat = flatten(jax.make_jaxpr(f)(x))
        back = jax.vjp(lambda x: Evaluation(read(flat, flat.inputs), Plan({}), [x]).run().outputs[0], x)[1]
        g = jnp.asarray(np.random.default_rng(seed).normal(size=value.shape))
        np.testing.assert_allclose(back(g)[0], pull(g)[0], rtol=1e-6, atol=1e-8)


CONSERVED = ["linear", "gelu", "silu", "norm", "gate", "product", "residual", "attention", "turn", "scan", "cond"]


@settings(max_examples=8, deadline=None)
@given(
    names=st.lists(
        st.sampled_from(CONSERVED),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 99),
)
def test_libra_conserves_in_random_programs(names, seed):
    """Without biases the function is linear along the pruned paths: input times gradient is the output."""
    with jax.enable_x64(True):
        f = program_of(names, seed)
        x = jnp.asarray(np.random.default_rng([seed, 2]).normal(size=(4, 6)))
        flat = flatten(jax.make_jaxpr(f)(x))
        reading = read(flat, flat.inputs)
        weights = np.random.default_rng(5).normal(size=(4, 6))
        value, back = jax.vjp(lambda x: Evaluation(reading, Plan(RULES["libra"]), [x]).run().outputs[0], x)
        np.testing.assert_allclose(
            (x * back(jnp.asarray(weights))[0]).sum(), (value * weights).sum(), rtol=1e-6, atol=1e-8
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "gae", "attcat", "lrp", "libra_full_grad", "legrad", "rollout"])
def test_a_post_norm_encoder_of_texts(method, briefly):
    """A BERT as a function of embedded tokens, which have no grid: the maps of the module."""
    from tokentm_jax.inputs.texts import Texts
    from tokentm_jax.models.bert import Bert
    from tokentm_jax.models.vit import init_params

    module = Bert(30, 16, 16, 2, 2, 24, 3)
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 1 else a + 0.1, init_params(module, jax.random.key(0)))
    embedded = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    target = jnp.array([0, 2], jnp.int32)

    def texts(embeddings):
        shape = embeddings.shape[:2]
        return Texts(embeddings, jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))

    function = lambda params, embeddings: module.apply({"params": params}, texts(embeddings))  # noqa: E731
    maps = jax.jit(explain_fn(function, method, grid=(1, 6), prefix=0))(params, embedded, target)
    expected = jax.jit(explain_fn(module, method))(params, texts(jnp.asarray(embedded)), target)
    np.testing.assert_allclose(
        maps.reshape(expected.shape), expected, atol=1e-5 * float(jnp.abs(expected).max()), rtol=0
    )


OPTIONS = [
    {"attention": "plain"},
    {"attention": "means"},
    {"heads": "each"},
    {"transformed": "linear"},
    {"transformed": "linear", "heads": "each"},
    {"transformed": "stream"},
    {"original": "normalised"},
    {"ffn_transformed": "stream"},
    {"weights": "entropy"},
    {"weights": "alignment"},
    {"first_block": 1},
    {"end_block": 1},
    {"ffn": False},
    {"memory": "recompute"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_options_of_tokentm(options):
    module, params, images = model_of("distilled")
    maps, expected = (
        jax.jit(explain_fn(model, "tokentm", **options))(params, images, TARGET)
        for model in (function_of("distilled"), module)
    )
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
