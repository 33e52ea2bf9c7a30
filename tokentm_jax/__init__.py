"""Explanations of Vision Transformers in JAX: TokenTM, its baselines, and their evaluation."""

import importlib
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# The public names are those of __init__.pyi. Each is imported on first use, so `tokentm --help` does not wait for JAX.
_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_ROOMS = {
    "configs": "rows PAPER_ROWS COMPONENT_ROWS CHOICE_ROWS READING_ROWS WEIGHT_ROWS TEXT_ROWS CAUSE_ROWS MIX_ROWS "
    "PIXEL_ROWS READINGS depth_rows sanity_rows",
    "inputs": "Preprocessing Spectrogram Tokens Word",
    "maths": "contributions",
    "models": "ViT Bert build init_params ARCHITECTURES PlainModel read_checkpoint write_checkpoint over_devices "
    "over_width",
}
_MOVED = {  # what was public here once, and where it is now
    **{name: f"tokentm_jax.{room}.{name}" for room, names in _ROOMS.items() for name in names.split()},
    **{name: f"models.training.recipe.{name}" for name in ("TrainConfig", "TextTrainConfig")},  # out of the package
    **{"LoadedViT": "tokentm_jax.Model", "LoadedText": "tokentm_jax.Model", "load_text": "tokentm_jax.load"},
    "DatasetConfig": "tokentm_jax.Explainer",
    "TextEvaluateConfig": "tokentm_jax.configs.eraser_config",
}


def __getattr__(name: str) -> Any:
    return _moved(name) if name in _MOVED else _public(name)


def _moved(name: str) -> Any:
    """A name that was public here once, from its new place, which may be in a clone only."""
    import warnings

    from tokentm_jax.errors import InputError

    home, _, now = _MOVED[name].rpartition(".")
    try:
        found = getattr(importlib.import_module(home), now)
    except (ImportError, AttributeError):  # or there is another package of this name
        raise InputError(f"{name} is now in {home}: training is run from a clone of the repository") from None
    warnings.warn(f"tokentm_jax.{name} is now {_MOVED[name]}", DeprecationWarning, stacklevel=3)
    return found
