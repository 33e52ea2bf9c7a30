"""Weights on disk: read in common layouts, and written under timm's names with a description.

Every layout is first translated to timm's names (`read_tensors`), then to the module's tree (`to_params`), so each
check exists once. Files are untrusted: nothing in them is executed, and every fault is one InputError.
"""

import argparse
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from pydantic import JsonValue

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import (
    MARK,
    as_path,
    errors_as,
    opened,
    quiet,
    read_json,
    reason,
    replace,
    stored_size,
    uninterrupted,
)
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.maths.primitives import PyTree
from tokentm_jax.models.architectures import build, config_of
from tokentm_jax.models.names import Tensors, current_names, from_google, renamed
from tokentm_jax.models.params import to_params, to_timm
from tokentm_jax.models.vit import LARGEST_DEPTH, ViT
from tokentm_jax.validation import checked

LARGEST_DESCRIPTION = 10_000_000  # bytes
LARGEST_FACTOR = 50  # unpacked size / file size; weights hardly compress, so a larger factor is an attack


# ---- reading -------------------------------------------------------------------------------------------------------


def read_checkpoint(module: ViT, path: str | os.PathLike[str], reset_head: bool = False) -> PyTree:
    """Parameters for `module.apply({"params": params}, images)` from a file or an Orbax folder.

    It reads `.safetensors` and `.pth` with timm's names, `.npz` of Google's ViT and AugReg releases, and folders of
    `write_checkpoint`. The content decides, not the suffix.

    Args:
        module: the model that the weights must fit.
        path: the file or folder.
        reset_head: ignore the classifier in the file and leave it out (fine-tuning with other classes).

    Returns:
        The nested dictionary of float32 arrays.

    Raises:
        InputError: the file is missing, damaged, of an unknown kind, or does not fit the model.
    """
    path = as_path(path, "the checkpoint")
    return to_params(module, read_tensors(path), str(path), reset_head, described_grid(read_description(path)))


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """All tensors of a checkpoint under timm's names, whatever its layout. Raises InputError."""
    path = as_path(path, "the checkpoint")
    kind = _kind(path)
    readers = {"safetensors": read_safetensors, "torch": _read_torch, "npz": _read_npz, "orbax": _read_orbax}
    return current_names(renamed(readers[kind](path), WRAPPERS, f"checkpoint {path}"))


# Prefixes that training code adds: an attribute, PyTorch's DataParallel and compile.
WRAPPERS = [(r"^((module|model|backbone|_orig_mod)\.)+", "")]


def _kind(path: Path) -> str:
    """The kind of a checkpoint, from its content. InputError if it is not a checkpoint."""
    if os.path.isdir(path):
        if (path / "description.json").is_file() and (path / "params").is_dir():
            return "orbax"
        raise InputError(f"{path} is a folder without description.json and params: not a checkpoint of this project")
    with opened(path, "checkpoint") as file:
        start = file.read(16)
        if not start:
            raise InputError(f"checkpoint {path} is empty")
        if start.startswith(b"PK\x03\x04"):
            with _damage_named(path), zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            require_room(path, sum(entry.file_size for entry in entries))
            if all(entry.filename.endswith(".npy") for entry in entries):
                return "npz"
            if any(entry.filename.endswith("data.pkl") for entry in entries):
                return "torch"
        # Asked before the pickle: the length of a safetensors header may begin with any byte, 0x80 too.
        elif path.suffix == ".safetensors" or start[8:9] == b"{":
            return "safetensors"
        elif start[:1] == b"\x80":
            return "torch"  # a pickle: the format of torch before 1.6
    raise InputError(f"{path} is not a checkpoint: expected .safetensors, .pth, .npz or a folder of this project")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Errors of the libraries that read checkpoints, a dozen kinds, as InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {path} is damaged or incomplete ({reason(error)})") from None


def require_room(path: Path, unpacked: int) -> None:
    """InputError if the unpacked bytes are too many for the size of the file, or more than the memory."""
    stored = 0
    for part in path.rglob("*") if path.is_dir() else [path]:
        if not part.is_dir():
            with opened(part, "checkpoint") as file:
                stored += stored_size(file)
    if unpacked > LARGEST_FACTOR * stored:
        raise InputError(f"checkpoint {path} unpacks to {unpacked / 1e9:.1f} GB and is refused as unsafe")
    if hasattr(os, "sysconf") and unpacked > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise InputError(f"checkpoint {path} has {unpacked / 1e9:.1f} GB of numbers, more than the memory")


def read_safetensors(path: Path) -> Tensors:
    # `opened` refuses a pipe, for which safetensors would wait.
    with _damage_named(path), opened(path, "checkpoint"), safetensors.safe_open(path, "np") as file:
        names = file.keys()
        require_room(path, sum(4 * math.prod(file.get_slice(n).get_shape()) for n in names))
        return {name: file.get_tensor(name) for name in names}


def _read_npz(path: Path) -> Tensors:
    with _damage_named(path), opened(path, "checkpoint") as file, zipfile.ZipFile(file) as archive:
        require_room(path, sum(_declared_size(archive, entry, path) for entry in archive.infolist()))
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return from_google({name: arrays[name] for name in arrays.files}, path)


def _declared_size(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> int:
    """Bytes of an array as float32, from its header. The archive must hold as many as the header declares."""
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of an array")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if dtype.hasobject:
            raise InputError(f"checkpoint {path} has Python objects; only arrays are read")
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"{entry.filename} is shorter than its header states")
        return 4 * math.prod(shape)


def _read_torch(path: Path) -> Tensors:
    torch = require("torch", "torch", f"reading {path}")
    # timm's training stores its arguments next to the weights. A Namespace only holds values.
    safe = torch.serialization.safe_globals([argparse.Namespace])
    with _damage_named(path), warnings.catch_warnings(), safe, opened(path, "checkpoint") as file:
        warnings.simplefilter("ignore")  # about old pickle protocols
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)  # executes nothing
        except Exception as error:
            if "weights_only" in str(error) or "Unsupported" in str(error):
                raise InputError(f"checkpoint {path} has more than plain tensors and is refused as unsafe") from None
            raise
    for _ in HELD:  # a mapping may hold another, and in a hostile file itself
        held = [content[key] for key in HELD if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        content = held[0] if held else content
    if not isinstance(content, Mapping) or not any(isinstance(v, torch.Tensor) for v in content.values()):
        raise InputError(f"{path} is not a checkpoint: expected a dictionary of tensors")
    tensors = {str(name): t for name, t in content.items() if isinstance(t, torch.Tensor)}
    # A tensor may repeat one number of the file any number of times.
    require_room(path, sum(4 * t.numel() for t in tensors.values() if not t.is_nested))
    read: Tensors = {}
    for name, t in tensors.items():
        if t.layout is not torch.strided or t.is_nested or t.is_quantized or t.is_meta:
            raise InputError(f"checkpoint {path}: {name!r} is not a plain tensor")
        t = t.detach().resolve_conj().resolve_neg()
        read[name] = (t.float() if t.is_floating_point() else t).numpy()
    return read


HELD = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys of the weights, in timm's order of preference


def _read_orbax(path: Path) -> Tensors:
    ocp = require("orbax.checkpoint", "orbax", f"reading the folder {path}")
    description: Any = read_description(path)
    for file in (path / "params").rglob("*"):
        if not file.is_file() and not file.is_dir():  # a pipe: Orbax would wait for ever
            raise InputError(f"checkpoint {path}: {file} is not a regular file")
    with _damage_named(path), quiet("absl"), ocp.PyTreeCheckpointer() as reader:
        folder = (path / "params").resolve()
        found = reader.metadata(folder).item_metadata
        if found is None:
            raise ValueError("Orbax finds no parameters in it")
        unpacked = 0
        for names, leaf in traverse_util.flatten_dict(found.tree).items():
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", object)
            block = names[0] != "blocks" or (shape and 0 < shape[0] <= LARGEST_DEPTH)
            if shape is None or not block or not jnp.issubdtype(dtype, jnp.floating):
                raise InputError(f"checkpoint {path}: {'.'.join(map(str, names))!r} is not a parameter of a ViT")
            unpacked += 4 * math.prod(shape)
        require_room(path, unpacked)
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
        params = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))
        return to_timm(params, build(description["architecture"]))


# ---- self-describing files ------------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | os.PathLike[str],
    module: ViT,
    params: PyTree,
    preprocessing: Preprocessing,
    class_names: list[str] | tuple[str, ...] | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    *,
    overwrite: bool = False,
) -> Path:
    """Write weights with a description, so that `load` needs nothing else.

    Args:
        path: `NAME.safetensors` (timm's names, readable by timm) or a path without suffix (an Orbax folder).
        module, params: the model, and its parameters in any floating type.
        preprocessing: how photos are prepared for the model.
        class_names: one per class.
        extra: more JSON values for the description, such as the accuracy.
        dtype: type of the stored numbers, for a safetensors file.
        overwrite: also replace a regular file that this program did not write. Such a folder is never replaced.

    Returns:
        The path. The write is atomic, and replaces a checkpoint that this program wrote.

    Raises:
        InputError: another suffix, a path that is in use or cannot be written, parameters of another model or not
            finite, or class names that do not match.
    """
    path = as_path(path, "the checkpoint")
    where = f"{path}: in the new checkpoint,"
    names = checked(f"{where} 'class_names'", list[str] | tuple[str, ...] | None, class_names)
    description = {
        **checked(f"{where} 'extra'", Mapping[str, JsonValue], extra or {}),
        "architecture": config_of(module),
        "preprocessing": preprocessing.to_dict(),
        "class_names": None if names is None else list(names),
    }
    description = _checked_description(description, path)
    text = json.dumps(description)
    if path.suffix not in ("", ".safetensors"):
        raise InputError(f"{path}: a checkpoint is written as NAME.safetensors or as a folder without suffix")
    kinds = [getattr(leaf, "dtype", object) for leaf in jax.tree.leaves(params)]
    real = [jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer) for kind in kinds]
    if not isinstance(params, Mapping) or not all(real):
        raise InputError(f"{where} 'params' must be a nested dictionary of arrays of real numbers")
    dtype = checked(f"{where} 'dtype'", Literal["float32", "float16"], dtype)
    if dtype != "float32" and not path.suffix:
        raise InputError(f"{path}: a folder is written in float32")
    with np.errstate(over="ignore"):  # values that are too large become infinite, and raise below
        tensors = to_timm(params, module, dtype)
    to_params(module, tensors, "params")  # raises if the checkpoint could not be read again
    with errors_as(f"{path} cannot be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        data = safetensors.numpy.save(tensors, {MARK: text, "format": "pt"})
        # Not save_file, which makes a file that other users cannot read.
        replace(path, lambda part: part.write_bytes(data), overwrite=overwrite)
    else:
        replace(path, lambda part: _write_orbax(part, params, text), folder=True)
    return path


def _write_orbax(folder: Path, params: Mapping[str, Any], description: str) -> None:
    ocp = require("orbax.checkpoint", "orbax", "writing a checkpoint as a folder")
    folder.mkdir()
    (folder / "description.json").write_text(description, encoding="utf-8")
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(params))
    try:
        with uninterrupted(), quiet("absl"), ocp.PyTreeCheckpointer() as writer:
            writer.save((folder / "params").resolve(), tree)
    except (ValueError, RuntimeError) as error:  # of TensorStore, if the disk is full
        cause = re.search(r"([^:]+) \[os_error_code", str(error))
        raise OSError(cause[1].strip() if cause else reason(error)) from None


def read_description(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The description of `write_checkpoint`: "architecture", "preprocessing", "class_names" and the extra entries.

    None for a checkpoint without a description. Raises InputError for an invalid description.
    """
    path = as_path(path, "the checkpoint")
    kind = _kind(path)
    if kind == "orbax":
        return _checked_description(read_json(path / "description.json", LARGEST_DESCRIPTION), path)
    if kind == "safetensors":
        with _damage_named(path), safetensors.safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(MARK)
            if text is not None:
                return _checked_description(json.loads(text) if len(text) <= LARGEST_DESCRIPTION else None, path)
    return None


def _checked_description(description: Any, path: Path) -> dict[str, Any]:
    """The description. InputError if it is not valid."""
    if not isinstance(description, dict) or not {"architecture", "preprocessing"} <= description.keys():
        raise InputError(f"{path}: the description must have 'architecture' and 'preprocessing'")
    try:
        module = build(description["architecture"])
        Preprocessing.from_dict(description["preprocessing"])
    except InputError as error:
        raise InputError(f"{path}: in the description, {error}") from None
    where = f"{path}: 'class_names' in the description"
    names = checked(where, list[str] | None, description.setdefault("class_names", None))
    if names is not None and len(names) != module.num_classes:
        raise InputError(f"{path}: {len(names)} class names for {module.num_classes} classes")
    return description


def described_grid(description: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Patch grid (gh, gw) of a described model; None without a description."""
    return None if description is None else build(description["architecture"]).grid
