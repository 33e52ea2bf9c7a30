"""Random changes of training images, each a pure function of a key.

Images are [H, W, C] or [B, H, W, C] in [0, 1], and keep their size unless they are cropped. What is drawn for an image
depends on its key alone.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.maths.maps import spread

ASPECT = (3 / 4, 4 / 3)  # width to height of random resized crops
STRONGEST = 10  # magnitude of RandAugment
GREY = 128.0  # fills what a geometric operation uncovers, of 255


# ---- shift, affine and colour changes -------------------------------------------------------------------------------


def shift(key: Array, images: Array, most: int) -> Array:
    """Move each image [B, H, W, 3] by up to so many pixels in both directions, zeros coming in."""
    b, h, w, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    corner = jax.random.randint(key, (b, 2), 0, 2 * most + 1)
    return jax.vmap(lambda i, c: jax.lax.dynamic_slice(i, (c[0], c[1], 0), (h, w, channels)))(padded, corner)


def flip(key: Array, images: Array) -> Array:
    """Mirror each image [B, H, W, 3] left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1)), images[:, :, ::-1], images)


def affine(strength: float, key: Array, image: Array) -> Array:
    """Random rotation, shear and zoom of one image [H, W, 3] about its centre, bilinear."""
    h, w, _ = image.shape
    angle, shear, zoom = jax.random.uniform(key, (3,), minval=-1, maxval=1) * strength
    angle = angle * 0.5
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    matrix = rotation @ jnp.array([[1.0, shear * 0.3], [0.0, 1.0]]) * (1 + 0.3 * zoom)
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2])
    points = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1) - centre
    source = points @ matrix.T + centre
    sample = partial(jax.scipy.ndimage.map_coordinates, coordinates=[source[..., 0], source[..., 1]], order=1)
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def colour(strength: float, key: Array, image: Array) -> Array:
    """Random brightness, contrast and saturation of one image [H, W, 3] in [0, 1]."""
    brightness, contrast, saturation = 1 + 0.6 * strength * jax.random.uniform(key, (3,), minval=-1, maxval=1)
    image = image * brightness
    image = image.mean() + (image - image.mean()) * contrast
    grey = image.mean(-1, keepdims=True)
    return jnp.clip(grey + (image - grey) * saturation, 0, 1)


# ---- random resized crops -------------------------------------------------------------------------------------------


def crop_box(key: Array, height: int, width: int, area: tuple[float, float]) -> Array:
    """A random box (top, left, height, width) in pixels, float [4], inside an image of so many pixels.

    Its share of the image's area is uniform in `area`, its aspect log-uniform in `ASPECT` (Szegedy et al., CVPR 2015);
    a box that would stick out is cut to the image's height or width.
    """
    k_area, k_aspect, k_place = jax.random.split(key, 3)
    share = jax.random.uniform(k_area, minval=area[0], maxval=area[1])
    low, high = (math.log(a) for a in ASPECT)
    aspect = jnp.exp(jax.random.uniform(k_aspect, minval=low, maxval=high))
    size = jnp.sqrt(share * height * width * jnp.stack([1 / aspect, aspect]))
    whole = jnp.array([height, width], size.dtype)
    size = jnp.minimum(size, whole)
    return jnp.concatenate([jax.random.uniform(k_place, (2,)) * (whole - size), size])


def resized_crop(image: Array, box: Array, size: tuple[int, int]) -> Array:
    """The box (top, left, height, width) of an image [h, w, 3], resized to [H, W, 3]; cubic, clipped to [0, 1].

    Where the box is larger than `size` the kernel grows with it, as in Pillow's `resize(..., box=...)`.
    """
    scale = jnp.array(size, box.dtype) / box[2:]
    found = jax.image.scale_and_translate(image, (*size, image.shape[-1]), (0, 1), scale, -box[:2] * scale, "cubic")
    return found.clip(0, 1)


def random_resized_crop(area: tuple[float, float], size: tuple[int, int], key: Array, image: Array) -> Array:
    """A random box of an image [h, w, 3], as `crop_box` draws it, resized to [H, W, 3]."""
    h, w, _ = image.shape
    return resized_crop(image, crop_box(key, h, w, area), size)


# ---- RandAugment ----------------------------------------------------------------------------------------------------
# Operations on levels, with Pillow's results: an image [H, W, 3] of whole numbers 0 to 255 in float32, and a strength
# in [0, 1], where 0 changes nothing (but for `auto_contrast` and `equalize`, which take none). Signed ones take it in
# [-1, 1].


def identity(image: Array, _: Array) -> Array:
    return image


def auto_contrast(image: Array, _: Array) -> Array:
    """Stretch the levels of each channel to 0 to 255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    stretched = jnp.floor((image - low) * (255 / jnp.maximum(high - low, 1)) + 1e-3)
    return jnp.where(high > low, stretched, image)


def equalize(image: Array, _: Array) -> Array:
    """Give each channel as even a histogram as a table of levels can."""

    def channel(levels: Array) -> Array:
        index = levels.astype(jnp.int32)
        counts = jnp.zeros(256, jnp.int32).at[index.ravel()].add(1)
        step = (index.size - counts[index.max()]) // 255
        before = jnp.cumsum(counts) - counts
        table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[index].astype(levels.dtype), levels)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def solarize(image: Array, strength: Array) -> Array:
    """Invert all levels from a threshold on: 256 at strength 0, 0 at strength 1."""
    return jnp.where(image < jnp.round(256 * (1 - strength)), image, 255 - image)


def posterize(image: Array, strength: Array) -> Array:
    """Keep the first 8 (strength 0) to 4 (strength 1) bits."""
    step = 2.0 ** jnp.round(4 * strength)
    return jnp.floor(image / step) * step


def _luma(image: Array) -> Array:
    """Levels [H, W, 1] of grey, by ITU-R 601."""
    return jnp.round(image @ jnp.array([0.299, 0.587, 0.114], image.dtype))[..., None]


def _blend(plain: Array, image: Array, strength: Array) -> Array:
    """From `plain` (factor 0) over `image` (1) on; the factor is 1 + 0.9 times the signed strength."""
    return jnp.clip(jnp.floor(plain + (1 + 0.9 * strength) * (image - plain)), 0, 255)


def saturate(image: Array, strength: Array) -> Array:
    """Less or more colour ("Color")."""
    return _blend(_luma(image), image, strength)


def contrast(image: Array, strength: Array) -> Array:
    """Nearer to, or further from, the mean level of grey."""
    return _blend(jnp.floor(_luma(image).mean() + 0.5), image, strength)


def brighten(image: Array, strength: Array) -> Array:
    """Nearer to, or further from, black ("Brightness")."""
    return _blend(jnp.zeros_like(image), image, strength)


def sharpen(image: Array, strength: Array) -> Array:
    """Nearer to, or further from, the image smoothed by a 3 x 3 kernel ("Sharpness"); the rim is not smoothed."""
    h, w, _ = image.shape
    total = sum(image[i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3)) + 4 * image[1:-1, 1:-1]
    smooth = image.at[1:-1, 1:-1].set(jnp.round(total / 13))
    return _blend(smooth, image, strength)


def _warp(image: Array, rows: tuple[tuple[Array | float, ...], ...]) -> Array:
    """Each pixel (x, y) from the point `rows` [2, 3] times (x, y, 1), in continuous coordinates where a pixel's
    centre is at a half; bilinear, and grey for points outside the image."""
    h, w, _ = image.shape
    y, x = jnp.meshgrid(jnp.arange(0.5, h), jnp.arange(0.5, w), indexing="ij")
    source_x, source_y = (a * x + b * y + c for a, b, c in rows)
    inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)

    def weights(source: Array, count: int) -> tuple[Array, Array, Array]:
        low = jnp.floor(source - 0.5)
        first = low.astype(jnp.int32)
        return first.clip(0, count - 1), (first + 1).clip(0, count - 1), (source - 0.5 - low)[..., None]

    left, right, dx = weights(source_x, w)
    top, bottom, dy = weights(source_y, h)
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
    return jnp.where(inside[..., None], jnp.floor(upper * (1 - dy) + lower * dy + 1e-3), GREY)


def rotate(image: Array, strength: Array) -> Array:
    """By up to 30 degrees about the centre, counter-clockwise for a positive strength."""
    h, w, _ = image.shape
    angle = -strength * math.pi / 6
    c, s = jnp.cos(angle), jnp.sin(angle)
    return _warp(image, ((c, s, w / 2 - c * w / 2 - s * h / 2), (-s, c, h / 2 + s * w / 2 - c * h / 2)))


def shear_x(image: Array, strength: Array) -> Array:
    return _warp(image, ((1.0, 0.3 * strength, 0.0), (0.0, 1.0, 0.0)))


def shear_y(image: Array, strength: Array) -> Array:
    return _warp(image, ((1.0, 0.0, 0.0), (0.3 * strength, 1.0, 0.0)))


def translate_x(image: Array, strength: Array) -> Array:
    """By up to 150 / 331 of the width, the share of AutoAugment's ImageNet policy."""
    return _warp(image, ((1.0, 0.0, strength * (150 / 331) * image.shape[1]), (0.0, 1.0, 0.0)))


def translate_y(image: Array, strength: Array) -> Array:
    return _warp(image, ((1.0, 0.0, 0.0), (0.0, 1.0, strength * (150 / 331) * image.shape[0])))


# The list of Cubuk et al. 2020 in its order, with the ranges of AutoAugment (Cubuk et al., CVPR 2019, table 6); True:
# the strength gets a random sign.
OPERATIONS: tuple[tuple[Callable[[Array, Array], Array], bool], ...] = (
    (identity, False),
    (auto_contrast, False),
    (equalize, False),
    (rotate, True),
    (solarize, False),
    (saturate, True),
    (posterize, False),
    (contrast, True),
    (brighten, True),
    (sharpen, True),
    (shear_x, True),
    (shear_y, True),
    (translate_x, True),
    (translate_y, True),
)


def rand_augment(count: int, magnitude: float, key: Array, image: Array) -> Array:
    """RandAugment (Cubuk et al., NeurIPS 2020): operations drawn from `OPERATIONS`, each as likely as another.

    Args:
      count: so many, one after the other (the paper's N).
      magnitude: the strength of all of them, 0 to `STRONGEST` (its M); the paper's ranges are read so that more
        is stronger, for all of them.
      key: of this image.
      image: [H, W, 3] in [0, 1], taken as 256 levels.

    Returns:
      [H, W, 3] in [0, 1], of 256 levels.
    """

    def signed(operation: Callable[[Array, Array], Array], has_sign: bool) -> Callable[[Array, Array], Array]:
        return operation if has_sign else lambda image, strength: operation(image, jnp.abs(strength))

    branches = [signed(*row) for row in OPERATIONS]

    def one(levels: Array, key: Array) -> tuple[Array, None]:
        k_choice, k_sign = jax.random.split(key)
        choice = jax.random.randint(k_choice, (), 0, len(branches))
        strength = magnitude / STRONGEST * jax.random.rademacher(k_sign, (), levels.dtype)
        return jax.lax.switch(choice, branches, levels, strength), None

    levels = jnp.round(image.clip(0, 1) * 255)
    return jax.lax.scan(one, levels, jax.random.split(key, count))[0] / 255


# ---- spectrograms ---------------------------------------------------------------------------------------------------
# Images [mel bins, frames, 1] in [0, 1], where 0 is silence.


def delay(most: tuple[float, float], key: Array, image: Array) -> Array:
    """Another start: the sound comes earlier or later, by up to these shares of the length, and silence comes in."""
    count = image.shape[1]
    moved = jax.random.randint(key, (), -round(most[0] * count), round(most[1] * count) + 1)
    places = jnp.arange(count) - moved
    inside = (places >= 0) & (places < count)
    return jnp.where(inside[:, None], image[:, places.clip(0, count - 1)], 0)


def stretch(most: tuple[float, float], key: Array, image: Array) -> Array:
    """Another voice and another speed: both axes of one spectrogram scaled from their beginning, linearly.

    `most` is how much larger or smaller frequency and time may become (0.2: by 1 / 1.2 to 1.2), log-uniform. Silence
    comes in at the end; above the highest frequency the last one goes on.
    """
    drawn = jax.random.uniform(key, (2,), image.dtype, -1, 1)
    for axis, share in enumerate(most):
        count = image.shape[axis]
        numbers = jnp.arange(count, dtype=image.dtype)
        places = numbers * jnp.exp(drawn[axis] * math.log(1 + share))
        if axis == 0:
            places = places.clip(0, count - 1)
        weights = jax.nn.relu(1 - jnp.abs(places[:, None] - numbers))
        image = jnp.moveaxis(jnp.tensordot(weights, image, ((1,), (axis,))), 0, axis)
    return image


def tilt(most: float, key: Array, image: Array) -> Array:
    """Another microphone: what is not silent rises or falls with frequency, from half of a drawn level below the
    middle to half of it above; the level is uniform up to `most`, either way."""
    level = most * jax.random.uniform(key, (), image.dtype, -1, 1)
    ramp = jnp.linspace(-0.5, 0.5, image.shape[0], dtype=image.dtype)[:, None, None]
    return jnp.where(image > 0, (image + level * ramp).clip(0, 1), image)


def hiss(most: float, key: Array, image: Array) -> Array:
    """Background noise: nothing is below a level, uniform up to `most`, that wavers by a twentieth."""
    k_level, k_grain = jax.random.split(key)
    level = most * jax.random.uniform(k_level, dtype=image.dtype)
    return jnp.maximum(image, level + 0.05 * jax.random.normal(k_grain, image.shape, image.dtype)).clip(0, 1)


def spec_mask(most: tuple[float, float], key: Array, image: Array) -> Array:
    """SpecAugment (Park et al., Interspeech 2019): two bands of each axis become the image's mean, each as wide as a
    uniform share of the axis, frequency and time, up to `most`."""
    hidden = jnp.zeros(image.shape[:2], bool)
    for axis, share in enumerate(most):
        count = image.shape[axis]
        for k in jax.random.split(jax.random.fold_in(key, axis), 2):
            width, start = jax.random.uniform(k, (2,), image.dtype) * jnp.asarray([share, 1.0], image.dtype)
            places = (jnp.arange(count, dtype=image.dtype) + 0.5) / count
            inside = (places >= start * (1 - width)) & (places < start * (1 - width) + width)
            hidden = hidden | jnp.expand_dims(inside, 1 - axis)
    return jnp.where(hidden[..., None], image.mean(), image)


# ---- mixtures of images ---------------------------------------------------------------------------------------------


def cutmix(key: Array, images: Array, targets: Array) -> tuple[Array, Array]:
    """Paste one random box of each image's neighbour in the batch into it; targets mix by area (Yun et al., 2019)."""
    _, h, w, _ = images.shape
    k_area, k_centre = jax.random.split(key)
    side = jnp.sqrt(jax.random.uniform(k_area))
    cy, cx = jax.random.uniform(k_centre, (2,)) * jnp.array([h, w], side.dtype)
    rows = jnp.abs(jnp.arange(0.5, h) - cy) < side * h / 2
    columns = jnp.abs(jnp.arange(0.5, w) - cx) < side * w / 2
    box = (rows[:, None] & columns)[None, :, :, None]
    share = box.mean()
    mixed = jnp.where(box, jnp.roll(images, 1, 0), images)
    return mixed, (1 - share) * targets + share * jnp.roll(targets, 1, 0)


def mixup(key: Array, images: Array, targets: Array) -> tuple[Array, Array]:
    """Mix each image and its target with its neighbour's in the batch, by one uniform share (Zhang et al., 2018, with
    alpha = 1)."""
    share = jax.random.uniform(key)
    images, targets = ((1 - share) * a + share * jnp.roll(a, 1, 0) for a in (images, targets))
    return images, targets


# ---- missing patches ------------------------------------------------------------------------------------------------


def missing(most: float, grid: tuple[int, int], key: Array, images: Array) -> Array:
    """Fill random patches of normalised images [B, H, W, C] with 0, the mean of the data.

    Each patch of an image is filled with the same probability, which is uniform up to `most`.
    """
    k_share, k_patches = jax.random.split(key)
    share = most * jax.random.uniform(k_share, (len(images), 1, 1))
    filled = jax.random.uniform(k_patches, (len(images), *grid)) < share
    return jnp.where(spread(filled, (images.shape[1], images.shape[2]))[..., None], 0, images)
