"""Which class of the model a data set's class is: never by its place among the others."""

import dataclasses
import json
import shutil
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import tiny_vit
from PIL import Image

from tokentm_jax.cli.main import main
from tokentm_jax.configs import EvaluateConfig, rows
from tokentm_jax.data import labels
from tokentm_jax.data.examples import Source
from tokentm_jax.data.labels import read_label_map
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.classes import known_classes, translation
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.evaluate import evaluate
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.store import open_maps

NAMES = ("airplane", "crane", "polar bear", "crane", "truck")
WNIDS = ("n02691156", "n02012849", "n02134084", "n03126707", "n04490091")


@pytest.fixture(scope="module")
def vit():
    return dataclasses.replace(tiny_vit(1), class_names=NAMES, wnids=WNIDS)


def source(*names, **changes):
    return dataclasses.replace(Source("the set", lambda: "", ("a",), lambda _: None, names), **changes)


@pytest.mark.parametrize(
    ("names", "label_map", "expected"),
    [
        (("truck", "airplane"), None, [4, 0]),
        (("Polar_Bear", "TRUCK"), None, [2, 4]),  # one name that differs in case and underscores alone
        (("n03126707", "n02012849", "truck"), None, [3, 1, 4]),
        (("lorry", "airplane"), {"lorry": "truck"}, [4, 0]),
        (("a", "b", "c"), {"a": 3, "b": "n02012849", "c": "4"}, [3, 1, 4]),
        (("a", "truck"), {"a": "truck"}, [4, 4]),  # a map may put two classes together
        (NAMES, None, None),
    ],
)
def test_classes_go_by_name_and_wnid_and_map(vit, names, label_map, expected):
    found = translation(vit, source(*names), label_map)
    assert found is None if expected is None else found.tolist() == expected


@pytest.mark.parametrize(
    ("names", "label_map", "message"),
    [
        # As many classes as the model has, which were once taken in their order.
        (("airplane", "bat", "camel", "deer", "trucks"), None, r"4 of its 5 classes: .*'trucks' \(nearest: 'truck'\)"),
        (("crane", "truck"), None, "the classes 1, 3 of the name 'crane'"),
        (("Crane",), None, "the classes 1, 3 of the name 'Crane'"),
        (("Truck", "truck"), None, "'Truck' and 'truck' are both class 4"),
        (tuple(f"x{i}" for i in range(4000)), None, "'x4' .*, and 3995 more; give a label map"),
        (("0", "1"), None, "does not know 2 of its 2 classes"),  # the model has names: these are others
        (("a", "truck"), {"b": "truck"}, "the label map has 'b', which is not a class of the set"),
        (("a", "truck"), {"a": "trick"}, "the label map gives 'a' .* did you mean 'truck'"),
        (("a", "truck"), {"a": 5}, "the label map gives 'a' .* out of range"),
        (("a", "truck"), {"a": True}, "label_map"),
    ],
)
def test_what_is_not_said_is_refused(vit, names, label_map, message):
    with pytest.raises(InputError, match=message):
        translation(vit, source(*names), label_map)


def test_models_without_names(vit):
    """Numbers are numbers, in any order and with zeros before them; names are no numbers."""
    nameless = dataclasses.replace(vit, class_names=None, wnids=None)
    assert translation(nameless, source("004", "1", "2")).tolist() == [4, 1, 2]
    assert translation(nameless, source("cat", "1"), {"cat": 3}).tolist() == [3, 1]
    assert translation(nameless, source("0", "1", named=False)) is None
    assert translation(nameless, source("0", class_names=None)) is None
    for names, message in (
        (tuple("abcde"), "5 classes, tiny has 5, whose names are unknown; give a label map"),
        (("1", "٢"), "names are unknown"),
        (("1_0", "2"), "names are unknown"),
        (("1", "5"), "'5' is out of range"),
        (("1", "01"), "two classes of the same number"),
    ):
        with pytest.raises(InputError, match=message):
            translation(nameless, source(*names))
    with pytest.raises(InputError, match="by number"):
        translation(nameless, source("0", class_names=None), {"0": 1})


def test_files_of_label_maps(tmp_path):
    for name, content in (
        ("map.json", '{"a": 3, "b": "truck"}'),
        ("map.csv", '\ufeffa,3\n\n"b", truck\n'),
    ):
        (tmp_path / name).write_text(content)
        found = read_label_map(str(tmp_path / name))
        assert {name: labels.number(str(value)) or value for name, value in found.items()} == {"a": 3, "b": "truck"}
    assert read_label_map(None) is None
    for name, content, message in (
        ("map.json", "[1]", "label map .*map.json must be"),
        ("map.json", '{"a": 1.5}', "label map .*map.json"),
        ("map.json", "{", "is not valid JSON"),
        ("map.csv", "a,1\na,2\n", "line 2 gives another class for 'a'"),
        ("map.csv", "a\n", "line 1 must have two columns"),
        ("map.csv", 'a,"1\n', "is not a CSV file"),
        ("map.csv", "a," + "1" * 200_000, "is not a CSV file: line 1: field larger than"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            read_label_map(tmp_path / name)
    with pytest.raises(InputError, match=r"the label map .* does not exist"):
        read_label_map("none.csv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of which two are called otherwise than by the model."""
    path = tmp_path_factory.mktemp("classes")
    for k, name in enumerate(("Polar bear", "lorry")):
        (path / name).mkdir()
        for i in range(2):
            noise = np.random.default_rng(10 * k + i).integers(0, 256, (16, 24, 3), np.uint8)
            Image.fromarray(noise).save(path / name / f"{i}.png")
    return path


@pytest.mark.slow
def test_evaluations_and_stores_use_and_record_the_map(vit, folder, tmp_path):
    data, labelled = open_source(folder), [2, 2, 4, 4]
    config = EvaluateConfig("x", "saco", "", rows("random"), options={"groups": 2}, batch_size=4)
    stored = Explainer(vit, methods=("rollout",), target="label", batch_size=4)
    with pytest.raises(InputError, match="does not know 1 of its 2 classes: 'lorry'"):
        evaluate(config, vit, data, tmp_path / "out")
    with pytest.raises(InputError, match="does not know 1 of its 2 classes: 'lorry'"):
        explain_dataset(stored, data, "memory://labels-refused")
    assert not (tmp_path / "out").exists()
    (tmp_path / "map.csv").write_text("lorry,truck\n")
    for label_map in ({"lorry": "truck"}, str(tmp_path / "map.csv")):
        results = evaluate(dataclasses.replace(config, label_map=label_map), vit, data, tmp_path / "out")
        assert results["run"]["config"]["label_map"] == {"lorry": "truck"}  # what it says, not where it was
        (line,) = (tmp_path / "out/records/clean.jsonl").read_text().splitlines()
        assert json.loads(line)["fields"]["label"] == labelled
        explain_dataset(dataclasses.replace(stored, label_map=label_map), data, "memory://labels-mapped")
        maps = open_maps("memory://labels-mapped")
        assert maps.provenance["label_map"] == {"lorry": "truck"} and maps.label[:].tolist() == labelled
    wrong = dataclasses.replace(stored, label_map={"lorry": "lorry"}, target="predicted")
    with pytest.raises(InputError, match="the label map gives 'lorry' a class that the model lacks"):
        explain_dataset(wrong, data, "memory://labels-wrong")


def test_a_store_keeps_the_labels_that_the_model_knows(vit, folder):
    explainer = Explainer(vit, methods=("rollout",), batch_size=4)
    with pytest.warns(UserWarning, match="stored as -1 .* does not know 1 of its 2 classes: 'lorry'"):
        explain_dataset(explainer, open_source(folder), "memory://labels-known")
    assert open_maps("memory://labels-known").label[:].tolist() == [2, 2, -1, -1]


@pytest.mark.parametrize(
    ("names", "expected", "unknown"),
    [
        (("airplane", "lorry", "truck"), [0, -1, 4], "1 of its 3 classes: 'lorry'"),
        (("crane", "Truck", "truck"), [-1, 4, 4], "1 of its 3 classes: 'crane'"),  # of two classes of the model
        (NAMES, None, None),
        (("n02012849",), [1], None),
    ],
)
def test_classes_that_are_known(vit, names, expected, unknown):
    table, said = known_classes(vit, source(*names))
    assert (table if table is None else table.tolist()) == expected
    assert unknown in said if unknown else said == ""
    nameless = dataclasses.replace(vit, class_names=None, wnids=None)
    table, said = known_classes(nameless, source("cat", "004", "5"))
    assert table is not None and table.tolist() == [-1, 4, -1] and "'cat', '5'" in said


def test_photos_in_no_folder_of_a_class(vit, folder, tmp_path):
    """They have no labels, which a store and many tasks do not need."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, photo in enumerate(sorted(folder.rglob("*.png"))):
        shutil.copy(photo, flat / f"{number}.png")
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        for photo in sorted(flat.iterdir()):
            archive.write(photo, photo.name)
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", vit.module, vit.params, vit.preprocessing, NAMES)
    maps = []
    for data in (flat, tmp_path / "flat.zip"):
        out = tmp_path / f"maps of {data.name}"
        command = ["dataset", data, "--checkpoint", checkpoint, "--out", out, "--methods", "rollout"]
        result = CliRunner().invoke(main, [*map(str, command), "--batch-size", "4", "--chunk-size", "4"])
        assert result.exit_code == 0, result.output
        maps.append(open_maps(str(out)))
        assert maps[-1].keys == tuple(f"{i}.png" for i in range(4)) and (maps[-1].label[:] == -1).all()
    np.testing.assert_array_equal(maps[0].read("rollout"), maps[1].read("rollout"))
    refused = CliRunner().invoke(main, [*map(str, command[:-3]), str(tmp_path / "no"), "--target", "label"])
    assert refused.exit_code == 2 and "has no labels to explain" in refused.stderr
    recipe = tmp_path / "recipe.py"
    for task, options, code in (("saco", {"groups": 2}, 0), ("perturbation", {}, 2)):
        recipe.write_text(
            "from tokentm_jax import EvaluateConfig\n"
            "from tokentm_jax.configs import rows\n"
            f"config = EvaluateConfig('x', {task!r}, {str(flat)!r}, rows('random'), checkpoint={str(checkpoint)!r},\n"
            f"    options={options}, batch_size=4)\n"
        )
        result = CliRunner().invoke(main, ["evaluate", str(recipe), "--out", str(tmp_path / task)])
        assert result.exit_code == code, result.output
        assert code == 0 or "the task 'perturbation' needs; tasks without: insertion, " in result.stderr
    rows_ = json.loads((tmp_path / "saco/results.json").read_text())["rows"]
    assert [row["images"] for row in rows_] == [4] and "accuracy" not in {row["metric"] for row in rows_}


def test_the_option_of_the_commands(vit, folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", vit.module, vit.params, vit.preprocessing, NAMES)
    (tmp_path / "map.json").write_text('{"lorry": 4}')
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from tokentm_jax import EvaluateConfig\n"
        "from tokentm_jax.configs import rows\n"
        f"config = EvaluateConfig('x', 'saco', {str(folder)!r}, rows('random'), checkpoint={str(checkpoint)!r},\n"
        "    options={'groups': 2}, batch_size=4)\n"
    )
    commands = (
        ["evaluate", recipe, "--out", tmp_path / "out"],
        ["dataset", folder, "--checkpoint", checkpoint, "--out", tmp_path / "maps", "--target", "label"],
    )
    for command in commands:
        result = CliRunner().invoke(main, [str(a) for a in command])
        assert result.exit_code == 2 and "'lorry'" in result.stderr and "--label-map" in result.stderr
        result = CliRunner().invoke(main, [str(a) for a in (*command, "--label-map", tmp_path / "map.json")])
        assert result.exit_code == 0, result.output
    assert sorted(open_maps(str(tmp_path / "maps")).label[:].tolist()) == [2, 2, 4, 4]


def test_the_sample_of_imagenet(deit, shared):
    """The real names: two cranes, two maillots, a cardigan that is a dog, and a folder for every wnid."""
    assert deit.wnids[134] == "n02012849" and deit.class_index("n02012849") == 134
    described = json.loads((shared / "data/imagenet_classes.json").read_text())
    assert translation(deit, source(*sorted(described["wnid"]))).tolist() == list(range(1000))
    assert translation(deit, source("Cardigan", "cardigan")).tolist() == [264, 474]
    for name, several in (("crane", "134, 517"), ("maillot", "638, 639")):
        with pytest.raises(InputError, match=f"classes {several} of the name '{name}'"):
            translation(deit, source("tench", name))
