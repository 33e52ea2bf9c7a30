"""The kernels of attention against attention written out, the programs that use them, and their lowering."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from conftest import mostly_slow
from test_contract import TARGET, model_of
from test_pieces import IN_PIECES, H, N, program, read

from tokentm_jax.errors import InputError
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.programs import kernel
from tokentm_jax.programs.fused import fused_of
from tokentm_jax.programs.model import Function

# (queries, keys, channels), and whether there is a mask
CASES = [
    ((50, 50, 64), True),
    ((7, 7, 8), False),
    ((197, 197, 16), False),
    ((33, 70, 80), True),
    ((130, 5, 24), False),
]


def tile_of(device, *sides, bytes_each=4):
    tile = kernel.cuda_tile(*sides) if device == "cuda" else kernel.tpu_tile(*sides, bytes_each)
    return tile._replace(params=None, interpret=True)


def heads(sides, dtype, masked, count=2):
    """Arrays of some heads, with a mask that leaves each query at least one key."""
    queries, keys, channels = sides
    rng = np.random.default_rng(0)
    shapes = [(queries, channels), (keys, channels), (keys, channels), (queries, channels)]
    arrays = [jnp.asarray(rng.normal(size=(count, *shape)), dtype) for shape in shapes]
    row = jnp.asarray(rng.uniform(size=queries), jnp.float32)
    hidden = (rng.uniform(size=(queries, keys)) < 0.3) & (np.arange(keys) > 0)
    return *arrays, row, jnp.asarray(np.where(hidden, np.finfo(np.float32).min / 2, 0)) if masked else None


def written_out(q, k, v, dtokens, row, bias, scale):
    """Results of heads by automatic differentiation of attention, in float64."""
    q, k, v, dtokens, row = (jnp.asarray(x, jnp.float64) for x in (q, k, v, dtokens, row))

    def weights(q, k):
        scores = jnp.einsum("hqe,hke->hqk", q, k) * scale
        return jax.nn.softmax(scores if bias is None else scores + jnp.asarray(bias, jnp.float64))

    attention, to_scores = jax.vjp(weights, q, k)
    tokens, to_weights = jax.vjp(lambda a, v: jnp.einsum("hqk,hke->hqe", a, v), attention, v)
    gradient, dv = to_weights(dtokens)
    part = jnp.einsum("q,hqk->hk", row, jax.nn.relu(attention * gradient))
    return [np.asarray(x) for x in (tokens, *to_scores(gradient), dv, part)]


@pytest.mark.parametrize("dtype", mostly_slow(("float32", "bfloat16"), ("float32",)))
@pytest.mark.parametrize("device", ["cuda", "tpu"])
@pytest.mark.parametrize("case", mostly_slow(CASES, CASES[:1]))
def test_kernels_are_attention(case, device, dtype):
    sides, masked = case
    q, k, v, dtokens, row, bias = heads(sides, dtype, masked)
    scale, tile = sides[2] ** -0.5, tile_of(device, *sides)

    @jax.vmap
    def found(q, k, v, dtokens):
        tokens, logsumexp = kernel.forward(q, k, v, bias, scale, tile)
        return tokens, *kernel.backward(q, k, v, bias, tokens, logsumexp, dtokens, row, scale, tile)

    found = found(q, k, v, dtokens)
    with jax.enable_x64(True):
        expected = written_out(q, k, v, dtokens, row, bias, scale)
    for name, own, other in zip(("tokens", "dq", "dk", "dv", "part"), found, expected, strict=True):
        assert own.dtype == (jnp.float32 if name == "part" else dtype)
        tolerance = 2e-6 if dtype == "float32" else 1e-2
        difference = np.abs(np.asarray(own, np.float64) - other).max()
        assert difference <= tolerance * np.abs(other).max(), name


def test_the_plain_form_is_attention():
    q, k, v, dtokens, row, bias = heads((5, 6, 4), "float32", True)
    with jax.enable_x64(True):
        expected = written_out(q, k, v, dtokens, row, bias, 0.5)
    for head in range(len(q)):
        given = q[head], k[head], v[head], bias
        tokens, logsumexp = kernel.plain_forward(*given, 0.5)
        found = tokens, *kernel.plain_backward(*given, tokens, logsumexp, dtokens[head], row, 0.5)
        for own, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(own, other[head], atol=2e-6)


# ---- which programs -------------------------------------------------------------------------------------------------

FUSED = {"plain", "queries_first", "keys_first", "causal", "grouped", "written_out"}


@pytest.mark.parametrize("name", [*IN_PIECES, "over_queries"])
def test_which_attention_is_fused(name):
    found = fused_of(read(*program(name)))
    assert len(found) == (name in FUSED)
    for fused in found.values():
        assert fused.streams == (H, N)


SHOWN = np.tril(np.ones((N, N), bool))
BIAS = np.random.default_rng(1).normal(size=(N, N)).astype(np.float32)
SOFTMAXES = {  # of scores, and whether the kernel can compute it
    "masked first": (lambda s: jax.nn.softmax(jnp.where(~SHOWN, -jnp.inf, s)), True),
    "biased, then scaled": (lambda s: jax.nn.softmax((s * 0.5 - BIAS) / 3 + BIAS[:, :1]), True),
    "masked, then scaled": (lambda s: jax.nn.softmax(2 * jnp.where(SHOWN, s, -1e9) + BIAS), True),
    "masked by a key": (lambda s: jax.nn.softmax(jnp.where(SHOWN[3], s, jnp.finfo(s.dtype).min)), True),
    "masked exponentials": (lambda s: jax.nn.softmax(s, where=SHOWN), False),
    "masked by too little": (lambda s: jax.nn.softmax(jnp.where(SHOWN, s, -10.0)), False),
    "masked, then scaled to little": (lambda s: jax.nn.softmax(jnp.where(SHOWN, s, -1e9) * 1e-9), False),
    "capped": (lambda s: jax.nn.softmax(5 * jnp.tanh(s / 5)), False),
    "over queries": (lambda s: jax.nn.softmax(s, axis=-2), False),
    "scaled by head": (lambda s: jax.nn.softmax(s * BIAS[:H, 0, None, None]), False),
}


def attending(softmax):
    """A function of tokens [B, N, 8] with one attention of two heads."""

    def f(params, tokens):
        q, k, v = jnp.moveaxis((tokens @ params).reshape(*tokens.shape[:2], 3, H, -1), 2, 0)
        return jnp.einsum("bhqk,bkhe->bqhe", softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k)), v)

    rng = np.random.default_rng(0)
    return f, *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 24), (2, N, 8)))


@pytest.mark.parametrize("name", SOFTMAXES)
def test_which_softmax_is_fused(name):
    softmax, expected = SOFTMAXES[name]
    assert len(fused_of(read(*attending(softmax)))) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, fused) in SOFTMAXES.items() if fused])
def test_a_fused_softmax_is_the_same(name):
    f, params, tokens = attending(SOFTMAXES[name][0])
    fused = Function(f, fused_attention=True).read(params, tokens)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(2, N, H, 4)), jnp.float32)
    both = []
    for run in (partial(f, params), lambda tokens: fused.apply({"params": params}, tokens)):
        outputs, back = jax.vjp(run, tokens)
        both.append((outputs, *back(direction)))
    for expected, found in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", mostly_slow(IN_PIECES, []))
def test_programs_with_fused_attention(name):
    f, *arrays = program(name)
    params, tokens = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
    method = "input_gradient" if name == "grouped" else "tokentm"  # its heads share keys: no attention layer
    options = {"grid": (2, 3), "prefix": 1, "readout": "token"}
    maps = [explain_fn(f, method, fused_attention=on, **options)(params, tokens, 1) for on in (False, True)]
    np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-5 * np.abs(maps[0]).max())


METHODS = [("tokentm", {}), ("tokentm", {"heads": "each", "memory": "recompute"}), ("gae", {}), ("input_gradient", {})]
METHODS += [("tokentm", {"attention": "plain"}), ("libra_tokentm", {}), ("attn_lrp", {}), ("legrad", {})]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("kind", ["class_token", "attention_pooled_rotary_gated", "bfloat16"])
def test_methods_with_fused_attention(kind, method, options):
    module, params, inputs = model_of(kind)
    explainers = [explain_fn(module, method, fused_attention=on, **options) for on in (False, True)]
    maps = [np.asarray(explain(params, inputs, TARGET % 3), np.float32) for explain in explainers]
    tolerance = 3e-2 if kind == "bfloat16" else 1e-5
    np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=tolerance * np.abs(maps[0]).max())


@pytest.mark.slow
def test_fused_maps_have_no_derivative():
    module, params, inputs = model_of("class_token")
    explain = explain_fn(module, "gae", fused_attention=True)
    with pytest.raises(InputError, match="fused_attention have no derivative"):
        jax.grad(lambda x: explain(params, x, 1).sum())(inputs)


# ---- lowering, without a device -------------------------------------------------------------------------------------

CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
TOKENS = 43
MODULE = ViT(img_size=(48, 56), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


needs_old_jaxlib = pytest.mark.skipif(
    tuple(map(int, jaxlib.__version__.split(".")[:2])) > (0, 10), reason="newer ones lower for cuda only where it is"
)


def lowered(platform, method, dtype, fused, **options):
    """The program of a method for a platform that need not be here."""
    module = MODULE.clone(dtype=dtype)
    params = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    explain = jax.jit(partial(explain_fn(module, method, fused_attention=fused, **options), target=1))
    images = jax.ShapeDtypeStruct((2, *module.img_size, 3), jnp.float32)
    return explain.trace(params, images).lower(lowering_platforms=(platform,)).as_text()


def holds_attention(text):
    """Whether an array of a program has two axes of tokens."""
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    return any(shape.split("x").count(str(TOKENS)) > 1 for shape in shapes)


@pytest.mark.parametrize(
    ("method", "dtype", "options"),
    [
        ("tokentm", "bfloat16", {}),
        pytest.param("tokentm", None, {"memory": "recompute"}, marks=pytest.mark.slow),
        pytest.param("gae", None, {}, marks=pytest.mark.slow),
        pytest.param("input_gradient", "bfloat16", {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("platform", [pytest.param("cuda", marks=needs_old_jaxlib), "tpu"])
def test_nothing_of_the_size_of_attention_in_a_lowered_program(platform, method, dtype, options):
    text = lowered(platform, method, dtype, True, **options)
    assert text.count(CALLS[platform]) >= 3  # forward, and backward by queries and by keys
    assert not holds_attention(text)


@pytest.mark.slow
@needs_old_jaxlib
def test_a_lowered_program_without_fused_attention_holds_it():
    text = lowered("cuda", "tokentm", None, False)
    assert CALLS["cuda"] not in text
    assert holds_attention(text)


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (7, 7), (50, 50), (197, 197), (577, 64), (4097, 4097)])
def test_tiles(queries, keys):
    for channels in (8, 64, 72, 80, 128):
        size, width, params, _ = kernel.cuda_tile(queries, keys, channels)
        assert size & (size - 1) == 0 and width & (width - 1) == 0  # Triton's shapes are powers of two
        assert size >= 16 and width >= max(16, channels)  # of a product, the least
        # Arrays in shared memory: one block, and two tiles of two stages, in float32. An SM of an A100 has 163 KiB.
        assert (1 + params.num_stages) * 2 * size * width * 4 <= 160 * 2**10
        for bytes_each in (2, 4):
            tile = kernel.tpu_tile(queries, keys, channels, bytes_each)
            assert tile.size % 128 == 0  # tiles are [keys, queries]: rows of 128 lanes
            assert tile.channels == channels  # all of an axis
    assert kernel.tpu_tile(50_000, 50_000, 64, 4) is None  # does not fit into VMEM


@pytest.mark.slow
def test_the_benchmark_resumes(tmp_path):
    """On a small model: four rows, of which a second run measures none."""
    script, table = Path(__file__).parent / "benchmark" / "gpu.py", tmp_path / "gpu.md"

    def run(*options):
        command = [sys.executable, str(script), "--out", str(table), "--state", str(tmp_path / "state.json"), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "no GPU" in run().stderr
    assert run("--smoke", "--row-seconds", "0").stderr.count("smoke") == 4
    rows = [line.split(" | ") for line in table.read_text().splitlines() if line.startswith("| smoke")]
    assert [row[3] for row in rows] == ["plain", "kernel"] * 2
    assert all(float(row[8].strip(" |")) > 0.999 for row in rows if row[3] == "kernel")
    again = run("--smoke", "--row-seconds", "0")
    assert again.returncode == 0
    assert "smoke" not in again.stderr
    assert len(table.read_text().splitlines()) >= 4
