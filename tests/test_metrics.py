"""The metrics against hand-computed values, slow NumPy versions, and maps that know the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import tokentm_jax as tm
from tokentm_jax import metrics
from tokentm_jax.maths.maps import to_pixels
from tokentm_jax.maths.perturbation import linear_imputation

B, H, W = 3, 9, 8


@pytest.fixture(scope="module")
def maps():
    """Like real ones: a coarse grid made smooth, with a plateau of equal values at the bottom and the top."""
    grid = np.random.default_rng(0).normal(size=(B, 3, 4)).astype(np.float32)
    return np.array(to_pixels(jnp.clip(jnp.asarray(grid), -0.5, 1), (H, W)))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).random((B, H, W, 3)).astype(np.float32)


def linear(images):
    """A model of three classes: linear in the pixels of the left half, of the right half, of all."""
    sums = jnp.stack([images[:, :, :4].sum((1, 2, 3)), images[:, :, 4:].sum((1, 2, 3)), images.sum((1, 2, 3)) / 2], -1)
    return sums / 10 - jnp.array([0.3, 0.2, 0.0])


def log_probability(images, classes):
    logits = linear(jnp.asarray(images))
    return np.asarray(jnp.take_along_axis(logits, classes[:, None], 1)[:, 0] - logsumexp(logits, axis=1))


def slow_order(map_):
    """Pixel indices, the most relevant first, of equal ones the first index first."""
    flat = map_.ravel().tolist()
    return sorted(range(len(flat)), key=lambda i: (-flat[i], i))


# ---- removal --------------------------------------------------------------------------------------------------------


def test_ranks_by_hand_and_slowly(maps):
    by_hand = metrics.rank_pixels(jnp.array([[[0.5, 1.0, 0.5], [0.0, -1.0, 1.0]]]))
    np.testing.assert_array_equal(by_hand, [[[2, 0, 3], [4, 5, 1]]])
    assert by_hand.dtype == jnp.int32
    np.testing.assert_array_equal(metrics.rank_pixels(jnp.zeros((1, 2, 2))), [[[0, 1], [2, 3]]])
    assert len(np.unique(maps[0])) < H * W  # there are ties
    for ranks, map_ in zip(np.asarray(metrics.rank_pixels(jnp.asarray(maps))), maps, strict=True):
        assert ranks.ravel()[slow_order(map_)].tolist() == list(range(H * W))


def test_perturb_by_hand():
    image = jnp.ones((1, 2, 3, 1))
    ranks = jnp.array([[[2, 0, 3], [4, 5, 1]]])
    for count, positive, left in (
        (2, True, [[1, 0, 1], [1, 1, 0]]),
        (2, False, [[1, 1, 1], [0, 0, 1]]),
        (0, True, [[1, 1, 1], [1, 1, 1]]),
        (6, False, [[0, 0, 0], [0, 0, 0]]),
    ):
        np.testing.assert_array_equal(metrics.perturb(image, ranks, count, positive)[0, ..., 0], left)
    assert metrics.perturb(image, ranks, 1, True, 0.25).min() == 0.25


def test_perturbation_is_the_slow_one(maps, images):
    classes, labels = jnp.array([0, 1, 2], jnp.int32), jnp.array([2, 1, 0], jnp.int32)
    program = jax.jit(lambda *a: metrics.perturbation(linear, *a))
    found = program(images, maps, classes, labels)
    for d in range(2):
        for s in range(1, 10):
            count = (H * W * s) // 10
            changed = images.copy()
            for i in range(B):
                order = slow_order(maps[i])
                for pixel in order[:count] if d == 0 else order[H * W - count :]:
                    changed[i, pixel // W, pixel % W] = 0
            expected = log_probability(changed, classes)
            np.testing.assert_allclose(found["log_probability"][:, d, s - 1], expected, rtol=1e-5, atol=1e-5)
            hits = np.asarray(linear(jnp.asarray(changed))).argmax(-1) == labels
            np.testing.assert_array_equal(found["hit"][:, d, s - 1], hits)
    # An image alone, among others and elsewhere in the batch gives the same.
    for rows in ([1], [2, 1, 0], [1, 1, 1]):
        again = program(images[rows], maps[rows], classes[jnp.array(rows)], labels[jnp.array(rows)])
        place = rows.index(1)
        np.testing.assert_allclose(again["log_probability"][place], found["log_probability"][1], rtol=1e-5)


def test_insertion_and_deletion_are_the_slow_ones(maps, images):
    classes = jnp.array([0, 1, 2], jnp.int32)
    fill = metrics.blur(jnp.asarray(images), 1.5)
    found = np.asarray(metrics.insertion_deletion(linear, images, maps, classes, fill, 4)["log_probability"])
    for s in range(5):
        count = H * W * s // 4
        inserted, deleted = np.array(fill), images.copy()
        for i in range(B):
            for pixel in slow_order(maps[i])[:count]:
                y, x = divmod(pixel, W)
                inserted[i, y, x], deleted[i, y, x] = images[i, y, x], fill[i, y, x]
        np.testing.assert_allclose(found[:, 0, s], log_probability(inserted, classes), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[:, 1, s], log_probability(deleted, classes), rtol=1e-5, atol=1e-5)


def test_an_oracle_is_best_and_its_inverse_worst(images):
    """Class 1 wins while more than half of a few pixels are lit, which one map knows and one has the wrong way."""
    signal = np.zeros((B, H, W), np.float32)
    signal[0, 2:4, 2:5] = signal[1, 5, :6] = signal[2, ::4, ::4] = 1
    signal *= 1 + np.arange(H * W, dtype=np.float32).reshape(H, W) / 1000  # no ties

    def model(images):
        score = (images[..., 0] * signal).sum((1, 2)) / signal.sum((1, 2))
        return jnp.stack([jnp.full_like(score, 2), score * 4], -1)

    lit = np.broadcast_to(np.where(signal > 0, 1, 0.1)[..., None], images.shape).astype(np.float32)
    classes = jnp.ones(B, jnp.int32)
    random = np.random.default_rng(2).random((B, H, W)).astype(np.float32)
    positive, negative, insertion, deletion, coefficient, gain = [], [], [], [], [], []
    perturbation = jax.jit(lambda m: metrics.perturbation(model, jnp.asarray(lit), m, classes, classes))
    insertion_deletion = jax.jit(lambda m: metrics.insertion_deletion(model, jnp.asarray(lit), m, classes))
    patch_removal = jax.jit(lambda m: metrics.patch_removal(model, jnp.asarray(lit), m, classes, 0.0))
    group_drops = jax.jit(lambda m: metrics.group_drops(model, jnp.asarray(lit), m, classes))
    for map_ in (signal, random, 1.002 - signal):
        found = perturbation(map_)
        curves = np.concatenate([np.ones((B, 2, 1)), found["hit"]], 2).mean(0)
        positive.append(metrics.area(curves[0]))
        negative.append(metrics.area(curves[1]))
        curves = insertion_deletion(map_)["log_probability"]
        insertion.append(metrics.unit_area(np.exp(curves[:, 0]).mean(0)))
        deletion.append(metrics.unit_area(np.exp(curves[:, 1]).mean(0)))
        gain.append(metrics.srg(np.asarray(patch_removal(map_)["log_probability"])).mean())
        groups = group_drops(map_)
        coefficient.append(metrics.saco(*(np.asarray(groups[name]) for name in ("salience", "drop"))).mean())
    assert positive[0] < positive[1] < positive[2] <= 90
    assert negative[0] == 90 > negative[1] > negative[2]
    assert insertion[0] > insertion[1] > insertion[2]
    assert deletion[0] < deletion[1] < deletion[2]
    assert gain[0] > 0.3 > gain[1] > -0.3 > gain[2]
    assert coefficient[0] > 0.9 > coefficient[1] > coefficient[2]
    assert positive[0] == negative[2] == 5  # the first step removes more than half of the signal


# ---- patches, and what stands in for what is removed ----------------------------------------------------------------


def test_means_by_patch():
    map_ = jnp.arange(8.0).reshape(1, 2, 4)
    np.testing.assert_array_equal(metrics.by_patch(map_, (1, 2))[0], [[2.5, 4.5]])
    np.testing.assert_array_equal(metrics.by_patch(map_, (2, 4)), map_)
    finer = metrics.by_patch(map_, (4, 8))[0]
    np.testing.assert_array_equal(finer[:2], [[0, 0, 1, 1, 2, 2, 3, 3]] * 2)
    # Sides of which neither divides the other: 4 values on 3 patches share the middle ones.
    np.testing.assert_allclose(metrics.by_patch(map_, (1, 3))[0, 0], [2.25, 3.5, 4.75])


def test_patches_go_as_a_whole():
    ranks = metrics.rank_pixels(jnp.array([[[0.1, 0.9]]]))
    for positive, left in ((True, [[1, 1, 0, 0]] * 2), (False, [[0, 0, 1, 1]] * 2)):
        np.testing.assert_array_equal(metrics.perturb(jnp.ones((1, 2, 4, 1)), ranks, 1, positive)[0, ..., 0], left)


def slow_imputation(image, removed):
    """The linear system pixel by pixel, solved directly."""
    h, w, _ = image.shape
    places = list(zip(*np.nonzero(removed), strict=True))
    system, right = np.zeros((len(places), len(places))), np.zeros((len(places), image.shape[2]))
    for row, (y, x) in enumerate(places):
        for dy, dx in [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]:
            near = (y + dy, x + dx)
            if 0 <= near[0] < h and 0 <= near[1] < w:
                weight = 1 / 12 if dy and dx else 1 / 6
                system[row, row] += weight
                if removed[near]:
                    system[row, places.index(near)] -= weight
                else:
                    right[row] += weight * image[near]
    filled = image.astype(np.float64)
    for place, value in zip(places, np.linalg.solve(system, right), strict=True):
        filled[place] = value
    return filled


def test_road_fills_what_is_removed_from_its_neighbours(maps, images):
    # By hand: centre c = 4 + k / 12 and corner k, which has three neighbours, 5 k = 8 + c.
    removed = np.zeros((3, 3), bool)
    removed[0, 0] = removed[1, 1] = True
    found = jax.jit(linear_imputation, static_argnums=2)(jnp.arange(9.0).reshape(3, 3, 1), jnp.asarray(removed), 1e-7)[
        ..., 0
    ]
    np.testing.assert_allclose(found, [[144 / 59, 1, 2], [3, 248 / 59, 5], [6, 7, 8]], rtol=1e-5)
    shares = np.array([0.3, 0.9, 1.0])[:, None]
    removed = np.array(maps <= np.quantile(maps.reshape(B, -1), shares.ravel(), axis=1).diagonal()[:, None, None])
    compiled = jax.jit(jax.vmap(lambda image, removed: linear_imputation(image, removed, 1e-6)))
    found = np.asarray(compiled(images, removed))
    for i in range(2):
        np.testing.assert_allclose(found[i], slow_imputation(images[i], removed[i]), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[i][~removed[i]], images[i][~removed[i]])
    assert removed[2].all() and np.isfinite(found[2]).all()  # nothing is left
    # An image elsewhere in the batch, with other companions.
    np.testing.assert_array_equal(compiled(images[[1, 1, 0]], removed[[1, 2, 1]])[0], found[1])
    # The noise is that of the seed, on what was removed alone, and the same in all images.
    removed = jnp.asarray(maps > 0.5)
    noisy_linear = jax.jit(metrics.noisy_linear)
    noisy = [noisy_linear(images, removed, noise, 3) for noise in (0.0, 0.5)]
    noise = np.asarray(noisy[1] - noisy[0])
    grain = 0.5 * np.asarray(jax.random.normal(jax.random.key(3), (H, W, 3)))
    np.testing.assert_allclose(noise, np.where(removed[..., None], grain, 0), atol=1e-6)


@pytest.mark.slow
def test_road_is_the_perturbation_test_with_that_fill(maps, images):
    classes = jnp.array([0, 1, 2], jnp.int32)
    fill = lambda images, removed: metrics.noisy_linear(images, removed, noise=0.0)  # noqa: E731
    found = jax.jit(lambda *a: metrics.perturbation(linear, *a, fill))(images, maps, classes, classes)
    for s in (2, 7):
        count = (H * W * s) // 10
        for d in range(2):
            changed = []
            for i in range(B):
                order = slow_order(maps[i])
                removed = np.zeros(H * W, bool)
                removed[order[:count] if d == 0 else order[H * W - count :]] = True
                changed.append(slow_imputation(images[i], removed.reshape(H, W)))
            expected = log_probability(np.array(changed, np.float32), classes)
            np.testing.assert_allclose(found["log_probability"][:, d, s - 1], expected, rtol=1e-3, atol=1e-3)


def test_symmetric_relevance_gain(images):
    """Patch by patch from both ends, slowly, and by hand."""
    grid = np.random.default_rng(6).normal(size=(B, 3, 4)).astype(np.float32)
    classes = jnp.array([0, 1, 2], jnp.int32)
    fill = jnp.array([0.2, 0.4, 0.6])
    compiled = jax.jit(lambda maps: metrics.patch_removal(linear, images, maps, classes, fill, 5)["log_probability"])
    found = np.asarray(compiled(grid))
    for s in range(6):
        count = 12 * s // 5
        for d in range(2):
            changed = images.copy()
            for i in range(B):
                order = slow_order(grid[i])
                for patch in order[:count] if d == 0 else order[12 - count :]:
                    y, x = 3 * (patch // 4), 2 * (patch % 4)
                    changed[i, y : y + 3, x : x + 2] = fill
            np.testing.assert_allclose(found[:, d, s], log_probability(changed, classes), rtol=1e-5, atol=1e-5)
    by_hand = np.log([[[0.8, 0.2, 0.1], [0.8, 0.6, 0.1]]])
    np.testing.assert_allclose(metrics.srg(by_hand), [0.525 - 0.325])
    gain, opposite = metrics.srg(found), metrics.srg(np.asarray(compiled(-grid)))
    np.testing.assert_allclose(gain, -opposite, rtol=1e-4, atol=1e-6)
    for steps in (0, 13):
        with pytest.raises(tm.InputError, match="steps must be"):
            metrics.patch_removal(linear, images, grid, classes, 0.0, steps)


# ---- robustness and complexity --------------------------------------------------------------------------------------


def test_max_sensitivity(images):
    """Of the map that is the image's first channel, the change is the noise itself."""
    maps = jnp.asarray(images[..., 0])
    found = metrics.max_sensitivity(lambda images: images[..., 0], jnp.asarray(images), maps, 0.1, 4, 2)
    steps = [
        jax.random.uniform(key, (H, W, 3), jnp.float32, -0.1, 0.1) for key in jax.random.split(jax.random.key(2), 4)
    ]
    assert max(np.abs(step).max() for step in steps) < 0.1
    largest = max(np.linalg.norm(step[..., 0]) for step in steps)
    np.testing.assert_allclose(found, [largest / np.linalg.norm(map_) for map_ in maps], rtol=1e-4)
    zero = jnp.zeros_like(maps)
    np.testing.assert_array_equal(metrics.max_sensitivity(lambda _: zero, jnp.asarray(images), zero, 0.1, 2), 0)
    found = metrics.max_sensitivity(lambda images: images[..., 0], jnp.asarray(images), zero, 0.1, 2)
    np.testing.assert_array_equal(found, 1)


def test_infidelity_by_hand():
    drop = np.array([[1.0, 2.0, 3.0]] * 4)
    relevance = np.array([[2.0, 4.0, 6.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
    # The best scale of the second is (1 + 4) / (1 + 4), and what is left is 3 of the last.
    np.testing.assert_allclose(metrics.infidelity(relevance, drop), [0, 3, 14 / 3, 0], atol=1e-12)


def test_random_removals_are_the_slow_ones(images):
    grid = np.random.default_rng(7).normal(size=(B, 3, 4)).astype(np.float32)
    classes = jnp.array([0, 1, 2], jnp.int32)
    found = metrics.random_removals(linear, jnp.asarray(images), jnp.asarray(grid), classes, 0.5, 4, 0.25, 1)
    clean = np.exp(log_probability(images, classes))
    for s, key in enumerate(jax.random.split(jax.random.key(1), 4)):
        chosen = [patch for patch, place in enumerate(jax.random.permutation(key, jnp.arange(12))) if place < 3]
        changed = images.copy()
        for patch in chosen:
            y, x = 3 * (patch // 4), 2 * (patch % 4)
            changed[:, y : y + 3, x : x + 2] = 0.5
        np.testing.assert_allclose(
            found["relevance"][:, s], grid.reshape(B, -1)[:, chosen].sum(1), rtol=1e-5, atol=1e-6
        )
        drop = clean - np.exp(log_probability(changed, classes))
        np.testing.assert_allclose(found["drop"][:, s], drop, rtol=1e-4, atol=1e-6)


def test_sparseness_and_entropy_by_hand():
    maps = jnp.array([[[1.0, 1], [1, 1]], [[0.0, -5], [0, 0]], [[1.0, -3], [0, 0]], [[0.0, 0], [0, 0]]])
    # Shares 0, 0, 1/4, 3/4: 1 - 2 (1/4 * 1.5/4 + 3/4 * 0.5/4); all pairs' mean difference says the same.
    np.testing.assert_allclose(metrics.gini(maps), [0, 0.75, 1 - 2 * (0.375 / 4 + 0.375 / 4), 0], atol=1e-6)
    values = np.array([0.0, 0, 1, 3])
    by_differences = np.abs(values[:, None] - values).mean() / 2 / values.mean()
    np.testing.assert_allclose(metrics.gini(maps)[2], by_differences, rtol=1e-6)
    of_third = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(metrics.entropy(maps), [np.log(4), 0, of_third, np.log(4)], atol=1e-6)


# ---- SaCo -----------------------------------------------------------------------------------------------------------


def test_saco_by_hand():
    salience = np.array([[5.0, 3.0, 2.0], [5.0, 3.0, 2.0], [5.0, 3.0, 2.0], [1.0, 1.0, 1.0]])
    drop = np.array([[0.5, 0.3, 0.1], [0.1, 0.3, 0.5], [0.3, 0.5, 0.1], [0.5, 0.3, 0.1]])
    # Differences 2, 3 and 1; in the third image the first pair disagrees: (-2 + 3 + 1) / 6.
    np.testing.assert_allclose(metrics.saco(salience, drop), [1, -1, 1 / 3, 0])


def test_groups_are_the_slow_ones(maps, images):
    classes = jnp.array([0, 1, 2], jnp.int32)
    found = jax.tree.map(np.asarray, metrics.group_drops(linear, images, maps, classes, 5))
    clean = np.exp(log_probability(images, classes))
    for k in range(5):
        changed = images.copy()
        for i in range(B):
            members = [p for place, p in enumerate(slow_order(maps[i])) if place * 5 // (H * W) == k]
            assert len(members) in (14, 15)
            np.testing.assert_allclose(found["salience"][i, k], maps[i].ravel()[members].sum(), rtol=1e-5, atol=1e-6)
            changed[i].reshape(-1, 3)[members] = images[i].mean((0, 1))
        drop = clean - np.exp(log_probability(changed, classes))
        np.testing.assert_allclose(found["drop"][:, k], drop, rtol=1e-4, atol=1e-6)


def test_numbers_of_groups_and_steps_are_checked(maps, images, wrong_types):
    classes = jnp.zeros(B, jnp.int32)
    for groups in (0, 1, H * W + 1, 10**6, 2.5, True):
        with pytest.raises(tm.InputError, match="groups must be"):
            metrics.group_drops(linear, images, maps, classes, groups)
    for steps in (0, -1, H * W + 1, 10**6):
        with pytest.raises(tm.InputError, match="steps must be"):
            metrics.insertion_deletion(linear, images, maps, classes, 0.0, steps)
    many = jax.ShapeDtypeStruct((1, 224, 224), jnp.float32)
    with pytest.raises(tm.InputError, match="groups must be less than or equal to 1000"):
        jax.eval_shape(lambda m: metrics.group_drops(linear, images, m, classes, 1001), many)
    for groups in (0, 1):
        with pytest.raises(tm.InputError, match="two groups at least"):
            metrics.saco(np.ones((3, groups)), np.ones((3, groups)))
    with pytest.raises(tm.InputError, match=r"\[3, 2\] and \[3, 3\]"):
        metrics.saco(np.ones((3, 2)), np.ones((3, 3)))


def test_an_image_alone_has_the_results_it_has_in_a_batch(maps):
    """Every metric of the device, on an average-pooled model, where all tokens are read."""
    module = tm.models.ViT(
        img_size=(9, 9), patch_size=3, embed_dim=8, depth=1, num_heads=2, num_classes=3, class_token=False,
        global_pool="avg",
    )  # fmt: skip
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, tm.models.init_params(module, jax.random.key(0)))
    random = np.random.default_rng(5)
    images = random.random((B, 9, 9, 3)).astype(np.float32)
    maps = np.asarray(to_pixels(jnp.asarray(maps), (9, 9)))
    masks = random.random((B, 9, 9)) < 0.4
    classes, labels = jnp.array([0, 1, 2], jnp.int32), jnp.array([2, 1, 0], jnp.int32)

    @jax.jit
    def everything(images, maps, masks, classes, labels):
        predict = lambda images: module.apply({"params": params}, images)  # noqa: E731
        return {
            "perturbation": metrics.perturbation(predict, images, maps, classes, labels),
            "insertion": metrics.insertion_deletion(predict, images, maps, classes, metrics.blur(images), 3),
            "saco": metrics.group_drops(predict, images, maps, classes, 4),
            "segmentation": metrics.segmentation(maps, masks),
            "similarity": metrics.rank_correlation(maps, maps[:, ::-1]),
            "srg": metrics.patch_removal(linear, images, metrics.by_patch(maps, (3, 3)), classes, 0.5, 3),
            "infidelity": metrics.random_removals(
                linear, images, metrics.by_patch(maps, (3, 3)), classes, 0.5, 4, 0.3
            ),
            "sensitivity": metrics.max_sensitivity(lambda images: images.mean(-1), images, maps, 0.02, 3),
            "complexity": (metrics.gini(maps), metrics.entropy(maps)),
        }

    together = everything(images, maps, masks, classes, labels)
    for i in range(B):
        alone = everything(*(a[i : i + 1] for a in (images, maps, masks, classes, labels)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[0], b[i], rtol=1e-4, atol=1e-6), alone, together)


def test_blur():
    np.testing.assert_allclose(metrics.blur(jnp.full((1, 7, 5, 3), 0.3), 2.0), 0.3, rtol=1e-5)
    impulse = np.zeros((1, 13, 15, 2), np.float32)
    impulse[0, 6, 7, 1] = 1
    found = np.asarray(metrics.blur(jnp.asarray(impulse), 1.0))
    y, x = np.mgrid[-6:7, -7:8]
    kernel = np.exp(-(x**2 + y**2) / 2) * (abs(x) <= 3) * (abs(y) <= 3)
    np.testing.assert_allclose(found[0, ..., 1], kernel / kernel.sum(), atol=1e-6)
    assert not found[..., 0].any()


# ---- localisation ---------------------------------------------------------------------------------------------------


def slow_average_precision(values, positive):
    area, recall = 0.0, 0.0
    for threshold in sorted(set(values.tolist()), reverse=True):
        found = values >= threshold
        precision, new = positive[found].mean(), positive[found].sum() / max(positive.sum(), 1)
        area, recall = area + (new - recall) * precision, new
    return area


def test_average_precision_by_hand():
    compiled = jax.jit(metrics.average_precision)

    def one(values, positive):
        return float(compiled(jnp.array([values]), jnp.array([positive]))[0])

    assert one([0.9, 0.8, 0.7, 0.6], [True, False, True, True]) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert one([0.5] * 4, [True, False, False, False]) == pytest.approx(0.25)  # all at one threshold
    assert one([0.5, 0.5, 0.1, 0.0], [False, True, True, False]) == pytest.approx(0.5 * 0.5 + 0.5 * 2 / 3)
    assert one([0.5, 0.1, 0.2, 0.2], [False] * 4) == 0


def test_segmentation_is_the_slow_one(maps):
    masks = np.random.default_rng(3).random(maps.shape) < np.array([0.2, 0.5, 0.8])[:, None, None]
    found = jax.tree.map(np.asarray, jax.jit(metrics.segmentation)(maps, masks))
    for i in range(B):
        counts, histogram, total = [0, 0, 0, 0], np.zeros((2, 50)), float(maps[i].astype(np.float64).mean())
        for value, truth in zip(maps[i].ravel(), masks[i].ravel(), strict=True):
            counts[0 if value > total and truth else 1 if value > total else 2 if truth else 3] += 1
            histogram[0 if truth else 1, min(int(np.float32(value) * np.float32(50)), 49)] += 1
        np.testing.assert_array_equal(found["counts"][i], counts)
        np.testing.assert_array_equal(found["histogram"][i], histogram)
        flat, truth = maps[i].ravel(), masks[i].ravel()
        expected = slow_average_precision(flat, truth)
        np.testing.assert_allclose(found["average_precision"][i], expected, rtol=1e-5)
        both, one_hot = np.concatenate([1 - flat, flat]), np.concatenate([~truth, truth])
        np.testing.assert_allclose(found["map_two_channel"][i], slow_average_precision(both, one_hot), rtol=1e-5)
        assert found["pointing"][i] == truth[slow_order(maps[i])[0]]
    union = found["counts"].sum(0)
    iou = np.mean([union[0] / (union[0] + union[1] + union[2]), union[3] / (union[3] + union[1] + union[2])])
    assert metrics.mean_iou(found["counts"].mean(0)) == pytest.approx(100 * iou)
    assert metrics.pixel_accuracy(found["counts"].mean(0)) == pytest.approx(100 * (union[0] + union[3]) / union.sum())
    np.testing.assert_allclose(metrics.f1(found["counts"])[0], 2 / (1 / _precision(found) + 1 / _recall(found)))
    precision, recall = metrics.precision_recall(found["histogram"])
    for k in (0, 17, 49):
        chosen = np.minimum((maps * np.float32(50)).astype(int), 49) >= k
        assert recall[k] == pytest.approx(masks[chosen].sum() / masks.sum())
        assert precision[k] == pytest.approx(masks[chosen].mean())


def _precision(found):
    true, false = found["counts"][0, :2]
    return true / (true + false)


def _recall(found):
    true, _, missed, _ = found["counts"][0]
    return true / (true + missed)


def test_the_mask_itself_is_the_best_map(maps):
    masks = np.asarray(maps > 0.5)
    random = np.random.default_rng(4).random(maps.shape).astype(np.float32)
    results, segmentation = [], jax.jit(metrics.segmentation)
    for map_ in (masks.astype(np.float32), random, (~masks).astype(np.float32)):
        found = jax.tree.map(np.asarray, segmentation(map_, masks))
        results.append(
            [
                metrics.pixel_accuracy(found["counts"].mean(0)),
                metrics.mean_iou(found["counts"].mean(0)),
                100 * metrics.f1(found["counts"]).mean(),
                100 * found["pointing"].mean(),
                100 * found["average_precision"].mean(),
                100 * found["map_two_channel"].mean(),
            ]
        )
    best, middle, worst = np.array(results)
    np.testing.assert_allclose(best, 100)
    np.testing.assert_array_equal(worst[:4], 0)
    assert (best > middle).all() and (middle[:3] > worst[:3]).all() and (middle[4:] > worst[4:]).all()


def test_rank_correlation():
    a = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    for b, expected in ((a**3, 1), (-a, -1), (a * 0, 0), (jnp.array([[[1.0, 3.0], [2.0, 4.0]]]), 0.8)):
        np.testing.assert_allclose(metrics.rank_correlation(a, b), [expected], atol=1e-6)
    # Ties share ranks: x has 1.5, 1.5, 3, 4 and y has 1, 2, 3.5, 3.5.
    x, y = jnp.array([[0.0, 0.0, 1.0, 2.0]]), jnp.array([[0.0, 1.0, 2.0, 2.0]])
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3.5, 3.5])[0, 1]
    np.testing.assert_allclose(metrics.rank_correlation(x, y), [expected], rtol=1e-5)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_areas_by_hand():
    assert metrics.area(np.ones(10)) == pytest.approx(90)
    assert metrics.area(np.linspace(1, 0.1, 10)) == pytest.approx(90 * 0.55)
    assert metrics.area(np.array([1.0] + [0.0] * 9)) == pytest.approx(5)
    assert metrics.unit_area(np.array([0.0, 0.5, 1.0])) == pytest.approx(0.5)


def test_bootstrap():
    values = np.random.default_rng(0).normal(3, 2, 400)
    value, low, high = metrics.bootstrap(values)
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert metrics.bootstrap(values) == (value, low, high) != metrics.bootstrap(values, seed=1)
    assert metrics.bootstrap(np.full((5, 10), 1.0), metrics.area) == (90, 90, 90)
    assert metrics.bootstrap(np.array([-0.1, -0.3, 0.1]), metrics.magnitude)[0] == pytest.approx(0.1)
    # The pooled ratio, not the mean of ratios.
    counts = np.array([[1, 0, 0, 0], [0, 3, 0, 0]])
    assert metrics.bootstrap(counts, metrics.pixel_accuracy)[0] == 25


def test_groups_are_drawn_as_a_whole():
    """The slow way: draw groups, put their images together, and take the mean; and groups of one image are images."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 6, 40)
    groups = np.repeat([f"{k:02d}" for k in range(40)], sizes)
    values = np.repeat(random.normal(3, 2, 40), sizes)  # equal in a group: more images say nothing more
    value, low, high = metrics.bootstrap(values, groups=groups.tolist())
    assert value == pytest.approx(values.mean())
    random, means = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = [values[groups == f"{k:02d}"] for k in random.integers(40, size=40)]
        means.append(np.concatenate(drawn).mean())
    np.testing.assert_allclose((low, high), np.percentile(means, [2.5, 97.5]))
    single = metrics.bootstrap(values)
    assert high - low > 1.4 * (single[2] - single[1])
    names = [f"{i:03d}" for i in range(len(values))]
    np.testing.assert_allclose(metrics.bootstrap(values, groups=names), single)
    other = values + np.repeat(random.normal(0, 1, 40), sizes)
    gap = metrics.paired(other, values, groups=groups.tolist())
    np.testing.assert_allclose(gap, metrics.bootstrap(other - values, groups=groups.tolist()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("figure", [metrics.pixel_accuracy, metrics.mean_iou])
def test_figures_of_no_pixel_at_all_are_no_number(figure):
    right = np.array([3, 0, 0, 5])
    assert np.isnan(figure(np.zeros(4))) and figure(right) == 100
    np.testing.assert_array_equal(figure(np.stack([right, 0 * right])), [100, np.nan])


def test_paired_differences_are_tighter_than_two_intervals():
    random = np.random.default_rng(0)
    images = random.normal(0, 5, (200, 1))
    a, b = images + random.normal(1, 0.1, (200, 1)), images
    difference, low, high = metrics.paired(a, b)
    assert 0.95 < low < difference < high < 1.05
    assert metrics.paired(a, a) == (0, 0, 0)


def test_the_random_map_is_a_function_of_the_key():
    a = metrics.random_map("cat.jpg", (14, 14))
    np.testing.assert_array_equal(a, metrics.random_map("cat.jpg", (14, 14)))
    others = [metrics.random_map("dog.jpg", (14, 14)), metrics.random_map("cat.jpg", (14, 14), seed=1)]
    assert all(abs(np.corrcoef(a.ravel(), o.ravel())[0, 1]) < 0.3 for o in others)
    assert a.dtype == np.float32 and 0 <= a.min() < a.max() < 1
