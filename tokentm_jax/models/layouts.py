"""Folders of models in the layouts of timm, Hugging Face and OpenCLIP, translated to timm's names.

A folder has a `config.json` (or `open_clip_config.json`) and weights in safetensors. A layout is a table of names and
a function from its config to the options of `build`. A config that this project cannot compute raises InputError.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le, Len

from tokentm_jax.errors import InputError
from tokentm_jax.files import read_json, read_text
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.models.architectures import Config, architecture, build
from tokentm_jax.models.checkpoint import Tensors, current_names, fused, read_safetensors, to_params
from tokentm_jax.models.text import TextEncoder, TextTower, Tokenizer
from tokentm_jax.validation import checked

CONFIG, OPEN_CLIP, INDEX = "config.json", "open_clip_config.json", "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")
OPEN_CLIP_WEIGHTS = WEIGHTS[::-1]  # a folder may have weights for both libraries
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
OTHERS = ("preprocessor_config.json", *TOKENIZER)
LARGEST_SHARDS = 1000
TEXT = {  # of `text_layouts`: model type -> prefix of its architectures
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
    "distilbert": "DistilBert", "electra": "Electra",
}  # fmt: skip

Names = Sequence[tuple[str, Any]]  # pattern of a name, and its replacement
Whole = Annotated[int, Ge(1), Le(2**31 - 1)]
Count = Annotated[int, Ge(0), Le(2**31 - 1)]  # or an index
Depth = Annotated[int, Ge(1), Le(1000)]
Side = Annotated[int, Ge(1), Le(2**16)]
Sides = Side | Annotated[list[Side], Len(2, 2)]  # of a square, or (height, width)
Ratio = Annotated[float, Gt(0), Le(1000)]


class Folder(NamedTuple):
    """A stored model, of a folder or a file, under timm's names."""

    config: Config
    preprocessing: Preprocessing
    tensors: Tensors
    class_names: list[str] | None
    text: TextTower | None = None
    of_timm: bool = False  # from timm: 1000 classes are ImageNet-1k's unless it has other names
    grid: tuple[int, int] | None = None  # of its position embeddings; None: the grid of `config`
    antialias: bool = True  # how the library resamples position embeddings
    notes: tuple[str, ...] = ()  # differences from the folder's description, as warnings of `load`


class Section:
    """A part of a JSON file. Its values are checked when they are read."""

    def __init__(self, where: str, content: Any) -> None:
        if not isinstance(content, Mapping):
            raise InputError(f"{where} must be an object")
        self.where, self.content = where, content

    def __call__(self, key: str, kind: Any, *default: Any) -> Any:
        """The value of `key`. InputError if it does not have the type `kind`, or is missing and has no default."""
        if key not in self.content or (self.content[key] is None and default):
            if not default:
                raise InputError(f"{self.where} lacks {key!r}")
            return default[0]
        return checked(f"{self.where}: {key!r}", kind, self.content[key])

    def section(self, key: str) -> "Section":
        return Section(f"{self.where}: {key!r}", self.content.get(key, {}))

    def only(self, key: str, value: Any) -> None:
        """InputError unless `key` has this value or is missing."""
        if self.content.get(key, value) != value:
            raise InputError(f"{self.where}: {key!r} must be {value!r}: nothing else is supported")


def present(folder: str | os.PathLike[str], name: str) -> bool:
    """Whether a folder has an entry of this name, readable or not."""
    return os.path.lexists(os.path.join(folder, name))


def architecture_of(config: Section, families: Mapping[str, str], known: Mapping[str, bool]) -> bool | None:
    """Whether the architecture of a config has a classifier; None if the config has no architecture.

    `families` has the prefixes of the names, `known` the suffixes and their answers. Raises InputError for others.
    """
    listed = config("architectures", list[str], None)
    if not listed:
        return None
    beginnings = "|".join(sorted(families.values(), key=len, reverse=True))
    kind = re.sub(rf"^(TF|Flax)?({beginnings})", "", listed[0])
    if kind not in known or kind == listed[0]:
        family = families[config("model_type", str)]
        names = ", ".join(f"{family}{kind}" for kind in known)
        raise InputError(f"{config.where}: the architecture {listed[0]!r:.80} is not supported; known: {names}")
    return known[kind]


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with the config of a model."""
    return present(path, CONFIG) or present(path, OPEN_CLIP)


def is_text_folder(folder: Path) -> bool:
    """Whether a folder has a model of texts, see `text_layouts`."""
    if not present(folder, CONFIG) or present(folder, OPEN_CLIP):
        return False
    content = read_json(folder / CONFIG, what="model")
    return isinstance(content, dict) and "pretrained_cfg" not in content and content.get("model_type") in tuple(TEXT)


def read_folder(folder: Path) -> Folder:
    """A folder of timm, Hugging Face or OpenCLIP. InputError for another folder, or one that is damaged."""
    if present(folder, OPEN_CLIP):
        return _open_clip(folder)
    if not present(folder, CONFIG):
        raise InputError(f"{folder} has no model: expected {CONFIG} or {OPEN_CLIP} next to the weights")
    config = read_section(folder / CONFIG, "model")
    if "pretrained_cfg" in config.content:
        return _timm(folder, config)
    kind = type_of(config, HUGGING_FACE)
    read, family, architectures = HUGGING_FACE[kind]
    classifies = architecture_of(config, {kind: family}, architectures)
    found = read(folder, config)
    if classifies:
        require_classifier(folder, config, found.tensors)
    return found


def read_section(file: Path, what: str) -> Section:
    return Section(str(file), read_json(file, what=what))


def type_of(config: Section, known: Iterable[str]) -> str:
    """The model type of a config. InputError if it is not one of `known`."""
    kind = config("model_type", str)
    if kind not in known:
        raise InputError(f"{config.where}: the model type {kind!r} is not supported; known: {', '.join(known)}")
    return kind


def require_classifier(folder: Path, config: Section, tensors: Tensors) -> None:
    """InputError for weights without the classifier of the architecture."""
    if "head.weight" not in tensors:
        raise InputError(f"the weights of {folder} lack the classifier of {config.content['architectures'][0]}")


def read_weights(folder: Path, names: Sequence[str] = WEIGHTS) -> Tensors:
    """The tensors of a folder: of the first of these files, of the shards in the index, or of the only other file.

    Raises InputError as for a checkpoint.
    """
    for name in names:
        if present(folder, name):
            return read_safetensors(folder / name)
    if not present(folder, INDEX):
        only = sorted(folder.glob("*.safetensors"))
        if len(only) != 1:
            raise InputError(f"{folder} has no weights: expected {WEIGHTS[0]} or {INDEX}")
        return read_safetensors(only[0])
    tensors: Tensors = {}
    for name in shards(folder):
        tensors |= read_safetensors(folder / name)
    return tensors


def shards(folder: Path) -> list[str]:
    """The files of weights in the index of a folder. InputError for a file outside of the folder."""
    index = read_section(folder / INDEX, "index")
    files = sorted(set(index("weight_map", dict[str, str]).values()))
    if len(files) > LARGEST_SHARDS or any(PurePosixPath(name).name != name or name in ("", "..") for name in files):
        raise InputError(f"{index.where}: 'weight_map' must name files of this folder")
    return files


def renamed(tensors: Tensors, names: Names) -> Tensors:
    """The tensors under their new names, without those whose new name is empty."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise InputError(f"two tensors of the weights are {name!r} of the model")
        if name:
            found[name] = tensor
    return found


def _ratio(hidden: int, width: int) -> float:
    """The ratio that gives exactly `hidden` channels after rounding down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def activation_of(section: Section, key: str = "hidden_act", known: Mapping[str, str] = ACTIVATIONS) -> str:
    name = section(key, str, "gelu")
    if name not in known:
        raise InputError(f"{section.where}: {key!r} must be one of {', '.join(known)}, got {name!r:.80}")
    return known[name]


def _common(section: Section) -> Config:
    """Options that have the same keys in all vision configs of Hugging Face."""
    section.only("num_channels", 3)
    return {"img_size": section("image_size", Sides), **_blocks(section)}


def _blocks(section: Section) -> Config:
    """Options that do not depend on the size of the images."""
    width = section("hidden_size", Whole)
    hidden = section("intermediate_size", Whole, None)
    return {
        "patch_size": section("patch_size", Sides),
        "embed_dim": width,
        "depth": section("num_hidden_layers", Depth),
        "num_heads": section("num_attention_heads", Whole),
        "mlp_ratio": section("mlp_ratio", Ratio, 4.0) if hidden is None else _ratio(hidden, width),
        "qkv_bias": section("qkv_bias", bool, True),
        "norm_eps": section("layer_norm_eps", float),
        "activation": activation_of(section),
    }


def classes_of(config: Section, tensors: Tensors) -> tuple[int, list[str] | None]:
    """The number of classes, and their names unless these are the default ones. InputError if they do not match."""
    head = tensors.get("head.weight")
    count = head.shape[0] if head is not None and head.ndim else 0
    names = config("id2label", dict[str, str], {})
    listed = [names.get(str(i)) for i in range(len(names))]
    if not count or not names or None in listed or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in listed):
        return count, None
    if len(listed) != count:
        raise InputError(f"{config.where}: 'id2label' names {len(listed)} classes of {count}")
    return count, [str(name) for name in listed]


RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _preprocessing(
    folder: Path, size: Any, shortest: bool = False, any_size: bool = False
) -> tuple[Preprocessing, tuple[str, ...]]:
    """The preprocessing of a folder for a model of this size, and a note if the processor has another size.

    With `any_size`, the processor's size is used. A number as 'size' is the length of the short side (`shortest`, as
    in processors of CLIP and DINOv2) or of both sides.
    """
    section = _processor(folder)
    size = tuple(size) if isinstance(size, list | tuple) else (size, size)
    fields: dict[str, Any] = {"crop_pct": 1.0}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        section.only(key, True)
    if not math.isclose(section("rescale_factor", float, 1 / 255), 1 / 255, rel_tol=1e-4):
        raise InputError(f"{section.where}: 'rescale_factor' must be 1/255: nothing else is supported")
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        fields[name] = section(key, list[float])
    resample = section("resample", int, 3)
    if resample not in RESAMPLE:
        raise InputError(f"{section.where}: 'resample' must be one of {', '.join(map(str, RESAMPLE))}")
    fields["interpolation"] = RESAMPLE[resample]
    resized = section("size", Sides | dict[str, Side], {"height": size[0], "width": size[1]})
    if isinstance(resized, int) and shortest:
        resized = {"shortest_edge": resized}
    sides, squashed = _sides(resized)
    if sides is None:
        raise InputError(f"{section.where}: 'size' must have 'height' and 'width', or 'shortest_edge'")
    if squashed:
        fields["crop_mode"] = "squash"
    cut = sides if squashed else None
    if section("do_center_crop", bool, False):
        cut = _sides(section("crop_size", Sides | dict[str, Side], list(size)))[0] or size
        fields["crop_pct"] = min(1.0, cut[0] / sides[0])
    notes = ()
    if any_size:
        size = cut or size
    elif cut not in (None, size):
        shown = [" x ".join(map(str, sides)) for sides in (cut, size)]
        notes = (
            f"{section.where} makes photos of {shown[0]} pixels, and the model takes {shown[1]}: used is {shown[1]}",
        )
    return Preprocessing.from_dict({**fields, "size": list(size)}), notes


def _processor(folder: Path) -> Section:
    file = folder / "preprocessor_config.json"
    if not present(folder, file.name):
        raise InputError(f"{folder} lacks {file.name}, which specifies how inputs are prepared")
    return read_section(file, "preprocessing")


def _sides(size: int | list[int] | dict[str, int]) -> tuple[tuple[int, int] | None, bool]:
    """(height, width) of a processor's size, and whether both are given. If not, both are the short side."""
    if isinstance(size, dict):
        both = {"height", "width"} <= size.keys()
        short = size.get("shortest_edge")
        return (size["height"], size["width"]) if both else None if short is None else (short, short), both
    return (size[0], size[1]) if isinstance(size, list) else (size, size), True


# ---- ViT, DeiT, DINOv2 ----------------------------------------------------------------------------------------------

VIT_NAMES: Names = (
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^(pooler\..*|embeddings\.mask_token)$", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)


def _vit(folder: Path, config: Section) -> Folder:
    kind = config("model_type", str)
    stored = read_weights(folder)
    tensors = current_names(fused(renamed(stored, VIT_NAMES)))
    options = _common(config)
    if "dist_token" in tensors and "head_dist.weight" not in tensors:  # no head reads the token
        tensors["reg_token"] = tensors.pop("dist_token")
        options["reg_tokens"] = 1
    options["distilled"] = "dist_token" in tensors
    if kind.startswith("dinov2"):
        options["init_values"] = 1.0
        if config("use_swiglu_ffn", bool, False):
            hidden = int(int(options["embed_dim"] * options["mlp_ratio"]) * 2 / 3)
            hidden = (hidden + 7) // 8 * 8
            options |= {"mlp_layer": "swiglu_packed", "mlp_ratio": _ratio(hidden, options["embed_dim"])}
        registers = config("num_register_tokens", Count, 0) if "registers" in kind else 0
        options |= {"reg_tokens": registers, "no_embed_class": registers > 0}
        if "head.weight" in tensors:
            options["global_pool"] = "cat"
    options["num_classes"], names = classes_of(config, tensors)
    any_size = kind.startswith("dinov2")
    preprocessing, notes = _preprocessing(folder, options["img_size"], shortest=any_size, any_size=any_size)
    grid = None
    if any_size:  # the library uses the processor's size, and the position embeddings may have another
        grid = build(options, num_classes=0).grid
        options["img_size"] = list(preprocessing.size)
    if any(re.match(r"(\w+\.)?pooler\.", name) for name in stored):
        notes += (f"{folder}: left out of its weights: pooler; the outputs are the features that it reads",)
    antialias = "registers" in kind
    return Folder(options, preprocessing, tensors, names, grid=grid, antialias=antialias, notes=notes)


# ---- AST ------------------------------------------------------------------------------------------------------------

AST_NAMES: Names = (
    (r"^audio_spectrogram_transformer\.", ""),
    (r"^embeddings\.distillation_token$", "reg_token"),
    (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.(q|k|v)_proj\.", lambda m: f".attn.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"^classifier\.layernorm\.", "fc_norm."),
    (r"^classifier\.dense\.", "head."),
    *VIT_NAMES,
)
AST = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 16, "frequency_stride": 10, "time_stride": 10}
AST |= {"num_mel_bins": 128, "max_length": 1024}
LOG_RANGE = (-16.0, 16.0)  # of log energies: they are above -15.95, and below 16 at full scale


def _ast(folder: Path, config: Section) -> Folder:
    """The Audio Spectrogram Transformer (Gong et al., Interspeech 2021).

    Its head reads the mean of the two tokens before the patches, with a norm before and after. Patches overlap. Rows
    of its images are frequencies.
    """
    tensors = current_names(fused(renamed(read_weights(folder), AST_NAMES)))
    config = Section(config.where, {**AST, **config.content})
    size = [config("num_mel_bins", Whole), config("max_length", Whole)]
    count, names = classes_of(config, tensors)
    options = _blocks(config) | {
        "img_size": size,
        "num_classes": count,
        "stride": [config("frequency_stride", Whole), config("time_stride", Whole)],
        "in_chans": 1,
        "reg_tokens": 1,
        "global_pool": "prefix",
    }
    return Folder(options, _sound(folder, size), tensors, names)


def _sound(folder: Path, size: list[int]) -> Preprocessing:
    """AST's preprocessing. Its features are log energies, and 0 after the end of a recording."""
    section = _processor(folder)
    section.only("feature_size", 1)
    for key, value in zip(("num_mel_bins", "max_length"), size, strict=True):
        section.only(key, value)
    rate = section("sampling_rate", Whole, 16_000)
    window = rate * 25 // 1000
    low, high = LOG_RANGE
    mean, deviation = 0.0, 0.5
    if section("do_normalize", bool, True):
        mean, deviation = section("mean", float, -4.2677393), section("std", float, 4.5689974)
    audio = {"window": window, "hop": rate // 100, "fft": 2 ** max(1, (window - 1).bit_length())}
    audio |= {"sampling_rate": rate, "floor": low, "ceiling": high, "padding": -low / (high - low)}
    scaled = {"mean": [(mean - low) / (high - low)], "std": [2 * deviation / (high - low)]}  # it divides by 2 std
    return Preprocessing.from_dict({"size": size, **scaled, "audio": audio})


# ---- CLIP and SigLIP ------------------------------------------------------------------------------------------------

# Of both towers, after "vision_model." or "text_model.".
TOWER_NAMES: Names = (
    (r"^embeddings\.position_ids$", ""),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.token_embedding\.weight$", "token_embedding"),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.(q|k|v)_proj\.", lambda m: f".attn.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(post_layernorm|final_layer_norm)\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)


def _tower(tensors: Tensors, prefix: str, names: Names = TOWER_NAMES) -> Tensors:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return fused(renamed(own, names))


def _image_tower(tensors: Tensors, prefix: str, folder: Path, names: Names = TOWER_NAMES) -> Tensors:
    """A tower whose positions and class token, if any, have the shape [1, N, D]."""
    tower = _tower(tensors, prefix, names)
    tower["pos_embed"] = _needed(tower, "positional_embedding", folder)
    del tower["positional_embedding"]
    for name in {"pos_embed", "cls_token"} & tower.keys():
        tower[name] = tower[name].reshape(1, -1, tower[name].shape[-1] if tower[name].ndim else 1)
    return tower


def _head(weight: np.ndarray) -> Tensors:
    """A projection [E, D] as a head, with a bias of zeros."""
    return {"head.weight": weight, "head.bias": np.zeros(weight.shape[:1], np.float32)}


def _needed(tensors: Tensors, name: str, folder: Path) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"the weights of {folder} lack {name!r}")
    return tensors[name]


def _scalar(tensors: Tensors, name: str, folder: Path) -> float:
    value = np.asarray(_needed(tensors, name, folder), np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        raise InputError(f"{name!r} in the weights of {folder} must be one finite number")
    return float(value.reshape(()))


def _scale(tensors: Tensors, folder: Path) -> float:
    """The factor of cosines. The weights have its logarithm."""
    logarithm = _scalar(tensors, "logit_scale", folder)
    if logarithm > 50:
        raise InputError(f"'logit_scale' in the weights of {folder} must be at most 50, got {logarithm:g}")
    return math.exp(logarithm)


def require_heads(section: Section, width: int, heads: int) -> None:
    """InputError if the number of heads does not divide the width."""
    if width % heads:
        raise InputError(f"{section.where}: the width {width} must be a multiple of the number of heads, {heads}")


def _tokenizer(folder: Path, context: int, **options: Any) -> Tokenizer:
    names = TOKENIZER[:1] if present(folder, TOKENIZER[0]) else TOKENIZER[1:]
    files = tuple(folder / name for name in names)
    if not all(present(folder, name) for name in names):
        return Tokenizer(files, (), context, problem=f"{folder} has no {TOKENIZER[0]} for its prompts", **options)
    contents = tuple(read_text(file, what="tokenizer") for file in files)
    return Tokenizer(files, contents, context, **options)


def _text(section: Section, tensors: Tensors, folder: Path, output: int, causal: bool) -> tuple[TextEncoder, Any]:
    end = section("eos_token_id", Count, None) if causal else None
    require_heads(section, section("hidden_size", Whole), section("num_attention_heads", Whole))
    module = TextEncoder(
        vocabulary=section("vocab_size", Whole),
        context=section("max_position_embeddings", Whole),
        width=section("hidden_size", Whole),
        depth=section("num_hidden_layers", Depth),
        num_heads=section("num_attention_heads", Whole),
        mlp_hidden=section("intermediate_size", Whole),
        output=output,
        causal=causal,
        end=None if end == 2 else end,  # 2 is a known error in configs: the library then uses the highest id
        activation=activation_of(section),
        norm_eps=section("layer_norm_eps", float),
    )
    return module, to_params(module, tensors, f"the text tower of {folder}")


CLIP_TEXT = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
CLIP_TEXT |= dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
CLIP_TEXT |= dict(num_attention_heads=8, max_position_embeddings=77)
CLIP_VISION = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "hidden_size": 768, "intermediate_size": 3072}
CLIP_VISION |= dict(num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32)
SIGLIP_TEXT = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vocab_size": 32000, "hidden_size": 768}
SIGLIP_TEXT |= dict(intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=64)
SIGLIP_VISION = {**CLIP_VISION, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16}


def _with_defaults(config: Section, key: str, defaults: Mapping[str, Any]) -> Section:
    """A section, from which the library leaves out defaults."""
    found = config.section(key)
    return Section(found.where, {**defaults, **found.content})


def _clip(folder: Path, config: Section) -> Folder:
    tensors = read_weights(folder)
    vision = _with_defaults(config, "vision_config", CLIP_VISION)
    text = _with_defaults(config, "text_config", CLIP_TEXT)
    image = _image_tower(tensors, "vision_model.", folder)
    image |= _head(_needed(tensors, "visual_projection.weight", folder))
    output = len(image["head.weight"])
    words = _tower(tensors, "text_model.") | _head(_needed(tensors, "text_projection.weight", folder))
    module, params = _text(text, words, folder, output, True)
    tower = TextTower(module, params, _tokenizer(folder, module.context), _scale(tensors, folder))
    options = _common(vision) | {"pre_norm": True, "num_classes": output}
    photos, notes = _preprocessing(folder, options["img_size"], shortest=True)
    return Folder(options, photos, image, None, tower, antialias=False, notes=notes)


def _siglip(folder: Path, config: Section) -> Folder:
    tensors = read_weights(folder)
    vision = _with_defaults(config, "vision_config", SIGLIP_VISION)
    vision.only("vision_use_head", True)
    image = _image_tower(tensors, "vision_model.", folder)
    for name in ("weight", "bias"):
        joined = np.atleast_1d(image.pop(f"attn_pool.in_proj.{name}", np.zeros(0)))
        image[f"attn_pool.q.{name}"], image[f"attn_pool.kv.{name}"] = np.split(joined, [len(joined) // 3])
    text = _with_defaults(config, "text_config", SIGLIP_TEXT)
    output = text("projection_size", Whole, text("hidden_size", Whole))
    module, params = _text(text, _tower(tensors, "text_model."), folder, output, False)
    tokenizer = _tokenizer(folder, module.context, pad=text("pad_token_id", Count, 1), canonical=True)
    scale, bias = _scale(tensors, folder), _scalar(tensors, "logit_bias", folder)
    options = _common(vision) | {"class_token": False, "global_pool": "map", "num_classes": 0}
    photos, notes = _preprocessing(folder, options["img_size"])
    tower = TextTower(module, params, tokenizer, scale, bias)
    return Folder(options, photos, image, None, tower, antialias=False, notes=notes)


PHOTOS = {"ForImageClassification": True, "Model": False}
# Model type -> its reader, the prefix of its architectures, and their suffixes with whether they have a classifier.
HUGGING_FACE: dict[str, tuple[Callable[[Path, Section], Folder], str, Mapping[str, bool]]] = {
    "vit": (_vit, "ViT", PHOTOS),
    "deit": (_vit, "DeiT", PHOTOS | {"ForImageClassificationWithTeacher": True}),
    "dinov2": (_vit, "Dinov2", PHOTOS),
    "dinov2_with_registers": (_vit, "Dinov2WithRegisters", PHOTOS),
    "audio-spectrogram-transformer": (_ast, "AST", {"ForAudioClassification": True, "Model": False}),
    "clip": (_clip, "CLIP", {"Model": False}),
    "siglip": (_siglip, "Siglip", {"Model": False}),
}


# ---- OpenCLIP -------------------------------------------------------------------------------------------------------

OPEN_CLIP_NAMES: Names = (
    (r"^class_embedding$", "cls_token"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^(ln_post|ln_final)\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.weight$", "token_embedding"),
    (r"^(visual\..*|text_projection|logit_scale|logit_bias|attn_mask|proj)$", ""),
)


# Keys that change the forward pass, with the only supported value. Other keys are for training.
OPEN_CLIP_VISION = {"ls_init_value": None, "attentional_pool": False, "no_ln_pre": False, "pool_type": "tok"}
OPEN_CLIP_VISION |= {"pos_embed_type": "learnable", "final_ln_after_pool": False, "act_kwargs": None}
OPEN_CLIP_VISION |= {"norm_kwargs": None}
OPEN_CLIP_TEXT = {"ls_init_value": None, "embed_cls": False, "pad_id": 0, "no_causal_mask": False}
OPEN_CLIP_TEXT |= {"final_ln_after_pool": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear"}
OPEN_CLIP_TEXT |= {"act_kwargs": None, "norm_kwargs": None}


def _open_clip(folder: Path) -> Folder:
    file = read_section(folder / OPEN_CLIP, "model")
    model, photos = file.section("model_cfg"), file.section("preprocess_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    for key in ("timm_model_name", "hf_model_name"):
        for section in (vision, text):
            if section.content.get(key):
                raise InputError(f"{section.where}: {key!r}: only OpenCLIP's towers are supported")
    for section, usual in ((vision, OPEN_CLIP_VISION), (text, OPEN_CLIP_TEXT)):
        for key, value in usual.items():
            section.only(key, value)
    require_heads(text, text("width", Whole), text("heads", Whole))
    tensors = read_weights(folder, OPEN_CLIP_WEIGHTS)
    output, width = model("embed_dim", Whole), vision("width", Whole)
    activation = "quick_gelu" if model("quick_gelu", bool, False) else "gelu"
    size, ratio = vision("image_size", Side), vision("mlp_ratio", Ratio, 4.0)
    options: Config = {
        "img_size": size, "patch_size": vision("patch_size", Whole), "embed_dim": width, "mlp_ratio": ratio,
        "depth": vision("layers", Depth), "num_heads": width // vision("head_width", Whole, 64),
        "pre_norm": True, "norm_eps": 1e-5, "activation": activation, "num_classes": output,
    }  # fmt: skip
    image = _image_tower(tensors, "visual.", folder, OPEN_CLIP_NAMES)
    image |= _head(_needed(tensors, "visual.proj", folder).T)
    words = renamed(tensors, OPEN_CLIP_NAMES) | _head(_needed(tensors, "text_projection", folder).T)
    module = TextEncoder(
        vocabulary=text("vocab_size", Whole),
        context=text("context_length", Whole, 77),
        width=text("width", Whole),
        depth=text("layers", Depth),
        num_heads=text("heads", Whole),
        mlp_hidden=int(text("width", Whole) * text("mlp_ratio", Ratio, 4.0)),
        output=output,
        causal=True,
        activation=activation,
    )
    params = to_params(module, words, f"the text tower of {folder}")
    bias = _scalar(tensors, "logit_bias", folder) if "logit_bias" in tensors else 0.0
    tokenizer = _tokenizer(folder, module.context, pad=0)
    tower = TextTower(module, params, tokenizer, _scale(tensors, folder), bias)
    fields = {"size": [size, size], "mean": photos("mean", list[float]), "std": photos("std", list[float])}
    fields |= {"crop_pct": 1.0, "interpolation": photos("interpolation", str, "bicubic")}
    if photos("resize_mode", Literal["shortest", "squash"], "shortest") == "squash":
        fields["crop_mode"] = "squash"
    return Folder(options, Preprocessing.from_dict(fields), image, None, tower)


# ---- timm -----------------------------------------------------------------------------------------------------------


def _timm(folder: Path, card: Section) -> Folder:
    """A folder that timm uploaded, with `architecture`, `pretrained_cfg` and perhaps `model_args`."""
    try:
        base, pretrained = card.content["architecture"], card.content["pretrained_cfg"]
        overrides = dict(card.content.get("model_args") or {})
        if "num_classes" in card.content:
            overrides["num_classes"] = card.content["num_classes"]
        tag = pretrained.get("tag") or ""
        config, preprocessing = architecture(f"{base}.{tag}", **overrides)
        if "img_size" not in overrides and "input_size" in pretrained:
            config["img_size"] = list(pretrained["input_size"][1:])
        fields = {key: pretrained[key] for key in PRETRAINED if key in pretrained}
        size = build(config).img_size
        preprocessing = Preprocessing.from_dict({**preprocessing.to_dict(), **fields, "size": list(size)})
    except InputError as error:
        raise InputError(f"{card.where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{card.where} is not of a timm model ({type(error).__name__}: {error})") from None
    labels = card.content.get("label_names")
    names = list(map(str, labels)) if isinstance(labels, list) else None
    return Folder(config, preprocessing, current_names(read_weights(folder)), names, of_timm=True)


PRETRAINED = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
