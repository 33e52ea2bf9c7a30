"""`tm.show`: photos, recordings or texts and their heatmaps as a figure, for notebooks and papers."""

import dataclasses
import html
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokentm_jax.cli.figure import UNIT, Explained, arranged, grid
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import as_path, generator
from tokentm_jax.identity import write_figure
from tokentm_jax.inputs.pictures import SIDE, SMOOTH, Look, Panel, look_of, scale_of, shade
from tokentm_jax.maths.primitives import PyTree
from tokentm_jax.validation import checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

    from tokentm_jax.models.loading import Model

_GAP = 12  # pixels between pictures on a page


@dataclasses.dataclass(frozen=True, repr=False)
class Figure:
    """Rows of pictures, which a notebook shows. `rows` has the pictures as arrays; `save` writes a file of all."""

    rows: tuple[tuple[Panel, ...], ...]
    title: str = ""
    look: Look = SMOOTH

    def __repr__(self) -> str:
        return f'<Figure of {sum(map(len, self.rows))} pictures: a notebook shows it, .save("figure.png") writes it>'

    def _repr_html_(self) -> str:
        rows = (
            f'<div style="display:flex;flex-wrap:wrap;gap:{_GAP}px;margin-bottom:{_GAP}px">'
            + "".join(map(_html, row))
            + "</div>"
            for row in self.rows
        )
        heading = f"<p><b>{html.escape(printable(self.title))}</b></p>" if self.title else ""
        return heading + "".join(rows)

    def _repr_png_(self) -> bytes:
        file, mark = io.BytesIO(), PngInfo()
        mark.add_text("Software", generator())
        self.image().save(file, "PNG", pnginfo=mark)
        return file.getvalue()

    def _drawn(self) -> "MatplotlibFigure":
        """The grid, with as many dots as its pictures have pixels."""
        first = self.rows[0][0]
        return grid(self.rows, self.title, self.look, first.picture.shape[1] / (first.units[1] * UNIT))

    def image(self) -> Image.Image:
        """The whole figure as one picture. Panels whose long side is a multiple of 224 pixels are in it unchanged."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self._drawn())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the figure as a .png, .jpg, .pdf or .svg file, whole or not at all.

        Raises InputError, also where another thing than a figure of this program is; a file gives way to `overwrite`.
        """
        write_figure(self._drawn(), as_path(path, "the figure"), overwrite=overwrite)


def show(
    what: object,
    model: "Model | str | None" = None,
    methods: str | Sequence[str] = "tokentm",
    target: int | str | Sequence[int | str] | None = None,
    *,
    maps: PyTree = None,
    title: str = "",
    colours: str = "inferno",
    squares: bool = False,
    side: int = SIDE,
) -> Figure:
    """A figure of photos, recordings or texts and their heatmaps, in a column for each method or for each class.

    Args:
      what: what the model takes, one or several. A photo is a path or an array [H, W, 3] (uint8, or floating-point
        numbers in [0, 1], as `vit.read` gives them), or several as [B, H, W, 3] or a list; a recording a path or an
        array that `vit.read` gives; a text is a text. Or what `tokentm_jax.explain` gave, to be shown by itself: maps
        [h, w] or [B, h, w], or `(maps, details)`. An array of three axes whose last is 3 or 1 long is no map.
      model: from `tokentm_jax.load`, or what it takes as the name of a model; None for the shipped one.
      methods: a name of `METHODS`, or several, a list or with commas between.
      target: a class by number or name, for all photos; several of them, a list or with commas between; "each" for
        every class of a model with up to 10 of them, and for each photo's five most probable ones of other models;
        None for each photo's predicted class.
      maps: what `tokentm_jax.explain` gave for the photos, instead of methods and target; or several results by the
        names to show.
      title: a line above the figure.
      colours: of the maps: "inferno", "magma", "viridis", "cividis", "turbo" or "grey". Each is a scale for maps
        without negative values, and one for signed maps.
      squares: show each patch as a square, instead of interpolating between patches.
      side: pixels of a picture's long side, best a multiple of 224; 448 or more for print. A text is 1.5 of them wide.

    Returns:
      A `Figure`: a row for each photo, with its heatmaps over it, one for each method, or for each class of one
      method. With several of both, each photo has a row for each class. The heatmap of a text is its words, in colours
      that grow with their scores; a notebook shows them as text. Its `save(path)` writes a PNG, JPEG, PDF or
      SVG file, `image()` gives a Pillow image.

    Raises:
      InputError: nothing that the model takes, as for `vit.read`; no such class, method, colours or model; wrong
        maps, or another number of them than of photos.

    Examples:
        >>> import tokentm_jax as tm
        >>> figure = tm.show("cat.jpg", methods="tokentm,gae", target="cat")  # the last line of a cell shows it
        >>> [panel.title for panel in figure.rows[0]]
        ['cat.jpg', 'tokentm', 'gae']
        >>> figure.save("figure.pdf")
        >>> figure = tm.show("cat.jpg", target=["cat", "dog"], squares=True)
        >>> [panel.title for panel in figure.rows[0]]
        ['cat.jpg', 'cat', 'dog']
    """
    look, title = look_of(colours, squares), "" if title is None else str(title)
    from tokentm_jax.models.loading import require_loaded

    checked("side", Annotated[int, Ge(16), Le(4096)], side)
    if maps is None and _is_explanation(what):
        found, details = what if isinstance(what, tuple) else (what, {})
        stacked = _stacked(found, "the explanation")
        of = model if model is not None and not isinstance(model, str) else None
        panels = []
        for heatmap, name, value in zip(stacked, *_described(of, details, len(stacked)), strict=True):
            shown = heatmap if of is None else of.preprocessing.shown(heatmap, of.module, squares)
            height, width = (max(1, round(length * side / max(shown.shape))) for length in shown.shape)
            values, signed = shade(shown, (height, width), squares)
            picture = scale_of(signed, colours).to_rgba(values, bytes=True)[..., :3]
            panels.append(Panel(picture, "heatmap", f"{name} {value}".strip(), signed))
        return Figure(tuple((panel,) for panel in panels), title, look)
    vit = model if model is not None and not isinstance(model, str) else _loaded(model)
    require_loaded(vit)
    reader = vit.preprocessing
    samples, panels = zip(*reader.panels(what, side), strict=True)
    if maps is None:
        results = _explained(vit, reader.stacked(samples), len(panels), methods, target)
    else:
        given = dict(maps) if isinstance(maps, Mapping) else {"heatmap": maps}
        results = {(str(name), ""): result for name, result in given.items()}
    if not results:
        raise InputError("there are no maps to show: name a method")
    explained = []
    for (method, question), result in results.items():
        found, details = result if isinstance(result, tuple) else (result, {})
        stacked = _stacked(found, f"the maps {method!r}", panels[0].axes)
        if len(stacked) != len(panels):
            count, what = f"{len(panels)} are to be shown", reader.kind
            raise InputError(f"the maps {method!r} are of {len(stacked)} {what}s, and {count}")
        shown = [reader.shown(heatmap, vit.module, squares) for heatmap in stacked]
        explained.append(Explained(method, question, shown, *_described(vit, details, len(panels))))
    return Figure(tuple(map(tuple, arranged(panels, explained, look))), title, look)


def _explained(vit: "Model", inputs: Any, count: int, methods: Any, target: Any) -> dict[tuple[str, str], Any]:
    """What `tokentm_jax.explain` gives for each method and question."""
    from tokentm_jax.cli.heatmaps import classes_asked
    from tokentm_jax.methods.explain import explain

    names = methods.split(",") if isinstance(methods, str) else methods if isinstance(methods, Sequence) else [methods]
    names = list(dict.fromkeys(str(name).strip() for name in names))
    several = [target] if isinstance(target, str | bytes) or not isinstance(target, Sequence) else target
    if not several:
        raise InputError("target is an empty list: name a class, or leave it out for the predicted one")
    asked = classes_asked(vit, [] if target is None else several)
    ranked = any(one.rank for one in asked)
    outputs = np.asarray(vit.logits(inputs)) if ranked else np.zeros((count, 1))
    found = {}
    for one in asked:
        chosen = None if target is None else one.classes(outputs)
        for name in names:
            found[name, one.part] = explain(vit, inputs, name, chosen, details=True)
    return found


@lru_cache(maxsize=1)
def _loaded(name: str | None) -> "Model":
    from tokentm_jax.models.loading import load

    return load(name)


def _is_explanation(what: Any) -> bool:
    if isinstance(what, tuple) and len(what) == 2 and isinstance(what[1], Mapping):
        return True
    shape = np.shape(what) if hasattr(what, "__array__") else ()
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] not in (1, 3))


def _stacked(maps: Any, name: str, axes: int = 2) -> np.ndarray:
    """Maps [B, h, w], or [B, N] of texts, of one or several. Raises InputError."""
    array = np.asarray(maps) if hasattr(maps, "__array__") else np.empty(())
    if array.ndim not in (axes, axes + 1) or not array.size or array.dtype.kind != "f":
        kind = "scores [B, N]" if axes == 1 else "maps [B, h, w]"
        raise InputError(f"{name} must be {kind} of floating-point numbers, as tm.explain gives them")
    return array[None] if array.ndim == axes else array


def _described(vit: "Model | None", details: Mapping[str, Any], count: int) -> tuple[list[str], list[str]]:
    """For each sample the class that is explained, and its probability, as far as the details have them."""
    from tokentm_jax.cli.heatmaps import softmax

    target, logits = details.get("target"), details.get("logits")
    if target is None or np.ndim(target) != 1 or np.asarray(target).dtype.kind not in "iu":
        return [""] * count, [""] * count
    indices = [int(index) for index in np.asarray(target)]
    names = [f"class {index}" if vit is None else vit.class_name(index) for index in indices]
    if logits is None or np.ndim(logits) != 2:
        return names, [""] * count
    shares = softmax(np.asarray(logits, np.float64))
    return names, [f"{shares[i, index]:.1%}" for i, index in enumerate(indices)]


def _html(panel: Panel) -> str:
    title, note = (html.escape(printable(text)) for text in (panel.title, panel.note))
    below = f'<br><span style="opacity:.7">{note}</span>' if note else "<br>&nbsp;"
    return (
        f'<figure style="margin:0;max-width:{panel.picture.shape[1]}px">'
        f'<figcaption style="overflow-wrap:anywhere"><b>{title}</b>{below}</figcaption>{panel.html()}</figure>'
    )
