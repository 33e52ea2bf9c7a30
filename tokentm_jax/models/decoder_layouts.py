"""Folders of decoders in Hugging Face's layout: Llama, Qwen2, Qwen3, Gemma 1 to 3, for `load`."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from tokentm_jax.errors import InputError
from tokentm_jax.models import folders
from tokentm_jax.models.decoder import Decoder
from tokentm_jax.models.folders import CONFIG, DECODERS, GENERATION, Count, Section, Whole, fields_of
from tokentm_jax.models.names import LAYOUTS, Tensors, renamed
from tokentm_jax.models.params import to_params

Positive = Annotated[float, Gt(0), Le(1e12)]
Width = Annotated[int, Ge(2), Le(2**16)]
LAYERS = ("full_attention", "sliding_attention")


def read_decoder_folder(folder: Path) -> tuple[Decoder, dict[str, Any]]:
    """A folder's module and parameters. Raises InputError."""
    config = folders.read_section(folder / CONFIG, "model")
    kind = folders.type_of(config, DECODERS)
    folders.architecture_of(config, DECODERS, {"ForCausalLM": False})
    tensors = of_decoder(folders.read_weights(folder), kind, str(folder))
    return decoder(config, kind, tensors, ends_of(folder, config), str(folder))


def of_decoder(stored: Tensors, kind: str, source: str) -> Tensors:
    """Tensors under the names of the module, with the scales that it multiplies by."""
    after = LAYOUTS["decoder_post_norms"]["names"] if kind in ("gemma2", "gemma3_text") else []
    tensors = renamed(stored, [*after, *LAYOUTS["decoder"]["names"]], source)
    if kind.startswith("gemma"):  # whose norms multiply by 1 + w
        scales = {n: t for n, t in tensors.items() if re.search(r"(norm\d?|post\d)\.weight$", n)}
        tensors |= {name: 1 + np.asarray(scale, np.float32) for name, scale in scales.items()}
    return tensors


def ends_of(folder: Path, *configs: Section) -> list[int]:
    """The ids of the tokens that end a text, of a folder's config of generation or the first config with any."""
    own = [read_generation(folder)] if folders.present(folder, GENERATION) else []
    listed = next((section for section in (*own, *configs) if section.content.get("eos_token_id") is not None), None)
    ids = [] if listed is None else listed("eos_token_id", int | list[int])
    return [ids] if isinstance(ids, int) else ids


def read_generation(folder: Path) -> Section:
    """How a folder's model writes texts."""
    return folders.read_section(folder / GENERATION, "generation")


def decoder(
    config: Section, kind: str, tensors: Tensors, end: list[int], source: str
) -> tuple[Decoder, dict[str, Any]]:
    """Module and parameters, of a config in Hugging Face's layout and tensors under the names of the module.

    Raises InputError for what is not supported, and for tensors that do not fit.
    """
    gemma = kind.startswith("gemma")
    if gemma:
        if config("use_bidirectional_attention", bool, False):
            raise InputError(f"{config.where}: 'use_bidirectional_attention' must be false: nothing else is supported")
        named = config("hidden_activation", str, config("hidden_act", str, "gelu"))
        named = "gelu_pytorch_tanh" if named == "gelu" else named  # the releases' name of the approximation
        config = Section(config.where, {**config.content, "hidden_act": named})
    fields = fields_of(config, "decoder", "texts")
    heads, width = fields["num_heads"], fields["embed_dim"]
    pairs = config("num_key_value_heads", Whole, heads)
    if heads % pairs:
        raise InputError(f"{config.where}: 'num_key_value_heads' must divide the {heads} heads, got {pairs}")
    usual = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
    channels = config("head_dim", Width, usual.get(kind))
    if channels is None:
        folders.require_heads(config, width, heads)
        channels = width // heads
    if channels % 2:
        raise InputError(f"{config.where}: 'head_dim' must be even, got {channels}")
    bias = config("attention_bias", bool, False)
    tied = config("tie_word_embeddings", bool, gemma)
    fields |= {"num_kv_heads": pairs, "head_dim": channels, "tied": tied, "end": tuple(end)}
    fields |= {"qkv_bias": bias or kind == "qwen2", "proj_bias": bias, "mlp_bias": config("mlp_bias", bool, False)}
    fields |= {"qk_norm": kind in ("qwen3", "gemma3_text"), **_rope(config, kind, channels)}
    if gemma:
        fields["embed_scale"] = width**0.5
    if kind in ("gemma2", "gemma3_text"):
        usual_caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if kind == "gemma2" else {}
        given = Section(config.where, usual_caps | dict(config.content))
        fields["attention_cap"] = given("attn_logit_softcapping", Positive, None)
        fields["logit_cap"] = given("final_logit_softcapping", Positive, None)
        fields |= {"post_norms": True, "attention_scale": config("query_pre_attn_scalar", Positive, 256.0) ** -0.5}
    fields |= _windows(config, kind, fields["depth"])
    if tied:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "head.weight"}
    module = Decoder(**fields)
    return module, to_params(module, tensors, source)


def _windows(config: Section, kind: str, depth: int) -> dict[str, Any]:
    """Which blocks attend to a window only, and to how many tokens."""
    used = kind in ("gemma2", "gemma3_text") or config("use_sliding_window", bool, False)
    window = config("sliding_window", Whole, None)
    if not used or window is None:
        return {}
    listed = config("layer_types", list[Literal["full_attention", "sliding_attention"]], None)
    if listed is None and kind.startswith("gemma"):  # every second block is over all tokens, or every sixth
        every = 2 if kind == "gemma2" else config("sliding_window_pattern", Whole, 6)
        listed = [LAYERS[(block + 1) % every > 0] for block in range(depth)]
    elif listed is None:
        listed = [LAYERS[block >= config("max_window_layers", Count, 28)] for block in range(depth)]
    if len(listed) != depth:
        raise InputError(f"{config.where}: 'layer_types' must have a type for each of {depth} blocks")
    local = tuple(layer == LAYERS[1] for layer in listed)
    return {"window": window, "local": local} if any(local) else {}


def _rope(config: Section, kind: str, width: int) -> dict[str, Any]:
    """Base and divisors of the rotary frequencies, from `rope_parameters`, or from keys of earlier releases."""
    two = kind == "gemma3_text"  # blocks with a window have another base
    base = 1_000_000.0 if two else 10_000.0
    if config.content.get("rope_parameters") is None:
        scaling = {} if config.content.get("rope_scaling") is None else config.section("rope_scaling").content
        own = Section(f"{config.where}: 'rope_scaling'", scaling)
        base = config("rope_theta", Positive, base)
        local = config("rope_local_base_freq", Positive, 10_000.0)
    else:
        own = config.section("rope_parameters")
        near = own.section(LAYERS[1])
        near.only("rope_type", "default")
        local = near("rope_theta", Positive, 10_000.0)
        own = own.section(LAYERS[0]) if LAYERS[0] in own.content else own
        base = own("rope_theta", Positive, base)
    for section in (config, own):
        if (share := section("partial_rotary_factor", float, 1.0)) != 1:
            raise InputError(f"{section.where}: 'partial_rotary_factor' must be 1, got {share}")
    found = {"rope_base": base, "rope_divisors": _divisors(own, base, width)}
    return found | ({"local_rope_base": local} if two else {})


def _divisors(section: Section, base: float, width: int) -> tuple[float, ...]:
    """Divisors of the frequencies, for contexts that are longer than those of the training.

    "linear": one factor. "llama3": the factor for waves that are longer than a part of the old context, 1 for short
    ones, and between them a mixture of both frequencies.
    """
    kind = section("rope_type", str, section("type", str, "default"))
    if kind == "default":
        return ()
    if kind not in ("linear", "llama3"):
        raise InputError(f"{section.where}: 'rope_type' must be default, linear or llama3, got {kind!r:.80}")
    factor = section("factor", Positive)
    if kind == "linear":
        return (factor,) * (width // 2)
    low, high = section("low_freq_factor", Positive), section("high_freq_factor", Positive)
    if low >= high:
        raise InputError(f"{section.where}: 'low_freq_factor' must be less than 'high_freq_factor', {high}, got {low}")
    context = section("original_max_position_embeddings", Whole)
    waves = context * base ** (-np.arange(0, width, 2) / width) / (2 * math.pi)  # in the old context
    share = np.clip((waves - low) / (high - low), 0, 1)  # of the frequency as it was
    return tuple(float(divisor) for divisor in 1 / (share + (1 - share) / factor))
