"""Make the folder `layouts` with the libraries whose layouts are read: small random models, and what they answer.

    python tests/goldens/make_layout_goldens.py    (torch 2.13.0, transformers 5.24.0, open_clip_torch 3.3.0)

layouts/NAME/        a folder as the library writes it, with `preprocessor_config.json` and, for prompts, a tokenizer
layouts/answers.npz  NAME/images [2, 16, 16, 3] normalised, NAME/outputs; NAME/ids and NAME/text for prompts
                     ast/wave int16 [n] at 16 kHz, ast/features [24, 16] of it by the folder's extractor, and ast/full
                     [40, 128] by the library's default one, both normalised; without torchaudio
layouts/prompts.json NAME -> the prompts
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")

import open_clip  # noqa: E402
import tokenizers  # noqa: E402
import transformers as hf  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

HERE = Path(__file__).parent / "layouts"
VIT = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48},
    **{"image_size": 16, "patch_size": 4},
}
AST = {k: v for k, v in VIT.items() if k != "image_size"}
AST |= {"num_mel_bins": 16, "max_length": 24, "frequency_stride": 3, "time_stride": 2}  # 2 frames are left over
DINO = {**{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2}
TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = {"id2label": {i: f"label {i}" for i in range(5)}, "label2id": {f"label {i}": i for i in range(5)}}
WORDS = [
    "[pad]",
    "[unk]",
    *["a", "cat", "dog", "red", "car", "photo", "of", "the", "on", "two"],
    "<|startoftext|>",
    "<|endoftext|>",
]
PROMPTS = ["a red car", "photo of the cat on the dog on the car on the cat", "two"]
END, START, PAD = len(WORDS) - 1, len(WORDS) - 2, 0


def models() -> dict[str, torch.nn.Module]:
    clip_text = {**TEXT, "vocab_size": len(WORDS), "max_position_embeddings": 10, "hidden_act": "quick_gelu"}
    clip_text |= {"eos_token_id": END, "bos_token_id": START, "pad_token_id": END}
    siglip_text = {**TEXT, "vocab_size": len(WORDS), "max_position_embeddings": 8, "pad_token_id": PAD}
    return {
        "vit": hf.ViTForImageClassification(hf.ViTConfig(**VIT, **LABELS)),
        "deit": hf.DeiTForImageClassification(hf.DeiTConfig(**VIT, **LABELS)),
        "deit_teacher": hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT, **LABELS)),
        "dinov2": hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO, **LABELS)),
        "dinov2_swiglu": hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)),
        "dinov2_registers": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=2)),
        "clip": hf.CLIPModel(hf.CLIPConfig(text_config=clip_text, vision_config=VIT, projection_dim=12)),
        "siglip": hf.SiglipModel(hf.SiglipConfig(text_config=siglip_text, vision_config=VIT)),
        "ast": hf.ASTForAudioClassification(hf.ASTConfig(**AST, **LABELS)),
    }


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """No parameter may be at a value (0, 1) that hides a mistake."""
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = centre + (0.2 if parameter.ndim > 1 else 0.3) * noise


def tokenizer(start: bool) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[unk]"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    single = "<|startoftext|> $A <|endoftext|>" if start else "$A <|endoftext|>"
    special = [("<|startoftext|>", START), ("<|endoftext|>", END)]
    engine.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    return engine


def padded(engine: tokenizers.Tokenizer, context: int, pad: int) -> torch.Tensor:
    """As the processors do it: cut to the context with the end kept, and filled up."""
    engine.enable_truncation(context)
    engine.enable_padding(pad_id=pad, length=context)
    return torch.tensor([encoding.ids for encoding in engine.encode_batch(PROMPTS)])


def answers(name: str, model: torch.nn.Module, pixels: torch.Tensor, ids: torch.Tensor | None) -> dict:
    found = {"images": pixels.permute(0, 2, 3, 1).numpy()}
    if ids is not None:
        both = model(input_ids=ids, pixel_values=pixels)
        return {**found, "ids": ids.numpy(), "outputs": both.image_embeds.numpy(), "text": both.text_embeds.numpy()}
    answer = model(pixel_values=pixels)
    return {**found, "outputs": (answer.logits if hasattr(answer, "logits") else answer.pooler_output).numpy()}


def sound(name: str, generator: torch.Generator) -> None:
    """AST: images are spectrograms [2, mel, time, 1], and what its feature extractor makes of a wave."""
    time = torch.arange(4800) / 16_000
    chirp = 0.4 * torch.sin(2 * torch.pi * (200 * time + 9000 * time**2))
    wave = (2**15 * (chirp + 0.02 * torch.randn(4800, generator=generator))).to(torch.int16).numpy()
    for key, options in (("features", {"num_mel_bins": 16, "max_length": 24}), ("full", {"max_length": 40})):
        extractor = hf.ASTFeatureExtractor(**options)
        results[f"{name}/{key}"] = extractor(wave / 2**15, sampling_rate=16_000, return_tensors="np").input_values[0]
        if key == "features":
            extractor.save_pretrained(HERE / name)
    results[f"{name}/wave"] = wave


def open_clip_model(generator: torch.Generator) -> None:
    """Of OpenCLIP: its own towers, a config as it uploads them, CLIP's own tokenizer files."""
    towers = {"vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "head_width": 8, "patch_size": 4}}
    towers |= {"text_cfg": {"context_length": 10, "vocab_size": len(WORDS), "width": 16, "heads": 2, "layers": 1}}
    config = {"embed_dim": 12, **towers}
    model = open_clip.CLIP(**config).eval()
    randomise(model, generator)
    folder = HERE / "open_clip"
    folder.mkdir(parents=True)
    photos = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    description = {"model_cfg": config, "preprocess_cfg": photos}
    (folder / "open_clip_config.json").write_text(json.dumps(description, indent=1))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    engine = tokenizer(start=True)
    engine.save(str(folder / "tokenizer.json"))
    ids = padded(engine, 10, 0)
    pixels = torch.randn((2, 3, 16, 16), generator=generator)
    results["open_clip/images"] = pixels.permute(0, 2, 3, 1).numpy()
    results["open_clip/outputs"] = model.encode_image(pixels, normalize=True).numpy()
    results["open_clip/ids"], results["open_clip/text"] = ids.numpy(), model.encode_text(ids, normalize=True).numpy()


results: dict[str, np.ndarray] = {}
with torch.no_grad():
    shutil.rmtree(HERE, ignore_errors=True)
    for seed, (name, model) in enumerate(models().items()):
        generator = torch.Generator().manual_seed(seed)
        randomise(model.eval(), generator)
        model.save_pretrained(HERE / name)
        if name == "ast":
            images = torch.randn((2, 16, 24, 1), generator=generator)
            results["ast/images"] = images.numpy()
            results["ast/outputs"] = model(input_values=images[..., 0].transpose(1, 2)).logits.numpy()
            sound(name, generator)
            continue
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        size = {"height": 16, "width": 16}
        processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.3], "resample": 2, "size": size}
        if name == "clip":
            processor |= {"size": {"shortest_edge": 16}, "crop_size": size, "do_center_crop": True, "resample": 3}
        if name.startswith("deit"):
            processor |= {"size": {"height": 18, "width": 18}, "crop_size": size, "do_center_crop": True}
        (HERE / name / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
        ids = None
        if name in ("clip", "siglip"):
            engine = tokenizer(start=name == "clip")
            engine.save(str(HERE / name / "tokenizer.json"))
            ids = padded(engine, *((10, END) if name == "clip" else (8, PAD)))
        pixels = torch.randn((2, 3, 16, 16), generator=generator)
        for key, value in answers(name, model, pixels, ids).items():
            results[f"{name}/{key}"] = value
    open_clip_model(torch.Generator().manual_seed(99))
np.savez_compressed(HERE / "answers.npz", **results)
(HERE / "prompts.json").write_text(json.dumps(PROMPTS) + "\n")
