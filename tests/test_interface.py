"""What the entry points refuse, and what they mark where nothing can be refused."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_vit
from flax.errors import ScopeParamShapeError

import tokentm_jax as tm
from tokentm_jax.methods.explain import explain_fn


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)


def changed(images, value):
    out = images.copy()
    out[1, 2, 3, 1] = value
    return out


def test_images_that_are_none_are_refused(vit, images):
    for wrong, message in (
        (images * 255, r"images must be in \[0, 1\], got values from .* to 25.*: divide pixels in 0 ... 255 by 255"),
        ((images - 0.45) / 0.22, r"got values from -2\.\d* to 2\.\d*: leave out the normalisation"),
        (changed(images, np.nan), "got NaN or infinite values"),
        (changed(images, -np.inf), "got NaN or infinite values"),
        (jnp.asarray(changed(images, np.nan)), "got NaN or infinite values"),
        (images.tolist(), r"images must be an array \[B, H, W, 3\], got a list; numpy.stack makes one"),
        (None, "got a NoneType"),
        (images[:0], "one image at least, got an empty batch"),
        (images[0], r"images must be \[B, 16, 24, 3\], got \[16, 24, 3\]"),
        ((images * 255).astype(np.uint8), "floating-point numbers in .*, got uint8"),
        (images.astype(object), "got object"),
    ):
        with pytest.raises(tm.InputError, match=message):
            vit.preprocessing.checked(wrong)
        with pytest.raises(tm.InputError, match=message):
            tm.explain(vit, wrong, "raw_attention")


def test_images_that_are_right_in_another_form(vit, images):
    expected = tm.explain(vit, images, "raw_attention")
    for same in (images.astype(np.float64), jnp.asarray(images), np.asfortranarray(images)):
        np.testing.assert_array_equal(tm.explain(vit, same, "raw_attention"), expected)
    assert vit.preprocessing.checked(images.astype(np.float64)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert vit.preprocessing.checked(images.astype(np.float64)).dtype == jnp.float64
    overshot = np.clip(images * 1.4 - 0.2, -0.2, 1.2)  # as bicubic resizing leaves it
    assert np.isfinite(tm.explain(vit, overshot, "raw_attention")).all()
    # Inside a compiled function the values are not known yet.
    inside = jax.jit(lambda x: tm.explain(vit, x, "raw_attention"))(images)
    np.testing.assert_allclose(inside, expected, rtol=1e-6)


def test_a_sample_without_a_map_leaves_the_others_their_derivatives(vit, images):
    """NaN in one sample's pixels reaches neither the other's gradient nor that of the parameters."""
    inputs = np.asarray(vit.preprocessing.normalise(images))
    explain = explain_fn(vit.module, "tokentm", details=True)

    @jax.jit
    def run(inputs, target):
        def total(params, inputs):
            maps, details = explain(params, inputs, target)
            return (maps[0] * jnp.arange(6.0).reshape(2, 3)).sum(), (maps, details)

        (_, found), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(vit.params, inputs)
        return found, gradients

    good = jnp.array([1, 2], jnp.int32)
    (maps, details), gradients = run(inputs, good)
    for broken, target in ((changed(inputs, np.nan), good), (inputs, jnp.array([1, 5])), (inputs, jnp.array([1, -2]))):
        (again, more), same = run(broken, target)
        np.testing.assert_array_equal(again[0], maps[0])
        assert np.isnan(again[1]).all()
        jax.tree.map(np.testing.assert_array_equal, (same[0], same[1][0]), (gradients[0], gradients[1][0]))
        if broken is inputs:  # the image is right: its logits are known
            np.testing.assert_array_equal(more["logits"], details["logits"])
        else:
            assert np.isnan(more["logits"][1]).all() and np.isfinite(more["logits"][0]).all()


def test_logits_that_are_not_finite_give_no_map(vit, images):
    params = {**vit.params, "head": {**vit.params["head"], "bias": jnp.array([0, 0, jnp.nan, 0, 0])}}
    assert np.isnan(jax.jit(explain_fn(vit.module, "rollout"))(params, images)).all()


def test_parameters_of_another_shape_are_refused(vit, images):
    for wrong in (jnp.zeros(4), jnp.zeros((5, 1))):
        params = {**vit.params, "head": {**vit.params["head"], "bias": wrong}}
        with pytest.raises(ScopeParamShapeError, match=r"(4,)|(5, 1)"):
            jax.eval_shape(vit.module.apply, {"params": params}, images)


def test_a_method_that_leaves_out_a_detail_is_told(vit, images, monkeypatch):
    def without_a_score(module, params, inputs, target):
        details = tm.capture(module, params, inputs, target, []).details()
        del details["score"]
        return jnp.zeros((len(inputs), *module.grid)), details

    row = dataclasses.replace(tm.METHODS["gae"], function=without_a_score)
    monkeypatch.setitem(tm.METHODS, "mine", row)
    with pytest.raises(tm.InputError, match="details must have 'logits', 'target' and 'score'"):
        tm.explain(vit, images, "mine")


def test_pixels_of_a_map_that_is_none():
    maps = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
    expected = np.asarray(tm.to_pixels(jnp.asarray(maps), (9, 8)))
    assert not expected.min() and expected.max() == pytest.approx(1)
    maps[1] = np.nan
    maps[2, 1, 1] = np.inf
    maps[3] = 7
    for size in ((9, 8), (3, 4)):
        pixels = np.asarray(tm.to_pixels(jnp.asarray(maps), size))
        assert np.isnan(pixels[1:3]).all()
        assert not pixels[3].any()
        assert pixels[0].max() == pytest.approx(1)
    np.testing.assert_array_equal(np.asarray(tm.to_pixels(jnp.asarray(maps), (9, 8)))[0], expected[0])


def test_pixels_of_a_map_of_the_largest_numbers():
    """Differences and sums of such values are infinite, and their normalised maps are not."""
    maps = np.random.default_rng(0).uniform(-1, 1, size=(2, 3, 4)).astype(np.float32)
    huge = jnp.asarray(maps / np.abs(maps).max() * np.finfo(np.float32).max)
    np.testing.assert_allclose(tm.to_pixels(huge, (9, 8)), tm.to_pixels(jnp.asarray(maps), (9, 8)), atol=1e-6)
    found, expected = (tm.combine([m], "mean", "sum") for m in (huge, jnp.asarray(maps)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    both = jnp.asarray([[[3e38, -3e38, 0.0]]], jnp.float32)
    np.testing.assert_allclose(tm.to_pixels(both, (1, 3))[0, 0], [1, 0, 0.5], atol=1e-6)


def test_every_public_name_is_in_the_program_whose_types_are_checked():
    program = (Path(__file__).parent / "typed_use.py").read_text()
    assert [name for name in tm.__all__ if f"tm.{name}" not in program] == []


def test_every_public_function_states_its_arguments_and_its_result():
    """The four equations of TokenTM, which stand on one screen, are left out."""
    for home in (tm, tm.metrics, tm.models, tm.scores, tm.weights):
        for name in getattr(home, "__all__", dir(home)):
            function = getattr(home, name)
            if not inspect.isfunction(function) or function.__module__ == "tokentm_jax.maths.tokentm":
                continue
            text, signature = inspect.getdoc(function) or "", inspect.signature(function)
            if function.__module__.startswith("tokentm_jax.") and not name.startswith("_"):
                assert "Args:\n" in text or not signature.parameters, name
                assert "Returns:\n" in text or signature.return_annotation is None, name
                tree = ast.parse(inspect.getsource(function)).body[0]
                assert isinstance(tree, ast.FunctionDef)
                vague = [
                    each.arg for each in ast.walk(tree.args) if isinstance(each, ast.arg) and "Any" in names_in(each)
                ]
                assert vague == (["model"] if name == "words" else []), name  # of a later room


def names_in(argument):
    """The names in the annotation of an argument."""
    return {node.id for node in ast.walk(argument) if isinstance(node, ast.Name)}


def test_every_public_name_is_there_at_first_use():
    """In a fresh process: those of each module before all else of the package is imported, and all at once."""
    program = """
import importlib, re, sys
from pathlib import Path
import tokentm_jax
face, names = Path(tokentm_jax.__file__).parent, []
for room in ("", ".models", ".inputs"):
    stub = (face / room[1:] / "__init__.pyi").read_text()
    names += [(room, *found) for found in re.findall(r"^from ([.\\w]+) import (\\w+) as", stub, re.MULTILINE)]
for home in {(room, home) for room, home, _ in names}:
    for module in [module for module in sys.modules if module.split(".")[0] == "tokentm_jax"]:
        del sys.modules[module]
    for room, place, name in names:
        if (room, place) == home:
            getattr(importlib.import_module("tokentm_jax" + room), name)
from tokentm_jax import *
import tokentm_jax
assert sorted(name for room, _, name in names if not room) == sorted(tokentm_jax.__all__)
print(*{*tokentm_jax.__all__} - {*globals()})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)


def test_names_of_training_are_in_a_clone_alone():
    from models.training.recipe import TextTrainConfig, TrainConfig

    for kind in (TrainConfig, TextTrainConfig):
        with pytest.warns(DeprecationWarning, match=f"is now models.training.recipe.{kind.__name__}") as caught:
            assert getattr(tm, kind.__name__) is kind
        assert caught[0].filename == __file__ and kind.__name__ not in tm.__all__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "models", None)  # as beside an installed wheel
        patch.setitem(sys.modules, "models.training.recipe", None)
        with pytest.raises(tm.InputError, match="training is run from a clone of the repository"):
            _ = tm.TrainConfig


def test_names_that_were_public_work_and_name_their_new_place():
    moved = {name: place for name, place in tm._MOVED.items() if place.startswith("tokentm_jax.")}
    assert len(moved) >= 30 and not {*moved} & {*tm.__all__}
    for name, place in moved.items():
        home, _, now = place.rpartition(".")
        with pytest.warns(DeprecationWarning, match=f"tokentm_jax.{name} is now {place}$") as caught:
            assert getattr(tm, name) is getattr(importlib.import_module(home), now)
        assert caught[0].filename == __file__
    with pytest.raises(AttributeError):
        _ = tm.no_such_name


def test_a_method_is_a_name_a_row_or_a_function(vit, images):
    def strongest(module, params, inputs, target, *, power: int = 1):
        """Attention to the patches, its largest value over blocks, heads and queries."""
        trace = tm.capture(module, params, inputs, target)
        found = trace.attention[..., module.prefix :].max((0, 2, 3)) ** power
        return found.reshape(-1, *module.grid), trace.details()

    row = tm.Method(strongest)
    maps = tm.explain(vit, images, strongest, target=1, power=2)
    assert maps.shape == tm.explain(vit, images).shape
    explain = jax.jit(tm.explain_fn(vit.module, strongest, power=2))
    for others in (tm.explain(vit, images, row, 1, power=2), explain(vit.params, vit.prepare(images), [1, 1])):
        np.testing.assert_allclose(others, maps, rtol=1e-6)
    both, details = tm.explain(vit, images, tm.METHODS["gae"], details=True)
    np.testing.assert_array_equal(both, tm.explain(vit, images, "gae"))
    assert {"logits", "target", "score"} <= {*details}
    with pytest.raises(tm.InputError, match="unknown option 'last' of the method 'strongest'"):
        tm.explain(vit, images, strongest, last=1)
    with pytest.raises(tm.InputError, match="the method 'strongest' takes no rules"):
        tm.explain_fn(vit.module, strongest, rules={"softmax": lambda f, *inputs: f(*inputs)})
    with pytest.raises(tm.InputError, match="unknown method '3'"):
        tm.explain(vit, images, 3)


def test_lists_of_classes_are_taken_wherever_a_class_is(vit, images, monkeypatch):
    inputs, listed, array = vit.prepare(images), [3, 1], np.array([3, 1])
    explain = tm.explain_fn(vit.module, "gae")
    np.testing.assert_array_equal(explain(vit.params, inputs, listed), explain(vit.params, inputs, array))
    for kind in (tm.scores.Versus, tm.scores.Channel):
        found = [tm.explain_fn(vit.module, "gae", score=kind(c))(vit.params, inputs) for c in (listed, array)]
        np.testing.assert_array_equal(*found)
    monkeypatch.setattr("tokentm_jax.methods.explain.METHODS", {"gae": tm.METHODS["gae"]})  # each is traced
    assert tm.methods_for(vit.module, vit.params, inputs, listed) == ["gae"]
    assert tm.capture(vit.module, vit.params, inputs, listed).target.tolist() == listed


# ---- targets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(vit):
    return dataclasses.replace(vit, class_names=("Tabby", "dugong", "tabby", "7", "owl"), wnids=tuple("vwxyz"))


def test_targets_by_name(named, images):
    """A name or a number for all, or a list of both; wherever a class may stand."""
    for target, classes in (
        ("dugong", [1, 1]),
        ("OWL", [4, 4]),
        ("z", [4, 4]),
        ("7", [3, 3]),  # a class is called so
        (["owl", 1], [4, 1]),
        (("dugong", np.int64(0)), [1, 0]),
        (np.array(["owl", "dugong"]), [4, 1]),
        (np.array([4, 1], np.uint8), [4, 1]),
        (2, [2, 2]),
    ):
        maps, details = tm.explain(named, images, "gae", target, details=True)
        np.testing.assert_array_equal(details["target"], classes)
        np.testing.assert_array_equal(maps, tm.explain(named, images, "gae", np.array(classes, np.int32)))
    versus = [tm.explain(named, images, "gae", "owl", score=tm.scores.Versus(o)) for o in ("dugong", 1, ["dugong", 1])]
    np.testing.assert_array_equal(versus[0], versus[1])
    np.testing.assert_array_equal(versus[0], versus[2])
    # A custom score receives numbers.
    custom = tm.explain(named, images, "gae", "owl", score=lambda outputs, target: 2 * outputs[jnp.arange(2), target])
    np.testing.assert_allclose(custom, 2 * tm.explain(named, images, "gae", 4), rtol=1e-4, atol=1e-7)
    traced = jax.jit(lambda target: tm.explain(named, images, "gae", target))(jnp.array([4, 1]))
    np.testing.assert_allclose(traced, tm.explain(named, images, "gae", [4, 1]), rtol=1e-5, atol=1e-7)


WRONG_TARGETS = [1.5, [1.0, 2.0], [[1], [2, 3]], [1, 2, 3], [[1, 2]], True, {"a": 1}, object(), [None, 1], b"owl", 1j]


@pytest.mark.parametrize("target", WRONG_TARGETS)
def test_targets_that_are_none(named, images, target, wrong_types):
    one = r"target must be one class or one per sample \(2\), as whole numbers"
    for call in (
        lambda: tm.explain(named, images, "gae", target),
        lambda: explain_fn(named.module, "gae")(named.params, images, target),
        lambda: tm.capture(named.module, named.params, images, target, []),
        lambda: tm.explain(named, images, "gae", target, score=tm.scores.log_probability),
    ):
        with pytest.raises(tm.InputError, match=one):
            call()
    with pytest.raises(tm.InputError, match="the other class must be"):
        tm.explain(named, images, "gae", score=tm.scores.Versus(target))


def test_names_of_classes_that_are_none(named, images):
    for target, message in (
        ("dugon", "unknown class 'dugon'; did you mean 'dugong'"),
        ("tabby", "ambiguous: give one of the numbers 0, 2"),
        (["owl", "cat"], "unknown class 'cat'"),
        ("5", "class 5 is out of range: tiny has classes 0 to 4"),
        ([4, 5], "target must be a class from 0 to 4"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.explain(named, images, "gae", target)


# ---- impossible types ------------------------------------------------------------------------------------------

IMPOSSIBLE = [None, 5, 1.5, b"x", object(), [1, [2, 3]], {}, [], "", "a\0b", np.nan, int, np.array("x"), True]
CALLS = {  # what is called with a value of a wrong type -> the values that it takes
    "load": (lambda vit, w: tm.load(w), [None]),
    "load checkpoint": (lambda vit, w: tm.load(checkpoint=w), [None]),
    "open_maps": (lambda vit, w: tm.open_maps(w), []),
    "export_maps": (lambda vit, w: tm.export_maps("nowhere", w), []),
    "read_checkpoint": (lambda vit, w: tm.models.read_checkpoint(vit.module, w), []),
    "write_checkpoint": (lambda vit, w: tm.models.write_checkpoint(w, vit.module, vit.params, vit.preprocessing), []),
    "read": (lambda vit, w: vit.read(w), []),
    "score": (lambda vit, w: vit.score(w), []),
    "explain": (lambda vit, w: tm.explain(w, np.ones((1, 16, 24, 3))), []),
    "show": (lambda vit, w: tm.show(np.zeros((16, 24, 3)), w), [None]),
    "show target": (lambda vit, w: tm.show(np.zeros((16, 24, 3), np.float32), vit, "rollout", w), [None]),
    "explain images": (lambda vit, w: tm.explain(vit, w), []),
    "explain score": (lambda vit, w: tm.explain(vit, np.ones((1, 16, 24, 3)), score=w), [None]),
    "explain Cosine": (
        lambda vit, w: tm.explain(vit, np.ones((1, 16, 24, 3)), "rollout", score=tm.scores.Cosine(w)),
        [],
    ),
    "explain Channel": (
        lambda vit, w: tm.explain(vit, np.ones((1, 16, 24, 3)), "rollout", score=tm.scores.Channel(w)),
        [5],  # NaN: there is no such channel
    ),
    "explain_fn": (lambda vit, w: tm.explain_fn(w), []),
    "explain_fn params": (lambda vit, w: tm.explain_fn(vit.module)(w, np.ones((1, 16, 24, 3), np.float32)), []),
    "explain_fn inputs": (lambda vit, w: tm.explain_fn(vit.module)(vit.params, w), []),
    "methods_for": (lambda vit, w: tm.methods_for(w, vit.params, np.ones((1, 16, 24, 3), np.float32)), []),
    "methods_for inputs": (lambda vit, w: tm.methods_for(vit.module, vit.params, w), []),
    "capture": (lambda vit, w: tm.capture(w, vit.params, np.ones((1, 16, 24, 3), np.float32)), []),
    "capture inputs": (lambda vit, w: tm.capture(vit.module, vit.params, w), []),
    "capture fields": (
        lambda vit, w: tm.capture(vit.module, vit.params, np.ones((1, 16, 24, 3), np.float32), 0, w),
        [None, {}, []],
    ),
    "to_pixels": (lambda vit, w: tm.to_pixels(w, (4, 4)), []),
    "to_pixels size": (lambda vit, w: tm.to_pixels(jnp.ones((1, 2, 2)), w), []),
    "combine": (lambda vit, w: tm.combine(w), []),
    "combine normalisation": (lambda vit, w: tm.combine([jnp.ones((1, 2, 2))], "mean", w), []),
    "combine weights": (lambda vit, w: tm.combine([jnp.ones((1, 2, 2))], "mean", weights=w), [None]),
    "over_devices": (lambda vit, w: tm.models.over_devices(w), [int]),
    "PlainModel": (lambda vit, w: tm.models.PlainModel(w, (2, 3)), [int]),
    "PlainModel grid": (lambda vit, w: tm.models.PlainModel(print, w), []),
    "PlainModel prefix": (lambda vit, w: tm.models.PlainModel(print, (2, 3), w), [5]),
    "PlainModel readout": (lambda vit, w: tm.models.PlainModel(print, (2, 3), 0, w), []),
    "depth_rows": (lambda vit, w: tm.configs.depth_rows(w), [5]),
    "words": (lambda vit, w: tm.words(w, ["x"], np.ones((1, 3))), []),
}


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize("call", CALLS)
def test_values_of_impossible_types_are_one_sentence(vit, call):
    function, right = CALLS[call]
    for wrong in IMPOSSIBLE:
        if not any(wrong is value or (type(wrong) is type(value) and wrong == value) for value in right):
            with pytest.raises(tm.InputError) as raised:
                function(vit, wrong)
            assert str(raised.value).strip() and "\n" not in str(raised.value)


def test_models_of_other_kinds_are_told_what_to_do(vit, images):
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(16 * 24 * 3, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(x.reshape(len(x), -1))

    network = Network(nnx.Rngs(0))
    plain = tm.models.PlainModel(lambda params, x, tap: vit.module.apply({"params": params}, x), (2, 3))
    with pytest.raises(tm.InputError, match=r"got the NNX module Network: split it, `graph, state = nnx.split"):
        tm.explain_fn(network)
    with pytest.raises(tm.InputError, match=r"got a function: give lambda params, images: \.\.\."):
        tm.explain_fn(lambda x: x)
    with pytest.raises(tm.InputError, match="got a Model: give its `module`, and then its `params`"):
        tm.explain_fn(vit)
    with pytest.raises(tm.InputError, match=r"got a PlainModel: use tm.explain_fn\(module\)\(params, inputs\), or"):
        tm.explain(plain, images)
    # The advice works.
    graph, state = nnx.split(network)
    explain = tm.explain_fn(lambda state, images: nnx.merge(graph, state)(images), "input_gradient")
    assert explain(state, jnp.asarray(images)).shape == (2, 16, 24)
    own = tm.Model(plain, vit.params, vit.preprocessing, ("a",) * 5, "own")
    own = dataclasses.replace(own, module=dataclasses.replace(plain, num_classes=5))
    assert tm.explain(own, images, "input_gradient").shape == (2, 16, 24)


def test_errors_name_commands_options_and_extras_that_there_are():
    """Of every message in the source: `tokentm COMMAND`, --option, and pip install 'tokentm-jax[extra]'."""
    from tokentm_jax.cli.main import main

    root = Path(__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    commands = {name: main.get_command(click.Context(main), name) for name in main.list_commands(click.Context(main))}
    options = {name for command in commands.values() for option in command.params for name in option.opts}
    found: list[str] = []
    for file in (root / "tokentm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("InputError", "Unfit"):
                parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                found.append("".join(part for part in parts if isinstance(part, str)))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                assert isinstance(node.args[1], ast.Constant) and node.args[1].value in extras, file
    messages = "\n".join(found)
    assert len(found) > 200
    named = re.findall(r"`tokentm ([a-z-]+)", messages), re.findall(r"(--[a-z-]+)", messages)
    assert {*named[0]} <= {*commands} and {*named[1]} <= options
    assert {*re.findall(r"pip install '?tokentm[_-]jax\[(\w+)\]", messages)} <= {*extras}
