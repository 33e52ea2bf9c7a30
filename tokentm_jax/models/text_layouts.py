"""Folders of text encoders in Hugging Face's layouts: BERT, RoBERTa, DistilBERT and ELECTRA, for `load`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from tokentm_jax.errors import InputError
from tokentm_jax.files import read_json
from tokentm_jax.models import folders
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.folders import CONFIG, Count, Section, Whole, fields_of
from tokentm_jax.models.names import LAYOUTS, Tensors, fused, renamed
from tokentm_jax.models.params import to_params, to_timm
from tokentm_jax.models.vit import init_params
from tokentm_jax.samples import hint
from tokentm_jax.validation import Name, checked

MODULES, POOLING = "modules.json", "1_Pooling/config.json"  # of sentence-transformers
POOLS = {"cls": "token", "mean": "avg"}  # its modes that are supported
LEGACY_POOLS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}  # of pooling_mode_NAME: true
LEGACY_POOLS |= {f"{name}_tokens": name for name in ("max", "mean_sqrt_len", "weightedmean")}
SENTENCE = ("Transformer", "Pooling", "Normalize", "Dropout")  # modules that do not change a cosine of pooled tokens
# Suffixes of Hugging Face's architectures, with whether they have a classifier.
ARCHITECTURES = {"ForSequenceClassification": True, "Model": False, "ForMaskedLM": False, "ForPreTraining": False}


def read_text_folder(
    folder: Path, mask_id: int | None, changes: Mapping[str, Any] | None = None, seed: int = 0
) -> tuple[Bert, dict[str, Any], list[str] | None, tuple[str, ...]]:
    """A folder's module, parameters, names of classes, and differences from its description, for warnings.

    `changes` replace fields of `Bert`, to fine-tune the model. The head is then random, and so is a pooler that the
    weights lack. Raises InputError.
    """
    if not folders.present(folder, CONFIG):
        expected = f"expected {CONFIG} next to the weights and tokenizer.json{hint(folder / CONFIG)}"
        raise InputError(f"{folder} has no text model: {expected}")
    config = folders.read_section(folder / CONFIG, "model")
    kind = folders.type_of(config, folders.TEXT)
    classifies = folders.architecture_of(config, folders.TEXT, ARCHITECTURES) if changes is None else None
    tensors = folders.read_weights(folder)
    if kind == "distilbert":
        tensors = renamed(tensors, LAYOUTS["distilbert"]["names"])
    if any(name.startswith("classifier.dense.") for name in tensors):  # then the encoder's pooler is not used
        tensors = {name: t for name, t in tensors.items() if not re.match(r"(\w+\.)?pooler\.", name)}
    others = re.compile(r"cls\.\w+|lm_head|generator_\w+|discriminator_predictions|vocab_\w+")  # heads of other tasks
    left_out = sorted({match[0] for match in map(others.match, tensors) if match})
    tensors = fused(renamed(tensors, LAYOUTS["bert"]["names"]))
    fields = _fields(config, kind)
    if "roberta" in kind or kind == "camembert":
        _drop_padding(config, tensors)
    if classifies:
        folders.require_classifier(folder, config, tensors)
    has_head = "head.weight" in tensors
    fields["num_classes"], names = folders.classes_of(config, tensors)
    if not has_head:
        fields |= _pooling(folder)
    positions = tensors.get("position_embeddings")
    if positions is not None and positions.ndim == 2:
        fields["max_length"] = min(fields["max_length"], len(positions)) or 1
    fields |= {"mask_id": mask_id, **(changes or {})}
    folders.require_heads(config, fields["embed_dim"], fields["num_heads"])
    module = Bert(**fields)
    if module.pooler is None:
        if "pooler.weight" in tensors and not folders.present(folder, pooling_file(folder)):
            left_out.append("pooler")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    if changes is not None:
        fresh = to_timm(init_params(module, jax.random.key(seed)))
        tensors |= {name: a for name, a in fresh.items() if name.startswith("head.")}
        tensors = {**{name: a for name, a in fresh.items() if name.startswith("pooler.")}, **tensors}
        names = None
    notes = []
    if left_out:
        outputs = "the classes" if module.num_classes else "the mean of the tokens"
        notes.append(f"{folder}: left out of its weights: {', '.join(left_out)}; the outputs are {outputs}")
    if classifies is None and has_head:
        notes.append(f"{config.where} has no architecture: its classifier is used for whole texts")
    return module, to_params(module, tensors, str(folder)), names, tuple(notes)


def _fields(config: Section, kind: str) -> dict[str, Any]:
    if kind == "distilbert":
        return fields_of(config, kind, "texts") | {"type_vocab_size": 0, "pooler": "relu"}
    fields = fields_of(config, "bert", "texts")
    embedding = config("embedding_size", Whole, None)
    own = config.section("tokentm_jax")  # written by this project's training
    return fields | {
        "embedding_size": None if embedding == fields["embed_dim"] else embedding,
        "pool": own("pool", Literal["token", "avg"], "token"),
        "pooler": own("pooler", str, None) if own.content else "gelu" if kind == "electra" else "tanh",
    }


def _drop_padding(config: Section, tensors: Tensors) -> None:
    """RoBERTa counts positions from the id of its padding. Earlier positions are never used."""
    positions, first = tensors.get("position_embeddings"), config("pad_token_id", Count, 1) + 1
    if positions is not None and positions.ndim == 2:
        if not 0 <= first < len(positions):
            raise InputError(f"{config.where}: 'pad_token_id' must be one of the {len(positions)} positions")
        tensors["position_embeddings"] = positions[first:]


def pooling_file(folder: Path) -> str:
    """The file of sentence-transformers that specifies the pooling. InputError for modules that change a cosine."""
    if not folders.present(folder, MODULES):
        return POOLING
    listed, places = read_json(folder / MODULES, what="modules"), []
    for part in listed if isinstance(listed, list) else [None]:
        part = part if isinstance(part, dict) else {}
        kind = str(part.get("type")).rpartition(".")[2]
        if kind not in SENTENCE:
            known = ", ".join(SENTENCE)
            raise InputError(f"{folder / MODULES}: expected a list of modules of {known}, got {kind!r:.80}")
        if kind == "Pooling":
            places.append(checked(f"{folder / MODULES}: 'path'", Name, part.get("path", "1_Pooling")))
    return f"{places[0]}/{CONFIG}" if places else POOLING


def _pooling(folder: Path) -> dict[str, Any]:
    """How an encoder without a classifier is pooled: as sentence-transformers specifies, or by the mean of tokens."""
    file = pooling_file(folder)
    if not folders.present(folder, file):
        if folders.present(folder, MODULES):
            raise InputError(f"{folder} lacks {file}, which specifies how its tokens are pooled")
        return {"pool": "avg", "pooler": None}
    section = folders.read_section(folder / file, "pooling")
    named = section("pooling_mode", str | list[str], None)
    legacy = [mode for mode in LEGACY_POOLS if section(f"pooling_mode_{mode}", bool, False)]
    modes = [named] if isinstance(named, str) else named or [LEGACY_POOLS[mode] for mode in legacy] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLS:
        found = " and ".join(map(repr, modes))
        raise InputError(f"{section.where}: the pooling must be one of {', '.join(POOLS)}, got {found:.200}")
    return {"pool": POOLS[modes[0]], "pooler": None}
