"""Folders of text encoders in Hugging Face's layouts: BERT, RoBERTa, DistilBERT and ELECTRA, for `load`.

As in `layouts`, there is a table of names and a function from `config.json` to the fields of `Bert`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from tokentm_jax.errors import InputError
from tokentm_jax.files import read_json
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.checkpoint import Tensors, fused, to_params, to_timm
from tokentm_jax.models.layouts import (
    CONFIG,
    TEXT,
    Count,
    Depth,
    Names,
    Section,
    Whole,
    activation_of,
    architecture_of,
    classes_of,
    present,
    read_section,
    read_weights,
    renamed,
    require_classifier,
    require_heads,
    type_of,
)
from tokentm_jax.models.vit import init_params
from tokentm_jax.samples import hint
from tokentm_jax.validation import Name, checked

# Names of BERT and its successors. DistilBERT's names are translated to these first.
NAMES: Names = (
    (r"^(bert|roberta|electra|distilbert)\.", ""),
    (r"^(cls|lm_head|generator_\w+|discriminator_predictions|vocab_\w+)\..*$", ""),
    (r"^embeddings\.position_ids$", ""),
    (r"^embeddings\.word_embeddings\.weight$", "word_embeddings"),
    (r"^embeddings\.position_embeddings\.weight$", "position_embeddings"),
    (r"^embeddings\.token_type_embeddings\.weight$", "type_embeddings"),
    (r"^embeddings\.LayerNorm\.", "embed_norm."),
    (r"^embeddings_project\.", "embed_project."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.output\.LayerNorm\.", ".norm2."),
    (r"\.gamma$", ".weight"),  # of LayerNorm, in the first releases
    (r"\.beta$", ".bias"),
    (r"^(pooler|classifier)\.dense\.", "pooler."),
    (r"^(classifier\.out_proj|classifier)\.", "head."),
)
DISTIL: Names = (
    (r"^distilbert\.", ""),
    (r"^transformer\.layer\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.(q|k|v)_lin\.", lambda m: f".attention.self.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.attention\.out_lin\.", ".attention.output.dense."),
    (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.ffn\.lin1\.", ".intermediate.dense."),
    (r"\.ffn\.lin2\.", ".output.dense."),
    (r"\.output_layer_norm\.", ".output.LayerNorm."),
    (r"^pre_classifier\.", "pooler.dense."),
)
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu", "tanh": "tanh",
}  # fmt: skip
MODULES, POOLING = "modules.json", "1_Pooling/config.json"  # of sentence-transformers
POOLS = {"cls": "token", "mean": "avg"}  # its modes that are supported
LEGACY_POOLS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}  # of pooling_mode_NAME: true
LEGACY_POOLS |= {f"{name}_tokens": name for name in ("max", "mean_sqrt_len", "weightedmean")}
SENTENCE = ("Transformer", "Pooling", "Normalize", "Dropout")  # modules that do not change a cosine of pooled tokens
# Suffixes of Hugging Face's architectures, with whether they have a classifier.
ARCHITECTURES = {"ForSequenceClassification": True, "Model": False, "ForMaskedLM": False, "ForPreTraining": False}


class TextFolder(NamedTuple):
    """A text encoder of a folder."""

    module: Bert
    params: dict[str, Any]
    class_names: list[str] | None
    notes: tuple[str, ...] = ()  # differences from the folder's description, as warnings of `load`


def require_config(folder: Path) -> None:
    """InputError for a folder without config.json."""
    if not present(folder, CONFIG):
        expected = f"expected {CONFIG} next to the weights and tokenizer.json{hint(folder / CONFIG)}"
        raise InputError(f"{folder} has no text model: {expected}")


def read_text_folder(
    folder: Path, mask_id: int | None, changes: Mapping[str, Any] | None = None, seed: int = 0
) -> TextFolder:
    """The model of a folder with `config.json` and weights in safetensors.

    `changes` replace fields of `Bert`, to fine-tune the model. The head is then random, and so is a pooler that the
    weights lack.

    Raises InputError for another folder, or one that is damaged.
    """
    require_config(folder)
    config = read_section(folder / CONFIG, "model")
    kind = type_of(config, TEXT)
    classifies = architecture_of(config, TEXT, ARCHITECTURES) if changes is None else None
    tensors = read_weights(folder)
    if kind == "distilbert":
        tensors = renamed(tensors, DISTIL)
    if any(name.startswith("classifier.dense.") for name in tensors):  # then the encoder's pooler is not used
        tensors = {name: t for name, t in tensors.items() if not re.match(r"(\w+\.)?pooler\.", name)}
    left_out = _unread_heads(tensors)
    tensors = fused(renamed(tensors, NAMES))
    fields = _distilbert(config) if kind == "distilbert" else _bert(config, kind)
    if "roberta" in kind or kind == "camembert":
        _drop_padding(config, tensors)
    if classifies:
        require_classifier(folder, config, tensors)
    has_head = "head.weight" in tensors
    fields["num_classes"], names = classes_of(config, tensors)
    if not has_head:
        fields |= _pooling(folder)
    positions = tensors.get("position_embeddings")
    if positions is not None and positions.ndim == 2:
        fields["max_length"] = min(fields["max_length"], len(positions)) or 1
    fields |= {"mask_id": mask_id, **(changes or {})}
    require_heads(config, fields["embed_dim"], fields["num_heads"])
    module = Bert(**fields)
    if module.pooler is None:
        if "pooler.weight" in tensors and not present(folder, pooling_file(folder)):
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
    return TextFolder(module, to_params(module, tensors, str(folder)), names, tuple(notes))


def _unread_heads(tensors: Tensors) -> list[str]:
    """Heads of other tasks in the weights: "cls.predictions", "lm_head"."""
    found = (re.match(r"cls\.\w+|lm_head|generator_\w+|discriminator_predictions|vocab_\w+", name) for name in tensors)
    return sorted({match[0] for match in found if match})


def _bert(config: Section, kind: str) -> dict[str, Any]:
    for key, value in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
        config.only(key, value)
    width = config("hidden_size", Whole)
    embedding = config("embedding_size", Whole, None)
    own = config.section("tokentm_jax")  # written by this project's training
    return {
        "vocab_size": config("vocab_size", Whole),
        "max_length": config("max_position_embeddings", Whole),
        "embed_dim": width,
        "depth": config("num_hidden_layers", Depth),
        "num_heads": config("num_attention_heads", Whole),
        "mlp_hidden": config("intermediate_size", Whole),
        "type_vocab_size": config("type_vocab_size", Count, 2),
        "embedding_size": None if embedding == width else embedding,
        "activation": activation_of(config, known=ACTIVATIONS),
        "norm_eps": config("layer_norm_eps", float, 1e-12),
        "pool": own("pool", Literal["token", "avg"], "token"),
        "pooler": own("pooler", str, None) if own.content else "gelu" if kind == "electra" else "tanh",
    }


def _distilbert(config: Section) -> dict[str, Any]:
    return {
        "vocab_size": config("vocab_size", Whole),
        "max_length": config("max_position_embeddings", Whole),
        "embed_dim": config("dim", Whole),
        "depth": config("n_layers", Depth),
        "num_heads": config("n_heads", Whole),
        "mlp_hidden": config("hidden_dim", Whole),
        "type_vocab_size": 0,
        "activation": activation_of(config, "activation", ACTIVATIONS),
        "norm_eps": 1e-12,
        "pooler": "relu",
    }


def _drop_padding(config: Section, tensors: Tensors) -> None:
    """RoBERTa counts positions from the id of its padding. Earlier positions are never used."""
    positions, first = tensors.get("position_embeddings"), config("pad_token_id", Count, 1) + 1
    if positions is not None and positions.ndim == 2:
        if not 0 <= first < len(positions):
            raise InputError(f"{config.where}: 'pad_token_id' must be one of the {len(positions)} positions")
        tensors["position_embeddings"] = positions[first:]


def pooling_file(folder: Path) -> str:
    """The file of sentence-transformers in a folder that specifies how tokens are pooled.

    Raises InputError for modules that change a cosine of pooled tokens.
    """
    if not present(folder, MODULES):
        return POOLING
    listed = read_json(folder / MODULES, what="modules")
    places = []
    for part in listed if isinstance(listed, list) else [None]:
        part = part if isinstance(part, dict) else {}
        kind = part.get("type")
        kind = kind.rpartition(".")[2] if isinstance(kind, str) else kind
        if kind not in SENTENCE:
            known = ", ".join(SENTENCE)
            raise InputError(f"{folder / MODULES}: expected a list of modules of {known}, got {kind!r:.80}")
        if kind == "Pooling":
            places.append(checked(f"{folder / MODULES}: 'path'", Name, part.get("path", "1_Pooling")))
    return f"{places[0]}/{CONFIG}" if places else POOLING


def _pooling(folder: Path) -> dict[str, Any]:
    """How an encoder without a classifier is pooled: as sentence-transformers specifies, or by the mean of tokens."""
    file = pooling_file(folder)
    if not present(folder, file):
        if present(folder, MODULES):
            raise InputError(f"{folder} lacks {file}, which specifies how its tokens are pooled")
        return {"pool": "avg", "pooler": None}
    section = read_section(folder / file, "pooling")
    named = section("pooling_mode", str | list[str], None)
    legacy = [mode for mode in LEGACY_POOLS if section(f"pooling_mode_{mode}", bool, False)]
    modes = [named] if isinstance(named, str) else named or [LEGACY_POOLS[mode] for mode in legacy] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLS:
        found = " and ".join(map(repr, modes))
        raise InputError(f"{section.where}: the pooling must be one of {', '.join(POOLS)}, got {found:.200}")
    return {"pool": POOLS[modes[0]], "pooler": None}
