"""A text as the panel of a figure: its words on the colours of their scores."""

import dataclasses
import functools
import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokentm_jax.errors import printable
from tokentm_jax.inputs.pictures import COLOURS, SIDE, SMOOTH, Look
from tokentm_jax.inputs.words import Text, Word, scored

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

WIDTH = 1.5  # of a text in a grid, in sides of a picture
LETTERS, LINE, MARGIN = 15, 26, 6  # height of letters and of a line, and the room around all, for a side of `SIDE`
STRONGEST = 0.75  # share of the colour behind the word of the largest score; the rest is the paper


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text, as a `Panel`; `encoding` is what the tokenizer made of it."""

    text: Text
    encoding: Any
    title: str
    side: int = SIDE  # its picture is `side * WIDTH` pixels wide
    note: str = ""
    signed: bool | None = None
    height: int = 0  # of the picture, at least
    shown: tuple[Word, ...] = ()  # the words of its map, and the colour behind each as "#rrggbbaa"
    colours: tuple[str, ...] = ()

    plain = False
    axes = 1

    @functools.cached_property
    def picture(self) -> np.ndarray:
        parts = [*self.parts[:-1], (" …", None)] if self.encoding.overflowing else self.parts
        return _drawn(parts, self.colours, self.side, self.height)

    @property
    def units(self) -> tuple[int, int]:
        height, width = self.picture.shape[:2]
        return round(height * SIDE * WIDTH / width), round(SIDE * WIDTH)

    @property
    def parts(self) -> list[tuple[str, int | None]]:
        """The text as it was given: its words with their number, and with None what is between them. The second text
        of a pair begins a line."""
        words = self.shown or self.words(np.zeros(len(self.encoding.ids)))
        found: list[tuple[str, int | None]] = []
        for part, whole in enumerate(self.text if isinstance(self.text, tuple) else (self.text,)):
            found.append(("\n" * part, None))
            end = 0
            for number, word in enumerate(words):
                if word.part == part:
                    found += [(whole[end : word.start], None), (whole[word.start : word.end], number)]
                    end = word.end
            found.append((whole[end:], None))
        return [piece for piece in found if piece[0]]

    def words(self, heatmap: np.ndarray) -> list[Word]:
        return scored(self.text, self.encoding, heatmap)

    def under(self, heatmap: np.ndarray, title: str, note: str, signed: bool, look: Look = SMOOTH) -> "Passage":
        """The text with its words in the colours of their scores, the strongest at the largest score of the text."""
        words = tuple(self.words(heatmap))
        most = max((abs(word.score) for word in words), default=0) or 1
        colours = tuple(_colour(word.score / most, signed, look) for word in words)
        return dataclasses.replace(self, title=title, note=note, signed=signed, shown=words, colours=colours)

    def of_height(self, height: int) -> "Passage":
        return dataclasses.replace(self, height=height)

    def answer(self, heatmap: np.ndarray) -> dict[str, Any]:
        """The parts of the text with the scores of the words."""
        words = self.words(heatmap)
        parts = [[text, None if word is None else words[word].score] for text, word in self.parts]
        return {"parts": parts, "signed": any(word.score < 0 for word in words)}

    def listed(self, side: int) -> dict[str, Any]:
        text = " ".join(self.text if isinstance(self.text, tuple) else (self.text,))
        return {"thumb": None, "text": printable(text[:300])}

    def page(self, side: int) -> dict[str, Any]:
        return {"parts": self.parts}

    def values(self, heatmap: np.ndarray) -> np.ndarray:
        return np.array([[word.score for word in self.words(heatmap)] or [0.0]])

    def scale(self, look: Look = SMOOTH) -> "ScalarMappable":
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        low = -1 if self.signed else 0
        steps = np.array([_on_paper(_colour(s, bool(self.signed), look)) for s in np.linspace(low, 1, 101)])
        return ScalarMappable(Normalize(low, 1), ListedColormap(steps / 255))

    def html(self) -> str:
        parts = [
            html.escape(text)
            if word is None
            else f'<span title="{self.shown[word].score:.3g}" '
            f'style="background:{self.colours[word]};border-radius:.2em">{html.escape(text)}</span>'
            for text, word in self.parts
        ]
        size = f"width:{round(self.side * WIDTH)}px;max-width:100%"
        style = f"{size};line-height:1.8;white-space:pre-wrap;overflow-wrap:anywhere;margin:0"
        return f'<p dir="auto" style="{style}">{"".join(parts)}</p>'


def _colour(share: float, signed: bool, look: Look) -> str:
    """Behind a word with this share of the largest score, "#rrggbbaa": the scale's bright hue, the opaquer the larger
    the share. The dark end of a scale would hide the letters."""
    from matplotlib import colormaps

    hue = (0.85 if share >= 0 else 0.15) if signed else 0.75
    red, green, blue, _ = colormaps[COLOURS[look.colours][signed]](hue, bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}{round(255 * STRONGEST * min(abs(share), 1)):02x}"


def _on_paper(colour: str) -> tuple[int, ...]:
    """The colour "#rrggbbaa" on white."""
    *rgb, opacity = bytes.fromhex(colour[1:])
    return tuple(round(255 + (part - 255) * opacity / 255) for part in rgb)


def _drawn(parts: Sequence[tuple[str, int | None]], colours: Sequence[str], side: int, height: int) -> np.ndarray:
    """The pieces of a text as a picture uint8 [h, w, 3], the words on their colours."""
    from matplotlib.font_manager import findfont

    scale = side / SIDE
    font = ImageFont.truetype(findfont("DejaVu Sans"), max(1, round(LETTERS * scale)))
    margin, line, width = (round(length * scale) for length in (MARGIN, LINE, WIDTH * SIDE))
    x, y, placed = margin, margin, []
    for text, word in parts:
        colour = None if word is None or not colours else colours[word]
        for chunk in re.findall(r"\n|[^\S\n]+|\S+", text):
            shown = " " if chunk.isspace() else printable(chunk)
            wide = font.getlength(shown)
            if chunk == "\n" or (x > margin and x + wide > width - margin):
                x, y = margin, y + line
            # A line is broken between words, or within one that is wider than a line.
            for letters in shown if wide > width - 2 * margin else (shown,):
                length = font.getlength(letters)
                if x > margin and x + length > width - margin:
                    x, y = margin, y + line
                if x > margin or letters != " ":
                    placed.append((x, y, length, letters, colour))
                    x += length
    image = Image.new("RGB", (width, max(height, y + line + margin)), "white")
    brush = ImageDraw.Draw(image)
    for left, top, length, letters, colour in placed:
        if colour is not None:
            brush.rectangle((left, top, left + length, top + line - round(3 * scale)), _on_paper(colour))
        brush.text((left, top + round(3 * scale)), letters, "#1c1c1c", font)
    return np.asarray(image)
