"""Pictures of heatmaps over photos and spectrograms."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from tokentm_jax.errors import printable
from tokentm_jax.inputs.pictures import (
    COLOURS,
    SIDE,
    SMOOTH,
    Look,
    Panel,
    as_base64,
    blend,
    has_signs,
    scale_of,
    shade,
)

DPI = 130
INK, GREY = "#1c1c1c", "#666666"
PANEL = 3.0  # inches
UNIT = 2.0 / SIDE  # inches


class Explained(NamedTuple):
    """The maps of all photos by one method for one question, and for each photo the class and its probability."""

    method: str
    question: str
    maps: Sequence[np.ndarray]
    names: Sequence[str]
    values: Sequence[str]


def colour_tables() -> dict[str, list[str]]:
    """For each of `COLOURS` its two scales: 256 colours as base64 of three bytes each."""
    steps = np.arange(256)
    return {
        name: [as_base64(colormaps[scale](steps, bytes=True)[:, :3].tobytes()) for scale in scales]
        for name, scales in COLOURS.items()
    }


class Scales(NamedTuple):
    """The axes of a picture: labels, and each tick's place in [0, 1] (from the left, from above) and text."""

    x_label: str
    x: Sequence[tuple[float, str]]
    y_label: str
    y: Sequence[tuple[float, str]]


def overlay_figure(
    photo: np.ndarray,
    heatmap: np.ndarray,
    title: str,
    subtitle: str = "",
    what: str = "Photo",
    scales: Scales | None = None,
    look: Look = SMOOTH,
) -> Figure:
    """Photo uint8 [h, w, 3], heatmap [gh, gw], and both, side by side; `what` is the kind of picture, such as a
    spectrogram. The title may be empty; the subtitle is a smaller line below it."""
    values, signed = shade(heatmap, (photo.shape[0], photo.shape[1]), look.squares)
    aspect = photo.shape[0] / photo.shape[1]
    width, height = (PANEL, PANEL * aspect) if aspect < 1.6 else (PANEL * 1.6 / aspect, PANEL * 1.6)
    gap, margin, bar, labels = 0.12, 0.2, 0.13, 0.55
    left, below = (margin, margin) if scales is None else (margin + 0.55, margin + 0.38)
    total = left + margin + 3 * width + 3 * gap + bar + labels
    lines = _wrap(title, total - 2 * margin, 2, 14, "bold") if title else []
    title_ends = 0.22 + 0.27 * len(lines)
    tall = title_ends + (0.22 if subtitle else 0.0) + 0.28 + height + below
    figure = Figure((total, tall), dpi=DPI, facecolor="white")
    _text(figure, margin / total, 1 - 0.16 / tall, "\n".join(lines), size=14, weight="bold")
    if subtitle:
        line = _wrap(subtitle, total - 2 * margin, 1, 10)
        _text(figure, margin / total, 1 - title_ends / tall, *line, size=10, color=GREY)
    heat = scale_of(signed, look.colours).to_rgba(values)
    panels = {what: photo, "Heatmap": heat, f"{what} and heatmap": blend(photo, values, signed, look.colours)}
    for i, (caption, picture) in enumerate(panels.items()):
        axes = _picture(figure, picture, left + i * (width + gap), below, width, height)
        # With `y`, no ticks are made to find out whether the title would cover them.
        axes.set_title(caption, y=1.0, fontsize=11, color=INK, pad=5, parse_math=False)
        if scales is not None:
            _scale(axes, scales, photo.shape[:2], i == 0)
    x = left + 3 * (width + gap)
    axes = figure.add_axes((x / total, below / tall, bar / total, height / tall))
    _bar(axes, signed, scale_of(signed, look.colours), "vertical")
    return figure


def arranged(photos: Sequence[Panel], explained: Sequence[Explained], look: Look = SMOOTH) -> list[list[Panel]]:
    """Rows of a grid: a photo and its overlays, in a column for each method, or for each question of one method.
    With several of both, each photo has a row for each question, and a column is a method."""
    methods, questions = ({one[k]: None for one in explained} for k in (0, 1))
    shared = len(questions) > 1 and len(methods) == 1
    signed_ones = {one.method for one in explained if any(map(has_signs, one.maps))}  # one scale for each method
    rows = []
    for i, photo in enumerate(photos):
        for question in questions if len(methods) > 1 else [None]:
            row = [photo] if photo.plain else []
            for one in explained:
                if question in (None, one.question):
                    note = f"{one.names[i]} {one.values[i]}".strip()
                    title, note = (one.names[i], one.values[i]) if shared else (one.method, note)
                    row.append(photo.under(one.maps[i], title, note, one.method in signed_ones, look))
            rows.append(row)
    tallest = max(panel.picture.shape[0] for row in rows for panel in row)
    return [[panel.of_height(tallest) for panel in row] for row in rows]


_LONGEST = 60_000  # pixels: no file of a picture can have 2**16
_GAP, _MARGIN, _HEADING, _LINE, _BARS = 11, 22, 36, 18, 62  # units: between pictures, around all, of lines, of scales


class _Layout(NamedTuple):
    """Where the panels of a grid are, in units from the upper left corner, and what is written next to them."""

    columns: int  # pictures in a line
    size: tuple[int, int]  # height and width of a picture
    above: int  # room for a title, and below a picture for a note
    below: int
    shared: bool  # titles are above the first row only
    names: list[list[tuple[str, bool]]]  # of each row, its lines, and which are bold
    left: int
    top: int
    block: int  # height of a row

    def place(self, row: int, cell: int) -> tuple[int, int]:
        """(left, top) of a picture."""
        line, column = divmod(cell, self.columns)
        step = self.size[0] + self.below + _GAP + (0 if self.shared else self.above)
        top = self.top + row * self.block + line * step + (0 if self.shared else self.above)
        return self.left + column * (self.size[1] + _GAP), top


def _layout(rows: Sequence[Sequence[Panel]], heading: str, widest: int) -> _Layout:
    cells, labelled = len(rows[0]), rows[0][0].signed is None
    lines = -(-cells // widest)
    columns = -(-cells // lines)
    height, width = rows[0][0].units
    maps = [row[labelled:] for row in rows]
    shared = lines == 1 and all(len({panel.title for panel in column}) == 1 for column in zip(*maps, strict=True))
    above = max(len(_wrap(panel.title, width * UNIT, 2, 9.5)) for row in maps for panel in row) * _LINE + 4
    # A note that the maps of each row share is part of the row's name.
    noted = labelled and all(len({panel.note for panel in row}) == 1 for row in maps)
    names: list[list[tuple[str, bool]]] = []
    for photo, first, *_ in rows if labelled else ():
        room = (lines * height + (lines - 1) * _GAP) * UNIT
        bold = _wrap(photo.title, room, 1, 9.5, "bold") if photo.title else []
        plain = _wrap(first.note, room, 2, 9.5) if noted and first.note else []
        names.append([*((text, True) for text in bold), *((text, False) for text in plain)])
    below = 0 if noted or not any(panel.note for row in maps for panel in row) else _LINE
    left = _MARGIN + max((len(name) * _LINE + 4 for name in names if name), default=0)
    top = _MARGIN // 2 + (_HEADING if heading else 0) + (above if shared else 0)
    block = lines * (height + below + _GAP + (0 if shared else above))
    return _Layout(columns, (height, width), above, below, shared, names, left, top, block)


def grid(
    rows: Sequence[Sequence[Panel]], heading: str = "", look: Look = SMOOTH, dpi: float = DPI, widest: int = 6
) -> Figure:
    """Rows of panels of one size, a line above all, a name for each row and column, and the colour scales below.

    The name of a row is that of the photo at its start, with the note that its maps share; the name of a column is the
    title that its maps share. Titles and notes that differ are next to their pictures, and so are all titles where
    rows of more than `widest` panels are broken. With `1 / UNIT` dots per inch a picture of `SIDE` pixels is drawn
    pixel by pixel; a long grid has fewer.
    """
    plan = _layout(rows, heading, widest)
    height, width = plan.size
    total = _MARGIN + max(plan.left + plan.columns * (width + _GAP) - _GAP, _MARGIN + SIDE)
    tall = plan.top + len(rows) * plan.block + _BARS
    dpi = min(dpi, _LONGEST / (max(total, tall) * UNIT))
    figure = Figure((total * UNIT, tall * UNIT), dpi=dpi, facecolor="white")

    def write(text: str, x: float, y: float, size: float = 9.5, **style: Any) -> None:
        _text(figure, x / total, 1 - y / tall, text, size=size, **style)

    if heading:
        (line,) = _wrap(heading, (total - 2 * _MARGIN) * UNIT, 1, 13, "bold")
        write(line, _MARGIN, _MARGIN // 2, 13, weight="bold")
    for i, row in enumerate(rows):
        for k, (text, bold) in enumerate(plan.names[i] if plan.names else ()):
            middle = (plan.place(i, 0)[1] + plan.place(i, len(row) - 1)[1] + height) / 2
            style: dict[str, Any] = {"weight": "bold"} if bold else {"color": GREY}
            write(text, _MARGIN + (k + 0.5) * _LINE, middle, rotation=90, ha="center", va="center", **style)
        for k, panel in enumerate(row):
            x, y = plan.place(i, k)
            _picture(figure, panel.picture, x * UNIT, (tall - y - height) * UNIT, width * UNIT, height * UNIT)
            if panel.signed is None:
                continue
            if i == 0 or not plan.shared:
                lines = _wrap(panel.title, width * UNIT, 2, 9.5)
                write("\n".join(lines), x + width / 2, y - 3, ha="center", va="bottom")
            if plan.below and panel.note:
                (line,) = _wrap(panel.note, width * UNIT, 1, 9)
                write(line, x + width / 2, y + height + 2, 9, ha="center", color=GREY)
    kinds = sorted({panel.signed: panel for row in rows for panel in row if panel.signed is not None}.items())
    length = min(SIDE, (total - 2 * _MARGIN - 4 * _GAP * (len(kinds) - 1)) // len(kinds))
    for i, (signed, panel) in enumerate(kinds):
        x = _MARGIN + i * (length + 4 * _GAP)
        axes = figure.add_axes((x / total, 36 / tall, length / total, _GAP / tall))
        _bar(axes, signed, panel.scale(look), "horizontal")
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
    for axis, label, ticks, length in (
        (axes.xaxis, scales.x_label, scales.x, size[1]),
        (axes.yaxis, scales.y_label if first else "", scales.y if first else (), size[0]),
    ):
        axis.set_ticks([place * length - 0.5 for place, _ in ticks], [text for _, text in ticks])
        axis.set_label_text(label, fontsize=9.5, color=INK)
        axis.labelpad = 2


def _bar(axes: Axes, signed: bool, scale: ScalarMappable, orientation: str) -> None:
    bar = axes.figure.colorbar(scale, cax=axes, orientation=orientation)
    bar.set_ticks([-1, 0, 1] if signed else [0, 1], labels=["against", "0", "for"] if signed else ["low", "high"])
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=9.5, length=0, colors=INK, pad=4)
    if orientation == "horizontal":  # the outer labels stay above each other with the bar's ends
        labels = axes.get_xticklabels()
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")


def _text(figure: Figure, x: float, y: float, text: str, **style: object) -> None:
    # Class and file names are plain text: a dollar sign in them starts no formula.
    figure.text(x, y, text, parse_math=False, **{"va": "top", "ha": "left", "color": INK, **style})


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
