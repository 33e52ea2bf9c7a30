"""What capture promises: nothing for free inference, what the module sows, every type, any module."""

from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow

import tokentm_jax as tm
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.programs.capture import capture

FIELDS: dict[str, Any] = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def vit():
    module = ViT(**FIELDS, depth=2)
    return module, jax.tree.map(lambda a: a * 8, init_params(module, jax.random.key(0)))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_inference_stores_nothing_and_compiles_one_block(vit):
    module, params = vit
    deep = ViT(**FIELDS, depth=9)
    programs = [
        jax.make_jaxpr(lambda p, x, m=m: m.apply({"params": p}, x))(p, IMAGES).jaxpr
        for m, p in ((module, params), (deep, init_params(deep, jax.random.key(0))))
    ]
    scans = [e for e in equations(programs[1]) if e.primitive.name == "scan"]
    assert len(scans) == 1
    assert all(out.aval.shape[0] != 9 for out in scans[0].outvars)  # no output is stacked over blocks
    assert len(list(equations(programs[0]))) == len(list(equations(programs[1])))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_types(vit, dtype):
    module, params = vit
    trace = jax.jit(lambda p, x: capture(module.clone(dtype=dtype), p, x))(params, IMAGES)
    l, b, h, n, d = 2, 2, 2, 7, 8
    shapes = {
        "tokens": (l + 1, b, n, d),
        "token_grads": (l + 1, b, n, d),
        "input_grads": (b, 8, 12, 3),
        "attention": (l, b, h, n, n),
        "attention_grad": (l, b, h, n, n),
        "normalised": (l, b, n, d),
        "normalised_grads": (l, b, n, d),
        "value": (l, b, h, n, d // h),
        "transformed_value": (l, b, n, d),
        "attention_branch": (l, b, n, d),
        "ffn_branch": (l, b, n, d),
        "logits": (b, 3),
        "score": (b,),
        "target": (b,),
    }
    assert {name: a.shape for name, a in trace._asdict().items() if a is not None} == shapes
    assert trace.attention.dtype == dtype and trace.attention_grad.dtype == dtype
    assert trace.logits.dtype == jnp.float32
    wide = np.asarray(trace.attention, np.float32)
    np.testing.assert_allclose(wide.sum(-1), 1, atol=1e-5 if dtype == jnp.float32 else 2e-2)
    after = wide_sum(trace.tokens[:-1], trace.attention_branch, trace.ffn_branch)
    np.testing.assert_allclose(
        after, np.asarray(trace.tokens[1:], np.float32), atol=1e-5 if dtype == jnp.float32 else 0.1
    )


def wide_sum(*arrays):
    return sum(np.asarray(a, np.float32) for a in arrays)


def test_only_what_is_asked_for_is_differentiated(vit):
    """Before any compiler has seen it: the backward pass gives one array for each point, and one for the inputs."""
    module, params = vit

    def outputs(*fields):
        traced = jax.make_jaxpr(lambda p, x: capture(module, p, x, None, fields))(params, IMAGES)
        return sum(len(e.outvars) for e in equations(traced.jaxpr) if e.primitive.name == "scan")

    assert outputs() < outputs("attention_grad") < outputs("attention_grad", "token_grads", "normalised_grads")


def in_pairs(module):
    """A ViT of four blocks, two in each iteration of its scan."""

    def function(params, images):
        def pair(x, weights):
            for l in range(2):
                x, _ = module.block().apply({"params": jax.tree.map(itemgetter(l), weights)}, x)
            return x, None

        x = module.apply({"params": params}, images, method="embed")
        blocks = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), params["blocks"])
        return module.apply({"params": params}, jax.lax.scan(pair, x, blocks)[0], method="classify")

    return function


def half_scanned(module):
    """A ViT of four blocks, of which the last two are not in its scan."""

    def function(params, images):
        def block(x, weights):
            return module.block().apply({"params": weights}, x)[0], None

        x = module.apply({"params": params}, images, method="embed")
        x, _ = jax.lax.scan(block, x, jax.tree.map(lambda a: a[:2], params["blocks"]))
        for l in (2, 3):
            x, _ = block(x, jax.tree.map(itemgetter(l), params["blocks"]))
        return module.apply({"params": params}, x, method="classify")

    return function


READ = ("attention", "attention_grad", "normalised_grads", "tokens", "token_grads", "final_tokens", "input_grads")


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        pytest.param(kind, first, marks=[] if (kind, first) == ("scanned", 3) else pytest.mark.slow)
        for kind in ("scanned", "in pairs", "half scanned")
        for first in (1, 3)
    ],
)
def test_the_blocks_from_one_on_are_those_of_all(kind, first):
    module = ViT(**FIELDS, depth=4)
    params = jax.tree.map(lambda a: a * 8, init_params(module, jax.random.key(0)))
    function: Any = {"scanned": lambda m: m, "in pairs": in_pairs, "half scanned": half_scanned}[kind](module)
    full, some = (
        jax.jit(lambda p, x, first=first: capture(function, p, x, None, READ, first_block=first))(params, IMAGES)
        for first in (0, first)
    )
    for name in ("attention", "attention_grad", "normalised_grads", "tokens", "token_grads"):
        expected = getattr(full, name)[first:]
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(getattr(some, name), expected, rtol=0, atol=1e-6 * largest, err_msg=name)
    np.testing.assert_allclose(some.input_grads, full.input_grads, rtol=0, atol=1e-6 * jnp.abs(full.input_grads).max())


def test_a_first_block_that_the_model_does_not_have_is_refused(vit):
    module, params = vit
    with pytest.raises(tm.InputError, match="'first_block' must be from 0 to 1 for this model, got 2"):
        capture(module, params, IMAGES, first_block=2)


@pytest.mark.parametrize("kind", mostly_slow(["pre-norm", "post-norm"], ["pre-norm"]))
def test_what_is_read_from_the_program_is_what_the_module_sows(vit, kind):
    module, params = vit
    inputs: Any = IMAGES
    if kind == "post-norm":
        module = tm.models.Bert(20, 8, embed_dim=8, depth=2, num_heads=2, mlp_hidden=16, num_classes=3)
        params = jax.tree.map(lambda a: a * 8, init_params(module, jax.random.key(0)))
        ids = jnp.array([[3, 7, 1, 12, 4], [5, 6, 0, 0, 0]], jnp.int32)
        inputs = tm.inputs.Tokens(ids, ids > 0, 0 * ids, ids < 0)
    names = ("tokens", "normalised", "attention", "value", "transformed_value", "attention_branch", "ffn_branch")
    names += ("middle", "after") if kind == "post-norm" else ("value_kernel", "output_kernel")
    sown = module.apply({"params": params}, inputs, mutable=["intermediates"])[1]["intermediates"]["blocks"]
    trace = jax.jit(lambda p, x: capture(module, p, x, None, names))(params, inputs)
    for name in names:
        (expected,) = {**sown, **sown["attn"]}[name]
        np.testing.assert_allclose(getattr(trace, name), expected, rtol=1e-5, atol=1e-6, err_msg=name)


class Unrolled(nn.Module):
    """Somebody else's ViT: its blocks are modules of their own, without a scan."""

    vit: ViT

    grid = property(lambda self: self.vit.grid)
    prefix = property(lambda self: self.vit.prefix)
    readout = property(lambda self: self.vit.readout)

    @nn.compact
    def __call__(self, images):
        x = self.vit.embed(images)
        for l in range(3):
            x, _ = self.vit.block().clone(name=f"block_{l}", parent=self)(x)
        return self.vit.classify(x)


@pytest.mark.parametrize("method", mostly_slow(["tokentm", "legrad", "lrp", "libra_full_grad"], []))
def test_a_users_own_module_is_read(briefly, method):
    scanned = ViT(**FIELDS, depth=3)
    params = jax.tree.map(lambda a: a * 8, init_params(scanned, jax.random.key(0)))
    outer = {k: v for k, v in params.items() if k != "blocks"}
    blocks = {f"block_{l}": jax.tree.map(lambda a, l=l: a[l], params["blocks"]) for l in range(3)}
    expected = jax.jit(explain_fn(scanned, method))(params, IMAGES)
    got = jax.jit(explain_fn(Unrolled(scanned), method))({"vit": outer, **blocks}, IMAGES)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_pure_functions_vmap(vit):
    module, params = vit
    function = explain_fn(module, "tokentm")
    target = jnp.array([0, 2], jnp.int32)
    one_by_one = jax.jit(jax.vmap(lambda x, t: function(params, x[None], t[None])[0]))(IMAGES, target)
    np.testing.assert_allclose(one_by_one, jax.jit(function)(params, IMAGES, target), rtol=1e-4, atol=1e-6)


def test_wrong_shapes_say_what_was_expected(vit):
    module, params = vit
    with pytest.raises(ValueError, match=r"images must be \[B, 8, 12, 3\]"):
        explain_fn(module)(params, IMAGES[:, :4])
