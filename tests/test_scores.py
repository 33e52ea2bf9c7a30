"""What is explained: scores against the same explanation of a changed head, finite differences and closed forms."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHEAP, mostly_slow, tiny_vit
from PIL import Image

import tokentm_jax as tm
from tokentm_jax.configs import EvaluateConfig, rows
from tokentm_jax.data.sources import open_source
from tokentm_jax.inputs.batches import batches
from tokentm_jax.maths import scores
from tokentm_jax.maths.maps import to_pixels
from tokentm_jax.methods.table import METHODS
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.evaluate import evaluate
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.report import compare

QUICK = ("tokentm",)
CASES = mostly_slow(METHODS, QUICK)
# Relevance is the cotangent, so a difference of logits is not what the head's rule makes of a difference of weights.
LINEAR = ("lrp",)
RELEVANCE = (*LINEAR, "partial_lrp", "transformer_attribution")
FIELDS = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}


@pytest.fixture(scope="module")
def model():
    vit = tm.models.ViT(**FIELDS)
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, tm.models.init_params(vit, jax.random.key(0)))
    params["head"]["bias"] = jnp.arange(4.0)
    return vit, params, jax.random.normal(jax.random.key(1), (3, 8, 12, 3)), jnp.array([1, 3, 0], jnp.int32)


def error(a, b):
    return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-12))


@pytest.mark.parametrize("method", CASES)
def test_why_this_and_not_that_is_a_difference_of_weights(model, method):
    """A model whose first class is the difference of two of this one's, explained for its first class."""
    vit, params, images, target = model
    other = jnp.array([2, 0, 1], jnp.int32)
    options = CHEAP.get(method, {})

    def differences(params, images, target, other):
        head = {name: a[..., target] - a[..., other] for name, a in params["head"].items()}
        full = {name: jnp.stack([a] * 4, -1) for name, a in head.items()}
        explain = tm.explain_fn(vit, method, **options)
        return explain({**params, "head": full}, images[None], jnp.zeros(1, jnp.int32))[0]

    def program(params, images, target, other):
        found, details = tm.explain_fn(vit, method, score=scores.Versus(other), details=True, **options)(
            params, images, target
        )
        if method in RELEVANCE:
            explain = tm.explain_fn(vit, method, **options)
            return found, details, explain(params, images, target) - explain(params, images, other)
        return found, details, jax.lax.map(lambda x: differences(params, *x), (images, target, other))

    found, details, expected = jax.jit(program)(params, images, target, other)
    np.testing.assert_array_equal(details["target"], target)
    own = jnp.take_along_axis(details["logits"], jnp.stack([target, other], 1), 1)
    np.testing.assert_allclose(details["score"], own[:, 0] - own[:, 1], rtol=1e-5)
    if method not in RELEVANCE or method in LINEAR:
        assert error(found, expected) < 2e-4
    assert jnp.isfinite(found).all()


@pytest.mark.slow
def test_the_default_is_the_logit_of_the_class(model):
    vit, params, images, target = model
    explain = tm.explain_fn(vit, "tokentm", details=True)
    same = tm.explain_fn(vit, "tokentm", score=scores.class_logit, details=True)
    program = jax.jit(lambda *a: (explain(*a), same(*a), explain(*a[:2]), same(*a[:2])))
    given, asked, predicted, asked_predicted = program(params, images, target)
    for a, b in ((given, asked), (predicted, asked_predicted)):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    np.testing.assert_array_equal(predicted[1]["target"], predicted[1]["logits"].argmax(-1))
    np.testing.assert_array_equal(given[1]["score"], np.asarray(given[1]["logits"])[np.arange(3), target])


@pytest.mark.slow
def test_gradients_are_those_of_the_score(model):
    """Of functions of one's own, with a target and without: finite differences in float64."""
    vit, params, images, target = model
    direction = jax.random.normal(jax.random.key(5), images.shape)
    weights = jax.random.normal(jax.random.key(6), (3, 4))
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(np.asarray(a), jnp.float64 if jnp.issubdtype(a.dtype, jnp.floating) else None)  # noqa: E731
        params, images, direction, weights = jax.tree.map(wide, (params, images, direction, weights))
        logits = jax.jit(lambda images: vit.apply({"params": params}, images))
        for score, given in (
            (lambda outputs: jnp.sin(outputs[:, 0]) * outputs[:, 3], None),
            (lambda outputs, target: jnp.tanh(outputs * target).sum(-1), weights),
            (scores.log_probability, target),
        ):
            asked = scores.question(score, given)
            trace = jax.jit(lambda x, asked: tm.capture(vit, params, x, asked, ["input_grads"]))(images, asked)
            values = [scores.explained(logits(images + step * direction), asked)[0] for step in (1e-5, -1e-5, 0)]
            slope = (trace.input_grads * direction).sum((1, 2, 3))
            np.testing.assert_allclose(slope, (values[0] - values[1]) / 2e-5, rtol=1e-5)
            np.testing.assert_allclose(trace.score, values[2], rtol=1e-9)


@pytest.mark.slow
def test_features_are_explained_by_cosine_and_by_channel(model):
    """The same map alone, in a batch, for one embedding for all and for one a sample; the closed form of the value."""
    vit, params, images, _ = model
    embeddings = jax.random.normal(jax.random.key(2), (3, 4))
    explain = lambda score, x: tm.explain_fn(vit, "occlusion", score=score, details=True)(params, x)  # noqa: E731
    program = jax.jit(explain)
    maps, details = program(scores.Cosine(embeddings), images)
    outputs = np.asarray(details["logits"], np.float64)
    expected = (outputs * embeddings).sum(1) / np.linalg.norm(outputs, axis=1) / np.linalg.norm(embeddings, axis=1)
    np.testing.assert_allclose(details["score"], expected, rtol=1e-5)
    assert details["target"] is None
    for i in range(3):
        alone, _ = program(scores.Cosine(embeddings[i]), jnp.stack([images[i]] * 3))
        np.testing.assert_allclose(alone[0], maps[i], rtol=1e-4, atol=1e-6)
    channel, found = program(scores.Channel(jnp.array([2, 2, 1])), images)
    np.testing.assert_array_equal(found["score"], np.asarray(found["logits"])[np.arange(3), [2, 2, 1]])
    assert (
        error(channel[0], jax.jit(tm.explain_fn(vit, "occlusion"))(params, images, jnp.full(3, 2, jnp.int32))[0])
        < 1e-5
    )
    assert jnp.isnan(program(scores.Channel(9), images)[0]).all()


def test_photos_and_other_classes_without_another_program():
    from tokentm_jax.methods.explain import compiled

    vit = tiny_vit(2)
    images = np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)
    maps, _ = tm.explain(vit, images, "gae", score=scores.Versus(1), details=True)
    program = compiled(vit.module, {"gae": {}}, details=None)
    size = program._cache_size()
    others = [tm.explain(vit, images, "gae", score=scores.Versus(other), details=True)[0] for other in (2, [3, 1])]
    assert program._cache_size() == size
    np.testing.assert_allclose(others[1][1], maps[1], rtol=1e-6)
    assert np.abs(others[0] - maps).max() > 0
    prompt = scores.Cosine(np.ones(5, np.float32))
    assert tm.explain(vit, images, "gae", score=prompt).shape == (2, 2, 3)


GLOBAL = 1  # a test changes it


def test_one_program_for_the_predicted_and_every_other_class(compilations):
    vit = tiny_vit(2)
    images = np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)
    maps, details = tm.explain(vit, images, "gae", details=True)
    assert compilations
    compilations.clear()
    classes = np.asarray(details["target"])
    again, found = tm.explain(vit, images, "gae", classes, details=True)
    np.testing.assert_array_equal(again, maps)
    np.testing.assert_array_equal(found["target"], classes)
    np.testing.assert_array_equal(classes, np.asarray(details["logits"]).argmax(1))
    other = tm.explain(vit, images, "gae", (classes + 1) % 5, details=True)[0]
    assert not compilations  # before the difference, which is compiled
    assert np.abs(other - maps).max() > 0
    assert jnp.isnan(tm.explain(vit, images, "gae", jnp.array([-1, 5]), details=True)[0]).all()  # no classes


@pytest.mark.slow
def test_legrad_with_the_predicted_class_of_some():
    """It finds the predicted class before its pass, only where it is asked for."""
    vit = tiny_vit(2)
    images = np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)
    for method in ("legrad", "combination"):
        options = {"methods": "legrad,gae"} if method == "combination" else {}
        for score in (None, scores.margin):
            maps, found = tm.explain(vit, images, method, score=score, details=True, **options)
            again = tm.explain(vit, images, method, found["target"], score=score, **options)
            np.testing.assert_allclose(again, maps, rtol=1e-5, atol=1e-8)


def test_a_score_of_the_same_code_runs_the_same_program(compilations):
    """As where it is written in a call; other values that it reads make another program, and so do mutable ones."""
    global GLOBAL
    vit = tiny_vit(1)
    images = np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)

    def channel(k):
        return tm.explain(vit, images, "gae", score=lambda outputs: outputs[:, k + GLOBAL])

    def listed(k):
        return tm.explain(vit, images, "gae", score=lambda outputs: outputs[:, k[0] + GLOBAL])

    def compiled(call, k):
        compilations.clear()
        np.testing.assert_allclose(call(k), expected[np.ravel(k)[0] + GLOBAL], rtol=1e-4, atol=1e-9)
        return bool(compilations)

    expected = [tm.explain(vit, images, "gae", score=scores.Channel(k)) for k in range(4)]
    assert [compiled(channel, k) for k in (0, 0, 1, 0, 1)] == [True, False, True, False, False]
    assert [compiled(listed, k) for k in ([0], [0])] == [True, True]
    GLOBAL = 2
    assert [compiled(channel, k) for k in (0, 0)] == [True, False]
    GLOBAL = 1
    assert not compiled(channel, 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda o, k=1: o[:, k], lambda o, k=2: o[:, k]),
        (lambda o: o[:, 0] * 0.0, lambda o: o[:, 0] * -0.0),
        (partial(lambda o, k: o[:, k], k=1), partial(lambda o, k: o[:, k], k=True)),
    ],
)
def test_scores_of_other_values_are_others(one, other):
    assert scores.question(one) == scores.question(one) != scores.question(other)
    assert hash(scores.question(one).score) == hash(scores.question(one).score)


def test_whole_numbers_are_a_target_of_a_score_of_one_s_own():
    """They are not classes: pairs of outputs here, of which there may be more than classes."""
    vit = tiny_vit(2)
    images = np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)
    difference = lambda o, t: o[jnp.arange(2), t[:, 0]] - o[jnp.arange(2), t[:, 1] % 5]  # noqa: E731
    found = tm.explain(vit, images, "gae", np.array([[2, 6], [3, 5]], np.int32), score=difference)
    for i, (one, other) in enumerate(((2, 1), (3, 0))):
        expected = tm.explain(vit, images[i : i + 1], "gae", one, score=scores.Versus(other))
        np.testing.assert_allclose(found[i], expected[0], rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": scores.Versus(5)}, "the other class must be a class from 0 to 4, got 5"),
        ({"score": scores.Versus([1, 2, 3])}, "the other class must be one class or one per sample (2)"),
        ({"score": scores.Versus("dog")}, "class 'dog': the class names of tiny are unknown; give a number"),
        ({"score": int}, "the score must be a function (outputs, target) -> [B] or outputs -> [B], got the class int"),
        ({"score": 5}, "the score must be a function (outputs, target) -> [B] or outputs -> [B], got 5"),
        ({"score": max}, "the score must be a function (outputs, target) -> [B] or outputs -> [B], got <built-in"),
        (
            {"score": scores.Cosine(np.ones(7))},
            "the embedding must be [5] or one per sample, like the model's features",
        ),
        ({"score": scores.Cosine(np.ones(5)), "target": 1}, "this score takes no target: leave it out"),
        ({"score": "logit"}, "the score must be a function (outputs, target) -> [B] or outputs -> [B], got 'logit'"),
        ({"score": lambda outputs: outputs}, "one floating-point number per sample, [2], got float32 [2, 5]"),
        ({"score": lambda outputs: outputs.argmax(-1)}, "one floating-point number per sample, [2], got int32 [2]"),
        ({"score": lambda outputs: 1.0}, "one floating-point number per sample, [2], got float"),
        ({"score": lambda o, t: o.sum(-1), "target": np.ones(3)}, "must have the 2 samples first, got [3]"),
        (
            {"score": scores.log_probability, "method": "shapley", "value": "probability"},
            "'probability' is for classes; leave it out with a custom score",
        ),
    ],
)
def test_refused(options, message):
    vit = tiny_vit(2)
    with pytest.raises(tm.InputError) as raised:
        tm.explain(vit, np.zeros((2, 16, 24, 3), np.float32), **options)
    assert message in str(raised.value)


# ---- in runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    path, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    lines = ["file,class_index"]
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (16, 24, 3), np.uint8)).save(path / f"{i}.png")
        lines.append(f"{i}.png,{i % 5}")
    (path / "labels.csv").write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_an_evaluation_explains_and_follows_the_score(photos, tmp_path):
    """Of a difference of logits, against a loop in NumPy over the images whose class is not the other one."""
    vit, source = tiny_vit(2), open_source(photos)
    config = EvaluateConfig("why", "perturbation", str(photos), rows("gae", "rollout"), score="versus:2", batch_size=4)
    results = evaluate(config, vit, source, tmp_path)
    (batch,) = batches(source, vit.preprocessing, 8, indices=range(8))
    images = batch.inputs.astype(np.float32) / 255
    clean = np.asarray(vit.logits(images))
    predicted = clean.argmax(-1)
    kept = [i for i in range(8) if predicted[i] != 2 and batch.labels[i] != 2]
    assert 3 <= len(kept) < 8
    maps = to_pixels(tm.explain(vit, images, "gae", score=scores.Versus(2)), (16, 24))
    ranks = np.argsort(-np.asarray(maps).reshape(8, -1), axis=1, kind="stable")
    drops = []
    for i in kept:
        value = lambda logits, i=i: logits[predicted[i]] - logits[2]  # noqa: E731
        changed = np.stack([images[i].reshape(-1, 3)] * 9)
        for s in range(1, 10):
            changed[s - 1, ranks[i, : 384 * s // 10]] = 0
        left = np.asarray(vit.logits(changed.reshape(9, 16, 24, 3)))
        drops.append(np.mean([value(clean[i]) - value(logits) for logits in left]))
    figures = {(row["method"], row["metric"]): row for row in results["rows"]}
    assert figures["gae", "aopc"]["value"] == pytest.approx(np.mean(drops), rel=1e-4, abs=1e-5)
    assert figures["gae", "lodds"]["value"] == pytest.approx(-np.mean(drops), rel=1e-4, abs=1e-5)
    assert figures["gae", "aopc"]["images"] == len(kept)
    assert {row["images"] for row in results["rows"]} == {len(kept)}  # of every row, and of every column
    assert "Explained, and followed instead of the probability: versus:2." in (tmp_path / "results.md").read_text()
    entries = {(entry["method"], entry["metric"]): entry for entry in compare([tmp_path])}
    assert entries["random", "aopc"]["value"] == figures["random", "aopc"]["value"]
    with pytest.raises(tm.InputError, match="another"):
        evaluate(dataclasses.replace(config, score="versus:3"), vit, source, tmp_path)
    only = dataclasses.replace(config, score=f"versus:{predicted[0]}", names="0.png")
    one = open_source(photos, names="0.png")
    with pytest.raises(tm.InputError, match="leaves out the images of its class"):
        evaluate(only, vit, one, tmp_path / "only")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["insertion", "saco", "srg", "infidelity", "sensitivity", "shapley"])
def test_every_task_follows_a_channel(photos, tmp_path, task):
    """A channel of the outputs is no class: it is asked once for every image, whatever is predicted."""
    vit, source = tiny_vit(2), open_source(photos)
    options = {
        "shapley": {"pairs": 2},
        "sensitivity": {"samples": 2},
        "infidelity": {"samples": 3},
        "srg": {"steps": 3},
    }.get(task, {})
    config = EvaluateConfig("x", task, str(photos), rows("gae"), options=options, score="channel:1", batch_size=8)
    results = evaluate(config, vit, source, tmp_path)
    found = [row for row in results["rows"] if row["method"] == "gae"]
    assert found and all(row["images"] == 8 and np.isfinite(row["value"]) for row in found)
    if task == "insertion":
        (batch,) = batches(source, vit.preprocessing, 8, indices=range(8))
        whole = np.asarray(vit.logits(batch.inputs.astype(np.float32) / 255))[:, 1]
        (records,) = [path for path in (tmp_path / "records").glob("gae-*.jsonl")]
        line = json.loads(records.read_text())
        np.testing.assert_allclose(np.asarray(line["fields"]["score"])[:, 0, -1], whole, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.asarray(line["fields"]["score"])[:, 1, 0], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_store_of_a_score(photos, tmp_path):
    vit, source = tiny_vit(2), open_source(photos)
    explain_dataset(
        Explainer(vit, methods=["gae"], dtype="float32", score="versus:2", batch_size=4), source, str(tmp_path / "a")
    )
    stored = tm.open_maps(str(tmp_path / "a"))
    (batch,) = batches(source, vit.preprocessing, 8, indices=range(8))
    expected = tm.explain(vit, batch.inputs.astype(np.float32) / 255, "gae", score=scores.Versus(2))
    np.testing.assert_allclose(stored.maps["gae"][:], expected, rtol=1e-4, atol=1e-7)
    assert stored.provenance["score"] == "versus:2"
    explain_dataset(Explainer(vit, methods=["gae"], score="channel:1", batch_size=4), source, str(tmp_path / "b"))
    assert (np.asarray(tm.open_maps(str(tmp_path / "b")).target[:]) == -1).all()
    config = EvaluateConfig("why", "insertion", str(photos), rows("gae"), batch_size=4)
    with pytest.raises(tm.InputError, match="was made with the score 'versus:2', not None"):
        evaluate(config, vit, source, tmp_path / "c", maps=[stored])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logit", "unknown score 'logit'; did you mean 'class_logit'?"),
        ("versus:9", "class 9 is out of range: tiny has classes 0 to 4"),
        ("versus", "unknown score 'versus'; did you mean 'versus:CLASS'?"),
        ("channel:x", "the channel must be a number from 0 to 4"),
    ],
)
def test_names_of_scores_that_are_none(photos, tmp_path, name, message):
    config = EvaluateConfig("x", "insertion", str(photos), rows("gae"), score=name)
    with pytest.raises(tm.InputError) as raised:
        evaluate(config, tiny_vit(2), open_source(photos), tmp_path / "out")
    assert message in str(raised.value) and not (tmp_path / "out").exists()
