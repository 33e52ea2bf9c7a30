"""Recordings: how one becomes a spectrogram, and the picture on which a map is shown, the lowest frequency below."""

import io
import wave
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokentm_jax.data.audio import SUFFIXES, Recording, decode
from tokentm_jax.data.audio import open_recording as opened
from tokentm_jax.errors import InputError
from tokentm_jax.maths.maps import resized

__all__ = ["SUFFIXES", "decode", "opened"]
KIND = "recording"
FRAME = "Spectrogram"  # what the picture under a map is called
SIZE = (336, 448)  # pixels of that picture


def example() -> bytes:
    """A tenth of a second of silence."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    return file.getvalue()


def fit(recording: Recording, preprocessing: Any) -> np.ndarray:
    """A recording as the model receives it: float32 [mel bins, frames, 1] in [0, 1]."""
    return preprocessing.audio.image(recording, preprocessing.size)


def fit_mask(recording: Recording, mask: np.ndarray, preprocessing: Any, name: str) -> np.ndarray:
    """The mask of samples [n], as one of the spectrogram [mel bins, frames]: the largest number in each frame.
    Raises InputError for a mask of another length."""
    if mask.shape != recording.samples.shape:
        raise InputError(f"{name}: recording and mask differ in length")
    (bins, frames), sound = preprocessing.size, preprocessing.audio
    places = np.arange(len(mask)) * sound.sampling_rate / recording.rate  # of samples, at the rate of the spectrogram
    starts = sound.hop * np.arange(frames)
    starts = starts[starts + sound.window <= max(sound.window, len(mask) * sound.sampling_rate / recording.rate)]
    edges = zip(np.searchsorted(places, starts), np.searchsorted(places, starts + sound.window), strict=True)
    found = np.zeros((bins, frames), mask.dtype)
    found[:, : len(starts)] = [mask[first:last].max(initial=0) for first, last in edges]
    return found


def notice(recording: Recording, preprocessing: Any, name: str) -> str | None:
    """A sentence about the end of a long recording, which the model does not receive; None for a short one."""
    sound = preprocessing.audio
    received = sound.seconds(preprocessing.size[1])
    if recording.seconds < received + sound.hop / sound.sampling_rate:
        return None
    return f"{name} is {recording.seconds:.2f} s long: the model receives its first {received:.2f} s"


def view(recording: Recording, preprocessing: Any, side: int) -> np.ndarray:
    return pictured(fit(recording, preprocessing), side)


def from_array(array: np.ndarray) -> Recording:
    shape = f"{list(array.shape)} {array.dtype}"
    raise InputError(f"a recording must be a path, or a spectrogram as `read` gives it, got {shape}")


def pictured(image: np.ndarray, side: int) -> np.ndarray:
    """A spectrogram [mel bins, frames, 1] for display: uint8 [h, w, 3], grey, the lowest frequency below, long side
    `side` pixels."""
    size = (SIZE[0] * side // SIZE[1], side)
    rows, columns = (np.arange(wanted) * count // wanted for wanted, count in zip(size, image.shape, strict=False))
    grey = (image[::-1, :, 0][rows][:, columns] * 255).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


def shown(heatmap: np.ndarray, preprocessing: Any, tiling: Any, squares: bool) -> np.ndarray:
    """Where patches overlap, values are at their centres."""
    if squares:
        return heatmap[::-1]
    return np.asarray(resized(jnp.asarray(heatmap[None]), preprocessing.size, tiling))[0, ::-1]


def scales(preprocessing: Any) -> tuple[str, list[tuple[float, str]], str, list[tuple[float, str]]]:
    """Label and ticks (place in [0, 1] from the left, text) of time [s], and of frequency [Hz] (from above)."""
    (bins, frames), sound = preprocessing.size, preprocessing.audio
    longest = sound.seconds(frames)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if longest / step < 6)
    centres = sound.frequencies(bins)
    x = [
        (((t * sound.sampling_rate - sound.window / 2) / sound.hop + 0.5) / frames, f"{t:g}")
        for t in np.arange(0, longest, step)
    ]
    octaves = [62.5 * 2**k for k in range(12)]
    y = [
        (1 - (np.interp(f, centres, np.arange(bins)) + 0.5) / bins, f"{f:g}")
        for f in octaves
        if centres[0] <= f <= centres[-1]
    ]
    return "time [s]", [tick for tick in x if 0 <= tick[0] <= 1], "frequency [Hz]", y
