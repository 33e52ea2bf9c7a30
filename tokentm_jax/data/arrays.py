"""Labelled images for training and evaluation."""

import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from tokentm_jax.data.photos import SUFFIXES, decode, open_photo
from tokentm_jax.errors import InputError

MAX_ENTRY = 64 * 2**20  # bytes of one image file
MAX_MEMORY = 16 * 2**30  # bytes of all decoded images


class Data(NamedTuple):
    """A data set that fits in memory: images uint8 [n, H, W, 3], labels int32 [n], one name per class."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def load_dataset(spec: str | Path, limit: int | None = None) -> Data:
    """Read a data set of equally large images.

    Args:
      spec: a zip file or a folder of class folders (`cat/1.jpg`, or `train/cat/1.jpg`; classes in the order of their
        names), or "tfds:NAME:SPLIT" for a prepared TensorFlow data set.
      limit: take so many images, spread evenly over the whole set.

    Returns:
      The images, their labels and the class names. Images that cannot be read are left out with a warning that
      counts and names them. A zip is never extracted: its entries are read in memory, so their names can do no harm.

    Raises:
      InputError: nothing there, not a zip, no class folders, no readable image, images of differing size, more than
        `MAX_MEMORY` bytes of them, tfds missing or its data set not prepared.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 image, got {limit}")
    if str(spec).startswith("tfds:"):
        return _from_tfds(str(spec), limit)
    path = Path(spec)
    with ExitStack() as stack:
        if path.is_dir():
            names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
            source, read = f"the folder {path}", lambda name: open_photo(path / name)
        elif path.is_file():
            try:
                archive = stack.enter_context(zipfile.ZipFile(path))
            except (zipfile.BadZipFile, OSError):
                raise InputError(f"{path} is neither a folder nor a zip file of class folders") from None
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            source, read = f"the zip file {path}", lambda name: read_entry(archive, name)
        else:
            raise InputError(f"the data set {path} does not exist")
        return _from_names(names, read, source, limit)


def _from_names(names: list[str], read: Callable[[str], Any], source: str, limit: int | None) -> Data:
    """A data set whose images are named "…/class/image"."""
    labelled = [(name, PurePosixPath(name).parent.name) for name in names if is_image(name)]
    labelled = [(name, label) for name, label in labelled if label not in ("", "..")]
    class_names = tuple(sorted({label for _, label in labelled}))
    if not labelled:
        raise InputError(f"{source} holds no images in class folders")

    def pairs() -> Iterator[tuple[np.ndarray, int]]:
        bad = []
        for name, label in spread(labelled, limit):
            try:
                image = read(name)
            except InputError as error:
                bad.append(str(error))
                continue
            yield np.asarray(image), class_names.index(label)
        if bad:
            shown = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
            warnings.warn(f"{len(bad)} images of {source} were skipped: {shown}", stacklevel=4)

    return _stack(pairs(), len(spread(labelled, limit)), class_names, source)


def _stack(pairs: Iterator[tuple[np.ndarray, int]], most: int, class_names: tuple[str, ...], source: str) -> Data:
    images: np.ndarray = np.empty((0, 1, 1, 3), np.uint8)
    labels: list[int] = []
    for image, label in pairs:
        if not labels:
            if most * image.nbytes > MAX_MEMORY:
                size = f"{most} images of {image.shape[1]} x {image.shape[0]} pixels"
                raise InputError(f"{source} has {size}, too many for the memory; use a limit or smaller images")
            images = np.empty((most, *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            (_, height, width, _), (other_height, other_width, _) = images.shape, image.shape
            sizes = f"{width} x {height} and {other_width} x {other_height}"
            raise InputError(f"{source} has images of differing size ({sizes} pixels)")
        images[len(labels)] = image
        labels.append(label)
    if not labels:
        raise InputError(f"{source} has no image that can be read")
    return Data(images[: len(labels)], np.array(labels, np.int32), class_names)


def spread(items: Any, limit: int | None) -> list[Any]:
    """`limit` of the items, evenly spaced, or all."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def read_entry(archive: zipfile.ZipFile, name: str) -> Any:
    """One image of a zip; the size that the zip's directory states is not trusted."""
    try:
        with archive.open(name) as entry:
            content = entry.read(MAX_ENTRY + 1)
    except Exception as error:
        raise InputError(f"{name} cannot be read from the zip file: {error}") from None
    if len(content) > MAX_ENTRY:
        raise InputError(f"{name} is larger than {MAX_ENTRY >> 20} MiB")
    return decode(BytesIO(content), name)


class Prepared(NamedTuple):
    """One split of a prepared TensorFlow data set, with random access: records with "image" and "label"."""

    records: Any
    class_names: tuple[str, ...]
    version: str


def open_tfds(spec: str) -> Prepared:
    """Open "tfds:NAME:SPLIT" without TensorFlow. Raises InputError that says what is missing and how to get it."""
    name, _, split = spec.removeprefix("tfds:").partition(":")
    if not name or not split:
        raise InputError(f"a TensorFlow data set is given as tfds:NAME:SPLIT, got {spec!r}")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(f"{spec} needs the optional packages: pip install 'tokentm_jax[data]'") from None
    command = f"tfds build {name} --file_format=array_record"
    unprepared = InputError(f"{spec} is not prepared; run `{command}` once (it needs tensorflow)")
    try:
        builder: Any = tfds.builder(name, file_format="array_record")
        if not builder.is_prepared():
            raise unprepared
        features, records = builder.info.features, builder.as_data_source(split)
    except tfds.core.DatasetNotFoundError:
        raise InputError(f"TensorFlow Datasets knows no data set {name!r}") from None
    except NotImplementedError:  # prepared in a format that has no random access
        raise unprepared from None
    except (ValueError, KeyError, OSError) as error:  # such as an unknown split
        if isinstance(error, InputError):
            raise
        raise InputError(f"{spec} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not {"image", "label"} <= set(features or ()):
        raise InputError(f"the data set {name!r} has no features 'image' and 'label'")

    return Prepared(records, tuple(features["label"].names), str(builder.info.version))


def rgb(image: Any) -> np.ndarray:
    """An image of a data set [H, W, 1 or 3] -> [H, W, 3]."""
    image = np.asarray(image)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _from_tfds(spec: str, limit: int | None) -> Data:
    prepared = open_tfds(spec)
    chosen = spread(range(len(prepared.records)), limit)

    def pairs() -> Iterator[tuple[np.ndarray, int]]:
        for i in chosen:
            example = prepared.records[i]
            yield rgb(example["image"]), int(example["label"])

    return _stack(pairs(), len(chosen), prepared.class_names, spec)
