"""Make layouts/resized.npz with `transformers`: what the models of the folders of `layouts` answer for images of other
sizes than theirs; and architectures_hf.json: every architecture that it has of the model types that are read.

    python tests/goldens/make_resized_goldens.py    (torch 2.13.0, transformers 5.24.0)

NAME@HxW/images [1, H, W, 3] normalised, NAME@HxW/outputs as in answers.npz
"""

import importlib
import json
from pathlib import Path

import numpy as np
import torch

# transformers imports torchvision, whose compiled operators are missing in an installation for the CPU only.
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")

import transformers as hf  # noqa: E402

HERE = Path(__file__).parent
SIZES = [(24, 16), (8, 12), (28, 28)]
TYPES = ["vit", "deit", "dinov2", "dinov2_with_registers", "audio-spectrogram-transformer", "clip", "siglip"]
TYPES += ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"]


def answer(name: str, pixels: torch.Tensor, ids: np.ndarray | None) -> np.ndarray:
    config = json.loads((HERE / "layouts" / name / "config.json").read_text())
    model = getattr(hf, config["architectures"][0]).from_pretrained(HERE / "layouts" / name).eval()
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    if ids is not None:
        return model(input_ids=torch.tensor(ids), pixel_values=pixels, **options).image_embeds.numpy()
    found = model(pixel_values=pixels, **options)
    return (found.logits if hasattr(found, "logits") else found.pooler_output).numpy()


def architectures() -> dict[str, list[str]]:
    found = {}
    for kind in TYPES:
        module = kind.replace("-", "_")
        module = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        classes = [getattr(module, name) for name in module.__all__]
        own = [c for c in classes if getattr(getattr(c, "config_class", None), "model_type", None) == kind]
        found[kind] = sorted(c.__name__ for c in own if not c.__name__.endswith("PreTrainedModel"))
    return found


def main() -> None:
    results = {}
    generator = torch.Generator().manual_seed(0)
    answers = np.load(HERE / "layouts/answers.npz")
    for name in ("vit", "deit", "deit_teacher", "dinov2", "dinov2_registers", "clip", "siglip"):
        for height, width in SIZES:
            pixels = torch.randn((1, 3, height, width), generator=generator)
            with torch.no_grad():
                outputs = answer(name, pixels, answers[f"{name}/ids"][:3] if f"{name}/ids" in answers else None)
            results[f"{name}@{height}x{width}/images"] = pixels.permute(0, 2, 3, 1).numpy()
            results[f"{name}@{height}x{width}/outputs"] = outputs
    np.savez_compressed(HERE / "layouts/resized.npz", **results)
    (HERE / "architectures_hf.json").write_text(json.dumps(architectures(), indent=1) + "\n")


if __name__ == "__main__":
    main()
