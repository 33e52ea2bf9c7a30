"""What capture promises: nothing for free inference, any module that sows, every type."""

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
from tokentm_jax.models.capture import capture
from tokentm_jax.models.vit import ViT, init_params

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


class Unrolled(nn.Module):
    """Somebody else's ViT: its blocks are modules of their own, without a scan."""

    vit: ViT
    perturbs: bool = True

    grid = property(lambda self: self.vit.grid)
    prefix = property(lambda self: self.vit.prefix)
    readout = property(lambda self: self.vit.readout)

    @nn.compact
    def __call__(self, images):
        x = self.vit.embed(images)
        for l in range(12):  # more than ten: block_10 comes after block_9
            x, _ = self.vit.block().clone(name=f"block_{l}", parent=self)(x)
        if self.perturbs:
            x = self.perturb("final_tokens", x)
        self.sow("intermediates", "final_tokens", x)
        return self.vit.classify(x)


@pytest.mark.slow
def test_a_users_own_module_is_read(briefly):
    scanned = ViT(**FIELDS, depth=12)
    params = jax.tree.map(lambda a: a * 8, init_params(scanned, jax.random.key(0)))
    outer = {k: v for k, v in params.items() if k != "blocks"}
    blocks = {f"block_{l}": jax.tree.map(lambda a, l=l: a[l], params["blocks"]) for l in range(12)}
    own = {"vit": outer, **blocks}
    expected = jax.jit(explain_fn(scanned, "rollout"))(params, IMAGES)
    silent = Unrolled(scanned, perturbs=False)  # what no method but LRP looks at may be missing
    got = jax.jit(explain_fn(silent, "rollout"))(own, IMAGES)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    with pytest.raises(tm.InputError, match="perturbs no 'final_tokens'"):
        jax.eval_shape(lambda: capture(silent, own, IMAGES))
    for method, message in (("legrad", "forward pass of tm.ViT; Unrolled has its own"), ("lrp", "field 'primitives'")):
        with pytest.raises(tm.InputError, match=message):
            jax.eval_shape(lambda m=method: explain_fn(Unrolled(scanned), m)(own, IMAGES))


class Minimal(nn.Module):
    """A module that shows what the table in `tokentm_jax.models.capture` lists for a few methods, and nothing else.

    Two blocks of one head each on six patches, average pooled, each a Dense layer per projection.
    """

    shown: tuple[str, ...] = ()  # sown
    perturbed: tuple[str, ...] = ()
    grid = (2, 3)
    prefix = 0
    readout = (1 / 6,) * 6

    def show(self, name, value):
        if name in self.perturbed:
            value = self.perturb(name, value)
        if name in self.shown:
            self.sow("intermediates", name, value)
        return value

    @nn.compact
    def __call__(self, images):
        b, d = len(images), 4
        patches = images.reshape(b, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 6, 48)
        x = nn.Dense(d)(patches)
        for block in range(2):
            x = MinimalBlock(self.shown, self.perturbed, name=f"block_{block}")(x)
        return nn.Dense(3)(x.mean(1))


class MinimalBlock(Minimal):
    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        x = self.show("tokens", x)
        normalised = self.show("normalised", nn.LayerNorm()(x))
        query, key, value = (nn.Dense(d, name=name)(normalised) for name in ("query", "key", "v"))
        attention = self.show("attention", nn.softmax(jnp.einsum("bqd,bkd->bqk", query, key))[:, None])
        out = nn.Dense(d, use_bias=False, name="out")
        self.show("transformed_value", out(value))
        branch = self.show("attention_branch", out(jnp.einsum("bhqk,bkd->bqd", attention, value)))
        x = x + branch
        return x + self.show("ffn_branch", nn.Dense(d, name="ffn")(nn.tanh(x)))


CONTRACT = {  # method: (what it needs to be sown, what perturbed)
    "rollout": (("attention",), ()),
    "gae": (("attention",), ("attention",)),
    "grad_cam": (("attention",), ("attention",)),
    "beyond_intuition": (("attention",), ("attention",)),
    "attcat": (("attention", "tokens"), ("tokens",)),
    "grad_cam_tokens": (("normalised",), ("normalised",)),
    "tokentm": (("attention", "tokens", "transformed_value", "attention_branch", "ffn_branch"), ("attention",)),
}


@pytest.fixture(scope="module")
def full():
    everything = tuple({name for shown, _ in CONTRACT.values() for name in shown})
    module = Minimal(everything, ("attention", "tokens", "normalised"))
    return module, module.init(jax.random.key(0), IMAGES)["params"]


@pytest.mark.parametrize("method", mostly_slow(CONTRACT, ["tokentm"]))
def test_a_module_that_follows_the_contract_and_no_more(briefly, full, method):
    module, params = full
    shown, perturbed = CONTRACT[method]
    explain = explain_fn_of(method, params)
    exact = Minimal(shown, perturbed)
    maps, expected = jax.jit(lambda: (explain(exact), explain(module)))()
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-7)
    assert maps.shape == (2, 2, 3) and np.isfinite(maps).all() and maps.min() < maps.max()
    for name in shown:
        less = Minimal(tuple(n for n in shown if n != name), perturbed)
        with pytest.raises(tm.InputError, match=f"sows no '{name}', which"):
            jax.eval_shape(lambda m=less: explain(m))
    if perturbed:
        other = Minimal(shown, ("tokens",) if perturbed == ("attention",) else ("attention",))
        with pytest.raises(tm.InputError, match=f"perturbs no '{perturbed[0]}', which"):
            jax.eval_shape(lambda: explain(other))


def explain_fn_of(method, params):
    options = {"steps": 2} if method == "beyond_intuition" else {}
    return lambda module: explain_fn(module, method, **options)(params, IMAGES)


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
