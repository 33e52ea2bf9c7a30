"""Titles of the methods on pages: a readable name, and one plain sentence."""

from typing import NamedTuple

RECOMMENDED = "tokentm_mix"  # for a map of a class without other requirements: docs/explanation/choosing.md


class Title(NamedTuple):
    """The name of a method in words, and what it computes in one sentence."""

    name: str
    sentence: str


_BALANCED = "on LibraGrad's balanced backward pass."
TITLES = {
    "tokentm": ("TokenTM", "Attention times its gradient, weighted by how each layer changes the tokens."),
    "gae": ("Generic attention (GAE)", "The positive part of attention times its gradient, added up over blocks."),
    "transformer_attribution": (
        "Transformer Attribution",
        "The relevance of attention times its gradient, multiplied over blocks.",
    ),
    "attcat": ("AttCAT", "Each token times its gradient, weighted by the attention that it receives."),
    "conservative_lrp": (
        "Conservative LRP",
        "Each token times its gradient, with attention and normalisation held constant.",
    ),
    "lrp": ("LRP to the pixels", "The score, shared out layer by layer down to the pixels."),
    "partial_lrp": ("Partial LRP", "The positive relevance of the last block's attention."),
    "rollout": ("Attention rollout", "The attention of all blocks, multiplied."),
    "raw_attention": ("Attention of the last block", "The attention of the last block, averaged over heads."),
    "grad_cam": ("Grad-CAM on attention", "The last block's attention, each head weighted by its mean gradient."),
    "grad_cam_tokens": ("Grad-CAM on tokens", "The last block's tokens, each channel weighted by its mean gradient."),
    "attn_lrp": ("AttnLRP", "The score, shared out layer by layer with rules made for attention."),
    "res_lrp": ("ResLRP", "AttnLRP with a special rule for residual sums."),
    "libra_full_grad": ("Libra FullGrad+", f"Tokens and biases times their gradients, {_BALANCED}"),
    "libra_attcat": ("Libra AttCAT", f"AttCAT {_BALANCED}"),
    "libra_tokentm": ("Libra TokenTM", f"TokenTM {_BALANCED}"),
    "libra_gae": ("Libra GAE", f"Generic attention {_BALANCED}"),
    "libra_grad_cam": ("Libra Grad-CAM", f"Grad-CAM on attention {_BALANCED}"),
    "beyond_intuition": (
        "Beyond Intuition",
        "Attention over all blocks, times a gradient averaged over scaled inputs.",
    ),
    "legrad": ("LeGrad", "The positive gradient of each block's score with respect to its attention."),
    "input_gradient": ("Input gradient", "How much the score changes when an input value changes a little."),
    "gradient_x_input": ("Gradient × input", "Each input value times its gradient."),
    "smooth_grad": ("SmoothGrad", "The input gradient, averaged over noisy copies of the input."),
    "integrated_gradients": (
        "Integrated Gradients",
        "Each input value's distance from a baseline, times its mean gradient on the way.",
    ),
    "occlusion": ("Occlusion", "How much the score drops when a patch is covered."),
    "token_dropping": ("Token dropping", "How much the score drops when a patch's token is removed."),
    "rise": ("RISE", "The mean score over random masks that show a patch."),
    "shapley": ("Shapley values", "What a patch adds to the score, averaged over random orders of the patches."),
    "kernel_shap": ("KernelSHAP", "Shapley values of the patches, found by a least-squares fit."),
    "tokentm_mix": (
        "TokenTM mix",
        "The mean of four methods' maps, each scaled to [0, 1]: it ranks the parts, and has no unit.",
    ),
    "combination": ("Combination", "The product or the mean of the maps of several methods."),
}


def title_of(method: str) -> Title:
    """The title of a method of the table; its name in words where it has none."""
    return Title(*TITLES.get(method, (method.replace("_", " "), "")))
