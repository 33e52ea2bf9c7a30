"""What maps are shown on, and how: `Panel` has a picture of a photo or a recording, `Passage` a text."""

import base64
import dataclasses
import html
import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from tokentm_jax.errors import printable, suggest

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

SIDE = 224  # units of the long side of a picture in a grid, where all lengths are whole units

COLOURS = {  # name: the scale of maps without negative values, and that of signed ones
    "inferno": ("inferno", "RdBu_r"),
    "magma": ("magma", "PiYG_r"),
    "viridis": ("viridis", "PRGn_r"),
    "cividis": ("cividis", "PuOr_r"),
    "turbo": ("turbo", "seismic"),
    "grey": ("gray", "coolwarm"),
}


class Look(NamedTuple):
    """How maps are drawn: the name of their `COLOURS`, and whether each patch is a square, not smooth."""

    colours: str = "inferno"
    squares: bool = False


SMOOTH = Look()


def look_of(colours: Any, squares: bool) -> Look:
    """A look whose colours exist. Raises InputError."""
    if not isinstance(colours, str) or colours not in COLOURS:
        raise suggest("colours", colours, COLOURS)
    return Look(colours, bool(squares))


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture uint8 [h, w, 3] with its name and a smaller line. `signed` is None for a photo, which has no map."""

    picture: np.ndarray
    title: str
    note: str = ""
    signed: bool | None = None

    plain = True  # whether the picture without a map is shown as well
    axes = 2  # of its map

    @property
    def units(self) -> tuple[int, int]:
        """Height and width in a grid, where the long side has `SIDE` units."""
        height, width = (max(1, round(side * SIDE / max(self.picture.shape[:2]))) for side in self.picture.shape[:2])
        return height, width

    def under(self, heatmap: np.ndarray, title: str, note: str, signed: bool, look: Look = SMOOTH) -> "Panel":
        """The picture under its map."""
        values, _ = shade(heatmap, self.picture.shape[:2], look.squares, signed)
        return Panel(blend(self.picture, values, signed, look.colours), title, note, signed)

    def of_height(self, height: int) -> "Panel":
        """With white below the picture: texts have different lengths."""
        missing = height - self.picture.shape[0]
        white = ((0, missing), (0, 0), (0, 0))
        return dataclasses.replace(self, picture=np.pad(self.picture, white, constant_values=255))

    def answer(self, heatmap: np.ndarray) -> dict[str, Any]:
        """The picture, and the shaded map for as many pixels (grey values 0 ... 255), as the live page has them."""
        values, signed = shade(heatmap, self.picture.shape[:2])
        grey = (((values + 1) / 2 if signed else values) * 255).round().astype(np.uint8)
        photo = data_url(Image.fromarray(self.picture), "JPEG", quality=90)
        return {"photo": photo, "shade": data_url(Image.fromarray(grey), "PNG"), "signed": signed}

    def listed(self, side: int) -> dict[str, Any]:
        """What the list of a report shows of it, its long side in pixels."""
        return {"thumb": jpeg(self.picture, side)}

    def page(self, side: int) -> dict[str, Any]:
        """What a report draws maps on."""
        return {"picture": jpeg(self.picture, side)}

    def values(self, heatmap: np.ndarray) -> np.ndarray:
        """The numbers [h, w] of a map that a report draws."""
        return heatmap

    def words(self, heatmap: np.ndarray) -> list[Any]:
        """The words of a text with their scores: a picture has none."""
        return []

    def scale(self, look: Look = SMOOTH) -> "ScalarMappable":
        """The colours of its map."""
        return scale_of(bool(self.signed), look.colours)

    def html(self) -> str:
        """Without its title and its note."""
        height, width = self.picture.shape[:2]
        alt, source = printable(f"{self.title} {self.note}"), data_url(Image.fromarray(self.picture), "PNG")
        size = f'width="{width}" height="{height}" style="max-width:100%;height:auto"'
        return f'<img {size} alt="{html.escape(alt)}" src="{source}">'


def has_signs(heatmap: np.ndarray) -> bool:
    """Whether a map has negative values, apart from those that are not finite."""
    values = np.asarray(heatmap)
    return bool((values[np.isfinite(values)] < 0).any())


def shade(
    heatmap: np.ndarray, size: tuple[int, int], squares: bool = False, signed: bool | None = None
) -> tuple[np.ndarray, bool]:
    """A token or pixel map [gh, gw] as values to show on `size` (h, w) pixels, and whether it is signed: with negative
    values, or if the caller asks for it, as for a map beside others of its method.

    Maps without negative values are stretched to [0, 1]; a constant map is 0. Signed maps are divided by the 99.5th
    percentile of their magnitude and cut to [-1, 1], so that zero stays in the middle and few extreme pixels do not
    hide the rest. What is not finite counts as 0.
    """
    values = np.nan_to_num(np.asarray(heatmap, np.float64), posinf=0, neginf=0)
    values = values / (np.abs(values).max(initial=0) or 1)
    signed = has_signs(values) if signed is None else signed
    # Bilinear with half-pixel centres, as `to_pixels`; that one's min-max would move the zero of a signed map.
    way = Image.Resampling.NEAREST if squares else Image.Resampling.BILINEAR
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize((size[1], size[0]), way))
    if signed:
        limit = np.percentile(np.abs(values), 99.5) or np.abs(values).max() or 1
        return np.clip(values / limit, -1, 1), True
    low, high = values.min(), values.max()
    return (values - low) / (high - low if high > low else 1), False


def scale_of(signed: bool, colours: str = "inferno") -> "ScalarMappable":
    """The colour scale of a shaded map."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(-1 if signed else 0, 1), COLOURS[colours][signed])


def blend(photo: np.ndarray, values: np.ndarray, signed: bool, colours: str = "inferno") -> np.ndarray:
    """The photo uint8 [h, w, 3], a little paler, under its shaded map [h, w]: the stronger the value, the less photo
    shows. Of a signed map, a value of 0 has no weight, and weights next to it grow with the value's square."""
    base = photo.astype(np.float64) / 255
    grey = base @ np.array([0.299, 0.587, 0.114])
    base = 0.4 * base + 0.6 * grey[..., None]  # a paler photo, so that colour means heat
    if signed:
        # Small values have the scale's whites, which would be fog on the photo: the outer halves are taken, and the
        # weight makes them pale.
        shown, squared = np.sign(values) * (0.5 + 0.5 * np.abs(values)), values**2
        weight = 0.98 * squared / (squared + 0.15)
    else:
        shown, weight = values, 0.25 + 0.5 * np.sqrt(values)
    colour = scale_of(signed, colours).to_rgba(shown)[..., :3]
    mixed = base * (1 - weight[..., None]) + colour * weight[..., None]
    return (mixed.clip(0, 1) * 255).round().astype(np.uint8)


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def jpeg(picture: np.ndarray, side: int) -> str:
    """A picture uint8 [h, w, 3] as the address of a JPEG file."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_url(image, "JPEG", quality=80, optimize=True)


def data_url(image: Image.Image, kind: str, **how: Any) -> str:
    """A picture as the address of a file of that kind ("PNG", "JPEG"), which a page may hold."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return f"data:image/{kind.lower()};base64,{as_base64(file.getvalue())}"
