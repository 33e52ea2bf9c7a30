"""The sample data of `tokentm_jax.samples`: public originals are downloaded, checked and converted.

The originals of a set are files of GitHub's zip archive of a public repository at one commit, or of an installed
Python package. The bytes of an archive may change, so only the content of its files is pinned: `Sample.sha256` is the
SHA-256 of the lines that `sha256sum` prints for them, sorted by path:

    git ls-tree -r --name-only COMMIT | grep PATTERN | LC_ALL=C sort | xargs sha256sum | sha256sum

Nothing is extracted. Files are read in memory, with known names and sizes.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import errors_as, read_bytes, read_entry, read_json, reason
from tokentm_jax.samples import SAMPLES, Sample, cache, folder_of

TIMEOUT = 30.0  # seconds without a byte
UNFINISHED = ".fetching-"
PIECE = 2**16  # bytes that are read at a time
SLACK = 200 * 2**20  # bytes by which an archive may exceed its known size
Watch = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


class Originals(NamedTuple):
    """Files: their paths in order with the targets of `Sample.files`, bytes of all, and a reader of one."""

    paths: dict[str, str]
    size: int
    read: Callable[[str], bytes]


def fetch(name: str, watch: Watch = lambda *_: nullcontext(lambda _: None)) -> Path:
    """The data folder with a set, which is fetched if no folder has it. Nothing unfinished remains. Raises InputError.

    `watch` takes a title and a number of steps, and returns a context whose value is called with finished steps.
    """
    if (folder := folder_of(name)) is not None:
        return folder
    sample, folder = SAMPLES[name], cache()
    filelock = require("filelock", "data", "fetching sample data")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0), ExitStack() as stack:
            for left in folder.glob(f"{UNFINISHED}*"):  # of a process that was killed; this one has the lock
                shutil.rmtree(left, ignore_errors=True)
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder))
            originals = stack.enter_context(_originals(name, sample, Path(work), watch))
            made = Path(work) / "made"
            with watch(f"{name}: made", len(originals.paths)) as step:
                RECIPES.get(name, _copies)(originals, made, step)
            for place in sample.made:
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(target):
                    os.rename(made / place, target)
    except filelock.Timeout:
        raise InputError(f"{folder} is being written by another process") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {reason(error)}") from None
    return folder


# ---- downloaded, and checked ----------------------------------------------------------------------------------------


def _targets(name: str, paths: Iterable[str]) -> dict[str, str]:
    """The paths that are originals of a set, sorted, with their targets."""
    wanted = {re.escape(path): "" for path in _PATHS_OF_MASKS} if name == "masks" else SAMPLES[name].files
    found = {}
    for path in sorted(paths):
        for pattern, target in wanted.items():
            if (match := re.fullmatch(pattern, path)) is not None:
                found[path] = match.expand(target)
    return found


@contextmanager
def _archive(name: str, file: Path) -> Iterator[Originals]:
    """Files of a zip archive, with paths inside its only folder."""
    with errors_as("the archive is damaged"):
        archive = zipfile.ZipFile(file)
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    targets = _targets(name, entries)

    def read(path: str) -> bytes:
        with errors_as("the archive is damaged"):
            return read_entry(archive, entries[path], entries[path].file_size)

    with archive:
        yield Originals(targets, sum(entries[path].file_size for path in targets), read)


def _package(name: str, sample: Sample) -> Originals:
    """Files of an installed Python package."""
    command = f"pip install {sample.origin}=={sample.version}"
    try:
        files = {str(file): Path(str(file.locate())) for file in importlib.metadata.files(sample.origin) or []}
        targets = _targets(name, files)
        size = sum(os.path.getsize(files[path]) for path in targets)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"it is made of the package {sample.origin}: {command}") from None
    except OSError as error:
        raise InputError(f"the package {sample.origin} is damaged ({reason(error)}): {command}") from None
    return Originals(targets, size, lambda path: read_bytes(files[path], size))


@contextmanager
def _originals(name: str, sample: Sample, work: Path, watch: Watch) -> Iterator[Originals]:
    """The originals of a set, if their content is the pinned one."""
    try:
        with ExitStack() as stack:
            if sample.download:
                with watch(f"{name}: downloaded", sample.download) as step:
                    path = _download(sample, work, step)
                found = stack.enter_context(_archive(name, path))
            else:
                found = _package(name, sample)
            lines = hashlib.sha256()
            for path in found.paths if found.size == sample.originals else ():
                lines.update(f"{hashlib.sha256(found.read(path)).hexdigest()}  {path}\n".encode())
            if lines.hexdigest() != sample.sha256:
                raise InputError(f"{sample.address} has other files than those that were pinned by SHA-256")
            yield found
    except InputError as error:
        raise InputError(f"the sample data {name!r} cannot be fetched: {error}") from None


def _download(sample: Sample, work: Path, step: Callable[[int], Any]) -> Path:
    """The archive of a repository, in the folder `work`."""
    pooch = require("pooch", "data", "fetching sample data")
    requests = require("requests", "data", "fetching sample data")

    archive = work / "archive.zip"
    try:
        with open(archive, "wb") as file, ExitStack() as stack:
            limited: Any = _Limited(file, SLACK + sample.download, step)
            hooks = {"response": lambda response, **_: stack.enter_context(response)}
            downloader = pooch.HTTPDownloader(chunk_size=PIECE, timeout=TIMEOUT, hooks=hooks)
            downloader(sample.address, limited, None)
    except requests.RequestException as error:
        cause: BaseException = error  # the original error, such as an unknown name of a server
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        raise InputError(f"{sample.address}: {reason(cause)}") from None
    return archive


class _Limited:
    """A file that takes a limited number of bytes, and reports them."""

    def __init__(self, file: Any, limit: int, step: Callable[[int], Any]) -> None:
        self._file, self._left, self._step = file, limit, step

    def write(self, piece: bytes) -> None:
        self._left -= len(piece)
        if self._left < 0:
            raise InputError("the server sends more than the archive can have")
        self._file.write(piece)
        self._step(len(piece))

    def flush(self) -> None:
        pass


# ---- converted ------------------------------------------------------------------------------------------------------


def _photos(originals: Originals, out: Path, step: Callable[[int], Any]) -> None:
    """Every second photo, with a short side of at most 288 pixels (bicubic), as JPEG of quality 95."""
    folder = out / "imagenet_sample"
    folder.mkdir(parents=True)
    rows = ["file,class_index"]
    for number, path in enumerate(originals.paths):
        if number % 2 == 0:
            with Image.open(io.BytesIO(originals.read(path))) as image:
                photo = image.convert("RGB")
            scale = 288 / min(photo.size)
            if scale < 1:
                size = round(photo.width * scale), round(photo.height * scale)
                photo = photo.resize(size, Image.Resampling.BICUBIC)
            rows.append(f"{number:04d}_{Path(path).stem}.jpg,{number}")
            photo.save(folder / rows[-1].partition(",")[0], "JPEG", quality=95)
        step(1)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def _copies(originals: Originals, out: Path, step: Callable[[int], Any]) -> None:
    """Copies, some in a zip, weights in float16 (a change of at most 1e-3). Equal files give equal bytes."""
    import safetensors.numpy

    with ExitStack() as stack:
        archives: dict[Path, zipfile.ZipFile] = {}
        for path, target in sorted(originals.paths.items(), key=lambda item: item[1]):
            content = originals.read(path)
            if target.endswith(".safetensors"):
                tensors = safetensors.numpy.load(content)
                halved = {key: t.astype(np.float16) if t.dtype == np.float32 else t for key, t in tensors.items()}
                content = safetensors.numpy.save(halved)
            place, zipped, inside = target.partition(".zip/")
            file = out / (place + zipped.rstrip("/"))
            file.parent.mkdir(parents=True, exist_ok=True)
            if not zipped:
                file.write_bytes(content)
            else:
                if file not in archives:
                    archives[file] = stack.enter_context(zipfile.ZipFile(file, "w"))
                archives[file].writestr(zipfile.ZipInfo(inside), content)
            step(1)


def _deit_tiny(originals: Originals, out: Path, step: Callable[[int], Any]) -> None:
    """One tensor of each MATLAB file, under timm's names."""
    import safetensors.numpy

    scipy_io = require("scipy.io", "data", "reading MATLAB files")
    tensors = {}
    for path, name in originals.paths.items():
        values = np.ascontiguousarray(scipy_io.loadmat(io.BytesIO(originals.read(path)))["data"])
        flat = values.ndim == 2 and len(values) == 1  # MATLAB has no vectors
        tensors[name] = values.ravel() if flat else values
        step(1)
    out.mkdir()
    (out / "deit_tiny_patch16_224.safetensors").write_bytes(safetensors.numpy.save(tensors))


# COCO's photos with an object of DeiT-tiny's first class on at least 2 % of the pixels: split, number, category.
MASKED: list[tuple[str, str, str]] = [tuple(row) for row in read_json(Path(__file__).with_name("coco_masks.json"))]
_PANOPTIC = "panoptic_segmentation/annotations/panoptic_"


def _of_masks(split: str, number: str) -> tuple[str, str, str]:
    """Paths of a photo, of its segments, and of their annotations."""
    return f"images/{split}/{number}.jpg", f"{_PANOPTIC}{split}/{number}.png", f"{_PANOPTIC}{split}.json"


def _masks(originals: Originals, out: Path, step: Callable[[int], Any]) -> None:
    """Photos, and masks of the pixels of one category, in the layout of `gtsegs_ijcv.mat`."""
    h5py = require("h5py", "data", "writing the masks")
    annotations: dict[str, Any] = {}
    out.mkdir()
    with h5py.File(out / "segmentation_a.mat", "w") as file:
        values, kept = file.create_group("value"), file.create_group("#refs#")
        tables = {name: values.create_dataset(name, (len(MASKED), 1), h5py.ref_dtype) for name in ("img", "gt", "id")}
        for place, (split, number, category) in enumerate(MASKED):
            photo, segments, described = _of_masks(split, number)
            if split not in annotations:
                annotations[split] = json.loads(originals.read(described))
            pixels = np.asarray(Image.open(io.BytesIO(originals.read(photo))).convert("RGB"))
            of_segment = np.asarray(Image.open(io.BytesIO(originals.read(segments))).convert("RGB")) @ [1, 256, 65536]
            names = {entry["id"]: entry["name"] for entry in annotations[split]["categories"]}
            own = next(entry for entry in annotations[split]["annotations"] if entry["file_name"] == f"{number}.png")
            wanted = [part["id"] for part in own["segments_info"] if names[part["category_id"]] == category]
            mask = np.isin(of_segment, wanted).astype(np.uint8)
            name = np.frombuffer(f"coco_{split}_{number}_{category}".encode(), np.uint8)[:, None].astype(np.uint16)
            tables["img"][place, 0] = kept.create_dataset(
                f"i{place}", data=pixels.transpose(2, 1, 0), compression="gzip"
            ).ref
            cell = kept.create_dataset(f"g{place}", (1, 1), h5py.ref_dtype)
            cell[0, 0] = kept.create_dataset(f"m{place}", data=mask.T, compression="gzip").ref
            tables["gt"][place, 0] = cell.ref
            tables["id"][place, 0] = kept.create_dataset(f"n{place}", data=name).ref
            step(2)


_PATHS_OF_MASKS = frozenset(path for split, number, _ in MASKED for path in _of_masks(split, number))
RECIPES = {"photos": _photos, "masks": _masks, "deit_tiny": _deit_tiny}  # the other sets are copies
