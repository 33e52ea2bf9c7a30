"""Shards: the files of a large data set, or slices of any other source, each read by itself.

A shard is a tar of WebDataset, a Parquet file of encoded images, an ArrayRecord file, or a slice of a `Source`. It is
identified by size and time, or by the checksum of an object store, so that nothing is read before it is explained.
"""

import contextlib
import fnmatch
import glob
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from tokentm_jax.data import audio, photos
from tokentm_jax.data.examples import MAX_ENTRY, Example, Source
from tokentm_jax.data.labels import number
from tokentm_jax.data.sources import LARGEST_LABEL
from tokentm_jax.errors import InputError, require
from tokentm_jax.files import reason

SCHEMES = ("s3", "gs", "az", "http", "https", "memory", "file")
MOST_SHARDS = 10**7
_KINDS = {"tar": r"\.tar$", "parquet": r"\.parquet$", "array_record": r"\.array_?record[-*?\d{}.of]*$"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_STAMPS = ("mtime", "ETag", "etag", "md5Hash", "crc32c", "LastModified", "created")  # fields of fsspec, by rank
_READ = 32  # records at a time
LONGEST_KEY = 4096  # characters
_BUFFER = 2**22  # bytes that are read at a time of a column
_RATIO = 100  # by which columns may be compressed: images hardly are
LARGEST_MEMBER = 2**36  # bytes of a member of a tar, whatever it is
LARGEST_HEADER = 2**20  # bytes of a long name or of other fields of a member of a tar
_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")
_IMAGES = {suffix[1:] for suffix in photos.SUFFIXES}
_SOUNDS = {suffix[1:] for suffix in audio.SUFFIXES}
_TEXTS = ("txt", "text", "sentence")
_CONTENT = ("image", *sorted(_IMAGES), "img", "audio", *sorted(_SOUNDS), *_TEXTS)  # columns, by rank
_LABEL = ("label", "cls", "class_index", "labels")
_KEY = ("__key__", "key", "id")


class Shard(NamedTuple):
    """One shard of a manifest.

    `rows` are its examples, -1 where only reading it can tell; `first` is the first one of a slice in its source.
    """

    index: int
    url: str
    kind: str  # "tar", "parquet", "array_record" or "slice"
    first: int
    rows: int
    size: int  # bytes, -1 where unknown
    identity: str


def filesystem(url: str, what: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URL, and the path in it. InputError for an unsupported URL."""
    core = require("fsspec.core", "stores", what)
    scheme, separator, place = url.partition("://")
    if url.partition(":")[0] in SCHEMES and not place.strip("/"):  # also s3:/maps, which pathlib makes of s3://maps
        scheme = url.partition(":")[0]
        raise InputError(f"{url} names no {what.split()[-1]}: a URL is written as {scheme}://BUCKET/NAME")
    if separator and (scheme not in SCHEMES or "::" in url or "|" in url):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(f"{url} has an unsupported URL scheme: {what} is a path, or a URL of {known}")
    try:
        return core.url_to_fs(url if separator else f"file://{url}")
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be opened: {reason(error)}") from None


def kind_of_shards(spec: str) -> str | None:
    """The kind of shards that a path, URL, pattern or range of files names, by its suffix; None for other sources."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, spec.lower())), None)


def find_shards(spec: str) -> list[Shard]:
    """The shards of "train-{000000..001281}.tar", "s3://bucket/*.parquet" or one file. Lists folders, opens no file.

    Raises InputError for another kind of file, and where nothing or not everything is there.
    """
    kind = kind_of_shards(spec)
    if kind is None:
        raise InputError(f"{spec} names no shards: their names end with .tar, .parquet or .array_record")
    files, path = filesystem(spec, "a shard")
    wanted = _expanded(path)
    try:
        found = _found(files, _RANGE.sub("*", path))
    except OSError as error:
        raise InputError(f"{spec} cannot be read: {reason(error)}") from None
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{missing[0]} does not exist ({len(missing)} of the {len(wanted)} shards of {spec})")
    names = wanted or sorted(found)
    if not names:
        raise InputError(f"{spec} names no file")
    local = "file" in files.protocol
    urls = names if local else [files.unstrip_protocol(name) for name in names]
    return [Shard(i, urls[i], kind, -1, -1, *found[name]) for i, name in enumerate(names)]


def _found(files: Any, path: str) -> dict[str, tuple[int, str]]:
    """The size and identity of each file that a path or pattern names, from one listing. Raises OSError."""
    folder, name = os.path.split(path)
    if not glob.has_magic(path):
        infos = {path: files.info(path)}
    elif "file" not in files.protocol or glob.has_magic(folder):
        infos = files.glob(path, detail=True)
    else:  # six times as fast as fsspec's
        matches = re.compile(fnmatch.translate(name)).match
        with os.scandir(folder) as entries:
            stats = ((each.path, each.stat()) for each in entries if matches(each.name) and each.is_file())
            return {each: _identity({"size": found.st_size, "mtime": found.st_mtime}) for each, found in stats}
    return {each: _identity(info) for each, info in infos.items() if info["type"] == "file"}


def _expanded(path: str) -> list[str]:
    """ "a-{00..11}.tar" -> the names; none for a path without a range."""
    pieces = _RANGE.split(path)  # text, low, high, text, low, ...
    names, count = [pieces[0]], 1
    for low, high, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        count *= int(high) - int(low) + 1
        if not 0 < count <= MOST_SHARDS:
            raise InputError(f"{path} must name between 1 and {MOST_SHARDS:,} shards")
        numbers = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
        names = [name + number + text for name in names for number in numbers]
    return names if len(pieces) > 1 else []


def _identity(info: Mapping[str, Any]) -> tuple[int, str]:
    """The size of a file, -1 where unknown, and its identity."""
    size = -1 if info.get("size") is None else int(info["size"])
    for name in _STAMPS:
        if (stamp := info.get(name)) is not None:
            return size, f"{size} {stamp}"
    return size, "" if size < 0 else str(size)  # listings over HTTP have neither


def slices(source: Source, size: int, url: str) -> list[Shard]:
    """A source in slices of `size` examples."""
    starts = range(0, len(source), size)
    parts = [source.keys[start : start + size] for start in starts]
    return [
        Shard(i, url, "slice", start, len(part), -1, source.stamped(part))
        for i, (start, part) in enumerate(zip(starts, parts, strict=True))
    ]


def examples(shard: Shard) -> Iterator[Example]:
    """The examples of a file, encoded. Where the file is damaged, the last one has an InputError as its content.

    Raises InputError for a file that is missing, cannot be read, or is no longer the one of the manifest.
    """
    files, path = filesystem(shard.url, "a shard")
    try:
        found = _identity(files.info(path))[1]
        if shard.identity and found != shard.identity:
            raise InputError(
                f"{shard.url} has changed since the store was begun: its size and its time or checksum were "
                f"{shard.identity!r} and are {found!r}; choose another --out"
            )
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(files.open(path, "rb"))
            if shard.kind == "array_record":
                file = path if "file" in files.protocol else stack.enter_context(_local(file))
            count = 0
            try:
                for example in _READERS[shard.kind](file, PurePosixPath(path).name):
                    yield example._replace(key=example.key[:LONGEST_KEY])
                    count += 1
            except InputError as error:
                raise InputError(f"{shard.url}: {error}") from None
            except Exception as error:  # what the readers of damaged files raise has no common type
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                where = f"{PurePosixPath(path).name} is damaged after {count} examples: {reason(error)}"
                yield Example(f"{path}: damaged", InputError(where))
    except OSError as error:
        raise InputError(f"{shard.url} cannot be read: {reason(error)}") from None


@contextlib.contextmanager
def _local(file: Any) -> Iterator[str]:
    """The path of a copy on the disk, for a reader that needs one."""
    with tempfile.NamedTemporaryFile() as copy:
        while part := file.read(2**20):
            copy.write(part)
        copy.flush()
        yield copy.name


def _label(value: Any) -> int | str | None:
    """A class by its number or name, of bytes, text or a number."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = value.strip()[:200]
        found = number(text)
        return text or None if found is None else found
    return int(value) if isinstance(value, int) and -LARGEST_LABEL <= value <= LARGEST_LABEL else None


class _Member(tarfile.TarInfo):
    """A member of a tar whose headers take little memory; `tarfile` itself reads headers of any size."""

    def _proc_member(self, archive: Any) -> Any:
        if self.type == tarfile.GNUTYPE_SPARSE or (self.type in _HEADERS and self.size > LARGEST_HEADER):
            raise tarfile.ReadError("a member is sparse, or has a header that is too large")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_gnusparse_10(self, *_: Any) -> None:
        raise tarfile.ReadError("a member is sparse")


def _tar(file: Any, name: str) -> Iterator[Example]:
    """WebDataset: files with the same path up to the first dot of the name are one example. Nothing is extracted."""
    key, found = None, {}

    def example() -> Example:
        missing = InputError(f"{key} of {name} has no image, sound or text")
        return Example(str(key), found.get("content", missing), _label(found.get("label")))

    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as archive:
        for member in archive:
            archive.members.clear()  # else it keeps all of them  # pyright: ignore[reportAttributeAccessIssue]
            if member.size > LARGEST_MEMBER:  # it would be skipped in small steps, also beyond the end of the file
                raise tarfile.ReadError(f"a member has {member.size} bytes")
            if not member.isfile():
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if key not in (None, folder + slash + stem):
                yield example()
                found = {}
            key, suffix = folder + slash + stem, suffix.lower()
            rank = _CONTENT.index(suffix) if suffix in _CONTENT else len(_CONTENT)
            if suffix == "cls" or rank < found.get("rank", len(_CONTENT)):
                stream = archive.extractfile(member)
                content: Any = InputError(f"{member.name} is larger than {MAX_ENTRY >> 20} MiB")
                if stream is not None and member.size <= MAX_ENTRY:
                    content = stream.read()
                if suffix in _TEXTS and isinstance(content, bytes):
                    content = content.decode("utf-8", "replace")
                found |= {"label": content} if suffix == "cls" else {"content": content, "rank": rank}
    if key is not None:
        yield example()


def _parquet(file: Any, name: str) -> Iterator[Example]:
    """A column of encoded files, or of structs {bytes, path} as Hugging Face writes them, or of texts."""
    parquet = require("pyarrow.parquet", "stores", "a shard of Parquet")
    table = parquet.ParquetFile(file, buffer_size=_BUFFER)  # else a whole row group is read
    present, known = table.schema_arrow.names, {"content": _CONTENT, "label": _LABEL, "key": _KEY}
    columns = {what: next((name for name in names if name in present), None) for what, names in known.items()}
    if columns["content"] is None:
        raise InputError(f"it has no column named {', '.join(_CONTENT)}; it has {', '.join(present)[:200]}")
    wanted, row = [name for name in columns.values() if name is not None], 0
    for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        for j in range(group.num_columns):
            column = group.column(j)
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if column.path_in_schema.split(".")[0] in wanted and unpacked > MAX_ENTRY + _RATIO * packed:
                raise ValueError(f"row group {i} has {packed:,} bytes, which unpack to {unpacked:,}")
    for batch in table.iter_batches(_READ, columns=wanted):
        found = {what: batch.column(name) for what, name in columns.items() if name is not None}
        for i in range(batch.num_rows):
            value = {what: column[i].as_py() for what, column in found.items()}
            content = value["content"]
            if isinstance(content, dict):
                content = content.get("bytes")
            key = str(value.get("key") or f"{name}/{row:07}")
            if not isinstance(content, bytes | str):
                content = InputError(f"row {row} of {name} has no encoded image, sound or text")
            yield Example(key, content, _label(value.get("label")))
            row += 1


def _array_record(path: str, name: str) -> Iterator[Example]:
    """Records that are encoded images, or `tf.train.Example` with the features `image` and `label`."""
    module = require("array_record.python.array_record_module", "data", "a shard of ArrayRecord")
    reader = module.ArrayRecordReader(path)
    try:
        for start in range(0, reader.num_records(), _READ):
            records = reader.read(start, min(start + _READ, reader.num_records()))
            for i, record in enumerate(records, start):
                yield _record(record, f"{name}/{i:07}")
    finally:
        reader.close()


_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"fLaC", b"OggS")


def _record(record: bytes, key: str) -> Example:
    if record.startswith(_MAGIC) or len(record) > MAX_ENTRY:  # which is refused when it is decoded
        return Example(key, record)
    protocol = require("tensorflow_datasets.proto", "data", "a record of tf.train.Example").tf_example_pb2
    try:
        features = protocol.Example.FromString(record).features.feature
    except Exception:  # protobuf's error of a damaged message
        features = {}
    values: dict[str, Any] = {}
    for what, names in (("content", (*_CONTENT, "image/encoded")), ("label", (*_LABEL, "image/class/label"))):
        feature = next((features[name] for name in names if name in features), None)
        if feature is not None:
            kept = [*feature.bytes_list.value, *feature.int64_list.value]
            values[what] = kept[0] if kept else None
    content = values.get("content")
    if not isinstance(content, bytes):
        content = InputError(f"{key} is no encoded image, and no tf.train.Example with an image")
    return Example(key, content, _label(values.get("label")))


_READERS: dict[str, Any] = {"tar": _tar, "parquet": _parquet, "array_record": _array_record}
