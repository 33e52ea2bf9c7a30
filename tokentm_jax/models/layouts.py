"""Folders of models in the layouts of other libraries: timm's, Hugging Face's and OpenCLIP's, all under timm's names.

A folder has a `config.json` (or `open_clip_config.json`) and weights in safetensors. A layout is a table of names and
a function from its config to the options of `build`; what it says and this project cannot compute is one InputError.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
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
OPEN_CLIP_WEIGHTS = WEIGHTS[::-1]  # a folder may hold the other library's, too
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
OTHERS = ("preprocessor_config.json", *TOKENIZER)
LARGEST_SHARDS = 1000
TEXT = {  # of `text_layouts`: model type -> how names of its architectures begin
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
    "distilbert": "DistilBert", "electra": "Electra",
}  # fmt: skip

Names = Sequence[tuple[str, Any]]  # patterns of names, and what to put in their place
Whole = Annotated[int, Ge(1), Le(2**31 - 1)]
Count = Annotated[int, Ge(0), Le(2**31 - 1)]  # or the number of one of them
Depth = Annotated[int, Ge(1), Le(1000)]
Side = Annotated[int, Ge(1), Le(2**16)]
Sides = Side | Annotated[list[Side], Len(2, 2)]  # one for both, or (height, width)
Ratio = Annotated[float, Gt(0), Le(1000)]


class Folder(NamedTuple):
    """A model as it is stored, in a folder or a file, under timm's names."""

    config: Config
    preprocessing: Preprocessing
    tensors: Tensors
    class_names: list[str] | None
    text: TextTower | None = None
    of_timm: bool = False  # one of timm's own: its 1000 classes are ImageNet-1k's unless it names others
    grid: tuple[int, int] | None = None  # of its position embeddings; None: that of `config`
    antialias: bool = True  # whether the library resamples position embeddings so
    notes: tuple[str, ...] = ()  # what differs from what the folder describes, for whoever loads it


class Section:
    """A part of a JSON file, whose values are checked where they are read."""

    def __init__(self, where: str, content: Any) -> None:
        if not isinstance(content, Mapping):
            raise InputError(f"{where} must be an object")
        self.where, self.content = where, content

    def __call__(self, key: str, kind: Any, *default: Any) -> Any:
        """The value of `key`, in the type `kind`. InputError for another, and for one that is missing and needed."""
        if key not in self.content or (self.content[key] is None and default):
            if not default:
                raise InputError(f"{self.where} lacks {key!r}")
            return default[0]
        return checked(f"{self.where}: {key!r}", kind, self.content[key])

    def section(self, key: str) -> "Section":
        return Section(f"{self.where}: {key!r}", self.content.get(key, {}))

    def only(self, key: str, value: Any) -> None:
        """InputError for a value of `key` that is not the one that is supported."""
        if self.content.get(key, value) != value:
            raise InputError(f"{self.where}: {key!r} must be {value!r}: nothing else is supported")


def present(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of this name, which may be something that cannot be read."""
    return os.path.lexists(folder / name)


def architecture_of(config: Section, families: Mapping[str, str], known: Mapping[str, bool]) -> bool | None:
    """Whether the architecture that a config names has a classifier; None where it names none.

    `families` are the beginnings of the names, `known` their ends with the answer. Raises InputError for another.
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
    """Whether a path is a folder that says which model it holds."""
    return any(os.path.lexists(os.path.join(path, name)) for name in (CONFIG, OPEN_CLIP))


def is_text_folder(folder: Path) -> bool:
    """Whether a folder holds a model of texts, see `text_layouts`."""
    if not present(folder, CONFIG) or present(folder, OPEN_CLIP):
        return False
    content = read_json(folder / CONFIG, what="model")
    return isinstance(content, dict) and "pretrained_cfg" not in content and content.get("model_type") in tuple(TEXT)


def read_folder(folder: Path) -> Folder:
    """A folder of timm, Hugging Face or OpenCLIP. InputError for what is none, or is not supported, or is damaged."""
    if present(folder, OPEN_CLIP):
        return _open_clip(folder)
    if not present(folder, CONFIG):
        raise InputError(f"{folder} holds no model: expected {CONFIG} or {OPEN_CLIP} beside the weights")
    config = Section(str(folder / CONFIG), read_json(folder / CONFIG, what="model"))
    if "pretrained_cfg" in config.content:
        return _timm(folder, config)
    kind = config("model_type", str)
    if kind not in HUGGING_FACE:
        known = ", ".join(HUGGING_FACE)
        raise InputError(f"{config.where}: the model type {kind!r} is not supported; known: {known}")
    read, family, architectures = HUGGING_FACE[kind]
    classifies = architecture_of(config, {kind: family}, architectures)
    found = read(folder, config)
    if classifies and "head.weight" not in found.tensors:
        raise InputError(f"the weights of {folder} lack the classifier of {config.content['architectures'][0]}")
    return found


def read_weights(folder: Path, names: Sequence[str] = WEIGHTS) -> Tensors:
    """The tensors of a folder, of one file (the first of the names, or any if there is no other) or of the shards that
    an index lists. InputError as for a checkpoint."""
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
    """The files of weights that the index of a folder names. InputError for one that is not in this folder."""
    index = Section(str(folder / INDEX), read_json(folder / INDEX, what="index"))
    files = sorted(set(index("weight_map", dict[str, str]).values()))
    if len(files) > LARGEST_SHARDS or any(PurePosixPath(name).name != name or name in ("", "..") for name in files):
        raise InputError(f"{index.where}: 'weight_map' must name files of this folder")
    return files


def renamed(tensors: Tensors, names: Names) -> Tensors:
    """Every tensor under its new name; those whose name becomes empty are left out."""
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
    """The ratio that gives so many hidden channels, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _activation(section: Section) -> str:
    known = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    name = section("hidden_act", str, "gelu")
    if name not in known:
        raise InputError(f"{section.where}: 'hidden_act' must be one of {', '.join(known)}, got {name!r:.80}")
    return known[name]


def _common(section: Section) -> Config:
    """Options that all vision configs of Hugging Face say in the same words."""
    section.only("num_channels", 3)
    return {"img_size": section("image_size", Sides), **_blocks(section)}


def _blocks(section: Section) -> Config:
    """Those that do not depend on what the images are."""
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
        "activation": _activation(section),
    }


def labels_of(config: Section) -> list[str] | None:
    """Names of the classes, unless they are the ones that nobody gave."""
    names = config("id2label", dict[str, str], {})
    listed = [names.get(str(i)) for i in range(len(names))]
    if not names or None in listed or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in listed):
        return None
    return [str(name) for name in listed]


RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _preprocessing(
    folder: Path, size: Any, shortest: bool = False, any_size: bool = False
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Of `preprocessor_config.json`, for a model of that size, or with `any_size` of the size that it cuts photos to;
    and a note where the two differ.

    A plain number as 'size' is the short side's (`shortest`, as processors of CLIP and DINOv2 have it), or both
    sides'.
    """
    file = folder / "preprocessor_config.json"
    if not present(folder, file.name):
        raise InputError(f"{folder} lacks preprocessor_config.json, which says how photos become the model's input")
    section = Section(str(file), read_json(file, what="preprocessing"))
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


def _sides(size: int | list[int] | dict[str, int]) -> tuple[tuple[int, int] | None, bool]:
    """(height, width) of a processor's size, where both are the short side's if only that is given; and whether both
    are given."""
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
    if "dist_token" in tensors and "head_dist.weight" not in tensors:  # a token that no head reads
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
    found = _classifier(folder, config, options, tensors)
    if kind.startswith("dinov2"):
        found = _at_the_processors_size(found)
    pooler = any(re.match(r"(\w+\.)?pooler\.", name) for name in stored)
    note = f"{folder}: left out of its weights: pooler; the outputs are the features that it reads"
    return found._replace(antialias="registers" in kind, notes=found.notes + (note,) * pooler)


def _at_the_processors_size(found: Folder) -> Folder:
    """DINOv2 takes photos of any size, and the library those of the processor: its position embeddings may be of
    another."""
    grid = build(found.config, num_classes=0).grid
    return found._replace(config=found.config | {"img_size": list(found.preprocessing.size)}, grid=grid)


def _classifier(
    folder: Path, config: Section, options: Config, tensors: Tensors, preprocessing: Preprocessing | None = None
) -> Folder:
    head = tensors.get("head.weight")
    options["num_classes"] = head.shape[0] if head is not None and head.ndim else 0
    names = labels_of(config) if options["num_classes"] else None
    if names is not None and len(names) != options["num_classes"]:
        raise InputError(f"{config.where}: 'id2label' names {len(names)} classes of {options['num_classes']}")
    notes: tuple[str, ...] = ()
    if preprocessing is None:
        any_size = config("model_type", str).startswith("dinov2")
        preprocessing, notes = _preprocessing(folder, options["img_size"], shortest=any_size, any_size=any_size)
    return Folder(options, preprocessing, tensors, names, notes=notes)


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
LOG_RANGE = (-16.0, 16.0)  # of log energies, which are above -15.95, and below 16 for waves of full scale


def _ast(folder: Path, config: Section) -> Folder:
    """The Audio Spectrogram Transformer (Gong et al., Interspeech 2021): two tokens before the patches, whose mean is
    read, with a norm before and after; patches overlap. Rows of its images are frequencies."""
    tensors = current_names(fused(renamed(read_weights(folder), AST_NAMES)))
    config = Section(config.where, {**AST, **config.content})
    size = [config("num_mel_bins", Whole), config("max_length", Whole)]
    options = _blocks(config) | {
        "img_size": size,
        "stride": [config("frequency_stride", Whole), config("time_stride", Whole)],
        "in_chans": 1,
        "reg_tokens": 1,
        "global_pool": "prefix",
    }
    return _classifier(folder, config, options, tensors, _sound(folder, size))


def _sound(folder: Path, size: list[int]) -> Preprocessing:
    """Of AST's `preprocessor_config.json`. What it calls features are log energies, and 0 where a recording ended."""
    file = folder / "preprocessor_config.json"
    if not present(folder, file.name):
        raise InputError(f"{folder} lacks {file.name}, which says how recordings become the model's input")
    section = Section(str(file), read_json(file, what="preprocessing"))
    section.only("feature_size", 1)
    for key, value in zip(("num_mel_bins", "max_length"), size, strict=True):
        section.only(key, value)
    rate = section("sampling_rate", Whole, 16_000)
    window = rate * 25 // 1000
    low, high = LOG_RANGE
    mean, deviation = 0.0, 0.5
    if section("do_normalize", bool, True):
        mean, deviation = section("mean", float, -4.2677393), section("std", float, 4.5689974)
    where = {"window": window, "hop": rate // 100, "fft": 2 ** max(1, (window - 1).bit_length())}
    return Preprocessing.from_dict(
        {
            "size": size,
            "mean": [(mean - low) / (high - low)],
            "std": [2 * deviation / (high - low)],  # it divides by twice the deviation
            "audio": {
                **where,
                "sampling_rate": rate,
                "floor": low,
                "ceiling": high,
                "padding": -low / (high - low),
            },
        }
    )


# ---- CLIP and SigLIP ------------------------------------------------------------------------------------------------

# Of both towers, after "vision_model." or "text_model.".
TOWER_NAMES: Names = (
    (r"^embeddings\.position_ids$", ""),
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
)  # fmt: skip


def _tower(tensors: Tensors, prefix: str, names: Names = TOWER_NAMES) -> Tensors:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return fused(renamed(own, names))


def _head(weight: np.ndarray) -> Tensors:
    """A projection [E, D] as the head that it is here, with a bias of zeros."""
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
    """The factor of cosines, whose logarithm the weights hold."""
    logarithm = _scalar(tensors, "logit_scale", folder)
    if logarithm > 50:
        raise InputError(f"'logit_scale' in the weights of {folder} must be at most 50, got {logarithm:g}")
    return math.exp(logarithm)


def require_heads(section: Section, width: int, heads: int) -> None:
    """InputError where heads do not divide the width of a tower that a config describes."""
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
        end=None if end == 2 else end,  # a config that was never put right: the library takes the highest id
        activation=_activation(section),
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
    """A section in which the library leaves out what is as usual."""
    found = config.section(key)
    return Section(found.where, {**defaults, **found.content})


def _clip(folder: Path, config: Section) -> Folder:
    tensors = read_weights(folder)
    vision = _with_defaults(config, "vision_config", CLIP_VISION)
    text = _with_defaults(config, "text_config", CLIP_TEXT)
    image = _tower(tensors, "vision_model.")
    image |= {"pos_embed": _positions(image, folder), "cls_token": _row(image, "cls_token", folder)}
    image |= _head(_needed(tensors, "visual_projection.weight", folder))
    output = len(image["head.weight"])
    words = _tower(tensors, "text_model.")
    words["positional_embedding"] = words.pop("embeddings.position_embedding.weight", np.zeros(0))
    module, params = _text(
        text, words | _head(_needed(tensors, "text_projection.weight", folder)), folder, output, True
    )
    tower = TextTower(module, params, _tokenizer(folder, module.context), _scale(tensors, folder))
    options = _common(vision) | {"pre_norm": True, "num_classes": output}
    photos, notes = _preprocessing(folder, options["img_size"], shortest=True)
    return Folder(options, photos, image, None, tower, antialias=False, notes=notes)


def _positions(image: Tensors, folder: Path) -> np.ndarray:
    return _row({"w": image.pop("embeddings.position_embedding.weight", np.zeros(()))}, "w", folder)


def _row(tensors: Tensors, name: str, folder: Path) -> np.ndarray:
    """[D] or [N, D] -> [1, N, D]."""
    tensor = _needed(tensors, name, folder)
    return tensor.reshape(1, -1, tensor.shape[-1] if tensor.ndim else 1)


def _siglip(folder: Path, config: Section) -> Folder:
    tensors = read_weights(folder)
    vision = _with_defaults(config, "vision_config", SIGLIP_VISION)
    vision.only("vision_use_head", True)
    image = _tower(tensors, "vision_model.")
    image["pos_embed"] = _positions(image, folder)
    for name in ("weight", "bias"):
        joined = image.pop(f"attn_pool.in_proj.{name}", np.zeros(0))
        image |= {
            f"attn_pool.q.{name}": joined[: len(joined) // 3],
            f"attn_pool.kv.{name}": joined[len(joined) // 3 :],
        }
    words = _tower(tensors, "text_model.")
    words["positional_embedding"] = words.pop("embeddings.position_embedding.weight", np.zeros(0))
    text = _with_defaults(config, "text_config", SIGLIP_TEXT)
    module, params = _text(text, words, folder, text("projection_size", Whole, text("hidden_size", Whole)), False)
    tokenizer = _tokenizer(folder, module.context, pad=text("pad_token_id", Count, 1), canonical=True)
    scale, bias = _scale(tensors, folder), _scalar(tensors, "logit_bias", folder)
    options = _common(vision) | {"class_token": False, "global_pool": "map", "num_classes": 0}
    photos, notes = _preprocessing(folder, options["img_size"])
    tower = TextTower(module, params, tokenizer, scale, bias)
    return Folder(options, photos, image, None, tower, antialias=False, notes=notes)


PHOTOS = {"ForImageClassification": True, "Model": False}
# Model type -> its reader; how names of its architectures begin; how they end, with whether they have a classifier.
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


# What changes the forward pass and is not supported in another way; other keys are of training.
OPEN_CLIP_VISION = {"ls_init_value": None, "attentional_pool": False, "no_ln_pre": False, "pool_type": "tok"}
OPEN_CLIP_VISION |= {"pos_embed_type": "learnable", "final_ln_after_pool": False, "act_kwargs": None}
OPEN_CLIP_VISION |= {"norm_kwargs": None}
OPEN_CLIP_TEXT = {"ls_init_value": None, "embed_cls": False, "pad_id": 0, "no_causal_mask": False}
OPEN_CLIP_TEXT |= {"final_ln_after_pool": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear"}
OPEN_CLIP_TEXT |= {"act_kwargs": None, "norm_kwargs": None}


def _open_clip(folder: Path) -> Folder:
    file = Section(str(folder / OPEN_CLIP), read_json(folder / OPEN_CLIP, what="model"))
    model, photos = file.section("model_cfg"), file.section("preprocess_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    for key in ("timm_model_name", "hf_model_name"):
        for section in (vision, text):
            if section.content.get(key):
                raise InputError(f"{section.where}: {key!r}: only towers of OpenCLIP's own are supported")
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
    image = _tower(tensors, "visual.", OPEN_CLIP_NAMES)
    image["pos_embed"] = _row(image, "positional_embedding", folder)
    image["cls_token"] = _row(image, "cls_token", folder)
    del image["positional_embedding"]
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
    """A folder as timm uploads them: `architecture`, `pretrained_cfg` and perhaps `model_args`."""
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
        raise InputError(f"{card.where} is not a timm model's ({type(error).__name__}: {error})") from None
    labels = card.content.get("label_names")
    names = list(map(str, labels)) if isinstance(labels, list) else None
    return Folder(config, preprocessing, current_names(read_weights(folder)), names, of_timm=True)


PRETRAINED = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
