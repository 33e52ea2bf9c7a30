"""Explanations of Vision Transformers in JAX: TokenTM, its baselines, and their evaluation."""

import importlib
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# The public names are those of __init__.pyi. Each is imported on first use, so `tokentm --help` does not wait for JAX.
_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_ROWS = "rows PAPER_ROWS COMPONENT_ROWS CHOICE_ROWS READING_ROWS WEIGHT_ROWS TEXT_ROWS MIX_ROWS PIXEL_ROWS depth_rows "
_MOVED = {
    **dict.fromkeys(("TrainConfig", "TextTrainConfig"), "models.training.recipe"),  # out of the package
    **dict.fromkeys((*_ROWS.split(), "sanity_rows"), "tokentm_jax.configs"),
    **dict.fromkeys(("LoadedViT", "LoadedText", "load_text"), "tokentm_jax"),
    "TextEvaluateConfig": "tokentm_jax.configs",
}
_RENAMED = {"LoadedViT": "Model", "LoadedText": "Model", "load_text": "load", "TextEvaluateConfig": "eraser_config"}


def __getattr__(name: str) -> Any:
    return _moved(name, _MOVED[name]) if name in _MOVED else _public(name)


def _moved(name: str, home: str) -> Any:
    """A name that was public here once, from its new place, which may be in a clone only."""
    import warnings

    from tokentm_jax.errors import InputError

    try:
        found = getattr(importlib.import_module(home), now := _RENAMED.get(name, name))
    except (ImportError, AttributeError):  # or there is another package of this name
        raise InputError(f"{name} is now in {home}: training is run from a clone of the repository") from None
    warnings.warn(f"tokentm_jax.{name} is now {home}.{now}", DeprecationWarning, stacklevel=3)
    return found
