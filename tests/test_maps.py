"""The maps of methods, and what `capture` returns, are those that were saved before (`goldens/maps.npz`).

They show whether a change of the package changes its results. Make them again only where a change is meant:

    python tests/goldens/make_maps.py
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch, tiny_bert
from test_contract import KINDS, METHODS, TARGET, model_of

import tokentm_jax as tm
from tokentm_jax.methods.explain import explain_fn

TEXTS = {
    "text": {},  # the first token, through a pooler with tanh
    "text_average_pooled": {"pool": "avg", "pooler": None},
    "text_electra": {"embedding_size": 8, "pooler": "gelu"},
}
IMAGE, TEXT = "class_token", "text"  # the kinds of most options
CAPTURED = (IMAGE, "attention_pooled_rotary_gated", TEXT)
QUICK = (IMAGE, "registers_average_pooled", "attention_pooled_rotary_gated", TEXT)  # of tokentm, in float32


def along_gradient(original, transformed, gradient):
    """A custom weight of TokenTM: the share of a token's change along the gradient of the score."""
    length = jnp.sqrt(jnp.square(original).sum(-1) * jnp.square(gradient).sum(-1))
    return jnp.abs((transformed * gradient).sum(-1)) / (length + 1e-6)


TOKENTM = [
    *({"direction": name} for name in ("softmax", "cosine", "none")),
    *({name: False} for name in ("length", "initialise", "ffn", "norms")),
    *({"attention": name} for name in ("means", "plain")),
    *({"heads": "each", "transformed": name} for name in ("value", "linear")),
    *({"transformed": name} for name in ("linear", "stream")),
    {"original": "normalised"},
    {"original": "normalised", "transformed": "linear"},
    {"ffn_transformed": "stream"},
    *({"weights": name} for name in ("entropy", "alignment", "distance_from_mean")),
    {"weights": along_gradient},
    {"weights": "alignment", "attention": "plain"},
    {"first_block": 1},
    {"end_block": 1},
    {"memory": "recompute"},
    *tm.configs.READINGS.values(),
]
BOTH = [  # methods with options, on images and on texts
    *(("tokentm", options) for options in TOKENTM),
    ("gae", {"first_block": 1}),
    ("gae", {"memory": "recompute"}),
    ("legrad", {"first_block": 1}),
    *(("beyond_intuition", {"steps": 2, **more}) for more in ({"variant": "token"}, {"from_zero": True})),
    ("conservative_lrp", {"activation": "gradient"}),
    *((method, {"pixels": True}) for method in ("conservative_lrp", "attn_lrp", "res_lrp")),
    ("res_lrp", {"gamma": 0.5}),
    *((method, {"stabiliser": "reference"}) for method in ("lrp", "partial_lrp", "transformer_attribution")),
    ("transformer_attribution", {"first_block": 1}),
    *(("rollout", options) for options in ({"fusion": "max"}, {"fusion": "min"}, {"normalise": False})),
    *(
        (method, {"rules": rules})
        for method in ("tokentm", "attcat", "gradient_x_input")
        for rules in ("libra", "attn_lrp")
    ),
    ("combination", {"methods": "tokentm,gae,legrad,attn_lrp", "gradient": "attn_lrp"}),
    ("combination", {"methods": "tokentm,grad_cam", "how": "mean"}),
    ("tokentm_mix", {"gradient": "conservative_lrp"}),
]
FORMER = {"methods": "libra_tokentm,conservative_lrp,libra_full_grad,legrad", "power": 1.0}  # as the mix was saved
METHODS_OF_TEXTS = {name: options for name, options in METHODS.items() if name not in ("rise", "kernel_shap")}
METHODS_OF_TEXTS |= {"occlusion": {}, "token_dropping": {}}  # words are removed one by one
ALL = [
    *((kind, method, options) for kind in KINDS for method, options in METHODS.items()),
    *((kind, method, options) for kind in TEXTS for method, options in METHODS_OF_TEXTS.items()),
    *((kind, method, options) for kind in (IMAGE, TEXT) for method, options in BOTH),
    (IMAGE, "legrad", {"read": "mean"}),
    ("attention_pooled_rotary_gated", "legrad", {"read": "pool"}),
    (TEXT, "conservative_lrp", {"pooler": "gradient"}),
]


def name_of(kind, method, options):
    """Such as "text/tokentm,ffn=False"."""
    values = (f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())
    return f"{kind}/{','.join([method, *values])}"


CASES = {name_of(*case): case for case in ALL}
del CASES["attention_pooled_rotary_gated/token_dropping,window=2"]  # which refuses it
CASES |= {f"{kind}/capture": (kind, "capture", {}) for kind in CAPTURED}
RUNS = [
    (name, dtype) for name in CASES for dtype in ("float32", "float64") if (name[:8], dtype[-2:]) != ("bfloat16", "64")
]


@functools.cache
def model(kind):
    """(module, random parameters, inputs)."""
    return (*tiny_bert(**TEXTS[kind]), batch([5, 8, 4], 8)) if kind in TEXTS else model_of(kind)


def parameters(tree):
    """[(name, array)] of a tree of parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), array) for path, array in leaves]


def results(name, dtype, params):
    """name of an array -> the array of a case: maps of all samples, but of images' pixels those of one, for space."""
    kind, method, options = CASES[name]
    module, _, inputs = model(kind)
    target = np.array([0, 1, 2], np.int32) if kind in TEXTS else TARGET
    # In float64 a few constants are of 32 bits (the angles of rotary positions, counts of tokens).
    promotion = "standard" if dtype == "float64" else "strict"
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion(promotion):
        floats = lambda a: np.asarray(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
        params, inputs = jax.tree.map(floats, (params, inputs))
        if method == "capture":
            trace = jax.jit(lambda *arguments: tm.capture(module, *arguments))(params, inputs, target)
            found = {field: array for field, array in trace._asdict().items() if array is not None}
        else:
            options = {**FORMER, **options} if method == "tokentm_mix" else options
            maps = jax.jit(explain_fn(module, method, **options))(params, inputs, target)
            found = {"maps": maps[1:2] if maps.shape[1:] == (16, 24) else maps}
    return {field: np.asarray(array) for field, array in found.items()}


@functools.cache
def goldens():
    return dict(np.load(Path(__file__).parent / "goldens/maps.npz"))


@functools.cache
def saved_params(kind):
    """The saved parameters: random ones have another last digit on another machine, which float64 shows."""
    tree = model(kind)[1]
    return jax.tree.unflatten(
        jax.tree.structure(tree), [goldens()[f"{kind}/params/{name}"] for name, _ in parameters(tree)]
    )


def missing():
    """The (name, dtype) of the cases that are not saved."""
    saved = {key.rpartition("/")[0] for key in goldens()}
    return [(name, dtype) for name, dtype in RUNS if f"{name}/{dtype}" not in saved]


def test_every_case_is_saved():
    assert missing() == []


TOLERANCES = {"float32": (1e-5, 1e-3), "float64": (1e-9, 1e-6)}  # of the largest absolute value; for quotients
QUOTIENTS = ("lrp", "partial_lrp", "transformer_attribution", "res_lrp")  # divide by sums that may be near zero


def tolerance(name, dtype):
    kind, method, _ = CASES[name]
    if kind == "bfloat16":
        return 5e-2
    if kind == "text_average_pooled" and method in QUOTIENTS:
        return 2e-3  # the saved maps took a stabiliser of each channel of the pooled mean, and not of the sample
    if method == "combination" and dtype == "float32":
        return 1e-2  # the range of a member is almost zero, and what is divided by it has errors of 2e-3 from rounding
    return TOLERANCES[dtype][method in QUOTIENTS]


def marks(name, dtype):
    kind, method, _ = CASES[name]
    if kind == "bfloat16" and method in ("rollout", "grad_cam_tokens"):
        reason = "a rounding in bfloat16 changes which attentions are discarded, or a sign"
        return pytest.mark.slow, pytest.mark.skip(reason=reason)
    quick = kind in QUICK and name.endswith("/tokentm") and dtype == "float32"
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(("name", "dtype"), [pytest.param(*run, marks=marks(*run)) for run in RUNS])
def test_maps(name, dtype):
    prefix = f"{name}/{dtype}/"
    expected = {key.removeprefix(prefix): array for key, array in goldens().items() if key.startswith(prefix)}
    found = results(name, dtype, saved_params(CASES[name][0]))
    assert found.keys() == expected.keys()
    for field, array in expected.items():
        assert found[field].dtype == array.dtype
        largest = float(np.abs(array).max())
        np.testing.assert_allclose(
            found[field],
            array,
            rtol=0,
            atol=tolerance(name, dtype) * largest,
            err_msg=f"{field} (up to {largest:.1e})",
        )
