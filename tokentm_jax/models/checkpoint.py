"""Weights on disk: read in common layouts, and written under timm's names with a description.

Every layout is first translated to timm's names (`read_tensors`), then to the module's tree (`to_params`), so each
check exists once. Files are untrusted: nothing in them is executed, and every fault is one InputError.
"""

import argparse
import functools
import json
import logging
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
    opened,
    read_json,
    reason,
    replace,
    replace_folder,
    stored_size,
    uninterrupted,
)
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.models.architectures import ARCHITECTURES, LARGEST, build, config_of
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.text import TextEncoder
from tokentm_jax.models.vit import ViT
from tokentm_jax.validation import checked

Tensors = dict[str, np.ndarray]  # by timm name
HEADS = ("head.", "head_dist.", "pre_logits.")
LARGEST_DESCRIPTION = 10_000_000  # bytes
LARGEST_FACTOR = 50  # unpacked size / file size; weights hardly compress, so a larger factor is an attack


# ---- our tree <-> timm's names ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _shapes(module: ViT | TextEncoder | Bert) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter of `module`; parameters of `blocks` have the first axis L."""
    variables: Any = jax.eval_shape(module.init, jax.random.key(0), module.example())
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables["params"])
    return {path: leaf.shape for path, leaf in flat.items()}


def _timm_name(path: tuple[str, ...], block: int = 0) -> str:
    """("blocks", "attn", "qkv", "kernel"), 3 -> "blocks.3.attn.qkv.weight"."""
    *modules, leaf = path
    if modules[:1] == ["blocks"]:
        modules.insert(1, str(block))
    if modules == ["patch_embed"]:
        modules.append("proj")
    return ".".join([*modules, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def _timm_shape(module: Any, path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a timm tensor, from the shape of our parameter without the axis L. Without a module, patches are square
    with 3 channels."""
    if path == ("patch_embed", "kernel"):
        side = int((shape[0] / 3) ** 0.5 + 0.5)
        return (shape[1], 3, side, side) if module is None else (shape[1], module.in_chans, *module.tiling.patch)
    return shape[::-1] if path[-1] == "kernel" else shape


def _from_timm(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    if path == ("patch_embed", "kernel"):  # convolution [D, C, ph, pw] -> [ph pw C, D]
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T if path[-1] == "kernel" else tensor


def _to_timm(module: Any, path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if path == ("patch_embed", "kernel"):
        d, channels, *patch = _timm_shape(module, path, value.shape)
        return value.reshape(*patch, channels, d).transpose(3, 2, 0, 1)
    return value.T if path[-1] == "kernel" else value


def to_timm(params: Mapping[str, Any], module: ViT | None = None, dtype: Any = np.float32) -> Tensors:
    """The tree of parameters -> timm's names and layouts. Without the module, patches are square with 3 channels."""
    tensors: Tensors = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        value = np.asarray(leaf, np.float32).astype(dtype)
        if path[0] == "blocks":
            tensors |= {_timm_name(path, i): _to_timm(module, path, block) for i, block in enumerate(value)}
        else:
            tensors[_timm_name(path)] = _to_timm(module, path, value)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def to_params(
    module: ViT | TextEncoder | Bert,
    tensors: Tensors,
    source: str,
    reset_head: bool = False,
    old_grid: tuple[int, int] | None = None,
    antialias: bool = True,
) -> dict[str, Any]:
    """timm's names -> the tree of `module`, float32. Position embeddings of another grid are resampled.

    `source` is the file's name in errors. With `reset_head` the classifier is ignored, and the result has none.
    `old_grid` is the patch grid of the file. None means the module's grid if the number of positions fits it and is
    not a square, else a square. `antialias`: positions are resampled as in timm and OpenCLIP (True), or as in most
    models of Hugging Face (False).
    Raises InputError with a list of every missing, unexpected and wrongly shaped parameter.
    """
    tensors = {name: t for name, t in tensors.items() if not (reset_head and name.startswith(HEADS))}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    missing, wrong, params = [], [], {}
    grid = None  # of the position embeddings, if it differs
    for path, shape in _shapes(module).items():  # pyright: ignore[reportArgumentType] - modules are hashable
        stacked = path[0] == "blocks"
        names = [_timm_name(path, i) for i in range(module.depth if stacked else 1)]
        if reset_head and names[0].startswith(HEADS):
            continue
        expected = _timm_shape(module, path, shape[stacked:])
        missing += [name for name in names if name not in tensors]
        found = {name: tensors.pop(name) for name in names if name in tensors}
        for name, tensor in found.items():
            if name == "pos_embed" and isinstance(module, ViT):
                grid = _other_grid(module, tensor, old_grid)
            if tensor.shape != expected and not (name == "pos_embed" and grid):
                wrong.append(f"{name} {list(tensor.shape)} instead of {list(expected)}")
            elif not jnp.issubdtype(tensor.dtype, jnp.floating):
                wrong.append(f"{name} {tensor.dtype} instead of floating-point numbers")
        if not missing and not wrong:
            with np.errstate(over="ignore"):  # values that are too large become infinite, and raise below
                values = [_from_timm(path, np.asarray(tensor, np.float32)) for tensor in found.values()]
            params[path] = np.stack(values) if stacked else values[0]
    faults = [(label, names) for label, names in (("missing", missing), ("wrong shape", wrong)) if names]
    if tensors:
        faults.append(("unexpected", sorted(tensors)))
    if faults:
        hint = ""
        if any(n.startswith("fc_norm.") for n in missing) and any(n.startswith("norm.") for n in tensors):
            hint = "; the file normalises before pooling: set fc_norm=False"
        if any(n.startswith("pre_logits.") for n in tensors):
            hint = "; its classifier reads the layer pre_logits, which is not supported"
        hint = hint or names_that_fit(shapes, module)
        listed = "; ".join(f"{label}: {', '.join(_shorten(names))}" for label, names in faults)
        raise InputError(f"{source} does not fit the model ({listed}){hint}")
    for path, value in params.items():
        if not np.isfinite(value).all():
            raise InputError(f"{source}: parameter {_timm_name(path)!r} has values that are not finite numbers")
    if grid and isinstance(module, ViT):  # last: a wrong file must not take memory for positions
        params[("pos_embed",)] = _resample(module, params[("pos_embed",)], grid, antialias)
    return traverse_util.unflatten_dict(params)


def _shorten(names: list[str]) -> list[str]:
    """One entry for the same parameter of many blocks: blocks.0.ls1.gamma ... -> blocks.*.ls1.gamma (12 times)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"^blocks\.\d+\.", "blocks.*.", name), []).append(name)
    return [group[0] if len(group) == 1 else f"{key} ({len(group)} times)" for key, group in groups.items()]


def names_that_fit(shapes: Mapping[str, tuple[int, ...]], module: Any = None) -> str:
    """The names of the table that fit weights of these shapes best: "; width 192, depth 12: deit_tiny_patch16_224?".

    Empty if the weights are not of a ViT, or if no name fits better than `module`.
    """
    patches = shapes.get("patch_embed.proj.weight", ())
    depth = len({name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)})
    if len(patches) != 4 or not depth:
        return ""
    classes = min(max([1, *shapes.get("head.weight", ())[:1]]), LARGEST["num_classes"])
    known = {
        name: build(config, num_classes=classes)
        for name, (config, _) in ARCHITECTURES.items()
        if (config["embed_dim"], config["depth"]) == (patches[0], depth) and config["patch_size"] == patches[2]
    }
    unlike = {name: _unlike(one, shapes) for name, one in known.items()}
    if not unlike:
        return f"; width {patches[0]}, depth {depth}"
    least = min(unlike.values())
    if isinstance(module, ViT) and module.depth == depth and _unlike(module, shapes) <= least:
        return ""
    fitting = [name for name, count in unlike.items() if count == least]
    shown = " or ".join(fitting[:3]) + (" ..." if len(fitting) > 3 else "")
    return f"; width {patches[0]}, depth {depth}: {shown}?"


def _unlike(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of names and shapes that differ from the parameters of a module. Only the first block is compared."""
    own = {
        _timm_name(path): _timm_shape(module, path, shape[path[0] == "blocks" :])
        for path, shape in _shapes(module).items()
    }
    found = {name: tuple(shape) for name, shape in shapes.items() if re.match(r"(?!blocks\.)|blocks\.0\.", name)}
    return len(own.items() ^ found.items())


def _other_grid(module: ViT, positions: np.ndarray, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Patch grid of position embeddings [1, N, D] that must be resampled for the module.

    None: they have the module's grid, or an unknown one. A wrong shape is then reported with the other faults.
    """
    if positions.ndim != 3 or positions.shape[0] != 1 or positions.shape[2] != module.embed_dim:
        return None
    count = positions.shape[1] - (0 if module.no_embed_class else module.prefix)
    side = int(max(count, 0) ** 0.5 + 0.5)
    grid = stated if stated is not None and stated[0] * stated[1] == count else (side, side)
    return None if count < 1 or grid[0] * grid[1] != count or grid == module.grid else grid


def _resample(module: ViT, positions: np.ndarray, old_grid: tuple[int, int], antialias: bool) -> np.ndarray:
    """Bicubic resampling of position embeddings [1, N, D] to the module's grid; prefix tokens are kept.

    With `antialias`, the kernel is Keys' with a = -1/2, and becomes wider as the grid shrinks. Without, it is that of
    PyTorch's `interpolate(mode="bicubic")`: a = -3/4, with a repeated border.
    """
    prefix = 0 if module.no_embed_class else module.prefix
    gh, gw = module.grid
    grid = positions[0, prefix:].reshape(*old_grid, -1)
    if antialias:
        grid = np.asarray(jax.image.resize(grid, (gh, gw, grid.shape[-1]), "cubic", antialias=True))
    else:
        rows, columns = (_bicubic(old, new) for old, new in zip(old_grid, (gh, gw), strict=True))
        grid = np.einsum("ih,hwd,jw->ijd", rows, grid, columns, optimize=True).astype(np.float32)
    return np.concatenate([positions[:, :prefix], grid.reshape(1, gh * gw, -1)], 1)


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """[new, old]: weight of each old position in each new one, by Keys' cubic convolution (1981) of four positions."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    places = np.floor(centres)[:, None] + np.arange(-1, 3)
    x = np.abs(centres[:, None] - places)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
    shares = np.zeros((new, old))
    np.add.at(shares, (np.arange(new)[:, None], places.clip(0, old - 1).astype(int)), np.where(x <= 1, near, far))
    return shares


# ---- reading -------------------------------------------------------------------------------------------------------


def read_checkpoint(module: ViT, path: str | os.PathLike[str], reset_head: bool = False) -> dict[str, Any]:
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
    return current_names(_without_wrappers(readers[kind](path), path))


# Prefixes that training code adds: an attribute, PyTorch's DataParallel and compile.
WRAPPERS = re.compile(r"^((module|model|backbone|_orig_mod)\.)+")


def _without_wrappers(tensors: Tensors, path: Path) -> Tensors:
    """The tensors without prefixes of training code. InputError if two names become equal."""
    found: dict[str, str] = {}
    for name in tensors:
        bare = WRAPPERS.sub("", name)
        if bare in found:
            raise InputError(f"checkpoint {path} holds {bare!r} twice, as {found[bare]!r} and as {name!r}")
        found[bare] = name
    return {bare: tensors[name] for bare, name in found.items()}


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
            _require_room(path, sum(entry.file_size for entry in entries))
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
    """Errors of the libraries that read checkpoints as InputError. They raise a dozen kinds for damaged files."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {path} is damaged or incomplete ({reason(error)})") from None


def _require_room(path: Path, unpacked: int) -> None:
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
        _require_room(path, sum(4 * math.prod(file.get_slice(n).get_shape()) for n in names))
        return {name: file.get_tensor(name) for name in names}


def _read_npz(path: Path) -> Tensors:
    with _damage_named(path), opened(path, "checkpoint") as file, zipfile.ZipFile(file) as archive:
        _require_room(path, sum(_declared_size(archive, entry, path) for entry in archive.infolist()))
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return _from_google({name: arrays[name] for name in arrays.files}, path)


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
    _require_room(path, sum(4 * t.numel() for t in tensors.values() if not t.is_nested))
    read: Tensors = {}
    for name, t in tensors.items():
        if t.layout is not torch.strided or t.is_nested or t.is_quantized or t.is_meta:
            raise InputError(f"checkpoint {path}: {name!r} is not a plain tensor")
        t = t.detach().resolve_conj().resolve_neg()
        read[name] = (t.float() if t.is_floating_point() else t).numpy()
    return read


HELD = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys of the weights, in timm's order of preference


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """No log messages: Orbax logs every error with a traceback, and also raises it."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _read_orbax(path: Path) -> Tensors:
    ocp = require("orbax.checkpoint", "orbax", f"reading the folder {path}")
    for file in (path / "params").rglob("*"):
        if not file.is_file() and not file.is_dir():  # a pipe: Orbax would wait for ever
            raise InputError(f"checkpoint {path}: {file} is not a regular file")
    with _damage_named(path), _quiet_orbax(), ocp.PyTreeCheckpointer() as reader:
        folder = (path / "params").resolve()
        found = reader.metadata(folder).item_metadata
        if found is None:
            raise ValueError("Orbax finds no parameters in it")
        unpacked = 0
        for names, leaf in traverse_util.flatten_dict(found.tree).items():
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", object)
            block = names[0] != "blocks" or (shape and 0 < shape[0] <= LARGEST["depth"])
            if shape is None or not block or not jnp.issubdtype(dtype, jnp.floating):
                raise InputError(f"checkpoint {path}: {'.'.join(map(str, names))!r} is not a parameter of a ViT")
            unpacked += 4 * math.prod(shape)
        _require_room(path, unpacked)
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
        params = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))
        return to_timm(params, build(_described(path)["architecture"]))


def current_names(tensors: Tensors) -> Tensors:
    """Names of other releases -> timm's current names.

    These are layer scale of DeiT-3 and EVA, registers of DINOv2, and the separate projections of EVA-02, which are one
    here. The layer pre_logits is removed if no classifier reads it (in releases of ImageNet-21k the classifier is 0).
    """
    tensors = {re.sub(r"\bgamma_(\d)$", r"ls\1.gamma", name): t for name, t in tensors.items()}
    unread = ("mask_token",) if np.any(tensors.get("head.weight", 0)) else ("mask_token", "pre_logits.")
    tensors = {name: t for name, t in tensors.items() if not name.startswith(unread)}
    for name in [n for n in tensors if n.endswith(".attn.q_proj.weight")]:
        block = name.removesuffix("q_proj.weight")
        parts = [f"{block}{part}_proj.weight" for part in "qkv"]
        if all(part in tensors for part in parts):
            tensors[f"{block}qkv.weight"] = np.concatenate([tensors.pop(part) for part in parts])
            for part in "qv":
                if f"{block}{part}_proj.bias" in tensors:
                    tensors[f"{block}{part}_bias"] = tensors.pop(f"{block}{part}_proj.bias")
    first = tensors["pos_embed"][:, :1] if "pos_embed" in tensors and tensors["pos_embed"].ndim == 3 else None
    if "register_tokens" in tensors and first is not None and tensors.get("cls_token", first[:0]).shape == first.shape:
        # DINOv2 adds a position to the class token and not to its registers. timm has positions of patches only.
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + first
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    return tensors


GOOGLE = (
    (r"^params/(txt/.*|t|b)$", ""),
    (r"^(opt/target/|params/img/|params/)", ""),
    (r"^MAPHead_0/probe$", "attn_pool/latent"),
    (r"^MAPHead_0/LayerNorm_0/", "attn_pool/norm/"),
    (r"^MAPHead_0/MlpBlock_0/Dense_([01])/", lambda m: f"attn_pool/mlp/fc{int(m[1]) + 1}/"),
    (r"^MAPHead_0/MultiHeadDotProductAttention_0/out/", "attn_pool/proj/"),
    (r"^MAPHead_0/MultiHeadDotProductAttention_0/query/", "attn_pool/q/"),
    (r"^MAPHead_0/MultiHeadDotProductAttention_0/", "attn_pool/"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^cls$", "cls_token"),
    (r"^(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_\d/out/", "/attn/proj/"),
    (r"/MultiHeadDotProductAttention_\d/", "/attn/"),
    (r"/MlpBlock_\d/Dense_([01])/", lambda m: f"/mlp/fc{int(m[1]) + 1}/"),
    (r"/(kernel|scale)$", "/weight"),
)


def _from_google(arrays: Tensors, path: Path) -> Tensors:
    """Names and layouts of Google's ViT releases, and of big_vision's image towers -> timm's."""
    tensors: Tensors = {}
    stacked = "Transformer/encoderblock/"
    for name, array in arrays.items():
        if stacked in name and array.ndim:
            blocks = {name.replace(stacked, f"{stacked[:-1]}_{i}/"): block for i, block in enumerate(array)}
        else:
            blocks = {name: array}
        for own, block in blocks.items():
            for pattern, replacement in GOOGLE:
                own = re.sub(pattern, replacement, own)
            if own:
                tensors[own.replace("/", ".")] = block
    if "patch_embed.proj.weight" not in tensors:
        raise InputError(f"{path} is not a checkpoint: 'embedding/kernel' of Google's ViT releases is missing")
    for name, tensor in tensors.items():
        d = tensor.shape[-1:]
        if name == "patch_embed.proj.weight" and tensor.ndim == 4:
            tensors[name] = tensor.transpose(3, 2, 0, 1)
        elif name.endswith(".weight") and _HEADS.search(name):  # [D, H, D/H], or [H, D/H, D] for the output
            d = tensor.shape[-1] if ".proj." in name else tensor.shape[0]
            tensors[name] = (tensor.reshape(-1, d) if ".proj." in name else tensor.reshape(d, -1)).T
        elif name.endswith(".bias") and _HEADS.search(name):
            tensors[name] = tensor.reshape(-1)
        elif name.endswith(".weight") and tensor.ndim == 2:
            tensors[name] = tensor.T
    for leaf in ("weight", "bias"):
        parts = [f"attn_pool.{part}.{leaf}" for part in ("key", "value")]
        if all(part in tensors for part in parts):
            tensors[f"attn_pool.kv.{leaf}"] = np.concatenate([tensors.pop(part) for part in parts])
    return fused(tensors)


_HEADS = re.compile(r"\.attn\.|^attn_pool\.(q|key|value|proj)\.")  # tensors with an axis of heads


def fused(tensors: Tensors) -> Tensors:
    """The query, key and value maps of each block joined to one map, as in timm."""
    tensors = dict(tensors)
    for name in [n for n in tensors if ".attn.query." in n]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in tensors and tensors[part].shape == tensors[name].shape != () for part in parts):
            tensors[name.replace("query", "qkv")] = np.concatenate([tensors.pop(part) for part in parts])
    return tensors


# ---- self-describing files ------------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | os.PathLike[str],
    module: ViT,
    params: Mapping[str, Any],
    preprocessing: Preprocessing,
    class_names: list[str] | tuple[str, ...] | None = None,
    extra: Mapping[str, Any] | None = None,
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
    if not isinstance(params, Mapping) or not all(_is_real(leaf) for leaf in jax.tree.leaves(params)):
        raise InputError(f"{where} 'params' must be a nested dictionary of arrays of real numbers")
    dtype = checked(f"{where} 'dtype'", Literal["float32", "float16"], dtype)
    if dtype != "float32" and not path.suffix:
        raise InputError(f"{path}: a folder is written in float32")
    with np.errstate(over="ignore"):  # values that are too large become infinite, and raise below
        tensors = to_timm(params, module, dtype)
    to_params(module, tensors, "params")  # raises if the checkpoint could not be read again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {reason(error)}") from None
    if path.suffix:
        data = safetensors.numpy.save(tensors, {MARK: text, "format": "pt"})
        # Not save_file, which makes a file that other users cannot read.
        replace(path, lambda part: part.write_bytes(data), overwrite=overwrite)
    else:
        replace_folder(path, lambda part: _write_orbax(part, params, text))
    return path


def _is_real(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def _write_orbax(folder: Path, params: Mapping[str, Any], description: str) -> None:
    ocp = require("orbax.checkpoint", "orbax", "writing a checkpoint as a folder")
    folder.mkdir()
    (folder / "description.json").write_text(description, encoding="utf-8")
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(params))
    try:
        with uninterrupted(), _quiet_orbax(), ocp.PyTreeCheckpointer() as writer:
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
        return _described(path)
    if kind != "safetensors":
        return None
    with _damage_named(path), safetensors.safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(MARK)
        if text is None:
            return None
        description = json.loads(text) if len(text) <= LARGEST_DESCRIPTION else None
    return _checked_description(description, path)


def _described(folder: Path) -> dict[str, Any]:
    return _checked_description(read_json(folder / "description.json", LARGEST_DESCRIPTION), folder)


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
