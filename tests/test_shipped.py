"""The models that the project trained and ships."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import tokentm_jax as tm
from models.training.data import load_dataset
from tokentm_jax import metrics
from tokentm_jax.data.questions import asked
from tokentm_jax.data.scenes import A, B, C, scene
from tokentm_jax.models.checkpoint import read_description

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
CARDS = dict(re.findall(r"^# (\w+)\n(.*?)(?=^# |\Z)", (MODELS / "README.md").read_text(), re.DOTALL | re.MULTILINE))
IMAGES = {"cifar10_distilled": 0.88, "cifar10_vit": 0.75}  # the least share of the test images that is right
WORDS, QUESTION = "scenes_words", 5  # a folder; the number of a scene with the question of the pages
SCENES = sorted(name for name in CARDS if name.startswith("scenes_") and name != WORDS)
RECORDINGS = {"spoken_digits": "*_[0-3].wav", "spoken_digits_four": "*_theo_*"}  # what each was not trained on


@pytest.mark.parametrize("name", [*IMAGES, *RECORDINGS, *SCENES])
def test_the_card_is_true(name):
    path = MODELS / f"{name}.safetensors"
    content, card = path.read_bytes(), CARDS[name]
    assert hashlib.sha256(content).hexdigest() in card
    assert f"{len(content):,} bytes" in card
    assert len(content) < (3_000_000 if name in RECORDINGS else 400_000 if name in SCENES else 12_000_000)
    description = read_description(path)
    assert description is not None
    assert f"{description['top_1']:.2%}".replace("%", " %") in card
    assert description["top_1"] >= IMAGES.get(name, 0.98 if name in SCENES else 0.9)
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(tm.load(name).params)):,} parameters" in card


def test_the_default_knows_the_cat_and_explains_it():
    vit = tm.load()
    assert vit.name == "cifar10_distilled" and vit.class_names is not None
    images = vit.read([ROOT / "notebooks" / "chelsea.png"])
    assert vit.class_name(int(vit.logits(images).argmax())) == "cat"
    maps = tm.explain(vit, images)
    assert maps.shape == (1, 8, 8)
    assert np.isfinite(maps).all() and float(maps.max()) > float(maps.min()) >= 0


def test_the_demo_writes_a_picture_and_a_map(tmp_path):
    recipe = re.findall(r"^demo:.*\n\t\$\(BIN\)/tokentm (.+) --out out/demo\n", (ROOT / "Makefile").read_text(), re.M)
    command = [sys.executable, "-m", "tokentm_jax", *recipe[0].split(), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "chelsea_face.png").stat().st_size > 10_000
    with np.load(tmp_path / "chelsea_face.npz", allow_pickle=False) as saved:
        heat = saved["map"]
    assert heat.shape == (8, 8)

    # What the pages say of this picture: without the hottest patches there is no cat, and the others do not matter.
    vit = tm.load()
    (photo,) = vit.read([ROOT / "notebooks" / "chelsea_face.jpg"])

    def cat_without(patches):
        removed = np.zeros(64, bool)
        removed[patches] = True
        pixels = np.kron(removed.reshape(8, 8), np.ones((4, 4), bool))[..., None]
        logits = vit.logits(np.where(pixels, photo.mean((0, 1)), photo)[None])
        return float(jax.nn.softmax(logits)[0, vit.class_index("cat")])

    order = np.argsort(-heat.ravel())
    assert cat_without([]) > 0.9
    assert cat_without(order[:8]) < 0.5
    assert cat_without(order[-16:]) > 0.9


def test_the_demo_ends_with_the_next_command():
    demo = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert demo is not None
    *_, last = demo[1].splitlines()
    words = last.partition("tokentm ")[2].strip('"').split()
    assert words[0] == "explain" and (ROOT / words[1]).exists()
    assert words[words.index("--model") + 1] in tm.models.ARCHITECTURES


def test_the_photo_of_the_demo_is_a_part_of_the_photo_of_the_cat():
    whole = Image.open(ROOT / "notebooks" / "chelsea.png").convert("RGB").crop((140, 40, 380, 280))
    part = Image.open(ROOT / "notebooks" / "chelsea_face.jpg").convert("RGB")
    assert np.abs(np.asarray(whole, float) - np.asarray(part, float)).mean() < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_the_accuracy_is_the_one_on_the_card(name, shared):
    data = load_dataset(str(shared / "data" / "cifar10_test_a.zip"))
    vit = tm.load(name)
    assert data.class_names == vit.class_names
    predicted = [
        np.asarray(vit.logits(jnp.asarray(data.images[i : i + 250], jnp.float32) / 255)).argmax(-1)
        for i in range(0, len(data.labels), 250)
    ]
    description = read_description(MODELS / f"{name}.safetensors")
    assert description is not None
    assert abs((np.concatenate(predicted) == data.labels).mean() - description["top_1"]) < 5e-4


@pytest.mark.slow
def test_the_explainer_is_as_close_as_two_pairs_of_orders(shared):
    """Of which it has seen no more for each photo of its training; without the noise of what it is compared with."""
    path, card = MODELS / "explainers/cifar10_distilled.safetensors", CARDS["cifar10_distilled_explainer"]
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() in card and f"{len(content):,} bytes" in card
    vit, explainer = tm.load(), tm.amortised("cifar10_distilled")
    images = load_dataset(str(shared / "data" / "cifar10_test_a.zip"), 12).images / np.float32(255)
    found = np.asarray(tm.explain(vit, images, explainer))
    sampled, details = tm.explain(vit, images, "shapley", details=True, pairs=4)
    noise = float(np.square(details["standard_error"]).mean())
    gain = np.asarray(details["full_value"] - details["empty_value"])
    np.testing.assert_allclose(found.sum((1, 2)), gain, atol=0.05)  # its weights are in half precision
    assert np.square(found - sampled).mean() - noise < 1.5 * 2 * noise  # two pairs have twice the noise of four
    assert np.corrcoef(found.ravel(), np.ravel(sampled))[0, 1] > 0.5
    other = np.asarray(tm.explain(vit, images, explainer, target="frog"))
    assert np.corrcoef(other.ravel(), found.ravel())[0, 1] < 0.9


# ---- rendered scenes ------------------------------------------------------------------------------------------------


def test_all_shipped_models_are_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*.safetensors")) < 13_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_the_accuracy_on_scenes_is_the_one_on_the_card(name):
    vit, data = tm.load(name), load_dataset(f"scenes:{name.removeprefix('scenes_')}:test")
    assert data.class_names == vit.class_names
    predicted = np.asarray(vit.logits(jnp.asarray(data.images, jnp.float32) / 255)).argmax(-1)
    description = read_description(MODELS / f"{name}.safetensors")
    assert description is not None
    assert abs((predicted == data.labels).mean() - description["top_1"]) < 2 / len(data.labels)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCENES if name != "scenes_counts"])
def test_parts_that_cause_nothing_by_the_rule_have_almost_no_effect(name):
    """The score changes little where a part that the rule does not name is rendered away, a bystander too."""
    rule, vit = name.removeprefix("scenes_"), tm.load(name)
    scenes = [scene(rule, index, "test") for index in range(200)]
    images, without = (np.stack([getattr(s, n) for s in scenes]) / np.float32(255) for n in ("image", "without"))
    found = np.asarray(vit.logits(images)).argmax(-1)

    def predict(images):
        return vit.module.apply({"params": vit.params}, vit.preprocessing.normalise(images))

    drops = np.abs(metrics.part_drops(predict, images, without, np.stack([s.ids for s in scenes]), found, 8))
    pairs = zip(scenes, drops, strict=True)
    kinds = [(d, part.kind) for each, row in pairs for d, part in zip(row, each.parts, strict=False)]
    causes = [d for d, kind in kinds if kind == A or (kind == B and rule in ("conjunction", "xor", "more"))]
    others = [d for d, kind in kinds if kind not in (A, B)]
    bystanders = [d for d, kind in kinds if kind == C]
    assert np.mean(others) < 0.3 and np.mean(bystanders) < 0.3 and np.mean(causes) > 5 * np.mean(others)


# ---- questions about scenes -----------------------------------------------------------------------------------------


def test_a_question_is_answered_and_explained():
    pytest.importorskip("tokenizers")
    model, found = tm.load(WORDS), asked(QUESTION, "test", "colour")
    assert found.question == "What colour is the large circle?"
    reasons = tm.explain_words(model, found.question, image=found.scene.image, method="attn_lrp")
    assert reasons.pieces[reasons.start] == f" {found.answer[0]}"
    y, x = np.unravel_index(reasons.image_maps[0].argmax(), (8, 8))
    patch = found.scene.ids[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
    assert (patch == found.causes[0][0]).any()


def test_the_card_of_the_model_of_words_is_true():
    card, how = CARDS[WORDS], json.loads((MODELS / WORDS / "config.json").read_text())["tokentm_jax"]
    content = (MODELS / WORDS / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() in card and f"{len(content):,} bytes" in card
    assert f"{how['accuracy']:.1%}".replace("%", " %") in card
    with safe_open(MODELS / WORDS / "model.safetensors", "numpy") as file:
        count = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert f"{count:,} parameters" in card


@pytest.mark.slow
def test_the_share_of_right_answers_is_the_one_on_the_card():
    pytest.importorskip("tokenizers")
    from models.training.train_questions import answer_accuracy

    model = tm.load(WORDS)
    found = answer_accuracy(model.module, model.params, 400)
    how = json.loads((MODELS / WORDS / "config.json").read_text())["tokentm_jax"]
    assert abs(np.mean([*found.values()]) - how["accuracy"]) < 0.005


# ---- spoken digits --------------------------------------------------------------------------------------------------


def test_the_digits_are_heard_and_explained(shared, tmp_path):
    """Three recordings that the model was not trained on."""
    digits, paths = ("3", "6", "7"), []
    with zipfile.ZipFile(shared / "data/audio/spoken_digits.zip") as archive:
        for digit in digits:
            paths.append(tmp_path / f"{digit}.wav")
            paths[-1].write_bytes(archive.read(f"{digit}/{digit}_theo_1.wav"))
    vit = tm.load("spoken_digits")
    spectrograms = vit.read(paths)
    assert spectrograms.shape == (3, *vit.preprocessing.shape)
    assert [vit.class_name(int(best)) for best in vit.logits(spectrograms).argmax(-1)] == list(digits)
    maps = np.asarray(tm.explain(vit, spectrograms))
    assert maps.shape == (3, *vit.module.grid) and np.isfinite(maps).all()
    assert vit.preprocessing.audio is not None
    column = 2 * vit.preprocessing.audio.hop * vit.module.tiling.patch[1]  # bytes of a file
    for path, heatmap in zip(paths, maps, strict=True):  # what is relevant is where somebody speaks
        spoken = -(-(path.stat().st_size - 44) // column)
        assert heatmap[:, :spoken].mean() > 1.3 * heatmap[:, spoken:].mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDINGS)
def test_the_accuracy_of_the_digits_is_the_one_on_the_card(shared, name):
    vit = tm.load(name)
    data = load_dataset(shared / "data/audio/spoken_digits.zip", None, RECORDINGS[name], vit.preprocessing)
    predicted = np.asarray(vit.logits(jnp.asarray(data.images, jnp.float32) / 255).argmax(-1))
    description = read_description(MODELS / f"{name}.safetensors")
    assert description is not None
    one = 1 / len(data.labels)  # the weights are rounded to half precision
    assert abs((predicted == data.labels).mean() - description["top_1"]) < 1.2 * one
