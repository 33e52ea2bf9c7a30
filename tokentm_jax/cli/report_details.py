"""What the page of `tokentm report` shows of one photo, recording or text: maps, curves and blocks, as JSON.

Maps are numbers: colours are put on them by the page.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from tokentm_jax import metrics
from tokentm_jax.cli.heatmaps import softmax
from tokentm_jax.cli.terminal import complain, memory_errors
from tokentm_jax.configs import Row
from tokentm_jax.data.examples import kind_of
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.pictures import Panel, as_base64
from tokentm_jax.inputs.values import looked_up
from tokentm_jax.methods.by_block import Layer, by_block
from tokentm_jax.methods.explain import explain
from tokentm_jax.models.loading import Model, predict

LARGE = 384  # pixels of a picture, of the longer side
LARGEST_MAP = 112  # values along a side of a map on the page; maps of more are averaged
Json = dict[str, Any]


# ---- numbers and pictures as text -----------------------------------------------------------------------------------


def packed(array: Any) -> Json:
    """Numbers [..., h, w] as base64 of 16 bits each, between the least and the greatest."""
    array = np.nan_to_num(np.asarray(array, np.float64), posinf=0, neginf=0)
    low, high = float(array.min()), float(array.max())
    levels = np.round((array - low) / ((high - low) or 1) * 65535).astype("<u2")
    return {"shape": array.shape, "low": low, "high": high, "data": as_base64(levels.tobytes())}


def packed_map(heatmap: np.ndarray) -> Json:
    """One map [h, w], of at most `LARGEST_MAP` values along a side."""
    scale = LARGEST_MAP / max(heatmap.shape)
    if scale < 1 and len(heatmap) > 1:  # words are not averaged
        size = (round(heatmap.shape[1] * scale), round(heatmap.shape[0] * scale))
        finite = np.nan_to_num(heatmap.astype(np.float32), posinf=0, neginf=0)
        heatmap = np.asarray(Image.fromarray(finite).resize(size, Image.Resampling.BOX))
    return packed(heatmap)


def panel_of(content: Any, name: str, reader: Any, profile: str = "default") -> Any:
    """What maps of an example are shown on; the whole photo where no model is known."""
    side = LARGE
    if reader is not None:
        return reader.panel(content, name, side, profile)
    if not isinstance(content, Image.Image):
        raise InputError(f"without the model, a report shows photos, and this is a {kind_of(content)}")
    content.thumbnail((side, side))
    return Panel(np.asarray(content.convert("RGB")), name)


# ---- explanations ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _programs(module: Any, preprocessing: Any) -> tuple[Any, Any]:
    """Compiled: the curves of maps, and TokenTM block by block."""

    def curves(params: Any, given: Any, maps: Array, target: Array) -> Array:
        inputs = looked_up(given, module, params)
        rows = jnp.nan_to_num(maps).reshape(len(maps), -1, maps.shape[-1])  # of texts [B, 1, N]
        model = partial(predict, module, preprocessing, params)
        pixels = preprocessing.to_pixels(rows, inputs, module)
        found = metrics.perturbation(model, inputs, pixels, target, jnp.full(len(maps), -1))
        return jnp.nan_to_num(jnp.exp(found["log_probability"]))  # [B, 2, 9]

    def blocks(params: Any, images: Array, target: Array) -> Any:
        return by_block(module, params, preprocessing.normalise(images), target)

    return jax.jit(curves), jax.jit(blocks)


class Photos(NamedTuple):
    """What is explained of photos: by which methods, and for which classes."""

    vit: Model
    rows: Sequence[Row]
    top: int  # number of the most probable classes
    target: int | None = None  # a class beside them
    strict: bool = True  # a method that cannot explain this model is an error; else it is left out
    score: str | None = None  # of a run, instead of the class: only of the predicted one, and without curves

    def explain(self, levels: Any, labels: np.ndarray, panels: Sequence[Any]) -> list[Json]:
        """The details of a batch of the reader's `levels` with labels [B], -1 where unknown."""
        vit, reader = self.vit, self.vit.preprocessing
        images = reader.unit(levels)
        logits = np.asarray(vit.logits(images), np.float64)
        if not np.isfinite(logits).all():
            raise InputError(f"{vit.name} gives no finite numbers for these photos")
        probabilities = softmax(logits)
        order = np.argsort(-probabilities, axis=-1, kind="stable").astype(np.int32)
        asked = [*order.T[: self.top]]
        asked += [] if self.target is None else [np.full_like(order[:, 0], self.target)]
        known = (labels >= 0) & (labels < logits.shape[1])
        if known.any() and self.score is None:
            asked.append(np.where(known, labels, order[:, 0]).astype(np.int32))
        found = [
            details_of(reader.size, shares(own, order[i, :5]), shares(own, np.array(asked)[:, i]))
            for i, own in enumerate(probabilities)
        ]
        asked = [asked[k] for k in range(len(asked)) if not any((asked[k] == own).all() for own in asked[:k])]
        for row in self.rows:
            try:
                self._add(row, images, asked, found, panels)
            except InputError as error:
                if self.strict:
                    raise
                complain(f"{row.name} is left out: {error}")
        for classes in asked if self.score is None and panels[0].axes == 2 else ():
            self._add_blocks(images, classes, found)
        return [entry | panel.page(LARGE) for entry, panel in zip(found, panels, strict=True)]

    def _add(
        self, row: Row, images: Any, asked: Sequence[np.ndarray], found: list[Json], panels: Sequence[Any]
    ) -> None:
        """The maps of one method for every class that is asked for, and their curves."""
        vit: Any = self.vit
        module, reader, options = vit.module, vit.preprocessing, dict[str, Any](row.options)
        score = None if self.score is None else vit.score(self.score)
        maps: Any = None
        for classes in asked:
            if maps is None or row.class_specific:
                with memory_errors():
                    maps = explain(vit, images, row.method, classes, score=score, **options)
                    if row.by_patch:
                        maps = metrics.coarsened(maps, module.grid, getattr(module, "tiling", None))
                    maps = np.asarray(maps, np.float32)
                for i, entry in enumerate(found):
                    own = str(classes[i]) if row.class_specific else "every"
                    shown = panels[i].values(reader.shown(maps[i], module, True))
                    entry["maps"].setdefault(row.name, {})[own] = packed_map(shown)
            if score is None:
                curves = np.asarray(_programs(module, reader)[0](vit.params, images, maps, classes), np.float64)
                for i, entry in enumerate(found):
                    entry["curves"].setdefault(row.name, {})[str(classes[i])] = curves[i].round(5).tolist()
        for entry in found if panels[0].axes == 2 and maps.shape[1:] == reader.size else ():
            entry["pixels"].append(row.name)

    def _add_blocks(self, images: Any, classes: np.ndarray, found: list[Json]) -> None:
        module: Any = self.vit.module
        try:
            blocks = _programs(module, self.vit.preprocessing)[1](self.vit.params, images, classes)
        except InputError:  # a model that does not show its blocks
            return
        names = {"contribution": blocks.contribution}
        for layer, values in (("attention", blocks.attention), ("FFN", blocks.ffn)):
            names |= {f"{layer}: {name}": getattr(values, name) for name in Layer._fields}
        for i, entry in enumerate(found):
            shown = {name: self.vit.preprocessing.shown(a[i], module, True) for name, a in names.items()}
            entry["blocks"][int(classes[i])] = {name: packed(array) for name, array in shown.items()}


def shares(probabilities: np.ndarray | None, classes: Iterable[int]) -> dict[int, float | None]:
    """Classes with their probabilities, None where they are unknown."""
    count = 0 if probabilities is None else len(probabilities)
    return {c: float(probabilities[c]) if 0 <= c < count else None for c in map(int, classes)}  # pyright: ignore


def details_of(size: Sequence[int], best: Mapping[int, float | None], classes: Mapping[int, float | None]) -> Json:
    """What is read of a photo when it is looked at, before its maps: the model's best classes, and those that are
    explained (-1: a score that is of no class), with their probabilities where they are known."""
    return {
        "size": list(size),
        "probabilities": [*best.items()],
        "classes": [*classes],
        "probability": {c: share for c, share in classes.items() if share is not None},
        "maps": {},
        "pixels": [],  # the rows whose maps are of pixels
        "curves": {},
        "blocks": {},
    }
