"""Pictures: their values, their size, and that no input spoils them."""

import warnings

import numpy as np
import pytest
from PIL import Image

from tokentm_jax.cli.figure import blend, overlay_figure, shade, sheet
from tokentm_jax.identity import write_png

PHOTO = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


def drawn(figure, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_png(figure, path)
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


@pytest.mark.parametrize(("photos", "methods"), [(1, 1), (3, 5), (2, 9), (1, 20)])
def test_sheets(tmp_path, photos, methods):
    rng = np.random.default_rng(2)
    maps = {f"method_{i}": [rng.normal(size=(4, 4)) for _ in range(photos)] for i in range(methods)}
    maps["method_0"] = [np.abs(m) for m in maps["method_0"]]
    figure = sheet([PHOTO] * photos, ["a long class name, " * 5] * photos, maps, "model")
    picture = drawn(figure, tmp_path / "a.png")
    assert picture.shape[1] <= 1800
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == photos * (1 + methods)
    boxes = [axes.get_position() for axes in figure.axes]
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= 1 and a.y1 <= 1
        assert not any(a.overlaps(b) for b in boxes[i + 1 :])


def test_texts_do_not_overlap(tmp_path):
    maps = {name: [np.eye(4)] for name in ("transformer_attribution", "integrated_gradients", "conservative_lrp")}
    for figure in (
        sheet([PHOTO] * 1, ["Staffordshire bullterrier, Staffordshire bull terrier 71.2%"], maps, "deit_tiny"),
        overlay_figure(PHOTO, np.eye(4), "a very long name, " * 20, "sub"),
    ):
        drawn(figure, tmp_path / "a.png")
        texts = [*figure.texts, *(axes.title for axes in figure.axes)]
        boxes = [t.get_window_extent() for t in texts if t.get_text()]
        assert len(boxes) >= 4
        for i, a in enumerate(boxes):
            assert not any(a.overlaps(b) for b in boxes[i + 1 :])
