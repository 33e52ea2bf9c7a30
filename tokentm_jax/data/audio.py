"""Recordings, read from untrusted files, and their log-mel spectrograms.

A spectrogram is an image [mel bins, frames, 1] whose first row is the lowest frequency. Its values are logarithms of
energies, scaled linearly to [0, 1], so all functions for photos work on it.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np
from annotated_types import Ge, Le, Lt

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import opened
from tokentm_jax.validation import check_fields, read_fields

SUFFIXES = {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus"}
LONGEST = 30  # seconds of a recording that are read
MOST = 2**25  # frames times samples of the transform: 256 MiB of float64
MAX_CHANNELS = 32
RATES = (1_000, 384_000)  # lowest and highest, in Hz
MOST_FRAMES = 2**40  # a larger number in a file means that it is unknown
MAGIC = (b"RIFF", b"fLaC", b"OggS")  # first bytes of the supported formats; libsndfile supports many more
UNKNOWN = 0xFFFFFFFF  # size in the header of a stream
_CUT = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)  # in libsndfile's notes on a WAV file
CROSSINGS, ROLL_OFF, BETA = 32, 0.95, 9.0  # of the resampling filter, see `resample`
PREEMPHASIS = 0.97
LEAST_ENERGY = 2.0**-23


class Recording(NamedTuple):
    """Sound: the mean over channels of at most `LONGEST` seconds, and the length of all of it in seconds."""

    samples: np.ndarray  # float32 [n]; full scale is 1
    rate: int  # samples a second
    seconds: float


@dataclasses.dataclass(frozen=True)
class Spectrogram:
    """How sound becomes a log-mel spectrogram: Kaldi's filter bank, with symmetric Hann windows.

    Args:
      sampling_rate: in Hz; recordings of another rate are resampled.
      window, hop, fft: samples of a frame, from one frame to the next, and of the Fourier transform.
      lowest_frequency: in Hz, where the first mel filter begins; the last one ends at half of the sampling rate.
      floor, ceiling: natural logarithms of energies, which become 0 and 1; values outside are clipped.
      relative: energies are relative to the loudest of the recording.
      padding: value in [0, 1] of the frames after the end of a shorter recording.

    Raises InputError for values that are out of range or do not fit together.
    """

    sampling_rate: Annotated[int, Ge(RATES[0]), Le(RATES[1])] = 16_000
    window: Annotated[int, Ge(2), Le(2**16)] = 400
    hop: Annotated[int, Ge(1), Le(2**16)] = 160
    fft: Annotated[int, Ge(2), Le(2**16)] = 512
    lowest_frequency: Annotated[float, Ge(0), Lt(RATES[1])] = 20.0
    floor: Annotated[float, Ge(-100), Le(100)] = -16.0
    ceiling: Annotated[float, Ge(-100), Le(100)] = 16.0
    relative: bool = False
    padding: Annotated[float, Ge(0), Le(1)] = 0.0

    def __post_init__(self) -> None:
        where = "preprocessing: 'audio'"
        check_fields(self, where)
        if self.window > self.fft:
            longer = f"the window of {self.window} samples is longer than the transform of {self.fft}"
            raise InputError(f"{where}: {longer}")
        if self.lowest_frequency >= self.sampling_rate / 2:
            raise InputError(f"{where}: 'lowest_frequency' must be below half of the sampling rate")
        if self.floor >= self.ceiling:
            raise InputError(f"{where}: 'floor' must be below 'ceiling'")

    @classmethod
    def from_dict(cls, values: Any) -> "Spectrogram":
        """From untrusted JSON values. Raises InputError."""
        return read_fields(cls, values, "preprocessing: 'audio'")

    def seconds(self, frames: int) -> float:
        """Length of `frames`, from the start of the first to the end of the last."""
        return ((frames - 1) * self.hop + self.window) / self.sampling_rate

    def frequencies(self, bins: int) -> np.ndarray:
        """Centres of the mel filters in Hz, [bins]."""
        return 700 * np.expm1(self._corners(bins)[1:-1] / 1127)

    def _corners(self, bins: int) -> np.ndarray:
        return np.linspace(_mel(self.lowest_frequency), _mel(self.sampling_rate / 2), bins + 2)

    def filters(self, bins: int) -> np.ndarray:
        """Triangles on the mel scale over the frequencies of the transform, [bins, fft / 2 + 1]."""
        left, centre, right = (self._corners(bins)[i : i + bins, None] for i in range(3))
        mel = _mel(np.arange(self.fft // 2 + 1) * self.sampling_rate / self.fft)
        return np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clip(0)

    def log_mel(self, samples: np.ndarray, bins: int) -> np.ndarray:
        """Log energies of mel bands, [bins, frames], of samples [n] at `sampling_rate`; n is at least a window.

        For each frame: subtract its mean, compute x_t - 0.97 x_(t-1), apply the window, the power spectrum, the
        filters, and the logarithm of energies of at least 2^-23.
        """
        frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), self.window)[:: self.hop]
        frames = frames - frames.mean(1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], 1)
        spectrum = np.fft.rfft((frames - PREEMPHASIS * before) * np.hanning(self.window), self.fft)
        return np.log(np.maximum(self.filters(bins) @ np.square(np.abs(spectrum)).T, LEAST_ENERGY))

    def image(self, recording: Recording, size: tuple[int, int]) -> np.ndarray:
        """A recording as float32 [bins, frames, 1] in [0, 1]: a longer one is cut, a shorter one is padded."""
        bins, frames = size
        samples = resample(recording.samples, recording.rate, self.sampling_rate)
        samples = samples[: (frames - 1) * self.hop + self.window]
        samples = np.pad(samples, (0, max(0, self.window - len(samples))))
        energies = self.log_mel(samples, bins)
        if self.relative:
            energies = energies - energies.max()
        levels = ((energies - self.floor) / (self.ceiling - self.floor)).clip(0, 1)
        padding = ((0, 0), (0, frames - levels.shape[1]))
        return np.pad(levels, padding, constant_values=self.padding).astype(np.float32)[..., None]


def _mel(hertz: Any) -> Any:
    return 1127 * np.log1p(np.asarray(hertz) / 700)


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples [n] at another rate: a band-limited polyphase filter, float32.

    Output sample i is at the time i / wanted. The filter is a sinc that ends at 0.95 of the lower of the two Nyquist
    frequencies, in a Kaiser window (beta 9) of 32 zero crossings to each side, with a gain of 1 for a constant.
    """
    if rate == wanted:
        return samples.astype(np.float32)
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    cutoff = ROLL_OFF * min(1.0, wanted / rate)
    half = math.ceil(CROSSINGS / cutoff)
    count = -(-len(samples) * up // down)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples.astype(np.float64), half), 2 * half)
    found = np.empty(count, np.float32)
    for phase in range(min(up, count)):
        first, fraction = divmod(phase * down, up)
        distance = np.arange(2 * half) - half - fraction / up
        window = np.i0(BETA * np.sqrt((1 - (distance / half) ** 2).clip(0)))
        weights = np.sinc(cutoff * distance) * window
        outputs = found[phase::up]
        outputs[:] = windows[first::down][: len(outputs)] @ (weights / weights.sum())
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


def open_recording(path: str | Path) -> Recording:
    """The first `LONGEST` seconds of a WAV, FLAC or OGG file (Vorbis, Opus); the mean of its channels.

    Raises InputError for a file that cannot be read or is truncated, and without the extra `tokentm-jax[audio]`.
    """
    with opened(path) as file:
        return decode(file, str(path))


def decode(file: BinaryIO, name: str) -> Recording:
    """As `open_recording`, from an open binary file; `name` is its name in errors."""
    start = file.read(4)
    if not start:
        raise InputError(f"{name} is empty")
    if start not in MAGIC:
        raise InputError(f"{name} is not a WAV, FLAC or OGG file")
    soundfile = require("soundfile", "audio", f"reading {name}")
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            return _samples(sound, name)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{name} cannot be read: {error.error_string or 'it is damaged'}") from None


def _samples(sound: Any, name: str) -> Recording:
    rate, count = sound.samplerate, sound.frames
    if not 1 <= sound.channels <= MAX_CHANNELS:
        raise InputError(f"{name} has {sound.channels} channels: 1 to {MAX_CHANNELS} are read")
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{name} has {rate} samples a second: {RATES[0]} to {RATES[1]} are read")
    if not 1 <= count <= MOST_FRAMES:
        raise InputError(f"{name} has no samples, or does not state how many")
    for stated, present in _CUT.findall(sound.extra_info):
        if int(stated) != UNKNOWN:
            raise InputError(f"{name} is truncated: {present} of {stated} bytes of samples are present")
    found = np.empty(min(count, LONGEST * rate), np.float32)
    for first in range(0, len(found), rate):  # a second at a time bounds the memory
        part = found[first : first + rate]
        samples = sound.read(len(part), dtype="float64", always_2d=True)
        if len(samples) < len(part):
            raise InputError(f"{name} is truncated")
        with np.errstate(all="ignore"):  # values that are not numbers, or too large, raise below
            part[:] = samples.mean(1)
    if not np.isfinite(found).all():
        raise InputError(f"{name} has samples that are not finite numbers")
    return Recording(found, rate, count / rate)
