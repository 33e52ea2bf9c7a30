"""Folders of models in the layouts of timm, Hugging Face and OpenCLIP, translated to timm's names and options.

`layouts.toml` has the names of tensors and of the keys of a config. A config that this project cannot compute raises
InputError.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokentm_jax.errors import InputError
from tokentm_jax.files import read_text
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.models import folders
from tokentm_jax.models.architectures import Config, architecture, build
from tokentm_jax.models.folders import CONFIG, OPEN_CLIP, TOKENIZER, Count, Folder, Section, Side, Whole, fields_of
from tokentm_jax.models.names import LAYOUTS, Tensors, current_names, fused, renamed
from tokentm_jax.models.params import to_params
from tokentm_jax.models.text import TextEncoder, TextTower, Tokenizer


def read_folder(folder: Path) -> Folder:
    """A folder of timm, Hugging Face or OpenCLIP. InputError for another folder, or one that is damaged."""
    if folders.present(folder, OPEN_CLIP):
        return _open_clip(folder)
    if not folders.present(folder, CONFIG):
        raise InputError(f"{folder} has no model: expected {CONFIG} or {OPEN_CLIP} next to the weights")
    config = folders.read_section(folder / CONFIG, "model")
    if "pretrained_cfg" in config.content:
        return _timm(folder, config)
    kind = folders.type_of(config, HUGGING_FACE)
    read, family, architectures = HUGGING_FACE[kind]
    classifies = folders.architecture_of(config, {kind: family}, architectures)
    found = read(folder, config)
    if classifies:
        folders.require_classifier(folder, config, found.tensors)
    return found


def _ratio(hidden: int, width: int) -> float:
    """The ratio that gives exactly `hidden` channels after rounding down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _with_ratio(section: Section, options: Config) -> Config:
    """The options with a ratio instead of the number of hidden channels, if the config has that number."""
    hidden = options.pop("mlp_hidden", None) or section("intermediate_size", Whole, None)
    return options if hidden is None else options | {"mlp_ratio": _ratio(hidden, options["embed_dim"])}


def vision_options(section: Section, layout: str) -> Config:
    """Options of a model of photos."""
    section.only("num_channels", 3)
    return _with_ratio(section, fields_of(section, layout))


def _vit(folder: Path, config: Section) -> Folder:
    kind = config("model_type", str)
    stored = folders.read_weights(folder)
    tensors = current_names(renamed(stored, LAYOUTS["vit"]["names"]))
    options = vision_options(config, "vit")
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
    options["num_classes"], names = folders.classes_of(config, tensors)
    any_size = kind.startswith("dinov2")
    preprocessing, notes = folders.preprocessing_of(folder, options["img_size"], shortest=any_size, any_size=any_size)
    grid = None
    if any_size:  # the library uses the processor's size, and the position embeddings may have another
        grid = build(options, num_classes=0).grid
        options["img_size"] = list(preprocessing.size)
    if any(re.match(r"(\w+\.)?pooler\.", name) for name in stored):
        notes += (f"{folder}: left out of its weights: pooler; the outputs are the features that it reads",)
    return Folder(options, preprocessing, tensors, names, grid=grid, antialias="registers" in kind, notes=notes)


# ---- AST ------------------------------------------------------------------------------------------------------------


def _ast(folder: Path, config: Section) -> Folder:
    """The Audio Spectrogram Transformer (Gong et al., Interspeech 2021): patches overlap, and rows are frequencies."""
    names = [*LAYOUTS["ast"]["names"], *LAYOUTS["vit"]["names"]]
    tensors = current_names(renamed(folders.read_weights(folder), names))
    options = _with_ratio(config, fields_of(config, "ast"))
    bins, frames = config("num_mel_bins", Whole, 128), config("max_length", Whole, 1024)
    options["num_classes"], class_names = folders.classes_of(config, tensors)
    options |= {
        "img_size": [bins, frames],
        "stride": [config("frequency_stride", Whole, 10), config("time_stride", Whole, 10)],
        **{"in_chans": 1, "reg_tokens": 1, "global_pool": "prefix"},
    }
    return Folder(options, _sound(folder, bins, frames), tensors, class_names)


def _sound(folder: Path, bins: int, frames: int) -> Preprocessing:
    """AST's preprocessing. Its features are log energies, and 0 after the end of a recording."""
    section = folders.read_processor(folder)
    for key, value in (("feature_size", 1), ("num_mel_bins", bins), ("max_length", frames)):
        section.only(key, value)
    rate = section("sampling_rate", Whole, 16_000)
    window = rate * 25 // 1000
    low, high = -16.0, 16.0  # of log energies: they are above -15.95, and below 16 at full scale
    mean, deviation = 0.0, 0.5
    if section("do_normalize", bool, True):
        mean, deviation = section("mean", float, -4.2677393), section("std", float, 4.5689974)
    audio = {"window": window, "hop": rate // 100, "fft": 2 ** max(1, (window - 1).bit_length())}
    audio |= {"sampling_rate": rate, "floor": low, "ceiling": high, "padding": -low / (high - low)}
    scaled = {"mean": [(mean - low) / (high - low)], "std": [2 * deviation / (high - low)]}  # it divides by 2 std
    return Preprocessing.from_dict({"size": [bins, frames], **scaled, "audio": audio})


# ---- CLIP and SigLIP ------------------------------------------------------------------------------------------------


def _tower(tensors: Tensors, prefix: str, layout: str = "tower") -> Tensors:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return fused(renamed(own, LAYOUTS[layout]["names"]))


def image_tower(tensors: Tensors, prefix: str, folder: Path, layout: str = "tower") -> Tensors:
    """A tower whose positions and class token, if any, have the shape [1, N, D]."""
    tower = _tower(tensors, prefix, layout)
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


def _text_tower(
    section: Section, fields: Config, words: Tensors, tensors: Tensors, folder: Path, **tokenizer: Any
) -> TextTower:
    """The text tower with the weights `words`. The other tensors have the logarithm of its scale."""
    folders.require_heads(section, fields["width"], fields["num_heads"])
    module = TextEncoder(**fields)
    params = to_params(module, words, f"the text tower of {folder}")
    logarithm = _scalar(tensors, "logit_scale", folder)
    if logarithm > 50:
        raise InputError(f"'logit_scale' in the weights of {folder} must be at most 50, got {logarithm:g}")
    bias = _scalar(tensors, "logit_bias", folder) if "logit_bias" in tensors else 0.0
    return TextTower(module, params, _tokenizer(folder, module.context, **tokenizer), math.exp(logarithm), bias)


def _tokenizer(folder: Path, context: int, **options: Any) -> Tokenizer:
    names = TOKENIZER[:1] if folders.present(folder, TOKENIZER[0]) else TOKENIZER[1:]
    files = tuple(folder / name for name in names)
    if not all(folders.present(folder, name) for name in names):
        return Tokenizer(files, (), context, problem=f"{folder} has no {TOKENIZER[0]} for its prompts", **options)
    contents = tuple(read_text(file, what="tokenizer") for file in files)
    return Tokenizer(files, contents, context, **options)


def _clip(folder: Path, config: Section) -> Folder:
    tensors = folders.read_weights(folder)
    vision, text = config.section("vision_config"), config.section("text_config")
    image = image_tower(tensors, "vision_model.", folder)
    image |= _head(_needed(tensors, "visual_projection.weight", folder))
    words = _tower(tensors, "text_model.") | _head(_needed(tensors, "text_projection.weight", folder))
    output, end = len(image["head.weight"]), text("eos_token_id", Count, 49407)
    # The id 2 is a known error in configs: the library then uses the highest id.
    fields = fields_of(text, "clip_text") | {"output": output, "causal": True, "end": None if end == 2 else end}
    tower = _text_tower(text, fields, words, tensors, folder)
    options = vision_options(vision, "clip_vision") | {"pre_norm": True, "num_classes": output}
    photos, notes = folders.preprocessing_of(folder, options["img_size"], shortest=True)
    return Folder(options, photos, image, None, tower, antialias=False, notes=notes)


def _siglip(folder: Path, config: Section) -> Folder:
    tensors = folders.read_weights(folder)
    vision, text = config.section("vision_config"), config.section("text_config")
    vision.only("vision_use_head", True)
    image = image_tower(tensors, "vision_model.", folder)
    for name in ("weight", "bias"):
        joined = np.atleast_1d(image.pop(f"attn_pool.in_proj.{name}", np.zeros(0)))
        image[f"attn_pool.q.{name}"], image[f"attn_pool.kv.{name}"] = np.split(joined, [len(joined) // 3])
    _needed(tensors, "logit_bias", folder)
    fields = fields_of(text, "siglip_text")
    fields |= {"output": text("projection_size", Whole, fields["width"]), "causal": False}
    pad = text("pad_token_id", Count, 1)
    tower = _text_tower(text, fields, _tower(tensors, "text_model."), tensors, folder, pad=pad, canonical=True)
    options = vision_options(vision, "siglip_vision") | {"class_token": False, "global_pool": "map", "num_classes": 0}
    photos, notes = folders.preprocessing_of(folder, options["img_size"])
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


def _open_clip(folder: Path) -> Folder:
    file = folders.read_section(folder / OPEN_CLIP, "model")
    model, photos = file.section("model_cfg"), file.section("preprocess_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    for key in ("timm_model_name", "hf_model_name"):
        for section in (vision, text):
            if section.content.get(key):
                raise InputError(f"{section.where}: {key!r}: only OpenCLIP's towers are supported")
    for key in LAYOUTS["open_clip"]["unset"]:
        for section in (vision, text):
            section.only(key, None)
    output, size = model("embed_dim", Whole), vision("image_size", Side)
    activation = "quick_gelu" if model("quick_gelu", bool, False) else "gelu"
    options = fields_of(vision, "open_clip_vision") | {"img_size": size, "patch_size": vision("patch_size", Whole)}
    options["num_heads"] = options["embed_dim"] // vision("head_width", Whole, 64)
    options |= {"pre_norm": True, "norm_eps": 1e-5, "activation": activation, "num_classes": output}
    encoder = fields_of(text, "open_clip_text") | {"output": output, "causal": True, "activation": activation}
    encoder["mlp_hidden"] = int(encoder["width"] * encoder.pop("mlp_ratio"))
    tensors = folders.read_weights(folder, folders.OPEN_CLIP_WEIGHTS)
    image = image_tower(tensors, "visual.", folder, "open_clip")
    image |= _head(_needed(tensors, "visual.proj", folder).T)
    words = _tower(tensors, "", "open_clip") | _head(_needed(tensors, "text_projection", folder).T)
    tower = _text_tower(text, encoder, words, tensors, folder, pad=0)
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
        used = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
        fields = {key: pretrained[key] for key in used if key in pretrained}
        size = build(config).img_size
        preprocessing = Preprocessing.from_dict({**preprocessing.to_dict(), **fields, "size": list(size)})
    except InputError as error:
        raise InputError(f"{card.where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{card.where} is not of a timm model ({type(error).__name__}: {error})") from None
    labels = card.content.get("label_names")
    names = list(map(str, labels)) if isinstance(labels, list) else None
    return Folder(config, preprocessing, current_names(folders.read_weights(folder)), names, of_timm=True)
