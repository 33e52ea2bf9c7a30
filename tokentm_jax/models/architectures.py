"""Architectures by their timm name, and the module built from timm's keyword arguments.

config, preprocessing = architecture("vit_base_patch16_224.augreg_in21k_ft_in1k")
module = build(config, num_classes=10)
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from tokentm_jax.errors import InputError, suggest
from tokentm_jax.files import read_json
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.models.vit import ViT
from tokentm_jax.validation import checked

Config = dict[str, Any]  # keyword arguments of timm's VisionTransformer, JSON types only
# timm's name -> the options of its model, the number of parameters, and its sets of weights by tag, the default first.
# Made by `tests/goldens/make_timm_goldens.py`.
TIMM: dict[str, Any] = read_json(Path(__file__).with_name("architectures.json"))


def _preprocessing(base: str, tag: str = "") -> Preprocessing:
    """The preprocessing of the weights with this tag, or of the default weights if timm has no such tag."""
    weights = TIMM[base]["weights"]
    fields = weights.get(tag) or next(iter(weights.values()))
    return Preprocessing.from_dict({name: value for name, value in fields.items() if name != "repository"})


ARCHITECTURES: dict[str, tuple[Config, Preprocessing]] = {
    name: (entry["options"], _preprocessing(name)) for name, entry in TIMM.items()
}

LARGEST_TOKENS = 65_536  # of 4096 pixels in patches of 16
NOT_OF_TIMM = ("patch_drop", "dtype", "linear", "unroll", "parent", "name")
OPTIONS: dict[str, Any] = {name: kind for name, kind in ViT.__annotations__.items() if name not in NOT_OF_TIMM}
LATER: Config = {"in_chans": 3, "stride": None}  # a description leaves them out if they have these values
# Other options of timm's VisionTransformer: without effect on the forward pass of a trained model, or with only one
# supported value.
WITHOUT_EFFECT = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "dynamic_img_size", "device", "dtype"),
)
ONLY: dict[str, Any] = {
    "scale_attn_norm": False,
    "pool_include_prefix": False,
    "dynamic_img_pad": False,
    **dict.fromkeys(("embed_layer", "embed_norm_layer", "norm_layer", "act_layer", "block_fn", "attn_layer")),
}


def repositories(base: str) -> dict[str, str]:
    """The repository on the hub of each set of timm's weights, by tag; the first is the default."""
    weights = TIMM[base]["weights"]
    return {tag: fields["repository"] for tag, fields in weights.items() if fields["repository"]}


def repository_of(name: str) -> tuple[str, str]:
    """A name of the table, with or without tag -> the name with its tag, and its repository. Raises InputError."""
    base, _, tag = name.partition(".")
    places = repositories(base)
    if not places:
        raise InputError(f"timm has no weights of {base!r} on the hub: give a checkpoint")
    tag = tag or next(iter(places))
    if tag not in places:
        raise suggest("weights", tag, places, of=base)
    return f"{base}.{tag}", places[tag]


def architecture(name: str, **overrides: Any) -> tuple[Config, Preprocessing]:
    """Configuration and preprocessing of a timm name, with or without tag ("vit_base_patch16_224.dino").

    Without a tag, the preprocessing is that of timm's default weights, as in `timm.create_model`. `overrides` replace
    entries of the configuration; `img_size` also changes the preprocessing.
    Raises InputError with the nearest known name if the table does not have `name`.
    """
    base, _, tag = str(name).partition(".")
    if base not in ARCHITECTURES:
        raise suggest("model", base, ARCHITECTURES)
    preprocessing = _preprocessing(base, tag)
    config = ARCHITECTURES[base][0] | overrides
    if "img_size" in overrides:
        preprocessing = dataclasses.replace(preprocessing, size=_checked("img_size", config["img_size"]))
    return config, preprocessing


def build(
    config: Mapping[str, object] | str,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    dtype: DTypeLike | None = None,
) -> ViT:
    """The module of a configuration (keys of timm's VisionTransformer) or of a name of the table.

    Args:
        config: besides timm's keys, `distilled`, `activation` ("gelu", "quick_gelu", "gelu_tanh") and `norm_eps`.
        img_size: side or (height, width) in pixels, instead of the configuration's.
        num_classes: instead of the configuration's.
        dtype: type of the activations, such as "bfloat16"; None: type of the images.

    Returns:
        The module, without parameters.

    Raises:
        InputError: an unknown key, a wrong type, or a value that is not supported; the message names the key.
    """
    if isinstance(config, str):
        config = architecture(config)[0]
    if not isinstance(config, Mapping):
        raise InputError(f"a model is a name or a mapping of options, got {type(config).__name__}")
    given = {"img_size": img_size, "num_classes": num_classes}
    options = {**config, **{key: value for key, value in given.items() if value is not None}}
    options = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT}
    for key, only in ONLY.items():
        if options.pop(key, only) != only:
            raise InputError(f"model option {key!r} must be {only!r}: nothing else is supported")
    for key, value in options.items():
        if key not in OPTIONS:
            raise suggest("model option", key, OPTIONS)
        options[key] = _checked(key, value)
    module = ViT(**options, dtype=dtype_of(dtype))
    _check_together(module)
    return module


def config_of(module: ViT) -> Config:
    """The configuration of a module for `build`, in JSON types."""
    values = {name: getattr(module, name) for name in OPTIONS}
    values = {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _checked(key: str, value: Any) -> Any:
    """`value` in the type of the option. InputError if it does not have that type."""
    if key == "img_size" or (key == "ref_feat_shape" and value is not None):
        value = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if key in ("patch_size", "stride") and isinstance(value, list | tuple):
        value = value[0] if len(value) == 2 and value[0] == value[1] else tuple(value)
    return checked(f"model option {key!r}", OPTIONS[key], value)


def dtype_of(dtype: Any) -> Any:
    """A type of activations by its name. Raises InputError for a type that is not floating-point."""
    if dtype is None:
        return None
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise InputError(f"dtype must be a floating-point type such as 'float32' or 'bfloat16', got {dtype!r}")
    return kind


def _check_together(module: ViT) -> None:
    """InputError for options that do not fit together."""
    tokens = module.grid[0] * module.grid[1] + module.prefix
    if tokens > LARGEST_TOKENS:
        raise InputError(f"model option 'patch_size': {tokens} tokens are more than {LARGEST_TOKENS}")
    for side, patch, stride in zip(module.img_size, *module.tiling, strict=True):
        if side < patch or (stride == patch and side % patch):
            raise InputError(f"model option 'img_size': {side} is not a multiple of the patch size {patch}")
        if stride > patch:
            raise InputError(f"model option 'stride': {stride} leaves gaps between patches of {patch}")
    width, heads = module.embed_dim, module.num_heads
    if width % heads:
        raise InputError(f"model option 'num_heads': {heads} heads do not divide the width {width}")
    if int(width * module.mlp_ratio) < 1:
        raise InputError(f"model option 'mlp_ratio': {module.mlp_ratio} leaves the FFN without hidden units")
    if module.global_pool in ("token", "cat") and not module.class_token:
        raise InputError(f"model option 'global_pool': {module.global_pool!r} needs a class token; use 'avg'")
    if module.global_pool == "prefix" and not module.prefix:
        raise InputError("model option 'global_pool': 'prefix' needs a token before the patches; use 'avg'")
    if module.rope_type is not None and width // heads % 4:
        raise InputError("model option 'rope_type': rotary positions need heads whose width is a multiple of 4")
    if module.distilled and not module.num_classes:
        raise InputError("model option 'distilled' needs classes")
    if module.distilled and not (module.class_token and module.global_pool == "token"):
        raise InputError("model option 'distilled' needs a class token and global_pool='token'")
    if module.distilled and module.fc_norm:
        raise InputError("model option 'distilled' needs the norm before pooling: fc_norm=False")
