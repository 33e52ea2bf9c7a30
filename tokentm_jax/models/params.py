"""The tree of a module's parameters <-> tensors under timm's names. `to_params` has every check of weights."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tokentm_jax.errors import InputError
from tokentm_jax.models.architectures import ARCHITECTURES, build
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.decoder import Decoder
from tokentm_jax.models.names import Tensors
from tokentm_jax.models.text import TextEncoder
from tokentm_jax.models.vit import MOST_CLASSES, ViT

HEADS = ("head.", "head_dist.", "pre_logits.")


@functools.lru_cache(maxsize=8)
def _shapes(module: ViT | TextEncoder | Bert | Decoder) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter of `module`; parameters of `blocks` have the first axis L."""
    variables: Any = jax.eval_shape(lambda inputs: module.init(jax.random.key(0), inputs), module.example())
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
    """Shape of timm's tensor, from ours of one block. Without a module, patches are square with 3 channels."""
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
    module: ViT | TextEncoder | Bert | Decoder,
    tensors: Tensors,
    source: str,
    reset_head: bool = False,
    old_grid: tuple[int, int] | None = None,
    antialias: bool = True,
) -> dict[str, Any]:
    """timm's names -> the tree of `module`, float32. Position embeddings of another grid are resampled.

    `source` is the file's name in errors. With `reset_head` the classifier is ignored, and the result has none.
    `old_grid` is the patch grid of the file; None: the module's if the number of positions fits it and is no square,
    else a square. `antialias`: resampled as in timm and OpenCLIP, or else as in most models of Hugging Face.
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
    faults = {"missing": missing, "wrong shape": wrong, "unexpected": sorted(tensors)}
    if any(faults.values()):
        hint = ""
        if any(n.startswith("fc_norm.") for n in missing) and any(n.startswith("norm.") for n in tensors):
            hint = "; the file normalises before pooling: set fc_norm=False"
        if any(n.startswith("pre_logits.") for n in tensors):
            hint = "; its classifier reads the layer pre_logits, which is not supported"
        hint = hint or names_that_fit(shapes, module)
        listed = "; ".join(f"{label}: {', '.join(_shorten(names))}" for label, names in faults.items() if names)
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
    """The names that fit these shapes best: "; width 192, depth 12: deit_tiny_patch16_224?"; "": none is better."""
    patches = shapes.get("patch_embed.proj.weight", ())
    depth = len({name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)})
    if len(patches) != 4 or not depth:
        return ""
    classes = min(max([1, *shapes.get("head.weight", ())[:1]]), MOST_CLASSES)
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
    """Patch grid of position embeddings [1, N, D] to resample; None for the module's grid, or an unknown one."""
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
