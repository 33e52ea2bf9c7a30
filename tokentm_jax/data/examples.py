"""`Example` and `Source`: what data sets have in common, and how an example is decoded."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokentm_jax.data import audio
from tokentm_jax.data.audio import Recording
from tokentm_jax.data.photos import check_size, decode, open_photo
from tokentm_jax.errors import InputError

MAX_ENTRY = 64 * 2**20  # bytes of one image inside a zip or another file
_SOUNDS = (b"fLaC", b"OggS")  # the first bytes of a recording; WAV has more


class Example(NamedTuple):
    """One image, recording or text with its label and mask. Before it is `decoded`, its content is encoded."""

    key: str
    content: Any  # Image.Image | Recording | str; encoded: bytes | Path
    label: int | str | None = None  # of an encoded example, the name of the class if it has one
    # [H, W]: true in the foreground, or the number of a part from 1 on; or the rating of each character of a text.
    mask: np.ndarray | None = None
    without: Any = None  # the content without any of these parts, for known causes
    other: int | None = None  # the class that `without` has, where it is another one that is known


class Question(NamedTuple):
    """The content of an example that asks a text about an image."""

    image: Image.Image
    text: str


def kind_of(content: Any) -> str:
    """The kind of the content of an example, for messages."""
    if isinstance(content, Question):
        return "photo with a question"
    return "text" if isinstance(content, str) else "recording" if isinstance(content, Recording) else "photo"


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Examples in a fixed order. `source[i]` reads and decodes one; InputError if it cannot be read."""

    name: str
    identify: Callable[[], str]  # computes `identity`, which a part of the source shares
    keys: tuple[str, ...]  # unique names
    fetch: Callable[[str], Example]  # reads an example; its content may be encoded, and its label the name of a class
    class_names: tuple[str, ...] | None = None
    labelled: bool = True
    masked: bool = False
    parts: bool = False  # masks are the numbers of parts, and examples have `without`
    grouped: bool = False  # keys are GROUP/NAME, and examples of a group are not independent: cells of a mosaic
    named: bool = True  # false if `class_names` are only the numbers of the classes
    sizes: tuple[int, ...] | None = None  # lengths of texts, so that a batch has texts of similar length
    stamp: Callable[[Sequence[str] | None], str] | None = None  # of examples (None: all), by sizes, times, checksums

    def stamped(self, keys: Sequence[str] | None = None) -> str:
        """`stamp`; where there is none, the identity."""
        return self.identity if self.stamp is None else self.stamp(keys)

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the content of the whole data set, also for a part of it. This reads all files."""
        return self.identify()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:
        return self.read(self.keys[index])

    def read(self, key: str) -> Example:
        """An example, decoded, with the number of its class."""
        example = decoded(self.fetch(key))
        label = example.label
        return example._replace(label=self._classes[label]) if isinstance(label, str) else example

    def encoded(self, key: str) -> Example:
        """An example as `fetch` reads it, with the name of its class if it has one."""
        example = self.fetch(key)
        if self.named and self.class_names is not None and isinstance(example.label, int):
            return example._replace(label=self.class_names[example.label])
        return example

    @functools.cached_property
    def _classes(self) -> dict[str, int]:
        return {name: i for i, name in reversed([*enumerate(self.class_names or ())])}


def decoded(example: Example, least: int | None = None) -> Example:
    """An example of `Source.fetch` with its content as an image, recording or text. Raises InputError.

    Args:
      least: decode a JPEG only as finely as its short side needs to have this many pixels; see `photos.decode`.
    """
    content: Any = example.content
    name = f"record {example.key}" if example.key.isdecimal() else example.key or "the image"
    if isinstance(content, InputError):
        raise content
    if isinstance(content, Path):
        content = _open(content, least)
    elif isinstance(content, bytes):
        content = _decode_entry(content, name, least)
    elif isinstance(content, np.ndarray):
        if content.ndim != 3 or content.dtype != np.uint8 or content.shape[2] not in (1, 3):
            raise InputError(f"{name} is no image [H, W, 3] of type uint8")
        check_size(content.shape[1], content.shape[0], name)
        content = Image.fromarray(np.ascontiguousarray(np.broadcast_to(content, (*content.shape[:2], 3))))
    return example._replace(content=content)


def is_a(name: str, suffixes: Collection[str]) -> bool:
    """Whether a file is of one of these kinds, by its name; hidden files are of none."""
    path = PurePosixPath(name)
    hidden = any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in suffixes and not hidden


def _open(path: Path, least: int | None = None) -> Image.Image | Recording:
    return audio.open_recording(path) if is_a(path.name, audio.SUFFIXES) else open_photo(path, least)


def _decode_entry(content: bytes, name: str, least: int | None = None) -> Image.Image | Recording:
    if len(content) > MAX_ENTRY:
        raise InputError(f"{name} is larger than {MAX_ENTRY >> 20} MiB")
    if is_a(name, audio.SUFFIXES) or content[:4] in _SOUNDS or (content[:4], content[8:12]) == (b"RIFF", b"WAVE"):
        return audio.decode(BytesIO(content), name)
    return decode(BytesIO(content), name, least)
