"""Training: it learns, it resumes exactly, and it fine-tunes."""

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokentm_jax as tm
from models.training import train as training
from models.training.data import Data
from models.training.distil import answers, distillation_loss, load_teacher
from models.training.loop import OPTIMISERS
from models.training.recipe import TrainConfig, augment, mix, view
from models.training.train import accuracy, batches, initial_params, train
from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.models.checkpoint import read_description
from tokentm_jax.models.vit import ViT, init_params

CONFIGS = Path(__file__).resolve().parent.parent / "models/training/recipes"
MODEL = {"img_size": (8, 8), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2}
CONFIG = TrainConfig(
    name="toy",
    train_data="toy",
    test_data="toy",
    model=MODEL,
    epochs=4,
    warmup_epochs=1,
    batch_size=16,
    learning_rate=5e-3,
    ema_decay=0.9,
    crop_padding=1,
    cutmix=0.2,
    patch_drop=0.5,
    patch_drop_epochs=2,
    mimetic_init=True,
)


class Hashed:
    """A recipe as a static argument."""

    def __init__(self, config):
        self.config = config

    def __getattr__(self, name):
        return getattr(self.config, name)


@pytest.fixture(autouse=True)
def promotion():
    """Optax mixes integer counts with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Runs of the same recipe share the compiled step, which is most of their time here."""
    steps, make = {}, training.make_step

    def shared(*recipe):
        if repr(recipe) not in steps:
            steps[repr(recipe)] = make(*recipe)
        return steps[repr(recipe)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_step", shared)
        yield


@pytest.fixture(scope="module")
def data():
    """Bright against dark images under noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80).astype(np.int32)
    images = np.clip(rng.normal(90 + 70 * labels[:, None, None, None], 40, (80, 8, 8, 3)), 0, 255).astype(np.uint8)
    return Data(images, labels, ("dark", "bright"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(folder, lines, accuracy) of an uninterrupted run."""
    folder, lines = tmp_path_factory.mktemp("whole"), []
    test = data._replace(labels=1 - data.labels, class_names=data.class_names[::-1])  # classes go by name
    with jax.numpy_dtype_promotion("standard"):
        return folder, lines, train(CONFIG, ViT(**MODEL), data, test, folder, lines.append)


@pytest.mark.slow
def test_learns_and_ships_a_file_that_loads(data, whole):
    folder, lines, top_1 = whole
    assert top_1 > 0.9
    assert len(lines) == 4 and "min left" in lines[0]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 20 and records[-1]["test_accuracy"] == top_1
    vit = tm.load(checkpoint=folder / "toy.safetensors")
    assert vit.class_names == ("dark", "bright")
    predicted = vit.logits(jnp.asarray(data.images, jnp.float32) / 255).argmax(-1)
    assert (np.asarray(predicted) == data.labels).mean() == top_1
    assert vit.preprocessing == tm.inputs.Preprocessing((8, 8), 1.0, mean=CONFIG.mean, std=CONFIG.std)
    unrolled = dataclasses.replace(vit, module=vit.module.clone(unroll=2))  # as training runs it
    assert unrolled.described()["identity"] == vit.described()["identity"]
    images = jnp.asarray(data.images[:2], jnp.float32) / 255
    np.testing.assert_allclose(unrolled.logits(images), vit.logits(images), rtol=1e-5, atol=1e-5)
    description = read_description(folder / "toy.safetensors")
    assert description is not None
    found = {name: description[name] for name in ("name", "top_1", "epochs", "test_data")}
    assert found == {"name": "toy", "top_1": top_1, "epochs": 4, "test_data": "toy"}


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_numbers(data, whole, tmp_path, monkeypatch):
    """Ctrl-C, then the same to the end; in between, everything that must not go on there."""
    module, out, lines = ViT(**MODEL), tmp_path / "out", []

    def interrupt_after_two(line):
        if line.startswith("epoch 1"):
            with pytest.raises(tm.InputError, match="being written by another process"):
                train(CONFIG, module, data, data, out, lines.append)
        if line.startswith("epoch 2"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, module, data, data, out, interrupt_after_two)

    def refused(message, config=CONFIG, train_data=data, test_data=data):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(tm.InputError, match=message):
            train(config, module, train_data, test_data, out, lines.append)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} and not lines

    refused("was made with seed 0, and this command has 1; choose another", dataclasses.replace(CONFIG, seed=1))
    other = data.images.copy()
    other[-1, 0, 0, 0] ^= 1
    refused("was made with test_data toy, 80 images", test_data=data._replace(images=other))
    fewer = data._replace(images=data.images[:40], labels=data.labels[:40])
    refused("was made with train_data toy, 80 images .* this command has toy, 40 images", train_data=fewer)
    with monkeypatch.context() as patch:
        patch.setattr("tokentm_jax.identity.version_of", lambda package: f"another {package}")
        refused("was made with versions")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(tm.InputError, match="checkpoints/15 cannot be written: No space left on device; the same"):
            train(CONFIG, module, data, data, out, lines.append)
    assert lines == ["resumed at step 10 of 20"]

    lines = []
    assert sorted(p.name for p in (out / "checkpoints").iterdir() if p.is_dir()) == ["10", "5"]
    shutil.copytree(out / "checkpoints/10", out / "checkpoints/15.orbax-checkpoint-tmp")  # of a run that was killed
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 15}\n')  # of a run that ended before its checkpoint was whole
    train(CONFIG, module, data, data, out, lines.append)
    assert lines[0] == "resumed at step 10 of 20"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [5, 10, 15, 20]
    assert not list(out.rglob("*orbax-checkpoint-tmp*"))
    uninterrupted, resumed = (tm.load(checkpoint=folder / "toy.safetensors") for folder in (whole[0], out))
    jax.tree.map(np.testing.assert_array_equal, uninterrupted.params, resumed.params)


@pytest.mark.slow
def test_a_damaged_run_is_refused(data, whole, tmp_path):
    folder, _, _ = whole
    lines = []
    cases = (
        (lambda out: (out / "log.jsonl").write_text("[1]\n"), "log.jsonl is damaged"),
        (lambda out: (out / "identity.json").write_text("[" * 100_000), "identity.json is not valid JSON"),
        (lambda out: (out / "identity.json").write_text("{}"), "does not state its name"),
        (lambda out: (out / "identity.json").unlink(), "is not a file of this program"),
        (
            lambda out: [os.truncate(p, 0) for p in (out / "checkpoints/20").rglob("*") if p.is_file()],
            "checkpoints/20 is damaged",
        ),
        (lambda out: (out / "checkpoints/20").rename(out / "checkpoints/21"), "checkpoints/21 is of step 20 of 20"),
    )
    for number, (damage, message) in enumerate(cases):
        out = tmp_path / str(number)
        shutil.copytree(folder, out)
        damage(out)
        with pytest.raises(tm.InputError, match=message):
            train(CONFIG, ViT(**MODEL), data, data, out, lines.append)


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("name", ["../x", "a/b", "..", "", "a\0b", "x" * 101, "a\nb"], "must be a plain name"),
        ("name", [3, None, ["a"]], "must be a valid string"),
        ("epochs", [0, -1.5], "must be greater than 0"),
        ("epochs", ["3", None, True, [3]], "must be a valid number"),
        ("epochs", [float("nan"), float("inf")], "must be a finite number"),
        ("epochs", [1e-9], "must make 1 to 2147483647 steps"),
        ("epochs", [1e300], "must be less than or equal to 1000000"),
        ("batch_size", [0, -1], "must be greater than or equal to 1"),
        ("batch_size", [2.5, True, "16"], "must be a valid integer"),
        ("cutmix", [-0.1], "must be greater than or equal to 0"),
        ("label_smoothing", [1.1], "must be less than or equal to 1"),
        ("patch_drop", [1.0], "must be less than 1"),
        ("flip", [1, "yes"], "must be a valid boolean"),
        ("std", [(0.1, 0.0, 0.1), [0.1, -1, 0.1]], r"\[1\] must be greater than 0"),
        ("std", [0.1, "abc"], "must be a valid tuple"),
        ("fine_tune", [("a",)], r"is wrong|lacks 1"),
        ("model", [3, "deit"], "must be a valid"),
        ("seed", [-1, 2**31], "than or equal to"),
        ("crop_area", [(0.5, 0.2)], r"must be \(least, most\)"),
        ("crop_area", [(0.0, 1.0), (0.5, 1.1), (0.5,), 0.5], "must be|lacks|is wrong"),
        ("rand_augment", [(0, 5.0), (2, 10.5), (2, -1), (1.5, 5.0), (2,)], "must be|lacks|is wrong"),
        ("mixup", [0.9], "together"),
        ("mixup", [-0.1, 2.0], "than or equal to"),
        ("teacher", [("a",), "a", (1, 2)], "must be|lacks|is wrong"),
        ("teacher_views", [2], "needs a 'teacher'"),
        ("temperature", [0.0], "greater than 0"),
    ],
)
def test_fields_of_a_recipe_are_checked(data, tmp_path, field, values, expected):
    for value in values:
        config = dataclasses.replace(CONFIG, **{field: value})
        with pytest.raises(tm.InputError, match=f"the recipe: '{field}'.*({expected})"):
            train(config, ViT(**MODEL), data, data, tmp_path, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_the_accuracy_is_compiled_once(data):
    params = init_params(ViT(**MODEL), jax.random.key(0))
    found = accuracy(CONFIG, ViT(**MODEL), params, data)
    before = training._hits._cache_size()
    assert accuracy(dataclasses.replace(CONFIG, seed=1), ViT(**MODEL), params, data) == found
    assert training._hits._cache_size() == before


def test_muon_goes_along_the_polar_factor_of_each_blocks_gradient():
    """The first step, against singular value decompositions in NumPy; what is no kernel of a block goes as by Adam."""
    config = dataclasses.replace(CONFIG, optimiser="muon", warmup_epochs=0, weight_decay=0.1, clip_norm=1e9)
    params = init_params(ViT(**MODEL), jax.random.key(0))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    optimiser = OPTIMISERS["muon"](config, 100)
    update = jax.jit(optimiser.update)
    state = update(jax.tree.map(jnp.zeros_like, params), jax.jit(optimiser.init)(params), params)[1]  # rate 0
    updates, _ = update(gradients, state, params)
    for name, part in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
        kernel, bias = (updates["blocks"][name][part][leaf] for leaf in ("kernel", "bias"))
        weights = np.asarray(params["blocks"][name][part]["kernel"])
        for block, gradient in enumerate(np.asarray(gradients["blocks"][name][part]["kernel"], np.float64)):
            u, _, vt = np.linalg.svd(gradient, full_matrices=False)
            size = 0.2 * max(gradient.shape) ** 0.5 * CONFIG.learning_rate
            found = -np.asarray(kernel[block]) - 0.1 * CONFIG.learning_rate * weights[block]
            assert (found * (u @ vt)).sum() > 0.95 * np.linalg.norm(found) * np.linalg.norm(u @ vt)
            assert 0.6 < np.linalg.norm(found) / np.linalg.norm(size * u @ vt) < 1.25
        gradient = np.asarray(gradients["blocks"][name][part]["bias"])
        assert (np.sign(bias) == -np.sign(gradient)).all()
    assert (np.sign(updates["head"]["kernel"]) == -np.sign(gradients["head"]["kernel"])).all()


@pytest.mark.slow
def test_mixed_precision_learns_the_same(data, whole, tmp_path):
    """The same accuracy by parameters that differ a little, and a file that loads as any other."""
    recipe = dataclasses.replace(CONFIG, mixed_precision=True)
    assert train(recipe, ViT(**MODEL), data, data, tmp_path / "mixed", lambda _: None) > 0.9
    by_muon = dataclasses.replace(recipe, optimiser="muon")
    assert train(by_muon, ViT(**MODEL), data, data, tmp_path / "muon", lambda _: None) > 0.9
    first, second = (tm.load(checkpoint=folder / "toy.safetensors") for folder in (whole[0], tmp_path / "mixed"))
    assert first.module == second.module
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first.params, second.params)
    assert 0 < max(jax.tree.leaves(difference)) < 0.1
    with pytest.raises(tm.InputError, match="mixed_precision"):
        train(CONFIG, ViT(**MODEL), data, data, tmp_path / "mixed", lambda _: None)


@pytest.mark.slow
def test_fine_tuning_starts_from_a_checkpoint_with_a_fresh_head(data, tmp_path):
    old = ViT(**{**MODEL, "num_classes": 7})
    old_params = init_params(old, jax.random.key(9))
    path = tm.models.write_checkpoint(
        tmp_path / "old.safetensors", old, old_params, tm.inputs.Preprocessing((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    config = dataclasses.replace(CONFIG, fine_tune=("old", str(path)), mimetic_init=False, epochs=1)
    module = ViT(**MODEL)
    start = initial_params(config, module, data.class_names)
    np.testing.assert_array_equal(
        start["blocks"]["mlp"]["fc1"]["kernel"], old_params["blocks"]["mlp"]["fc1"]["kernel"]
    )
    assert start["head"]["kernel"].shape == (16, 2)
    # A head of the same classes is kept.
    own = init_params(module, jax.random.key(8))
    photo = tm.inputs.Preprocessing((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    same = tm.models.write_checkpoint(tmp_path / "same.safetensors", module, own, photo, class_names=data.class_names)
    again = dataclasses.replace(config, fine_tune=("same", str(same)))
    jax.tree.map(np.testing.assert_array_equal, initial_params(again, module, data.class_names), own)
    # Images of another size are resized to the model's.
    larger = data._replace(images=np.repeat(np.repeat(data.images, 2, 1), 2, 2))
    config = dataclasses.replace(config, missing=0.5)
    assert train(config, module, larger, larger, tmp_path / "run", lambda _: None) > 0.4


def test_every_epoch_is_a_permutation_that_depends_on_the_step_alone(data):
    from itertools import islice

    first = [batch.labels for batch in islice(batches(CONFIG, data, 0), 10)]
    later = [batch.labels for batch in islice(batches(CONFIG, data, 7), 3)]
    np.testing.assert_array_equal(first[7:], later)
    epochs = [np.sort(np.concatenate(first[:5])), np.sort(np.concatenate(first[5:])), np.sort(data.labels)]
    np.testing.assert_array_equal(epochs[0], epochs[2])
    np.testing.assert_array_equal(epochs[1], epochs[2])
    assert (np.concatenate(first[:5]) != np.concatenate(first[5:])).any()


@pytest.mark.slow
def test_augmentation_keeps_the_range():
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 3)), jnp.float32)
    plain = dataclasses.replace(CONFIG, crop_padding=0, flip=False)
    np.testing.assert_array_equal(augment(plain, jax.random.key(0), images, (8, 8)), images)
    config = Hashed(dataclasses.replace(CONFIG, affine_colour=0.3, crop_area=(0.2, 1.0), rand_augment=(2, 5.0)))
    changed = jax.jit(augment, static_argnums=(0, 3))(config, jax.random.key(0), images, (12, 8))
    assert changed.shape == (4, 12, 8, 3) and changed.min() >= 0 and changed.max() <= 1


def test_a_view_is_a_function_of_the_photo_and_its_number(data):
    config = Hashed(dataclasses.replace(CONFIG, crop_area=(0.3, 1.0)))
    of = jax.jit(view, static_argnums=(0, 1))
    rows = np.array([7, 3, 50], np.int32)
    found = of(config, (8, 8), data.images[rows], rows, np.int32(4))
    for place, row in enumerate(rows):
        alone = of(config, (8, 8), data.images[row : row + 1], rows[place : place + 1], np.int32(4))
        np.testing.assert_allclose(alone[0], found[place], atol=1e-6)
    other = of(config, (8, 8), data.images[rows], rows, np.int32(5))
    assert (np.abs(other - found).max((1, 2, 3)) > 0.01).all()


def test_batches_are_mixed_as_often_as_the_recipe_says():
    images, targets = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 8, 8, 3)), jnp.eye(4)
    config = dataclasses.replace(CONFIG, cutmix=0.3, mixup=0.5)
    keys = jax.random.split(jax.random.key(0), 400)
    many = jax.jit(jax.vmap(lambda k: mix(config, *jax.random.split(k), images, targets)))
    mixed, found = (np.asarray(a) for a in many(keys))
    same = (mixed == images).all((1, 2, 3, 4))
    blended = (mixed % 1 != 0).any((1, 2, 3, 4))  # CutMix leaves pixels as they are
    assert abs(blended.mean() - 0.5) < 0.08 and abs(same.mean() - 0.2) < 0.08
    own = np.diagonal(found, axis1=1, axis2=2) * np.arange(4) + np.diagonal(
        np.roll(found, 1, 2), axis1=1, axis2=2
    ) * np.roll(np.arange(4), 1)
    np.testing.assert_allclose(mixed.mean((2, 3, 4)), own, atol=1e-5)  # targets say what is in the images


@pytest.mark.parametrize(
    ("recipe", "model", "message"),
    [
        ({"patch_drop": 0.5}, {"rope_type": "cat", "num_heads": 1}, "'patch_drop' needs no rotary positions"),
        ({"mimetic_init": True}, {"pos_embed": "none"}, "'mimetic_init' needs position embeddings"),
    ],
)
def test_recipes_that_no_model_of_this_kind_can_follow(data, tmp_path, recipe, model, message):
    config = dataclasses.replace(CONFIG, **recipe)
    with pytest.raises(tm.InputError, match=message):
        train(config, ViT(**{**MODEL, **model}), data, data, tmp_path, lambda _: None)


def test_classes_that_do_not_fit_are_refused(data, tmp_path):
    with pytest.raises(tm.InputError, match="expected the 2 classes"):
        train(CONFIG, ViT(**MODEL), data, data._replace(class_names=("a", "b", "c")), tmp_path, lambda _: None)


# ---- distillation ----


def test_the_distillation_loss_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    logits, said = rng.normal(size=(2, 3, 5)) * 2
    hard = rng.dirichlet(np.ones(5), 3)
    weight, temperature, total = 0.7, 3.0, 0.0

    def probabilities(row):
        powers = [np.exp(value) for value in row]
        return [power / sum(powers) for power in powers]

    soft = np.array([probabilities(row / temperature) for row in said])
    for i in range(3):
        for k in range(5):
            total -= (1 - weight) * hard[i, k] * np.log(probabilities(logits[i])[k]) / 3
            total -= weight * temperature**2 * soft[i, k] * np.log(probabilities(logits[i] / temperature)[k]) / 3
    arrays = (jnp.asarray(a, jnp.float32) for a in (logits, hard, soft))
    np.testing.assert_allclose(distillation_loss(*arrays, weight, temperature), total, rtol=1e-5)


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory):
    """(recipe, student, teacher's file): a teacher of another size, with the classes in another order."""
    module = ViT(**{**MODEL, "img_size": (16, 16), "patch_size": 8})
    with jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, init_params(module, jax.random.key(5)))
        path = tm.models.write_checkpoint(
            tmp_path_factory.mktemp("teacher") / "teacher.safetensors",
            module,
            {**params, "head": {**params["head"], "kernel": 20 * params["head"]["kernel"]}},
            tm.inputs.Preprocessing((16, 16), 1.0, mean=(0.5,) * 3, std=(0.2,) * 3),
            data.class_names[::-1],
        )
    config = dataclasses.replace(
        CONFIG, epochs=1, patch_drop=0.0, cutmix=0.0, teacher=(None, str(path)), teacher_weight=1.0, temperature=2.0
    )
    return config, ViT(**MODEL), path


@pytest.mark.slow
def test_a_teacher_answers_in_the_order_of_the_students_classes(data, taught):
    _, _, path = taught
    teacher, vit = load_teacher(None, str(path), data.class_names), tm.load(checkpoint=path)
    images = jnp.asarray(data.images[:3], jnp.float32) / 255
    expected = vit.logits(jax.image.resize(images, (3, 16, 16, 3), "cubic").clip(0, 1))[:, ::-1]
    np.testing.assert_allclose(teacher.function(teacher.params, images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(tm.InputError, match="does not know each of the classes by its name: cat"):
        load_teacher(None, str(path), ("dark", "cat"))


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_says_and_not_the_labels(data, whole, tmp_path):
    """With views that do not change, the answers that are kept are those given at each step."""
    teacher = whole[0] / "toy.safetensors"
    plain = dataclasses.replace(CONFIG, crop_padding=0, flip=False, patch_drop=0.0, cutmix=0.0, temperature=2.0)
    each = dataclasses.replace(plain, teacher=(None, str(teacher)), teacher_weight=1.0)
    wrong = data._replace(labels=1 - data.labels)
    for name, recipe in (("each", each), ("kept", dataclasses.replace(each, teacher_views=1))):
        assert train(recipe, ViT(**MODEL), wrong, data, tmp_path / name, lambda _: None) > 0.9
    first, second = (tm.load(checkpoint=tmp_path / name / "toy.safetensors") for name in ("each", "kept"))
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first.params, second.params)
    assert max(jax.tree.leaves(difference)) < 2e-2  # they are kept in half precision
    with np.load(tmp_path / "kept/teacher.npz") as stored:
        expected = tm.load(checkpoint=teacher).logits(jnp.asarray(data.images, jnp.float32) / 255)
        np.testing.assert_allclose(stored["logits"][0], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_teachers_answers_are_kept(data, taught, tmp_path):
    config, module, path = taught
    config, lines = dataclasses.replace(config, teacher_views=3, crop_area=(0.5, 1.0)), []
    teacher = load_teacher(None, str(path), data.class_names)

    def ask(name, recipe=config, log=lines.append, given=data):
        return answers(recipe, module, teacher, given, tmp_path / f"{name}.npz", {"identity": "x"}, log)

    def stop(line):
        if "view 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask("a", log=stop)
    resumed = ask("a")
    assert len(lines) == 1 and lines[0].startswith("teacher: view 3 of 3")  # the first two were there
    assert resumed.shape == (3, 80, 2) and resumed.dtype == np.float16
    np.testing.assert_array_equal(resumed, ask("b"))
    assert np.abs(np.diff(np.float32(resumed), axis=0)).max() > 0.01  # the views differ
    rows = np.array([7, 50], np.int32)
    seen = jax.jit(view, static_argnums=(0, 1))(Hashed(config), (8, 8), data.images[rows], rows, np.int32(1))
    np.testing.assert_allclose(resumed[1, rows], teacher.function(teacher.params, seen), rtol=2e-3, atol=2e-3)

    lines.clear()  # a file serves every training with the same views
    np.testing.assert_array_equal(ask("a", dataclasses.replace(config, teacher_views=2, epochs=9)), resumed[:2])
    assert not lines
    with pytest.raises(tm.InputError, match=r"a.npz holds a teacher's answers to other views"):
        ask("a", dataclasses.replace(config, seed=1))
    for content in (b"PK\3\4nothing", b"", (tmp_path / "a.npz").read_bytes()[:-90]):
        (tmp_path / "e.npz").write_bytes(content)
        with pytest.raises(tm.InputError, match=r"e.npz is damaged \(.*\); remove it"):
            ask("e")


@pytest.mark.slow
def test_a_taught_run_resumes_to_the_same_numbers(data, taught, tmp_path):
    config, module, _ = taught
    config, lines = dataclasses.replace(config, epochs=3, teacher_views=2, crop_area=(0.5, 1.0), mixup=0.5), []

    def stop(line):
        if line.startswith(("teacher: view 1", "epoch 2")):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config, module, data, data, tmp_path / "a", stop)
    train(config, module, data, data, tmp_path / "a", lines.append)
    assert lines[0] == "resumed at step 10 of 15"
    train(config, module, data, data, tmp_path / "b", lambda _: None)
    one, two = (tm.load(checkpoint=tmp_path / name / "toy.safetensors") for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    with pytest.raises(tm.InputError, match="was made with teacher"):
        train(
            dataclasses.replace(config, teacher=(None, str(tmp_path / "b/toy.safetensors"))),
            module,
            data,
            data,
            tmp_path / "a",
            lines.append,
        )


RECIPES = ["cifar10_vit", "cifar10_vit_cpu", "cifar10_finetune", "cifar10_finetune_112:augmentation=shifts"]
RECIPES += ["cifar10_finetune_112", "cifar10_distilled", "cifar10_distilled:stage=second"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_recipes_are_valid(name):
    stem, colon, options = name.partition(":")
    config = read_recipe(Path(f"{CONFIGS / stem}.py{colon}{options}"), TrainConfig)
    assert tm.models.build(config.model).num_classes == 10
