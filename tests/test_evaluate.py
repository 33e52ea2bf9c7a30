"""Evaluations from end to end: numbers, resuming, independence of batches, bad input, the commands."""

import dataclasses
import errno
import itertools
import json
import os
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import mostly_slow, tiny_vit
from PIL import Image

from models.training.recipe import AmortiseConfig, TrainConfig
from tokentm_jax import metrics
from tokentm_jax.cli.main import main
from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.configs import PAPER_ROWS, EvaluateConfig, Row, check, rows, select
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.files import ours
from tokentm_jax.identity import claimed
from tokentm_jax.inputs.batches import batches
from tokentm_jax.maths.maps import to_pixels
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.methods.table import METHODS
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.models.architectures import build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.runs import evaluate as evaluation
from tokentm_jax.runs import records as records_module
from tokentm_jax.runs.evaluate import evaluate
from tokentm_jax.runs.leaderboard import LeaderboardConfig
from tokentm_jax.runs.leaderboard import check as check_leaderboard
from tokentm_jax.runs.programs import randomised
from tokentm_jax.runs.report import compare
from tokentm_jax.validation import lists_of

COUNT = 11


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos, one of them damaged, and labels of which the model finds a few."""
    path, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    lines = ["file,class_index"]
    for i in range(COUNT):
        Image.fromarray(random.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(path / f"{i:02}.png")
        lines.append(f"{i:02}.png,{i % 5}")
    (path / "bad.png").write_bytes(b"nothing")
    (path / "labels.csv").write_text("\n".join([*lines, "bad.png,0"]))
    return path


@pytest.fixture(scope="module")
def config(folder):
    return EvaluateConfig("tiny", "perturbation", str(folder), rows("gae", "rollout"), batch_size=4)


@pytest.fixture(scope="module")
def whole(config, vit, folder, tmp_path_factory):
    """(folder, results) of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    return out, evaluate(config, vit, open_source(folder), out)


def value(results, method, metric):
    (row,) = [r for r in results["rows"] if (r["method"], r["metric"]) == (method, metric)]
    assert row["low"] <= row["value"] <= row["high"] and row["images"] == COUNT
    return row["value"]


def test_the_numbers_are_those_of_a_slow_evaluation(whole, vit, folder):
    out, results = whole
    assert json.loads((out / "results.json").read_text()) == results
    source = open_source(folder)
    (batch,) = batches(source, vit.preprocessing, COUNT, indices=range(COUNT))
    images, labels = batch.inputs.astype(np.float32) / 255, batch.labels
    clean = np.asarray(vit.logits(images))
    predicted = clean.argmax(-1).astype(np.int32)
    assert 0 < (predicted == labels).sum() < COUNT
    assert value(results, "clean", "accuracy") == pytest.approx(100 * (predicted == labels).mean())
    explain = jax.jit(explain_fn(vit.module, "gae"))
    for explained, classes in (("predicted", predicted), ("target", labels)):
        maps = to_pixels(explain(vit.params, vit.preprocessing.normalise(jnp.asarray(images)), classes), (16, 24))
        order = np.argsort(-np.asarray(maps).reshape(COUNT, -1), axis=1, kind="stable")
        for direction in ("positive", "negative"):
            hits, drops = [(predicted == labels).mean()], []
            for s in range(1, 10):
                count = 16 * 24 * s // 10
                changed = images.copy().reshape(COUNT, -1, 3)
                for i in range(COUNT):
                    changed[i, order[i, :count] if direction == "positive" else order[i, -count:]] = 0
                logits = np.asarray(vit.logits(changed.reshape(images.shape)))
                hits.append((logits.argmax(-1) == labels).mean())
                p, p_0 = (np.asarray(jax.nn.softmax(x))[range(COUNT), predicted] for x in (logits, clean))
                drops.append([(p_0 - p).mean(), np.log(p / p_0).mean()])
            auc = 100 * np.trapezoid(hits, dx=0.1)
            assert value(results, "gae", f"{direction}_auc_{explained}") == pytest.approx(auc, abs=1e-6)
            if (explained, direction) == ("predicted", "positive"):
                assert value(results, "gae", "aopc") == pytest.approx(np.mean(drops, 0)[0], abs=1e-5)
                assert value(results, "gae", "lodds") == pytest.approx(np.mean(drops, 0)[1], abs=1e-5)
    for name in ("rollout", "random"):  # look at no class: one map is both
        assert value(results, name, "positive_auc_predicted") == value(results, name, "positive_auc_target")
    run = results["run"]
    assert run["skipped"]["count"] == 1 and "bad.png" in run["skipped"]["examples"]
    assert {"python", "jax", "tokentm_jax"} <= set(run["versions"]) and run["seed"] == 0
    assert "0x" not in json.dumps(run)  # an address would make the identity another in every process
    assert run["data"]["identity"] == source.identity and run["config"]["task"] == "perturbation"
    assert "| gae |" in (out / "results.md").read_text() and "Clean accuracy" in (out / "results.md").read_text()
    assert ours(out / "curves.png")
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 1000


@pytest.mark.slow
def test_mixed_precision_gives_nearly_the_same_from_the_same_maps(config, whole, vit, folder, tmp_path):
    mixed = dataclasses.replace(config, mixed_precision=True)
    with pytest.raises(InputError, match="mixed_precision false, and this command has true"):
        evaluate(mixed, vit, open_source(folder), whole[0])
    results = evaluate(mixed, vit, open_source(folder), tmp_path)
    for metric, tolerance in (("aopc", 1e-3), ("lodds", 1e-2)):
        exact = value(whole[1], "gae", metric)
        assert 0 < abs(value(results, "gae", metric) - exact) < tolerance
    assert value(results, "clean", "accuracy") == value(whole[1], "clean", "accuracy")


def test_nothing_is_explained_twice(whole, vit):
    """One line per (image, class); the target only where it is another class, and the method looks at it."""
    out, _ = whole
    lines = {p.name.rpartition("-")[0]: p.read_text().splitlines() for p in (out / "records").glob("*-*.jsonl")}
    keys = {name: [tuple(k) for line in found for k in json.loads(line)["keys"]] for name, found in lines.items()}
    assert all(len(set(k)) == len(k) for k in keys.values())
    right = sum(p == y for p, y in _predictions(out))
    assert {name: len(k) for name, k in keys.items()} == {"gae": 2 * COUNT - right, "rollout": COUNT, "random": COUNT}


def _predictions(out):
    for line in (out / "records/clean.jsonl").read_text().splitlines():
        fields = json.loads(line)["fields"]
        yield from zip(fields["predicted"], fields["label"], strict=True)


def test_batch_size_and_order_change_nothing(whole, config, vit, folder, tmp_path):
    source = open_source(folder)
    turned = dataclasses.replace(source, keys=source.keys[::-1])
    again = evaluate(dataclasses.replace(config, batch_size=5), vit, turned, tmp_path)
    for a, b in zip(whole[1]["rows"], again["rows"], strict=True):
        assert (a["method"], a["metric"], a["images"]) == (b["method"], b["metric"], b["images"])
        for name in ("value", "low", "high"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4)


def test_an_interrupted_run_goes_on(whole, config, vit, folder, tmp_path, monkeypatch):
    calls = []
    maps = evaluation.Programs.maps

    def counted(self, rows, keys, *arrays):
        calls.extend((row.name, tuple(keys)) for row in rows)
        return maps(self, rows, keys, *arrays)

    def stop(done, total, figures):
        names = {row["method"] for row in figures()}
        assert names == {"clean", "gae", "rollout", "random"} and done <= total == 5
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.Programs, "maps", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, vit, open_source(folder), tmp_path, stop)
    assert not (tmp_path / "results.json").exists()
    torn = next((tmp_path / "records").glob("gae-*.jsonl"))
    with torn.open("a") as file:
        file.write('{"keys": [["09.png", "pred')  # it was writing when it was stopped
    # Then the disk is full at the third line, and the file is as before.
    opened, lines = Path.open, []

    def full(self, mode="r", *arguments, **named):
        lines.append(self) if mode == "a" else None
        if len(lines) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return opened(self, mode, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(InputError, match="No space left on device; what was finished is kept"):
            evaluate(config, vit, open_source(folder), tmp_path)
    finished = len(calls)
    evaluate(config, vit, open_source(folder), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == (whole[0] / "results.json").read_bytes()
    # Only what failed to be written was computed again.
    assert len(calls) == len(set(calls)) + 1 and len(calls) > finished
    evaluate(config, vit, open_source(folder), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == (whole[0] / "results.json").read_bytes()
    before = len(calls)
    more = dataclasses.replace(config, rows=[*config.rows, Row("raw", "raw_attention")])
    assert {row["method"] for row in evaluate(more, vit, open_source(folder), tmp_path)["rows"]} >= {"raw", "gae"}
    assert {name for name, _ in calls[before:]} == {"raw"}


@pytest.mark.slow
def test_rows_that_share_a_pass_are_computed_together(config, vit, folder, tmp_path, monkeypatch):
    """With the numbers of a run of each; a row of a later run has its own pass, and so has each row after an error."""
    own = [Row("gae 1", "gae", {"first_block": 1}), *rows("rollout", "tokentm", "legrad"), Row("gae", "gae")]
    some = dataclasses.replace(config, task="complexity", rows=own)
    calls, maps = [], evaluation.Programs.maps

    def counted(self, rows, *batch):
        calls.append([row.name for row in rows])
        return maps(self, rows, *batch)

    def refusing(self, rows, *batch):
        if len(rows) > 1 or rows[0].name == "legrad":
            raise InputError("no map")
        return counted(self, rows, *batch)

    def figures(results):
        return {row["method"]: row["value"] for row in results["rows"] if row["metric"] == "gini"}

    monkeypatch.setattr(evaluation.Programs, "maps", counted)
    found = figures(evaluate(some, vit, open_source(folder), tmp_path / "together"))
    shared = ["gae 1", "tokentm", "legrad", "gae"]
    batches = len(calls) // 3
    assert calls == [shared, ["rollout"], ["random"]] * batches
    calls.clear()
    first = dataclasses.replace(some, rows=own[:-1])
    evaluate(first, vit, open_source(folder), tmp_path / "later")
    assert calls == [shared[:-1], ["rollout"], ["random"]] * batches
    calls.clear()
    later = figures(evaluate(some, vit, open_source(folder), tmp_path / "later"))
    assert calls == [["gae"]] * batches
    monkeypatch.setattr(evaluation.Programs, "maps", refusing)
    with pytest.raises(InputError, match="no map"):
        evaluate(some, vit, open_source(folder), tmp_path / "single")
    written = {file.name.rpartition("-")[0] for file in (tmp_path / "single/records").glob("*-*.jsonl")}
    assert written == {"gae-1", "rollout", "tokentm"}
    monkeypatch.setattr(evaluation.Programs, "maps", lambda self, rows, *batch: maps(self, rows, *batch))
    after = figures(evaluate(some, vit, open_source(folder), tmp_path / "single"))
    single = {}
    for row in own:
        each = dataclasses.replace(some, rows=[row])
        single |= figures(evaluate(each, vit, open_source(folder), tmp_path / f"only {row.name}"))
    assert found == pytest.approx(single, rel=1e-5) == later == after


@pytest.mark.slow
def test_other_tasks(config, vit, folder, tmp_path):
    source = open_source(folder, limit=4)
    for task, options, own, expected in (
        ("insertion", {"fill": "blur", "steps": 4}, rows("rollout"), {"insertion_auc", "deletion_auc"}),
        ("saco", {"groups": 4}, rows("rollout"), {"saco"}),
        (
            "sanity",
            {},
            [Row("same", "rollout"), Row("all", "rollout", {}, 2), Row("head", "rollout", {}, 0)],
            {"similarity"},
        ),
    ):
        some = dataclasses.replace(config, task=task, options=options, rows=own)
        results = evaluate(some, vit, source, tmp_path / task)
        assert {row["metric"] for row in results["rows"]} == expected | {"accuracy"}
        assert all(np.isfinite(row["value"]) for row in results["rows"])
    similarity = {row["method"]: row["value"] for row in results["rows"] if row["metric"] == "similarity"}
    assert similarity["same"] == pytest.approx(1) == similarity["head"]  # rollout does not see the head
    assert similarity["all"] < 0.99 and similarity["random"] < 0.9
    (path,) = (tmp_path / task / "records").glob("random*")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    per_image = [value for line in lines for value in line["fields"]["similarity"]]
    assert len(per_image) == 4 and similarity["random"] == pytest.approx(abs(np.mean(per_image)))


@pytest.mark.parametrize("task", mostly_slow(["perturbation", "sensitivity", "srg"], ["srg"]))
def test_maps_of_pixels_as_means_over_patches(config, vit, folder, tmp_path, monkeypatch, task):
    """The same as a method that averages its own map, for every kind of task; maps of patches stay as they are."""

    def averaged(module, params, inputs, target):
        maps, details = METHODS["gradient_x_input"].function(module, params, inputs, target)
        (h, w), (gh, gw) = inputs.shape[1:3], module.grid
        return maps.reshape(-1, gh, h // gh, gw, w // gw).mean((2, 4)), details

    monkeypatch.setitem(METHODS, "averaged", dataclasses.replace(METHODS["gae"], function=averaged))
    own = [
        Row("pixels", "gradient_x_input"),
        Row("patches", "gradient_x_input", by_patch=True),
        *rows("averaged", "gae"),
        Row("gae by patch", "gae", by_patch=True),
        Row("random pixels", "random", {"pixels": True}),
    ]
    options = {"samples": 2} if task == "sensitivity" else {}
    options |= {"steps": 3} if task == "srg" else {}
    some = dataclasses.replace(config, task=task, options=options, rows=own)
    results = evaluate(some, vit, open_source(folder), tmp_path / task)
    for metric in TASKS[task].columns:
        found = {row.name: value(results, row.name, metric) for row in own}
        assert found["patches"] == pytest.approx(found["averaged"], rel=1e-5)
        assert found["gae by patch"] == pytest.approx(found["gae"], rel=1e-5)
    assert (found["pixels"] == pytest.approx(found["patches"], rel=1e-5)) == (task == "srg")  # by patch anyway
    noise = [value(results, name, metric) for name in ("random", "random pixels")]
    assert np.isfinite(noise).all() and (noise[0] != noise[1] or task == "sensitivity")


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        pytest.param("srg", {"steps": 3}, {"srg"}, marks=pytest.mark.slow),
        ("complexity", {}, {"gini", "entropy"}),
        pytest.param("road", {}, {"road_positive_auc", "road_negative_auc"}, marks=pytest.mark.slow),
        pytest.param("infidelity", {"samples": 3, "fill": "blur"}, {"infidelity"}, marks=pytest.mark.slow),
    ],
)
def test_metrics_are_tasks(config, vit, folder, tmp_path, task, options, expected):
    """Each for images alone as for a batch."""
    source = open_source(folder, limit=3)
    some = dataclasses.replace(config, task=task, options=options, rows=rows("raw_attention"))
    results = evaluate(some, vit, source, tmp_path / "together")
    assert {row["metric"] for row in results["rows"]} == expected | {"accuracy"}
    alone = evaluate(dataclasses.replace(some, batch_size=1), vit, source, tmp_path / "alone")
    for row, other in zip(results["rows"], alone["rows"], strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-5) and np.isfinite(row["value"])


def test_max_sensitivity_explains_again(config, vit, folder, tmp_path):
    source, some = open_source(folder, limit=3), [Row("rollout", "rollout", {"first_block": 1})]
    task = dataclasses.replace(config, task="sensitivity", options={"samples": 2, "radius": 0.1, "seed": 4}, rows=some)
    results = evaluate(task, vit, source, tmp_path)
    found = {row["method"]: row["value"] for row in results["rows"] if row["metric"] == "max_sensitivity"}
    (batch,) = batches(source, vit.preprocessing, 3)
    images = batch.inputs.astype(np.float32) / 255
    explain = jax.jit(explain_fn(vit.module, "rollout", first_block=1))
    normalise = vit.preprocessing.normalise
    maps, largest = explain(vit.params, normalise(images)), 0
    for key in jax.random.split(jax.random.key(4), 2):
        near = explain(
            vit.params, normalise(images + jax.random.uniform(key, images.shape[1:], minval=-0.1, maxval=0.1))
        )
        largest = np.maximum(largest, np.linalg.norm(near - maps, axis=(1, 2)) / np.linalg.norm(maps, axis=(1, 2)))
    assert found == {"rollout": pytest.approx(largest.mean(), rel=1e-3), "random": 0}


@pytest.mark.slow
def test_shapley_values_are_computed_once_and_kept(config, vit, folder, tmp_path, monkeypatch):
    """The second row of a resumed run takes them from the first; as a row of their own they agree with themselves."""
    source, options = open_source(folder, limit=4), {"pairs": 2, "value": "probability", "seed": 3}
    task = dataclasses.replace(config, task="shapley", options=options, rows=[Row("itself", "shapley", options)])
    first = evaluate(task, vit, source, tmp_path)
    monkeypatch.setattr(evaluation.Programs, "reference", lambda *_: pytest.fail("computed again"))
    more = dataclasses.replace(task, rows=[*task.rows, *rows("input_gradient")])
    results = evaluate(more, vit, source, tmp_path)
    found = {row["method"]: row["value"] for row in results["rows"] if row["metric"] == "shapley_agreement"}
    assert found["itself"] == pytest.approx(1, abs=1e-5)
    assert set(found) == {"itself", "input_gradient", "random"} and abs(found["random"]) < 1
    (again,) = [row for row in results["rows"] if row["method"] == "itself"]
    assert again == {**first["rows"][1], "mark": "best"}  # among two
    (line,) = map(json.loads, (tmp_path / "records" / "reference.jsonl").read_text().splitlines())
    kept, errors = (np.asarray(line["fields"][name]) for name in ("map", "standard_error"))
    assert kept.shape == errors.shape == (4, 2, 3) and (errors > 0).all()
    with pytest.raises(InputError, match="'pairs' of the task 'shapley' must be greater than or equal to 2"):
        check(dataclasses.replace(task, options={"pairs": 1}))
    with pytest.raises(InputError, match="unknown option 'pair' of the task 'shapley'; did you mean 'pairs'"):
        check(dataclasses.replace(task, options={"pair": 1}))


def test_segmentation(vit, tmp_path):
    from test_sources import mat

    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (h, 30, 3), dtype=np.uint8) for h in (20, 33, 40)]
    masks = [(random.random(image.shape[:2]) < 0.4).astype(np.uint8) for image in images]
    source = open_source(mat(tmp_path / "a.mat", images, masks))
    config = EvaluateConfig("tiny", "segmentation", "", rows("rollout"), profile="reference", batch_size=2)
    results = evaluate(config, vit, source, tmp_path / "out")
    found = {row["metric"]: row["value"] for row in results["rows"] if row["method"] == "rollout"}
    assert set(found) == {"pixel_accuracy", "mean_iou", "map_two_channel", "map", "mean_f1", "pointing_game"}
    (batch,) = batches(source, vit.preprocessing, 3, "reference")
    inputs = vit.preprocessing.normalise(jnp.asarray(batch.inputs.astype(np.float32) / 255))
    maps = np.asarray(to_pixels(jax.jit(explain_fn(vit.module, "rollout"))(vit.params, inputs), (16, 24)))
    right = (maps > maps.mean((1, 2), keepdims=True)) == batch.masks
    assert found["pixel_accuracy"] == pytest.approx(100 * right.mean(), abs=1e-4)


def test_randomised_parameters(vit):
    fresh = jax.tree.map(lambda a: a + 1, vit.params)
    for blocks, same in ((0, [True, True]), (1, [True, False]), (2, [False, False])):
        params = randomised(vit.params, fresh, blocks)
        old, new = (p["blocks"]["attn"]["qkv"]["kernel"] for p in (vit.params, params))
        assert [bool((old[l] == new[l]).all()) for l in range(2)] == same
        assert (params["head"]["kernel"] != vit.params["head"]["kernel"]).all()
        assert (params["pos_embed"] == vit.params["pos_embed"]).all()


def test_what_does_not_go_together(config, vit, folder, whole, tmp_path):
    source = open_source(folder)
    changed = dataclasses.replace
    for other, message in (
        (changed(config, task="perturbed"), "did you mean 'perturbation'"),
        (changed(config, task="segmentation"), "has no masks"),
        (changed(config, profile="ref"), "unknown profile"),
        (changed(config, rows=rows("gea")), "did you mean 'gae'"),
        (changed(config, rows=[Row("a", "gae"), Row("a", "lrp")]), "different names"),
        (changed(config, rows=[Row("a", "tokentm", {"fnn": False})]), "did you mean 'ffn'"),
        (changed(config, rows=[Row("a", "combination", {"methods": "rollout,gea"})]), "did you mean 'gae'"),
        (changed(config, options={"fill": "blur"}), "unknown option"),
        (changed(config, task="insertion", options={"fill": "white"}), "must be 'black' or 'blur', got 'white'"),
        (changed(config, task="insertion", options={"steps": 0}), "'steps' of the task .* or equal to 1"),
        (changed(config, task="saco", options={"groups": 1}), "'groups' of the task .* or equal to 2"),
        (changed(config, task="saco", options={"groups": 10**6}), "'groups' of the task .* or equal to 1000"),
        (changed(config, task="saco", options={"groups": True}), "'groups' of the task .* valid integer"),
        (changed(config, task="sanity", options={"original": 1}), "unknown option"),
        (changed(config, batch_size=0), "'batch_size' must be greater than or equal to 1"),
        (changed(config, rows=[Row("a", "gae", {}, 3)]), "from 0 to 2"),
        (changed(config, rows=[Row("a", "random", {"seed": 3})]), "unknown option 'seed' of random"),
        (changed(config, rows=[Row("random", "gae")]), "so is 'random' for other methods"),
        (changed(config, rows=[Row("random", "random", {"pixels": True})]), "so is 'random' for other methods"),
        (changed(config, rows=[Row("a", "random", {"pixels": 1})]), "option 'pixels' of random must be a valid bool"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(other, vit, source, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="has no labels"):
        evaluate(config, vit, changed(source, labelled=False), tmp_path)
    with pytest.raises(InputError, match="has 3 classes, tiny has 5"):
        evaluate(config, vit, changed(source, class_names=("a", "b", "c")), tmp_path)
    few = changed(source, fetch=lambda key: source.read(key)._replace(label=5))
    with pytest.raises(InputError, match="has the label 5, and tiny has classes 0 to 4"):
        evaluate(config, vit, few, tmp_path / "labels")
    with pytest.raises(InputError, match="no image that can be read"):
        evaluate(config, vit, changed(source, keys=("bad.png",)), tmp_path / "bad")
    other = changed(vit, module=SimpleNamespace(depth=2), name="other")
    with pytest.raises(
        InputError, match=r"mixed_precision needs .* field 'linear', as tm.models.ViT has, and other has none"
    ):
        evaluate(changed(config, mixed_precision=True), other, source, tmp_path / "mixed")
    with pytest.raises(InputError, match="did you mean 'rollout'"):
        select(config, ["roll_out"])
    assert [row.name for row in select(config, ["gae", "lrp", "random"]).rows] == ["gae", "lrp", "random"]


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("name", ["../x", "/tmp/x", "a\\b", ".", "", "a\0", "é" * 51], "must be a plain name"),
        ("name", [None, 3, b"x", ["a"], Path("x")], "must be a valid string"),
        ("task", [None, 3, ["saco"], {}], "must be a valid string"),
        ("data", [None, Path("x")], "must be a valid string"),
        ("rows", [(), []], "at least 1 item"),
        ("rows", [None, 3, Row("a", "gae"), Row], "must be an instance of Sequence"),
        ("rows", ["gae", ["gae"], [("a", "gae")], [Row], [None]], "must be an instance of Row|not allowed"),
        ("rows", [[Row("a", ["gae"])], [Row("a", None)]], "[0]['method'] must be a valid string"),
        ("rows", [[Row("a", "gae", None)], [Row("a", "gae", [1])]], "[0]['options']"),
        ("rows", [[Row("a", "gae", {"first_block": [1]})]], "[0]['options']['first_block']"),
        (
            "rows",
            [[Row("a", "gae", {}, 0.5)], [Row("a", "gae", {}, True)]],
            "[0]['random_blocks'] must be a valid int",
        ),
        ("rows", [[Row("a", "gae", {}, -1)]], "[0]['random_blocks'] must be greater than or equal to 0"),
        ("rows", [[Row("a", "gae", by_patch=1)]], "[0]['by_patch'] must be a valid bool"),
        ("rows", [[Row("", "gae")], [Row("x" * 1001, "gae")]], "[0]['name'] is wrong"),
        ("model", [3, ["a"], ""], "'model'"),
        ("checkpoint", [3, Path("x")], "must be a valid string"),
        ("profile", [None, 3], "must be a valid string"),
        ("options", [None, 3, [1], "fill"], "must be a valid"),
        ("paper", [None, [1], {"gae": 1.0}, {("gae", "aopc"): "1"}, {("gae",): 1.0}], "'paper'"),
        ("paper", [{("gae", "aopc"): float("nan")}], "finite"),
        ("batch_size", [1.5, True, "4", None], "must be a valid integer"),
        ("batch_size", [5000], "less than or equal to 4096"),
        ("limit", [0, -1], "greater than or equal to 1"),
        ("limit", [2.5, True, "3"], "must be a valid integer"),
        ("seed", [-1, 2**31], "than or equal to"),
        ("seed", [None, "0", 0.5], "must be a valid integer"),
    ],
)
def test_fields_of_a_recipe_are_checked(config, field, values, expected):
    for value in values:
        with pytest.raises(InputError, match=f"the evaluation: '{field}'") as error:
            check(dataclasses.replace(config, **{field: value}))
        assert any(part in str(error.value) for part in expected.split("|")), str(error.value)
        assert len(str(error.value)) < 300
    assert check(dataclasses.replace(config, seed=np.int64(3))).seed == 3


def test_nobody_else_s_files_and_no_other_run(config, vit, folder, whole, tmp_path, monkeypatch):
    """What is in the folder stays as it was, byte for byte."""
    source = open_source(folder)
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            evaluate(dataclasses.replace(config, **changes), vit, source, out)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    refused("was made with seed 0, and this command has 1; choose another --out", seed=1)
    refused("was made with task perturbation, and this command has saco", task="saco")
    refused("was made with profile default", profile="reference")
    with monkeypatch.context() as patch:
        patch.setattr("tokentm_jax.identity.version_of", lambda package: "9.9")
        refused("was made with versions .* has .*9.9")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind="abacus")])
        refused("was made with device cpu, and this command has abacus")
    with claimed(out, json.loads((out / "identity.json").read_text()), ()):
        refused("is being written by another process")
    Image.new("RGB", (3, 3)).save(out / "curves.png")
    before[out / "curves.png"] = (out / "curves.png").read_bytes()
    refused("curves.png exists and was not written by this program")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "results.md").write_text("my own notes")
    with pytest.raises(InputError, match=r"results.md is not a file of this program; choose another --out"):
        evaluate(config, vit, source, foreign)
    assert [path.name for path in foreign.iterdir()] == ["results.md"]


@pytest.mark.slow
def test_rows_of_an_earlier_run_stay(config, vit, folder, whole, tmp_path):
    """A run of one row into the folder of all of them changes nothing; a new row, of fewer images, joins the others.
    Its name is no formula to the picture, whatever is in it."""
    out, before = tmp_path / "out", whole[1]
    shutil.copytree(whole[0], out)
    source, name = open_source(folder), r"a $\frac{ row $"
    again = evaluate(select(config, ["rollout"]), vit, source, out)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(before))
    for file in ("results.json", "results.md"):
        assert (out / file).read_bytes() == (whole[0] / file).read_bytes()
    new = dataclasses.replace(config, rows=(Row(name, "rollout", {}), Row("random", "random")))
    found = evaluate(new, vit, source, out)
    values = {(row["method"], row["metric"]): row for row in found["rows"]}
    assert list(dict.fromkeys(row["method"] for row in found["rows"]))[-4:] == ["gae", "rollout", name, "random"]
    for row in before["rows"]:
        assert values[row["method"], row["metric"]] == row
    assert [e["method"] for e in compare([out]) if e["metric"] == "aopc"] == ["gae", "rollout", name, "random"]
    shutil.rmtree(out)
    evaluate(select(config, ["gae"]), vit, open_source(folder, limit=6, seed=0), out)
    evaluate(select(config, ["rollout"]), vit, source, out)
    text = (out / "results.md").read_text()
    assert re.search(r"\| gae \([56] images\) \|", text) and "| rollout |" in text


def test_labels_go_by_name(vit, folder):
    source = dataclasses.replace(open_source(folder), class_names=("cat", "ant"))
    named = dataclasses.replace(vit, class_names=("ant", "bee", "cat", "dog", "eel"))
    assert evaluation.translation(named, source).tolist() == [2, 0]


@pytest.mark.slow
def test_comparison(whole, config, vit, folder, tmp_path):
    out, results = whole
    entries = compare([out])
    (first,) = [e for e in entries if (e["method"], e["metric"]) == ("gae", "aopc")]
    (entry,) = [e for e in entries if (e["method"], e["metric"]) == ("rollout", "aopc")]
    assert first["baseline"] is None and entry["baseline"] == "gae" and entry["images"] == COUNT
    assert entry["difference"] == pytest.approx(value(results, "rollout", "aopc") - value(results, "gae", "aopc"))
    assert entry["low"] <= entry["difference"] <= entry["high"]
    (turned,) = [e for e in compare([out], "rollout") if (e["method"], e["metric"]) == ("gae", "aopc")]
    assert [turned[key] for key in ("baseline", "difference")] == ["rollout", -entry["difference"]]
    assert [turned["low"], turned["high"]] == pytest.approx([-entry["high"], -entry["low"]], abs=2e-3)
    evaluate(dataclasses.replace(config, rows=rows("gae")), vit, open_source(folder, limit=6, seed=0), tmp_path)
    both = [e for e in compare([out, tmp_path]) if e["run"] == str(tmp_path)]
    assert {e["method"] for e in both} == {"gae", "random"}
    assert all(e["images"] in (5, 6) and abs(e["difference"]) < 1e-4 and e["high"] < 1e-3 for e in both)
    with pytest.raises(InputError, match="holds no finished evaluation"):
        compare([tmp_path / "nothing"])
    # The same folder with fewer images: what it holds of the others is no part of the results.
    fewer = tmp_path / "fewer"
    shutil.copytree(out, fewer)
    found = evaluate(config, vit, open_source(folder, limit=6, seed=0), fewer)
    figures = {(row["method"], row["metric"]): row for row in found["rows"]}
    for entry in compare([fewer]):
        figure = figures[entry["method"], entry["metric"]]
        assert (entry["value"], entry["images"]) == (figure["value"], figure["images"]) and entry["images"] in (5, 6)
    # Beside a running evaluation: its unfinished line is not looked at, and left alone.
    running = tmp_path / "running"
    shutil.copytree(out, running)
    for file in (running / "records").glob("*.jsonl"):
        with file.open("a") as opened:
            opened.write('{"keys": [["09.png", "pred')
    before = {path: path.read_bytes() for path in running.rglob("*") if path.is_file()}
    again = compare([running])
    assert [{**entry, "run": str(out)} for entry in again] == entries
    assert {path: path.read_bytes() for path in running.rglob("*") if path.is_file()} == before


def _in_results(place, value):
    """A change of one place of `results.json`."""

    def change(out):
        results = json.loads((out / "results.json").read_text())
        inner = results
        for part in place[:-1]:
            inner = inner[part]
        if value is KeyError:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
        (out / "results.json").write_text(json.dumps(results))

    return "results.json", change


def _in_records(change, name="gae-*"):
    """A change of the first line of a file of records."""

    def changed(out):
        (path,) = (out / "records").glob(f"{name}.jsonl")
        first, *rest = path.read_text().splitlines()
        line = json.loads(first)
        found = change(line)
        path.write_text("\n".join([found if isinstance(found, str) else json.dumps(line), *rest, ""]))

    return name.rstrip("*"), changed


def _field(name, change, records="gae-*"):
    def changed(line):
        line["fields"][name] = change(line["fields"][name])

    return _in_records(changed, records)


CONFIG = ("run", "config")
DAMAGE = {
    "empty": ("results.json", lambda out: (out / "results.json").write_text("")),
    "deep": ("results.json", lambda out: (out / "results.json").write_text("[" * 10_000 + "]" * 10_000)),
    "binary": ("results.json", lambda out: (out / "results.json").write_bytes(b"\xff\xfe\x00")),
    "a list": ("results.json", lambda out: (out / "results.json").write_text("[]")),
    "a pipe": ("results.json", lambda out: ((out / "results.json").unlink(), os.mkfifo(out / "results.json"))),
    "a folder": ("results.json", lambda out: ((out / "results.json").unlink(), (out / "results.json").mkdir())),
    "no run": _in_results(["run"], KeyError),
    "run": _in_results(["run"], [1]),
    "no config": _in_results(CONFIG, KeyError),
    "no data": _in_results(["run", "data"], KeyError),
    "task": _in_results([*CONFIG, "task"], "perturbed"),
    "task type": _in_results([*CONFIG, "task"], ["perturbation"]),
    "rows": _in_results([*CONFIG, "rows"], {"gae": 1}),
    "no rows": _in_results([*CONFIG, "rows"], []),
    "row": _in_results([*CONFIG, "rows", 0], "gae"),
    "method": _in_results([*CONFIG, "rows", 0, "method"], "gea"),
    "row name": _in_results([*CONFIG, "rows", 0, "name"], None),
    "row options": _in_results([*CONFIG, "rows", 0, "options"], [1]),
    "row option": _in_results([*CONFIG, "rows", 0, "options"], {"first_block": [[[]]]}),
    "random_blocks": _in_results([*CONFIG, "rows", 0, "random_blocks"], 0.5),
    "duplicate rows": _in_results([*CONFIG, "rows", 1], {"name": "gae", "method": "gae"}),
    "options": _in_results([*CONFIG, "options"], {"groups": 3}),
    "seed": _in_results([*CONFIG, "seed"], -1),
    "seed type": _in_results([*CONFIG, "seed"], "0"),
    "huge seed": _in_results([*CONFIG, "seed"], 10**400),
    "figure": _in_results(["rows", 0, "value"], "7"),
    "NaN": _in_results(["rows", 0, "low"], float("nan")),
    "path in a name": _in_results([*CONFIG, "name"], "../../x"),
    "no JSON": _in_records(lambda line: "nonsense"),
    "deep line": _in_records(lambda line: '{"keys": ' + "[" * 10_000 + "]" * 10_000 + "}"),
    "many digits": _in_records(lambda line: '{"keys": ' + "9" * 10_000 + "}"),
    "line is a list": _in_records(lambda line: "[]"),
    "no keys": _in_records(lambda line: line.pop("keys") and None),
    "empty keys": _in_records(lambda line: line.update(keys=[])),
    "no pairs": _in_records(lambda line: line.update(keys=["ab"] * 4)),
    "triples": _in_records(lambda line: line.update(keys=[["a", "b", "c"]] * 4)),
    "numbers for keys": _in_records(lambda line: line.update(keys=[[1, 2]] * 4)),
    "twice": _in_records(lambda line: line["keys"].__setitem__(1, line["keys"][0])),
    "no fields": _in_records(lambda line: line.pop("fields") and None),
    "fields": _in_records(lambda line: line.update(fields=[])),
    "field missing": _in_records(lambda line: line["fields"].pop("hit") and None),
    "field more": _in_records(lambda line: line["fields"].update(other=[1] * 4)),
    "field a number": _field("hit", lambda values: 3),
    "ragged": _field("hit", lambda values: [values[0], values[1][:1], *values[2:]]),
    "fewer": _field("hit", lambda values: values[:-1]),
    "other shape": _field("hit", lambda values: [[row[0], row[1] + [True]] for row in values]),
    "other type": _field("hit", lambda values: [[[float(x) for x in r] for r in row] for row in values]),
    "texts": _field("log_probability", lambda values: [[["x"] * 9] * 2 for _ in values]),
    "NaN in a line": _field("log_probability", lambda values: [[[float("nan")] * 9] * 2 for _ in values]),
    "huge": _field("log_probability", lambda values: [[[-1e300] * 9] * 2 for _ in values]),
    "probability above 1": _field("log_probability", lambda values: [[[5.0] * 9] * 2 for _ in values]),
    "null": _field("finite", lambda values: [None for _ in values]),
    "negative class": _field("predicted", lambda values: [-1 for _ in values], "clean"),
    "class": _field("label", lambda values: [0.5 for _ in values], "clean"),
    "large class": _field("predicted", lambda values: [2**63 for _ in values], "clean"),
    "explained": _in_records(lambda line: [pair.__setitem__(1, "cat") for pair in line["keys"]] and None, "clean"),
    "none clean": ("clean.jsonl", lambda out: (out / "records/clean.jsonl").unlink()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_one_sentence(whole, tmp_path, name):
    """Whatever is wrong with the files of a run, `compare` names the file and writes nothing."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    where, damage = DAMAGE[name]
    damage(out)
    before = {path: path.stat().st_size for path in out.rglob("*")}
    with pytest.raises(InputError) as error:
        compare([out])
    assert where in str(error.value) and str(out) in str(error.value) and len(str(error.value)) < 600
    assert {path: path.stat().st_size for path in out.rglob("*")} == before


def test_a_line_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text(" " * 2000)
    with pytest.raises(InputError, match="line 1 is longer than"):
        records_module.Records(tmp_path / "a.jsonl", {})


def test_large_batches_are_several_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "IMAGES", 2)
    fields = {"x": lists_of(float)}
    made = records_module.Records(tmp_path / "a.jsonl", fields)
    made.append([(str(i), "predicted") for i in range(5)], {"x": np.arange(5.0)})
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    read = records_module.Records(tmp_path / "a.jsonl", fields)
    assert read.take("x", [("3", "predicted"), ("0", "predicted")]).tolist() == [3, 0] and read.places == made.places


def test_commands(vit, folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors", vit.module, vit.params, vit.preprocessing)
    recipe, nowhere = tmp_path / "recipe.py", tmp_path / "nowhere"
    recipe.write_text(
        "from tokentm_jax import EvaluateConfig\n"
        "from tokentm_jax.configs import rows\n"
        f"config = EvaluateConfig('cli', 'saco', '{nowhere}', rows('rollout', 'gae'),\n"
        f"    checkpoint={str(checkpoint)!r},\n"
        "    paper={('rollout', 'saco'): 0.123}, batch_size=4)\n"
    )
    out = tmp_path / "out"
    arguments = ["evaluate", recipe, "--methods", "rollout", "--out", out]

    def run(*arguments):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert "Traceback" not in result.output
        return result

    result = run(*arguments, "--data", folder, "--limit", 4)
    assert result.exit_code == 0, result.output
    assert "| rollout |" in result.output and "paper: saco" in result.output and "0.123" in result.output
    results = json.loads((out / "results.json").read_text())
    assert [r.get("paper") for r in results["rows"] if r["method"] == "rollout"] == [0.123]
    assert run("compare", out).exit_code == 0
    assert json.loads(run("compare", out, "--json").output)[0]["metric"] == "saco"
    for bad, message in (
        (arguments, f"the data set {nowhere} does not exist"),
        ([*arguments, "--data", "tfds:"], "tfds:NAME:SPLIT"),
        (["evaluate", tmp_path / "no.py"], "does not exist"),
        ([*arguments[:2], "--methods", "gaee", "--data", folder], "did you mean 'gae'"),
        (["compare", tmp_path], "holds no finished evaluation"),
        (["compare", out, "--to", "rolout"], "did you mean 'rollout'"),
        (["compare", out, tmp_path, "--to", "rollout"], "of several runs, every method is compared with the same"),
    ):
        result = run(*bad)
        assert result.exit_code == 2 and message in result.output
        assert len(result.stderr.strip().splitlines()) == 1


RECIPE = "from tokentm_jax.configs import EvaluateConfig, rows\nconfig = EvaluateConfig('a', 'saco', 'nowhere', {})\n"
GOOD = RECIPE.format("rows('gae')")


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("raise SystemExit(0)", "ends the program (SystemExit: 0)"),
        ("import sys; sys.exit()", "ends the program"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = " + "(" * 3000 + ")" * 3000, "cannot be run"),
        (GOOD + "x = '\0'", "cannot be run"),
        (GOOD.encode() + b"# \xff", "is not UTF-8 text"),
        (GOOD + "#" * 2**20, "is larger than 1 MiB"),
        (GOOD + "config = EvaluateConfig", "must define `config` as a EvaluateConfig"),
        (GOOD + "class Own(EvaluateConfig): pass\nconfig = Own(**vars(config))", "must define `config`"),
        (GOOD + "print('hello')", "the data set nowhere does not exist"),
        (RECIPE.format("()"), "recipe.py: 'rows'"),
        (GOOD.replace("'a'", "'../../x'"), "recipe.py: 'name' must be a plain name"),
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_strange_recipes(tmp_path, monkeypatch, recipe, sentence):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.py"
    if callable(recipe):
        recipe(path)
    else:
        path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    result = CliRunner().invoke(main, ["evaluate", str(path)])
    assert result.exit_code == 2 and sentence in result.stderr and not result.stdout
    assert len(result.stderr.removeprefix("hello\n").splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


ROOT = Path(__file__).parent.parent


def test_the_configs_of_the_project():
    """Every combination of a config's options names existing methods, options and classes, and a folder of its own;
    and the commands in its docstring are among them."""
    names = []
    for file in sorted([*ROOT.glob("configs/*.py"), *ROOT.glob("models/training/recipes/*.py")]):
        make = runpy.run_path(str(file)).get("get_config")
        if make is None:
            continue
        # A path is not a choice: it keeps its default.
        choices = {n: get_args(hint) for n, hint in get_type_hints(make).items() if n != "return" and hint is not str}
        choices = {n: get_args(c[0]) if get_origin(c[0]) is Literal else c for n, c in choices.items()}
        for values in itertools.product(*choices.values()):
            options = ",".join(f"{name}={value}" for name, value in zip(choices, values, strict=True))
            kind = get_type_hints(make)["return"]
            config = read_recipe(Path(f"{file}:{options}"), kind)
            names.append(config.name)
            if kind is TrainConfig:
                build(config.model)
                continue
            if kind is LeaderboardConfig:
                check_leaderboard(config)
                continue
            if kind is AmortiseConfig:
                continue
            check(config)
            assert {row for row, _ in config.paper} <= {row.name for row in config.rows}
        text = file.read_text()
        assert "Data:" in text and "Run time:" in text
        commands = re.findall(r"(?:tokentm (?:evaluate|leaderboard)|python -m models.training) (\S+)", text)
        assert ROOT / commands[0] == file
        for command in commands:
            read_recipe(ROOT / command, kind)
    assert len(names) == len(set(names)) > 50


def test_options_of_a_recipe():
    for options, sentence in (
        ("dta=photos", "unknown option 'dta' of the recipe .*perturbation.py; did you mean 'data'"),
        ("data=photo", "option 'data' of the recipe .*perturbation.py must be 'photos', .* got 'photo'"),
        ("data", "KEY=VALUE"),
        ("data=photos,data=imagenet", "given twice"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_recipe(Path(f"{ROOT}/configs/perturbation.py:{options}"), EvaluateConfig)
    with pytest.raises(InputError, match="has no options"):
        read_recipe(Path(f"{ROOT}/models/training/recipes/cifar10_vit.py:data=photos"), EvaluateConfig)


def test_the_rows_of_the_paper_leave_out_the_first_block_where_the_published_evaluation_does():
    left_out = {row.name for row in PAPER_ROWS if row.options.get("first_block") == 1}
    assert left_out == {"transformer_attribution", "rollout"}


def test_names_that_are_no_utf_8(config, vit, folder, tmp_path):
    source = open_source(folder, limit=4)
    own = {f"{key}\udcff": key for key in source.keys}
    odd = dataclasses.replace(
        source, name="the folder caf\udce9", keys=tuple(own), fetch=lambda key: source.read(own[key])._replace(key=key)
    )
    some = dataclasses.replace(config, rows=[Row("a | b", "random")])
    for _ in range(2):
        evaluate(some, vit, odd, tmp_path)
    assert "on the folder caf?: 4 images" in (tmp_path / "results.md").read_text()
    assert "| a \\| b |" in (tmp_path / "results.md").read_text()
    assert compare([tmp_path])[0]["images"] == 4


def test_the_random_row_is_the_same_everywhere(whole, vit):
    """Its map is a function of the photo's name: here computed apart."""
    out, _ = whole
    path = next((out / "records").glob("random-*.jsonl"))
    record = json.loads(path.read_text().splitlines()[0])
    keys = [key for key, _ in record["keys"]]
    maps = to_pixels(jnp.asarray(np.stack([metrics.random_map(key, vit.module.grid) for key in keys])), (16, 24))
    assert maps.shape == (4, 16, 24) and np.shape(record["fields"]["hit"]) == (4, 2, 9)


# ---- which direction is better, and who really is ------------------------------------------------------------------


def test_results_and_comparisons_show_directions_and_significance(whole, tmp_path):
    """Records of three methods whose difference is known: one far ahead, one tied with it, one far behind."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    results = json.loads((out / "results.json").read_text())
    keys = json.loads((out / "records/examples.json").read_text())
    random = np.random.default_rng(0)
    noise = random.normal(size=len(keys)) * 1e-3
    chosen = {"near": -1.0 + noise, "far": np.full(len(keys), -0.1), "first": np.full(len(keys), -1.0)}
    config = EvaluateConfig(**{**results["run"]["config"], "rows": [Row(name, "gae") for name in chosen], "paper": {}})
    records = {}
    for row in config.rows:
        path = records_module.record_file(out, row)
        fields = TASKS["perturbation"].records("perturbation", {})
        records[row.name] = records_module.Records(path, fields)
        log = np.broadcast_to(chosen[row.name][:, None, None], (len(keys), 2, 9))
        hit, finite = np.ones((len(keys), 2, 9), bool), np.ones(len(keys), bool)
        for explained in ("predicted", "target"):
            found = {"log_probability": log, "hit": hit, "finite": finite}
            records[row.name].append([(key, explained) for key in keys], found)
    clean = records_module.Records(out / "records/clean.jsonl", records_module.clean_fields(config), ("clean",))
    results["rows"] = evaluation.summarise(config, clean, records, keys)
    marks = {(row["method"], row["metric"]): row.get("mark") for row in results["rows"]}
    # AOPC is better where it is higher, and the log-odds where they are lower; the accuracies are all the same.
    assert marks["far", "aopc"] is None and {marks["near", "aopc"], marks["first", "aopc"]} == {"best", "level"}
    assert marks["far", "lodds"] is None and {marks["near", "lodds"], marks["first", "lodds"]} == {"best", "level"}
    assert marks["clean", "accuracy"] is None
    results["run"]["config"]["rows"] = [dataclasses.asdict(row) for row in config.rows]
    text = evaluation.markdown(results)
    assert "| positive auc predicted ↓ | negative auc predicted ↑ |" in text and "| aopc ↑ | lodds ↓ |" in text
    (far,) = [line for line in text.splitlines() if line.startswith("| far |")]
    assert not far.split("|")[-2].strip().startswith("*") and far.split("|")[2].strip().startswith("*")
    assert "**bold** is the best method" in text
    (out / "results.json").write_text(json.dumps(results))
    verdicts = {(e["method"], e["metric"]): e.get("verdict") for e in compare([out], "first")}
    assert verdicts["far", "aopc"] == verdicts["far", "lodds"] == "worse"
    assert verdicts["near", "aopc"] == "tie" and verdicts["first", "aopc"] is None
    other = {(e["method"], e["metric"]): e["verdict"] for e in compare([out], "far") if e["method"] != "far"}
    assert other["near", "aopc"] == other["first", "lodds"] == "better"
    shown = CliRunner().invoke(main, ["compare", str(out), "--to", "first"]).output
    assert re.search(r"aopc ↑ +far .* worse +first", shown) and re.search(r"lodds ↓ +near .* tie +first", shown)


def test_a_comparison_needs_all_records_that_the_figures_are_of(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (path,) = (out / "records").glob("gae-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    with pytest.raises(InputError, match=rf"{re.escape(path.name)} holds the results of \d of the {COUNT} images"):
        compare([out])
    path.unlink()
    for command in (["compare", out], ["compare", out, whole[0]], ["report", out, "--out", tmp_path / "page.html"]):
        result = CliRunner().invoke(main, [str(a) for a in command])
        assert result.exit_code == 2 and f"{path} holds the results of no image: it is gone" in result.stderr
