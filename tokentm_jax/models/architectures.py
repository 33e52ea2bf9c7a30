"""Architectures by their timm name, and the module built from timm's keyword arguments.

config, preprocessing = architecture("vit_base_patch16_224.augreg_in21k_ft_in1k")
module = build(config, num_classes=10)
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from annotated_types import Ge, Le

from tokentm_jax.data.preprocessing import CLIP, HALF, IMAGENET, Preprocessing, Statistics
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.files import read_json
from tokentm_jax.models.vit import ViT
from tokentm_jax.validation import checked

Config = dict[str, Any]  # keyword arguments of timm's VisionTransformer, JSON types only

SIZES: dict[str, Config] = {
    "xsmall": {"embed_dim": 256, "depth": 10, "num_heads": 4},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "betwixt": {"embed_dim": 640, "depth": 12, "num_heads": 10},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "base_plus": {"embed_dim": 896, "depth": 12, "num_heads": 14},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "huge_plus": {"embed_dim": 1280, "depth": 32, "num_heads": 20},
    "giant_1536": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
    "giantopt": {"embed_dim": 1536, "depth": 40, "num_heads": 16},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
    "wee": {"embed_dim": 256, "depth": 14, "num_heads": 4, "mlp_ratio": 5.0},
    "little": {"embed_dim": 320, "depth": 14, "num_heads": 5, "mlp_ratio": 5.6},
    "mediumd": {"embed_dim": 512, "depth": 20, "num_heads": 8},
    "so150m": {"embed_dim": 896, "depth": 18, "num_heads": 14, "mlp_ratio": 2.572},
    "so150m2": {"embed_dim": 832, "depth": 21, "num_heads": 13, "mlp_ratio": 34 / 13, "qkv_bias": False},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
}

DEIT3: Config = {"no_embed_class": True, "init_values": 1e-6}
LAYER_SCALE: Config = {"init_values": 1e-5}
REGISTERS: Config = {"reg_tokens": 4, "no_embed_class": True}
# Norm before pooling.
POOLED: Config = {"class_token": False, "global_pool": "avg", "fc_norm": False}
POOLED_BARE: Config = {**POOLED, "qkv_bias": False, "init_values": 1e-6}
# Norm after pooling, which is the default for "avg".
POOLED_1: Config = {"class_token": False, "no_embed_class": True, "reg_tokens": 1, "global_pool": "avg"}
POOLED_CLASSIC: Config = {**POOLED_1, "no_embed_class": False, "init_values": 1e-5}
POOLED_4: Config = POOLED_1 | {"reg_tokens": 4}
PRE_NORM: Config = {"pre_norm": True, "norm_eps": 1e-5}
QUICK: Config = PRE_NORM | {"activation": "quick_gelu"}
# SigLIP: attention pooling; the later ones with the other approximation of GELU.
MAP: Config = {"class_token": False, "global_pool": "map"}
TANH: Config = {"activation": "gelu_tanh"}
EVA: Config = {"global_pool": "avg", "k_bias": False}
ROTARY: Config = EVA | {"mlp_ratio": 8 / 3, "rope_type": "cat", "ref_feat_shape": (16, 16)}
EVA02: Config = ROTARY | {"mlp_layer": "swiglu_packed"}
EVA02_SCALED: Config = ROTARY | {"mlp_layer": "swiglu", "scale_mlp_norm": True}
GATED: Config = {"mlp_ratio": 2.66667, "mlp_layer": "swiglu_packed", "init_values": 1e-5}
DINO3: Config = {
    **EVA, "init_values": 1e-5, "reg_tokens": 4, "pos_embed": "none", "rope_type": "dinov3", "rope_temperature": 100.0,
    "fc_norm": False, "norm_eps": 1e-5,
}  # fmt: skip
BARE: Config = {"qkv_bias": False}
SWIGLU: Config = {"mlp_layer": "swiglu"}
SWIGLU8: Config = SWIGLU | {"mlp_ratio": 8 / 3}
TOKEN: Config = {"global_pool": "token"}
TIPS: Config = {"init_values": 1.0, "reg_tokens": 1, "no_embed_class": True}
UNIT: Statistics = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
BILINEAR: Any = {**IMAGENET, "interpolation": "bilinear"}
UNIT_BILINEAR: Any = {**UNIT, "interpolation": "bilinear"}


def _row(
    size: str, patch_size: int, img_size: int, crop_pct: float, statistics: Statistics, *options: Config
) -> tuple[Config, Preprocessing]:
    config = {"img_size": img_size, "patch_size": patch_size} | SIZES[size]
    for option in options:
        config |= option
    return config, Preprocessing((img_size, img_size), crop_pct, **statistics)


# fmt: off
ARCHITECTURES: dict[str, tuple[Config, Preprocessing]] = {
    # name: size, patch size, image size, crop_pct, mean and std, options
    "vit_tiny_patch16_224": _row("tiny", 16, 224, 0.9, HALF),
    "vit_tiny_patch16_384": _row("tiny", 16, 384, 1.0, HALF),
    "vit_small_patch8_224": _row("small", 8, 224, 0.9, IMAGENET),
    "vit_small_patch16_224": _row("small", 16, 224, 0.9, HALF),
    "vit_small_patch16_384": _row("small", 16, 384, 1.0, HALF),
    "vit_small_patch16_36x1_224": _row("small", 16, 224, 0.9, HALF, {"depth": 36, "init_values": 1e-5}),
    "vit_small_patch32_224": _row("small", 32, 224, 0.9, HALF),
    "vit_small_patch32_384": _row("small", 32, 384, 1.0, HALF),
    "vit_base_patch8_224": _row("base", 8, 224, 0.9, HALF),
    "vit_base_patch16_224": _row("base", 16, 224, 0.9, HALF),
    "vit_base_patch16_384": _row("base", 16, 384, 1.0, HALF),
    "vit_base_patch16_plus_240": _row("base_plus", 16, 240, 0.95, HALF, LAYER_SCALE),
    "vit_base_patch32_224": _row("base", 32, 224, 0.9, HALF),
    "vit_base_patch32_384": _row("base", 32, 384, 1.0, HALF),
    "vit_base_patch32_plus_256": _row("base_plus", 32, 256, 0.95, HALF, LAYER_SCALE),
    "vit_large_patch14_224": _row("large", 14, 224, 0.9, HALF),
    "vit_large_patch16_224": _row("large", 16, 224, 0.9, HALF),
    "vit_large_patch16_384": _row("large", 16, 384, 1.0, HALF),
    "vit_large_patch32_224": _row("large", 32, 224, 0.9, HALF),
    "vit_large_patch32_384": _row("large", 32, 384, 1.0, HALF),
    "vit_huge_patch14_224": _row("huge", 14, 224, 0.9, HALF),
    "vit_giant_patch14_224": _row("giant", 14, 224, 0.9, HALF),
    "vit_gigantic_patch14_224": _row("gigantic", 14, 224, 0.9, HALF),

    "deit_tiny_patch16_224": _row("tiny", 16, 224, 0.9, IMAGENET),
    "deit_small_patch16_224": _row("small", 16, 224, 0.9, IMAGENET),
    "deit_base_patch16_224": _row("base", 16, 224, 0.9, IMAGENET),
    "deit_base_patch16_384": _row("base", 16, 384, 1.0, IMAGENET),
    "deit_tiny_distilled_patch16_224": _row("tiny", 16, 224, 0.9, IMAGENET, {"distilled": True}),
    "deit_small_distilled_patch16_224": _row("small", 16, 224, 0.9, IMAGENET, {"distilled": True}),
    "deit_base_distilled_patch16_224": _row("base", 16, 224, 0.9, IMAGENET, {"distilled": True}),
    "deit_base_distilled_patch16_384": _row("base", 16, 384, 1.0, IMAGENET, {"distilled": True}),
    "deit3_small_patch16_224": _row("small", 16, 224, 0.9, IMAGENET, DEIT3),
    "deit3_small_patch16_384": _row("small", 16, 384, 1.0, IMAGENET, DEIT3),
    "deit3_medium_patch16_224": _row("medium", 16, 224, 0.9, IMAGENET, DEIT3),
    "deit3_base_patch16_224": _row("base", 16, 224, 0.9, IMAGENET, DEIT3),
    "deit3_base_patch16_384": _row("base", 16, 384, 1.0, IMAGENET, DEIT3),
    "deit3_large_patch16_224": _row("large", 16, 224, 0.9, IMAGENET, DEIT3),
    "deit3_large_patch16_384": _row("large", 16, 384, 1.0, IMAGENET, DEIT3),
    "deit3_huge_patch14_224": _row("huge", 14, 224, 0.9, IMAGENET, DEIT3),

    "vit_small_patch14_dinov2": _row("small", 14, 518, 1.0, IMAGENET, LAYER_SCALE),
    "vit_base_patch14_dinov2": _row("base", 14, 518, 1.0, IMAGENET, LAYER_SCALE),
    "vit_large_patch14_dinov2": _row("large", 14, 518, 1.0, IMAGENET, LAYER_SCALE),
    "vit_small_patch14_reg4_dinov2": _row("small", 14, 518, 1.0, IMAGENET, LAYER_SCALE, REGISTERS),
    "vit_base_patch14_reg4_dinov2": _row("base", 14, 518, 1.0, IMAGENET, LAYER_SCALE, REGISTERS),
    "vit_large_patch14_reg4_dinov2": _row("large", 14, 518, 1.0, IMAGENET, LAYER_SCALE, REGISTERS),

    "vit_medium_patch16_gap_240": _row("medium", 16, 240, 0.95, HALF, POOLED_BARE),
    "vit_medium_patch16_gap_256": _row("medium", 16, 256, 0.95, HALF, POOLED_BARE),
    "vit_medium_patch16_gap_384": _row("medium", 16, 384, 0.95, HALF, POOLED_BARE),
    "vit_betwixt_patch16_gap_256": _row("betwixt", 16, 256, 0.95, HALF, POOLED_BARE),
    "vit_base_patch16_gap_224": _row("base", 16, 224, 0.9, HALF, POOLED, {"num_heads": 16}),
    "vit_huge_patch14_gap_224": _row("huge", 14, 224, 0.9, IMAGENET, POOLED),
    "vit_huge_patch16_gap_448": _row("huge", 16, 448, 1.0, IMAGENET, POOLED),
    "vit_giant_patch16_gap_224": _row("giant", 16, 224, 0.9, IMAGENET, POOLED),
    "vit_wee_patch16_reg1_gap_256": _row("wee", 16, 256, 0.95, HALF, POOLED_1, LAYER_SCALE),
    "vit_little_patch16_reg1_gap_256": _row("little", 16, 256, 0.95, HALF, POOLED_1, LAYER_SCALE),
    "vit_little_patch16_reg4_gap_256": _row("little", 16, 256, 0.95, HALF, POOLED_4, LAYER_SCALE),
    "vit_medium_patch16_reg1_gap_256": _row("medium", 16, 256, 0.95, HALF, POOLED_1, LAYER_SCALE),
    "vit_medium_patch16_reg4_gap_256": _row("medium", 16, 256, 0.95, HALF, POOLED_4, LAYER_SCALE),
    "vit_mediumd_patch16_reg4_gap_256": _row("mediumd", 16, 256, 0.95, HALF, POOLED_4, LAYER_SCALE),
    "vit_mediumd_patch16_reg4_gap_384": _row("mediumd", 16, 384, 1.0, HALF, POOLED_4, LAYER_SCALE),
    "vit_betwixt_patch16_reg1_gap_256": _row("betwixt", 16, 256, 0.95, HALF, POOLED_1, LAYER_SCALE),
    "vit_betwixt_patch16_reg4_gap_256": _row("betwixt", 16, 256, 0.95, HALF, POOLED_4, LAYER_SCALE),
    "vit_betwixt_patch16_reg4_gap_384": _row("betwixt", 16, 384, 1.0, HALF, POOLED_4, LAYER_SCALE),
    "vit_base_patch16_reg4_gap_256": _row("base", 16, 256, 0.9, HALF, POOLED_4),
    "vit_so150m_patch16_reg4_gap_256": _row("so150m", 16, 256, 0.95, HALF, POOLED, {"reg_tokens": 4}),
    "vit_so150m_patch16_reg4_gap_384": _row("so150m", 16, 384, 1.0, HALF, POOLED, {"reg_tokens": 4}),
    "vit_so150m2_patch16_reg1_gap_256": _row("so150m2", 16, 256, 1.0, HALF, POOLED_CLASSIC),
    "vit_so150m2_patch16_reg1_gap_384": _row("so150m2", 16, 384, 1.0, HALF, POOLED_CLASSIC),
    "vit_so150m2_patch16_reg1_gap_448": _row("so150m2", 16, 448, 1.0, HALF, POOLED_CLASSIC),
    "vit_so400m_patch14_siglip_gap_378": _row("so400m", 14, 378, 1.0, HALF, POOLED),
    "eva_large_patch14_196": _row("large", 14, 196, 1.0, CLIP, {"global_pool": "avg"}),
    "eva_large_patch14_336": _row("large", 14, 336, 1.0, CLIP, {"global_pool": "avg"}),

    "vit_xsmall_patch16_clip_224": _row("xsmall", 16, 224, 0.9, CLIP, PRE_NORM),
    "vit_medium_patch16_clip_224": _row("medium", 16, 224, 0.9, CLIP, PRE_NORM),
    "vit_medium_patch32_clip_224": _row("medium", 32, 224, 0.9, CLIP, PRE_NORM),
    "vit_betwixt_patch32_clip_224": _row("betwixt", 32, 224, 0.9, CLIP, PRE_NORM),
    "vit_base_patch16_clip_224": _row("base", 16, 224, 0.95, CLIP, PRE_NORM),
    "vit_base_patch16_clip_384": _row("base", 16, 384, 1.0, CLIP, PRE_NORM),
    "vit_base_patch16_plus_clip_240": _row("base_plus", 16, 240, 1.0, CLIP, PRE_NORM),
    "vit_base_patch32_clip_224": _row("base", 32, 224, 0.9, CLIP, PRE_NORM),
    "vit_base_patch32_clip_256": _row("base", 32, 256, 1.0, CLIP, PRE_NORM),
    "vit_base_patch32_clip_384": _row("base", 32, 384, 1.0, CLIP, PRE_NORM),
    "vit_base_patch32_clip_448": _row("base", 32, 448, 1.0, CLIP, PRE_NORM),
    "vit_large_patch14_clip_224": _row("large", 14, 224, 1.0, CLIP, PRE_NORM),
    "vit_large_patch14_clip_336": _row("large", 14, 336, 1.0, CLIP, PRE_NORM),
    "vit_huge_patch14_clip_224": _row("huge", 14, 224, 1.0, CLIP, PRE_NORM),
    "vit_huge_patch14_clip_336": _row("huge", 14, 336, 1.0, CLIP, PRE_NORM),
    "vit_huge_patch14_clip_378": _row("huge", 14, 378, 1.0, CLIP, PRE_NORM),
    "vit_base_patch16_clip_quickgelu_224": _row("base", 16, 224, 1.0, CLIP, QUICK),
    "vit_base_patch32_clip_quickgelu_224": _row("base", 32, 224, 0.9, CLIP, QUICK),
    "vit_large_patch14_clip_quickgelu_224": _row("large", 14, 224, 1.0, CLIP, QUICK),
    "vit_large_patch14_clip_quickgelu_336": _row("large", 14, 336, 1.0, CLIP, QUICK),
    "vit_huge_patch14_clip_quickgelu_224": _row("huge", 14, 224, 1.0, CLIP, QUICK),
    "vit_huge_patch14_clip_quickgelu_378": _row("huge", 14, 378, 1.0, CLIP, QUICK),

    "eva02_base_patch14_224": _row("base", 14, 224, 0.9, CLIP, EVA02_SCALED),
    "eva02_base_patch14_448": _row("base", 14, 448, 1.0, CLIP, EVA02_SCALED),
    "eva02_large_patch14_224": _row("large", 14, 224, 0.9, CLIP, EVA02_SCALED),
    "eva02_large_patch14_448": _row("large", 14, 448, 1.0, CLIP, EVA02_SCALED),
    "eva02_small_patch14_224": _row("small", 14, 224, 0.9, CLIP, EVA02),
    "eva02_small_patch14_336": _row("small", 14, 336, 1.0, CLIP, EVA02),
    "eva02_tiny_patch14_224": _row("tiny", 14, 224, 0.9, CLIP, EVA02),
    "eva02_tiny_patch14_336": _row("tiny", 14, 336, 1.0, CLIP, EVA02),
    "eva_giant_patch14_224": _row("giant", 14, 224, 0.9, CLIP, EVA),
    "eva_giant_patch14_336": _row("giant", 14, 336, 1.0, CLIP, EVA),
    "eva_giant_patch14_560": _row("giant", 14, 560, 1.0, IMAGENET, EVA),
    "eva_giant_patch14_clip_224": _row("giant", 14, 224, 0.9, CLIP, EVA, TOKEN),
    "flexivit_base": _row("base", 16, 240, 0.95, HALF, {"no_embed_class": True}),
    "flexivit_large": _row("large", 16, 240, 0.95, HALF, {"no_embed_class": True}),
    "flexivit_small": _row("small", 16, 240, 0.95, HALF, {"no_embed_class": True}),
    "vit_base_patch14_reg1_tipsv2": _row("base", 14, 448, 1.0, UNIT, TIPS),
    "vit_base_patch16_224_miil": _row("base", 16, 224, 0.875, UNIT_BILINEAR, BARE),
    "vit_base_patch16_dinov3": _row("base", 16, 256, 1.0, IMAGENET, DINO3, BARE),
    "vit_base_patch16_dinov3_qkvb": _row("base", 16, 256, 1.0, IMAGENET, DINO3),
    "vit_base_patch16_lingbot": _row("base", 16, 512, 1.0, BILINEAR, DINO3, TOKEN),
    "vit_base_patch16_siglip_224": _row("base", 16, 224, 0.9, HALF, MAP),
    "vit_base_patch16_siglip_256": _row("base", 16, 256, 0.9, HALF, MAP),
    "vit_base_patch16_siglip_384": _row("base", 16, 384, 0.9, HALF, MAP),
    "vit_base_patch16_siglip_512": _row("base", 16, 512, 0.9, HALF, MAP),
    "vit_base_patch16_siglip_gap_224": _row("base", 16, 224, 0.9, HALF, POOLED),
    "vit_base_patch16_siglip_gap_256": _row("base", 16, 256, 0.9, HALF, POOLED),
    "vit_base_patch16_siglip_gap_384": _row("base", 16, 384, 0.9, HALF, POOLED),
    "vit_base_patch16_siglip_gap_512": _row("base", 16, 512, 0.9, HALF, POOLED),
    "vit_base_patch32_siglip_256": _row("base", 32, 256, 0.9, HALF, MAP, TANH),
    "vit_base_patch32_siglip_gap_256": _row("base", 32, 256, 0.9, HALF, POOLED, TANH),
    "vit_giant_patch14_clip_224": _row("giant", 14, 224, 1.0, CLIP, PRE_NORM),
    "vit_giant_patch14_dinov2": _row("giant_1536", 14, 518, 1.0, IMAGENET, GATED),
    "vit_giant_patch14_reg1_tipsv2": _row("giant_1536", 14, 448, 1.0, UNIT, GATED, TIPS),
    "vit_giant_patch14_reg4_dinov2": _row("giant_1536", 14, 518, 1.0, IMAGENET, REGISTERS, GATED),
    "vit_giant_patch16_lingbot": _row("giant_1536", 16, 512, 1.0, BILINEAR, DINO3, BARE, SWIGLU8, TOKEN),
    "vit_giantopt_patch16_siglip_256": _row("giantopt", 16, 256, 0.9, HALF, MAP, TANH),
    "vit_giantopt_patch16_siglip_384": _row("giantopt", 16, 384, 0.9, HALF, MAP, TANH),
    "vit_giantopt_patch16_siglip_gap_256": _row("giantopt", 16, 256, 0.9, HALF, POOLED, TANH),
    "vit_giantopt_patch16_siglip_gap_384": _row("giantopt", 16, 384, 0.9, HALF, POOLED, TANH),
    "vit_gigantic_patch14_clip_224": _row("gigantic", 14, 224, 1.0, CLIP, PRE_NORM),
    "vit_gigantic_patch14_clip_378": _row("gigantic", 14, 378, 1.0, CLIP, PRE_NORM),
    "vit_gigantic_patch14_clip_quickgelu_224": _row("gigantic", 14, 224, 1.0, CLIP, QUICK),
    "vit_huge_plus_patch16_dinov3": _row("huge_plus", 16, 256, 1.0, IMAGENET, DINO3, BARE, SWIGLU),
    "vit_huge_plus_patch16_dinov3_qkvb": _row("huge_plus", 16, 256, 1.0, IMAGENET, DINO3, SWIGLU),
    "vit_large_patch14_reg1_tipsv2": _row("large", 14, 448, 1.0, UNIT, TIPS),
    "vit_large_patch16_dinov3": _row("large", 16, 256, 1.0, IMAGENET, DINO3, BARE),
    "vit_large_patch16_dinov3_qkvb": _row("large", 16, 256, 1.0, IMAGENET, DINO3),
    "vit_large_patch16_lingbot": _row("large", 16, 512, 1.0, BILINEAR, DINO3, TOKEN),
    "vit_large_patch16_siglip_256": _row("large", 16, 256, 0.9, HALF, MAP),
    "vit_large_patch16_siglip_384": _row("large", 16, 384, 0.9, HALF, MAP),
    "vit_large_patch16_siglip_512": _row("large", 16, 512, 0.9, HALF, MAP, TANH),
    "vit_large_patch16_siglip_gap_256": _row("large", 16, 256, 0.9, HALF, POOLED),
    "vit_large_patch16_siglip_gap_384": _row("large", 16, 384, 0.9, HALF, POOLED),
    "vit_large_patch16_siglip_gap_512": _row("large", 16, 512, 0.9, HALF, POOLED, TANH),
    "vit_small_patch16_dinov3": _row("small", 16, 256, 1.0, IMAGENET, DINO3, BARE),
    "vit_small_patch16_dinov3_qkvb": _row("small", 16, 256, 1.0, IMAGENET, DINO3),
    "vit_small_patch16_lingbot": _row("small", 16, 512, 1.0, BILINEAR, DINO3, TOKEN),
    "vit_small_plus_patch16_dinov3": _row("small", 16, 256, 1.0, IMAGENET, DINO3, BARE, SWIGLU),
    "vit_small_plus_patch16_dinov3_qkvb": _row("small", 16, 256, 1.0, IMAGENET, DINO3, SWIGLU),
    "vit_so150m_patch16_reg4_map_256": _row("so150m", 16, 256, 0.9, HALF, MAP, {"reg_tokens": 4}),
    "vit_so400m_patch14_reg1_tipsv2": _row("so400m", 14, 448, 1.0, UNIT, TIPS, {"mlp_ratio": 3.736111111111111}),
    "vit_so400m_patch14_siglip_224": _row("so400m", 14, 224, 0.9, HALF, MAP),
    "vit_so400m_patch14_siglip_378": _row("so400m", 14, 378, 0.9, HALF, MAP),
    "vit_so400m_patch14_siglip_gap_224": _row("so400m", 14, 224, 0.9, HALF, POOLED),
    "vit_so400m_patch14_siglip_gap_448": _row("so400m", 14, 448, 1.0, HALF, POOLED),
    "vit_so400m_patch14_siglip_gap_896": _row("so400m", 14, 896, 1.0, HALF, POOLED),
    "vit_so400m_patch16_siglip_256": _row("so400m", 16, 256, 0.9, HALF, MAP, TANH),
    "vit_so400m_patch16_siglip_384": _row("so400m", 16, 384, 0.9, HALF, MAP, TANH),
    "vit_so400m_patch16_siglip_512": _row("so400m", 16, 512, 0.9, HALF, MAP, TANH),
    "vit_so400m_patch16_siglip_gap_256": _row("so400m", 16, 256, 0.9, HALF, POOLED, TANH),
    "vit_so400m_patch16_siglip_gap_384": _row("so400m", 16, 384, 0.9, HALF, POOLED, TANH),
    "vit_so400m_patch16_siglip_gap_512": _row("so400m", 16, 512, 0.9, HALF, POOLED, TANH),
    "vit_tiny_patch16_dinov3_qkvb": _row("tiny", 16, 256, 1.0, IMAGENET, DINO3),
    "vit_intern300m_patch14_448": _row("large", 14, 448, 1.0, IMAGENET, {"init_values": 0.1, "final_norm": False}),
}

SQUASHED = (
    *("vit_medium_patch16_gap_384.*", "vit_so150m2_patch16_reg1_gap_448.*", "vit_so400m_*_378.webli_ft_in1k"),
    *("eva_large_patch14_336.*", "eva_giant_patch14_336.*", "eva_giant_patch14_560.*", "eva02_*_448.*_ft_in22k*"),
    *("vit_base_patch16_clip_384.*", "vit_large_patch14_clip_336.*_in1k", "vit_huge_patch14_clip_336.*"),
    *("*_clip_378.metaclip2_worldwide", "vit_*_lingbot.*"),
)
# Weights whose preprocessing is not that of their architecture's row: pattern of "name.tag" -> fields; of two that
# match and set the same field, the last wins.
TAGS: dict[str, dict[str, Any]] = {
    "vit_*.dino": {**IMAGENET},
    "vit_*.mae": {**IMAGENET},
    "vit_base_patch16_224.bamboo": {**CLIP, "crop_pct": 1.0},
    "vit_huge_patch14_gap_224.untrained": {**HALF},
    "deit3_*_224.fb_in22k_ft_in1k": {"crop_pct": 1.0},
    "vit_large_patch14_clip_*.laion2b*": {**HALF},
    "vit_so400m_patch14_siglip_gap_378.v2_webli": {"crop_pct": 0.9},
    "vit_so400m_patch14_siglip_378.webli_ft_in1k": {"crop_pct": 1.0},
    "eva_giant_patch14_336.m30m_ft_in22k_in1k": {**IMAGENET},
    "vit_large_patch16_dinov3*.sat493m": {"mean": (0.43, 0.411, 0.296), "std": (0.213, 0.156, 0.143)},
    "vit_base_patch16_clip_224.*": {"crop_pct": 1.0},
    "vit_base_patch16_clip*_224.openai*": {"crop_pct": 0.9},
    "vit_base_patch16_clip_224.*_ft_in12k": {"crop_pct": 0.9},
    "vit_base_patch16_clip_224.*_ft_in12k_in1k": {"crop_pct": 0.95},
    "vit_base_patch*_clip_384.openai_ft_in12k_in1k": {"crop_pct": 0.95, "crop_mode": "squash"},
    "vit_base_patch32_clip*_224.datacompxl": {"crop_pct": 1.0},
    "vit_base_patch32_clip*_224.metaclip_*": {"crop_pct": 1.0},
    **{pattern: {"crop_mode": "squash"} for pattern in SQUASHED},
}
# fmt: on
LARGEST = {
    "img_size": 4096,
    "patch_size": 256,
    "embed_dim": 8192,
    "depth": 200,
    "num_heads": 256,
    "num_classes": 1_000_000,
    "reg_tokens": 256,
    "in_chans": 64,
}  # fmt: skip
LARGEST_TOKENS = 65_536  # of 4096 pixels in patches of 16


def _whole(option: str, lowest: int = 1) -> Any:
    return Annotated[int, Ge(lowest), Le(LARGEST[option])]


def _number(largest: float) -> Any:
    return Annotated[float, Ge(0), Le(largest)]


OPTIONS: dict[str, Any] = {  # what each option of a model may be
    "img_size": tuple[_whole("img_size"), _whole("img_size")],
    "patch_size": _whole("patch_size") | tuple[_whole("patch_size"), _whole("patch_size")],
    **{name: _whole(name) for name in ("embed_dim", "depth", "num_heads")},
    **{name: _whole(name, 0) for name in ("num_classes", "reg_tokens")},
    **dict.fromkeys(("qkv_bias", "k_bias", "qk_norm", "proj_bias", "class_token", "distilled"), bool),
    **dict.fromkeys(("no_embed_class", "pre_norm", "final_norm", "scale_mlp_norm"), bool),
    "fc_norm": bool | None,
    "mlp_ratio": _number(64),
    "norm_eps": _number(0.1),
    "init_values": _number(1e4) | None,
    "global_pool": Literal["token", "avg", "cat", "map", "prefix"],
    "activation": Literal["gelu", "quick_gelu", "gelu_tanh"],
    "mlp_layer": Literal["mlp", "swiglu", "swiglu_packed"],
    "pos_embed": Literal["learn", "none"],
    "rope_type": Literal["cat", "dinov3"] | None,
    "rope_temperature": Annotated[float, Ge(1), Le(1e9)],
    "ref_feat_shape": tuple[_whole("img_size"), _whole("img_size")] | None,
    "in_chans": _whole("in_chans"),
    "stride": _whole("patch_size") | tuple[_whole("patch_size"), _whole("patch_size")] | None,
}
LATER: Config = {"in_chans": 3, "stride": None}  # a description says them where they are not so
# Other options of timm's VisionTransformer: those that change nothing of a trained model's forward pass, and those of
# which one value is supported.
WITHOUT_EFFECT = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "dynamic_img_size", "device", "dtype"),
)
ONLY: dict[str, Any] = {
    "scale_attn_norm": False,
    "pool_include_prefix": False,
    "dynamic_img_pad": False,
    **dict.fromkeys(("embed_layer", "embed_norm_layer", "norm_layer", "act_layer", "block_fn", "attn_layer")),
}


@functools.cache
def _tags() -> dict[str, list[str]]:
    tags: dict[str, list[str]] = read_json(Path(__file__).with_name("timm_tags.json"))
    return tags


def tags_of(base: str) -> list[str]:
    """The tags of timm's weights on the hub of a name of the table; the default one is the first.

    Made by `tests/goldens/make_timm_goldens.py`, from timm itself.
    """
    return _tags()[base]


def repository_of(name: str) -> tuple[str, str]:
    """("deit_tiny_patch16_224.fb_in1k", its repository on the hub), for a name of the table with or without tag.

    Raises InputError for a tag that timm does not know, and for a name without weights on the hub.
    """
    base, _, tag = name.partition(".")
    tags = tags_of(base)
    if not tags:
        raise InputError(f"timm offers no weights of {base!r} on the hub: give a checkpoint")
    if tag and tag not in tags:
        raise suggest("weights", tag, tags, of=base)
    name = f"{base}.{tag or tags[0]}"
    # Two models that differ in the activation share a file's name; one family is not uploaded by timm.
    owner = "belfner" if base.endswith("_lingbot") else "timm"
    return name, f"{owner}/{name.replace('_quickgelu', '')}"


def architecture(name: str, **overrides: Any) -> tuple[Config, Preprocessing]:
    """Configuration and preprocessing of a timm name, with or without tag ("vit_base_patch16_224.dino").

    Without a tag, the preprocessing is that of timm's default weights, as with `timm.create_model`. `overrides`
    replace entries of the configuration; the preprocessing follows `img_size`.
    Raises InputError, with the nearest known name, when the table lacks `name`.
    """
    base, _, tag = str(name).partition(".")
    if base not in ARCHITECTURES:
        raise suggest("model", base, ARCHITECTURES)
    config, preprocessing = ARCHITECTURES[base]
    tag = tag or next(iter(tags_of(base)), "")
    for pattern, fields in TAGS.items():
        if fnmatch.fnmatchcase(f"{base}.{tag}", pattern):
            preprocessing = dataclasses.replace(preprocessing, **fields)
    config = config | overrides
    if "img_size" in overrides:
        preprocessing = dataclasses.replace(preprocessing, size=_checked("img_size", config["img_size"]))
    return config, preprocessing


def build(
    config: Mapping[str, Any] | str,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    dtype: Any = None,
) -> ViT:
    """The module of a configuration (keys of timm's VisionTransformer) or of a name of the table.

    Args:
        config: besides timm's keys, `distilled`, `activation` ("gelu", "quick_gelu", "gelu_tanh") and `norm_eps`.
        img_size: side or (height, width) in pixels, in place of the configuration's.
        num_classes: in place of the configuration's.
        dtype: type of the activations, such as "bfloat16"; None: that of the images.

    Raises:
        InputError: an unknown key, a wrong type, or a value that the model does not support; names the key.
    """
    if isinstance(config, str):
        config = architecture(config)[0]
    if not isinstance(config, Mapping):
        raise InputError(f"a model is a name or a mapping of options, got {type(config).__name__}")
    given = {"img_size": img_size, "num_classes": num_classes}
    options = {**config, **{key: value for key, value in given.items() if value is not None}}
    options = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT}
    for key, only in ONLY.items():
        if options.pop(key, only) != only:
            raise InputError(f"model option {key!r} must be {only!r}: nothing else is supported")
    for key, value in options.items():
        if key not in OPTIONS:
            raise suggest("model option", key, OPTIONS)
        options[key] = _checked(key, value)
    module = ViT(**options, dtype=dtype_of(dtype))
    _check_together(module)
    return module


def config_of(module: ViT) -> Config:
    """The configuration from which `build` makes this module, in JSON types."""
    values = {name: getattr(module, name) for name in OPTIONS}
    values = {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _checked(key: str, value: Any) -> Any:
    """`value` in the type of the option, or InputError."""
    if key == "img_size" or (key == "ref_feat_shape" and value is not None):
        value = _pair(value)
    if key in ("patch_size", "stride") and isinstance(value, list | tuple):
        value = value[0] if len(value) == 2 and value[0] == value[1] else tuple(value)
    return checked(f"model option {key!r}", OPTIONS[key], value)


def _pair(value: Any) -> Any:
    """A side as (height, width), and a list of JSON as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def dtype_of(dtype: Any) -> Any:
    """A type of activations by its name. Raises InputError for what is no floating-point type."""
    if dtype is None:
        return None
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise InputError(f"dtype must be a floating-point type such as 'float32' or 'bfloat16', got {dtype!r}")
    return kind


def _check_together(module: ViT) -> None:
    """Refuse combinations of options that make no model."""
    tokens = module.grid[0] * module.grid[1] + module.prefix
    if tokens > LARGEST_TOKENS:
        raise InputError(f"model option 'patch_size': {tokens} tokens are more than {LARGEST_TOKENS}")
    for side, patch, stride in zip(module.img_size, *module.tiling, strict=True):
        if side < patch or (stride == patch and side % patch):
            raise InputError(f"model option 'img_size': {side} is not a multiple of the patch size {patch}")
        if stride > patch:
            raise InputError(f"model option 'stride': {stride} leaves gaps between patches of {patch}")
    if module.embed_dim % module.num_heads:
        raise InputError(
            f"model option 'num_heads': {module.num_heads} heads do not divide the width {module.embed_dim}"
        )
    if int(module.embed_dim * module.mlp_ratio) < 1:
        raise InputError(f"model option 'mlp_ratio': {module.mlp_ratio} leaves the FFN without hidden units")
    if module.global_pool in ("token", "cat") and not module.class_token:
        raise InputError(f"model option 'global_pool': {module.global_pool!r} needs a class token; use 'avg'")
    if module.global_pool == "prefix" and not module.prefix:
        raise InputError("model option 'global_pool': 'prefix' needs a token before the patches; use 'avg'")
    if module.rope_type is not None and module.embed_dim // module.num_heads % 4:
        raise InputError("model option 'rope_type': rotary positions need heads whose width is a multiple of 4")
    if module.distilled and not module.num_classes:
        raise InputError("model option 'distilled' needs classes")
    if module.distilled and not (module.class_token and module.global_pool == "token"):
        raise InputError("model option 'distilled' needs a class token and global_pool='token'")
    if module.distilled and module.fc_norm:
        raise InputError("model option 'distilled' needs the norm before pooling: fc_norm=False")


def parameter_count(module: ViT) -> int:
    """Number of parameters, by arithmetic: tracing all architectures would take many seconds."""
    d, hidden = module.embed_dim, int(module.embed_dim * module.mlp_ratio)
    biases = (3 if module.k_bias else 2) * module.qkv_bias
    attention = 3 * d * d + biases * d + d * (d + module.proj_bias) + 4 * module.qk_norm * (d // module.num_heads)
    feed_forward = (1 if module.mlp_layer == "mlp" else 2) * hidden * (d + 1) + d * (hidden + 1)
    scales = 0 if module.init_values is None else 2 * d
    block = attention + feed_forward + 2 * module.scale_mlp_norm * hidden + 4 * d + scales
    positions = module.grid[0] * module.grid[1] + (0 if module.no_embed_class else module.prefix)
    positions *= module.pos_embed == "learn"
    (high, wide), _ = module.tiling
    embedding = d * (module.in_chans * high * wide + (not module.pre_norm) + module.prefix + positions)
    norms = 2 * d * (module.final_norm * (1 + (module.global_pool == "prefix")) + module.pre_norm)
    pool = 0
    if module.global_pool == "map":  # the query, four linear maps of attention, a norm and an FFN layer
        pool = d + 4 * d * (d + 1) + 2 * d + hidden * (d + 1) + d * (hidden + 1)
    heads = (d * (1 + (module.global_pool == "cat")) + 1) * module.num_classes * (1 + module.distilled)
    return embedding + module.depth * block + norms + pool + heads
