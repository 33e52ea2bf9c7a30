"""Make the folder `vision` with `transformers`: small random vision-language models, and what the library answers.

    python tests/goldens/make_vision_goldens.py
    (torch 2.13.0, transformers 5.24.0)

vision/NAME/        a folder as the library writes it, with a tokenizer and the preprocessing of images
vision/answers.npz  NAME/pixels [1, 8, 12, 3] in [0, 1]; NAME/ids [1, N]: an image with "the capital of France"; then
                    NAME/types [1, N + 4], 1 for an image (gemma3), or 0 for image and prompt (paligemma), and
                    NAME/logits [1, N + 4, V] of the ids with four more, NAME/more [4]; NAME/greedy: the ids of an
                    answer
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "vision"
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "<boi>", "<eoi>", "the", "capital", "of", "France", "is"]
VOCABULARY = WORDS + [f"w{number}" for number in range(19)] + ["<image>"]
IMAGE = len(VOCABULARY) - 1
TEXT = {
    **{"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 48},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
}
VISION = {
    **{"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 2, "vision_use_head": False},
}
WINDOW = {"sliding_window": 5, "query_pre_attn_scalar": 9}
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
}


def models() -> dict[str, torch.nn.Module]:
    vision = hf.SiglipVisionConfig(**VISION, projection_dim=16)
    layers = ["sliding_attention", "full_attention"]
    pali = {"image_token_index": IMAGE, "vocab_size": len(VOCABULARY), "projection_dim": 16, "hidden_size": 16}
    return {
        "paligemma": hf.PaliGemmaForConditionalGeneration(
            hf.PaliGemmaConfig(vision_config=vision, text_config=hf.GemmaConfig(**TEXT), **pali)
        ),
        "paligemma2": hf.PaliGemmaForConditionalGeneration(
            hf.PaliGemmaConfig(
                vision_config=vision,
                text_config=hf.Gemma2Config(
                    **TEXT, sliding_window=24, query_pre_attn_scalar=9, attn_logit_softcapping=2.0
                ),
                **pali,
            )
        ),
        "gemma3": hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                vision_config=hf.SiglipVisionConfig(**VISION),
                text_config=hf.Gemma3TextConfig(**TEXT, **WINDOW, layer_types=layers, rope_parameters=ROPES),
                **{"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 6, "eoi_token_index": 7},
            )
        ),
    }


def tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "<boi>", "<eoi>", "<image>"])
    return engine


def main() -> None:
    if HERE.exists():
        shutil.rmtree(HERE)
    answers = {}
    generator = torch.Generator().manual_seed(0)
    for name, model in models().items():
        for parameter in model.parameters():  # no parameter may be at a value that hides a mistake
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.eval()
        folder = HERE / name
        model.save_pretrained(folder)
        for left in folder.glob("*.safetensors"):
            tensors = {k: v.half() for k, v in load_file(left).items()}
            save_file(tensors, left, {"format": "pt"})
        model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
        (folder / "generation_config.json").unlink()
        tokenizer().save(str(folder / "tokenizer.json"))
        processor = {
            **{"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255},
            **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
        own = [8, 9, 10, 11]
        ids = [2, 5, 6, *[IMAGE] * 4, 7, 5, *own] if name == "gemma3" else [*[IMAGE] * 16, 2, *own, 4]
        more = torch.randint(8, IMAGE, (4,), generator=generator)
        pixels = torch.rand((1, 8, 8, 3), generator=generator)
        values = (pixels.permute(0, 3, 1, 2) - 0.5) / 0.5
        whole = torch.cat([torch.tensor(ids), more])[None]
        types = (whole == IMAGE).int() if name == "gemma3" else torch.tensor([[0] * len(ids) + [1] * 4])
        with torch.no_grad():
            found = model(
                input_ids=whole, pixel_values=values, token_type_ids=types, attention_mask=torch.ones_like(whole)
            )
            answers[f"{name}/logits"] = found.logits.numpy()
            written = list(ids)
            for _ in range(8):  # without a cache
                row = torch.tensor([written])
                kinds = (
                    (row == IMAGE).int()
                    if name == "gemma3"
                    else torch.tensor([[0] * len(ids) + [1] * (len(written) - len(ids))])
                )
                logits = model(
                    input_ids=row, pixel_values=values, token_type_ids=kinds, attention_mask=torch.ones_like(row)
                ).logits
                written.append(int(logits[0, -1].argmax()))
        answers |= {f"{name}/ids": np.array([ids]), f"{name}/more": more.numpy(), f"{name}/pixels": pixels.numpy()}
        answers[f"{name}/greedy"] = np.array(written[len(ids) :])
    np.savez_compressed(HERE / "answers.npz", **answers)


if __name__ == "__main__":
    main()
