"""Folders of models: a `config.json` (or `open_clip_config.json`), weights in safetensors, and other JSON files."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le, Len

from tokentm_jax.errors import InputError
from tokentm_jax.files import read_json, read_text
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.models.architectures import Config
from tokentm_jax.models.checkpoint import read_safetensors
from tokentm_jax.models.names import LAYOUTS, Tensors
from tokentm_jax.models.text import TextTower
from tokentm_jax.validation import checked

CONFIG, OPEN_CLIP, INDEX = "config.json", "open_clip_config.json", "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")
OPEN_CLIP_WEIGHTS = WEIGHTS[::-1]  # a folder may have weights for both libraries
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
GENERATION = "generation_config.json"
CHAT = ("chat_template.jinja", "tokenizer_config.json")
OTHERS = ("preprocessor_config.json", GENERATION, *TOKENIZER, *CHAT)
LARGEST_SHARDS = 1000
TEXT = {  # of `text_layouts`: model type -> prefix of its architectures
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
    "distilbert": "DistilBert", "electra": "Electra",
}  # fmt: skip
DECODERS = {  # the same of `decoder_layouts`
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3",
}  # fmt: skip
VISION = {"paligemma": "PaliGemma", "gemma3": "Gemma3"}  # the same of `vision_layouts`
Whole = Annotated[int, Ge(1), Le(2**31 - 1)]
Count = Annotated[int, Ge(0), Le(2**31 - 1)]  # or an index
Depth = Annotated[int, Ge(1), Le(1000)]
Side = Annotated[int, Ge(1), Le(2**16)]
Sides = Side | Annotated[list[Side], Len(2, 2)]  # of a square, or (height, width)
Ratio = Annotated[float, Gt(0), Le(1000)]

KINDS = {  # the types of fields, see `fields_of`; of others: Whole
    "img_size": Sides, "patch_size": Sides, "depth": Depth, "mlp_ratio": Ratio, "qkv_bias": bool, "norm_eps": float,
    "type_vocab_size": Count, "activation": str, "mean": list[float], "std": list[float], "interpolation": int,
}  # fmt: skip


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
    """Whether the architecture of a config (prefix of `families`, suffix of `known`) has a classifier, if any."""
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


def text_kind(folder: Path) -> str | None:
    """The model type of a folder of `text_layouts` (`TEXT`), `decoder_layouts` (`DECODERS`) or `vision_layouts`
    (`VISION`); None of any other."""
    if not present(folder, CONFIG) or present(folder, OPEN_CLIP):
        return None
    content = read_json(folder / CONFIG, what="model")
    if not isinstance(content, dict) or "pretrained_cfg" in content:
        return None
    return next((kind for kind in (*TEXT, *DECODERS, *VISION) if kind == content.get("model_type")), None)


def read_section(file: Path, what: str) -> Section:
    return Section(str(file), read_json(file, what=what))


def type_of(config: Section, known: Iterable[str]) -> str:
    """The model type of a config. InputError if it is not one of `known`."""
    kind = config("model_type", str)
    if kind not in known:
        raise InputError(f"{config.where}: the model type {kind!r} is not supported; known: {', '.join(known)}")
    return kind


def require_heads(section: Section, width: int, heads: int) -> None:
    """InputError if the number of heads does not divide the width."""
    if width % heads:
        raise InputError(f"{section.where}: the width {width} must be a multiple of the number of heads, {heads}")


def require_classifier(folder: Path, config: Section, tensors: Tensors) -> None:
    """InputError for weights without the classifier of the architecture."""
    if "head.weight" not in tensors:
        raise InputError(f"the weights of {folder} lack the classifier of {config.content['architectures'][0]}")


def read_weights(folder: Path, names: Sequence[str] = WEIGHTS) -> Tensors:
    """Tensors of the first of these files, of the index's shards, or of the only other file. Raises InputError."""
    files = [name for name in (*names, INDEX) if present(folder, name)][:1]
    files = files or [file.name for file in folder.glob("*.safetensors")]
    if len(files) != 1:
        raise InputError(f"{folder} has no weights: expected {WEIGHTS[0]} or {INDEX}")
    tensors: Tensors = {}
    for name in shards(folder) if files == [INDEX] else files:
        tensors |= read_safetensors(folder / name)
    return tensors


def chat_of(folder: Path) -> str:
    """The chat template of a folder, or an empty text. Raises InputError for files that cannot be read."""
    own, config = CHAT
    if present(folder, own):
        return read_text(folder / own, what="chat template")
    if not present(folder, config):
        return ""
    kind = str | list[dict[str, str]]  # several have names
    found = read_section(folder / config, "tokenizer")("chat_template", kind, "")
    if isinstance(found, str):
        return found
    return next((each.get("template", "") for each in found if each.get("name") == "default"), "")


def shards(folder: Path) -> list[str]:
    """The files of weights in the index of a folder. InputError for a file outside of the folder."""
    index = read_section(folder / INDEX, "index")
    files = sorted(set(index("weight_map", dict[str, str]).values()))
    if len(files) > LARGEST_SHARDS or any(PurePosixPath(name).name != name or name in ("", "..") for name in files):
        raise InputError(f"{index.where}: 'weight_map' must name files of this folder")
    return files


def fields_of(section: Section, layout: str, activations: str = "photos") -> Config:
    """Options of a module from a config, by the tables of a layout. Raises InputError."""
    table = LAYOUTS[layout]
    for key, value in table.get("only", {}).items():
        section.only(key, value)
    found = {name: section(key, KINDS.get(name, Whole), *default) for name, (key, *default) in table["fields"].items()}
    if "activation" in found:
        known, key = LAYOUTS["activations"][activations], table["fields"]["activation"][0]
        if found["activation"] not in known:
            must = f"must be one of {', '.join(known)}, got {found['activation']!r:.80}"
            raise InputError(f"{section.where}: {key!r} {must}")
        found["activation"] = known[found["activation"]]
    return found


def classes_of(config: Section, tensors: Tensors) -> tuple[int, list[str] | None]:
    """The number of classes, and their names unless these are the default ones. InputError if they do not match."""
    count = [*np.shape(tensors.get("head.weight", 0)), 0][0]  # 0 without a classifier
    names = config("id2label", dict[str, str], {})
    listed = [names.get(str(i)) for i in range(len(names))]
    if not count or not names or None in listed or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in listed):
        return count, None
    if len(listed) != count:
        raise InputError(f"{config.where}: 'id2label' names {len(listed)} classes of {count}")
    return count, [str(name) for name in listed]


def preprocessing_of(
    folder: Path, size: Any, shortest: bool = False, any_size: bool = False
) -> tuple[Preprocessing, tuple[str, ...]]:
    """The preprocessing of a folder for a model of this size, and a note if the processor has another size.

    With `any_size`, the processor's size is used. A number as 'size' is the length of the short side (`shortest`, as
    in processors of CLIP and DINOv2) or of both sides.
    """
    section = read_processor(folder)
    size = tuple(size) if isinstance(size, list | tuple) else (size, size)
    fields = fields_of(section, "processor") | {"crop_pct": 1.0}
    if not math.isclose(section("rescale_factor", float, 1 / 255), 1 / 255, rel_tol=1e-4):
        raise InputError(f"{section.where}: 'rescale_factor' must be 1/255: nothing else is supported")
    filters = LAYOUTS["processor"]["filters"]
    if not 0 <= fields["interpolation"] < len(filters):
        raise InputError(f"{section.where}: 'resample' must be one of {', '.join(map(str, range(len(filters))))}")
    fields["interpolation"] = filters[fields["interpolation"]]
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
        made, used = (" x ".join(map(str, sides)) for sides in (cut, size))
        notes = (f"{section.where} makes photos of {made} pixels, and the model takes {used}: used is {used}",)
    return Preprocessing.from_dict({**fields, "size": list(size)}), notes


def read_processor(folder: Path) -> Section:
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
