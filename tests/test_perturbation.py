"""The perturbation family: against exact Shapley values by enumeration, and slow loops over a NumPy ViT in float64."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import tiny_vit

import tokentm_jax as tm
from tokentm_jax.maths import perturbation as maths
from tokentm_jax.maths.maps import spread
from tokentm_jax.methods import perturbation
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.models.vit import ViT, init_params

TARGET = 2
GRID, N = (2, 3), 6
FULL = (1,) * N


def run(small, method, **options):
    module, params, image = small
    with jax.enable_x64(True):
        function = jax.jit(explain_fn(module, method, details=True, **options))
        maps, found = function(params, jnp.asarray(image[None]), jnp.array([TARGET], jnp.int32))
        return np.asarray(maps[0]).ravel(), {k: np.asarray(v[0]) for k, v in found.items()}


def answer(small, shown, fill=0.0, probability=False):
    """The value of a coalition, `shown` [n] of numbers from 0 to 1."""
    module, params, image = small
    shown = np.asarray(shown, float)
    changed = np.empty_like(image)
    background = np.broadcast_to(fill, image.shape)
    for y, x in np.ndindex(4, 6):
        part = shown[(y // 2) * 3 + x // 2]
        changed[y, x] = part * image[y, x] + (1 - part) * background[y, x]
    logits = oracle.vit(module, params, changed)[0]
    return np.exp(logits[TARGET]) / np.exp(logits).sum() if probability else logits[TARGET]


@pytest.fixture(scope="module")
def values(small):
    """The value of every coalition."""
    return {shown: answer(small, shown) for shown in itertools.product((0, 1), repeat=N)}


def exact_shapley(values):
    """By the definition: the weighted sum over all coalitions without the patch."""
    n = len(next(iter(values)))
    found = np.zeros(n)
    for shown, value in values.items():
        size = sum(shown)
        for j in range(n):
            if not shown[j]:
                weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                found[j] += weight * (values[(*shown[:j], 1, *shown[j + 1 :])] - value)
    return found


def without(*patches):
    return tuple(int(j not in patches) for j in range(N))


SQUARES = ((0, 1, 3, 4), (1, 2, 4, 5))  # the windows of 2 x 2 patches


# ---- removal one by one ---------------------------------------------------------------------------------------------


def test_occlusion(small, values):
    single = [values[FULL] - values[without(j)] for j in range(N)]
    np.testing.assert_allclose(run(small, "occlusion")[0], single, rtol=1e-7, atol=1e-10)
    losses = [values[FULL] - values[without(*square)] for square in SQUARES]
    of_windows = [np.mean([v for v, square in zip(losses, SQUARES, strict=True) if j in square]) for j in range(N)]
    # The second window ends at the border, wherever the stride would have it begin.
    for stride in (1, 2):
        found = run(small, "occlusion", window=2, stride=stride, chunk=1)[0]
        np.testing.assert_allclose(found, of_windows, rtol=1e-7, atol=1e-10)


def test_what_stands_in_and_what_is_asked(small):
    image = small[2]
    taps = np.exp(-0.5 * (np.arange(-15, 16) / 5) ** 2)
    blurred = np.zeros_like(image)
    for y, x in np.ndindex(4, 6):
        for dy, dx in itertools.product(range(-15, 16), repeat=2):
            near = image[np.clip(y + dy, 0, 3), np.clip(x + dx, 0, 5)]
            blurred[y, x] += taps[dy + 15] * taps[dx + 15] * near / taps.sum() ** 2
    for options, fill in (
        ({"fill": "black", "black": (-2.0, -1.5, -1.0), "value": "probability"}, [-2.0, -1.5, -1.0]),
        ({"fill": "blur", "value": "probability"}, blurred),
    ):
        full = answer(small, FULL, probability=True)
        expected = [full - answer(small, without(j), fill, probability=True) for j in range(N)]
        np.testing.assert_allclose(run(small, "occlusion", **options)[0], expected, rtol=1e-6, atol=1e-9)


def test_black_is_that_of_the_models_normalisation():
    vit = tiny_vit(2)
    images = np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)
    maps, details = tm.explain(vit, images, "occlusion", details=True, fill="black")
    answers = jax.jit(lambda images: vit.module.apply({"params": vit.params}, vit.preprocessing.normalise(images)))
    for j in range(N):
        y, x = 8 * (j // 3), 8 * (j % 3)
        changed = images.copy()
        changed[:, y : y + 8, x : x + 8] = 0
        own = np.take_along_axis(details["logits"] - answers(changed), np.asarray(details["target"])[:, None], 1)[:, 0]
        np.testing.assert_allclose(maps.reshape(2, N)[:, j], own, rtol=1e-3, atol=1e-5)


def test_an_option_of_ones_own_is_left_alone(monkeypatch):
    """A method outside of this family may have an option `fill` that means something else."""

    def uniform(module, params, inputs, target, *, fill: Literal["black", "red"] = "red"):
        details = tm.capture(module, params, inputs, target, []).details()
        return jnp.full((len(inputs), *module.grid), float(fill == "black")), details

    monkeypatch.setitem(tm.METHODS, "uniform", dataclasses.replace(tm.METHODS["gae"], function=uniform, options=None))
    vit = tiny_vit(2)
    assert (tm.explain(vit, np.zeros((1, 16, 24, 3), np.float32), "uniform", fill="black") == 1).all()


@pytest.mark.parametrize("window", [1, 2])
def test_token_dropping_is_the_model_on_the_shorter_sequence(small, window):
    module, params, image = small
    groups = [(j,) for j in range(N)] if window == 1 else SQUARES
    full = oracle.vit(module, params, image)[0][TARGET]
    losses = []
    for group in groups:
        left = [j for j in range(N) if j not in group]
        losses.append(full - oracle.vit(module, params, image, patches_left=left)[0][TARGET])
    mean = [np.mean([v for v, group in zip(losses, groups, strict=True) if j in group]) for j in range(N)]
    found, details = run(small, "token_dropping", window=window, chunk=4)
    np.testing.assert_allclose(found, mean, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(details["logits"][TARGET], full, rtol=1e-9)


# ---- RISE -----------------------------------------------------------------------------------------------------------


def test_rise(small):
    with jax.enable_x64(True):
        masks = np.asarray(maths.smooth_masks(jax.random.key(3), GRID, 7, 2, 0.4), np.float64)
    total = sum(answer(small, mask) * mask for mask in masks)
    found = run(small, "rise", samples=7, cells=2, keep=0.4, seed=3, chunk=3)[0]
    np.testing.assert_allclose(found, total / masks.sum(0), rtol=1e-6)


def test_masks_of_rise():
    samples, cells, grid = 3000, 3, (5, 8)
    key = jax.random.key(0)
    masks = np.asarray(maths.smooth_masks(key, grid, samples, cells, 0.3))
    assert masks.min() >= 0 and masks.max() <= 1
    np.testing.assert_allclose(masks.mean(0), 0.3, atol=0.03)  # each patch alike, at the border too
    masks = masks.reshape(-1, *grid)
    near, far = (np.corrcoef(masks[:, 2, 0], masks[:, 2, k])[0, 1] for k in (1, 7))
    assert near > 0.7 > 0.1 > abs(far)
    # One of them by hand: bits, made 4/3 as large in cells of 2 x 3 patches, and cropped.
    bits, top, left = jax.random.split(key, 3)
    low = np.asarray(jax.random.bernoulli(bits, 0.3, (samples, 3, 3)), float)
    y0, x0 = (int(jax.random.randint(k, (samples,), 0, most)[9]) for k, most in ((top, 2), (left, 3)))

    def weights(length, place):  # of a point between the centres of three bits
        at = np.clip((place + 0.5) * 3 / length - 0.5, 0, 2)
        return np.maximum(0, 1 - np.abs(at - np.arange(3)))

    expected = [[weights(8, y0 + y) @ low[9] @ weights(12, x0 + x) for x in range(8)] for y in range(5)]
    np.testing.assert_allclose(masks[9], expected, atol=1e-6)


# ---- Shapley values -------------------------------------------------------------------------------------------------


def test_the_oracle_of_shapley_values():
    """The glove game: patch 0 is the left one, 1 and 2 are right ones; a pair is worth 1."""
    worth = {s: float(s[0] and (s[1] or s[2])) for s in itertools.product((0, 1), repeat=3)}
    np.testing.assert_allclose(exact_shapley(worth), [2 / 3, 1 / 6, 1 / 6])


def test_shapley_walks_along_its_orders(small, values):
    exact = exact_shapley(values)
    found, details = run(small, "shapley", pairs=3, seed=1, chunk=4)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 3)
        orders = [np.argsort(jax.random.permutation(key, jnp.arange(N, dtype=jnp.int32))) for key in keys]
    of_pairs = []
    for order in orders:
        added = np.zeros(N)
        for walk in (order, order[::-1]):
            shown = [0] * N
            for patch in walk:
                before = values[tuple(shown)]
                shown[patch] = 1
                added[patch] += (values[tuple(shown)] - before) / 2
        of_pairs.append(added)
    np.testing.assert_allclose(found, np.mean(of_pairs, 0), rtol=1e-6, atol=1e-9)
    error = np.std(of_pairs, 0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(details["standard_error"].ravel(), error, rtol=1e-6, atol=1e-9)
    # What they add up to does not depend on the orders.
    np.testing.assert_allclose(details["full_value"] - details["empty_value"], found.sum(), rtol=1e-7)
    np.testing.assert_allclose(exact.sum(), found.sum(), rtol=1e-7)
    assert np.abs(found - exact).max() > 1e-3


def test_all_orders_give_the_exact_values(values):
    ranks = jnp.asarray(list(itertools.permutations(range(N))), jnp.int32)
    shown = np.asarray(jax.vmap(maths.path)(ranks)).astype(int)
    along = np.array([[values[tuple(s)] for s in [(0,) * N, *walk, FULL]] for walk in shown])
    with jax.enable_x64(True):
        found = jax.vmap(maths.marginals)(jnp.asarray(along), ranks).mean(0)
    np.testing.assert_allclose(found, exact_shapley(values), rtol=1e-9)


def test_the_kernel_over_all_coalitions_gives_the_exact_values(small, values):
    found, details = run(small, "kernel_shap", pairs=31)
    np.testing.assert_allclose(found, exact_shapley(values), rtol=1e-5)
    np.testing.assert_array_equal(details["standard_error"], 0)
    np.testing.assert_allclose(details["full_value"] - details["empty_value"], found.sum(), rtol=1e-7)
    np.testing.assert_allclose(details["empty_value"], values[(0,) * N], rtol=1e-9)


def test_the_kernels_fit_is_the_constrained_one(small, values):
    """The same coalitions, by the equations of Lagrange; the errors, by leaving no pair of residuals out."""
    found, details = run(small, "kernel_shap", pairs=14, seed=5)
    with jax.enable_x64(True):
        masks = np.asarray(maths.kernel_coalitions(jax.random.key(5), N, 14)).astype(int)
    pairs = [(z, 1 - z) for z in masks]
    moment, target = np.zeros((N, N)), np.zeros(N)
    for z in itertools.chain(*pairs):
        moment += np.outer(z, z) / 28
        target += z * (values[tuple(z)] - values[(0,) * N]) / 28
    system = np.block([[moment, np.ones((N, 1))], [np.ones((1, N)), np.zeros((1, 1))]])
    total = values[FULL] - values[(0,) * N]
    phi = np.linalg.solve(system, np.append(target, total))[:N]
    np.testing.assert_allclose(found, phi, rtol=1e-5)
    pulls = []
    for pair in pairs:
        pull = sum(z * (values[tuple(z)] - values[(0,) * N] - z @ phi) for z in pair) / 2
        pulls.append(np.linalg.solve(system, np.append(pull, 0))[:N])
    error = np.sqrt(np.mean(np.square(pulls), 0) / (14 - N + 1))
    np.testing.assert_allclose(details["standard_error"].ravel(), error, rtol=1e-5)


def test_standard_errors_are_the_spread_over_seeds():
    """A game of five patches with every interaction, 400 times: the values are right in the mean, the errors too."""
    n, pairs, repeats = 5, 40, 400
    table = np.random.default_rng(0).normal(size=2**n).astype(np.float32)
    bits = lambda masks: (masks.astype(jnp.int32) * 2 ** jnp.arange(n)).sum(-1)  # noqa: E731
    worth = {s: float(table[int(np.dot(s, 2 ** np.arange(n)))]) for s in itertools.product((0, 1), repeat=n)}
    exact = exact_shapley(worth)
    play = lambda masks: jnp.asarray(table)[bits(masks)]  # noqa: E731
    empty, full = jnp.asarray(table[0]), jnp.asarray(table[-1])

    def by_kernel(key):
        masks = maths.kernel_coalitions(key, n, pairs)
        values = jnp.stack([play(masks), play(~masks)], 1)
        return maths.kernel_shap(masks, jnp.ones(pairs), values, empty, full)

    found, errors = jax.jit(jax.vmap(by_kernel))(jax.random.split(jax.random.key(0), repeats))
    spread = np.std(found, 0)
    np.testing.assert_allclose(np.mean(found, 0), exact, atol=5 * spread.max() / np.sqrt(repeats) + 0.02)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), 0)), spread, rtol=0.25)
    # Half of the coalitions, by size, are as often as the kernel says.
    sizes = np.bincount(np.asarray(maths.kernel_coalitions(jax.random.key(1), n, 20000)).sum(-1), minlength=n + 1)
    kernel = np.array([0, *(1 / (s * (n - s)) for s in range(1, n)), 0])
    np.testing.assert_allclose(sizes / 20000, kernel / kernel.sum(), atol=0.015)


# ---- activations of one patch in another pass -----------------------------------------------------------------------


def inserted(small, patch, first, end, fill=0.0):
    """Logits of the neutral image, where the token of a patch is the source's at the input of some blocks; every block
    in a run of its own."""
    module, params, image = small
    source = oracle.vit(module, params, image)[1]
    neutral, change = np.broadcast_to(fill, image.shape), {}
    for block in range(first, end):
        before = oracle.vit(module, params, neutral, change)[1]["tokens", block]
        change["tokens", block] = np.zeros_like(before)
        change["tokens", block][1 + patch] = source["tokens", block][1 + patch] - before[1 + patch]
    return oracle.vit(module, params, neutral, change)[0]


@pytest.mark.parametrize("blocks", [(0, 2), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_caap(small, blocks):
    first, end = blocks
    options = {} if blocks == (0, 2) else {"first_block": 1, "fill": "black", "black": (-2.0, -1.5, -1.0)}
    fill = options.get("black", 0.0)
    expected = np.array([inserted(small, j, first, end, fill) for j in range(N)])
    found, details = run(small, "caap", chunk=4, **options)
    np.testing.assert_allclose(found, expected[:, TARGET], rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(details["empty_value"], answer(small, np.zeros(N), fill), rtol=1e-9)
    assert np.ptp(found) > 1e-2
    if options:
        share = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
        np.testing.assert_allclose(run(small, "caap", value="probability", **options)[0], share[:, TARGET], rtol=1e-6)


@pytest.mark.slow
def test_caap_in_the_first_block_shows_a_patch_to_the_model(small, values):
    """The embedded token depends only on the patch, so the pass is that of the image with this patch only."""
    found, details = run(small, "caap", end_block=1)
    np.testing.assert_allclose(found, [values[tuple(np.eye(N, dtype=int)[j])] for j in range(N)], rtol=1e-7)
    np.testing.assert_allclose(details["logits"][TARGET], values[FULL], rtol=1e-9)


# ---- the order that metrics reward ----------------------------------------------------------------------------------

GAMES = 4  # the classes of a function whose logits are a table of coalitions


def of_tables(tables, images):
    """Logits of images: the row of the coalition of patches of 2 x 2 pixels that are not zero."""
    shown = images.reshape(-1, 2, 2, 3, 2, 3).mean((2, 4, 5)).reshape(-1, N) > 0.5
    return tables[(shown.astype(jnp.int32) * 2 ** jnp.arange(N, dtype=jnp.int32)).sum(-1)]


def greedy(worth, candidates):
    """Ranks by the definition: each step adds the patch with the highest reward of those that are tried."""
    everything, first, rank = set(range(N)), set(), [0] * N
    reward = lambda shown: worth(shown) - worth(everything - shown)  # noqa: E731
    gains = {j: reward({j}) - reward(first) for j in range(N)}
    for place in range(N):
        tried = sorted(everything - first, key=lambda j: -gains[j])[:candidates]
        gains |= {j: reward(first | {j}) - reward(first) for j in tried}
        best = max(tried, key=gains.get)
        rank[best] = place
        first.add(best)
    return rank


def rewarded(worth, order):
    """Insertion minus deletion of an order of patches, in the mean over steps."""
    everything = set(range(N))
    return np.mean([worth(set(order[:k])) - worth(everything - set(order[:k])) for k in range(N + 1)])


@pytest.mark.parametrize("candidates", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_mda(candidates):
    rng = np.random.default_rng(0)
    bits = np.arange(2**N)[:, None] >> np.arange(N) & 1
    tables = bits @ rng.normal(0.5, 1, (N, GAMES)) + rng.normal(size=(2**N, GAMES))
    with jax.enable_x64(True):
        explain = jax.jit(explain_fn(of_tables, "mda", patch=2, candidates=candidates, chunk=4))
        maps = explain(jnp.asarray(tables), jnp.ones((GAMES, 4, 6, 3)), jnp.arange(GAMES))
    for game in range(GAMES):
        worth = lambda shown: tables[sum(2**j for j in shown), game]  # noqa: B023, E731
        rank = N - np.round(np.asarray(maps[game]).ravel() * N)
        np.testing.assert_array_equal(rank, greedy(worth, candidates))
        if candidates >= N:  # greedy is the best of all 720 orders, or near it
            best = max(rewarded(worth, order) for order in itertools.permutations(range(N)))
            assert 0.95 * best < rewarded(worth, np.argsort(rank)) <= best + 1e-12


@pytest.mark.slow
def test_no_method_has_a_better_insertion_and_deletion_than_mda():
    vit = tm.load()
    images = vit.read(Path(__file__).parent.parent / "notebooks" / "chelsea_face.jpg")
    inputs = vit.prepare(images)
    predict = lambda x: vit.module.apply({"params": vit.params}, x)  # noqa: E731
    target = jax.jit(predict)(inputs).argmax(-1)
    squares = {"patch": 8, "value": "probability"}
    found = {}
    for method in ("mda", "occlusion", "shapley", "caap", "libra_full_grad", "tokentm_mix", "tokentm"):
        options = squares if method in ("mda", "occlusion", "shapley") else {}
        maps = spread(tm.metrics.by_patch(tm.explain(vit, images, method, target, **options), (4, 4)), (32, 32))
        curves = jax.jit(functools.partial(tm.metrics.insertion_deletion, predict, steps=16))(inputs, maps, target)
        insertion, deletion = np.exp(curves["log_probability"]).mean((0, 2))
        found[method] = insertion - deletion
    best = found.pop("mda")
    assert best > max(found.values()), (best, found)


# ---- any model, any batch -------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """No Transformer: no grid, no tokens, and images with two channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def convolutions():
    images = np.random.default_rng(0).normal(size=(3, 8, 12, 2)).astype(np.float32)
    module = Convolutions()
    return module, jax.jit(module.init)(jax.random.key(0), images)["params"], images


METHODS = {
    "occlusion": {"window": 2},
    "rise": {"samples": 5, "chunk": 2},
    "shapley": {"pairs": 2},
    "kernel_shap": {"pairs": 12},
    "mda": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_any_model_and_each_sample_for_itself(convolutions, method):
    module, params, images = convolutions
    explain = jax.jit(explain_fn(module, method, patch=4, details=True, **METHODS[method]))
    target = jnp.array([0, 2, 1], jnp.int32)
    maps, details = explain(params, images, target)
    assert maps.shape == (3, 2, 3) and np.isfinite(maps).all()
    for i in range(3):
        alone, of_one = explain(params, images[i : i + 1], target[i : i + 1])
        np.testing.assert_allclose(alone[0], maps[i], rtol=1e-4, atol=1e-6)
        for name, array in of_one.items():
            np.testing.assert_allclose(array[0], details[name][i], rtol=1e-4, atol=1e-6)
    broken = images.copy()
    broken[1, 0, 0, 0] = np.nan
    marked, _ = explain(params, broken, target)
    np.testing.assert_array_equal(marked[::2], maps[::2])
    assert np.isnan(marked[1]).all()


def test_chunks_change_nothing(convolutions, monkeypatch):
    module, params, images = convolutions
    sizes, in_chunks = [], perturbation.in_chunks
    monkeypatch.setattr(perturbation, "CACHED", 3 * 24 * 5 + 1)  # three images of 24 patches, five times
    monkeypatch.setattr(perturbation, "in_chunks", lambda *given: sizes.append(given[-1]) or in_chunks(*given))
    functions = [explain_fn(module, "occlusion", patch=2, chunk=chunk) for chunk in (1, 7, 4096, None)]
    found = jax.jit(lambda *arguments: [function(*arguments) for function in functions])(params, images)
    assert sizes == [1, 7, 4096, 5 if jax.default_backend() == "cpu" else 8]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-6)


def test_options_at_odds_are_refused(convolutions):
    module, params, images = convolutions
    for method, options, message in (
        ("caap", {}, "no attention was found"),
        ("rise", {}, "Convolutions has no 'grid' of patches: give the option 'patch'"),
        ("rise", {"patch": 5}, "'patch' must divide the image of 8 x 12 pixels, got 5"),
        ("occlusion", {"patch": 4, "window": 3}, "'window' must be at most 2 for 2 x 3 patches, got 3"),
        ("occlusion", {"patch": 2, "window": 2, "stride": 3}, r"'stride' must be at most the window \(2\), got 3"),
        ("kernel_shap", {"patch": 2, "pairs": 40}, "'pairs' must be at least 48 for 24 patches, got 40"),
        ("token_dropping", {}, "forward pass of tm.models.ViT; Convolutions has another one"),
        ("occlusion", {"fill": "white"}, "'fill' of the method 'occlusion' must be 'mean', 'black' or 'blur'"),
        ("rise", {"keep": 1.0}, "'keep' .* must be less than 1"),
        ("shapley", {"pairs": 1}, "'pairs' .* must be greater than or equal to 2"),
        ("occlusion", {"chunk": 0}, "'chunk' .* must be greater than or equal to 1"),
    ):
        with pytest.raises(tm.InputError, match=message):
            jax.eval_shape(explain_fn(module, method, **options), params, images)
    square = ViT(img_size=(4, 4), patch_size=4, embed_dim=4, depth=1, num_heads=1, num_classes=2)
    weights = init_params(square, jax.random.key(0))
    for method, options, message in (
        ("token_dropping", {}, "must leave a patch"),
        ("caap", {"end_block": 2}, "'end_block' must be at most 1"),
        ("caap", {"end_block": 0}, "'end_block' must be more than 'first_block'"),
        ("shapley", {}, "at least two patches"),
        ("occlusion", {"window": 2}, "'window' must be at most 1 for 1 x 1 patches, got 2"),
    ):
        with pytest.raises(tm.InputError, match=message):
            jax.eval_shape(explain_fn(square, method, **options), weights, images[:, :4, :4, [0, 1, 1]])
