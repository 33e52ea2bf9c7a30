"""Names of weights. `layouts.toml` has a table for each layout, and all names become timm's current ones."""

import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokentm_jax.errors import InputError

Tensors = dict[str, np.ndarray]  # by timm name
LAYOUTS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("layouts.toml").read_text(encoding="utf-8"))


def renamed(tensors: Tensors, names: Iterable[Sequence[str]], where: str = "the file of weights") -> Tensors:
    """The tensors under their new names, without those whose new name is empty."""
    origins: dict[str, str] = {}
    for name in tensors:
        new = name
        for pattern, replacement in names:
            new = re.sub(pattern, replacement, new)
        if new in origins:
            raise InputError(f"{where} holds {new!r} twice, as {origins[new]!r} and as {name!r}")
        if new:
            origins[new] = name
    return {new: tensors[name] for new, name in origins.items()}


def fused(tensors: Tensors) -> Tensors:
    """The query, key and value maps of each block joined to one map, as in timm. EVA's keys have no bias."""
    tensors = dict(tensors)
    for name in [n for n in tensors if ".attn.q." in n]:
        shape = tensors[name].shape
        places = {part: name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"}
        alike = {part: tensors[place] for part, place in places.items() if place in tensors}
        alike = {part: tensor for part, tensor in alike.items() if tensor.shape == shape != ()}
        if len(alike) == 3:
            tensors[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate([*alike.values()])
        elif [*alike] == ["q", "v"] and name.endswith(".bias"):
            tensors |= {name.replace(".q.bias", f".{part}_bias"): tensor for part, tensor in alike.items()}
        else:
            continue
        for part in alike:
            del tensors[places[part]]
    return tensors


def current_names(tensors: Tensors) -> Tensors:
    """Names of other releases -> timm's current names.

    These are layer scale of DeiT-3 and EVA, registers of DINOv2, and the separate projections of EVA-02, which are one
    here. The layer pre_logits is removed if no classifier reads it (in releases of ImageNet-21k the classifier is 0).
    """
    tensors = {re.sub(r"\bgamma_(\d)$", r"ls\1.gamma", name): t for name, t in tensors.items()}
    tensors = {re.sub(r"\.attn\.([qkv])_proj\.", r".attn.\1.", name): t for name, t in tensors.items()}
    unread = ("mask_token",) if np.any(tensors.get("head.weight", 0)) else ("mask_token", "pre_logits.")
    tensors = fused({name: t for name, t in tensors.items() if not name.startswith(unread)})
    first = tensors["pos_embed"][:, :1] if "pos_embed" in tensors and tensors["pos_embed"].ndim == 3 else None
    if "register_tokens" in tensors and first is not None and tensors.get("cls_token", first[:0]).shape == first.shape:
        # DINOv2 adds a position to the class token and not to its registers. timm has positions of patches only.
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + first
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    return tensors


def from_google(arrays: Tensors, path: Path) -> Tensors:
    """Names and layouts of Google's ViT releases, and of big_vision's image towers -> timm's."""
    single: Tensors = {}
    stacked = "Transformer/encoderblock/"
    for name, array in arrays.items():
        if stacked in name and array.ndim:
            single |= {name.replace(stacked, f"{stacked[:-1]}_{i}/"): block for i, block in enumerate(array)}
        else:
            single[name] = array
    tensors = renamed(single, LAYOUTS["google"]["names"])
    if "patch_embed.proj.weight" not in tensors:
        raise InputError(f"{path} is not a checkpoint: 'embedding/kernel' of Google's ViT releases is missing")
    for name, tensor in tensors.items():
        of_heads = re.search(r"\.attn\.|^attn_pool\.(q|key|value|proj)\.", name)
        if name == "patch_embed.proj.weight" and tensor.ndim == 4:
            tensors[name] = tensor.transpose(3, 2, 0, 1)
        elif name.endswith(".weight") and of_heads:  # [D, H, D/H], or [H, D/H, D] for the output
            shape = (-1, tensor.shape[-1]) if ".proj." in name else (tensor.shape[0], -1)
            tensors[name] = tensor.reshape(shape).T
        elif name.endswith(".bias") and of_heads:
            tensors[name] = tensor.reshape(-1)
        elif name.endswith(".weight") and tensor.ndim == 2:
            tensors[name] = tensor.T
    for leaf in ("weight", "bias"):
        parts = [f"attn_pool.{part}.{leaf}" for part in ("key", "value")]
        if all(part in tensors for part in parts):
            tensors[f"attn_pool.kv.{leaf}"] = np.concatenate([tensors.pop(part) for part in parts])
    return tensors
