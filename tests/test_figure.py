"""Pictures: their values, their size, and that no input spoils them."""

import io
import re
import warnings

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from tokentm_jax.cli.figure import Explained, arranged, grid, overlay_figure
from tokentm_jax.errors import InputError
from tokentm_jax.files import ours
from tokentm_jax.identity import write_figure
from tokentm_jax.inputs.pictures import COLOURS, Look, Panel, blend, look_of, shade

PHOTO = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


def drawn(figure, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_figure(figure, path)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]  # no unfinished file is left
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_shading_is_to_pixels():
    from tokentm_jax.maths.maps import to_pixels

    tokens = np.random.default_rng(1).random((6, 8)).astype(np.float32)
    values, signed = shade(tokens, (96, 128))
    assert not signed
    np.testing.assert_allclose(values, to_pixels(tokens[None], (96, 128))[0], atol=1e-6)


def test_signed_maps_keep_their_zero():
    values, signed = shade(np.array([[-2.0, 0.0, 4.0]]), (1, 3))
    assert signed
    np.testing.assert_allclose(values, [[-0.5, 0, 1]], atol=0.02)
    picture = blend(np.full((1, 3, 3), 100, np.uint8), values, signed)
    assert picture[0, 0, 2] > picture[0, 0, 0]  # against: blue
    assert picture[0, 2, 0] > picture[0, 2, 2]  # for: red
    assert picture[0, 1].tolist() == [100, 100, 100]


@pytest.mark.parametrize("colours", COLOURS)
def test_signed_overlays_leave_the_photo_at_zero(colours):
    """Neither veins at zero nor fog next to it, on photos of any brightness."""
    values = np.linspace(-1, 1, 2001)[None]
    near = np.abs(values[0]) <= 0.05
    for brightness in (0, 110, 255):
        photo = np.full((1, 2001, 3), brightness, np.uint8)
        picture = blend(photo, values, True, colours)[0].astype(int)
        assert (picture[1000] == brightness).all()
        change = np.abs(picture - brightness)
        assert change[near].max() <= 4
        assert np.abs(np.diff(picture, axis=0)).max() <= 5  # no edge anywhere; of 256 colours
        assert change[[0, -1]].max(-1).min() > 40  # and strong values show
        assert change[[500, 1500]].max(-1).min() > 20


def test_squares():
    tokens = np.random.default_rng(3).normal(size=(3, 4))
    values, signed = shade(tokens, (96, 128), squares=True)
    patches = values.reshape(3, 32, 4, 32)
    assert signed and (patches == patches[:, :1, :, :1]).all()
    np.testing.assert_allclose(patches[:, 0, :, 0], tokens / np.abs(tokens).max(), atol=1e-6)


FORMATS = {  # what starts a file, and where it names the program
    "png": (b"\x89PNG", lambda content: content[:200]),
    "jpg": (b"\xff\xd8", lambda content: Image.open(io.BytesIO(content)).info["comment"]),
    "pdf": (b"%PDF", lambda content: re.findall(rb"/Creator \((.*?)\)", content[-4096:])[0]),
    "svg": (b"<?xml", lambda content: re.findall(rb"<dc:creator>(.*?)</dc:creator>", content[:2048], re.DOTALL)[0]),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_files_have_the_format_of_their_name(tmp_path, kind):
    """Text stays text, and is no formula; pictures keep their pixels; equal figures give equal files."""
    name = r"$\frac{1$ cat"
    contents = []
    for _ in range(2):
        figure = sheet([name], {"tokentm": [np.eye(4)]}, "what $x$ is")
        write_figure(figure, tmp_path / f"a.{kind.upper()}")
        contents.append((tmp_path / f"a.{kind.upper()}").read_bytes())
    start, creator = FORMATS[kind]
    assert contents[0].startswith(start) and b"tokentm_jax " in creator(contents[0])
    assert contents[0] == contents[1] and ours(tmp_path / f"a.{kind.upper()}")
    if kind == "svg":
        text = contents[0].decode()
        assert {name, "tokentm", "what $x$ is", "low", "high"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", text))
        assert re.findall(r'<image[^>]* width="128"', text)
    if kind == "pdf":
        assert b"/FontFile2" in contents[0] and b"/Type3" not in contents[0]  # TrueType: text can be edited
        assert b"/Width 128" in contents[0]


def test_a_pdf_of_many_pictures_is_known(tmp_path):
    """Its list of objects is behind the mark."""
    figure = Figure()
    for i in range(700):
        figure.figimage(np.zeros((1, 1, 3), np.uint8), i, 0)
    with rc_context({"image.composite_image": False}):
        write_figure(figure, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().count(b"/Subtype /Image") > 600
    assert ours(tmp_path / "a.pdf")


@pytest.mark.parametrize("name", ["a", "a.gif", "a.ps", "thesis.png.txt", ".png"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"a figure is written as \.png, \.jpg, \.jpeg, \.pdf or \.svg, got "):
        write_figure(overlay_figure(PHOTO, np.eye(4), "title"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_unknown_colours_are_refused_with_the_nearest():
    assert look_of("magma", True) == Look("magma", True)
    with pytest.raises(InputError, match="unknown colours 'virids'; did you mean 'viridis'"):
        look_of("virids", False)


@pytest.mark.parametrize("value", [0.0, 3.0, -1.0, np.nan, np.inf, 1e-45, -1e300])
def test_a_constant_map_is_finite(value):
    values, _ = shade(np.full((2, 2), value), (4, 4))
    assert np.isfinite(values).all()
    assert np.ptp(values) == 0


@pytest.mark.parametrize("aspect", [(128, 128), (96, 128), (256, 64), (40, 200)])
def test_the_photo_keeps_its_proportions(tmp_path, aspect):
    """A mid-grey photo's panel is found again in the picture, with its proportions."""
    photo = np.full((*aspect, 3), 120, np.uint8)
    picture = drawn(overlay_figure(photo, np.zeros((4, 4)), "title"), tmp_path / "a.png")
    inside = (picture[:, : picture.shape[1] // 3] == 120).all(-1)
    assert inside.any(1).sum() / inside.any(0).sum() == pytest.approx(aspect[0] / aspect[1], rel=0.03)


@pytest.mark.parametrize(
    "title",
    [
        "tabby cat 71.2%",
        "a very long name, " * 40,
        "W" * 500,
        "$x$ \\frac{ 50%",
        "猫 🐈",
        "",
        "\x1b[31m\0\udcff\n\u202e",
    ],
)
def test_any_title(tmp_path, title):
    figure = overlay_figure(PHOTO, np.eye(4), title, subtitle=title)
    picture = drawn(figure, tmp_path / "a.png")
    assert (picture[:, -8:] == 255).all()  # nothing runs over the right edge
    assert (picture[:6] == 255).all()


def sheet(names, maps, heading="", questions=("",), look=Look()):
    """A grid of photos, all `PHOTO`, and of maps by method, each for all questions."""
    explained = [
        Explained(method, question, found, [question or "a class"] * len(names), ["71.2%"] * len(names))
        for question in questions
        for method, found in maps.items()
    ]
    return grid(arranged([Panel(PHOTO, name) for name in names], explained, look), heading, look, dpi=60)


def boxes_of_texts(figure, path):
    drawn(figure, path)
    texts = [*figure.texts, *(axes.title for axes in figure.axes)]
    texts += [
        label for axes in figure.axes if axes.axison for label in (*axes.get_xticklabels(), *axes.get_yticklabels())
    ]
    return {id(t): t.get_window_extent() for t in texts if t.get_text() and t.get_visible()}.values()


@pytest.mark.parametrize(("photos", "methods", "questions"), [(1, 1, 1), (2, 9, 1), (2, 1, 4), (2, 3, 2)])
def test_grids(tmp_path, photos, methods, questions):
    rng = np.random.default_rng(2)
    maps = {f"method_{i}": [rng.normal(size=(4, 4)) for _ in range(photos)] for i in range(methods)}
    maps["method_0"] = [np.abs(m) for m in maps["method_0"]]
    asked = [f"a long class name of number {i}, " * 5 for i in range(questions)]
    figure = sheet(["a long name, " * 5] * photos, maps, "model", asked)
    drawn(figure, tmp_path / "a.png")
    assert figure.get_size_inches()[0] <= 14
    pictures = [axes for axes in figure.axes if axes.images]
    rows = photos * (questions if methods > 1 else 1)
    assert len(pictures) == photos * methods * questions + rows
    boxes = [axes.get_position() for axes in figure.axes]
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= 1 and a.y1 <= 1
        assert not any(a.overlaps(b) for b in boxes[i + 1 :])


def test_a_method_has_one_scale_in_a_grid():
    """That of signs where one of its maps has some."""
    maps = {"occlusion": (np.eye(4), -np.eye(4)), "tokentm": (np.eye(4), np.eye(4) + 1)}
    explained = [
        Explained(method, question, [heatmap], [question], [""])
        for method, pair in maps.items()
        for question, heatmap in zip(("cat", "dog"), pair, strict=True)
    ]
    rows = arranged([Panel(PHOTO, "a.png")], explained)
    assert [[panel.signed for panel in row] for row in rows] == [[None, True, False]] * 2
    values = shade(np.eye(4), PHOTO.shape[:2], signed=True)[0]
    np.testing.assert_array_equal(rows[0][1].picture, blend(PHOTO, values, True))


def test_a_long_grid_has_a_size_that_files_can_have():
    row = [Panel(PHOTO, "a.png"), Panel(PHOTO, "tokentm", signed=False)]
    figure = grid([row] * 3, dpi=2e4)
    assert 50_000 < max(figure.get_size_inches()) * figure.dpi < 2**16


@pytest.mark.slow
def test_texts_do_not_overlap(tmp_path):
    maps = {name: [np.eye(4)] * 2 for name in ("transformer_attribution", "integrated_gradients", "conservative_lrp")}
    dogs = ["Staffordshire bullterrier, Staffordshire bull terrier", "cat"]
    for figure in (
        sheet(["a.png", "b.png"], maps, "deit_tiny"),
        sheet(["a.png", "a long name " * 9], maps, "deit_tiny", dogs),
        sheet(["a.png", "b.png"], {"tokentm": [np.eye(4), -np.eye(4)]}, "", dogs),
        sheet(["a.png", "b.png"], {f"{name} {i}": m for name, m in maps.items() for i in range(3)}, "model"),
        overlay_figure(PHOTO, np.eye(4), "a very long name, " * 20, "sub"),
    ):
        boxes = list(boxes_of_texts(figure, tmp_path / "a.png"))
        width, height = figure.canvas.get_width_height()
        assert len(boxes) >= 4
        for i, a in enumerate(boxes):
            assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= width and a.y1 <= height
            assert not any(a.overlaps(b) for b in boxes[i + 1 :])
