"""`tokentm report`: what the page says against the methods themselves, and in a real browser that all of it works."""

import base64
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import opened, tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax.cli import report_page
from tokentm_jax.cli.main import main
from tokentm_jax.cli.report_details import packed, packed_map
from tokentm_jax.data.labels import IMAGENET_1K
from tokentm_jax.identity import digest
from tokentm_jax.models.loading import read_class_names

pytest.importorskip("jinja2")
HOSTILE = "<img src=x onerror=alert(1)>"
METHODS = "tokentm,rollout,gradient_x_input"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def unpacked(entry):
    levels = np.frombuffer(base64.b64decode(entry["data"]), "<u2").reshape(entry["shape"])
    return entry["low"] + levels * (entry["high"] - entry["low"]) / 65535


def content(page):
    """The settings and the photos' details of a page."""
    parts = dict(re.findall(r'<script id="([\w-]+)" type="application/json">(.*?)</script>', page.read_text("utf-8")))
    settings = json.loads(parts.pop("settings"))
    return settings, {int(name.split("-")[1]): json.loads(text) for name, text in parts.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and photos in class folders, of which one has a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    vit = tiny_vit(2)
    tm.models.write_checkpoint(
        folder / "tiny.safetensors", vit.module, vit.params, vit.preprocessing, class_names=list("abcde")
    )
    rng = np.random.default_rng(0)
    for number, name in enumerate(("a/1.png", "a/2.png", "b/1.png", f"c/{HOSTILE}.png")):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8) // (1 + number)).save(path)
    return folder


def evaluated(place, folder):
    """A finished run on the photos, of a map of pixels and its means over patches too."""
    recipe = folder / "recipe.py"
    recipe.write_text(
        "import tokentm_jax as tm\n"
        f"config = tm.EvaluateConfig('tiny', 'perturbation', {str(place / 'photos')!r}, "
        "(*tm.configs.rows('tokentm', 'rollout'), tm.Row('pixels', 'gradient_x_input'), "
        "tm.Row('patches', 'gradient_x_input', by_patch=True)), "
        f"checkpoint={str(place / 'tiny.safetensors')!r}, batch_size=4)\n"
    )
    assert run("evaluate", recipe, "--out", folder / "run").exit_code == 0
    return folder / "run"


def test_packed_numbers_come_back():
    array = np.random.default_rng(0).normal(size=(3, 4, 5))
    np.testing.assert_allclose(unpacked(packed(array)), array, atol=1e-4)
    assert unpacked(packed(np.full((2, 2), 3.5))).tolist() == [[3.5, 3.5]] * 2
    large = np.arange(224.0 * 224).reshape(224, 224)
    np.testing.assert_allclose(
        unpacked(packed_map(large)), large.reshape(112, 2, 112, 2).mean((1, 3)), rtol=1e-3, atol=2
    )


def test_a_page_of_photos(place):
    page = place / "photos.html"
    folders = [place / "photos" / name for name in "abc"]
    given = ["--checkpoint", place / "tiny.safetensors", "--methods", METHODS, "--target", "e", "--top", 2]
    found = run("report", *folders, *given, "--out", page)
    assert found.exit_code == 0, found.output
    settings, details = content(page)
    assert settings["methods"] == METHODS.split(",") and len(settings["photos"]) == len(details) == 4
    assert settings["signed"] == ["gradient_x_input"]
    assert "alert(1)>" not in page.read_text("utf-8") and settings["photos"][3]["name"].endswith(f"{HOSTILE}.png")

    vit = tm.load(None, place / "tiny.safetensors")
    images = vit.read([place / "photos" / "a" / "2.png"])
    logits = np.asarray(vit.logits(images))[0]
    own = details[1]
    order = np.argsort(-logits)
    assert own["classes"] == list(dict.fromkeys([*order[:2].tolist(), 4]))
    assert [c for c, _ in own["probabilities"]] == order.tolist()
    np.testing.assert_allclose(own["probabilities"][0][1], jax.nn.softmax(logits)[order[0]], rtol=1e-5)
    for klass in own["classes"]:
        for method in METHODS.split(","):
            key = "every" if method == "rollout" else str(klass)
            expected = np.asarray(tm.explain(vit, images, method, klass))
            got = unpacked(own["maps"][method][key])
            np.testing.assert_allclose(got, expected[0], atol=2e-5 * np.abs(expected).max())
            pixels = np.asarray(tm.to_pixels(expected, (16, 24)))[0]
            ranking = np.argsort(-pixels.ravel(), kind="stable")
            for way, first in enumerate((ranking, ranking[::-1])):
                black = images[0].reshape(-1, 3).copy()
                black[first[: 16 * 24 * 3 // 10]] = 0
                share = jax.nn.softmax(vit.logits(black.reshape(images.shape)))[0, klass]
                np.testing.assert_allclose(own["curves"][method][str(klass)][way][2], share, atol=2e-5)
        growing = unpacked(own["blocks"][str(klass)]["contribution"])
        expected = np.asarray(tm.explain(vit, images, "tokentm", klass, end_block=1))[0]
        np.testing.assert_allclose(growing[0], expected, rtol=1e-3, atol=1e-4 * growing.max())


TEXTS = Path(__file__).parent / "goldens" / "texts" / "distilbert"


@pytest.mark.slow
def test_a_page_of_texts(tmp_path):
    """The list has the texts, the details their pieces and the scores of the words."""
    pytest.importorskip("tokenizers")
    page, texts = tmp_path / "texts.html", [f"a funny {HOSTILE} film", "dull"]
    found = run("report", *texts, " ", "--model", TEXTS, "--methods", "tokentm,rollout", "--top", 2, "--out", page)
    assert found.exit_code == 0 and "text 3 must be a text with a word" in found.stderr
    settings, details = content(page)
    assert settings["kind"] == "text" and [photo["text"] for photo in settings["photos"]] == texts
    assert "alert(1)>" not in page.read_text("utf-8")
    text = tm.load(TEXTS)
    tokens = text.read(texts)
    shares = np.asarray(jax.nn.softmax(text.logits(tokens)))
    for i, own in details.items():
        assert "".join(part for part, _ in own["parts"]) == texts[i]
        assert own["classes"] == np.argsort(-shares[i])[:2].tolist() and own["blocks"] == {} and own["pixels"] == []
        for klass in own["classes"]:
            words = tm.words(text, texts, tm.explain(text, tokens, "tokentm", klass))[i]
            scores = unpacked(own["maps"]["tokentm"][str(klass)])
            np.testing.assert_allclose(scores, [[word.score for word in words]], atol=1e-6)
            numbered = [part for part, word in own["parts"] if word is not None]
            assert numbered == [word.text for word in words]
            (first, last) = own["curves"]["tokentm"][str(klass)]
            assert len(first) == len(last) == 9
    # The only word of the second text is there at 10 %.
    curve = details[1]["curves"]["tokentm"][str(details[1]["classes"][0])][0]
    assert curve[0] == pytest.approx(shares[1].max(), abs=1e-4)


@pytest.mark.slow
def test_a_page_of_recordings(tmp_path):
    pytest.importorskip("soundfile")
    vit, page = tm.load("spoken_digits"), tmp_path / "sound.html"
    (tmp_path / "a.wav").write_bytes(vit.preprocessing.example())
    given = ("report", tmp_path / "a.wav", "--model", "spoken_digits", "--methods", "gae", "--top", 1, "--out", page)
    assert run(*given).exit_code == 0
    settings, details = content(page)
    klass = details[0]["classes"][0]
    expected = np.asarray(tm.explain(vit, vit.read(tmp_path / "a.wav"), "gae", klass))[0]
    assert settings["kind"] == "recording" and details[0]["picture"].startswith("data:image/jpeg")
    np.testing.assert_allclose(  # with the lowest frequency below; an evaluation has 256 levels
        unpacked(details[0]["maps"]["gae"][str(klass)]), expected[::-1], atol=0.05 * np.abs(expected).max()
    )
    assert run(*given[:-1], tmp_path / "a.wav", "--overwrite").exit_code == 2


def test_pages_have_one_look():
    """Colours, type and spacing of all pages come from one file, and no style sheet has colours besides it."""
    folder = Path(report_page.__file__).parent
    look = (folder / "page" / "look.css").read_text()
    for template in ("report.html.j2", "text.html.j2"):
        assert '{% include "look.css" %}' in (folder / "pages" / template).read_text()
    assert "look.css" in (folder / "page" / "index.html").read_text()
    root = Path(__file__).resolve().parent.parent
    assert "  - look.css" in (root / "mkdocs.yml").read_text() and "var(--ink)" in (root / "docs/site.css").read_text()
    for sheet in ("page/base.css", "page/style.css", "pages/report.css"):
        text = (folder / sheet).read_text()
        assert not re.search(r":[^;{]*#[0-9a-f]{3,8}\b", text), sheet
        assert {f"--{name}" for name in re.findall(r"var\(--([a-z-]+)", text)} - {"--pale"} <= set(
            re.findall(r"--[a-z-]+(?=:)", look)
        )


@pytest.mark.slow
def test_a_page_of_a_run(place, tmp_path):
    out, page = evaluated(place, tmp_path), tmp_path / "run.html"
    found = run("report", out, "--out", page, "--best", 1)
    assert found.exit_code == 0, found.output
    settings, details = content(page)
    figures = settings["figures"]
    assert figures["cells"] == [
        {key: row[key] for key in row} for row in json.loads((out / "results.json").read_text())["rows"]
    ]
    values = {row["metric"]: row["value"] for row in figures["cells"] if row["method"] == "tokentm"}
    assert set(figures["sortable"]) == set(values)
    for metric, value in values.items():  # the mean over the images
        results = [photo["results"]["tokentm"][metric] for photo in settings["photos"]]
        np.testing.assert_allclose(np.mean(results), value, atol=1e-4)
    assert 2 <= len(details) <= 4 and len(settings["photos"]) == 4
    for own in details.values():
        assert own["pixels"] == ["pixels"]
        for of_pixels, of_patches in zip(own["maps"]["pixels"].values(), own["maps"]["patches"].values(), strict=True):
            means = unpacked(of_pixels).reshape(2, 8, 3, 8).mean((1, 3))
            np.testing.assert_allclose(unpacked(of_patches), means, atol=1e-3 * np.abs(unpacked(of_pixels)).max())
    first = figures["sortable"][0]
    results = [photo["results"]["tokentm"][first] for photo in settings["photos"]]
    assert {int(np.argmin(results)), int(np.argmax(results))} <= set(details)
    assert [curve["title"] for curve in figures["curves"]] == [
        "positive (lower is better)",
        "negative (higher is better)",
    ]

    other = tmp_path / "photos"  # the same names, of which one is damaged
    shutil.copytree(place / "photos", other)
    (other / "a" / "1.png").write_bytes(b"damaged")
    found = run("report", out, "--out", page, "--best", 1, "--data", other)
    assert found.exit_code == 0 and "1 of 4 pictures are not available" in found.stderr, found.output
    settings, details = content(page)
    assert [photo["thumb"] is None for photo in settings["photos"]] == [True, False, False, False] and 0 not in details

    gone = tmp_path / "gone"
    moved = run("report", out, "--out", page, "--data", gone, "--checkpoint", gone)
    assert moved.exit_code == 0 and moved.stderr.count("is not available") == 2
    settings, details = content(page)
    assert (
        details == {} and settings["photos"][0]["thumb"] is None and settings["figures"]["cells"] == figures["cells"]
    )
    assert "No pictures" in page.read_text("utf-8")


@pytest.mark.slow
def test_pages_of_a_score_show_its_maps(place, tmp_path):
    """Of a run that asks for a difference of logits, and of a store that asks for a channel, which is of no class."""
    recipe, page, out = tmp_path / "recipe.py", tmp_path / "page.html", tmp_path / "run"
    evaluated(place, tmp_path)
    recipe.write_text(recipe.read_text().replace("batch_size=4", "batch_size=4, score='versus:c'"))
    made = run("evaluate", recipe, "--out", out, "--methods", "tokentm")
    shutil.rmtree(out)
    assert made.exit_code == 2  # another score has a folder of its own
    assert run("evaluate", recipe, "--out", out, "--methods", "tokentm").exit_code == 0
    found = run("report", out, "--out", page)
    assert found.exit_code == 0 and "asked for versus:c" in page.read_text(), found.output
    settings, details = content(page)
    vit, shown = tm.load(None, place / "tiny.safetensors"), 0
    for place_of, entry in details.items():
        images = vit.read([place / "photos" / settings["photos"][place_of]["name"]])
        (klass,) = entry["classes"]
        expected = np.asarray(tm.explain(vit, images, "tokentm", klass, score=tm.scores.Versus(2)))[0]
        got = unpacked(entry["maps"]["tokentm"][str(klass)])
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
        assert entry["curves"] == entry["blocks"] == {}
        shown += 1
    assert shown

    made = run("dataset", place / "photos", "--out", tmp_path / "maps", "--checkpoint", place / "tiny.safetensors",
               "--methods", "tokentm", "--batch-size", 4, "--score", "channel:1")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert run("report", tmp_path / "maps", "--out", page).exit_code == 0
    settings, details = content(page)
    assert all(entry["classes"] == [-1] and entry["probability"] == {} for entry in details.values())
    assert settings["classes"]["-1"] == "channel:1"


def test_a_page_of_a_store(place, tmp_path):
    store, page = tmp_path / "maps", tmp_path / "store.html"
    made = run("dataset", place / "photos", "--out", store, "--checkpoint", place / "tiny.safetensors", "--methods",
               "tokentm,rollout", "--batch-size", 4)  # fmt: skip
    assert made.exit_code == 0, made.output
    names = tmp_path / "names.txt"
    names.write_text("\n".join("vwxyz"))
    found = run("report", store, "--out", page, "--classes", names, "--limit", 2)
    assert found.exit_code == 0, found.output
    settings, details = content(page)
    stored = tm.open_maps(store)
    assert len(settings["photos"]) == 2 and settings["methods"] == ["tokentm", "rollout"]
    for place_of, entry in details.items():
        row = stored.keys.index(settings["photos"][place_of]["name"])
        klass = str(int(stored.target[row]))
        expected = stored.read("rollout", np.array([row]))[0]
        np.testing.assert_allclose(unpacked(entry["maps"]["rollout"][klass]), expected, atol=1e-4 * expected.max())
        assert settings["classes"][klass] in "vwxyz"
    for kept, shown in (("top5", 5), ("none", 1)):
        less = tmp_path / kept
        run("dataset", place / "photos", "--out", less, "--checkpoint", place / "tiny.safetensors", "--methods",
            "tokentm,rollout", "--batch-size", 4, "--logits", kept)  # fmt: skip
        found = run("report", less, "--out", page, "--classes", names, "--limit", 2)
        assert found.exit_code == 0 and f"No probabilities: the store was made with --logits {kept}." in found.stderr
        other, without = content(page)
        assert other["classes"].items() <= settings["classes"].items()
        for place_of, entry in details.items():
            known = entry | {
                "probability": {},
                "probabilities": [[c, None] for c, _ in entry["probabilities"][:shown]],
            }
            assert without[place_of] == known and "probability" not in other["photos"][place_of]
    # Without the checksum of its class names, which a store need not have, classes are shown by their numbers.
    root = json.loads((store / "tokentm.json").read_text())
    del root["classes"]
    (store / "tokentm.json").write_text(json.dumps(root))
    found = run("report", store, "--out", page, "--limit", 2)
    assert found.exit_code == 0, found.output
    settings, _ = content(page)
    assert all(re.search(r"\d", name) for name in settings["classes"].values())


@pytest.mark.slow
def test_a_page_of_a_store_of_texts(tmp_path):
    """With their model, the words of texts have the stored scores."""
    pytest.importorskip("tokenizers")
    store, page, texts = tmp_path / "maps", tmp_path / "store.html", ["a funny film", "dull"]
    (tmp_path / "texts.tsv").write_text("".join(f"{text}\t0\n" for text in texts))
    made = run("dataset", tmp_path / "texts.tsv", "--out", store, "--model", TEXTS, "--methods", "tokentm",
               "--batch-size", 2, "--dtype", "float32")  # fmt: skip
    assert made.exit_code == 0, made.output
    refused = run("report", store, "--out", page)
    assert refused.exit_code == 2 and "name it with --model" in refused.stderr
    assert run("report", store, "--out", page, "--model", "cifar10_vit").exit_code == 2
    found = run("report", store, "--out", page, "--model", TEXTS)
    assert found.exit_code == 0, found.output
    settings, details = content(page)
    assert settings["kind"] == "text" and [photo["text"] for photo in settings["photos"]] == texts
    assert "2 texts of texts.tsv" in page.read_text("utf-8")
    text = tm.load(TEXTS)
    for i, own in details.items():
        (klass,) = own["classes"]
        (words,) = tm.words(text, texts[i], tm.explain(text, text.read(texts[i]), "tokentm", klass))
        np.testing.assert_allclose(unpacked(own["maps"]["tokentm"][str(klass)]), [[w.score for w in words]], atol=1e-5)
        assert "".join(part for part, _ in own["parts"]) == texts[i]


@pytest.mark.slow
def test_a_page_of_a_run_of_texts(tmp_path):
    """The results per text have the means of the table, and the details the words' scores."""
    pytest.importorskip("tokenizers")
    texts = ["a funny film", "dull", "not a bad idea at all"]
    (tmp_path / "texts.tsv").write_text("".join(f"{text}\t{i}\n" for i, text in enumerate(texts)))
    recipe, out, page = tmp_path / "recipe.py", tmp_path / "run", tmp_path / "run.html"
    recipe.write_text(
        "import tokentm_jax as tm\n"
        f"config = tm.EvaluateConfig('texts', 'eraser', {str(tmp_path / 'texts.tsv')!r}, "
        f"tm.configs.rows('tokentm', 'rollout'), {str(TEXTS)!r}, batch_size=2)\n"
    )
    for command in (("evaluate", recipe, "--out", out), ("report", out, "--out", page, "--best", 1)):
        found = run(*command)
        assert found.exit_code == 0, found.output
    settings, details = content(page)
    assert settings["kind"] == "text" and [photo["text"] for photo in settings["photos"]] == texts
    for row in json.loads((out / "results.json").read_text())["rows"]:
        if row["method"] in ("tokentm", "rollout"):
            results = [photo["results"][row["method"]][row["metric"]] for photo in settings["photos"]]
            np.testing.assert_allclose(np.mean(results), row["value"], atol=1e-4)
    text = tm.load(TEXTS)
    assert details
    for i, own in details.items():
        for klass, numbers in own["maps"]["tokentm"].items():
            (words,) = tm.words(text, texts[i], tm.explain(text, text.read(texts[i]), "tokentm", int(klass)))
            np.testing.assert_allclose(unpacked(numbers), [[word.score for word in words]], atol=1e-5)


def test_classes_of_a_store_of_a_model_of_timm(place, tmp_path, monkeypatch):
    """ImageNet's names are those of the package: nothing is downloaded for them."""
    store, page = tmp_path / "maps", tmp_path / "store.html"
    run("dataset", place / "photos", "--out", store, "--checkpoint", place / "tiny.safetensors", "--limit", 2)
    names, wnids = read_class_names(IMAGENET_1K, 1000)
    root = json.loads((store / "tokentm.json").read_text())
    root["classes"], root["model"]["name"] = digest(names, wnids), "deit_tiny_patch16_224"
    (store / "tokentm.json").write_text(json.dumps(root))
    monkeypatch.setattr("tokentm_jax.models.loading.download_weights", lambda name: pytest.fail("a download"))
    assert run("report", store, "--out", page).exit_code == 0
    settings, _ = content(page)
    assert all(name == names[int(klass)] for klass, name in settings["classes"].items())


def test_bad_arguments_are_one_sentence(place, tmp_path):
    checkpoint, photos = place / "tiny.safetensors", place / "photos"
    (tmp_path / "results.json").write_text("{}")
    for arguments, sentence in (
        ([tmp_path / "none.png"], r"^Error: \S+none.png does not exist: expected photos, a run or a store\n$"),
        ([photos, "--methods", "gea"], "did you mean 'gae'"),
        ([photos, "--checkpoint", checkpoint, "--target", "z"], "z"),
        ([photos, "--data", photos], "--data is for a report on a run or a store, not on photos"),
        ([photos, "--best", 2], "--best is for a report on a run, not on photos"),
        ([tmp_path], "results.json lacks 'rows'"),
        ([tmp_path, photos], "is a run: a report is on one of them, or on photos"),
        ([photos, tmp_path], "is a run: a report is on one of them, or on photos"),
        ([photos, "--checkpoint", checkpoint, "--out", tmp_path / "no" / "page.html"], "its folder does not exist"),
        ([photos, "--checkpoint", checkpoint, "--out", tmp_path], "is a folder, and a file is to be written there"),
    ):
        found = run("report", *arguments, *([] if "--out" in arguments else ["--out", tmp_path / "page.html"]))
        assert found.exit_code == 2 and re.search(sentence, found.output), found.output
        assert "Traceback" not in found.output and not (tmp_path / "page.html").exists()


PIXELS = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"


@pytest.mark.slow
def test_each_photo_has_its_own_class_in_a_browser(place, tmp_path):
    """And the page cautions where a class is improbable; a signed map covers nothing where it is zero."""
    file = tmp_path / "photos.html"
    given = ["--checkpoint", place / "tiny.safetensors", "--methods", METHODS, "--top", 5]
    assert run("report", place / "photos" / "a", *given, "--out", file).exit_code == 0
    details = content(file)[1]
    # The shares of a model that is sure, and different classes first.
    text = file.read_text("utf-8")
    for i, own in details.items():
        order = [c for c, _ in own["probabilities"]]
        order = order if i else order[::-1]
        changed = {
            **own,
            "classes": order,
            "probability": {c: (0.9, 0.06, 0.03, 0.01, 0.0001)[k] for k, c in enumerate(order)},
        }
        changed["probabilities"] = [[c, changed["probability"][c]] for c in order]
        old = re.search(rf'<script id="details-{i}" type="application/json">(.*?)</script>', text)
        assert old is not None
        text = text.replace(old[1], json.dumps(changed))
    file.write_text(text, "utf-8")
    with opened(file.as_uri(), viewport={"width": 1280, "height": 800}) as page:
        page.locator("#gallery button").first.click()
        first = page.input_value("#class")
        assert not page.is_visible("#caution")
        last = page.locator("#class option").last.get_attribute("value")
        page.select_option("#class", last)
        assert re.search("Caution: the probability of “.” is only <.0.1.%", page.inner_text("#caution"))
        page.keyboard.press("Escape")
        page.locator("#gallery button").nth(1).click()
        assert page.input_value("#class") not in (first,) and not page.is_visible("#caution")
        assert page.input_value("#class") == last  # which is this photo's best
        page.click("#previous")
        assert page.input_value("#class") == first

        page.locator("#photo").press("Escape")
        page.fill("#opacity", "100")
        page.locator("#gallery button").first.click()
        signed = page.locator("#maps canvas").nth(2)
        pixels = np.array(signed.evaluate(PIXELS)).reshape(-1, 4)
        listed = page.evaluate(
            "() => { const d = detailsOf(0), m = mapOf(d, 'gradient_x_input', document.getElementById('class').value);"
            " return [...shaded(resized(m, 96, Math.round(96 * m.w / m.h))).values]; }"
        )
        share = np.array(listed)
        # One scale for each method, whatever the signs of one of its maps.
        positive = "(name) => shaded({ h: 1, w: 2, values: [0, 1] }, undefined, name).signed"
        assert page.evaluate(positive, "gradient_x_input") and not page.evaluate(positive, "tokentm")
        assert share.min() < 0 < share.max() and np.abs(share).max() == 1
        np.testing.assert_allclose(pixels[:, 3] / 255, 1.15 * share**2 / (share**2 + 0.15), atol=0.005)


@pytest.mark.slow
def test_the_page_in_a_browser(place, tmp_path):
    out, page_file = evaluated(place, tmp_path), tmp_path / "run.html"
    assert run("report", out, "--out", page_file, "--best", 1).exit_code == 0
    results = json.loads((out / "results.json").read_text())
    with opened(page_file.as_uri(), viewport={"width": 360, "height": 800}) as page:

        def drawn(selector):
            return page.locator(selector).first.evaluate("canvas => canvas.toDataURL()")

        def names():
            return page.locator("#gallery .name").all_text_contents()

        def changes(look, control, value):
            before = look()
            node = page.locator(control)
            kind = node.evaluate("node => node.type")
            if kind == "range":
                node.fill(str(value))
            elif kind == "search":
                node.fill(value)
            elif kind == "checkbox":
                node.set_checked(value)
            else:
                node.select_option(value)
            page.wait_for_timeout(100)
            assert look() != before, control

        # The run: the table sorts, and a row leaves the curves.
        first_rows = lambda: page.locator("#figures tbody th").all_text_contents()  # noqa: E731
        assert first_rows() == ["TokenTM", "Attention rollout", "pixels", "patches", "random"]
        clean = next(row for row in results["rows"] if row["method"] == "clean")  # seen on a phone without scrolling
        assert page.inner_text("#clean").startswith(f"Clean accuracy: {clean['value']:.2f} % [")
        box = page.locator("#clean").bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360
        scale = page.locator("#gallery-scales")
        assert "low" in scale.inner_text() and "the more important for the predicted class" in scale.inner_text()
        ramp = lambda: page.locator("#gallery-scales canvas").evaluate("c => c.toDataURL()")  # noqa: E731
        page.locator("#figures thead button").nth(4).click()
        by_aopc = first_rows()
        page.locator("#figures thead button").nth(4).click()
        assert first_rows() == by_aopc[::-1]
        lines = page.locator("#panels polyline")
        assert lines.count() == 10
        page.locator("#legend input").first.uncheck()
        assert page.locator("#panels polyline").count() == 8

        # The gallery.
        changes(names, "#only", False)
        assert len(names()) == 4 and any(HOSTILE in name for name in names())
        best = names()
        changes(names, "#order", "worst")
        assert names() == best[::-1]
        changes(names, "#search", "1.png")
        changes(names, "#search", "")
        changes(names, "#right", "right")
        page.locator("#right").select_option("")
        card = "#gallery button:not([aria-disabled]) canvas"
        page.locator(card).first.scroll_into_view_if_needed()
        changes(lambda: (drawn(card), ramp()), "#colours", "viridis")
        changes(lambda: drawn(card), "#opacity", 20)
        changes(lambda: drawn(card), "#method", "rollout")

        # A photo, by keyboard; the focus comes back.
        page.locator("#gallery button:not([aria-disabled])").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("#photo").get_attribute("open") is not None
        assert page.locator("#maps figcaption").all_text_contents()[1] == "TokenTM"
        scales = page.locator("#map-scales").inner_text()  # of maps without signs, and of those with signs
        assert "the more important for" in scales and "speaks for" in scales and "against it" in scales
        assert page.evaluate("document.getElementById('photo').scrollWidth <= innerWidth")
        name = page.locator("#photo-name").text_content()
        page.keyboard.press("ArrowRight")
        assert page.locator("#photo-name").text_content() != name
        page.keyboard.press("ArrowLeft")
        changes(lambda: drawn("#masked"), "#share", 60)
        changes(lambda: drawn("#masked"), "#direction", "1")
        page.select_option("#curve-method", "pixels")
        assert "A map of pixels" in page.locator("#curve").inner_text()
        changes(lambda: drawn("#masked"), "#curve-method", "tokentm")
        assert "A map of pixels" not in page.locator("#curve").inner_text()
        box = page.locator("#curve svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
        assert page.locator("#share-value").text_content() in ("80 %", "90 %")
        changes(lambda: drawn("#block-map"), "#block", 1)
        changes(lambda: drawn("#block-map"), "#quantity", "attention: necc")
        page.locator("#strip button").nth(1).click()
        assert page.locator("#block-value").text_content() == "2 of 2"
        masked = page.evaluate(
            "() => { const c = document.getElementById('masked'), d = c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data; return d.filter((v, i) => i % 4 === 3 && v === 255).length / (c.width * c.height); }"
        )
        assert masked == pytest.approx(int(page.locator("#share").input_value()) / 100, abs=0.01)
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.dataset.photo") is not None
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
