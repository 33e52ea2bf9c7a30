"""Images as inputs: `Preprocessing` reads photos (`photos.py`) or recordings (`recordings.py`) for a model."""

import dataclasses
import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le
from jax import Array
from jax.core import Tracer

from tokentm_jax.data.audio import LONGEST, MOST
from tokentm_jax.data.audio import Spectrogram as Spectrogram
from tokentm_jax.data.examples import Example, Source, kind_of
from tokentm_jax.data.photos import find_photos
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import as_path
from tokentm_jax.inputs import photos, recordings
from tokentm_jax.inputs.pictures import Panel
from tokentm_jax.inputs.reader import random_map
from tokentm_jax.maths.maps import to_pixels, unit
from tokentm_jax.validation import check_fields, read_fields

Channels = tuple[float, ...]  # 3 of photos, 1 of recordings
Side = Annotated[int, Ge(1), Le(8192)]  # in pixels
LOWEST, HIGHEST = -0.5, 1.5  # what the overshoot of resizing may reach; normalised images and 0 ... 255 go beyond


class Statistics(TypedDict):
    """Per-channel mean and standard deviation of images in [0, 1]."""

    mean: Channels
    std: Channels


HALF: Statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET: Statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP: Statistics = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize the short side to `size / crop_pct`, crop the centre, scale to [0, 1], subtract mean, divide by std.

    `size` is (height, width) in pixels. With `crop_mode="squash"` both sides are resized to `size / crop_pct`,
    whatever the proportions of the photo. `mean` and `std` have no default: a model fed with another model's
    statistics gives plausible and wrong results.

    With `audio` it is recordings that become spectrograms, of `size` (mel bins, frames) and one channel; how photos
    are resized is then ignored. Raises InputError naming the field that is out of range.
    """

    size: tuple[Side, Side]
    crop_pct: Annotated[float, Gt(0), Le(1)] = 0.9
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: Channels = dataclasses.field(kw_only=True)
    std: tuple[Annotated[float, Gt(0)], ...] = dataclasses.field(kw_only=True)
    crop_mode: Literal["center", "squash"] = dataclasses.field(default="center", kw_only=True)
    audio: Spectrogram | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        def check(holds: bool, field: str, expected: str) -> None:
            if not holds:
                raise InputError(f"preprocessing: {field!r} must be {expected}, got {getattr(self, field)!r}")

        check_fields(self, "preprocessing")
        lengths = len(self.mean), len(self.std)
        channels = 1 if self.audio is not None else 3 if 3 in lengths else max(1, *lengths)
        many = {1: "one number", 3: "three numbers"}.get(channels, f"{channels} numbers")
        check(len(self.mean) == channels, "mean", many)
        check(len(self.std) == channels, "std", many)
        if self.audio is not None:
            bins, frames = self.size
            check(bins <= self.audio.fft // 2, "size", f"at most {self.audio.fft // 2} mel bins")
            check(self.audio.seconds(frames) <= LONGEST, "size", f"of at most {LONGEST} seconds")
            check(
                frames * self.audio.fft <= MOST, "size", f"of at most {MOST // self.audio.fft} frames of such length"
            )

    regular = True
    figures = "png"

    @property
    def modality(self) -> Any:
        """The file of the modality that is read: `photos` or `recordings`."""
        return photos if self.audio is None else recordings

    @property
    def kind(self) -> str:
        return self.modality.KIND

    @property
    def suffixes(self) -> frozenset[str]:
        return frozenset(self.modality.SUFFIXES)

    @property
    def frame(self) -> str:
        return self.modality.FRAME

    @property
    def scales(self) -> Any:
        """Labels and ticks of the axes of the picture under a map; None without."""
        return None if self.audio is None else recordings.scales(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: (H, W, C)."""
        return (*self.size, len(self.mean))

    def read(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> np.ndarray:
        """Files as the model receives them, not normalised: float32 [B, H, W, C] in [0, 1].

        Warns where a recording is longer than what the model receives. Raises InputError.
        """
        images = []
        for path in [as_path(path, f"a {self.kind}") for path in self._several(paths)]:
            content = self.opened(path)
            images.append(self.sample(Example(str(path), content)))
            if (said := self.notice(content, str(path))) is not None:
                warnings.warn(said, stacklevel=3)
        return np.stack(images)

    def _several(self, what: Any) -> list[Any]:
        """Files or arrays of a caller, one by one."""
        listed = isinstance(what, Sequence) and not isinstance(what, str | bytes)
        several = list(what) if listed or (hasattr(what, "__array__") and np.ndim(what) == 4) else [what]
        if not several:
            raise InputError(f"no {self.kind}s were given")
        return several

    def _own(self, content: Any, name: str) -> Any:
        """The content of an example, if it is of this modality."""
        if (kind := kind_of(content)) != self.kind:
            raise InputError(f"{name} is a {kind}, and the model takes {self.kind}s")
        return content

    def _of(self, profile: str) -> "Preprocessing":
        """Profile "reference": photos are squashed to the size, bilinear. Others: this preprocessing."""
        if profile != "reference":
            return self
        return dataclasses.replace(self, crop_pct=1.0, crop_mode="squash", interpolation="bilinear")

    def sample(self, example: Example) -> np.ndarray:
        found = self.modality.fit(self._own(example.content, example.key), self)
        return found.astype(np.float32) / 255 if found.dtype == np.uint8 else found

    def found(self, argument: str, number: int = 1) -> dict[str, Path]:
        return {str(path): path for path in find_photos([argument], self.suffixes, self.kind)}

    def opened(self, given: Any) -> Any:
        return self.modality.opened(given)

    def decoded(self, content: bytes) -> Any:
        return self.modality.decode(io.BytesIO(content), f"the {self.kind}")

    def example(self) -> bytes:
        return self.modality.example()

    def notice(self, content: Any, name: str) -> str | None:
        return None if self.audio is None else recordings.notice(content, self, name)

    def panel(self, content: Any, title: str, side: int = 448, profile: str = "default") -> Panel:
        return Panel(self.modality.view(self._own(content, "this"), self._of(profile), side), title)

    def panels(self, what: Any, side: int) -> list[tuple[np.ndarray, Panel]]:
        several = self._several(what)
        found: list[tuple[np.ndarray, Panel]] = []
        for i, given in enumerate(several, 1):
            title = f"{self.kind} {i}" if len(several) > 1 else self.kind
            if not hasattr(given, "__array__"):
                path = as_path(given, f"a {self.kind}")
                key, content, title = str(path), self.opened(path), printable(path.name)
            elif (array := np.asarray(given)).shape == self.shape and array.dtype.kind == "f":  # its very numbers
                seen = np.asarray(self.checked(array[None]), np.float32)[0]
                found.append((seen, Panel(self.modality.pictured(seen, side), title)))
                continue
            else:
                key, content = title, self.modality.from_array(array)
            found.append((self.sample(Example(key, content)), self.panel(content, title, side)))
        return found

    def shown(self, heatmap: np.ndarray, module: Any, squares: bool) -> np.ndarray:
        tiling = getattr(module, "tiling", None)
        return heatmap if self.audio is None else recordings.shown(heatmap, self, tiling, squares)

    def levels(self, example: Example, profile: str = "default") -> tuple[np.ndarray, np.ndarray | None]:
        """An example as 256 levels, uint8 [H, W, C], and its mask [H, W]: of photos, cut alike by nearest neighbour;
        of the samples of recordings, where it changes the spectrogram.

        Raises InputError for a mask of another size than the image, and for an example of another modality.
        """
        content, mask, used = self._own(example.content, example.key), example.mask, self._of(profile)
        levels = self.modality.fit(content, used)
        if levels.dtype != np.uint8:
            levels = (levels * 255).round().astype(np.uint8)
        return levels, None if mask is None else self.modality.fit_mask(content, mask, used, example.key)

    def stacked(self, samples: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(samples)

    stacked_masks = stacked

    def batch(self, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *self.shape), jnp.uint8)

    def fixed(self, source: Source) -> "Preprocessing":
        return self

    def dummy(self, size: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (size, *self.shape), np.uint8)

    def noise(self, keys: Sequence[str], seed: int, module: Any, inputs: Any, pixels: bool) -> np.ndarray:
        return np.stack([random_map(key, self.size if pixels else module.grid, seed) for key in keys])

    def blank(self, module: Any, params: Any) -> Channels:
        """The mean colour of the model's data."""
        return self.mean

    def unit(self, levels: Any) -> Any:
        levels = jnp.asarray(levels)
        return levels if jnp.issubdtype(levels.dtype, jnp.floating) else unit(levels)

    def to_pixels(self, maps: Array, inputs: Array, module: Any) -> Array:
        return to_pixels(maps, self.size, getattr(module, "tiling", None))

    def checked(self, images: Any) -> Array:
        """Images from a caller as an array [B, H, W, C] in [0, 1], or the reason why they are refused.

        Args:
          images: a NumPy or JAX array (or what turns into one) of floating-point numbers in [0, 1]. What resizing
            leaves beyond is accepted: bicubic and Lanczos filters overshoot at edges. float64 becomes float32, unless
            `jax_enable_x64` is set. Values inside a `jit` are not known yet, and only shape and type are checked.

        Raises:
          InputError: no array, another shape, no image, another type, NaN or infinite values, or values that are
            pixels in 0 ... 255 or already normalised.
        """
        if not hasattr(images, "__array__"):
            found = f"got a {type(images).__name__}; numpy.stack makes one of a list"
            raise InputError(f"images must be an array [B, H, W, {len(self.mean)}], {found}")
        array = images if isinstance(images, jax.Array) else np.asarray(images)
        self._check_type(array)
        if isinstance(array, np.ndarray) and not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if not len(array):
            raise InputError("images must hold one image at least, got an empty batch")
        if not isinstance(array, Tracer):
            low, high = float(array.min()), float(array.max())  # NaN where any value is
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InputError("images must be finite numbers in [0, 1], got NaN or infinite values")
            if low < LOWEST or high > HIGHEST:
                hint = "divide pixels in 0 ... 255 by 255" if high > 10 else "leave out the normalisation"
                raise InputError(f"images must be in [0, 1], got values from {low:.4g} to {high:.4g}: {hint}")
        return jax.device_put(array)  # `jnp.asarray` would compile a program for the shape

    def _check_type(self, images: Any) -> None:
        if images.ndim != 4 or images.shape[1:] != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise InputError(f"images must be [B, {expected}], got {list(images.shape)}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be floating-point numbers in [0, 1], got {images.dtype}")

    def normalise(self, images: Array) -> Array:
        """Images [B, H, W, C] in [0, 1] -> the model's input of the same shape and floating type.

        Raises InputError for another shape or for integers, which are most likely pixels in 0 ... 255. Values are not
        looked at, so that it can be part of a compiled function; see `checked`.
        """
        self._check_type(images)
        mean, std = (jnp.asarray(s, images.dtype).reshape(1, 1, 1, -1) for s in (self.mean, self.std))
        return (images - mean) / std

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        if self.crop_mode == "center":  # the digests of models are those from before there was anything else
            del fields["crop_mode"]
        if self.audio is None:
            del fields["audio"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Any) -> "Preprocessing":
        """From untrusted JSON values; raises InputError naming what is missing, unknown or out of range."""
        if isinstance(values, Mapping) and values.get("audio") is not None:
            values = {**values, "audio": Spectrogram.from_dict(values["audio"])}
        return read_fields(cls, values, "preprocessing")
