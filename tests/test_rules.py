"""Each relevance rule against a slow loop over the Jacobian or the definition, in float64; and conservation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow

import tokentm_jax as tm
from tokentm_jax.maths import primitives
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.metrics.removal import by_patch
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.programs.capture import capture
from tokentm_jax.programs.flat import flatten
from tokentm_jax.programs.model import function_of
from tokentm_jax.programs.reading import read
from tokentm_jax.programs.rules import ATTN_LRP, LIBRA, REFERENCE_EPSILON, SIGNED_EPSILON, lrp, res_lrp
from tokentm_jax.programs.running import Evaluation, Plan


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def quotient(stabiliser, r, z):
    """sd(R, z) for the arrays of one sample, entry by entry."""
    r, z = np.broadcast_arrays(r, z)
    scale = np.sqrt(np.mean(z**2))
    out = np.zeros(z.shape)
    for i in np.ndindex(z.shape):
        if z[i] != 0:
            eps = REFERENCE_EPSILON if stabiliser == "reference" else SIGNED_EPSILON * scale * np.sign(z[i])
            out[i] = r[i] / (z[i] + eps)
    return out


def backward(function, *arguments, r, rules, raw=False):
    """What the rules carry from r at the output of a function of one sample to its arguments."""
    arguments = [jnp.asarray(a) for a in arguments]
    flat = flatten(jax.make_jaxpr(function)(*arguments))
    reading = read(flat, flat.inputs, raw)
    run = lambda *arguments: Evaluation(reading, Plan(rules), [*arguments]).run().outputs[0]  # noqa: E731
    value, back = jax.vjp(run, *arguments)
    np.testing.assert_allclose(value, function(*arguments), rtol=1e-12)
    return back(jnp.asarray(r))


@pytest.mark.parametrize("stabiliser", ["reference", "signed"])
@pytest.mark.parametrize("variant", ["ours", "lrp"])
def test_linear(variant, stabiliser):
    x, w, bias, r = normal(3, 4), normal(4, 5), normal(5), normal(3, 5, seed=1)
    (got,) = backward(lambda x: x @ w + bias, x, r=r, rules=lrp(variant, stabiliser))
    p = np.maximum(x, 0)[:, :, None] * np.maximum(w, 0)  # [token, input, output]
    q = np.minimum(x, 0)[:, :, None] * np.minimum(w, 0)
    if variant == "ours":
        expected = ((p + q) * quotient(stabiliser, r, (p + q).sum(1))[:, None]).sum(-1)
    else:
        expected = (p * quotient(stabiliser, r, p.sum(1))[:, None]).sum(-1)
        expected += (q * quotient(stabiliser, r, q.sum(1))[:, None]).sum(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("stabiliser", ["reference", "signed"])
def test_product(stabiliser):
    x, y, r = normal(3, 4), normal(4, 5), normal(3, 5, seed=1)
    got_x, got_y = backward(lambda x, y: x @ y, x, y, r=r, rules=lrp("lrp", stabiliser))
    parts = x[:, :, None] * y[None] * quotient(stabiliser, r, x @ y)[:, None] / 2  # [i, k, j]
    np.testing.assert_allclose(got_x, parts.sum(2), rtol=1e-9)
    np.testing.assert_allclose(got_y, parts.sum(0), rtol=1e-9)


@pytest.mark.parametrize("stabiliser", ["reference", "signed"])
@pytest.mark.parametrize("variant", ["ours", "lrp"])
def test_sum(variant, stabiliser):
    a, c, r = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    got_a, got_c = backward(lambda a, c: a + c, a, c, r=r, rules=lrp(variant, stabiliser))
    s = quotient(stabiliser, r, a + c)
    to_a, to_c = a * s, c * s
    if variant == "ours":
        total = abs(to_a.sum()) + abs(to_c.sum())
        wanted = [abs(t.sum()) / total * r.sum() for t in (to_a, to_c)]
        to_a, to_c = (t * quotient(stabiliser, w, t.sum()) for t, w in zip((to_a, to_c), wanted, strict=True))
    np.testing.assert_allclose(got_a, to_a, rtol=1e-9)
    np.testing.assert_allclose(got_c, to_c, rtol=1e-9)


def test_patch_embedding_z_b_rule():
    x, w, r = normal(3, 4), normal(4, 5), normal(3, 5, seed=1)
    (got,) = backward(lambda x: x @ w, x, r=r, rules=lrp("lrp", "signed"), raw=True)
    low, high = x.min(), x.max()
    share = x[:, :, None] * w - low * np.maximum(w, 0) - high * np.minimum(w, 0)
    expected = (share * (r / (share.sum(1) + REFERENCE_EPSILON))[:, None]).sum(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    np.testing.assert_allclose(got.sum(), r.sum(), rtol=1e-6)


def test_identity_rules():
    x, r = normal(3, 4), normal(3, 4, seed=1)
    ones, zeros = jnp.ones(4), jnp.zeros(4)
    for step in (
        lambda x: primitives.norm(x, ones, zeros, 1e-6),
        lambda x: primitives.softmax(x, 0.5),
        lambda x: primitives.activation(x, "gelu"),
    ):
        np.testing.assert_array_equal(backward(step, x, r=r, rules=lrp("ours", "signed"))[0], r)


def jacobian_vector(function, x, g):
    """`g` times the Jacobian by central differences, one coordinate at a time."""
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-6
        out[i] = np.sum(g * (function(x + step) - function(x - step))) / 2e-6
    return out


@pytest.mark.parametrize("rules", [LIBRA, ATTN_LRP], ids=["conservative", "attn_lrp"])
def test_gradient_rules_against_the_jacobian_with_constants_held(rules):
    x, g, scale, bias = normal(3, 4), normal(3, 4, seed=1), normal(4), normal(4, seed=3)
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = jacobian_vector(lambda v: (v - v.mean(-1, keepdims=True)) / deviation * scale + bias, x, g)
    norm = lambda x: primitives.norm(x, jnp.asarray(scale), jnp.asarray(bias), 1e-6)  # noqa: E731
    np.testing.assert_allclose(backward(norm, x, r=g, rules=rules)[0], expected, atol=1e-8)

    gain = np.asarray(primitives.activation(jnp.asarray(x), "gelu")) / x
    (got,) = backward(lambda x: primitives.activation(x, "gelu"), x, r=g, rules=rules)
    np.testing.assert_allclose(got, jacobian_vector(lambda v: v * gain, x, g), atol=1e-8)


@pytest.mark.parametrize("half", [False, True])
def test_rotation(half):
    """Relevance of a turned pair goes to both of its channels, in proportion to what each gave; against a loop."""
    x, r = normal(1, 3, 4), normal(1, 3, 4)
    angle = normal(3, 2)
    pair = (lambda c: (c + 2) % 4) if half else (lambda c: c ^ 1)
    of = (lambda c: c % 2) if half else (lambda c: c // 2)
    first = (lambda c: c < 2) if half else (lambda c: c % 2 == 0)
    turned, expected = np.zeros_like(x), np.zeros_like(x)
    cosine, sine = np.zeros((3, 4)), np.zeros((3, 4))
    for n, c in np.ndindex(3, 4):
        a = angle[n, of(c)]
        cosine[n, c], sine[n, c] = np.cos(a), np.sin(a) * (-1 if first(c) else 1)
        own, other = x[0, n, c] * cosine[n, c], x[0, n, pair(c)] * sine[n, c]
        turned[0, n, c] = own + other
        expected[0, n, c] += r[0, n, c] * own / (own + other)
        expected[0, n, pair(c)] += r[0, n, c] * other / (own + other)
    rotate = lambda x: primitives.rotate(x, jnp.asarray(cosine), jnp.asarray(sine), half)  # noqa: E731
    np.testing.assert_allclose(rotate(jnp.asarray(x)), turned, rtol=1e-10)
    np.testing.assert_allclose(backward(rotate, x, r=r, rules=lrp("lrp", "reference"))[0], expected, rtol=1e-5)


def test_softmax_and_product_of_attn_lrp():
    """In relevances: `R_in = x * (R - s sum R)`, and the factors of a product share its relevance equally."""
    x, r = normal(1, 2, 4), normal(1, 2, 4, seed=1)
    s = np.exp(x * 0.7) / np.exp(x * 0.7).sum(-1, keepdims=True)
    (g,) = backward(lambda x: primitives.softmax(x, 0.7), x, r=r / s, rules=ATTN_LRP)
    expected = x * 0.7 * (r - s * r.sum(-1, keepdims=True))
    np.testing.assert_allclose(x * g, expected, rtol=1e-9)

    a, b = normal(3, 4), normal(4, 5)
    relevance = normal(3, 5, seed=1)
    to_a, to_b = backward(lambda a, b: a @ b, a, b, r=relevance / (a @ b), rules=ATTN_LRP)
    for total in ((a * to_a).sum(), (b * to_b).sum()):
        np.testing.assert_allclose(total, relevance.sum() / 2, rtol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_gamma_rule_at_residual_sums(gamma):
    """In relevances, entry by entry; what goes in comes out, and cancelling summands blow nothing up."""
    a, c, r = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    c[0] = -a[0] * (1 + 1e-9)
    g_a, g_c = backward(lambda a, c: a + c, a, c, r=r / (a + c), rules=res_lrp(gamma))
    for i in np.ndindex(*a.shape):
        out = a[i] + c[i]
        own_a = a[i] * (1 + gamma) if a[i] * out >= 0 else a[i]
        own_c = c[i] * (1 + gamma) if c[i] * out >= 0 else c[i]
        np.testing.assert_allclose(a[i] * g_a[i], own_a / (own_a + own_c) * r[i], rtol=1e-6)
        np.testing.assert_allclose(a[i] * g_a[i] + c[i] * g_c[i], r[i], rtol=1e-6)
        if gamma:
            assert abs(a[i] * g_a[i]) + abs(c[i] * g_c[i]) <= (1 + 2 / gamma) * abs(r[i]) * (1 + 1e-6)


def without_biases(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, a: jnp.zeros(a.shape) if path[-1].key == "bias" else jnp.asarray(a, jnp.float64), params
    )


MODERN = {"global_pool": "map", "mlp_layer": "swiglu", "rope_type": "cat", "qk_norm": True, "scale_mlp_norm": True}


@pytest.fixture(scope="module")
def small():
    module = ViT(img_size=(16, 16), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    params = jax.tree.map(lambda a: a * 10 if a.ndim > 1 else a, init_params(module, jax.random.key(0)))
    return module, params


@pytest.mark.parametrize("options", [{}, pytest.param(MODERN, marks=pytest.mark.slow)])
def test_conservative_lrp_conserves_the_logit_without_biases(small, options):
    """Theory: with attention, deviation and gains constant the model is linear; biases are what it loses to."""
    module, params = small
    if options:
        module = module.clone(class_token=False, **options)
        params = jax.tree.map(lambda a: a * 10 if a.ndim > 1 else a, init_params(module, jax.random.key(0)))
    inputs = jnp.asarray(normal(2, 16, 16, 3))
    run = jax.jit(explain_fn(module, "conservative_lrp", details=True))
    _, details = run(without_biases(params), inputs)
    logit = details["logits"][jnp.arange(2), details["target"]]
    np.testing.assert_allclose(details["relevance"], np.broadcast_to(logit[:, None], (2, 3)), rtol=1e-6)


ANYWHERE = {"no_embed_class": True, "class_token": False, "global_pool": "avg", "reg_tokens": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"), [("conservative_lrp", ANYWHERE), ("attn_lrp", {}), ("attn_lrp", ANYWHERE)]
)
def test_pa_lrp_conserves_without_biases(small, method, options):
    """Pixels and position of a patch have together what its token has; registers, which have no position, the rest."""
    module, params = small
    if options:
        module = module.clone(**options)
        params = jax.tree.map(lambda a: a * 10 if a.ndim > 1 else a, init_params(module, jax.random.key(0)))
    params, inputs = without_biases(params), jnp.asarray(normal(2, 16, 16, 3))
    function = lambda params, images: module.apply({"params": params}, images)  # noqa: E731
    pa_lrp = explain_fn(function, "pa_lrp", rules=method.removesuffix("_lrp") if method != "attn_lrp" else method)
    maps, (tokens, details) = jax.jit(
        lambda *given: (pa_lrp(*given), explain_fn(module, method, details=True)(*given))
    )(params, inputs)
    np.testing.assert_allclose(by_patch(maps, (2, 2)) * 64, tokens, rtol=1e-6, atol=1e-9)
    assert np.abs(maps.sum((1, 2)) - details["relevance"][:, 0]).min() > 1e-3  # what the prefix has


def test_half_of_a_rotation_is_kept_by_its_position():
    """One attention without norms, with AttnLRP's rules, in closed form."""
    n, d = 4, 4
    embed, key, query, value, read = (
        normal(*s, seed=k) for k, s in enumerate(((12, d), (d, d), (d, d), (d, d), (d,)))
    )
    angles = np.outer(np.arange(n), [1, 0.3]).repeat(2, -1)
    cosine, sine = np.cos(angles), np.sin(angles) * np.tile([-1, 1], 2)

    def function(params, images):
        x = images.reshape(-1, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, n, 12) @ params
        q, k = (primitives.rotate(x @ w, jnp.asarray(cosine), jnp.asarray(sine), False) for w in (query, key))
        return (x + jax.nn.softmax(q @ k.swapaxes(1, 2)) @ (x @ value)).mean(1)[:, None] @ read[:, None]

    image = normal(1, 4, 4, 3)
    run = jax.jit(explain_fn(lambda p, x: function(p, x)[:, 0], "pa_lrp", details=True, prefix=0))
    maps, details = run(jnp.asarray(embed), jnp.asarray(image))

    x = image.reshape(2, 2, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(n, 12) @ embed
    q, k = ((x @ w) * cosine + (x @ w)[:, [1, 0, 3, 2]] * sine for w in (query, key))
    scores = q @ k.T
    attention = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    slope = np.tile((x @ value) @ read / n / 2, (n, 1))  # at the attention, which has half of the product
    before = scores * attention * (slope - (attention * slope).sum(1, keepdims=True))
    np.testing.assert_allclose(details["position_relevance"][0], (before.sum(1) + before.sum(0)) / 4, rtol=1e-9)
    answer = (x + attention @ x @ value).mean(0) @ read
    np.testing.assert_allclose(details["logits"][0, 0], answer, rtol=1e-9)
    np.testing.assert_allclose(maps.sum(), answer - (attention * slope - before).sum(), rtol=1e-9)


@pytest.mark.parametrize(("method", "rules"), [("attn_lrp", ATTN_LRP), ("res_lrp", res_lrp(1.0))])
def test_only_what_softmax_absorbs_is_lost(small, method, rules):
    """Per block: relevance out minus relevance in is `sum (R_A - R_scores)`, found from queries and keys by hand."""
    module, params = small
    params = without_biases(params)
    inputs = jnp.asarray(normal(2, 16, 16, 3))
    ruled = function_of(module).read(params, inputs).by(rules)
    trace = jax.jit(lambda p, x: capture(ruled, p, x))(params, inputs)
    _, details = jax.jit(explain_fn(module, method, details=True))(params, inputs)
    flow = np.asarray(details["relevance"])
    logit = details["logits"][jnp.arange(2), details["target"]]
    np.testing.assert_allclose(flow[:, -1], logit, rtol=1e-6)  # the head conserves
    d, heads = module.embed_dim, module.num_heads
    for l in range(module.depth):
        kernel = np.asarray(params["blocks"]["attn"]["qkv"]["kernel"][l])
        split = (np.asarray(trace.normalised[l]) @ kernel).reshape(2, -1, 3, heads, d // heads)
        scores = np.einsum("bqhd,bkhd->bhqk", split[:, :, 0], split[:, :, 1]) * (d // heads) ** -0.5
        a, r = np.asarray(trace.attention[l]), np.asarray(trace.attention[l] * trace.attention_grad[l])
        after = scores * (r - a * r.sum(-1, keepdims=True))
        absorbed = (r - after).sum((1, 2, 3))
        np.testing.assert_allclose(flow[:, l + 1] - flow[:, l], absorbed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", mostly_slow(["lrp", "partial_lrp", "transformer_attribution"], ["lrp"]))
def test_lrp_starts_with_one_and_reports_its_flow(small, method):
    module, params = small
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    inputs = jnp.asarray(normal(2, 16, 16, 3))
    _, details = jax.jit(explain_fn(module, method, details=True))(params, inputs)
    assert details["relevance"].shape == (2, module.depth + 1)
    # One unit enters the head; variant "lrp" counts it once over the positive and once over the negative products.
    expected = 1.0 if method == "transformer_attribution" else 2.0
    np.testing.assert_allclose(details["relevance"][:, -1], expected, rtol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"distilled": True, "init_values": 0.5},
        pytest.param({"global_pool": "avg", "reg_tokens": 1, "pre_norm": True}, marks=pytest.mark.slow),
        pytest.param({"class_token": False, "reg_tokens": 1, **MODERN}, marks=pytest.mark.slow),
    ],
)
def test_libra_full_grad_sums_to_the_logit(options):
    """On every way to read the tokens, with biases that are not zero."""
    module = ViT(img_size=(16, 16), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, **options)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), init_params(module, jax.random.key(0)))
    run = jax.jit(explain_fn(module, "libra_full_grad", details=True))
    _, details = run(params, jnp.asarray(normal(2, 16, 16, 3)))
    logit = details["logits"][jnp.arange(2), details["target"]]
    np.testing.assert_allclose(details["completeness_gap"], 0, atol=1e-9 * float(jnp.abs(logit).max()))


def test_res_lrp_without_gamma_is_attn_lrp(small):
    module, params = small
    inputs = jnp.asarray(normal(2, 16, 16, 3))
    plain, gamma = (
        jax.jit(explain_fn(module, method, **options))(params, inputs)
        for method, options in (("attn_lrp", {}), ("res_lrp", {"gamma": 0.0}))
    )
    np.testing.assert_allclose(gamma, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_pooler_of_texts_by_its_gradient_as_published():
    """`tanh z` with its derivative is `z tanh'(z)`: the identity rule of a head whose weights say so for this text."""
    module = tm.models.Bert(20, 8, embed_dim=8, depth=1, num_heads=2, mlp_hidden=16, num_classes=3)
    ids = jnp.array([[3, 7, 1, 12]], jnp.int32)
    tokens = tm.inputs.Tokens(ids, ids > 0, 0 * ids, ids < 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.6, init_params(module, jax.random.key(0)))
    body = {name: a for name, a in params.items() if name != "head"}
    pooled = np.asarray(module.clone(num_classes=0).apply({"params": body}, tokens))[0]
    gain = (1 - pooled**2) * np.arctanh(pooled) / pooled
    other = {**params, "head": {**params["head"], "kernel": params["head"]["kernel"] * gain[:, None]}}

    def run(params, **options):
        return jax.jit(explain_fn(module, "conservative_lrp", **options))(params, tokens, jnp.array([1], jnp.int32))

    expected = run(other)
    np.testing.assert_allclose(run(params, pooler="gradient"), expected, rtol=1e-9)
    assert np.abs(expected - run(params)).max() > 0.1 * np.abs(expected).max()
