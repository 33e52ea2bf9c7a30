"""Query heads that share keys and values: the maps are those of the same function with keys and values repeated."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow
from test_contract import METHODS
from test_programs import QUOTIENTS

import tokentm_jax as tm
from tokentm_jax.programs import pieces
from tokentm_jax.programs.model import Function

N, E, DEPTH, CLASSES = 6, 4, 2, 5
TARGET = jnp.array([1, 4], jnp.int32)


def fused(q, k, v, causal):
    with jax.numpy_dtype_promotion("standard"):  # it promotes float64 with float32
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def masked(scores, causal):
    """Scores [.., T, S] without later tokens."""
    return jnp.where(jnp.tril(jnp.ones((N, N), bool)), scores, -1e9) if causal else scores


def einsum(q, k, v, causal, axes="BTKGS"):
    """Grouped queries as Gemma writes them, or with the axes of the weights in another order."""
    b, t, _, e = q.shape
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(b, t, k.shape[2], -1, e), k) * e**-0.5
    scores = jnp.einsum(f"BKGTS->{axes}", masked(scores, causal))
    attention = jax.nn.softmax(scores, axes.index("S"))
    return jnp.einsum(f"{axes},BSKH->BTKGH", attention, v).reshape(q.shape)


def one_key_head(q, k, v, causal):
    """Multi-query attention: keys and values have no axis of heads."""
    scores = masked(jnp.einsum("BTGH,BSH->BGTS", q, k[:, :, 0]) * E**-0.5, causal)
    return jnp.einsum("BGTS,BSH->BTGH", jax.nn.softmax(scores), v[:, :, 0])


WRITTEN = {"fused": fused, "einsum": einsum, "one_key_head": one_key_head}
WRITTEN |= {axes: partial(einsum, axes=axes) for axes in ("BGTKS", "BGKTS", "BSGKT", "BKTGS", "GSBTK")}


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def program(written, keys, groups, causal=False, scan=False, dtype: Any = np.float32):
    """(grouped function, the same with keys and values repeated, parameters, images [2, 8, 12, 3])."""
    rng = np.random.default_rng(0)
    d = keys * groups * E
    w = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.2, dtype)  # noqa: E731
    blocks = {
        "q": w(DEPTH, d, d),
        "k": w(DEPTH, d, keys * E),
        "v": w(DEPTH, d, keys * E),
        "v_bias": w(DEPTH, keys * E),
    }
    blocks |= {"out": w(DEPTH, d, d), "up": w(DEPTH, d, d), "down": w(DEPTH, d, d), "scale": 1 + w(DEPTH, d)}
    params = {"embed": w(48, d), "position": w(N, d), "head": w(d, CLASSES), "blocks": blocks}

    def forward(attend, params, images):
        b = len(images)
        heads = lambda x: x.reshape(b, N, -1, E)  # noqa: E731

        def block(x, p):
            y = norm(x, p["scale"])
            mixed = attend(heads(y @ p["q"]), heads(y @ p["k"]), heads(y @ p["v"] + p["v_bias"]), causal)
            x = x + mixed.reshape(b, N, d) @ p["out"]
            return x + jax.nn.gelu(norm(x, 1) @ p["up"]) @ p["down"], None

        x = images.reshape(b, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, N, 48)
        x = x @ params["embed"] + params["position"]
        if scan:
            x, _ = jax.lax.scan(block, x, params["blocks"])
        else:
            for l in range(DEPTH):
                x, _ = block(x, jax.tree.map(lambda a: a[l], params["blocks"]))  # noqa: B023
        return norm(x[:, -1], 1) @ params["head"]

    def repeated(q, k, v, causal):
        k, v = (jnp.repeat(a, groups, 2) for a in (k, v))
        if written == "fused":  # its softmax is in float32, also for float64
            return fused(q, k, v, causal)
        scores = masked(jnp.einsum("bqhd,bkhd->bhqk", q, k) * E**-0.5, causal)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    images = rng.normal(size=(2, 8, 12, 3)).astype(dtype)
    return partial(forward, WRITTEN[written]), partial(forward, repeated), params, images


def compare(method, written, keys, groups, causal=False, scan=False, dtype: Any = np.float32, alone=False, **options):
    grouped, repeated, params, images = program(written, keys, groups, causal, scan, dtype)
    explain, expect = (jax.jit(tm.explain_fn(f, method, **options)) for f in (grouped, repeated))
    maps, expected = explain(params, images, TARGET), expect(params, images, TARGET)
    largest = np.abs(expected).max()
    assert largest > 0 and maps.dtype == expected.dtype
    tolerance = 1e-12 if dtype == np.float64 else 1e-3 if method in QUOTIENTS else 2e-6
    np.testing.assert_allclose(maps, expected, rtol=0, atol=tolerance * largest)
    if alone:
        np.testing.assert_allclose(
            explain(params, images[1:], TARGET[1:])[0], maps[1], rtol=0, atol=tolerance * largest
        )


# Two groups of three; as many groups as tokens; one head of keys.
SHAPES = [(2, 3), (2, N), (1, N), (N, N)]
CASES = [(w, *shape, causal) for w in WRITTEN for shape in SHAPES for causal in (False, True)]
CASES = [case for case in CASES if case[0] != "one_key_head" or case[1] == 1]


QUICK = [("fused", 2, N, True), ("BSGKT", 2, N, False)]


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK), ids=str)
def test_what_is_found(case):
    grouped, repeated, params, images = program(*case)
    found, expected = (Function(f).read(params, images).structure for f in (grouped, repeated))
    assert (found.depth, found.heads, found.tokens) == (DEPTH, case[1] * case[2], N)
    assert (found.readout, found.grid, found.prefix) == (expected.readout, (2, 3), 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_of_the_blocks(case):
    """All arrays of `tm.capture`: queries, not groups, also where there are as many; and heads in one order."""
    with jax.enable_x64(True):
        grouped, repeated, params, images = program(*case, dtype=np.float64)
        found, expected = (jax.jit(partial(tm.capture, f))(params, images, TARGET) for f in (grouped, repeated))
        assert found.attention.shape == (DEPTH, 2, case[1] * case[2], N, N)
        for name in tm.Trace._fields:
            own, its = getattr(found, name), getattr(expected, name)
            scale = max([1.0, *(float(np.abs(a).max()) for a in jax.tree.leaves(its))])
            jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-12 * scale, err_msg=name), own, its)


def test_tokentm():
    compare("tokentm", "fused", 2, N, causal=True, scan=True)


OTHERS = [name for name in METHODS if name != "token_dropping"]
OPTIONS = [{"heads": "each"}, {"transformed": "linear"}, {"transformed": "linear", "heads": "each"}]
OPTIONS += [{"transformed": "stream"}, {"original": "normalised"}, {"attention": "means"}, {"attention": "plain"}]
OPTIONS += [{"weights": "alignment"}, {"memory": "recompute"}, {"rules": "attn_lrp"}, {"rules": "libra"}]


@pytest.mark.slow
@pytest.mark.parametrize("written", ["fused", "einsum", "GSBTK"])
@pytest.mark.parametrize("method", [*OTHERS, *OPTIONS], ids=str)
def test_methods(method, written, briefly):
    """As many groups as tokens, causal and not, in float32, and the einsums in float64."""
    name, options = ("tokentm", method) if isinstance(method, dict) else (method, METHODS[method])
    compare(name, written, 2, N, causal=written == "fused", scan=written == "einsum", alone=True, **options)
    if written != "fused":
        with jax.enable_x64(True):
            compare(name, written, 2, N, causal=True, dtype=np.float64, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "gae", "libra_full_grad", "attn_lrp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_pieces(monkeypatch, case, method):
    """Attention in pieces of queries; whole where it is not understood."""
    grouped, _, params, images = program(*case)
    maps = []
    for size in (2**30, 2 * case[1] * case[2] * N):
        monkeypatch.setattr(pieces, "LARGE", size)
        monkeypatch.setattr(pieces, "ENTRIES", size)
        maps.append(jax.jit(tm.explain_fn(grouped, method))(params, images, TARGET))
    np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-5 * np.abs(maps[0]).max())
