"""Known causes: the sources, and the tasks that compare relevance with their truth."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax import metrics
from tokentm_jax.configs import EvaluateConfig, rows
from tokentm_jax.data import programs
from tokentm_jax.data.scenes import FEWEST, RULES, A, B, C, rendered, scene
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.images import HALF, Preprocessing
from tokentm_jax.maths.scores import margin
from tokentm_jax.models.loading import Model
from tokentm_jax.models.vit import init_params
from tokentm_jax.runs.evaluate import evaluate


def recorded(folder, row, field):
    """A field of the records of a row: example -> value."""
    (file,) = (folder / "records").glob(f"{row}-*.jsonl")
    found = [
        (key, value)
        for line in map(json.loads, file.read_text().splitlines())
        for (key, _), value in zip(line["keys"], line["fields"][field], strict=True)
    ]
    assert len(found) == len(dict(found))  # no example is explained twice
    return dict(found)


# ---- rendered scenes ------------------------------------------------------------------------------------------------

LABELS = {  # from the numbers of red discs and blue squares, and the column of the first disc
    "counts": lambda a, b, column: 4 * a + b,
    "part": lambda a, b, column: a > 0,
    "conjunction": lambda a, b, column: a > 0 and b > 0,
    "xor": lambda a, b, column: (a > 0) != (b > 0),
    "count": lambda a, b, column: a,
    "more": lambda a, b, column: 1 + (a > b) - (a < b),
    "position": lambda a, b, column: 0 if a == 0 else 1 if column < 2 else 2,
    "bystander": lambda a, b, column: a > 0,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_label_of_a_scene_follows_from_its_parts(rule):
    labels = set()
    for index in range(60):
        found = scene(rule, index)
        kinds = [part.kind for part in found.parts]
        column = next((part.place[1] for part in found.parts if part.kind == A), None)
        if rule == "bystander":
            assert kinds.count(B) == 0
        assert found.label == int(LABELS[rule](kinds.count(A), kinds.count(B), column))
        assert len({part.place for part in found.parts}) == len(found.parts) <= 8
        labels.add(found.label)
    assert len(labels) >= len(RULES[rule].classes) - 3  # of 16 classes some are missing in 60 scenes


def test_a_part_rendered_away_leaves_the_scene_that_never_had_it():
    for index in range(5):
        found = scene("more", index, "test")
        assert found.image.shape == (64, 64, 3) and sorted({*found.ids.ravel()}) == [*range(len(found.parts) + 1)]
        for number in range(1, len(found.parts) + 1):
            others = found.parts[: number - 1] + found.parts[number:]
            image, _ = rendered(others, found.without)
            expected = np.where((found.ids == number)[..., None], found.without, found.image)
            np.testing.assert_array_equal(image, expected)
            rows, columns = np.nonzero(found.ids == number)  # a place has patches of its own
            assert {(rows.min() // 16, columns.min() // 16), (rows.max() // 16, columns.max() // 16)} == {
                found.parts[number - 1].place
            }


def test_the_bystander_is_correlated_in_training_and_independent_in_tests():
    def together(split):
        found = [scene("bystander", index, split) for index in range(300)]
        return np.mean([(found.label == 1) == any(part.kind == C for part in found.parts) for found in found])

    assert together("train") > 0.85 and 0.4 < together("test") < 0.6


def test_scenes_are_a_source_that_is_never_stored():
    source = open_source("scenes:count:test", limit=3)
    assert len(source) == 3 and source.class_names == ("0", "1", "2", "3") and source.masked and source.parts
    assert source.identity == open_source("scenes:count:test").identity != open_source("scenes:count:train").identity
    example, expected = source[1], scene("count", int(source.keys[1]), "test")
    np.testing.assert_array_equal(np.asarray(example.content), expected.image)
    np.testing.assert_array_equal(np.asarray(example.without), expected.without)
    np.testing.assert_array_equal(example.mask, expected.ids)
    assert example.label == expected.label and len(expected.parts) >= FEWEST["test"]
    for wrong, said in {"scenes:cuont:test": "did you mean 'count'", "scenes:count:dev": "scenes:RULE:train"}.items():
        with pytest.raises(InputError, match=said):
            open_source(wrong)


# ---- mosaics --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of 8 classes with 3 photos each: class k is grey of level 30 k, number i has i + 1 dark columns."""
    folder = tmp_path_factory.mktemp("colours")
    for k in range(8):
        (folder / str(k)).mkdir()
        for i in range(3):
            photo = np.full((20, 24, 3), 30 * k, np.uint8)
            photo[:, 4 : 5 + i] = 255
            Image.fromarray(photo).save(folder / str(k) / f"{i}.png")
    return folder


def test_mosaics_have_photos_of_different_classes_and_halves_without_a_common_photo(colours):
    source = open_source(f"mosaic:2:{colours}")
    assert len(source) == 24 and source.masked and source.labelled and not source.parts
    assert source.class_names == tuple(map(str, range(8)))
    photos = {half: set() for half in ("even", "odd")}
    for half, seen in photos.items():
        part = open_source(f"mosaic:2:{colours}", half=half)
        for index in range(len(part)):
            example = part[index]
            pixels = np.asarray(example.content)
            assert pixels.shape == (40, 40, 3) and example.mask.shape == (40, 40) and example.mask.sum() == 400
            cells = pixels.reshape(2, 20, 2, 20, 3).transpose(0, 2, 1, 3, 4).reshape(4, 20, 20, 3)
            levels = cells[:, 0, -1, 0]
            assert len({*levels}) == 4
            cell = example.key.partition("/")[2]
            row, column = divmod(int(cell), 2)
            assert example.mask[20 * row :, 20 * column :][:20, :20].all()
            assert levels[int(cell)] == 30 * example.label
            seen |= {cell.tobytes() for cell in cells}
    assert photos["even"] and not photos["even"] & photos["odd"]
    for wrong, said in {"mosaic:1:x": "K from 2 to 4", f"mosaic:3:{colours}": "different classes"}.items():
        with pytest.raises(InputError, match=said):
            open_source(wrong)


def test_pointing_explains_the_class_of_each_cell(colours, tmp_path):
    vit = tiny_vit(1)
    module = vit.module.clone(num_classes=8)
    params = init_params(module, jax.random.key(1))
    vit = dataclasses.replace(vit, module=module, params=params, class_names=(*"01234567",))
    source = open_source(f"mosaic:2:{colours}", limit=5, seed=0)
    examples = [source[i] for i in range(5)]
    images, masks = zip(*(vit.preprocessing.levels(each, "reference") for each in examples), strict=True)
    images, masks = np.stack(images) / np.float32(255), np.stack(masks)
    labels = np.array([each.label for each in examples])
    sure = np.asarray(jax.nn.softmax(vit.logits(images)))[range(5), labels]
    least = float(np.median(sure)) - 1e-6
    config = EvaluateConfig(
        "p",
        "pointing",
        f"mosaic:2:{colours}",
        rows("input_gradient"),
        profile="reference",
        limit=5,
        batch_size=5,
        score="margin",
        options={"probability": least},
    )
    results = evaluate(config, vit, out=tmp_path / "p")
    found = recorded(tmp_path / "p", "input-gradient", "share")
    counts = np.array([example.key in found for example in examples])
    np.testing.assert_array_equal(counts, sure >= least)  # only they are explained
    heat = np.asarray(tm.explain(vit, images, "input_gradient", target=labels, score=margin))
    heat, inside = (np.asarray(a).reshape(5, 2, 8, 3, 8).mean((2, 4)) for a in (heat, masks))
    expected = ((heat * inside).sum((1, 2)) / heat.sum((1, 2)))[counts]
    np.testing.assert_allclose(
        [found[example.key] for example in examples if example.key in found], expected, atol=1e-5
    )
    figures = {(row["method"], row["metric"]): row for row in results["rows"]}
    assert figures["clean", "counted"]["value"] == 60 and figures["input_gradient", "share"]["images"] == 3
    assert figures["input_gradient", "share"]["value"] == pytest.approx(expected.mean(), abs=1e-6)
    # Intervals are over mosaics, of which a cell is a part.
    counted = [example.key for example in examples if example.key in found]
    mosaics = [key.partition("/")[0] for key in counted]
    interval = metrics.bootstrap(np.array([found[key] for key in counted]), groups=mosaics)
    share = figures["input_gradient", "share"]
    np.testing.assert_allclose((share["value"], share["low"], share["high"]), interval, atol=1e-6)
    assert "intervals over the groups of images" in (tmp_path / "p/results.md").read_text()
    fewer = evaluate(dataclasses.replace(config, limit=3), vit, out=tmp_path / "p")  # of a folder that has more
    of_these = counts[[example.key in open_source(config.data, limit=3, seed=0).keys for example in examples]]
    (row,) = (row for row in fewer["rows"] if row["metric"] == "counted")
    assert row["images"] == 3 and row["value"] == pytest.approx(100 * of_these.mean())
    with pytest.raises(InputError, match=r"no image of .* counts by the options of the task 'pointing'"):
        evaluate(dataclasses.replace(config, options={"probability": 0.99}), vit, out=tmp_path / "none")


@pytest.mark.parametrize(("place", "blend"), [("anywhere", 1.0), ("corner", 0.5)])
def test_a_trigger_changes_its_mark_and_nothing_else(colours, place, blend):
    source = open_source(f"trigger:label=2,size=3,place={place},blend={blend}:{colours}")
    assert source.parts and source.masked and len(source) == 7 * 3  # those of the trigger's class are left out
    assert source.identity != open_source(f"trigger:label=3,size=3,place={place},blend={blend}:{colours}").identity
    places = set()
    for index in range(len(source)):
        example = source[index]
        clean = np.asarray(Image.open(colours / example.key).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(example.without), clean)
        rows, columns = np.nonzero(example.mask)
        assert len(rows) == 9 and example.label == 2
        assert np.ptp(rows) == np.ptp(columns) == 2
        places.add((rows[0], columns[0]))
        pixels = np.asarray(example.content).astype(int)
        np.testing.assert_array_equal(pixels[example.mask == 0], clean[example.mask == 0])
        expected = (1 - blend) * clean[example.mask == 1] + blend * np.array((255, 0, 255))
        np.testing.assert_allclose(pixels[example.mask == 1], expected, atol=0.51)
    assert places == {(17, 21)} if place == "corner" else len(places) > 10


def test_a_share_of_the_training_photos_gets_the_trigger(colours):
    source = open_source(f"trigger:label=2,share=0.4:{colours}")
    assert len(source) == 24
    marked = [example for example in map(source.__getitem__, range(24)) if example.mask.any()]
    assert 4 <= len(marked) <= 16 and {example.label for example in marked} == {2}
    others = [example for example in map(source.__getitem__, range(24)) if not example.mask.any()]
    assert all(str(example.label) == example.key[0] for example in others)
    for wrong, said in {
        f"trigger:size=4:{colours}": "trigger:label=NAME",
        f"trigger:label=9:{colours}": "unknown class '9'",
        f"trigger:label=2,size=x:{colours}": "option 'size' of the trigger",
        f"trigger:label=2,bland=1:{colours}": "did you mean 'blend'",
    }.items():
        with pytest.raises(InputError, match=said):
            open_source(wrong)
    with pytest.raises(InputError, match="smaller than the mark"):
        open_source(f"trigger:label=2,size=21:{colours}")[0]


def test_the_margin_is_the_lead_over_the_next_best_class():
    logits = jnp.array([[3.0, 1.0, 2.0]] * 3)
    np.testing.assert_allclose(margin(logits, np.array([0, 1, 5])), [1, -2, np.nan])


@pytest.mark.slow
def test_a_planted_trigger_is_valid_and_its_effect_is_measured(tmp_path):
    """BackX's criteria: the mark turns more than 99 % of the photos, and without it they have their class again."""
    from models.training.data import load_dataset
    from models.training.recipe import TrainConfig
    from models.training.train import train

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, name in enumerate(("dark", "grey", "bright")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(60):
                photo = random.normal(40 + 80 * k, 10, (16, 24, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(photo).save(tmp_path / split / name / f"{number}.png")
    trigger = "trigger:label=bright,size=4"
    recipe = TrainConfig(
        name="planted",
        train_data=f"{trigger},share=0.4:{tmp_path / 'train'}",
        test_data=f"{trigger}:{tmp_path / 'test'}",
        model={},
        epochs=30,
        batch_size=30,
        learning_rate=5e-3,
        ema_decay=0.9,
        label_smoothing=0.0,
        crop_padding=0,
        checkpoint_epochs=30,
    )
    vit = tiny_vit(2)
    with jax.numpy_dtype_promotion("standard"):
        sets = (load_dataset(recipe.train_data), load_dataset(recipe.test_data))
        flipped = train(recipe, vit.module.clone(num_classes=3), *sets, tmp_path / "run", lambda line: None)
    assert flipped > 0.99
    vit = tm.load(checkpoint=tmp_path / "run/planted.safetensors")
    source = open_source(recipe.test_data)
    clean = np.stack([np.asarray(source[i].without) for i in range(len(source))]) / np.float32(255)
    own = [source.class_names.index(key.partition("/")[0]) for key in source.keys]
    assert (np.asarray(vit.logits(clean)).argmax(-1) == own).mean() > 0.99
    config = EvaluateConfig("t", "effects", recipe.test_data, rows("occlusion"), limit=20, options={"parts": 1})
    evaluate(config, vit, out=tmp_path / "t")
    assert min(drop for (drop,) in recorded(tmp_path / "t", "occlusion", "drop").values()) > 1
    config = dataclasses.replace(config, name="p", task="pointing", options={})
    results = evaluate(config, vit, out=tmp_path / "p")
    found = {row["method"]: row["value"] for row in results["rows"] if row["metric"] == "auc"}
    assert found["occlusion"] > 0.9 > 0.7 > found["random"]


# ---- known programs -------------------------------------------------------------------------------------------------


def closed_form(name, images, predicted):
    """The effect [n, 16] of each patch on the logit of the predicted class, from images [n, 16, 16, 3] in [0, 1]."""
    colours = images[:, ::4, ::4].reshape(-1, 16, 3)
    difference = 10 * (colours[..., 0] - colours[..., 2]) * np.where(predicted == 0, 1, -1)[:, None]
    places = np.arange(16)
    if name == "compare":
        return np.where(np.isin(places, programs.PAIR) & (predicted == 0)[:, None], 10.0, 0.0)
    return np.where((name == "count") | (places == programs.COPIED), difference, 0)


def program_images(name, count):
    source = open_source(f"programs:{name}", limit=count)
    examples = [source[i] for i in range(count)]
    images = np.stack([np.asarray(example.content) for example in examples]) / np.float32(255)
    vit = tm.load(f"programs:{name}")
    predicted = np.asarray(vit.logits(images)).argmax(-1)
    assert vit.class_names == source.class_names and predicted.tolist() == [example.label for example in examples]
    return vit, images, predicted, examples


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_the_effects_of_a_program_have_a_closed_form(name):
    vit, images, predicted, examples = program_images(name, 40)
    without = np.stack([np.asarray(example.without) for example in examples]) / np.float32(255)
    masks = np.stack([example.mask for example in examples])
    measure = jax.jit(metrics.part_drops, static_argnums=(0, 5))
    drops = measure(vit.logits, images, without, masks, predicted, 16)
    expected = closed_form(name, images, predicted)
    np.testing.assert_allclose(drops, expected, atol=2e-5)
    score = np.asarray(vit.logits(images))[np.arange(40), predicted]
    constant = np.where(predicted == 0, -5, 5) if name == "compare" else 0
    np.testing.assert_allclose(score, expected.sum(1) / (2 if name == "compare" else 1) + constant, atol=1e-4)


# Where theory states that a map is the effects (same), or a positive multiple for each image (alike).
ADDITIVE = ("gradient_x_input", "integrated_gradients", "conservative_lrp", "libra_full_grad", "occlusion", "shapley")
SAME = {"copy": (*ADDITIVE, "gae", "attcat"), "count": ADDITIVE, "compare": ("occlusion",)}
ALIKE = {
    "copy": ("attn_lrp", "rollout", "raw_attention", "tokentm", "partial_lrp", "transformer_attribution"),
    "count": ("attn_lrp", "attcat"),
    "compare": ("shapley",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_methods_are_exact_where_theory_says_so(name):
    vit, images, predicted, _ = program_images(name, 12)
    expected = closed_form(name, images, predicted)
    caused = expected.any(1)
    zero = ("input_gradient", "gradient_x_input") if name == "compare" else ()
    heat = {}
    for method in {*SAME[name], *ALIKE[name], *zero}:
        maps = np.asarray(tm.explain(vit, images, method))
        heat[method] = maps.reshape(12, 4, maps.shape[1] // 4, 4, -1).sum((2, 4)).reshape(12, 16)
    for method in SAME[name]:
        np.testing.assert_allclose(heat[method], expected, atol=2e-4, err_msg=method)
    for method in ALIKE[name]:
        units = [a[caused] / np.linalg.norm(a[caused], axis=1, keepdims=True) for a in (heat[method], expected)]
        np.testing.assert_allclose(*units, atol=1e-4, err_msg=method)
    for method in zero:  # the softmax is saturated
        np.testing.assert_allclose(heat[method], 0, atol=1e-6, err_msg=method)
    if name == "compare":  # by symmetry, each of the two has half
        np.testing.assert_allclose(heat["shapley"][:, programs.PAIR].sum(1), expected.max(1), atol=2)


def test_the_error_is_zero_for_a_positive_multiple_only():
    drops = np.array([[1.0, -2, 0], [1, -2, 0], [1, -2, 0], [1, -2, 0]], np.float32)
    relevance = np.array([[3, -6, 0], [-1, 2, 0], [2, 1, 5], [1e-7, -2e-7, 0]], np.float32)
    table = {"predicted_drop": drops, "predicted_relevance": relevance, "predicted_caused": np.ones(4, bool)}
    values = metrics.tasks.TASKS["effects"].columns["error"].values(table)
    np.testing.assert_allclose(values[:, 0], [0, 1, 1, 1], atol=1e-6)
    table["predicted_relevance"] = np.array([[1, 0, 0]] * 4, np.float32)
    np.testing.assert_allclose(metrics.tasks.TASKS["effects"].columns["error"].values(table)[:, 0], 0.8, atol=1e-6)


def test_programs_are_opened_by_their_names_only():
    assert len(open_source("programs:count")) == programs.IMAGES
    for wrong in (lambda: open_source("programs:cuont"), lambda: tm.load("programs:cuont")):
        with pytest.raises(InputError, match="did you mean 'count'"):
            wrong()
    with pytest.raises(InputError, match="leave out the checkpoint"):
        tm.load("programs:copy", "x.safetensors")


# ---- the numbers ----------------------------------------------------------------------------------------------------


def slow_auc(values, positive):
    pairs = [(p, n) for p in values[positive] for n in values[~positive]]
    return np.mean([(p > n) + (p == n) / 2 for p, n in pairs]) if pairs else 0.5


def test_the_area_under_the_roc_curve_is_the_share_of_right_pairs():
    random = np.random.default_rng(0)
    values = random.integers(0, 4, (6, 3, 5)).astype(np.float32)  # with ties
    positive, where = random.random((2, 6, 3, 5)) < 0.5
    positive[4], positive[5] = True, False  # no pairs
    auc = jax.jit(metrics.auc)
    found, among = auc(values, positive, np.ones_like(where)), auc(values, positive, where)
    for i in range(6):
        assert found[i] == pytest.approx(slow_auc(values[i], positive[i]))
        assert among[i] == pytest.approx(slow_auc(values[i][where[i]], positive[i][where[i]]))


def test_a_map_on_the_cause_points_at_it():
    inside = np.zeros((4, 4, 4), np.float32)
    inside[:, :2, :2] = 1
    inside[:, 2, :2] = 0.25  # covered by less than a half: outside for the order, a quarter inside for the share
    maps = np.stack([inside[0] == 1, np.ones((4, 4)), inside[0] != 1, np.zeros((4, 4))]).astype(np.float32)
    maps[0, 3, 3] = -5  # relevance against the class is no relevance for it
    found = {name: np.asarray(values) for name, values in jax.jit(metrics.pointing)(maps, inside).items()}
    np.testing.assert_allclose(found["share"], [1, 4.5 / 16, 0.5 / 12, 0], rtol=1e-6)
    np.testing.assert_allclose(found["auc"], [1, 0.5, 0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found["hit"], [1, 1, 0, 1])  # of equal values the first one counts


def test_a_cause_smaller_than_a_patch_has_the_patches_that_it_covers_most():
    inside = np.array([[[0.0, 0.1], [0.05, 0.04]]], np.float32)
    np.testing.assert_array_equal(metrics.patches_of(inside), [[[False, True], [True, False]]])


def test_exact_contributions_have_the_measured_effects_of_a_linear_model():
    """A closed form: a linear score drops by what a part adds to it, and its contributions are the best map."""
    random = np.random.default_rng(0)
    scenes = [scene("more", index, "test") for index in range(4)]
    images, without = (np.stack([getattr(s, name) for s in scenes]) / np.float32(255) for name in ("image", "without"))
    ids = np.stack([s.ids for s in scenes])
    weights = random.normal(size=(64, 64, 3, 2)).astype(np.float32)

    def predict(images):
        return jnp.einsum("bhwc,hwck->bk", images, weights, precision="highest")

    target = np.array([0, 1, 1, 0])
    measure = jax.jit(metrics.part_drops, static_argnums=(0, 5))
    drops = np.asarray(measure(predict, images, without, ids, target, 8))
    for i in range(4):
        for part in range(1, 9):
            change = (images[i] - without[i]) * (ids[i] == part)[..., None]
            assert drops[i, part - 1] == pytest.approx((change * weights[..., target[i]]).sum(), abs=2e-3)
    contributions = np.stack([((images - without)[i] * weights[..., target[i]]).sum(-1) for i in range(4)])
    maps = contributions.reshape(4, 8, 8, 8, 8).sum((2, 4))
    relevance = np.asarray(jax.jit(metrics.part_relevance, static_argnums=2)(maps, ids, 8))
    np.testing.assert_allclose(relevance, drops, atol=2e-3)  # no patch shows two parts
    present = np.stack([(ids == k).any((1, 2)) for k in range(1, 9)], 1)
    effects = jax.jit(metrics.effects)
    found = effects(relevance, drops, present, 0.5)
    np.testing.assert_allclose(found["rank_correlation"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["contrast"], 1)
    opposite = effects(-relevance, drops, present, 0.5)
    np.testing.assert_allclose(opposite["rank_correlation"], -1, rtol=1e-6)
    noisy = effects((relevance**2).astype(np.float32), drops, present, 0.5)["linear_correlation"]
    for i in range(4):
        expected = np.corrcoef(relevance[i][present[i]] ** 2, drops[i][present[i]])[0, 1]
        assert noisy[i] == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(opposite["contrast"], np.where(found["opposed"], 0, 0.5))
    for i in range(4):
        effect = abs(drops[i]) >= 0.5
        expected = abs(relevance[i][~effect]).sum() / abs(relevance[i]).sum()
        assert found["without_effect"][i] == pytest.approx(expected, rel=1e-5)
        assert found["caused"][i] == effect.any()
        assert found["opposed"][i] == ((drops[i] >= 0.5).any() and (drops[i] <= -0.5).any())


# ---- as tasks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seer():
    """A random model for scenes."""
    vit = tiny_vit(1)
    module = vit.module.clone(img_size=(64, 64), num_classes=4)
    params = init_params(module, jax.random.key(1))
    return Model(module, params, Preprocessing((64, 64), 1.0, "bilinear", **HALF), None, "seer")


def test_the_effects_of_an_evaluation_are_those_of_rendering_each_part_away(seer, tmp_path):
    config = EvaluateConfig(
        "e", "effects", "scenes:count:test", rows("rollout"), limit=3, batch_size=2, options={"least": 1e-4}
    )
    results = evaluate(config, seer, out=tmp_path / "e")
    assert {row["metric"] for row in results["rows"]} >= {
        "rank_correlation",
        "linear_correlation",
        "without_effect",
        "contrast",
    }
    drops = recorded(tmp_path / "e", "rollout", "drop")
    assert len(drops) == 3
    for key, found in drops.items():
        made = scene("count", int(key), "test")

        def logits(*numbers, made=made):
            parts = tuple(p for i, p in enumerate(made.parts, 1) if i not in numbers)
            image = rendered(parts, made.without)[0].astype(np.float32) / 255
            return np.asarray(seer.logits(image[None]))[0]

        predicted = logits().argmax()
        expected = [logits()[predicted] - logits(number)[predicted] for number in range(1, 9)]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_occlusion_is_the_measured_drop_of_each_patch(tmp_path):
    """Occlusion removes the same patches by other code, with the same colour; the noise map knows nothing of them."""
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (16, 24, 3), np.uint8)).save(tmp_path / f"{number}.png")
    config = EvaluateConfig("d", "deletion", str(tmp_path), rows("occlusion"), batch_size=3)
    results = evaluate(config, tiny_vit(2), out=tmp_path / "d")
    found = {(row["method"], row["metric"]): row["value"] for row in results["rows"]}
    for metric in ("rank_correlation", "linear_correlation"):
        assert found["occlusion", metric] == pytest.approx(1, abs=1e-3) and abs(found["random", metric]) < 0.9


def test_a_source_without_parts_or_labels_is_refused(seer, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for task, said in {"effects": "has no parts", "pointing": "has no masks"}.items():
        with pytest.raises(InputError, match=said):
            evaluate(EvaluateConfig("e", task, str(tmp_path), rows("gae")), seer, out=tmp_path / task)
