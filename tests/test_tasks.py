"""Tasks: what they record, and a metric of the user in every command."""

import json
from typing import Any
from unittest.mock import patch

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import mostly_slow, tiny_vit
from PIL import Image

from tokentm_jax import metrics
from tokentm_jax.cli.main import main
from tokentm_jax.configs import EvaluateConfig, rows
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.metrics import TASKS
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.runs.evaluate import evaluate
from tokentm_jax.validation import checked


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).save(path / f"{number}.png")
    return path


RECORDS: dict[str, dict[str, tuple[Any, ...]]] = {  # type and shape per image of what is recorded
    "perturbation": {"log_probability": ("log", 2, 9), "hit": (bool, 2, 9)},
    "segmentation": {
        "counts": (int, 4),
        "average_precision": (float,),
        "map_two_channel": (float,),
        "histogram": (int, 2, 50),
        "pointing": (bool,),
    },
    "insertion": {"log_probability": ("log", 2, 21)},
    "saco": {"salience": (float, 10), "drop": (float, 10)},
    "sanity": {"similarity": (float,)},
    "srg": {"log_probability": ("log", 2, 21)},
    "road": {"log_probability": ("log", 2, 9), "hit": (bool, 2, 9)},
    "sensitivity": {"sensitivity": (float,)},
    "infidelity": {"relevance": (float, 50), "drop": (float, 50)},
    "complexity": {"gini": (float,), "entropy": (float,)},
    "shapley": {"agreement": (float,)},
    "eraser": {"log_probability": ("log", 2, 11)},
    "leave_one_out": {"kendall": (float,)},
    "pointing": {"share": (float,), "auc": (float,), "hit": (float,), "marked": (bool,)},
    "effects": {
        **dict.fromkeys(("rank_correlation", "linear_correlation", "without_effect", "contrast"), (float,)),
        **dict.fromkeys(("caused", "opposed"), (bool,)),
        **dict.fromkeys(("drop", "relevance"), (float, 8)),
    },
    "deletion": dict.fromkeys(("rank_correlation", "linear_correlation"), (float,)),
    "reasons": {
        **{f"{name}{rest}": (float,) for name in ("share", "auc", "hit") for rest in ("", "_rest")},
        "marked": (bool,),
    },
    "people": {"rated": (bool,), "top_is_rated": (float,), "agreement": (float,)},
}
VALUES: dict[Any, tuple[list[Any], list[Any]]] = {  # those that are right, and those that are wrong
    bool: ([True], [0, 1.0, "x", None]),
    int: ([0, 2**31 - 1], [-1, 2**32, True, 1.5, "1", None]),
    float: ([-3.4e38, 0.5, 3], [float("nan"), float("inf"), 1e39, True, "1", None]),
    "log": ([-3.4e38, 0.0, 1e-4], [float("nan"), -float("inf"), 1.0, True, None]),
}


@pytest.mark.parametrize("task", mostly_slow(TASKS, TASKS.keys() - {"road"}))  # as long as all others
def test_records_have_the_types_and_shapes_of_what_is_computed(task):
    """They follow from the task's function without a model, and nothing else is read from a file."""
    expected = {**RECORDS[task], "finite": (bool,)}
    found = TASKS[task].records(task, {})
    assert found.keys() == expected.keys()
    for name, (kind, *shape) in expected.items():
        array = lambda value, shape=shape: np.full([1, *shape], value, object).tolist()  # noqa: E731
        right, wrong = VALUES[kind]
        for value in right:
            checked("x", found[name], array(value))
        shapes = [[1, *shape, 1], [1, *shape[:-1], shape[-1] + 1] if shape else [1, 1]]
        for value in (*map(array, wrong), *(np.full(each, right[0], object).tolist() for each in shapes)):
            with pytest.raises(InputError):
                checked("x", found[name], value)
    scored = TASKS[task].records(task, {}, scored=True)
    if "log_probability" in expected:
        checked("x", scored["score"], np.full([1, *expected["log_probability"][1:]], 7.5).tolist())
    assert {name.replace("score", "log_probability") for name in scored} == expected.keys()


@pytest.mark.parametrize(
    ("task", "options", "name", "shape"),
    [
        ("insertion", {"steps": 1000, "fill": "blur"}, "log_probability", [2, 1001]),
        ("srg", {"steps": 3}, "log_probability", [2, 4]),
        ("saco", {"groups": 1000}, "drop", [1000]),
        ("infidelity", {"samples": 7, "fill": "black"}, "relevance", [7]),
    ],
)
def test_options_decide_the_shapes_of_records(task, options, name, shape):
    checked("x", TASKS[task].records(task, options)[name], np.zeros([1, *shape]).tolist())


def test_a_metric_of_the_user_is_evaluated_compared_reported_and_ranked(vit, folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors", vit.module, vit.params, vit.preprocessing)
    task, recipe, ranked, out = (tmp_path / name for name in ("task.py", "recipe.py", "ranked.py", "out"))
    task.write_text(
        "from tokentm_jax.metrics import TASKS, Column, Task\n"
        "def compute(predict, subject, maps, *, parts: int = 3):\n"
        "    return {'middle': maps.mean((1, 2)), 'parts': maps[:, 0, :parts]}\n"
        "TASKS['middle'] = Task(compute,\n"
        "    {'middle': Column(lambda table: table['predicted_middle'], better='lower', digits=3)})\n"
    )
    start = "from tokentm_jax import EvaluateConfig, LeaderboardConfig\nfrom tokentm_jax.configs import rows\n"
    run = (
        f"EvaluateConfig('own', 'middle', {str(folder)!r}, rows('rollout', 'gae'), checkpoint={str(checkpoint)!r},\n"
        "    options={'parts': 2}, batch_size=4)"
    )
    recipe.write_text(f"{start}config = {run}\n")
    ranked.write_text(f"{start}config = LeaderboardConfig('ranked', [{run}], ('own', 'middle'))\n")

    def command(*arguments, code=0):
        with patch.dict(TASKS):  # as in another process
            result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    own = ["--task", task]
    assert "| method | middle ↓ |" in command("evaluate", recipe, "--out", out, *own).output
    (line, *_) = (out / "records").glob("rollout-*")
    assert {len(parts) for parts in json.loads(line.read_text().splitlines()[0])["fields"]["parts"]} == {2}
    entries = json.loads(command("compare", out, "--json", *own).stdout)
    assert [entries[0][name] for name in ("method", "metric", "better")] == ["rollout", "middle", "lower"]
    page, table = tmp_path / "page.html", tmp_path / "ranked"
    command("report", out, "--out", page, "--best", 0, *own)
    assert "middle" in page.read_text()
    assert "| method | middle ↓ |" in command("leaderboard", ranked, "--out", table, *own).output
    command("compare", table / "own", *own)
    # Nothing but the option runs a file: without it the task is unknown.
    for arguments in (
        ["evaluate", recipe, "--out", out],
        ["compare", out],
        ["report", out, "--out", page],
        ["leaderboard", ranked],
    ):
        assert "unknown task 'middle'" in (error := command(*arguments, code=2).stderr) and "--task FILE.py" in error
    empty = tmp_path / "empty.py"
    empty.write_text("")
    for wrong, message in ((empty, "adds no task"), (recipe.with_name("none.py"), "none.py"), (line, "cannot be run")):
        assert message in command("compare", out, "--task", wrong, code=2).stderr


def test_a_task_that_is_defined_anew_is_computed_anew(vit, folder, tmp_path):
    """As in a notebook, where a metric of the same name is edited."""
    source = open_source(folder, limit=4, seed=0)
    own = EvaluateConfig("own", "own", str(folder), rows("rollout"), batch_size=4)
    for value in (1.0, 2.0):
        column = metrics.Column(lambda table: table["predicted_own"])
        compute = lambda predict, subject, maps, value=value: {"own": jnp.full(len(maps), value)}  # noqa: E731
        with patch.dict(TASKS, own=metrics.Task(compute, {"own": column})):
            results = evaluate(own, vit, source, tmp_path / str(value))
        assert {row["value"] for row in results["rows"] if row["metric"] == "own"} == {value}
    for wrong in ({"own": jnp.ones(())}, jnp.ones(4)):  # one without the batch, and none by name
        expected = r"the task 'own' must return a dict of arrays \[B, ...\], got .*ShapeDtypeStruct"
        with (
            patch.dict(TASKS, own=metrics.Task(lambda *_, wrong=wrong: wrong, {})),
            pytest.raises(InputError, match=expected),
        ):
            evaluate(own, vit, source, tmp_path / "wrong")
