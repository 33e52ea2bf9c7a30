"""`tm.show`: its pictures are those of the maps that `tm.explain` gives."""

import base64
import html
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax.inputs.photos import fit, view
from tokentm_jax.inputs.pictures import blend, shade

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


def test_a_figure_in_a_terminal(vit, path):
    """One line that tells how to see it."""
    assert repr(tm.show(path, vit)) == '<Figure of 2 pictures: a notebook shows it, .save("figure.png") writes it>'


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
    figure = tm.show([path, PHOTO[:, ::-1]], vit, METHODS, title="what $x$ is")
    whole = np.asarray(figure.image())
    for row in figure.rows:  # every panel is in it, pixel by pixel
        for panel in row:
            height, width = panel.picture.shape[:2]
            assert max(height, width) == 224
            windows = np.lib.stride_tricks.sliding_window_view(whole[:, :, 0], (1, 20))[:, :, 0]
            places = np.argwhere((windows == panel.picture[height // 2, :20, 0]).all(-1)) - [height // 2, 0]
            assert any((whole[y : y + height, x : x + width] == panel.picture).all() for y, x in places.clip(0))
    assert Image.open(io.BytesIO(figure._repr_png_())).size == whole.shape[1::-1]
    figure.save(tmp_path / "figure.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")), whole)
    figure.save(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    written = {html.unescape(line) for line in re.findall(r"<text[^>]*>([^<]*)</text>", text)}
    assert {"what $x$ is", "a <b> $x$.png", "photo 2", *METHODS} <= written  # a name for each row and column
    with pytest.raises(tm.InputError, match=r"a figure is written as \.png, .* got 'a\.gif'"):
        figure.save(tmp_path / "a.gif")


def test_several_classes(vit, path):
    """Columns of one method are classes; several methods have a row for each class."""
    images = vit.read(path)
    photo = view(Image.fromarray(PHOTO), vit.preprocessing, 224)
    logits = np.asarray(vit.logits(images), np.float64)[0]
    shares = np.exp(logits) / np.exp(logits).sum()

    def overlay(method, target):
        return blend(photo, *shade(np.asarray(tm.explain(vit, images, method, target))[0], photo.shape[:2]))

    for targets in ([4, 1], "4,1", ["4", 1, "4"]):
        (row,) = tm.show(path, vit, target=targets).rows
        assert [(panel.title, panel.note) for panel in row[1:]] == [
            (f"class {index}", f"{shares[index]:.1%}") for index in (4, 1)
        ]
        for panel, index in zip(row[1:], (4, 1), strict=True):
            np.testing.assert_array_equal(panel.picture, overlay("tokentm", index))
    rows = tm.show([path, path], vit, METHODS, [4, 1]).rows
    assert [[panel.title for panel in row] for row in rows] == [[path.name, *METHODS]] * 4
    notes = [f"class {index} {shares[index]:.1%}" for index in (4, 1, 4, 1)]
    assert [{panel.note for panel in row[1:]} for row in rows] == [{note} for note in notes]
    np.testing.assert_array_equal(rows[3][2].picture, overlay(METHODS[1], 1))
    assert [panel.title for panel in tm.show(path, vit, target="each").rows[0][1:]] == [f"class {i}" for i in range(5)]


def test_the_look_of_maps(vit, path):
    heatmap = np.asarray(tm.explain(vit, vit.read(path), "gradient_x_input", 1))[0]
    photo = view(Image.fromarray(PHOTO), vit.preprocessing, 224)
    large = tm.show(path, vit, "gradient_x_input", 1, side=448).rows[0][1].picture
    np.testing.assert_array_equal(
        large, blend(view(Image.fromarray(PHOTO), vit.preprocessing, 448), *shade(heatmap, large.shape[:2]))
    )
    panel = tm.show(path, vit, "gradient_x_input", 1, colours="viridis", squares=True).rows[0][1]
    np.testing.assert_array_equal(panel.picture, blend(photo, *shade(heatmap, photo.shape[:2], True), "viridis"))
    by_itself = tm.show(np.array([[0.0, 1.0], [0.5, 0.25]]), squares=True, colours="grey").rows[0][0].picture
    grey = [[0, 255], [128, 64]]
    np.testing.assert_allclose(by_itself[..., 0], np.kron(grey, np.ones((112, 112))), atol=1)


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
    for options, message in (
        ({"colours": "infreno"}, "did you mean 'inferno'"),
        ({"colours": None}, "unknown colours"),
        ({"side": 0}, "side must be greater than or equal to 16, got 0"),
        ({"target": ["each", 7]}, "out of range"),
        ({"target": "1,x"}, "class 'x'"),
        ({"target": []}, "target is an empty list"),
        ({"target": b"cat"}, "class"),
        ({"target": [[1]]}, "class"),
        ({"methods": []}, "no maps to show"),
        ({"methods": None}, "unknown method 'None'"),
        ({"methods": [5]}, "unknown method '5'"),
        ({"maps": {}}, "no maps to show"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.show(PHOTO, vit, **options)
    for maps in (np.zeros((2, 2, 3)), np.zeros(3), "maps", np.zeros((1, 2, 3), int)):
        with pytest.raises(tm.InputError, match="the maps 'heatmap'"):
            tm.show(PHOTO, vit, maps=maps)


TEXTS = Path(__file__).parent / "goldens" / "texts" / "distilbert"


def test_words_of_texts(tmp_path):
    """In a notebook they are text, each on the colour of its score; in a file they are drawn."""
    pytest.importorskip("tokenizers")
    text, texts = tm.load(TEXTS), ["a funny <b> film", "it is " + "very " * 10 + "dull"]
    figure = tm.show(texts, text, ",".join(METHODS), target=2)
    assert [[panel.title for panel in row] for row in figure.rows] == [list(METHODS)] * 2  # and no text without a map
    tokens = text.read(texts)
    shares = np.asarray(jax.nn.softmax(text.logits(tokens)))
    for place, method in enumerate(METHODS):
        scores = tm.explain(text, tokens, method, 2)
        for row, words, share in zip(figure.rows, tm.words(text, texts, scores), shares[:, 2], strict=True):
            panel = row[place]
            assert panel.note == f"label 2 {share:.1%}"
            page = re.findall(r'title="([^"]+)" style="background:#(\w{6})(\w\w)[^>]*>([^<]*)<', panel.html())
            assert [html.unescape(shown) for *_, shown in page] == [word.text for word in words]
            assert [score for score, *_ in page] == [f"{word.score:.3g}" for word in words]
            most = max(abs(word.score) for word in words)
            for (_, colour, opacity, _), word in zip(page, words, strict=True):
                assert int(opacity, 16) == round(0.75 * 255 * abs(word.score) / most)
                red, blue = int(colour[:2], 16), int(colour[4:], 16)
                assert red > blue if word.score >= 0 else red < blue
    both = figure.rows[0][0].picture, figure.rows[1][0].picture
    assert both[0].shape == both[1].shape and both[0].shape[1] == 336  # the first has white below
    strongest = figure.rows[0][0].picture.reshape(-1, 3).astype(int)
    assert (np.abs(strongest - [251, 171, 71]).max(1) < 4).sum() > 200
    figure.save(tmp_path / "figure.png")
    seen = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    np.testing.assert_array_equal(seen, np.asarray(figure.image()))
    assert "&lt;</span>" in figure._repr_html_() and "<b> film" not in figure._repr_html_()


def test_texts_with_maps_that_are_given():
    pytest.importorskip("tokenizers")
    text = tm.load(TEXTS)
    pair = ("a film", "\u05e9\u05dc\u05d5\u05dd 漢字 " + "x" * 80)
    found = tm.explain(text, text.read([pair]), "gae", details=True)
    (row,) = tm.show([pair], text, maps=found).rows
    assert row[0].note == tm.show([pair], text, "gae").rows[0][0].note
    assert row[0].html().count("<span") == len(tm.words(text, [pair], found[0])[0])
    assert "\n" in row[0].html()  # the second text of a pair begins a line
    (row,) = tm.show("a film", text, "rollout", target="each", colours="viridis", side=448).rows
    assert [panel.title for panel in row] == [f"label {k}" for k in range(5)] and row[0].picture.shape[1] == 672
    for what, options, message in (
        (7, {}, "must be a text or a list"),
        ("a film", {"maps": np.zeros((1, 2, 3))}, r"must be scores \[B, N\]"),
        ("a film", {"maps": np.zeros((2, 16))}, "are of 2 texts, and 1 are to be shown"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.show(what, text, **options)
