"""Data sets of any size, whose examples are read and decoded one by one."""

import dataclasses
import fnmatch
import functools
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Ge

from tokentm_jax.data import audio
from tokentm_jax.data.causes import open_causes
from tokentm_jax.data.examples import MAX_ENTRY, Example, Source, is_a
from tokentm_jax.data.labels import csv_rows, number
from tokentm_jax.data.mat import open_mat
from tokentm_jax.data.photos import SUFFIXES
from tokentm_jax.errors import InputError, require
from tokentm_jax.files import errors_as, opened, read_entry, read_text, reason
from tokentm_jax.identity import digest, digest_files
from tokentm_jax.validation import checked

LARGEST_LABEL = 2**31 - 1
LARGEST_TEXTS = 256 * 2**20  # bytes of a file of texts
VADER = "vader:"
CAUSES = ("scenes:", "questions:", "programs:", "prompts:", "mosaic:", "trigger:")


Item = TypeVar("Item")


Half = Literal["even", "odd"]


def open_source(
    spec: str | Path,
    *,
    limit: int | None = None,
    seed: int | None = None,
    half: Half | None = None,
    names: str | None = None,
) -> Source:
    """Open a data set without reading its images.

    Args:
      spec: a `.tsv` file of texts (on each line a text, a tab and the number of its class), with `vader:` before the
        path to rate words by VADER's lexicon; a folder or zip of class folders (`cat/1.jpg` or `train/cat/1.jpg`;
        classes in the order of their names; links to folders are not followed) or of images without labels; a folder
        with `labels.csv` (columns `file` and `class_index`); a `.mat` file in the layout of ImageNet-Segmentation's
        `gtsegs_ijcv.mat`; "tfds:NAME:SPLIT" for a prepared TensorFlow data set; "scenes:RULE:SPLIT" for rendered
        scenes (`tokentm_jax.data.scenes`); "programs:NAME" for images of known programs
        (`tokentm_jax.data.programs`); "prompts:KIND" for prompts whose next word has a known cause
        (`tokentm_jax.data.prompts`); "mosaic:K:DATA" for mosaics of K x K photos of one of these; or
        "trigger:label=NAME:DATA" for examples with a planted mark. A zip is never extracted: its entries are read in
        memory, so their names are harmless.
      limit: number of examples.
      seed: choose examples at random, so that a larger limit only adds examples; None: at even intervals.
      half: use only the examples at even (or odd) positions, counted from 0 before the limit, to choose on one half
        and to check on the other.
      names: use only the examples whose names (`keys`) match this pattern with `*` and `?`; with `!` before it, those
        that do not match: to leave a speaker out, and to test on that speaker.

    Class folders have images or, without any image, recordings (WAV, FLAC, OGG).

    Raises:
      InputError: a missing file, another layout, no examples, tfds or h5py missing, a data set that is not prepared.
    """
    checked("the limit", Annotated[int | None, Ge(1)], limit)
    checked("the seed", Annotated[int | None, Ge(0)], seed)
    checked("the half", Half | None, half)
    path = Path(spec)
    if not str(spec):
        raise InputError("the name of the data set is empty")
    if str(spec).startswith("tfds:"):
        source = _tfds(str(spec))
    elif str(spec).startswith(CAUSES):
        source = open_causes(str(spec), open_source)
    elif os.path.isdir(path):
        source = _listed(path) if os.path.lexists(path / "labels.csv") else _folder(path)
    else:
        rated = str(spec).startswith(VADER)
        path = Path(str(spec).removeprefix(VADER))
        with opened(path, "the data set"):  # raises for a missing file, or one that is not regular
            if path.suffix.lower() == ".tsv":
                source = _sentences(path, rated)
            else:
                source = _segmentation(path) if path.suffix.lower() == ".mat" else _zip(path)
    if not source.keys:
        raise InputError(f"{source.name} has no examples")
    keys = source.keys
    if names is not None:
        pattern = names.removeprefix("!")
        keys = tuple(key for key in keys if fnmatch.fnmatchcase(key, pattern) != names.startswith("!"))
        if not keys:
            raise InputError(f"{source.name} has no example whose name matches {names!r}")
    keys = keys if half is None else keys[half == "odd" :: 2]
    if not keys:
        raise InputError(f"{source.name} has one example, and none at an odd position")
    if seed is not None:
        keys = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))[:limit]]
    chosen = tuple(spread(keys, limit))
    known = dict(zip(source.keys, source.sizes or (), strict=False))
    sizes = tuple(known[key] for key in chosen) if known else None
    return dataclasses.replace(source, identify=functools.cache(source.identify), keys=chosen, sizes=sizes)


def spread(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """`limit` of the items, at even intervals, or all."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def reopened(spec: str) -> Source:
    """A source whose keys are known: `fetch` and `stamp` work as those of `open_source`, and no folder is listed."""
    path = Path(spec)
    if spec.startswith("tfds:") or not path.is_dir() or os.path.lexists(path / "labels.csv"):
        return open_source(spec)
    return _in_folder(path, ["a/a.png"])


def _class_of(key: str) -> str | None:
    """The folder of a file, which is the name of its class."""
    name = PurePosixPath(key).parent.name
    return None if name in ("", "..") else name


def _in_classes(
    name: str,
    names: Sequence[str],
    identify: Callable[[list[str]], str],
    content: Callable[[str], bytes | Path],
    stamp: Callable[[Sequence[str]], str],
) -> Source:
    """A source of "…/class/image" names, or without labels if no image is in a folder."""
    found = [n for n in names if is_a(n, SUFFIXES)] or [n for n in names if is_a(n, audio.SUFFIXES)]
    if not found:
        raise InputError(f"{name} has no images and no recordings")
    labels = {n: label for n in sorted(found) if (label := _class_of(n)) is not None}
    classes = tuple(sorted(set(labels.values())))
    keys = tuple(labels or sorted(found))
    return Source(
        name,
        lambda: identify(list(keys)),
        keys,
        lambda key: Example(key, content(key), _class_of(key)),
        classes or None,
        labelled=bool(labels),
        stamp=lambda some: stamp(keys if some is None else some),
    )


def _folder(path: Path) -> Source:
    def refuse(error: OSError) -> None:  # else images of an unreadable folder would be missing silently
        raise InputError(f"{error.filename} cannot be read: {reason(error)}")

    names = [
        (Path(folder) / file).relative_to(path).as_posix()
        for folder, _, files in os.walk(path, onerror=refuse)
        for file in files
    ]

    return _in_folder(path, names)


def _in_folder(path: Path, names: Sequence[str]) -> Source:
    def identify(names: list[str]) -> str:
        return digest(names, digest_files([path / name for name in names]))

    return _in_classes(f"the folder {path}", names, identify, lambda key: path / key, lambda keys: _stamp(path, keys))


def _stamp(folder: Path, names: Iterable[str]) -> str:
    """A hash of names, sizes and times of files."""

    def one(name: str) -> tuple[str, int, int]:
        try:
            found = os.stat(folder / name)
        except (OSError, ValueError):
            return name, -1, -1
        return name, found.st_size, found.st_mtime_ns

    return digest([one(name) for name in names])


def _zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (NotImplementedError, UnicodeDecodeError) as error:  # of a newer version; a name that is not UTF-8
        raise InputError(f"the zip file {path} cannot be read: {reason(error)}") from None
    except Exception:  # what zipfile raises for a damaged file has no common type
        raise InputError(f"{path} is not a folder, zip of class folders, .mat file or tfds:NAME:SPLIT") from None
    entries = [info for info in archive.infolist() if info.filename and not info.is_dir()]

    def identify(_: list[str]) -> str:  # zipfile compares the checksum of everything that it reads
        return digest(sorted((info.filename, info.file_size, info.CRC) for info in entries))

    def content(key: str) -> bytes:
        return read_entry(archive, archive.getinfo(key), MAX_ENTRY + 1)

    def stamp(keys: Sequence[str]) -> str:
        return digest([(key, archive.getinfo(key).file_size, archive.getinfo(key).CRC) for key in keys])

    return _in_classes(f"the zip file {path}", [info.filename for info in entries], identify, content, stamp)


def _listed(path: Path) -> Source:
    """A folder whose `labels.csv` names the files."""
    table = path / "labels.csv"
    rows = csv_rows(read_text(table), str(table))
    wanted = f"{table} must be a CSV file with the columns 'file' and 'class_index' (a number)"
    _, header = next(rows, (0, []))
    if not {"file", "class_index"} <= set(header):
        raise InputError(f"{wanted}, it has {', '.join(header)[:200] or 'nothing'}")
    labels: dict[str, int] = {}
    known: dict[PurePosixPath, int] = {}
    for line, row in rows:
        fields = dict(zip(header, row, strict=False))
        label = number(fields.get("class_index", "").strip())
        if len(row) != len(header) or label is None or not 0 <= label <= LARGEST_LABEL:
            raise InputError(f"{wanted}: line {line} has {','.join(row)[:200]!r}")
        name = PurePosixPath(fields["file"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{table}: line {line}: {fields['file']!r} leaves the folder")
        if known.setdefault(name, label) != label:
            raise InputError(f"{table}: line {line} gives {fields['file']!r} the class {label}, it was {known[name]}")
        labels[fields["file"]] = label

    def identify() -> str:
        names = sorted(labels)
        return digest([(name, labels[name]) for name in names], digest_files([path / name for name in names]))

    fetch = lambda key: Example(key, path / key, labels[key])  # noqa: E731
    stamp = lambda keys: digest(_stamp(path, keys or labels), _stamp(path, ["labels.csv"]))  # noqa: E731
    return Source(f"the folder {path}", identify, tuple(labels), fetch, stamp=stamp)


def _segmentation(path: Path) -> Source:
    """See `mat.py`."""
    count, pair = open_mat(path)

    def fetch(key: str) -> Example:
        image, mask = pair(int(key))
        return Example(key, image, None, mask)

    keys = tuple(f"{i:05d}" for i in range(count))
    stamp = lambda keys: _stamp(path.parent, [path.name])  # noqa: E731
    identify = lambda: digest(digest_files([path]))  # noqa: E731
    return Source(str(path), identify, keys, fetch, labelled=False, masked=True, stamp=stamp)


def _sentences(path: Path, rated: bool) -> Source:
    """A `.tsv` file without a header, such as SST-2's: on each line a text, a tab and the number of its class."""
    texts: dict[str, tuple[str, int]] = {}
    for place, line in enumerate(read_text(path, LARGEST_TEXTS, "the texts").split("\n"), 1):
        if not line.strip():
            continue
        text, tab, label = line.rstrip("\r").rpartition("\t")
        index = number(label.strip())
        if not tab or not text.strip() or index is None or not 0 <= index <= LARGEST_LABEL:
            raise InputError(f"{path}: line {place} must be a text, a tab and the number of a class, got {line!r:.80}")
        texts[f"{place:06d}"] = text.strip(), index
    valences = read_lexicon() if rated else {}

    def fetch(key: str) -> Example:
        text, label = texts[key]
        return Example(key, text, label, _rated(text, valences) if rated else None)

    identity = digest([*texts.items()], digest(sorted(valences.items())) if rated else "")
    sizes = tuple(len(text) for text, _ in texts.values())
    return Source(str(path), lambda: identity, tuple(texts), fetch, masked=rated, sizes=sizes)


def _rated(text: str, valences: Mapping[str, float]) -> np.ndarray:
    """The valence of each character's word, 0 without a valence: float32 [characters]."""
    found = np.zeros(len(text), np.float32)
    for word in re.finditer(r"[^\W_]+", text):
        found[word.start() : word.end()] = valences.get(word[0].lower(), 0.0)
    return found


def read_lexicon() -> dict[str, float]:
    """Valences of words by people, from -4 to 4: VADER's lexicon (Hutto & Gilbert, ICWSM 2014). Raises InputError."""
    package = require("vaderSentiment", "evaluation", "a rating of words by people")
    valences = {}
    for line in read_text(Path(package.__path__[0]) / "vader_lexicon.txt").splitlines():
        word, _, rest = line.partition("\t")
        valences[word.lower()] = float(rest.partition("\t")[0])
    return valences


def _tfds(spec: str) -> Source:
    """ "tfds:NAME:SPLIT", without TensorFlow."""
    name, _, split = spec.removeprefix("tfds:").partition(":")
    if not name or not split:
        raise InputError(f"a TensorFlow data set is given as tfds:NAME:SPLIT, got {spec!r}")
    tfds = require("tensorflow_datasets", "data", spec)
    command = f"tfds build {name} --file_format=array_record"
    try:
        builder: Any = tfds.builder(name, file_format="array_record")
        if not builder.is_prepared():
            raise NotImplementedError
        features, more = builder.info.features, {}
        if isinstance(dict(features or {}).get("image"), tfds.features.Image):
            # The encoded image, because tfds would decode an image of any size.
            more["decoders"] = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source(split, **more)
    except tfds.core.DatasetNotFoundError:
        raise InputError(f"TensorFlow Datasets has no data set {name!r}") from None
    except NotImplementedError:  # not prepared, or in a format without random access
        raise InputError(f"{spec} is not prepared; run `{command}` once (it needs tensorflow)") from None
    except (ValueError, KeyError, OSError) as error:  # such as an unknown split
        raise InputError(f"{spec} cannot be read: {reason(error)}") from None
    if not {"image", "label"} <= set(features or ()):
        raise InputError(f"the data set {name!r} has no features 'image' and 'label'")

    def fetch(key: str) -> Example:
        with errors_as(f"record {key} of {spec} cannot be read"):
            found = records[int(key)]
            label = int(found["label"])
            if not -LARGEST_LABEL <= label <= LARGEST_LABEL:
                raise InputError(f"its label is {label}")
            return Example(key, found["image"], classes[label] if named and 0 <= label < len(classes) else label)

    def identify() -> str:
        try:
            files = sorted({str(part.filename) for part in builder.info.splits[split].file_instructions})
        except Exception:  # a builder without this information
            files = []
        return digest(spec, str(builder.info.version), len(records), digest_files([Path(file) for file in files]))

    classes = tuple(features["label"].names)
    named = classes != tuple(map(str, range(len(classes))))  # tfds names classes by number if they have no names
    keys = tuple(f"{i:07d}" for i in range(len(records)))
    stamp = lambda _: digest(spec, str(builder.info.version), len(records))  # noqa: E731
    return Source(spec, identify, keys, fetch, classes, named=named, stamp=stamp)
