"""Attention in pieces of queries against all queries at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch, mostly_slow, tiny_bert
from test_contract import TARGET, model_of
from test_programs import layers_of

from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.programs import pieces
from tokentm_jax.programs.model import Function

N, H, E = 7, 2, 4  # tokens, heads, channels of a head


def attended(name, p, q, k, v):
    """The tokens [N, H, E] of queries, keys and values [N, H, E]."""
    if name == "grouped":  # both heads share keys and values
        attention = jax.nn.softmax(jnp.einsum("qgre,kge->qgrk", q.reshape(N, 1, 2, E), k[:, :1]))
        return jnp.einsum("qgrk,kge->qgre", attention, v[:, :1]).reshape(N, H, E)
    weights = {"queries_first": "qhk", "keys_first": "hkq"}.get(name, "hqk")
    scores = jnp.einsum(f"qhe,khe->{weights}", q, k) * E**-0.5
    if name == "biased":  # by an array, and by the content
        scores = scores + p["bias"] + (q[:, 0] @ k[:, 1].T)[None]
    elif name == "causal":
        scores = jnp.where(jnp.tril(jnp.ones((N, N), bool)), scores, -jnp.inf)
    elif name == "mixed_heads":
        scores = jnp.einsum("hqk,hg->gqk", scores, p["mix"])
    if name == "written_out":
        exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
        attention = exponentials / exponentials.sum(-1, keepdims=True)
    else:
        attention = jax.nn.softmax(scores, axis=weights.index("k"))
    if name == "over_queries":  # which no piece can know
        attention = jnp.where(attention > attention.max(1, keepdims=True) / 2, attention, 0)
    return jnp.einsum(f"{weights},khe->qhe", attention, v)


IN_PIECES = ("biased", "plain", "queries_first", "keys_first", "causal", "mixed_heads", "grouped", "written_out")


def program(name, layers=1):
    """(function, parameters, inputs): attention layers on tokens [B, N, D], without a scan."""
    rng = np.random.default_rng(0)
    shapes = {"qkv": (H * E, 3 * H * E), "bias": (H, N, N), "mix": (H, H), "head": (H * E, 3)}
    params = {key: rng.normal(size=shape) / 2 for key, shape in shapes.items()}

    def f(params, tokens):
        def one(x):
            for _ in range(layers):
                q, k, v = jnp.moveaxis((x @ params["qkv"]).reshape(N, 3, H, E), 1, 0)
                x = x + attended(name, params, q, k, v).reshape(N, H * E)
            return x[0] @ params["head"]

        return jax.vmap(one)(tokens)

    return f, params, rng.normal(size=(2, N, H * E))


def cut(monkeypatch, entries):
    for name in ("LARGE", "ENTRIES"):
        monkeypatch.setattr(pieces, name, entries)


def with_pieces(monkeypatch, entries, function, *arguments):
    cut(monkeypatch, entries)
    return np.asarray(jax.jit(lambda *a: function(*a))(*arguments))


def compare(monkeypatch, function, *arguments, entries=3 * H * N, tolerance=1e-5):
    """In pieces (by default of 3, 3 and 1 queries of 7) as all at once."""
    whole, found = (with_pieces(monkeypatch, size, function, *arguments) for size in (2**30, entries))
    tolerance = 1e-12 if whole.dtype == np.float64 else tolerance
    assert found.dtype == whole.dtype
    np.testing.assert_allclose(found, whole, rtol=0, atol=tolerance * np.abs(whole).max())
    return found


def read(function, params, inputs):
    return Function(function).read(params, inputs).reading


@pytest.mark.parametrize("name", IN_PIECES)
def test_which_attention_is_in_pieces(monkeypatch, name):
    cut(monkeypatch, 3 * H * N)
    (found,) = pieces.pieces_of(read(*program(name))).values()
    assert (found.queries, found.rows, found.count) == (N, 3, 3)
    cut(monkeypatch, H * N * N)
    assert not pieces.pieces_of(read(*program(name)))


def test_which_attention_is_whole(monkeypatch):
    cut(monkeypatch, 3 * H * N)
    assert not pieces.pieces_of(read(*program("over_queries")))


@pytest.mark.parametrize("name", mostly_slow(IN_PIECES, ["biased"]))
def test_pieces_of_programs(monkeypatch, name):
    """TokenTM by other rules; in float64."""
    f, params, tokens = program(name)
    options = {"grid": (2, 3), "prefix": 1, "readout": "token", "rules": "attn_lrp"}
    with jax.enable_x64(True):
        compare(monkeypatch, partial(explain_fn(f, "tokentm", **options), target=1), params, tokens)


IN_RELEVANCE = (
    ("gae", {"rules": "lrp"}),
    ("partial_lrp", {"stabiliser": "reference"}),
    ("partial_lrp", {}),
    ("transformer_attribution", {}),
    ("beyond_intuition", {"steps": 2}),
    ("beyond_intuition", {"steps": 2, "rules": "attn_lrp"}),
    ("beyond_intuition", {"steps": 2, "variant": "token"}),
)


@pytest.mark.parametrize("name", mostly_slow([name for name in IN_PIECES if name != "causal"], ["plain"]))
@pytest.mark.parametrize("method", mostly_slow(IN_RELEVANCE, IN_RELEVANCE[:1]))
def test_pieces_of_relevance(monkeypatch, name, method):
    """Rules that need means over the whole sample, and heads with weights from all of it; in float64."""
    method, options = method
    f, params, tokens = program(name, layers=2)
    with jax.enable_x64(True):
        explain = explain_fn(f, method, grid=(2, 3), prefix=1, readout="token", **options)
        compare(monkeypatch, partial(explain, target=1), params, tokens)


METHODS = ({}, {"rules": "libra"}, {"memory": "recompute", "heads": "each"}, {"weights": "alignment"})
METHODS += ({"attention": "means"}, {"attention": "plain"}, "gae", "libra_full_grad", "attn_lrp", "pa_lrp", "caap")
METHODS += ("attcat", "legrad", "rollout", "raw_attention", "grad_cam", "libra_grad_cam")
METHODS += ("lrp", "partial_lrp", "transformer_attribution", "beyond_intuition")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["class_token", "attention_pooled_rotary_gated", "bfloat16", "text"])
def test_pieces_of_methods(monkeypatch, kind, method):
    """Images and texts with masks; one sample has the map that it has in a batch."""
    name, options = (method, {}) if isinstance(method, str) else ("tokentm", method)
    module, params, inputs = (*tiny_bert(), batch([5, 9, 4], 9)) if kind == "text" else model_of(kind)
    explain, target = explain_fn(module, name, **options), TARGET % 3
    half = kind == "bfloat16"
    maps = compare(monkeypatch, explain, params, inputs, target, entries=40, tolerance=2e-2 if half else 1e-5)
    single = with_pieces(monkeypatch, 40, explain, params, jax.tree.map(lambda a: a[1:2], inputs), target[1:2])
    # Products of bfloat16 may be blocked in another way, with another rounding.
    np.testing.assert_allclose(single[0], maps[1], rtol=0, atol=(2e-2 if half else 2e-6) * np.abs(maps[1]).max())


ROWS = [("rollout", {"first_block": 1}), ("rollout", {"memory": "recompute", "fusion": "max", "normalise": False})]
ROWS += [("raw_attention", {}), ("grad_cam", {}), ("tokentm", {"attention": "plain", "end_block": 2})]


@pytest.mark.parametrize("scan", [pytest.param(True, marks=pytest.mark.slow), False], ids=["scan", "loop"])
@pytest.mark.parametrize("row", mostly_slow(ROWS, ROWS[:1]), ids=str)
def test_pieces_of_blocks(monkeypatch, row, scan):
    """What reads some blocks of a program, in float64."""
    (method, options), images = row, np.random.default_rng(0).normal(size=(2, 8, 12, 3))
    with jax.enable_x64(True):
        params, forward = layers_of(3, np.random.default_rng(1), scan=scan)
        compare(monkeypatch, partial(explain_fn(forward, method, **options), target=1), params, images, entries=12)


OF_RELEVANCE = [("partial_lrp", {}), ("transformer_attribution", {}), ("beyond_intuition", {"steps": 2})]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [*ROWS, *OF_RELEVANCE], ids=str)
def test_derivatives_in_pieces(monkeypatch, method, options):
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3))
    with jax.enable_x64(True):
        params, forward = layers_of(3, np.random.default_rng(1))
        squares = lambda images: (explain_fn(forward, method, **options)(params, images, 1) ** 2).sum()  # noqa: E731
        compare(monkeypatch, jax.grad(squares), images, entries=12)


def arrays_of(jaxpr):
    """The shapes of all values of a program."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            part = getattr(part, "jaxpr", part)
            yield from arrays_of(part) if hasattr(part, "eqns") else ()


NO_ARRAY = ["tokentm", "gae", "libra_full_grad", "attn_lrp", "conservative_lrp", "input_gradient", "occlusion"]
NO_ARRAY += ["attcat", "libra_attcat", "legrad", "tokentm:attention=plain", "rollout", "raw_attention", "grad_cam"]
NO_ARRAY += ["lrp", "partial_lrp", "transformer_attribution", "beyond_intuition", "res_lrp", "pa_lrp", "libra_tokentm"]
NO_ARRAY += ["grad_cam_tokens", "libra_grad_cam", "caap", "tokentm_mix", "integrated_gradients", "shapley"]
NO_ARRAY += ["tokentm:attention=means", "tokentm:heads=each"]


@pytest.mark.slow
@pytest.mark.parametrize("method", NO_ARRAY)
def test_no_array_of_all_queries(monkeypatch, method):
    """No value of the program has two axes of tokens, except of a few queries."""
    module = ViT(img_size=(48, 56), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    params = init_params(module, jax.random.key(0))
    name, *options = method.split(":")
    chosen = dict(option.split("=") for option in options)
    explain = lambda: explain_fn(module, name, **chosen)  # noqa: E731
    program = lambda: jax.make_jaxpr(explain())(params, jnp.zeros((1, 48, 56, 3)), 1)  # noqa: E731
    assert any(shape.count(43) > 1 for shape in arrays_of(program().jaxpr))
    cut(monkeypatch, 500)
    assert not any(shape.count(43) > 1 for shape in arrays_of(program().jaxpr))
