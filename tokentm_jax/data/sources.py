"""Where evaluations read their examples: data sets of any size, decoded one by one and ahead of the device."""

import csv
import dataclasses
import hashlib
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokentm_jax.data.arrays import is_image, open_tfds, read_entry, rgb, spread
from tokentm_jax.data.photos import SUFFIXES, fit, open_photo
from tokentm_jax.data.preprocessing import Preprocessing
from tokentm_jax.errors import InputError, suggest

PROFILES = ("default", "reference")
WORKERS = 4  # threads that decode; the decoders leave Python's lock
AHEAD = 2  # batches decoded before they are asked for


class Example(NamedTuple):
    """One image with what is known of it; `mask` [H, W] is true in the foreground and as large as the image."""

    key: str
    image: Image.Image
    label: int | None = None
    mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Examples in a fixed order. `source[i]` reads and decodes one; InputError when it cannot be read.

    `identity` tells the whole data set from others, whatever part of it is chosen; `keys` are unique names.
    """

    name: str
    identity: str
    keys: tuple[str, ...]
    read: Callable[[str], Example]
    class_names: tuple[str, ...] | None = None
    labelled: bool = True
    masked: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:
        return self.read(self.keys[index])


def open_source(spec: str | Path, *, limit: int | None = None, seed: int | None = None) -> Source:
    """Open a data set without reading its images.

    Args:
      spec: a folder or zip of class folders (`cat/1.jpg` or `train/cat/1.jpg`; classes in the order of their names),
        a folder with `labels.csv` (columns `file` and `class_index`), a `.mat` file laid out as
        ImageNet-Segmentation's `gtsegs_ijcv.mat`, or "tfds:NAME:SPLIT" for a prepared TensorFlow data set.
      limit: take so many examples.
      seed: choose them at random, so that a larger limit only adds examples; None: spread evenly over the set.

    Raises:
      InputError: nothing there, another layout, no examples, tfds or h5py missing, a data set that is not prepared.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 image, got {limit}")
    path = Path(spec)
    if str(spec).startswith("tfds:"):
        source = _tfds(str(spec))
    elif path.is_dir():
        source = _listed(path) if (path / "labels.csv").is_file() else _folder(path)
    elif path.suffix.lower() == ".mat" and path.is_file():
        source = _segmentation(path)
    elif path.is_file():
        source = _zip(path)
    else:
        raise InputError(f"the data set {path} does not exist")
    if not source.keys:
        raise InputError(f"{source.name} holds no examples")
    keys = source.keys
    if seed is not None:
        keys = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))[:limit]]
    return dataclasses.replace(source, keys=tuple(spread(keys, limit)))


def _identity(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _in_classes(name: str, names: Sequence[str], identity: str, read: Callable[[str], Image.Image]) -> Source:
    """A source whose images are named "…/class/image"."""
    labels = {n: PurePosixPath(n).parent.name for n in sorted(names) if is_image(n)}
    labels = {n: label for n, label in labels.items() if label not in ("", "..")}
    if not labels:
        raise InputError(f"{name} holds no images in class folders")
    classes = tuple(sorted(set(labels.values())))
    index = {label: i for i, label in enumerate(classes)}
    return Source(name, identity, tuple(labels), lambda key: Example(key, read(key), index[labels[key]]), classes)


def _folder(path: Path) -> Source:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    names = [p.relative_to(path).as_posix() for p in files]
    identity = _identity(*(f"{n} {p.stat().st_size}" for n, p in zip(names, files, strict=True)))
    return _in_classes(f"the folder {path}", names, identity, lambda key: open_photo(path / key))


def _zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError):
        raise InputError(f"{path} is no folder, zip of class folders, .mat file or tfds:NAME:SPLIT") from None
    entries = [info for info in archive.infolist() if not info.is_dir()]
    identity = _identity(*sorted(f"{info.filename} {info.CRC}" for info in entries))
    names = [info.filename for info in entries]
    return _in_classes(f"the zip file {path}", names, identity, lambda key: read_entry(archive, key))


def _listed(path: Path) -> Source:
    """A folder whose `labels.csv` names the files."""
    table = path / "labels.csv"
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        labels = {row["file"]: int(row["class_index"]) for row in rows}
    except OSError as error:
        raise InputError(f"{table} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{table} must be a CSV file with the columns 'file' and 'class_index' (a number)") from None
    for name in labels:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{table}: {name!r} leaves the folder")
    sizes = {name: (path / name).stat().st_size if (path / name).is_file() else None for name in labels}
    identity = _identity(*(f"{name} {labels[name]} {size}" for name, size in sorted(sizes.items())))
    read = lambda key: Example(key, open_photo(path / key), labels[key])  # noqa: E731
    return Source(f"the folder {path}", identity, tuple(labels), read)


def _segmentation(path: Path) -> Source:
    """`value/img` and `value/gt` of an HDF5 file: references to images [3, W, H] and, twice, masks [W, H]."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path} needs the optional packages: pip install 'tokentm_jax[data]'") from None
    layout = InputError(f"{path} is not laid out like gtsegs_ijcv.mat (HDF5 with references in value/img, value/gt)")
    try:
        file: Any = h5py.File(path)
        images, masks = (np.asarray(file["value"][name]).ravel() for name in ("img", "gt"))
    except (OSError, KeyError, ValueError, TypeError):
        raise layout from None
    if len(images) != len(masks) or images.dtype != object:
        raise layout

    def read(key: str) -> Example:
        try:
            pixels = np.asarray(file[images[int(key)]])
            mask = file[masks[int(key)]]
            while mask.dtype == object:
                mask = file[np.asarray(mask).ravel()[0]]
            mask = np.asarray(mask)
        except Exception as error:  # what h5py raises for a damaged file has no common type
            raise InputError(f"record {key} of {path} cannot be read: {error}") from None
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
            raise InputError(f"record {key} of {path} has no image [3, W, H] of type uint8")
        if mask.shape != pixels.shape[1:]:
            raise InputError(f"record {key} of {path}: image {pixels.shape[1:]} and mask {mask.shape} differ in size")
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(2, 1, 0)))
        return Example(key, image, None, np.ascontiguousarray(mask.T > 0))

    size = path.stat().st_size
    with path.open("rb") as raw:  # the whole file may have gigabytes
        start = raw.read(2**20)
        raw.seek(max(0, size - 2**20))
        identity = _identity(size, hashlib.sha256(start + raw.read()).hexdigest())
    keys = tuple(f"{i:05d}" for i in range(len(images)))
    return Source(str(path), identity, keys, read, labelled=False, masked=True)


def _tfds(spec: str) -> Source:
    records, classes, version = open_tfds(spec)

    def read(key: str) -> Example:
        try:
            record = records[int(key)]
            image = Image.fromarray(np.ascontiguousarray(rgb(record["image"])))
        except Exception as error:
            raise InputError(f"record {key} of {spec} cannot be read: {error}") from None
        return Example(key, image, int(record["label"]))

    keys = tuple(f"{i:07d}" for i in range(len(records)))
    return Source(spec, _identity(spec, version, len(keys)), keys, read, classes)


# ---- batches --------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Arrays of `size` examples, of which the first `len(keys)` count; the rest repeats the last."""

    keys: tuple[str, ...]
    images: np.ndarray  # uint8 [size, H, W, 3]
    labels: np.ndarray  # int32 [size], -1 where unknown
    masks: np.ndarray | None  # bool [size, H, W]


def prepare(example: Example, preprocessing: Preprocessing, profile: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Image uint8 [H, W, 3] and mask bool [H, W] as the model sees them, cut alike.

    Profile "default": the model's own preprocessing. Profile "reference": squashed to the model's size, bilinear.
    The mask is always resized by nearest neighbour. Raises InputError for a mask of another size than the image.
    """
    image, mask = example.image, None
    if example.mask is not None:
        if example.mask.shape != (image.height, image.width):
            raise InputError(f"{example.key}: image and mask differ in size")
        mask = Image.fromarray(example.mask.astype(np.uint8))
    if profile == "reference":
        size = preprocessing.size[::-1]
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        cut = None if mask is None else np.asarray(mask.resize(size, Image.Resampling.NEAREST))
    else:
        nearest = dataclasses.replace(preprocessing, interpolation="nearest")
        pixels, cut = fit(image, preprocessing), None if mask is None else fit(mask, nearest)
    return pixels, None if cut is None else cut > 0


def batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    profile: str = "default",
    *,
    indices: Sequence[int] | None = None,
    skipped: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """Ready arrays of `batch_size` examples each, decoded ahead in threads.

    Every batch is made of `batch_size` consecutive `indices` (default: all in order; the last may have fewer), less
    those that cannot be read: `skipped` gets their keys and the reasons.
    """
    if profile not in PROFILES:
        raise suggest("profile", profile, PROFILES)
    chosen = range(len(source)) if indices is None else indices
    groups = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    skipped = {} if skipped is None else skipped

    def one(index: int) -> tuple[str, Any]:
        try:
            example = source[index]
            return example.key, (*prepare(example, preprocessing, profile), example.label)
        except InputError as error:
            return source.keys[index], str(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[list[Future[tuple[str, Any]]]] = deque()
        try:
            for i in range(len(groups) + AHEAD):
                if i < len(groups):
                    waiting.append([pool.submit(one, index) for index in groups[i]])
                if i >= AHEAD:
                    results = [future.result() for future in waiting.popleft()]
                    skipped |= {key: result for key, result in results if isinstance(result, str)}
                    yield _batch([(k, r) for k, r in results if not isinstance(r, str)], batch_size, preprocessing)
        finally:
            for group in waiting:
                for future in group:
                    future.cancel()


def _batch(results: list[tuple[str, Any]], size: int, preprocessing: Preprocessing) -> Batch:
    keys = tuple(key for key, _ in results)
    if not keys:
        return Batch((), np.zeros((size, *preprocessing.size, 3), np.uint8), np.full(size, -1, np.int32), None)
    images, masks, labels = zip(*(result for _, result in results), strict=True)
    fill = [len(keys) - 1] * (size - len(keys))
    rows = [*range(len(keys)), *fill]
    known = [-1 if labels[i] is None else labels[i] for i in rows]
    stacked = None if masks[0] is None else np.stack([masks[i] for i in rows])
    return Batch(keys, np.stack([images[i] for i in rows]), np.array(known, np.int32), stacked)
