"""Folders of vision-language models in Hugging Face's layout, PaliGemma (1 and 2) and Gemma 3, for `load`."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.prompts import IMAGE, PROMPT, WRITTEN, PromptReader
from tokentm_jax.inputs.texts import WordPieces
from tokentm_jax.models import folders
from tokentm_jax.models.architectures import build
from tokentm_jax.models.decoder import recast
from tokentm_jax.models.decoder_layouts import decoder, ends_of, of_decoder
from tokentm_jax.models.folders import CONFIG, VISION, Count, Section, Whole
from tokentm_jax.models.layouts import image_tower, vision_options
from tokentm_jax.models.names import Tensors
from tokentm_jax.models.params import to_params
from tokentm_jax.models.vision_decoder import VisionDecoder

# What configs of texts leave out, as in the library.
_GEMMA = {"num_attention_heads": 8, "head_dim": 256, "rms_norm_eps": 1e-6}
USUAL: dict[str, dict[str, Any]] = {
    "gemma": _GEMMA | {"vocab_size": 257152, "max_position_embeddings": 8192},
    "gemma2": _GEMMA | {"vocab_size": 257152, "max_position_embeddings": 8192, "num_key_value_heads": 4},
    "gemma3_text": _GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072, "num_key_value_heads": 4},
}
TEXTS = {"paligemma": ("gemma", "gemma2"), "gemma3": ("gemma3_text",)}


def read_vision_folder(folder: Path) -> tuple[VisionDecoder, dict[str, Any], PromptReader]:
    """A folder's module, its parameters, and the reader of its prompts. Raises InputError."""
    config = folders.read_section(folder / CONFIG, "model")
    kind = folders.type_of(config, VISION)
    folders.architecture_of(config, VISION, {"ForConditionalGeneration": False})
    stored = _parts(folders.read_weights(folder), folder)
    words = config.section("text_config")
    own = words("model_type", str, TEXTS[kind][0])
    if own not in TEXTS[kind]:
        raise InputError(f"{words.where}: 'model_type' must be {' or '.join(TEXTS[kind])}, got {own!r:.80}")
    tied = {"tie_word_embeddings": config.content.get("tie_word_embeddings", True)}
    known = {key: value for key, value in words.content.items() if value is not None}
    if kind == "paligemma":  # of the prompt, which `together` is about
        known.pop("use_bidirectional_attention", None)
    words = Section(words.where, USUAL[own] | tied | known)
    ends = ends_of(folder, config, words)
    text, params = decoder(words, own, of_decoder(stored["text"], own, str(folder)), ends, str(folder))
    options = vision_options(config.section("vision_config"), "siglip_vision")
    options |= {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    vision = build(options)
    tower = image_tower(stored["vision"], "vision_model.", folder)
    tower = {name: tensor for name, tensor in tower.items() if not name.startswith("attn_pool.")}
    params["vision"] = to_params(vision, tower, f"the vision tower of {folder}")
    gh, gw = vision.grid
    count = gh * gw
    if kind == "gemma3":
        count = config("mm_tokens_per_image", Whole, 256)
        pool = round((gh * gw / count) ** 0.5)
        if gh != gw or gh % pool or (gh // pool) ** 2 != count:
            raise InputError(f"{config.where}: 'mm_tokens_per_image' must be a square that divides the patches' grid")
        options = {"pool": pool, "project_norm": vision.norm_eps, "project_bias": False, "together": (IMAGE,)}
        scale = 1 + np.asarray(_one(stored["project"], "mm_soft_emb_norm.weight", folder), np.float32)
        params |= {"norm_project": {"scale": scale}}
        kernel = _one(stored["project"], "mm_input_projection_weight", folder)
        params["project"] = {"kernel": np.asarray(kernel, np.float32)}
    else:
        options = {"together": (IMAGE, PROMPT)}
        kernel, bias = (_one(stored["project"], f"linear.{name}", folder) for name in ("weight", "bias"))
        params["project"] = {"kernel": np.asarray(kernel, np.float32).T, "bias": np.asarray(bias, np.float32)}
    module = recast(text, VisionDecoder, **options, vision=vision)
    own, width = vision.embed_dim, module.embed_dim
    wanted = {"kernel": (own, width), "bias": (width,), "scale": (own,)}
    for name, array in {**params["project"], **params.get("norm_project", {})}.items():
        if array.shape != wanted[name]:
            shapes = f"{list(array.shape)} instead of {list(wanted[name])}"
            raise InputError(f"the projection of images of {folder} does not fit the model: its {name} is {shapes}")
    return module, params, _reader(folder, config, kind, module, count)


def _parts(stored: Tensors, folder: Path) -> dict[str, Tensors]:
    """The tensors of the decoder, under the names of a decoder's folder, of the tower and of the projection."""
    parts: dict[str, Tensors] = {"text": {}, "vision": {}, "project": {}}
    for name, tensor in stored.items():
        short = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
        short = re.sub(r"^(language_model\.)?lm_head\.", "text.lm_head.", short)
        short = re.sub(r"^language_model\.(model\.)?", "text.model.", short)
        short = re.sub(r"^vision_tower\.(vision_model\.)?", "vision.vision_model.", short)
        short = re.sub(r"^multi_modal_projector\.", "project.", short)
        part, _, rest = short.partition(".")
        if part not in parts:
            raise InputError(
                f"the weights of {folder} hold {name!r:.80}, which is of no vision-language model known here"
            )
        parts[part][rest] = tensor
    return parts


def _one(tensors: Tensors, name: str, folder: Path) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"the weights of {folder} lack 'multi_modal_projector.{name}'")
    if not np.isfinite(np.asarray(tensors[name], np.float32)).all():
        raise InputError(f"'multi_modal_projector.{name}' of {folder} has values that are not finite numbers")
    return tensors[name]


def _reader(folder: Path, config: Section, kind: str, module: VisionDecoder, count: int) -> PromptReader:
    """How prompts become tokens: as in the library's processors, with one image each."""
    pieces = WordPieces.from_folder(folder, module.max_length)
    pictures, _ = folders.preprocessing_of(folder, module.vision.img_size)
    image = config("image_token_index", Count, config("image_token_id", Count, None))
    if image is None:
        raise InputError(f"{config.where} lacks 'image_token_index'")
    vocabulary = max(module.vocab_size, image + 1)
    reader = PromptReader(pieces.file, pieces.content, pieces.length, vocabulary, types=len((WRITTEN, IMAGE, PROMPT)))
    reader = dataclasses.replace(reader, pictures=pictures, image=image, patches=count, begin="<bos>")
    if kind == "paligemma":  # the image, <bos>, the prompt, a line's end
        return dataclasses.replace(reader, begin="", between="<bos>", after="\n")
    start, end = (
        dataclasses.replace(reader, image=config(f"{name}_token_index", Count)).token_name for name in ("boi", "eoi")
    )
    return dataclasses.replace(reader, before=f"\n\n{start}", between=f"{end}\n\n", start=start)
