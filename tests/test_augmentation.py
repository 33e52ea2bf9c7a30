"""Random changes of training images, against Pillow and against loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from models.training import augmentation
from models.training.augmentation import (
    ASPECT,
    OPERATIONS,
    crop_box,
    cutmix,
    missing,
    mixup,
    rand_augment,
    random_resized_crop,
    resized_crop,
)

GREY = (128, 128, 128)
NAMES = [operation.__name__ for operation, _ in OPERATIONS]
SIGNED = {operation.__name__ for operation, signed in OPERATIONS if signed}


def photo(seed, height=20, width=26):
    """Levels [h, w, 3] of a smooth picture with noise, no channel of which uses all levels."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 200, (4, 5, 3)).astype(np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int32)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 230).astype(np.uint8)


def affine(image, matrix):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=GREY
    )


PILLOW = {  # of an image and a strength, signed for those that have a sign
    "identity": lambda image, s: image,
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "rotate": lambda image, s: image.rotate(30 * s, resample=Image.Resampling.BILINEAR, fillcolor=GREY),
    "solarize": lambda image, s: ImageOps.solarize(image, round(256 * (1 - s))),
    "saturate": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * s)),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brighten": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpen": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "shear_x": lambda image, s: affine(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: affine(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: affine(image, (1, 0, s * 150 / 331 * image.width, 0, 1, 0)),
    "translate_y": lambda image, s: affine(image, (1, 0, 0, 0, 1, s * 150 / 331 * image.height)),
}


def by_pillow(name, levels, strength):
    return np.asarray(PILLOW[name](Image.fromarray(levels), strength), np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_pillows(name):
    operation = jax.jit(getattr(augmentation, name))
    strengths = (0.0, 0.37, 0.9, 1.0, *((-0.37, -0.93) if name in SIGNED else ()))
    for seed, strength in enumerate(strengths):
        levels = photo(seed)
        found = np.asarray(operation(jnp.asarray(levels, jnp.float32), jnp.float32(strength)))
        expected = by_pillow(name, levels, strength)
        np.testing.assert_allclose(found, expected, atol=1.001, err_msg=f"strength {strength}")
        assert np.abs(found - expected).mean() < 0.05  # most levels are equal
        assert (found == np.round(found)).all() and found.min() >= 0 and found.max() <= 255
        if name not in ("auto_contrast", "equalize"):
            assert (found == levels).all() == (strength == 0 or name == "identity")


def test_images_of_one_level_stay():
    flat = jnp.full((4, 5, 3), 77.0)
    for name in ("auto_contrast", "equalize"):
        np.testing.assert_array_equal(jax.jit(getattr(augmentation, name))(flat, jnp.float32(1)), flat)


def test_rand_augment_draws_each_operation_as_often():
    """One operation on each of many copies of an image: its outcome tells which it was, and with which sign."""
    levels, strength, count = photo(3), 0.7, 700
    outcomes = [
        (name, by_pillow(name, levels, sign * strength))
        for name in NAMES
        for sign in ((1, -1) if name in SIGNED else (1,))
    ]
    images = jnp.broadcast_to(jnp.asarray(levels, jnp.float32) / 255, (count, *levels.shape))
    keys = jax.random.split(jax.random.key(0), count)
    found = jax.jit(jax.vmap(lambda k, i: rand_augment(1, 7.0, k, i)))(keys, images)
    assert found.min() >= 0 and found.max() <= 1
    distances = np.stack([np.abs(np.asarray(found) * 255 - outcome).max((1, 2, 3)) for _, outcome in outcomes])
    assert distances.min(0).max() < 1.01  # nothing else comes out
    seen = np.bincount(distances.argmin(0), minlength=len(outcomes))
    by_name = {name: sum(n for n, (other, _) in zip(seen, outcomes, strict=True) if other == name) for name in NAMES}
    assert len(by_name) == 14 and sum(by_name.values()) == count
    assert all(25 <= n <= 80 for n in by_name.values()), by_name  # 50 expected, standard deviation 6.8
    assert all(n > 8 for n in seen), seen  # both signs

    # Alone or in a batch, an image gets the same.
    alone = jax.jit(lambda k, i: rand_augment(1, 7.0, k, i))(keys[5], images[5])
    np.testing.assert_allclose(alone, found[5], atol=1e-6)


@pytest.mark.slow
def test_rand_augment_applies_one_operation_after_the_other():
    levels, rounds = photo(4), 3
    image = jnp.asarray(levels, jnp.float32) / 255
    applied = jax.jit(lambda k, i: rand_augment(rounds, 5.0, k, i))
    for seed in range(4):
        key = jax.random.key(seed)
        expected = levels
        for k in jax.random.split(key, rounds):
            k_choice, k_sign = jax.random.split(k)
            name = NAMES[int(jax.random.randint(k_choice, (), 0, 14))]
            sign = float(jax.random.rademacher(k_sign, (), jnp.float32)) if name in SIGNED else 1.0
            expected = by_pillow(name, expected.astype(np.uint8), sign * 0.5)
        found = np.asarray(applied(key, image)) * 255
        # A level more or less may grow in the operations that follow.
        assert np.abs(found - expected).mean() < 0.5


def test_a_crop_is_pillows():
    levels = photo(5, 32, 32)
    crop = jax.jit(resized_crop, static_argnums=2)
    for box, size in (
        ((0.0, 0.0, 32.0, 32.0), (32, 32)),
        ((3.25, 7.5, 11.0, 9.5), (32, 32)),
        ((1.5, 0.0, 30.5, 20.0), (16, 24)),
        ((20.0, 21.5, 12.0, 10.5), (48, 48)),
    ):
        top, left, height, width = box
        expected = Image.fromarray(levels).resize(
            size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        found = crop(jnp.asarray(levels, jnp.float32) / 255, jnp.array(box), size) * 255
        np.testing.assert_allclose(found, np.asarray(expected, np.float32), atol=2)
        assert np.abs(found - np.asarray(expected, np.float32)).mean() < 0.5


def test_boxes_are_inside_and_of_the_shares_and_aspects_asked_for():
    height, width, area = 40, 60, (0.1, 0.5)
    boxes = jax.jit(jax.vmap(lambda k: crop_box(k, height, width, area)))(jax.random.split(jax.random.key(1), 2000))
    top, left, h, w = np.asarray(boxes).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height + 1e-4).all() and (left + w <= width + 1e-4).all()
    share, aspect = h * w / (height * width), w / h
    whole = (h < height - 1e-3) & (w < width - 1e-3)  # not cut
    assert whole.mean() > 0.9
    assert (share[whole] >= area[0] - 1e-4).all() and (share <= area[1] + 1e-4).all()
    assert (aspect >= ASPECT[0] - 1e-4).all() and (aspect[whole] <= ASPECT[1] + 1e-4).all()
    assert abs(np.median(share[whole]) - 0.3) < 0.02  # uniform
    assert abs(np.log(aspect[whole]).mean()) < 0.02  # as often wide as high
    assert abs((top / (height - h + 1e-9))[whole].mean() - 0.5) < 0.03

    image = jnp.asarray(photo(6, 8, 8), jnp.float32) / 255
    found = jax.jit(lambda k, i: random_resized_crop((0.2, 1.0), (12, 10), k, i))(jax.random.key(0), image)
    assert found.shape == (12, 10, 3) and found.min() >= 0 and found.max() <= 1


def test_mixtures_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    images, targets = rng.uniform(size=(5, 8, 8, 3)).astype(np.float32), np.eye(5, dtype=np.float32)
    mixed, found = mixup(jax.random.key(2), jnp.asarray(images), jnp.asarray(targets))
    share = float(found[0, 4])
    assert 0.02 < share < 0.98
    for i in range(5):
        for array, result in ((images, mixed), (targets, found)):
            np.testing.assert_allclose(result[i], (1 - share) * array[i] + share * array[i - 1], atol=1e-6)
    shares = jax.vmap(lambda k: mixup(k, images, targets)[1][0, 4])(jax.random.split(jax.random.key(0), 200))
    assert abs(shares.mean() - 0.5) < 0.06 and abs(shares.std() - 1 / math.sqrt(12)) < 0.04  # uniform

    mixed, found = cutmix(jax.random.key(3), jnp.asarray(images), jnp.asarray(targets))
    own = (mixed == images).all(-1).mean((1, 2))
    np.testing.assert_allclose(found[jnp.arange(5), jnp.arange(5)], own, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_missing_patches_are_whole_and_of_every_number():
    images = np.random.default_rng(0).uniform(1, 2, (400, 8, 12, 3)).astype(np.float32)
    filled = jax.jit(missing, static_argnums=(0, 1))
    found = np.asarray(filled(1.0, (2, 3), jax.random.key(0), images))
    gone = (found == 0).reshape(400, 2, 4, 3, 4, 3)
    assert (gone.all((2, 4, 5)) == gone.any((2, 4, 5))).all()
    np.testing.assert_array_equal(found[found != 0], images[found != 0])
    numbers = np.bincount(gone.all((2, 4, 5)).sum((1, 2)), minlength=7)
    assert numbers.min() > 30 and numbers.max() < 90  # the probability is uniform, so each number is as likely
    half = np.asarray(filled(0.5, (2, 3), jax.random.key(0), images))
    assert abs((half == 0).mean() - 0.25) < 0.03
