"""Leaderboards: who is marked, the front, resuming, what is computed once, bad configs, the command."""

import dataclasses
import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import tiny_vit
from PIL import Image

from tokentm_jax.cli.main import main
from tokentm_jax.configs import EvaluateConfig, Row, rows
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.files import ours
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.runs import evaluate as evaluation
from tokentm_jax.runs import leaderboard as module
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.leaderboard import (
    LeaderboardConfig,
    check,
    images_per_second,
    leaderboard,
    select,
)
from tokentm_jax.runs.report import compare
from tokentm_jax.runs.standings import draw, markdown, mean_ranks, pareto, standings
from tokentm_jax.runs.store import open_maps

METHODS = rows("rollout", "raw_attention")


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five photos without labels that mean anything."""
    path, random = tmp_path_factory.mktemp("photos") / "a", np.random.default_rng(0)
    path.mkdir()
    for i in range(5):
        Image.fromarray(random.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(path / f"{i}.png")
    (path / "labels.csv").write_text("\n".join(["file,class_index", *(f"{i}.png,{i}" for i in range(5))]))
    return path


@pytest.fixture(scope="module")
def config(folder):
    runs = [
        EvaluateConfig("srg", "srg", str(folder), METHODS, options={"steps": 3}, batch_size=2),
        EvaluateConfig("complexity", "complexity", str(folder), METHODS, batch_size=2, limit=3),
    ]
    return LeaderboardConfig("tiny", runs, ("srg", "srg"))


def speeds(vit, rows, batch_size, report):
    """What is measured else: rollout is twice as fast."""
    return {name: 2.0 if name == "rollout" else 1.0 for name in rows}


@pytest.fixture(scope="module")
def whole(config, vit, tmp_path_factory):
    """(folder, content) of an uninterrupted leaderboard."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "images_per_second", speeds)
        return out, leaderboard(config, vit, out)


def run_of(task, per_image):
    """A finished run and its results, made by hand: its results per image are its one metric."""
    metric = {"shapley": "shapley_agreement", "sensitivity": "max_sensitivity"}[task]
    values = {name: np.array(own) for name, own in per_image.items()}
    own = tuple(Row(name, "random" if name == "random" else "gae") for name in values)
    finished = SimpleNamespace(
        grouped=False,
        config=EvaluateConfig(task, task, "x", own),
        measured=lambda row: (list("abcd")[: len(values[row.name])], {metric: values[row.name]}),
    )
    row = {"low": -1.0, "high": 1.0, "metric": metric}
    figures = [{**row, "method": name, "value": own.mean(), "images": len(own)} for name, own in values.items()]
    clean = {**row, "method": "clean", "metric": "accuracy", "value": 99.0, "images": 4}
    return finished, {"rows": [clean, *figures]}


MADE = {
    "shapley": {
        "near": [0.9, 0.2, 0.9, 0.2],  # 0.05 behind, on some images ahead
        "best": [0.5, 0.6, 0.7, 0.6],
        "far": [0.4, 0.5, 0.6, 0.5],  # 0.1 behind on every image
        "random": [0.9, 0.9, 0.9, 0.9],
    },
    "sensitivity": {"far": [0.1, 0.2, 0.1, 0.2], "best": [0.3, 0.4, 0.3, 0.4], "random": [0.0, 0.0, 0.0, 0.0]},
}


def test_marks_and_ranks_of_a_case_made_by_hand():
    made = {task: run_of(task, per_image) for task, per_image in MADE.items()}
    found = standings({t: run for t, (run, _) in made.items()}, {t: results for t, (_, results) in made.items()})
    marks = {(f["metric"], f["method"]): f["mark"] for f in found}
    assert marks == {
        ("shapley_agreement", "near"): "level",
        ("shapley_agreement", "best"): "best",
        ("shapley_agreement", "far"): None,
        ("shapley_agreement", "random"): None,
        ("max_sensitivity", "far"): "best",
        ("max_sensitivity", "best"): None,
        ("max_sensitivity", "random"): None,
    }
    far = next(f for f in found if (f["metric"], f["method"]) == ("shapley_agreement", "far"))
    assert [far["behind"][name] for name in ("difference", "low", "high")] == pytest.approx([-0.1] * 3)
    assert far["behind"]["images"] == 4
    assert mean_ranks(found) == {"near": 2, "best": (1 + 2) / 2, "far": (3 + 1) / 2}
    described = {"name": "shapley", "task": "shapley", "data": {"name": "a|b", "examples": 4}, "skipped": 0}
    described |= {"mixed_precision": True}
    run = {"name": "made", "model": {"name": "tiny"}, "device": "cpu", "batch_size": 4}
    run["runs"] = [described, {**described, "name": "sensitivity", "task": "sensitivity"}]
    method = {"passes": "1 F", "images_per_second": 12.345, "mean_rank": 1.5}
    text = markdown({"rows": found, "methods": [{**method, "name": n} for n in ("best", "far", "near")], "run": run})
    said = "shapley, sensitivity: 4 images of a|b, 0 skipped. In mixed precision: answers to changed images, in"
    assert text.splitlines()[2] == f"tiny. {said} shapley, sensitivity."
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    assert table[0] == ["method", "shapley agreement ↑", "max sensitivity ↓", "passes", "images/s", "mean rank"]
    assert table[2:4] == [
        ["best", "**0.600**", "0.350", "1 F", "12.3", "1.5"],
        ["far", "0.500", "**0.150**", *table[2][3:]],
    ]
    assert table[4][:3] == ["near", "*0.550*", ""] and table[5][:3] == ["random", "0.900", "0.000"]


def test_equal_figures_share_their_rank():
    figure = {"run": "a", "metric": "m", "better": "higher"}
    figures = [{**figure, "method": name, "value": value} for name, value in zip("xyzw", (3, 2, 2, 1), strict=True)]
    assert mean_ranks(figures) == {"x": 1, "y": 2.5, "z": 2.5, "w": 4}
    # A metric counts once, however many columns it has; one without a better direction not at all.
    figures += [
        {**figure, "run": "b", "metric": m, "method": name, "value": v}
        for m in "pq"
        for name, v in (("x", 0), ("w", 1))
    ]
    figures += [{**figure, "run": "c", "better": None, "method": "x", "value": 0}]
    assert mean_ranks(figures) == {"x": 1.5, "y": 2.5, "z": 2.5, "w": 2.5}


def test_the_front_is_that_of_all_pairs():
    random = np.random.default_rng(0)
    for n in (1, 2, 5, 30):
        cost, gain = random.integers(0, 6, (2, n)).astype(float)  # with equal points, and equal in one of the two
        expected = []
        for i in range(n):
            beaten = False
            for j in range(n):
                as_good = cost[j] <= cost[i] and gain[j] >= gain[i]
                beaten |= as_good and (cost[j], gain[j]) != (cost[i], gain[i])
            expected.append(not beaten)
        assert pareto(cost, gain).tolist() == expected


def test_a_leaderboard(whole, config, vit, tmp_path):
    out, found = whole
    assert json.loads((out / "leaderboard.json").read_text()) == found
    assert {(f["run"], f["metric"]) for f in found["rows"]} == {
        ("srg", "srg"),
        ("complexity", "gini"),
        ("complexity", "entropy"),
    }
    marks = {f["mark"] for f in found["rows"] if f["run"] == "complexity"}
    assert marks == {None}  # neither direction is better
    # Every figure is that of the run alone, which computes its own maps.
    for run in config.runs:
        drawn = open_source(run.data, limit=run.limit, seed=None if run.limit is None else run.seed)
        alone = {
            (r["method"], r["metric"]): r for r in evaluation.evaluate(run, vit, drawn, tmp_path / run.name)["rows"]
        }
        for figure in (f for f in found["rows"] if f["run"] == run.name):
            for name in ("value", "low", "high", "images"):
                assert figure[name] == pytest.approx(
                    alone[figure["method"], figure["metric"]][name], rel=1e-5, abs=1e-6
                )
    assert {entry["method"] for entry in compare([out / "srg"])} == {"rollout", "raw_attention", "random"}
    methods = {method["name"]: method for method in found["methods"]}
    assert {name: (m["passes"], m["images_per_second"]) for name, m in methods.items()} == {
        "rollout": ("1 F", 2.0),
        "raw_attention": ("1 F", 1.0),
    }
    figures = {f["method"]: f["value"] for f in found["rows"] if f["run"] == "srg"}
    assert methods["rollout"]["pareto"] and figures["rollout"] != figures["raw_attention"]
    assert methods["raw_attention"]["pareto"] == (figures["raw_attention"] > figures["rollout"])
    assert "| rollout |" in (out / "leaderboard.md").read_text() and ours(out / "leaderboard.png")


@pytest.mark.slow
def test_methods_of_an_earlier_run_stay(whole, config, vit, tmp_path, monkeypatch):
    """A run of one method into the folder of all of them measures only its speed, and the table keeps all."""
    out, found = tmp_path / "out", whole[1]
    shutil.copytree(whole[0], out)
    measured = []
    monkeypatch.setattr(
        module, "images_per_second", lambda vit, rows, *_: measured.append([*rows]) or {"rollout": 4.0}
    )
    again = leaderboard(select(config, ["rollout"]), vit, out)
    assert measured == [["rollout"]] and again["rows"] == found["rows"]
    assert {m["name"]: m["images_per_second"] for m in again["methods"]} == {"rollout": 4.0, "raw_attention": 1.0}
    assert "| raw_attention |" in (out / "leaderboard.md").read_text()


@pytest.mark.slow
def test_maps_are_computed_once(whole, config, vit, tmp_path, monkeypatch):
    out, found = whole
    stores = [open_maps(path) for path in sorted((out / "maps").iterdir())]
    assert [list(store.maps) for store in stores] == [["raw_attention"], ["rollout"]]  # on all five images, exactly
    assert all(len(store) == 5 and store.provenance["dtype"] == "float32" for store in stores)
    calls, maps = [], evaluation.Programs.maps

    def counted(self, rows, *arguments):
        calls.extend((self.config.task, row.method) for row in rows)
        return maps(self, rows, *arguments)

    monkeypatch.setattr(evaluation.Programs, "maps", counted)
    monkeypatch.setattr(module, "images_per_second", speeds)
    again = leaderboard(config, vit, tmp_path / "given", stores)  # by a store of one's own as well
    assert set(calls) == {("srg", "random"), ("complexity", "random")}
    assert again["rows"] == found["rows"]
    assert not (tmp_path / "given" / "maps").exists()
    other = dataclasses.replace(config, runs=[dataclasses.replace(run, profile="reference") for run in config.runs])
    with pytest.raises(InputError, match=r"holds maps of .* that no run of tiny has a use for"):
        leaderboard(other, vit, tmp_path / "other", stores)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_larger_limit_computes_the_maps_that_are_missing(whole, config, vit, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "images_per_second", speeds)
    one = select(config, ["rollout"])
    explained, done = [], []

    def run(limit):
        explained.clear()
        limited = [dataclasses.replace(run, limit=limit) for run in one.runs]
        return leaderboard(dataclasses.replace(one, runs=limited), vit, tmp_path)["rows"]

    def counted(explainer, source, *arguments, **named):
        if explain_dataset(explainer, source, *arguments, **named).computed:
            explained.extend(source.keys)

    monkeypatch.setattr(module, "explain_dataset", counted)
    fewer = run(2)
    done += explained
    assert len(done) == 2
    more = run(3)
    assert len(explained) == 1 and explained[0] not in done
    figures = [{(f["run"], f["metric"], f["method"]): f["value"] for f in own} for own in (more, whole[1]["rows"])]
    gini = "complexity", "gini", "rollout"
    assert figures[0][gini] == figures[1][gini]  # which has three images there, too
    assert run(2) == fewer and run(3) == more and not explained
    assert [len(open_maps(path)) for path in sorted((tmp_path / "maps").iterdir())] == [2, 1]


@pytest.mark.slow
def test_rows_that_share_a_pass_share_a_store(config, vit, tmp_path, monkeypatch):
    """With the maps of a run of each; a later row has a store of its own, and no map is computed twice."""
    monkeypatch.setattr(module, "images_per_second", speeds)
    made = []

    def counted(explainer, *arguments, **named):
        if explain_dataset(explainer, *arguments, **named).computed:
            made.append(explainer.methods)

    monkeypatch.setattr(module, "explain_dataset", counted)

    def run(*own, out):
        made.clear()
        runs = [dataclasses.replace(run, rows=own, limit=3) for run in config.runs]
        found = leaderboard(dataclasses.replace(config, runs=runs), vit, tmp_path / out)
        return {(f["run"], f["metric"], f["method"]): f["value"] for f in found["rows"] if f["method"] != "random"}

    own = rows("gae", "raw_attention", "tokentm")
    found = run(*own, Row("gae 1", "gae", {"first_block": 1}), out="together")
    assert made == [("gae", "tokentm"), ("raw_attention",), ("gae",)]
    run(*own[:2], out="later")
    later = run(*own, out="later")
    assert made == [("tokentm",)]
    run(*own[2:], *rows("legrad"), out="together")
    assert made == [("legrad",)]
    single = {}
    for row in own:
        single |= run(row, out=f"only {row.name}")
    assert later == pytest.approx(single, rel=1e-5) == {key: found[key] for key in single}


@pytest.mark.slow
def test_an_interrupted_leaderboard_goes_on(whole, config, vit, tmp_path, monkeypatch):
    """Stopped after the first batch of each of its parts, and gone on with every time."""
    monkeypatch.setattr(module, "images_per_second", speeds)
    parts = []

    @contextmanager
    def stop(part):
        def report(done, total, figures):
            raise KeyboardInterrupt

        new = part not in parts
        parts.append(part)
        yield report if new and part != "speed" else None

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            leaderboard(config, vit, tmp_path, watch=stop)
        assert not (tmp_path / "leaderboard.json").exists()
    found = leaderboard(config, vit, tmp_path, watch=stop)
    assert list(dict.fromkeys(parts)) == [
        "maps of rollout (1 of 2)",
        "maps of raw_attention (2 of 2)",
        "srg (1 of 2)",
        "complexity (2 of 2)",
        "speed",
    ]
    assert found["rows"] == whole[1]["rows"] and found["run"] == whole[1]["run"]
    one = select(config, ["rollout"])  # fewer methods and images, over what is there
    runs = [dataclasses.replace(run, limit=2) for run in one.runs]
    fewer = leaderboard(dataclasses.replace(one, runs=runs), vit, tmp_path)
    # The rows of earlier runs stay, of the same images as the others.
    assert {(f["method"], f["images"]) for f in fewer["rows"]} == {("rollout", 2), ("random", 2), ("raw_attention", 2)}


@pytest.mark.slow
def test_randomised_models_are_explained_anew(config, vit, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "images_per_second", speeds)
    randomised = [Row("rollout", "rollout", {}, 2)]
    sanity = EvaluateConfig("sanity", "sanity", str(folder), randomised, batch_size=2, limit=3)
    complexity = dataclasses.replace(config.runs[1], rows=rows("rollout"))
    some = LeaderboardConfig("two", [sanity, complexity], ("sanity", "similarity"))
    found = leaderboard(some, vit, tmp_path)
    assert not (tmp_path / "maps").exists()  # one run alone has a use for them
    (figure,) = [f for f in found["rows"] if (f["run"], f["method"]) == ("sanity", "rollout")]
    assert figure["value"] < 0.99 and figure["mark"] == "best"


def test_the_speed_is_that_of_the_median_call(vit, monkeypatch):
    """By a clock of its own: the first call of a fast method does not count, a slow one is called once, and one that
    would take minutes for a batch explains one image."""
    clock, calls = [0.0], []
    takes = {
        "rollout": iter([0.9, 0.9, 0.1, 0.1, 0.3, 0.1, 0.1]),
        "raw_attention": iter([14.9, 8.0]),
        "rise": iter([16.0]),
    }

    def compiled(module, methods, *, preprocessing):
        (name,) = methods

        def call(params, pixels, classes):
            size = len(pixels)
            assert pixels.shape == (size, 16, 24, 3) and classes.shape == (size,)
            calls.append((name, size))
            clock[0] += next(takes[name])

        return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: call))

    monkeypatch.setattr(module, "compiled", compiled)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(jax, "block_until_ready", lambda x: x)
    done = []
    measured = {row.name: row for row in rows("rollout", "raw_attention", "rise")}
    found = images_per_second(vit, measured, 4, lambda *progress: done.append(progress[:2]))
    assert found == pytest.approx({"rollout": 40, "raw_attention": 0.5, "rise": 1 / 16})
    assert calls == [*((name, 1) for name in measured), ("rollout", 4), ("raw_attention", 4), *[("rollout", 4)] * 5]
    assert done == [(k, 21) for k in range(1, 22)]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_picture(better):
    """The best of a column stands on top, and the front goes from the cheapest to the best."""
    values = {"cheap $x": 2.0, "good": 1.0 if better == "lower" else 3.0, "poor": 2.5 if better == "lower" else 1.5}
    figure = {"run": "r", "metric": "some_figure", "better": better}
    found = {
        "run": {"name": "made", "faithfulness": ["r", "some_figure"]},
        "rows": [{**figure, "method": n, "value": v, "low": v - 0.1, "high": v + 0.1} for n, v in values.items()],
        "methods": [
            {"name": name, "images_per_second": speed, "pareto": name != "poor"}
            for name, speed in zip(values, (10.0, 1.0, 2.0), strict=True)
        ],
    }
    drawn = draw(found)
    (axes,) = drawn.axes
    drawn.canvas.draw()
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["good"] > heights["cheap $x"] > heights["poor"]
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    assert front.get_xydata().tolist() == [[0.1, 2.0], [1.0, values["good"]]]
    assert axes.yaxis_inverted() == (better == "lower") and axes.get_xscale() == "log"


def test_wrong_leaderboards(config, vit, folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            check(dataclasses.replace(config, **changes))

    srg, complexity = config.runs
    again = dataclasses.replace
    refused("'name' must be a plain name", name="a/b")
    refused("'runs'", runs=[])
    refused("'runs'.* must be an instance of EvaluateConfig", runs=[3])
    refused("must have different names", runs=[srg, srg])
    refused("must have different names, none of them 'maps'", runs=[srg, again(complexity, name="maps")])
    refused("must be of one model", runs=[srg, again(complexity, model="cifar10_vit")])
    refused("unknown task 'srgg'; did you mean 'srg'", runs=[again(srg, task="srgg")])
    for row in (Row("rollout", "rollout", {"first_block": 1}), Row("rollout", "rollout", by_patch=True)):
        other = again(complexity, rows=[row])
        refused("the row 'rollout' must be the same method with the same options in every run", runs=[srg, other])
    noise = again(complexity, rows=[Row("random pixels", "random", {"pixels": True})])
    refused("the row 'random pixels' is no method and not ranked: leave it out", runs=[srg, noise])
    refused("unknown run 'sgr' of the field 'faithfulness'; did you mean 'srg'", faithfulness=("sgr", "srg"))
    refused("unknown metric 'aopc' of 'faithfulness'; known: srg", faithfulness=("srg", "aopc"))
    refused("unknown metric 'gini' of 'faithfulness'; known: none", faithfulness=("complexity", "gini"))
    with pytest.raises(InputError, match="unknown row 'rolout' of tiny; did you mean 'rollout'"):
        select(config, ["rolout"])
    assert [run.name for run in select(config, ["raw_attention"]).runs] == ["srg", "complexity"]
    (tmp_path / "srg").mkdir()
    with pytest.raises(InputError, match="srg is not a file of this program; choose another --out"):
        leaderboard(config, vit, tmp_path)


@pytest.mark.slow
def test_the_command(vit, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors", vit.module, vit.params, vit.preprocessing)
    recipe, out = tmp_path / "board.py", tmp_path / "out"
    recipe.write_text(
        "from tokentm_jax import EvaluateConfig, LeaderboardConfig\n"
        "from tokentm_jax.configs import rows\n"
        f"run = EvaluateConfig('complexity', 'complexity', {str(folder)!r}, rows('rollout', 'gae'), batch_size=4)\n"
        "srg = EvaluateConfig('srg', 'srg', run.data, rows('rollout', 'gae'), options={'steps': 3})\n"
        "config = LeaderboardConfig('board', [run, srg], ('srg', 'srg'))\n"
    )

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, ["leaderboard", str(recipe), *map(str, arguments)])
        assert result.exit_code == code and "Traceback" not in result.output, result.output
        return result

    given = ("--checkpoint", checkpoint, "--out", out, "--batch-size", 2)
    output = run(*given, "--methods", "rollout", "--limit", 2).stdout
    assert "| rollout |" in output and "gae" not in output and "images/s" in output
    found = json.loads((out / "leaderboard.json").read_text())
    assert {f["images"] for f in found["rows"]} == {2} and found["run"]["batch_size"] == 2
    assert "did you mean 'gae'" in run(*given, "--methods", "gaee", code=2).stderr
    assert {f["run"] for f in json.loads((out / "leaderboard.json").read_text())["rows"]} == {"complexity", "srg"}
    run(*given, "--methods", "rollout", "--limit", 2, "--runs", "srg")  # over the folder of both
    assert {f["run"] for f in json.loads((out / "leaderboard.json").read_text())["rows"]} == {"srg"}
    assert "did you mean 'srg'" in run(*given, "--runs", "srgg", code=2).stderr
    assert (
        "the runs must have 'srg' among them" in run(*given, "--runs", "complexity", code=2).stderr
    )  # which is of srg
