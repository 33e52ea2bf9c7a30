"""Pictures of heatmaps over photos and spectrograms."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image

from tokentm_jax.errors import printable

DPI = 130
INK, GREY = "#1c1c1c", "#666666"
PANEL = 3.0  # inches
CELL = 2.0


COLOURS = {  # name: the scale of maps without negative values, and that of signed ones
    "inferno": ("inferno", "RdBu_r"),
    "viridis": ("viridis", "PRGn_r"),
    "cividis": ("cividis", "PuOr_r"),
    "grey": ("gray", "coolwarm"),
}


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_url(image: Image.Image, kind: str, **how: Any) -> str:
    """A picture as the address of a file of that kind ("PNG", "JPEG"), which a page may hold."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return f"data:image/{kind.lower()};base64,{as_base64(file.getvalue())}"


def colour_tables() -> dict[str, list[str]]:
    """For each of `COLOURS` its two scales: 256 colours as base64 of three bytes each."""
    steps = np.arange(256)
    return {
        name: [as_base64(colormaps[scale](steps, bytes=True)[:, :3].tobytes()) for scale in scales]
        for name, scales in COLOURS.items()
    }


class Scales(NamedTuple):
    """What stands at the axes of a picture: for each the label and, of every tick, its place in [0, 1] (from the left,
    from above) and its text."""

    x_label: str
    x: Sequence[tuple[float, str]]
    y_label: str
    y: Sequence[tuple[float, str]]


def shade(heatmap: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """A token or pixel map [gh, gw] as values to show on `size` (h, w) pixels, and whether it is signed.

    Maps without negative values are stretched to [0, 1] (smallest to largest; a constant map is 0). Signed maps are
    divided by the 99.5th percentile of their magnitude and cut to [-1, 1], so that zero stays in the middle and few
    extreme pixels do not hide the rest. What is not finite counts as 0.
    """
    values = np.nan_to_num(np.asarray(heatmap, np.float64), posinf=0, neginf=0)
    values = values / (np.abs(values).max(initial=0) or 1)
    signed = bool((values < 0).any())
    # Bilinear with half-pixel centres, as `to_pixels`; that one's min-max would move the zero of a signed map.
    values = np.asarray(
        Image.fromarray(values.astype(np.float32)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    )
    if signed:
        limit = np.percentile(np.abs(values), 99.5) or np.abs(values).max() or 1
        return np.clip(values / limit, -1, 1), True
    low, high = values.min(), values.max()
    return (values - low) / (high - low if high > low else 1), False


def scale_of(signed: bool) -> ScalarMappable:
    """The colour scale of a shaded map."""
    return ScalarMappable(Normalize(-1 if signed else 0, 1), "RdBu_r" if signed else "inferno")


def blend(photo: np.ndarray, values: np.ndarray, signed: bool) -> np.ndarray:
    """The photo uint8 [h, w, 3] under its shaded map [h, w]: the stronger the value, the less photo shows."""
    base = photo.astype(np.float64) / 255
    grey = base @ np.array([0.299, 0.587, 0.114])
    base = 0.4 * base + 0.6 * grey[..., None]  # a paler photo, so that colour means heat
    colours = scale_of(signed).to_rgba(values)[..., :3]
    weight = 0.85 * np.abs(values) ** 0.7 if signed else 0.25 + 0.5 * np.sqrt(values)
    mixed = base * (1 - weight[..., None]) + colours * weight[..., None]
    return (mixed.clip(0, 1) * 255).round().astype(np.uint8)


def overlay_figure(
    photo: np.ndarray,
    heatmap: np.ndarray,
    title: str,
    subtitle: str = "",
    what: str = "Photo",
    scales: Scales | None = None,
) -> Figure:
    """Photo, heatmap, and photo with heatmap, side by side.

    Args:
      photo: uint8 [h, w, 3], the part of the photo that the model saw.
      heatmap: token map [gh, gw] or pixel map of the same part.
      title: usually the explained class and its probability.
      subtitle: a smaller line below it.
      what: is shown, such as a spectrogram in place of a photo.
      scales: of its axes.
    """
    values, signed = shade(heatmap, (photo.shape[0], photo.shape[1]))
    aspect = photo.shape[0] / photo.shape[1]
    width, height = (PANEL, PANEL * aspect) if aspect < 1.6 else (PANEL * 1.6 / aspect, PANEL * 1.6)
    gap, margin, bar, labels = 0.12, 0.2, 0.13, 0.55
    left, below = (margin, margin) if scales is None else (margin + 0.55, margin + 0.38)
    total = left + margin + 3 * width + 3 * gap + bar + labels
    lines = _wrap(title, total - 2 * margin, 2, 14, "bold")
    above = 0.22 + 0.27 * len(lines) + (0.22 if subtitle else 0.0)
    tall = above + 0.28 + height + below
    figure = Figure((total, tall), dpi=DPI, facecolor="white")
    _text(figure, margin / total, 1 - 0.16 / tall, "\n".join(lines), size=14, weight="bold")
    if subtitle:
        y = 1 - (0.22 + 0.27 * len(lines)) / tall
        _text(figure, margin / total, y, *_wrap(subtitle, total - 2 * margin, 1, 10), size=10, color=GREY)
    mappable = scale_of(signed)
    panels = {what: photo, "Heatmap": mappable.to_rgba(values), f"{what} and heatmap": blend(photo, values, signed)}
    for i, (caption, picture) in enumerate(panels.items()):
        axes = _picture(figure, picture, left + i * (width + gap), below, width, height)
        axes.set_title(caption, fontsize=11, color=INK, pad=5)
        if scales is not None:
            _scale(axes, scales, photo.shape[:2], i == 0)
    x = left + 3 * (width + gap)
    axes = figure.add_axes((x / total, below / tall, bar / total, height / tall))
    _bar(axes, signed, "vertical")
    return figure


def sheet(
    photos: Sequence[np.ndarray], titles: Sequence[str], maps: Mapping[str, Sequence[np.ndarray]], heading: str = ""
) -> Figure:
    """A comparison: one block per photo, in it the photo and then its overlay for each method, up to six a row.

    Args:
      photos: uint8 [h, w, 3] each, all of one size.
      titles: one per photo, above it; usually the class and its probability.
      maps: for each method's name one token or pixel map per photo.
      heading: a line above all.
    """
    cells = 1 + len(maps)
    columns = cells if cells <= 6 else 5
    rows = -(-cells // columns)
    aspect = photos[0].shape[0] / photos[0].shape[1]
    width, height = (CELL, CELL * aspect) if aspect <= 1.5 else (CELL * 1.5 / aspect, CELL * 1.5)
    gap, margin, title_height, name_height, below = 0.1, 0.2, 0.42, 0.24, 0.55
    above = 0.36 if heading else 0.1
    total = 2 * margin + columns * width + (columns - 1) * gap
    block = title_height + rows * height + (rows - 1) * (name_height + gap) + gap
    tall = above + len(photos) * block + below
    figure = Figure((total, tall), dpi=DPI, facecolor="white")
    if heading:
        line = _wrap(heading, total - 2 * margin, 1, 13, "bold")
        _text(figure, margin / total, 1 - 0.15 / tall, *line, size=13, weight="bold")
    any_signed = any_unsigned = False
    for i, photo in enumerate(photos):
        shaded = {name: shade(per_photo[i], (photo.shape[0], photo.shape[1])) for name, per_photo in maps.items()}
        any_signed |= any(signed for _, signed in shaded.values())
        any_unsigned |= any(not signed for _, signed in shaded.values())
        pictures = [photo, *(blend(photo, *pair) for pair in shaded.values())]
        for cell, picture in enumerate(pictures):
            row, column = divmod(cell, columns)
            top = above + i * block + title_height + row * (height + name_height + gap)
            axes = _picture(figure, picture, margin + column * (width + gap), tall - top - height, width, height)
            if cell == 0:
                lines = _wrap(titles[i], width, 2, 9.5, "bold")
                axes.set_title("\n".join(lines), fontsize=9.5, color=INK, pad=4, weight="bold", parse_math=False)
            elif i == 0 or rows > 1:
                (name,) = _wrap(list(maps)[cell - 1], width, 1, 9.5)
                axes.set_title(name, fontsize=9.5, color=INK, pad=4, parse_math=False)
    bars = [signed for signed, present in ((False, any_unsigned), (True, any_signed)) if present]
    for i, signed in enumerate(bars):
        axes = figure.add_axes(((margin + 2.6 * i) / total, 0.32 / tall, 2.0 / total, 0.1 / tall))
        _bar(axes, signed, "horizontal")
    return figure


def _picture(figure: Figure, picture: np.ndarray, x: float, y: float, width: float, height: float) -> Axes:
    """A picture at a place given in inches from the lower left."""
    total, tall = figure.get_size_inches()
    axes = figure.add_axes((x / total, y / tall, width / total, height / tall))
    axes.imshow(picture, aspect="auto", interpolation="antialiased")
    axes.set_axis_off()
    return axes


def _scale(axes: Axes, scales: Scales, size: tuple[int, ...], first: bool) -> None:
    """Ticks below a picture of `size` and, at the first of a row, beside it."""
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=9, length=3, colors=INK, pad=2)
    axes.set_xticks([place * size[1] - 0.5 for place, _ in scales.x], [text for _, text in scales.x])
    axes.set_xlabel(scales.x_label, fontsize=9.5, color=INK, labelpad=2)
    axes.set_yticks([place * size[0] - 0.5 for place, _ in scales.y] if first else [])
    if first:
        axes.set_yticklabels([text for _, text in scales.y])
        axes.set_ylabel(scales.y_label, fontsize=9.5, color=INK, labelpad=2)


def _bar(axes: Axes, signed: bool, orientation: str) -> None:
    bar = axes.figure.colorbar(scale_of(signed), cax=axes, orientation=orientation)
    bar.set_ticks([-1, 0, 1] if signed else [0, 1], labels=["against", "0", "for"] if signed else ["low", "high"])
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=9.5, length=0, colors=INK, pad=4)
    if orientation == "horizontal":  # the outer labels stay above each other with the bar's ends
        labels = axes.get_xticklabels()
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")


def _text(figure: Figure, x: float, y: float, text: str, **style: object) -> None:
    # Class and file names are plain text: a dollar sign in them starts no formula.
    figure.text(x, y, text, va="top", ha="left", parse_math=False, **{"color": INK, **style})


def _wrap(text: str, room: float, most: int, size: float, weight: str = "normal") -> list[str]:
    """At most `most` lines of `room` inches; what does not fit is cut with an ellipsis."""
    font = FontProperties(size=size, weight=weight)

    def fits(line: str) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            return text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] / 72 <= 0.97 * room

    words, lines = printable(" ".join(text.split())).split(), [""]
    while words:
        longer = f"{lines[-1]} {words[0]}".strip()
        if fits(longer):
            lines[-1] = longer
            words.pop(0)
        elif lines[-1] and len(lines) < most:
            lines.append("")
        else:
            cut = " ".join([lines[-1], *words]).strip()[:200]
            while cut and not fits(cut + "…"):
                cut = cut[:-1]
            lines[-1] = cut.rstrip() + "…"
            break
    return lines
