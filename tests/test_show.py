"""`tm.show`: its pictures are those of the maps that `tm.explain` gives."""

import base64
import io
import re

import numpy as np
import pytest
from conftest import tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax.cli.figure import blend, shade
from tokentm_jax.data.photos import fit, view

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
METHODS = ("tokentm", "gradient_x_input")


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(1)


@pytest.fixture
def path(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "a <b> $x$.png")
    return tmp_path / "a <b> $x$.png"


def pictures(figure):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', figure._repr_html_())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


@pytest.mark.parametrize("target", [None, 3])
def test_a_photo_and_its_maps(vit, path, target):
    figure = tm.show(path, vit, ",".join(METHODS), target)
    photo, images = view(Image.fromarray(PHOTO), vit.preprocessing, 224), vit.read(path)
    maps = {name: np.asarray(tm.explain(vit, images, name, target))[0] for name in METHODS}
    expected = [photo, *(blend(photo, *shade(heatmap, photo.shape[:2])) for heatmap in maps.values())]
    for panel, seen, wanted in zip(figure.rows[0], pictures(figure), expected, strict=True):
        np.testing.assert_array_equal(panel.picture, wanted)
        np.testing.assert_array_equal(seen, wanted)
    logits = np.asarray(vit.logits(images), np.float64)[0]
    index = int(logits.argmax()) if target is None else target
    share = np.exp(logits[index]) / np.exp(logits).sum()
    assert [panel.title for panel in figure.rows[0]] == [path.name, *METHODS]
    assert [panel.note for panel in figure.rows[0]] == ["", *[f"class {index} {share:.1%}"] * 2]
    assert "a &lt;b&gt; $x$.png" in figure._repr_html_() and "<b> $" not in figure._repr_html_()


def test_arrays_are_the_same_photo(vit, path):
    expected = tm.show(path, vit)
    for same in (PHOTO, PHOTO[None], PHOTO / 255, [path], str(path)):
        for panel, wanted in zip(tm.show(same, vit).rows[0], expected.rows[0], strict=True):
            np.testing.assert_array_equal(panel.picture, wanted.picture)
    seen = fit(Image.fromarray(PHOTO), vit.preprocessing)[None].astype(np.float32) / 255
    figure = tm.show(np.concatenate([seen, seen[:, ::-1]]), vit, "rollout")
    assert [[panel.title for panel in row] for row in figure.rows] == [["photo 1", "rollout"], ["photo 2", "rollout"]]
    assert figure.rows[0][1].note == expected.rows[0][1].note


def test_what_explain_gave(vit, path):
    images = vit.read([path, path])
    maps, details = tm.explain(vit, images, target=np.array([1, 4]), details=True)
    notes = [row[1].note for row in tm.show(images, vit, maps=(maps, details)).rows]
    assert [note.split("%")[0][:7] for note in notes] == ["class 1", "class 4"]
    both = tm.show(images, vit, maps={"mine": maps, "other": maps}).rows
    assert [[panel.title for panel in row] for row in both] == [
        ["photo 1", "mine", "other"],
        ["photo 2", "mine", "other"],
    ]
    expected = tm.show(images, vit, target=1).rows[0]
    np.testing.assert_array_equal(both[0][1].picture, expected[1].picture)
    assert not np.array_equal(both[1][1].picture, expected[1].picture)  # of class 4
    for by_itself, count in (((maps, details), 2), (np.asarray(maps).transpose(0, 2, 1), 2), (maps[0], 1)):
        assert [len(row) for row in tm.show(by_itself).rows] == [1] * count
    assert [row[0].note for row in tm.show((maps, details), vit).rows] == notes
    alone = tm.show(np.array([[0.0, 1.0], [0.5, 0.25]])).rows[0][0].picture
    assert alone.shape == (224, 224, 3)
    np.testing.assert_array_equal(alone[[0, 0], [0, -1]], [[0, 0, 3], [252, 254, 164]])  # the ends of inferno


def test_one_picture_of_all(vit, path, tmp_path):
    figure = tm.show([path, PHOTO[:, ::-1]], vit, METHODS)
    whole = np.asarray(figure.image())
    assert whole.shape[1] == 3 * (224 + 12) + 12
    for row in figure.rows:  # every panel is in it, pixel by pixel
        for panel in row:
            height, width = panel.picture.shape[:2]
            corner = panel.picture[0, :20]
            places = [
                (y, x)
                for y in range(whole.shape[0] - height + 1)
                for x in range(12, whole.shape[1] - width + 1, 236)
                if (whole[y, x : x + 20] == corner).all()
            ]
            assert any((whole[y : y + height, x : x + width] == panel.picture).all() for y, x in places)
    assert Image.open(io.BytesIO(figure._repr_png_())).size == figure.image().size
    figure.save(tmp_path / "figure.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "figure.png")), whole)


def test_what_is_refused(vit, path):
    for arguments, message in (
        ((path.with_name("no.png"), vit), "does not exist"),
        ((7, vit), "a photo must be a path"),
        (([], vit), "no photos"),
        ((PHOTO.astype(np.int64), vit), "a photo must be a path or an array"),
        ((PHOTO.astype(np.uint16), vit), "of uint8 or floats"),
        ((PHOTO * 1.0, vit), r"in \[0, 1\]"),
        ((PHOTO, vit, "gea"), "did you mean 'gae'"),
        ((PHOTO, vit, "gae", 5), "out of range"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.show(*arguments)
    for maps in (np.zeros((2, 2, 3)), np.zeros(3), "maps", np.zeros((1, 2, 3), int)):
        with pytest.raises(tm.InputError, match="the maps 'heatmap'"):
            tm.show(PHOTO, vit, maps=maps)
