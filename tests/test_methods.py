"""Methods that no golden covers, against their definitions in float64: a NumPy ViT and difference quotients."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import mostly_slow, tiny_vit

import tokentm_jax as tm
from tokentm_jax.methods.explain import compiled, explain_fn
from tokentm_jax.methods.sharing import grouped

TARGET = 2


def run(small, method, details=False, **options):
    module, params, image = small
    with jax.enable_x64(True):
        function = jax.jit(explain_fn(module, method, details=True, **options))
        maps, found = function(params, jnp.asarray(image[None]), jnp.array([TARGET], jnp.int32))
        maps = np.asarray(maps[0])
        return (maps, {k: np.asarray(v[0]) for k, v in found.items()}) if details else maps


def slope(small, name, l, **keywords):
    """Gradient of the target's logit at a named point of block l, by difference quotients of the NumPy ViT."""
    module, params, image = small
    shape = oracle.vit(module, params, image)[1][name, l].shape
    return oracle.difference_quotients(
        lambda delta: oracle.vit(module, params, image, {(name, l): delta}, **keywords)[0][TARGET], shape
    )


def pixel_gradient(small, image=None):
    module, params, own = small
    image = own if image is None else image
    return oracle.difference_quotients(lambda d: oracle.vit(module, params, image + d)[0][TARGET], image.shape)


def test_the_oracle_computes_the_same_logits(small):
    module, params, image = small
    _, details = run(small, "gae", details=True)
    np.testing.assert_allclose(details["logits"], oracle.vit(module, params, image)[0], rtol=1e-10)


def test_gae(small):
    module, params, image = small
    seen = oracle.vit(module, params, image)[1]
    r = np.eye(7)
    for l in range(2):
        r = r + np.maximum(slope(small, "attention", l) * seen["attention", l], 0).mean(0) @ r
    np.testing.assert_allclose(run(small, "gae").ravel(), r[0, 1:], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["tokentm", "libra_tokentm"])
def test_tokentm_from_the_photo_to_the_map(small, method):
    """The whole chain, sharing nothing with the library: forward pass, gradients, weights, aggregation."""
    module, params, image = small
    seen = oracle.vit(module, params, image)[1]
    held = seen if method == "libra_tokentm" else None
    tokens = [seen["tokens", l] for l in range(2)]
    after = oracle.vit(module, params, image, read_block=0)[1]
    assert set(after) < set(seen)
    c = np.diag([oracle.norm2(x) for x in tokens[0]])
    for l in range(2):
        p = jax.tree.map(lambda a, l=l: a[l], params["blocks"])
        a = np.maximum(slope(small, "attention", l, held=held) * seen["attention", l], 0).mean(0)
        c = c + a @ np.diag(oracle.token_weights(tokens[l], seen["value_projected", l])) @ c
        mixed = []
        qkv = seen["normalised", l] @ p["attn"]["qkv"]["kernel"] + p["attn"]["qkv"]["bias"]
        for h in range(2):
            mixed.append(seen["attention", l][h] @ qkv[:, 16 + 4 * h : 20 + 4 * h])
        branch = np.concatenate(mixed, -1) @ p["attn"]["proj"]["kernel"] + p["attn"]["proj"]["bias"]
        middle = tokens[l] + branch
        hidden = oracle.layer_norm(middle, p["norm2"], module.norm_eps) @ p["mlp"]["fc1"]["kernel"]
        hidden = hidden + p["mlp"]["fc1"]["bias"]
        hidden = hidden * 0.5 * (1 + oracle.erf(hidden / np.sqrt(2)))
        ffn = hidden @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]
        c = c + np.diag(oracle.token_weights(middle, ffn)) @ c
    np.testing.assert_allclose(run(small, method).ravel(), c[0, 1:], rtol=1e-6, atol=1e-9)


def test_grad_cam_on_tokens(small):
    module, params, image = small
    features = oracle.vit(module, params, image)[1]["normalised", 1][1:]
    weights = slope(small, "normalised", 1)[1:].mean(0)
    expected = np.maximum((features * weights).sum(-1), 0)
    np.testing.assert_allclose(run(small, "grad_cam_tokens").ravel(), expected, rtol=1e-6, atol=1e-9)


def test_attcat(small):
    module, params, image = small
    seen = oracle.vit(module, params, image)[1]
    expected = np.zeros(7)
    for l in range(2):
        effect = (seen["tokens", l] * slope(small, "tokens", l)).sum(-1)
        expected += seen["attention", l].mean((0, 1)) * effect
    np.testing.assert_allclose(run(small, "attcat").ravel(), expected[1:], rtol=1e-6, atol=1e-9)


def test_legrad(small):
    expected = sum(np.maximum(slope(small, "attention", l, read_block=l), 0).mean((0, 1)) for l in range(2))
    np.testing.assert_allclose(run(small, "legrad").ravel(), expected[1:], rtol=1e-6, atol=1e-9)


def test_legrad_of_the_mean_of_all_tokens_as_published_for_clip(small):
    expected = np.maximum(slope(small, "attention", 1, read_block=1, mean=True), 0).mean((0, 1))
    got = run(small, "legrad", read="mean", first_block=1)
    np.testing.assert_allclose(got.ravel(), expected[1:], rtol=1e-6, atol=1e-9)


def test_legrad_of_the_pool_as_published_for_siglip(small):
    """The pool of SigLIP in NumPy, on the tokens of every block as they are, and the cosine with an embedding."""
    module = small[0].clone(class_token=False, reg_tokens=1, global_pool="map", num_classes=0)
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda key: tm.models.init_params(module, key), jax.random.key(0))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape) * 0.6, shapes)
    embedding, images = rng.normal(size=8), np.stack([small[2], -small[2]])
    with jax.enable_x64(True):
        trace = jax.jit(lambda p, x: tm.capture(module, p, x, jnp.zeros(2, jnp.int32), ["tokens", "final_tokens"]))
        tokens = np.asarray(trace(params, jnp.asarray(images)).tokens)  # [L + 1, B, N, D]
        function = explain_fn(module, "legrad", score=tm.scores.Cosine(embedding), read="pool")
        maps = np.asarray(jax.jit(function)(params, jnp.asarray(images)))
    p = params["attn_pool"]

    def cosine(x, change):
        affine = lambda x, q: x @ q["kernel"] + q["bias"]  # noqa: E731
        query, (key, value) = affine(p["latent"][0], p["q"]), np.split(affine(x, p["kv"]), 2, -1)
        mixed = []
        for h in range(2):
            own = slice(4 * h, 4 * h + 4)
            e = np.exp(query[:, own] @ key[:, own].T / 2)
            mixed.append((e / e.sum() + change[h]) @ value[:, own])
        pooled = affine(np.concatenate(mixed, -1), p["proj"])
        hidden = affine(oracle.layer_norm(pooled, p["norm"], module.norm_eps), p["mlp"]["fc1"])
        pooled = (pooled + affine(hidden * 0.5 * (1 + oracle.erf(hidden / np.sqrt(2))), p["mlp"]["fc2"]))[0]
        return pooled @ embedding / oracle.norm2(pooled) / oracle.norm2(embedding)

    for i in range(2):
        expected = np.zeros(6)
        for after in tokens[1:, i, 1:]:
            gradient = oracle.difference_quotients(lambda d, x=after: cosine(x, d), (2, 1, 6))
            expected += np.maximum(gradient, 0).mean((0, 1))
        np.testing.assert_allclose(maps[i].ravel(), expected, rtol=1e-6, atol=1e-9)


def test_forms_of_legrad_that_a_model_does_not_have(small, briefly):
    module, _, image = small
    for other, read, message in (
        (module, "pool", "read='pool' reads the attention of a pool"),
        (
            module.clone(global_pool="avg"),
            "mean",
            "read='mean' replaces the class token by the mean of all tokens",
        ),
    ):
        shapes = jax.eval_shape(lambda key, module=other: tm.models.init_params(module, key), jax.random.key(0))
        with pytest.raises(tm.InputError, match=message):
            jax.eval_shape(explain_fn(other, "legrad", read=read), shapes, image[None])


def test_libra_full_grad(small):
    """Every product of a token or bias with its gradient, one at a time; what is held makes the model linear."""
    module, params, image = small
    logits, seen = oracle.vit(module, params, image)

    def along(name, l, token, direction):
        delta = np.zeros(seen[name, l].shape)
        delta[token] = direction
        return oracle.vit(module, params, image, {(name, l): delta}, held=seen)[0][TARGET] - logits[TARGET]

    expected = np.zeros(7)
    for l in range(2):
        p = jax.tree.map(lambda a, l=l: a[l], params["blocks"])
        steps = {"normalised": p["norm1"], **p["attn"], "norm2": p["norm2"], **p["mlp"]}
        for j in range(7):
            expected[j] += along("tokens", l, j, seen["tokens", l][j]) / 2
            # The biases of block l stand in the maps of the blocks 0 to l.
            expected[j] += (l + 1) / 2 * sum(along(name, l, j, step["bias"]) for name, step in steps.items())
    expected += [along("norm", None, j, params["norm"]["bias"]) for j in range(7)]
    expected[0] += params["head"]["bias"][TARGET]
    maps, details = run(small, "libra_full_grad", details=True)
    np.testing.assert_allclose(maps.ravel(), expected[1:], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(expected.sum(), logits[TARGET], rtol=1e-10)  # complete
    np.testing.assert_allclose(details["completeness_gap"], 0, atol=1e-10)


def test_libra_forms_of_other_methods(small):
    seen = oracle.vit(*small)[1]
    attcat, r = np.zeros(7), np.eye(7)
    for l in range(2):
        effect = (seen["tokens", l] * slope(small, "tokens", l, held=seen)).sum(-1)
        attcat += seen["attention", l].mean((0, 1)) * effect
        gradient = slope(small, "attention", l, held=seen)
        r = r + np.maximum(gradient * seen["attention", l], 0).mean(0) @ r
    weights = gradient[:, 0, 1:].mean(-1)
    cam = np.maximum(np.mean([w * a[0] for w, a in zip(weights, seen["attention", 1], strict=True)], 0), 0)
    for method, expected in (("libra_attcat", attcat), ("libra_gae", r[0]), ("libra_grad_cam", cam)):
        np.testing.assert_allclose(run(small, method).ravel(), expected[1:], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "from_zero"),
    [
        ("head", False),
        pytest.param("token", False, marks=pytest.mark.slow),
        pytest.param("head", True, marks=pytest.mark.slow),
    ],
)
def test_beyond_intuition(small, variant, from_zero):
    module, params, image = small
    seen = oracle.vit(module, params, image)[1]
    perception = np.eye(7)
    first = int(from_zero)  # as published, the inputs begin at zero, and the blocks not with the first
    for l in range(first, 2):
        a = seen["attention", l]
        if variant == "head":
            g = slope(small, "attention", l)
            influence = np.array([np.abs(a[h].T @ g[h]).mean() for h in range(2)])
            mixed = sum(i * a[h] for h, i in enumerate(influence / influence.sum()))
        else:
            weights = [
                oracle.norm2(v) / oracle.norm2(x)
                for v, x in zip(seen["value_projected", l], seen["tokens", l], strict=True)
            ]
            mixed = a.mean(0) @ np.diag(weights)
        perception = perception + mixed @ perception
    shares = (0, 1 / 2, 1) if from_zero else (1 / 3, 2 / 3, 1)
    mean = sum(slope((module, params, image * share), "attention", 1) for share in shares) / 3
    feedback = np.maximum(mean, 0).mean(0)
    got = run(small, "beyond_intuition", variant=variant, steps=3, from_zero=from_zero, first_block=first)
    np.testing.assert_allclose(got.ravel(), (feedback * perception)[0, 1:], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("normalise", [True, False])
def test_rollout(small, fusion, normalise):
    module, params, image = small
    seen = oracle.vit(module, params, image)[1]
    for discard, first in ((0.0, 0), (0.3, 1)):
        product = np.eye(7)
        for l in range(first, 2):
            fused = getattr(np, fusion)(seen["attention", l], axis=0)
            lowest = np.argsort(fused.ravel(), kind="stable")[: int(discard * 49)]
            fused = np.where(np.isin(np.arange(49), lowest).reshape(7, 7), 0, fused) + np.eye(7)
            product = (fused / fused.sum(-1, keepdims=True) if normalise else fused) @ product
        got = run(small, "rollout", fusion=fusion, normalise=normalise, discard_ratio=discard, first_block=first)
        np.testing.assert_allclose(got.ravel(), product[0, 1:], rtol=1e-9)


def test_gradients_of_the_input(small):
    image = small[2]
    gradient = pixel_gradient(small)
    np.testing.assert_allclose(run(small, "input_gradient"), np.abs(gradient).max(-1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(run(small, "gradient_x_input"), (gradient * image).sum(-1), rtol=1e-6, atol=1e-9)
    quiet = run(small, "smooth_grad", noise=0.0, samples=2)
    np.testing.assert_allclose(quiet, np.abs(gradient).max(-1), rtol=1e-6, atol=1e-9)


def test_smooth_grad_is_the_mean_over_its_noise(small):
    image = small[2]
    deviation = 0.2 * (image.max() - image.min())
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(5), 2)
        noises = [np.asarray(jax.random.normal(k, (1, *image.shape), jnp.float64))[0] for k in keys]
    expected = np.abs(sum(pixel_gradient(small, image + deviation * n) for n in noises) / 2).max(-1)
    got = run(small, "smooth_grad", noise=0.2, samples=2, seed=5)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_integrated_gradients(small):
    module, params, image = small
    base = np.full_like(image, 0.3)
    gradient = sum(pixel_gradient(small, base + (k + 0.5) / 3 * (image - base)) for k in range(3)) / 3
    maps, details = run(small, "integrated_gradients", details=True, steps=3, baseline=0.3)
    expected = ((image - base) * gradient).sum(-1)
    np.testing.assert_allclose(maps, expected, rtol=1e-6, atol=1e-9)
    change = oracle.vit(module, params, image)[0][TARGET] - oracle.vit(module, params, base)[0][TARGET]
    np.testing.assert_allclose(details["completeness_gap"], expected.sum() - change, rtol=1e-6)


def drawn(seed, samples):
    """The numbers of each draw: the key of its reference, and its share."""
    for key in jax.random.split(jax.random.key(seed), samples):
        first, second = jax.random.split(key)
        yield first, float(jax.random.uniform(second, dtype=jnp.float64))


@pytest.mark.parametrize("given", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_expected_gradients_are_the_mean_over_their_draws(small, given):
    image = small[2]
    references = np.random.default_rng(1).normal(size=(3, *image.shape)) if given else None
    terms = []
    with jax.enable_x64(True):
        for key, share in drawn(4, 2):
            if given:
                reference = references[int(jax.random.randint(key, (), 0, 3))]
            else:
                colours = image.reshape(-1, 3)
                reference = np.broadcast_to(
                    colours[int(jax.random.uniform(key, dtype=jnp.float32) * len(colours))], image.shape
                )
            slope = pixel_gradient(small, reference + share * (image - reference))
            terms.append(((image - reference) * slope).sum(-1))
    maps, details = run(small, "expected_gradients", details=True, samples=2, seed=4, references=references)
    np.testing.assert_allclose(maps, np.mean(terms, 0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(details["standard_error"], np.std(terms, 0, ddof=1) / 2**0.5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("given", [True, False])
def test_expected_gradients_of_a_quadratic_in_closed_form(given):
    """`f(x) = x A x / 2 + b x`: a reference r gives `(x - r) * (A (x + r) / 2 + b)`, which sums to `f(x) - f(r)`."""
    rng = np.random.default_rng(0)
    a, b, images, references = (rng.normal(size=shape) for shape in ((48, 48), 48, (2, 4, 4, 3), (5, 4, 4, 3)))
    a = (a + a.T) / 2
    value = lambda flat: ((flat @ a) * flat).sum(-1) / 2 + flat @ b  # noqa: E731

    def function(params, images):
        return value(images.reshape(len(images), 48))[:, None]

    options = {"references": references} if given else {}
    with jax.enable_x64(True):
        run = jax.jit(explain_fn(function, "expected_gradients", details=True, samples=4000, **options))
        maps, details = jax.tree.map(np.asarray, run({}, jnp.asarray(images)))
    for i, x in enumerate(images):
        own = references if given else np.broadcast_to(x.reshape(16, 1, 1, 3), (16, 4, 4, 3))
        x, own = x.reshape(48), own.reshape(-1, 48)
        expected = ((x - own) * ((x + own) @ a / 2 + b)).mean(0)
        np.testing.assert_allclose(expected.sum(), value(x) - value(own).mean(), rtol=1e-9)
        off = np.abs(maps[i].ravel() - expected.reshape(16, 3).sum(-1)) / details["standard_error"][i].ravel()
        assert 0.5 < off.max() < 4.5, off
    assert details["standard_error"].max() < 0.05 * np.abs(maps).max()


@pytest.mark.slow
def test_references_are_images_as_users_have_them():
    vit = tiny_vit(1)
    images, references = (np.random.default_rng(k).random((2, 16, 24, 3)).astype(np.float32) for k in range(2))
    maps = tm.explain(vit, images, "expected_gradients", samples=3, references=references)
    inputs, own = (vit.preprocessing.normalise(a) for a in (images, references))
    explain = tm.explain_fn(vit.module, "expected_gradients", samples=3, references=own)
    np.testing.assert_allclose(maps, jax.jit(explain)(vit.params, inputs), rtol=1e-5, atol=1e-7)
    with pytest.raises(tm.InputError, match=r"'references' must be \[R, 16, 24, 3\]"):
        tm.explain_fn(vit.module, "expected_gradients", references=own[:, :8])(vit.params, inputs)


def test_pa_lrp(small):
    """With all factors constant: pixels and positions times their slopes, one at a time."""
    module, params, image = small
    seen = oracle.vit(module, params, image)[1]
    answer = lambda delta: oracle.vit(module, params, image + delta, held=seen)[0][TARGET]  # noqa: E731
    pixels = (image * oracle.difference_quotients(answer, image.shape)).sum(-1)
    positions = (params["pos_embed"][0] * slope(small, "tokens", 0, held=seen)).sum(-1)
    maps, details = run(small, "pa_lrp", details=True, rules="conservative")
    np.testing.assert_allclose(details["position_relevance"], positions, rtol=1e-6, atol=1e-9)
    shown = positions[1:].reshape(2, 3).repeat(2, 0).repeat(2, 1) / 4
    np.testing.assert_allclose(maps, pixels + shown, rtol=1e-6, atol=1e-9)


def test_combination_and_maps():
    a = jnp.array([[[0.0, 1.0], [2.0, 4.0]]])
    b = jnp.array([[[3.0, 3.0], [3.0, 3.0]]])  # constant: zeros, not NaN
    c = jnp.array([[[1.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(tm.combine([a, c], "mean")[0], [[0.5, 0.125], [0.25, 0.5]])
    np.testing.assert_allclose(tm.combine([a, 1 - c])[0], [[0, 0.25], [0.5, 1]])
    np.testing.assert_array_equal(tm.combine([a, b]), 0)
    # Half-pixel centres, no antialiasing: 2 -> 4 has weights 1, 3/4, 1/4, 0 along each axis.
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(tm.to_pixels(a, (4, 4))[0], weights @ (np.asarray(a[0]) / 4) @ weights.T, atol=1e-6)
    with pytest.raises(tm.InputError, match="one map at least"):
        tm.combine([])


@pytest.mark.usefixtures("wrong_types")
def test_normalisations_and_weights_of_a_combination():
    a = jnp.array([[[0.0, 1.0], [1.0, -6.0]]])
    b = jnp.zeros((1, 2, 2))
    np.testing.assert_allclose(tm.combine([a], "mean", "rank")[0], [[0.375, 0.75], [0.75, 0.125]])
    np.testing.assert_allclose(tm.combine([a], "mean", "sum")[0], [[0, 0.125], [0.125, -0.75]])
    np.testing.assert_allclose(tm.combine([a, b], "mean", "sum", [3, 1])[0], 0.75 * np.asarray(a[0]) / 8)
    squared = tm.combine([a], "mean", "sum", power=2)  # of [6, 7, 7, 0] / 7
    np.testing.assert_allclose(squared[0], np.array([[36, 49], [49, 0]]) / 49, atol=1e-6)
    where = np.array([[[True, True], [True, False]]])
    found = tm.combine([a, a * 0.5], "product", where=where, power=0.5)[0]
    np.testing.assert_allclose(found, [[0, 1], [1, 0]], atol=1e-6)
    for power in (0, -1, float("nan"), "2"):
        with pytest.raises(tm.InputError, match="power must be"):
            tm.combine([a], power=power)
    for normalisation in ("min_max", "rank", "sum"):
        constant = tm.combine([b], "mean", normalisation)
        assert np.ptp(constant) == 0 and np.isfinite(constant).all()
        assert np.isnan(tm.combine([a.at[0, 0, 0].set(jnp.nan)], "mean", normalisation)).any()
    for weights in ([1], [1, -1], [0, 0], [1, float("nan")]):
        with pytest.raises(tm.InputError, match="a weight of at least 0 for each of 2 maps"):
            tm.combine([a, b], "mean", weights=weights)
    with pytest.raises(tm.InputError, match="did you mean 'rank'"):
        tm.combine([a], "mean", "ranks")


SHARING = [
    ("tokentm", "attcat", "gradient_x_input"),
    (
        "legrad",
        "tokentm",
        "gae",
        "rollout",
        "attcat",
        "input_gradient",
        "libra_attcat",
        "conservative_lrp",
        "libra_full_grad",
        "lrp",
    ),
    ("res_lrp", "attn_lrp", "libra_gae", "libra_tokentm", "gae"),
]


@pytest.mark.parametrize("names", mostly_slow(SHARING, SHARING[:1]))
def test_methods_of_one_run_have_the_maps_that_they_have_alone(small, names):
    module, params, image = small
    images = jnp.asarray(np.stack([image, -image]), jnp.float32)
    together = compiled(module, {name: {} for name in names})
    alone = jax.jit(lambda *inputs: {name: explain_fn(module, name)(*inputs) for name in names})
    for target in (None, np.array([1, 0])):
        found, expected = together(params, images, target)[0], alone(params, images, target)
        assert found.keys() == expected.keys()
        for name, maps in expected.items():
            np.testing.assert_allclose(found[name], maps, rtol=0, atol=1e-6 * np.abs(maps).max())


def test_which_methods_share_a_pass():
    names = ["legrad", "rollout", "conservative_lrp", "tokentm", "attn_lrp", "libra_gae", "attcat", "lrp"]
    names += ["libra_full_grad"]
    members = {name: tm.METHODS[name].member(name, {}) for name in names}
    ruled = ["legrad", "conservative_lrp", "libra_gae", "libra_full_grad"]
    assert grouped(members) == [ruled, ["rollout"], ["tokentm", "attcat"], ["attn_lrp"], ["lrp"]]
    members["attcat"] = tm.METHODS["attcat"].member("attcat", {"memory": "recompute"})
    members["tokentm, libra"] = tm.METHODS["tokentm"].member("tokentm", {"rules": "libra", "norms": False})
    assert grouped(members)[0] == [*ruled, "tokentm, libra"] and ["attcat"] in grouped(members)
    assert grouped({name: members[name] for name in ("legrad", "rollout")}) == [["legrad"], ["rollout"]]


@pytest.mark.parametrize(
    ("methods", "gradient"),
    [
        pytest.param("tokentm,attn_lrp,conservative_lrp,legrad", "own", marks=pytest.mark.slow),
        pytest.param("legrad,gae,tokentm", "own", marks=pytest.mark.slow),
        pytest.param("tokentm,conservative_lrp,legrad,attn_lrp", "conservative_lrp", marks=pytest.mark.slow),
        pytest.param("attn_lrp,gae", "attn_lrp", marks=pytest.mark.slow),
        pytest.param("legrad,libra_tokentm,conservative_lrp,tokentm", "own", marks=pytest.mark.slow),
    ],
)
def test_members_that_share_a_pass_have_the_maps_that_they_have_alone(small, methods, gradient):
    module, params, image = small
    rules = {"own": "plain", "conservative_lrp": "libra", "attn_lrp": "attn_lrp"}
    images = jnp.asarray(np.stack([image, -image]), jnp.float32)

    @jax.jit
    def run(params, images, target):
        mixed = explain_fn(module, "tokentm_mix", methods=methods, gradient=gradient, normalisation="sum")
        alone = [
            explain_fn(module, name, **({"rules": rules[gradient]} if name in ("tokentm", "gae") else {}))(
                params, images, target
            )
            for name in methods.split(",")
        ]
        return mixed(params, images), mixed(params, images, target), tm.combine(alone, "mean", "sum", power=2)

    predicted, given, expected = run(params, images, module.apply({"params": params}, images).argmax(-1))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-6)
