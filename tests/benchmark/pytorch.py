"""GAE and TokenTM as a PyTorch user writes them: a timm model in eager mode, forward hooks and autograd.

The attention is not fused, as a fused kernel never holds it. Only what leads to the gradients of the attention is
differentiated, no weight. The maps are combined with products of N x N matrices, as in the published codes.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

try:
    import torchvision  # noqa: F401 - timm imports it
except RuntimeError:  # its compiled operators are for another build of PyTorch; nothing here calls them
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
    library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")

import timm
from timm.layers import set_fused_attn

set_fused_attn(False)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_weights(name: str) -> dict[str, np.ndarray]:
    """timm's own random initialisation, by timm's names."""
    torch.manual_seed(0)
    return {key: value.numpy() for key, value in timm.create_model(name).state_dict().items()}


def weigh(original: torch.Tensor, transformed: torch.Tensor) -> torch.Tensor:
    """TokenTM's transformation weights of paired tokens [B, N, D] -> [B, N]: ratio of lengths, times NECC."""
    correlation = F.cosine_similarity(original, transformed, dim=-1).exp()
    ratio = transformed.norm(dim=-1) / original.norm(dim=-1)
    return ratio * correlation / correlation.mean(-1, keepdim=True)


class Explainer:
    """A timm model whose hooks keep what every block did in the last forward pass."""

    def __init__(self, name: str, weights: dict[str, np.ndarray], dtype: str) -> None:
        self.model = timm.create_model(name)
        self.model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
        self.model.eval().to(device(), getattr(torch, dtype))
        self.seen: dict[str, list[torch.Tensor]] = {}
        for block in self.model.blocks:
            block.register_forward_pre_hook(lambda _, inputs: self._keep("tokens", inputs[0]))
            block.attn.qkv.register_forward_hook(lambda _, inputs, output: self._keep("qkv", output))
            block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: self._keep("attention", output))
            block.ls1.register_forward_hook(lambda _, inputs, output: self._keep("attention_branch", output))
            block.ls2.register_forward_hook(lambda _, inputs, output: self._keep("ffn_branch", output))

    def _keep(self, name: str, value: torch.Tensor) -> None:
        self.seen.setdefault(name, []).append(value)

    def inputs(self, images: Any) -> torch.Tensor:
        """Normalised images [B, H, W, 3] -> the model's input [B, 3, H, W]."""
        dtype = next(self.model.parameters()).dtype
        return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2).contiguous().to(device(), dtype)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(images)

    def explain(self, images: torch.Tensor, method: str) -> torch.Tensor:
        """Token maps [B, gh, gw] of the predicted classes, by the method "gae" or "tokentm"."""
        self.seen.clear()
        score = self.model(images).max(-1).values.sum()
        gradients = torch.autograd.grad(score, self.seen["attention"])
        with torch.no_grad():
            rows = {"gae": self._gae, "tokentm": self._tokentm}[method](gradients)[:, 0, 1:]
            maps = rows.unflatten(-1, self.model.patch_embed.grid_size)
            if maps.is_cuda:
                torch.cuda.synchronize()
            return maps

    def _attention(self, gradients: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """`mean_h relu(G * A_h)` of every block [B, N, N], in float32."""
        pairs = zip(gradients, self.seen["attention"], strict=True)
        return [(gradient * attention).relu().mean(1).float() for gradient, attention in pairs]

    def _gae(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        relevance = 0
        for mean in self._attention(gradients):
            if isinstance(relevance, int):
                relevance = torch.eye(mean.shape[-1], device=mean.device).expand_as(mean)
            relevance = relevance + mean @ relevance
        return relevance

    def _tokentm(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        contribution = torch.diag_embed(self.seen["tokens"][0].float().norm(dim=-1))
        for l, mean in enumerate(self._attention(gradients)):
            tokens, branch, ffn = (self.seen[k][l].float() for k in ("tokens", "attention_branch", "ffn_branch"))
            value = self.seen["qkv"][l].chunk(3, -1)[2]
            transformed = F.linear(value, self.model.blocks[l].attn.proj.weight).float()
            contribution = contribution + (mean * weigh(tokens, transformed)[:, None]) @ contribution
            contribution = contribution + weigh(tokens + branch, ffn)[..., None] * contribution
        return contribution
