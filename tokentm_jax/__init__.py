"""Explanations of Vision Transformers in JAX: TokenTM, its baselines, and their evaluation."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported on first use, so that `tokentm --help` does not wait for JAX.
_HOMES = {
    "load": "models.loading",
    "load_text": "models.texts",
    "LoadedText": "models.texts",
    "words": "models.texts",
    "Word": "models.texts",
    "Bert": "models.bert",
    "Tokens": "models.inputs",
    "weights": "maths",
    "LoadedViT": "models.loading",
    "explain": "methods.explain",
    "explain_fn": "methods.explain",
    "methods_for": "methods.explain",
    "inspect": "methods.explain",
    "open_maps": "runs.store",
    "show": "cli.show",
    "over_devices": "models.sharding",
    "over_width": "models.sharding",
    "METHODS": "methods.table",
    "combine": "maths.maps",
    "to_pixels": "maths.maps",
    "capture": "programs.capture",
    "Trace": "programs.capture",
    "PlainModel": "models.plain",
    "scores": "maths",
    "TokenTM": "maths.tokentm",
    "READINGS": "maths.tokentm",
    "contributions": "maths.tokentm",
    "ViT": "models.vit",
    "init_params": "models.vit",
    "ARCHITECTURES": "models.architectures",
    "build": "models.architectures",
    "Preprocessing": "data.preprocessing",
    "Spectrogram": "data.audio",
    "read_checkpoint": "models.checkpoint",
    "write_checkpoint": "models.checkpoint",
    "InputError": "errors",
    "EvaluateConfig": "metrics.tasks",
    "Row": "metrics.tasks",
    "rows": "metrics.tasks",
    "PAPER_ROWS": "metrics.tasks",
    "COMPONENT_ROWS": "metrics.tasks",
    "CHOICE_ROWS": "metrics.tasks",
    "READING_ROWS": "metrics.tasks",
    "WEIGHT_ROWS": "metrics.tasks",
    "TEXT_ROWS": "metrics.tasks",
    "TextEvaluateConfig": "runs.evaluate_text",
    "MIX_ROWS": "metrics.tasks",
    "PIXEL_ROWS": "metrics.tasks",
    "depth_rows": "metrics.tasks",
    "sanity_rows": "metrics.tasks",
    "LeaderboardConfig": "runs.leaderboard",
    "sample_data": "samples",
}

_MOVED = {"TrainConfig": "models.training.recipe", "TextTrainConfig": "models.training.recipe"}  # out of the package

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from tokentm_jax.cli.show import show as show
    from tokentm_jax.data.audio import Spectrogram as Spectrogram
    from tokentm_jax.data.preprocessing import Preprocessing as Preprocessing
    from tokentm_jax.errors import InputError as InputError
    from tokentm_jax.maths import scores as scores
    from tokentm_jax.maths import weights as weights
    from tokentm_jax.maths.maps import combine as combine
    from tokentm_jax.maths.maps import to_pixels as to_pixels
    from tokentm_jax.maths.tokentm import READINGS as READINGS
    from tokentm_jax.maths.tokentm import TokenTM as TokenTM
    from tokentm_jax.maths.tokentm import contributions as contributions
    from tokentm_jax.methods.explain import explain as explain
    from tokentm_jax.methods.explain import explain_fn as explain_fn
    from tokentm_jax.methods.explain import inspect as inspect
    from tokentm_jax.methods.explain import methods_for as methods_for
    from tokentm_jax.methods.table import METHODS as METHODS
    from tokentm_jax.metrics.tasks import CHOICE_ROWS as CHOICE_ROWS
    from tokentm_jax.metrics.tasks import COMPONENT_ROWS as COMPONENT_ROWS
    from tokentm_jax.metrics.tasks import MIX_ROWS as MIX_ROWS
    from tokentm_jax.metrics.tasks import PAPER_ROWS as PAPER_ROWS
    from tokentm_jax.metrics.tasks import PIXEL_ROWS as PIXEL_ROWS
    from tokentm_jax.metrics.tasks import READING_ROWS as READING_ROWS
    from tokentm_jax.metrics.tasks import TEXT_ROWS as TEXT_ROWS
    from tokentm_jax.metrics.tasks import WEIGHT_ROWS as WEIGHT_ROWS
    from tokentm_jax.metrics.tasks import EvaluateConfig as EvaluateConfig
    from tokentm_jax.metrics.tasks import Row as Row
    from tokentm_jax.metrics.tasks import depth_rows as depth_rows
    from tokentm_jax.metrics.tasks import rows as rows
    from tokentm_jax.metrics.tasks import sanity_rows as sanity_rows
    from tokentm_jax.models.architectures import ARCHITECTURES as ARCHITECTURES
    from tokentm_jax.models.architectures import build as build
    from tokentm_jax.models.bert import Bert as Bert
    from tokentm_jax.models.checkpoint import read_checkpoint as read_checkpoint
    from tokentm_jax.models.checkpoint import write_checkpoint as write_checkpoint
    from tokentm_jax.models.inputs import Tokens as Tokens
    from tokentm_jax.models.loading import LoadedViT as LoadedViT
    from tokentm_jax.models.loading import load as load
    from tokentm_jax.models.plain import PlainModel as PlainModel
    from tokentm_jax.models.sharding import over_devices as over_devices
    from tokentm_jax.models.sharding import over_width as over_width
    from tokentm_jax.models.texts import LoadedText as LoadedText
    from tokentm_jax.models.texts import Word as Word
    from tokentm_jax.models.texts import load_text as load_text
    from tokentm_jax.models.texts import words as words
    from tokentm_jax.models.vit import ViT as ViT
    from tokentm_jax.models.vit import init_params as init_params
    from tokentm_jax.programs.capture import Trace as Trace
    from tokentm_jax.programs.capture import capture as capture
    from tokentm_jax.runs.evaluate_text import TextEvaluateConfig as TextEvaluateConfig
    from tokentm_jax.runs.leaderboard import LeaderboardConfig as LeaderboardConfig
    from tokentm_jax.runs.store import open_maps as open_maps
    from tokentm_jax.samples import sample_data as sample_data


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return _moved(name, _MOVED[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'tokentm_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tokentm_jax.{_HOMES[name]}"), name)


def _moved(name: str, home: str) -> Any:
    """A name that was public once, from its new place in a clone."""
    import warnings

    from tokentm_jax.errors import InputError

    try:
        found = getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError):  # or there is another package of this name
        raise InputError(f"{name} is now in {home}: training is run from a clone of the repository") from None
    warnings.warn(f"tokentm_jax.{name} is now {home}.{name}", DeprecationWarning, stacklevel=3)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
