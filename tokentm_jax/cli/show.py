"""`tm.show`: photos and their heatmaps as a figure in a notebook, made of Pillow's pictures."""

import dataclasses
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import as_path, generator, replace

if TYPE_CHECKING:
    from tokentm_jax.models.loading import LoadedViT

SIDE = 224  # pixels of a picture's long side
_GAP, _LINE = 12, 18  # pixels between pictures, and of a line of text


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture uint8 [h, w, 3] with the line above it, and a smaller one below that."""

    picture: np.ndarray
    title: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """Rows of pictures, which a notebook shows. `rows` has the pictures as arrays; `save` writes one PNG of all."""

    rows: tuple[tuple[Panel, ...], ...]

    def _repr_html_(self) -> str:
        return "".join(
            f'<div style="display:flex;flex-wrap:wrap;gap:{_GAP}px;margin-bottom:{_GAP}px">'
            + "".join(map(_html, row))
            + "</div>"
            for row in self.rows
        )

    def _repr_png_(self) -> bytes:
        file, mark = io.BytesIO(), PngInfo()
        mark.add_text("Software", generator())
        self.image().save(file, "PNG", pnginfo=mark)
        return file.getvalue()

    def image(self) -> Image.Image:
        """All rows as one picture."""
        text = 2 * _LINE + 4
        widths = [sum(panel.picture.shape[1] + _GAP for panel in row) + _GAP for row in self.rows]
        heights = [max(panel.picture.shape[0] for panel in row) + text + _GAP for row in self.rows]
        sheet = Image.new("RGB", (max(widths), sum(heights) + _GAP), "white")
        draw, top = ImageDraw.Draw(sheet), _GAP
        fonts = ImageFont.load_default(14), ImageFont.load_default(12)
        for row, height in zip(self.rows, heights, strict=True):
            left = _GAP
            for panel in row:
                lines = ((panel.title, fonts[0], "#1c1c1c"), (panel.note, fonts[1], "#666666"))
                for i, (line, font, colour) in enumerate(lines):
                    cut = _cut(line, lambda part, font=font: font.getlength(part), panel.picture.shape[1])
                    draw.text((left, top + i * _LINE), cut, colour, font)
                sheet.paste(Image.fromarray(panel.picture), (left, top + text))
                left += panel.picture.shape[1] + _GAP
            top += height
        return sheet

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the figure as a PNG file, whole or not at all.

        Raises InputError, also where another thing than a figure of this program is; a file gives way to `overwrite`.
        """
        replace(as_path(path, "the figure"), lambda part: part.write_bytes(self._repr_png_()), overwrite=overwrite)


def show(
    what: Any,
    model: "LoadedViT | str | None" = None,
    methods: str | Sequence[str] = "tokentm",
    target: int | str | None = None,
    *,
    maps: Any = None,
) -> Figure:
    """A figure of photos and their heatmaps, for a notebook: with nothing more to install.

    Args:
      what: a photo or several: a path, an array [H, W, 3] or [B, H, W, 3] (uint8, or floating-point numbers in [0, 1],
        as `vit.read` gives them), or a list of these. Or what `tokentm_jax.explain` gave, to be shown by itself: maps
        [h, w] or [B, h, w], or `(maps, details)`. An array of three axes whose last is 3 long is a photo.
      model: from `tokentm_jax.load`, or what it takes as the name of a model; None for the shipped one.
      methods: a name of `METHODS`, or several, a list or with commas between.
      target: a class by number or name, for all photos; None for each photo's predicted class.
      maps: what `tokentm_jax.explain` gave for the photos, in place of methods and target; or several results by the
        names to show.

    Returns:
      A `Figure`: a row for each photo, with its heatmaps over it. Its `save(path)` writes a PNG, `image()` gives a
      Pillow image.

    Raises:
      InputError: no photo, as `vit.read` says it; no such class, method or model; maps that are none, or as many as
        the photos are not.

    Examples:
        >>> import tokentm_jax as tm
        >>> figure = tm.show("cat.jpg", methods="tokentm,gae", target="cat")  # the last line of a cell shows it
        >>> [panel.title for panel in figure.rows[0]]
        ['cat.jpg', 'tokentm', 'gae']
    """
    if maps is None and _is_explanation(what):
        found, details = what if isinstance(what, tuple) else (what, {})
        notes = _notes(model if model is not None and not isinstance(model, str) else None, details)
        stacked = _stacked(found, "the explanation")
        return Figure(tuple((Panel(_heat(m), "heatmap", notes(i)),) for i, m in enumerate(stacked)))
    vit = model if model is not None and not isinstance(model, str) else _loaded(model)
    photos = _photos(what, vit)
    images = np.stack([seen for _, seen, _ in photos])
    results: dict[str, Any] = {}
    if maps is None:
        from tokentm_jax.methods.explain import explain

        names = methods.split(",") if isinstance(methods, str) else methods
        index = None if target is None else vit.class_index(target)
        for name in dict.fromkeys(name.strip() for name in names):
            results[name] = explain(vit, images, name, index, details=True)
    else:
        results = dict(maps) if isinstance(maps, Mapping) else {"heatmap": maps}
    rows: list[list[Panel]] = [[Panel(shown, title)] for title, _, shown in photos]
    for name, result in results.items():
        found, details = result if isinstance(result, tuple) else (result, {})
        stacked, notes = _stacked(found, f"the maps {name!r}"), _notes(vit, details)
        if len(stacked) != len(rows):
            raise InputError(f"the maps {name!r} are of {len(stacked)} photos, and {len(rows)} are to be shown")
        for i, (row, heatmap) in enumerate(zip(rows, stacked, strict=True)):
            row.append(Panel(_heat(heatmap, row[0].picture), str(name), notes(i)))
    return Figure(tuple(map(tuple, rows)))


@lru_cache(maxsize=1)
def _loaded(name: str | None) -> "LoadedViT":
    from tokentm_jax.models.loading import load

    return load(name)


def _is_explanation(what: Any) -> bool:
    if isinstance(what, tuple) and len(what) == 2 and isinstance(what[1], Mapping):
        return True
    return hasattr(what, "__array__") and (np.ndim(what) == 2 or (np.ndim(what) == 3 and np.shape(what)[-1] != 3))


def _stacked(maps: Any, name: str) -> np.ndarray:
    """Maps [B, h, w] of one or several. Raises InputError."""
    array = np.asarray(maps) if hasattr(maps, "__array__") else np.empty(0)
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind != "f":
        raise InputError(f"{name} must be maps [B, h, w] of floating-point numbers, as tm.explain gives them")
    return array[None] if array.ndim == 2 else array


def _photos(what: Any, vit: "LoadedViT") -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Title, what the model sees (float32 [H, W, 3] in [0, 1]) and what is shown (uint8 [h, w, 3]) of each photo."""
    from tokentm_jax.data.photos import fit, open_photo, view

    if hasattr(what, "__array__"):
        several = list(np.asarray(what)) if np.ndim(what) == 4 else [what]
    else:
        several = list(what) if isinstance(what, Sequence) and not isinstance(what, str | bytes) else [what]
    if not several:
        raise InputError("no photos were given")
    found, height, width = [], *vit.preprocessing.size
    for i, photo in enumerate(several, 1):
        title = f"photo {i}" if len(several) > 1 else "photo"
        if not hasattr(photo, "__array__"):
            path = as_path(photo, "a photo")
            image, title = open_photo(path), printable(path.name)
        else:
            array = np.asarray(photo)
            known = array.dtype == np.uint8 or array.dtype.kind == "f"
            if array.ndim != 3 or array.shape[-1] != 3 or not array.size or not known:
                shape = f"{list(array.shape)} {array.dtype}"
                raise InputError(f"a photo must be a path or an array [H, W, 3] of uint8 or floats, got {shape}")
            if array.dtype.kind == "f" and array.shape[:2] == (height, width):  # the model sees these very numbers
                seen = np.asarray(vit.preprocessing.checked(array[None]), np.float32)[0]
                found.append((title, seen, _enlarged((seen.clip(0, 1) * 255).round().astype(np.uint8))))
                continue
            if array.dtype.kind == "f":
                if not (np.isfinite(array).all() and array.min() >= -0.5 and array.max() <= 1.5):
                    raise InputError("a photo of floating-point numbers must be in [0, 1]")
                array = (array.clip(0, 1) * 255).round()
            image = Image.fromarray(array.astype(np.uint8))
        pixels = fit(image, vit.preprocessing)
        found.append((title, pixels.astype(np.float32) / 255, view(image, vit.preprocessing, SIDE)))
    return found


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """With a long side of `SIDE` pixels."""
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _heat(heatmap: np.ndarray, photo: np.ndarray | None = None) -> np.ndarray:
    """A map [h, w] in colours: over a photo, or by itself."""
    from tokentm_jax.cli.figure import blend, scale_of, shade

    if photo is not None:
        return blend(photo, *shade(heatmap, photo.shape[:2]))
    scale = SIDE / max(heatmap.shape)
    height, width = (max(1, round(side * scale)) for side in heatmap.shape)
    values, signed = shade(heatmap, (height, width))
    return scale_of(signed).to_rgba(values, bytes=True)[..., :3]


def _notes(vit: "LoadedViT | None", details: Mapping[str, Any]) -> Callable[[int], str]:
    """For each sample the class that is explained and its probability, as far as the details say them."""
    from tokentm_jax.cli.heatmaps import softmax

    target, logits = details.get("target"), details.get("logits")

    def note(i: int) -> str:
        if target is None or np.ndim(target) != 1 or np.asarray(target).dtype.kind not in "iu":
            return ""
        index = int(np.asarray(target)[i])
        name = f"class {index}" if vit is None else vit.class_name(index)
        if logits is None or np.ndim(logits) != 2:
            return name
        values = np.asarray(logits, np.float64)[i]
        return f"{name} {softmax(values)[index]:.1%}"

    return note


def _html(panel: Panel) -> str:
    from tokentm_jax.cli.figure import data_url

    title, note = (html.escape(printable(text)) for text in (panel.title, panel.note))
    height, width = panel.picture.shape[:2]
    below = f'<br><span style="opacity:.7">{note}</span>' if note else "<br>&nbsp;"
    return (
        f'<figure style="margin:0;max-width:{width}px">'
        f'<figcaption style="overflow-wrap:anywhere"><b>{title}</b>{below}</figcaption>'
        f'<img width="{width}" height="{height}" style="max-width:100%;height:auto" '
        f'alt="{title} {note}" src="{data_url(Image.fromarray(panel.picture), "PNG")}"></figure>'
    )


def _cut(text: str, length: Callable[[str], float], room: float) -> str:
    """The text, or as much of it as has room, with an ellipsis."""
    text = printable(text)
    if length(text) <= room:
        return text
    while text and length(text + "…") > room:
        text = text[:-1]
    return text + "…"
