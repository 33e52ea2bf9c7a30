"""The command line, from its arguments to its files, its output and its exit code."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import mostly_slow
from everything import everything
from PIL import Image

from tokentm_jax.cli.main import main
from tokentm_jax.cli.names import output_names
from tokentm_jax.cli.options import parse_option
from tokentm_jax.inputs.images import IMAGENET, Preprocessing
from tokentm_jax.models.architectures import ARCHITECTURES, TIMM, build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.vit import init_params
from tokentm_jax.runs.store import open_maps

TINY = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=6)
NAMES = ("ant", "[bee]", "cat $x$", "dog", "eel", "fox")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    module = build(TINY)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    params = init_params(module, jax.random.key(0))
    return write_checkpoint(path, module, params, Preprocessing((16, 16), **IMAGENET), NAMES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory with three photos in `photos`, and no cache outside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.jpg", "c.png")):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    return tmp_path


def run(*arguments, code=0):
    if arguments[0] == "explain" and "--batch-size" not in arguments:
        arguments = (*arguments, "--batch-size", 1)  # few shapes to compile
    result = CliRunner().invoke(everything, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_explain_writes_what_the_library_computes(folder, checkpoint):
    import tokentm_jax as tm

    result = run("explain", "photos", "--checkpoint", checkpoint, "--batch-size", 2, "--option", "power=3", "--json")
    photos = json.loads(result.stdout)
    assert [p["path"] for p in photos] == ["photos/a.png", "photos/b.jpg", "photos/c.png"]
    assert files(folder / "explanations") == ["a.npz", "a.png", "b.npz", "b.png", "c.npz", "c.png"]
    vit = tm.load(checkpoint=checkpoint)
    images = vit.read([p["path"] for p in photos])
    probabilities = np.asarray(jax.nn.softmax(vit.logits(images)))
    maps = np.asarray(tm.explain(vit, images, "tokentm_mix", power=3.0))
    for i, photo in enumerate(photos):
        best = int(probabilities[i].argmax())
        assert [entry["class"] for entry in photo["top5"]] == np.argsort(-probabilities[i])[:5].tolist()
        assert photo["top5"][0] == photo["target"]
        assert photo["target"]["name"] == NAMES[best]
        assert photo["target"]["probability"] == pytest.approx(probabilities[i].max(), rel=1e-5)
        figure, arrays = photo["files"]
        with Image.open(figure) as picture:
            assert picture.format == "PNG"
        stored = np.load(arrays, allow_pickle=False)
        np.testing.assert_allclose(stored["map"], maps[i], rtol=1e-4, atol=1e-6)
        assert (int(stored["target"]), str(stored["target_name"])) == (best, NAMES[best])
        assert (str(stored["model"]), str(stored["method"])) == ("tiny", "tokentm_mix")
        assert json.loads(str(stored["options"])) == {"power": 3.0}
        assert set(json.loads(str(stored["versions"]))) == {"tokentm_jax", "jax", "flax"}


def test_the_first_map_compiles_one_program(folder, checkpoint, compilations):
    """Loading and reading compile nothing, and the pass of the first map gives the classes as well."""
    import tokentm_jax as tm

    vit = tm.load(checkpoint=checkpoint)
    tm.explain(vit, vit.read(["photos/a.png"]), "raw_attention")
    assert len(compilations) == 1
    run("explain", "photos/a.png", "photos/b.jpg", "--checkpoint", checkpoint, "--method", "raw_attention")
    assert len(compilations) == 2


@pytest.mark.slow
def test_methods_that_share_a_pass_are_one_program(folder, checkpoint, compilations, monkeypatch):
    import tokentm_jax as tm
    from tokentm_jax.cli import heatmaps

    methods = ["gae", "rollout", "tokentm", "legrad"]
    arguments = ("explain", "photos/a.png", "--checkpoint", checkpoint, "--method", ",".join(methods))
    run(*arguments, "--target", "1,2")
    assert len(compilations) == 2  # the second for rollout; all classes have one
    vit = tm.load(checkpoint=checkpoint)
    images, classes = vit.read(["photos/a.png"]), {1: "bee", 2: "cat-x"}
    maps = {(method, target): tm.explain(vit, images, method, target)[0] for method in methods for target in classes}
    for (method, target), expected in maps.items():
        found = np.load(f"explanations/a.{method}.{classes[target]}.npz")["map"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    def refused(details, vit, images, methods, *more):
        if "gae" in methods:
            raise tm.InputError("no map")
        return explain_with(details, vit, images, methods, *more)

    explain_with = heatmaps.explain_with
    monkeypatch.setattr(heatmaps, "explain_with", refused)
    assert "no map" in run(*arguments, code=2).stderr
    columns = heatmaps.columns_of(methods, heatmaps.classes_asked(vit, [1]))
    _, found = heatmaps.Job(vit, columns, skip_unfit=True).maps(images)
    assert [column.method for column, _ in found] == ["rollout", "tokentm", "legrad"]
    for column, array in found:
        np.testing.assert_allclose(array[0], maps[column.method, 1], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_why_one_class_and_not_another(folder, checkpoint):
    import tokentm_jax as tm

    vit = tm.load(checkpoint=checkpoint)
    images = vit.read(["photos/a.png"])
    best, other = np.argsort(-np.asarray(vit.logits(images)))[0, :2].tolist()
    arguments = ("explain", "photos/a.png", "--checkpoint", checkpoint)
    result = json.loads(run(*arguments, "--versus", other, "--json").stdout)[0]
    assert (result["target"]["class"], result["versus"]["class"]) == (best, other)
    stored = np.load("explanations/a.npz")
    assert str(stored["versus"]) == NAMES[other]
    expected = tm.explain(vit, images, "tokentm_mix", score=tm.scores.Versus(other))
    np.testing.assert_allclose(stored["map"], expected[0], rtol=1e-4, atol=1e-6)
    assert "<- compared with" in run(*arguments, "--versus", other).stdout
    assert "is the predicted class itself" in run(*arguments, "--versus", best, code=2).stderr
    same = run(*arguments, "--versus", other, "--target", other, code=2).stderr
    assert "--target and --versus are the same class" in same
    assert "tiny has no text tower" in run(*arguments, "--text", "a cat", code=2).stderr


@pytest.mark.slow
def test_prompts_on_one_photo(folder):
    pytest.importorskip("tokenizers")
    import tokentm_jax as tm

    clip = Path(__file__).parent / "goldens/layouts/clip"
    arguments = ("explain", "photos/a.png", "--model", clip, "--method", "gae")
    result = json.loads(run(*arguments, "--text", "a red car", "--text", "two", "--json").stdout)[0]
    assert files(folder / "explanations") == ["a.png", "a.text-1.npz", "a.text-2.npz"]
    vit = tm.load(str(clip))
    images = vit.read(["photos/a.png"])
    maps, details = tm.explain(vit, images, "gae", text="two", details=True)
    stored = np.load("explanations/a.text-2.npz")
    np.testing.assert_allclose(stored["map"], maps[0], rtol=1e-4, atol=1e-7)
    assert (str(stored["prompt"]), [entry["text"] for entry in result["prompts"]]) == ("two", ["a red car", "two"])
    assert result["prompts"][1]["cosine"] == pytest.approx(float(details["score"][0]), abs=1e-5)
    assert "Cosine" in run(*arguments, "--text", "two", "--out", "one").stdout
    assert files(folder / "one") == ["a.npz", "a.png"]
    assert "leave out --target" in run(*arguments, "--text", "two", "--target", "1", code=2).stderr
    assert "gives features and no classes" in run(*arguments, code=2).stderr


def test_explain_a_chosen_class(folder, checkpoint):
    result = run("explain", "photos/a.png", "--checkpoint", checkpoint, "--target", "[bee]", "--out", "x/y")
    assert "[bee]" in result.stdout and "<- explained" in result.stdout and "%" in result.stdout
    assert int(np.load("x/y/a.npz")["target"]) == 1
    whole = str(folder / "photos/a.png")
    assert run("explain", whole, "--checkpoint", checkpoint, "--target", "2").stdout.startswith(f"{whole}\n")
    assert str(np.load("explanations/a.npz")["target_name"]) == "cat $x$"


@pytest.mark.slow
def test_several_classes_give_one_figure(folder, checkpoint):
    """Each class has its map, whose file carries the class; a name with commas is one class."""
    import tokentm_jax as tm

    names = ["great white shark, white shark", "cat", "crane, bird", "crane, machine", "dog", "each/every"]
    (folder / "names.json").write_text(json.dumps(names))
    arguments = ("explain", "photos/a.png", "photos/b.jpg", "--checkpoint", checkpoint, "--classes", "names.json")
    arguments = (*arguments, "--batch-size", 2, "--json")
    targets = ("--target", names[0], "--target", "dog, CAT", "--target", "2", "--target", "dog")
    photos = json.loads(run(*arguments, *targets, "--format", "svg", "--title", "Why $5?").stdout)
    parts = ["great-white-shark", "dog", "cat", "crane-2"]
    maps = sorted(f"{photo}.{part}.npz" for photo in "ab" for part in parts)
    assert files(folder / "explanations") == [*maps, "sheet.svg"]
    vit = tm.load(checkpoint=checkpoint)
    images = vit.read(["photos/a.png", "photos/b.jpg"])
    shares = np.asarray(jax.nn.softmax(vit.logits(images)))
    for i, photo in enumerate(photos):
        assert [entry["class"] for entry in photo["targets"]] == [0, 4, 1, 2]
        assert photo["target"] == photo["targets"][0]
        for part, target in zip(parts, (0, 4, 1, 2), strict=True):
            stored = np.load(f"explanations/{'ab'[i]}.{part}.npz")
            expected = tm.explain(vit, images, "tokentm_mix", target=target)[i]
            np.testing.assert_allclose(stored["map"], expected, rtol=1e-4, atol=1e-6)
            assert (int(stored["target"]), str(stored["target_name"])) == (target, names[target])
            assert float(stored["probability"]) == pytest.approx(shares[i, target], rel=1e-4)
    written = {*re.findall(r"<text[^>]*>([^<]*)</text>", (folder / "explanations/sheet.svg").read_text())}
    assert {"Why $5?", "a.png", "b.jpg", "dog", "cat", "crane, bird"} <= written
    assert {f"{share:.1%}" for share in shares[:, [0, 4, 1, 2]].ravel()} <= written
    table = run(*arguments[:-1], "--target", "cat,dog", "--method", "tokentm,rollout", "--out", "both").stdout
    assert table.count("<- explained") == 4
    both = [
        f"{photo}.{method}.{part}.npz"
        for photo in "ab"
        for method in ("tokentm", "rollout")
        for part in ("cat", "dog")
    ]
    assert files(folder / "both") == sorted([*both, "sheet.png"])


@pytest.mark.slow
def test_each_class(folder, checkpoint, monkeypatch):
    arguments = ("explain", "photos/a.png", "--checkpoint", checkpoint, "--target", "each", "--json")
    (photo,) = json.loads(run(*arguments).stdout)
    assert [entry["class"] for entry in photo["targets"]] == list(range(6))
    named = ["a.png", "a.ant.npz", "a.bee.npz", "a.cat-x.npz", "a.dog.npz", "a.eel.npz", "a.fox.npz"]
    assert files(folder / "explanations") == sorted(named)
    (photo,) = json.loads(run(*arguments, "--versus", 1, "--out", "versus").stdout)
    assert [entry["class"] for entry in photo["targets"]] == [0, 2, 3, 4, 5]  # a class is not compared with itself
    monkeypatch.setattr("tokentm_jax.cli.heatmaps.FEW", 5)  # as of a model of many classes
    (photo,) = json.loads(run(*arguments, "--out", "top").stdout)
    assert photo["targets"] == photo["top5"]
    assert files(folder / "top") == ["a.png", *[f"a.top-{k}.npz" for k in range(1, 6)]]
    assert int(np.load("top/a.top-2.npz")["target"]) == photo["top5"][1]["class"]
    assert "name the classes of --target" in run(*arguments, "--versus", "fox", code=2).stderr


@pytest.mark.slow
def test_formats_and_looks(folder, checkpoint):
    """One figure for each photo, in the format and the colours that are asked for."""
    from tokentm_jax.inputs.pictures import COLOURS

    arguments = ("explain", "photos/a.png", "--checkpoint", checkpoint, "--target", "2")
    pictures = {}
    for name, more in (
        ("smooth", ()),
        ("squares", ("--squares",)),
        ("grey", ("--colours", "grey")),
        ("no", ("--title", "")),
    ):
        run(*arguments, *more, "--out", name)
        pictures[name] = (folder / name / "a.png").read_bytes()
    assert len(set(pictures.values())) == 4
    run(*arguments, "--format", "pdf", "--out", "pdf")
    assert files(folder / "pdf") == ["a.npz", "a.pdf"] and (folder / "pdf/a.pdf").read_bytes().startswith(b"%PDF")
    run(*arguments, "--format", "svg", "--out", "svg")
    text = (folder / "svg/a.svg").read_text()
    assert ">cat $x$ " in text and "a.png · tiny · tokentm_mix<" in text
    listed = run("explain", "--help").stdout
    assert all(name in listed for name in COLOURS)


def test_several_methods_give_one_sheet(folder, checkpoint):
    methods = ("--method", "tokentm, rollout", "--batch-size", 2)
    run("explain", "photos/a.png", "photos/b.jpg", "--checkpoint", checkpoint, *methods)
    expected = ["a.rollout.npz", "a.tokentm.npz", "b.rollout.npz", "b.tokentm.npz", "sheet.png"]
    assert files(folder / "explanations") == expected
    run("explain", "photos/a.png", "--checkpoint", checkpoint, "--method", "tokentm,rollout", "--out", "one")
    assert files(folder / "one") == ["a.png", "a.rollout.npz", "a.tokentm.npz"]


def test_bad_photos_do_not_stop_the_others(folder, checkpoint):
    (folder / "photos/b.jpg").write_bytes(b"")
    arguments = ("explain", "photos/*.*", "missing.png", "*.nothing", "--checkpoint", checkpoint)
    result = run(*arguments, code=2)
    assert "3 of 5 photos failed" in result.stderr
    for sentence in ("photos/b.jpg is empty", "missing.png does not exist", "no photos were found in *.nothing"):
        assert sentence in result.stderr
    assert files(folder / "explanations") == ["a.npz", "a.png", "c.npz", "c.png"]
    photos = {p["path"]: p for p in json.loads(run(*arguments, "--json", code=2).stdout)}
    assert "is empty" in photos["photos/b.jpg"]["error"]
    assert photos["photos/a.png"]["files"]
    assert run("explain", "missing.png", "--checkpoint", checkpoint, "--json", code=2).stdout.startswith("[")


def test_photos_of_one_name(folder, checkpoint):
    (folder / "other").mkdir()
    for name in ("other/a.png", "other/a-2.png", "other/A.jpg"):
        (folder / name).write_bytes((folder / "photos/a.png").read_bytes())
    run("explain", "photos/a.png", "other", "--checkpoint", checkpoint)
    assert len({name.lower() for name in files(folder / "explanations")}) == 8


def test_photos_are_never_replaced(folder, checkpoint):
    before = (folder / "photos/a.png").read_bytes()
    run("explain", "photos/a.png", "--checkpoint", checkpoint, "--out", "photos")
    assert (folder / "photos/a.png").read_bytes() == before
    assert {"a-2.png", "a-2.npz"} <= set(files(folder / "photos"))
    before = (folder / "photos/a.png").read_bytes()
    methods = ("--method", "tokentm,rollout")
    run("explain", "photos/a.png", "--checkpoint", checkpoint, "--out", "photos", *methods)
    assert (folder / "photos/a.png").read_bytes() == before


def test_files_of_others_are_never_replaced(folder, checkpoint):
    """Neither pictures nor arrays nor links; what this program wrote is replaced."""
    out = folder / "out"
    out.mkdir()
    np.savez(out / "a.npz", map=np.zeros(3))
    (out / "b.png").symlink_to(folder / "photos/a.png")
    (out / "sheet.png").write_bytes((folder / "photos/c.png").read_bytes())
    before = {path: path.read_bytes() for path in out.iterdir()}
    arguments = ("explain", "photos/a.png", "photos/b.jpg", "--checkpoint", checkpoint, "--out", "out")
    for _ in range(2):
        run(*arguments)
        run(*arguments, "--method", "tokentm,rollout", "--batch-size", 2)
    written = {"a-2.npz", "a-2.png", "b-2.npz", "b-2.png", "sheet-2.png"}  # nothing is in the way of a.tokentm.npz
    written |= {f"{name}.{method}.npz" for name in ("a", "b") for method in ("tokentm", "rollout")}
    assert set(files(out)) == {path.name for path in before} | written
    assert before == {path: path.read_bytes() for path in before} and (out / "b.png").is_symlink()


@pytest.mark.parametrize(
    "other",
    mostly_slow(
        [
            "--target 2",
            "--versus 2",
            "--method rollout",
            "--option power=3",
            "--method rollout,tokentm",
            "--photo other/a.png",
        ],
        {"--target 2"},
    ),
)
def test_another_question_has_other_files(other, folder, checkpoint):
    """The answers to both stay, and each command replaces its own."""
    photo, out, other = "photos/a.png", folder / "out", other.split()
    given = ("--checkpoint", checkpoint, "--out", "out")
    first = (*given, "--target", "1")
    run("explain", photo, *first)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert files(out) == ["a.npz", "a.png"]
    if other[0] == "--photo":
        (folder / "other").mkdir()
        (folder / other[1]).write_bytes((folder / "photos/b.jpg").read_bytes())
        photo, other = other[1], ()
    for _ in range(2):
        run("explain", photo, *(given if "--target" in other else first), *other)
    new = {"a-2.png", *({"a-2.rollout.npz", "a-2.tokentm.npz"} if "rollout,tokentm" in other else {"a-2.npz"})}
    assert set(files(out)) == {"a.npz", "a.png"} | new
    assert {path: path.read_bytes() for path in before} == before
    run("explain", folder / "photos/a.png", *first)  # the same photo by another path
    assert set(files(out)) == {"a.npz", "a.png"} | new


def test_names_for_photos_of_any_name(tmp_path):
    """A link to itself, a NUL, and more bytes than a name may have."""
    (tmp_path / "loop.png").symlink_to("loop.png")
    paths = [tmp_path / name for name in ("loop.png", "a\0b.png", "x" * 300 + ".png", "ok.png")]
    assert list(output_names(paths, tmp_path).values()) == ["loop-2", "a\0b", "x" * 150, "ok"]


def test_names_cannot_steer_the_terminal(folder, checkpoint):
    """Escapes in the names of photos and classes are shown as question marks."""
    (folder / "photos/a.png").rename(folder / "photos/\x1b]0;own\x07.png")
    (folder / "names.json").write_text(json.dumps([f"\x1b[31m{c}\u202e" for c in "uvwxyz"]))
    arguments = ("--checkpoint", checkpoint, "--classes", "names.json")
    (folder / "photos/\x1b[2J.png").write_bytes(b"bad")
    result = run("explain", "photos", *arguments, code=2)
    assert "?]0;own?.png" in result.stdout and "?[31m" in result.stdout and "?[2J.png" in result.stderr
    assert not {"\x1b", "\x07", "\u202e"} & {*result.output}


def test_long_names(tmp_path):
    names = output_names([tmp_path / ("é" * 120 + ".png"), tmp_path / ("é" * 119 + "x.png")], tmp_path)
    assert len(set(names.values())) == 2
    assert all(len(name.encode()) < 200 for name in names.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "tokentn"], "did you mean 'tokentm'"),
        (["--method", "tokentm,,"], "unknown method ''"),
        (["--method", "tokentm", "--option", "fnn=true"], "did you mean 'ffn'"),
        (["--option", "ffn"], "KEY=VALUE"),
        (["--method", "tokentm", "--option", "ffn=3"], "must be a valid bool"),
        (["--target", "6"], "classes 0 to 5"),
        (["--target", "fos"], "did you mean 'fox'"),
        (["--model", "deit_tini_patch16_224"], "did you mean 'deit_tiny_patch16_224'"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["--out", "photos/a.png"], "cannot be written"),
        (["--out", "/proc/nothing"], "cannot be written"),
        (["--classes", "missing.txt"], "missing.txt"),
        (["--target", "dog,fos"], "did you mean 'fox'"),
        (["--target", "dog,"], "unknown class ''"),
        (["--colours", "infreno"], "did you mean 'inferno'"),
        (["--format", "gif"], "'gif' is not one of 'png', 'pdf', 'svg'"),
        (["--batch-size", "0"], "batch-size"),
        (["--method", ""], "unknown method ''"),
        (["--option", "ffn=true", "--option", "ffn=false"], "'ffn' is given twice"),
        (["--method", "tokentm", "--option", "ffn=" + "x" * 10**5], "must be a valid bool"),
        (["--target", "9" * 5000], "classes 0 to 5"),
        (["--checkpoint", "/dev/zero"], "is not a regular file"),
        (["--model", ""], "must be a name that a file can have"),
        (["--checkpoint", ""], "must be a name that a file can have"),
        (["--classes", ""], "must be a name that a file can have"),
        (["--out", ""], "must be a name that a file can have"),
        (["--out", "photos/a.png/x"], "cannot be written"),
    ],
)
def test_wrong_arguments(folder, checkpoint, arguments, sentence):
    result = run("explain", "photos/a.png", "--checkpoint", checkpoint, *arguments, code=2)
    assert sentence in result.stderr
    assert result.stdout == ""
    assert not (folder / "explanations/a.png").exists()


WITH_MODEL = [name for name, command in main.commands.items() if any("--model" in p.opts for p in command.params)]


@pytest.mark.parametrize("command", WITH_MODEL)
def test_an_empty_name_of_a_model_is_refused(folder, command):
    arguments = ("photos/a.png", "out") if command in ("convert", "dataset") else () if command == "serve" else ("x",)
    assert "must be a name that a file can have" in run(command, *arguments, "--model", "", code=2).stderr
    assert not list(folder.glob("o*"))


@pytest.mark.parametrize(
    "arguments", [("explain", "a.png", "--batch-size", "9" * 5000), ("explain", "--" + "x" * 5000), ("x" * 5000,)]
)
def test_wrong_arguments_are_not_repeated_without_end(arguments):
    (error,) = [line for line in run(*arguments, code=2).stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) < 1000 and " ... " in error


def test_options_are_parsed():
    parsed = [parse_option(text) for text in ("a=true", "a=FALSE", "a=3", "a=-1.5e3", "a=none", "a=x=y", " a = b ")]
    assert [value for _, value in parsed] == [True, False, 3, -1500.0, None, "x=y", "b"]
    assert {key for key, _ in parsed} == {"a"}
    for text in ("1_0", "９", "9" * 5000, "0x10", "nan", "inf", "1e999", "1 0"):  # no plain numbers
        assert parse_option(f"a={text}") == ("a", text)


def test_models_and_methods(folder):
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert rows["deit_tiny_patch16_224"]["parameters"] == 5_717_416
    assert rows["vit_base_patch16_224"]["parameters"] == 86_567_656
    assert rows["deit_tiny_patch16_224"]["tags"] == ["fb_in1k"] and not rows["vit_large_patch14_224"]["tags"]
    table = run("models").stdout
    assert "needs a checkpoint" in table and "fb_in1k" in table and "shipped" in table
    methods = {row["name"]: row for row in json.loads(run("methods", "--json").stdout)}
    assert methods["tokentm"]["year"] == 2024 and methods["tokentm"]["class_specific"]
    assert "tokentm" in run("methods").stdout


@pytest.mark.parametrize("name", [*list(ARCHITECTURES)[::9], "deit_base_distilled_patch16_384"])
def test_parameter_count(name):
    module = build(name)
    images = jax.ShapeDtypeStruct((1, *module.img_size, 3), np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert TIMM[name]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_convert(folder, checkpoint):
    (folder / "names.txt").write_text("\n".join("uvwxyz"))
    run("convert", checkpoint, "out.safetensors", "--img-size", 24, "--classes", "names.txt")
    result = json.loads(run("explain", "photos/a.png", "--checkpoint", "out.safetensors", "--json").stdout)
    assert result[0]["target"]["name"] in "uvwxyz"
    assert np.load("explanations/a.npz")["map"].shape == (6, 6)
    for arguments in (("missing.pth", "x.safetensors"), (checkpoint, "x.bin"), ("names.txt", "x.safetensors")):
        assert run("convert", *arguments, code=2).stderr.startswith("Error: ")


def test_convert_keeps_the_files_of_others(folder, checkpoint):
    run("convert", checkpoint, "out.safetensors")
    (folder / "foreign.safetensors").write_bytes(
        (folder / "out.safetensors").read_bytes().replace(b"tokentm_jax", b"x" * 11)
    )
    (folder / "link.safetensors").symlink_to("out.safetensors")
    run("convert", checkpoint, "model")
    run("convert", checkpoint, "model")  # over its own
    (folder / "model/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("foreign.safetensors", "link.safetensors", "model", "photos"):
        assert "choose another name" in run("convert", checkpoint, name, code=2).stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (folder / "link.safetensors").is_symlink()


def test_class_names_that_are_given(folder, checkpoint):
    """For labels as for `explain`: the folders are called as the user's names say, not as the checkpoint's."""
    (folder / "photos/Two").mkdir()
    (folder / "photos/a.png").rename(folder / "photos/Two/a.png")
    (folder / "names.txt").write_text("one\ntwo\nu\nv\nw\nx")
    (folder / "recipe.py").write_text(
        "from tokentm_jax import EvaluateConfig\n"
        "from tokentm_jax.configs import rows\n"
        "config = EvaluateConfig('x', 'saco', 'photos', rows('random'), options={'groups': 2}, batch_size=1)"
    )
    dataset = ("dataset", "photos", "--checkpoint", checkpoint, "--methods", "rollout", "--target", "label")
    dataset = (*dataset, "--batch-size", 1, "--chunk-size", 1, "--out", "store")
    evaluate = ("evaluate", "recipe.py", "--checkpoint", checkpoint, "--out", "run")
    for command in (dataset, evaluate):
        assert "Two" in run(*command, code=2).stderr
        run(*command, "--classes", "names.txt")
    assert open_maps("store").label[:].tolist() == [1]
    record = json.loads((folder / "run/records/clean.jsonl").read_text())
    assert record["fields"]["label"] == [1]
    # What a name stands for is part of what a folder holds.
    (folder / "names.txt").write_text("two\none\nu\nv\nw\nx")
    for command in (dataset, evaluate):
        assert "was made with classes" in run(*command, "--classes", "names.txt", code=2).stderr


RECIPE = f"""
from models.training.recipe import TrainConfig
config = TrainConfig(name="tiny", train_data="data", test_data="data", model={TINY | {"num_classes": 2}!r}, epochs=2,
                     warmup_epochs=0.5, batch_size=4)
"""


@pytest.mark.slow
def test_train(folder):
    for label, colour in (("left", "red"), ("right", "blue")):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (16, 16), colour).save(folder / "data" / label / f"{i}.png")
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "data/left/bad.png").write_bytes(b"bad")
    # Optax's schedules need standard promotion.
    with jax.numpy_dtype_promotion("standard"), pytest.warns(UserWarning, match=r"bad\.png"):
        result = run("train", "recipe.py", "--epochs", 1, "--limit", 11)
    assert "test accuracy" in result.stdout and "epoch 1.0" in result.stdout
    run("explain", "data/left/0.png", "--checkpoint", "runs/tiny/tiny.safetensors")


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (None, "does not exist"),
        ("config = 1", "must define `config` as a TrainConfig"),
        ("x = = 1", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        (RECIPE, "the data set data does not exist"),
        (RECIPE.replace("'depth': 2", "'dephts': 2"), "did you mean 'depth'"),
    ],
)
def test_wrong_recipes(folder, recipe, sentence):
    if recipe is not None:
        (folder / "recipe.py").write_text(recipe)
    result = run("train", "recipe.py", code=2)
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_package_does_not_train(folder):
    for arguments in ([], ["--help"], ["recipe.py", "--out", "runs/x"]):
        result = CliRunner().invoke(main, ["train", *arguments])
        assert result.exit_code == 2 and not (folder / "runs").exists()
        assert len(result.stderr.splitlines()) == 1 and "from a clone of the repository: python -m" in result.stderr
    assert "train" not in CliRunner().invoke(main, ["--help"]).output.split("Commands:")[1]


def test_every_command_has_an_example():
    for name in (name for name, command in main.commands.items() if not command.hidden):
        text = run(name, "--help").stdout
        assert "Example" in text and f"tokentm {name}" in text


def test_an_interrupt_exits_with_130(folder, checkpoint, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokentm_jax.models.loading.load", interrupt)
    run("explain", "photos/a.png", "--checkpoint", checkpoint, code=130)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(5, "Input/output error", "a.npz"), "Error: a.npz: Input/output error"),
        (MemoryError(), "the memory is not enough"),
        (RuntimeError("RESOURCE_EXHAUSTED: 10 GB"), "the memory is not enough"),
        (RecursionError(), "nested too deeply"),
    ],
)
def test_errors_of_the_machine(folder, checkpoint, monkeypatch, error, sentence):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tokentm_jax.models.loading.load", fail)
    result = run("explain", "photos/a.png", "--checkpoint", checkpoint, code=2)
    assert sentence in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'x'"), AssertionError()])
def test_no_device(folder, checkpoint, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    result = run("explain", "photos/a.png", "--checkpoint", checkpoint, code=2)
    assert "JAX finds no device with JAX_PLATFORMS=" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["file", "folder of others", "no home"])
def test_no_place_for_compiled_programs(folder, checkpoint, monkeypatch, kind):
    """Without it everything works as well; `jax.config` is asked, as compiling takes long."""
    chosen = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: chosen.append((name, value)))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if kind == "no home":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        (folder / "cache").touch()
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR" if kind == "file" else "XDG_CACHE_HOME", str(folder / "cache"))
    run("explain", "photos/a.png", "--checkpoint", checkpoint)
    assert chosen == [("jax_compilation_cache_dir", None)]


def test_help_starts_fast():
    began = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "tokentm_jax", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "explain" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.endswith(("| jax", " matplotlib", " flax"))]
    assert time.monotonic() - began < 5  # under a second on an idle machine
    version = subprocess.run(
        [*command[:1], "-m", "tokentm_jax", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith("tokentm, version")


@pytest.mark.parametrize(
    ("batch_size", "given", "devices"),
    [(16, {}, 4), (50, {}, 2), (7, {}, 1), (None, {}, 1), (16, {"JAX_NUM_CPU_DEVICES": "3"}, 3)],
)
def test_a_cpu_takes_batches_in_shares(batch_size, given, devices):
    code = (
        "import os; os.sched_getaffinity = lambda _: set(range(6)); import jax;"
        f"from tokentm_jax.cli.options import start_jax; start_jax({batch_size}); print(jax.device_count())"
    )
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, **given}, capture_output=True, text=True)
    assert found.stdout.split() == [str(devices)], found.stderr
