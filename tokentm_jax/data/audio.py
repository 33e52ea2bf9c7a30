"""Recordings: read from files that nobody has checked, and made into log-mel spectrograms.

A spectrogram is an image [mel bins, frames, 1] whose first row is the lowest frequency. Its values are logarithms of
energies, brought to [0, 1] linearly, so that all that is done with photos can be done with it.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NamedTuple

import numpy as np
from annotated_types import Ge, Le, Lt

from tokentm_jax.errors import InputError
from tokentm_jax.files import opened
from tokentm_jax.validation import check_fields

if TYPE_CHECKING:
    from tokentm_jax.data.preprocessing import Preprocessing

SUFFIXES = {".wav", ".wave"}
LONGEST = 30  # seconds of a recording that are read, however long it is
MOST = 2**25  # frames times samples of the transform: 256 MiB of float64
MAX_CHANNELS = 32
RATES = (1_000, 384_000)  # lowest and highest, in Hz
MAX_CHUNKS = 10_000  # of a file, before its samples
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # tags of WAV formats
UNKNOWN = 0xFFFFFFFF  # size that a program writes that could not go back to the header
CROSSINGS, ROLL_OFF, BETA = 32, 0.95, 9.0  # of the resampling filter, see `resample`
PREEMPHASIS = 0.97
LEAST_ENERGY = 2.0**-23


class Recording(NamedTuple):
    """Sound: the mean over channels, and how long all of it is, of which at most `LONGEST` seconds are here."""

    samples: np.ndarray  # float32 [n]; full scale is 1
    rate: int  # samples a second
    seconds: float


class _Format(NamedTuple):
    tag: int
    channels: int
    rate: int
    bits: int


@dataclasses.dataclass(frozen=True)
class Spectrogram:
    """How sound becomes a log-mel spectrogram: Kaldi's filter bank, with symmetric Hann windows.

    Args:
      sampling_rate: in Hz; recordings of another rate are resampled.
      window, hop, fft: samples of a frame, from one frame to the next, and of the Fourier transform.
      lowest_frequency: in Hz, where the first mel filter begins; the last one ends at half of the sampling rate.
      floor, ceiling: natural logarithms of energies, which become 0 and 1; what is beyond is cut.
      relative: energies are relative to the loudest of the recording.
      padding: value in [0, 1] of the frames after the end of a shorter recording.

    Raises InputError for values that are out of range or do not go together.
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
        if self.window > self.fft:
            raise InputError(
                f"{where}: the window of {self.window} samples is longer than the transform of {self.fft}"
            )
        if self.lowest_frequency >= self.sampling_rate / 2:
            raise InputError(f"{where}: 'lowest_frequency' must be below half of the sampling rate")
        if self.floor >= self.ceiling:
            raise InputError(f"{where}: 'floor' must be below 'ceiling'")

    @classmethod
    def from_dict(cls, values: Any) -> "Spectrogram":
        """From untrusted JSON values. Raises InputError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= known:
            raise InputError(f"preprocessing: 'audio' must be a mapping with the fields {', '.join(sorted(known))}")
        try:
            return check_fields(cls(**values), "preprocessing: 'audio'")
        except (TypeError, OverflowError):  # of the comparisons
            raise InputError("preprocessing: 'audio' must hold numbers") from None

    def seconds(self, frames: int) -> float:
        """How long `frames` are, from the start of the first to the end of the last."""
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
        """Log energies of mel bands, [bins, frames], of samples [n] at `sampling_rate`; n is a window at least.

        Of each frame: its mean is subtracted, then x_t - 0.97 x_(t-1), windowed; the power spectrum, the filters, the
        logarithm, of energies that are at least 2^-23.
        """
        frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), self.window)[:: self.hop]
        frames = frames - frames.mean(1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], 1)
        spectrum = np.fft.rfft((frames - PREEMPHASIS * before) * np.hanning(self.window), self.fft)
        return np.log(np.maximum(self.filters(bins) @ np.square(np.abs(spectrum)).T, LEAST_ENERGY))

    def image(self, recording: Recording, size: tuple[int, int]) -> np.ndarray:
        """A recording as float32 [bins, frames, 1] in [0, 1]: what is longer is cut, what is shorter is padded."""
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
    """The first `LONGEST` seconds of a WAV file: PCM of 8, 16, 24 or 32 bits, or floats; the mean of its channels.

    Raises InputError for a file that is missing, no file, empty, no WAV file, of another coding, damaged or truncated.
    """
    with opened(path) as file:
        return decode(file, str(path))


def decode(file: BinaryIO, name: str) -> Recording:
    """As `open_recording`, from an open binary file; `name` is what errors call it."""
    head = file.read(12)
    if not head:
        raise InputError(f"{name} is empty")
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise InputError(f"{name} is not a WAV file")
    form = None
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise InputError(f"{name} is truncated: its samples are missing")
        kind, size = head[:4], int.from_bytes(head[4:], "little")
        if kind == b"data":
            return _samples(file, name, form, size)
        if kind == b"fmt ":
            content = file.read(min(size, 40))
            form = _format(content, name)
            size -= len(content)
        file.seek(size + size % 2, 1)
    raise InputError(f"{name} is damaged: no samples among its first {MAX_CHUNKS} parts")


def _format(content: bytes, name: str) -> _Format:
    if len(content) < 16:
        raise InputError(f"{name} is damaged: it does not say what its samples are")
    number = lambda start, size: int.from_bytes(content[start : start + size], "little")  # noqa: E731
    form = _Format(number(0, 2), number(2, 2), number(4, 4), number(14, 2))
    if form.tag == EXTENSIBLE and len(content) == 40:
        form = form._replace(tag=number(24, 2))
    if form.bits not in {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}.get(form.tag, ()):
        raise InputError(
            f"{name} holds samples of {form.bits} bits in the coding {form.tag}: only PCM and floats are read"
        )
    if not 1 <= form.channels <= MAX_CHANNELS:
        raise InputError(f"{name} has {form.channels} channels: 1 to {MAX_CHANNELS} are read")
    if not RATES[0] <= form.rate <= RATES[1]:
        raise InputError(f"{name} has {form.rate} samples a second: {RATES[0]} to {RATES[1]} are read")
    if number(12, 2) != form.channels * form.bits // 8:
        raise InputError(f"{name} is damaged: its blocks have another size than its samples")
    return form


def _samples(file: BinaryIO, name: str, form: _Format | None, size: int) -> Recording:
    if form is None:
        raise InputError(f"{name} is damaged: it does not say what its samples are")
    start = file.tell()
    there = file.seek(0, 2) - start
    file.seek(start)
    if size in (0, UNKNOWN):
        size = there
    if size > there:
        raise InputError(f"{name} is truncated: {there} of {size} bytes of samples are there")
    block = form.channels * form.bits // 8
    count = size // block
    if not count:
        raise InputError(f"{name} holds no samples")
    found = np.empty(min(count, LONGEST * form.rate), np.float32)
    for first in range(0, len(found), form.rate):  # a second at a time bounds the memory
        part = found[first : first + form.rate]
        content = file.read(len(part) * block)
        if len(content) < len(part) * block:
            raise InputError(f"{name} is truncated")
        with np.errstate(all="ignore"):  # of floats that are no numbers, or too large: refused below
            part[:] = _numbers(content, form).reshape(-1, form.channels).mean(1)
    if not np.isfinite(found).all():
        raise InputError(f"{name} holds samples that are not finite numbers")
    return Recording(found, form.rate, count / form.rate)


def _numbers(content: bytes, form: _Format) -> np.ndarray:
    """Samples as float64, full scale 1."""
    if form.tag == FLOAT:
        return np.frombuffer(content, f"<f{form.bits // 8}").astype(np.float64)
    if form.bits == 8:
        return np.frombuffer(content, np.uint8) / 128.0 - 1
    if form.bits == 24:  # the upper three bytes of four
        whole = np.zeros((len(content) // 3, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        return whole.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(content, f"<i{form.bits // 8}") / 2.0 ** (form.bits - 1)


def spectrogram(recording: Recording, preprocessing: "Preprocessing", name: str) -> np.ndarray:
    """A recording as the model hears it: float32 [mel bins, frames, 1] in [0, 1]. InputError for a model of photos."""
    if preprocessing.audio is None:
        raise InputError(f"{name} is a recording, and the model takes photos")
    return preprocessing.audio.image(recording, preprocessing.size)


def notice(recording: Recording, preprocessing: "Preprocessing", name: str) -> str | None:
    """A sentence that says what of a long recording the model hears, or None where it hears all."""
    if preprocessing.audio is None:
        return None
    heard = preprocessing.audio.seconds(preprocessing.size[1])
    if recording.seconds < heard + preprocessing.audio.hop / preprocessing.audio.sampling_rate:
        return None
    return f"{name} is {recording.seconds:.2f} s long: the model hears its first {heard:.2f} s"


def read_recordings(paths: Iterable[str | Path], preprocessing: "Preprocessing") -> np.ndarray:
    """Recordings as the model hears them: float32 [B, mel bins, frames, 1] in [0, 1], not normalised.

    Warns where the model hears the beginning alone. Raises InputError.
    """
    images = []
    for path in paths:
        recording = open_recording(path)
        images.append(spectrogram(recording, preprocessing, str(path)))
        said = notice(recording, preprocessing, str(path))
        if said is not None:
            warnings.warn(said, stacklevel=3)
    if not images:
        raise InputError("no recordings were given")
    return np.stack(images)


def picture(image: np.ndarray, size: tuple[int, int] = (336, 448)) -> np.ndarray:
    """A spectrogram [mel bins, frames, 1] in [0, 1] for display: uint8 [h, w, 3], grey, the lowest frequency below."""
    rows, columns = (np.arange(side) * count // side for side, count in zip(size, image.shape, strict=False))
    grey = (image[::-1, :, 0][rows][:, columns] * 255).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)
