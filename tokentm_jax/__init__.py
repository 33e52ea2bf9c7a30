"""Explanations of Vision Transformers in JAX: TokenTM, its baselines, and their evaluation."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported on first use, so that `tokentm --help` does not wait for JAX.
_HOMES = {
    "load": "loading",
    "LoadedViT": "loading",
    "explain": "interface",
    "explain_fn": "interface",
    "open_maps": "store",
    "over_devices": "sharding",
    "over_width": "sharding",
    "METHODS": "methods",
    "combine": "maps",
    "to_pixels": "maps",
    "capture": "trace",
    "Trace": "trace",
    "TokenTM": "tokentm",
    "contributions": "tokentm",
    "ViT": "vit",
    "init_params": "vit",
    "ARCHITECTURES": "architectures",
    "build": "architectures",
    "Preprocessing": "preprocessing",
    "read_checkpoint": "checkpoint",
    "write_checkpoint": "checkpoint",
    "InputError": "errors",
}

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from tokentm_jax.architectures import ARCHITECTURES as ARCHITECTURES
    from tokentm_jax.architectures import build as build
    from tokentm_jax.checkpoint import read_checkpoint as read_checkpoint
    from tokentm_jax.checkpoint import write_checkpoint as write_checkpoint
    from tokentm_jax.errors import InputError as InputError
    from tokentm_jax.interface import explain as explain
    from tokentm_jax.interface import explain_fn as explain_fn
    from tokentm_jax.loading import LoadedViT as LoadedViT
    from tokentm_jax.loading import load as load
    from tokentm_jax.maps import combine as combine
    from tokentm_jax.maps import to_pixels as to_pixels
    from tokentm_jax.methods import METHODS as METHODS
    from tokentm_jax.preprocessing import Preprocessing as Preprocessing
    from tokentm_jax.sharding import over_devices as over_devices
    from tokentm_jax.sharding import over_width as over_width
    from tokentm_jax.store import open_maps as open_maps
    from tokentm_jax.tokentm import TokenTM as TokenTM
    from tokentm_jax.tokentm import contributions as contributions
    from tokentm_jax.trace import Trace as Trace
    from tokentm_jax.trace import capture as capture
    from tokentm_jax.vit import ViT as ViT
    from tokentm_jax.vit import init_params as init_params


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokentm_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tokentm_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
