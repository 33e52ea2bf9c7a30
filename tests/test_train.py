"""Training: it learns, it resumes exactly, and it fine-tunes."""

import dataclasses
import errno
import json
import os
import runpy
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokentm_jax as tm
from tokentm_jax.data.arrays import Data
from tokentm_jax.models.checkpoint import read_description
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.runs import train as training
from tokentm_jax.runs.train import TrainConfig, accuracy, augment, batches, cutmix, initial_params, train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
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
    assert vit.preprocessing == tm.Preprocessing((8, 8), 1.0, mean=CONFIG.mean, std=CONFIG.std)
    description = read_description(folder / "toy.safetensors")
    assert description is not None
    found = {name: description[name] for name in ("name", "top_1", "epochs", "test_data")}
    assert found == {"name": "toy", "top_1": top_1, "epochs": 4, "test_data": "toy"}


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


def test_a_damaged_run_is_refused(data, whole, tmp_path):
    folder, _, _ = whole
    lines = []
    cases = (
        (lambda out: (out / "log.jsonl").write_text("[1]\n"), "log.jsonl is damaged"),
        (lambda out: (out / "identity.json").write_text("[" * 100_000), "identity.json is not valid JSON"),
        (lambda out: (out / "identity.json").write_text("{}"), "does not say its name"),
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


def test_fine_tuning_starts_from_a_checkpoint_with_a_fresh_head(data, tmp_path):
    old = ViT(**{**MODEL, "num_classes": 7})
    old_params = init_params(old, jax.random.key(9))
    path = tm.write_checkpoint(
        tmp_path / "old.safetensors", old, old_params, tm.Preprocessing((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    config = dataclasses.replace(CONFIG, fine_tune=("old", str(path)), mimetic_init=False, epochs=1)
    module = ViT(**MODEL)
    start = initial_params(config, module)
    np.testing.assert_array_equal(
        start["blocks"]["mlp"]["fc1"]["kernel"], old_params["blocks"]["mlp"]["fc1"]["kernel"]
    )
    assert start["head"]["kernel"].shape == (16, 2)
    # Images of another size are resized to the model's.
    larger = data._replace(images=np.repeat(np.repeat(data.images, 2, 1), 2, 2))
    assert train(config, module, larger, larger, tmp_path / "run", lambda _: None) > 0.4


def test_every_epoch_is_a_permutation_that_depends_on_the_step_alone(data):
    from itertools import islice

    first = [labels for _, labels in islice(batches(CONFIG, data, 0), 10)]
    later = [labels for _, labels in islice(batches(CONFIG, data, 7), 3)]
    np.testing.assert_array_equal(first[7:], later)
    epochs = [np.sort(np.concatenate(first[:5])), np.sort(np.concatenate(first[5:])), np.sort(data.labels)]
    np.testing.assert_array_equal(epochs[0], epochs[2])
    np.testing.assert_array_equal(epochs[1], epochs[2])
    assert (np.concatenate(first[:5]) != np.concatenate(first[5:])).any()


def test_augmentation_keeps_the_range_and_cutmix_mixes_by_area():
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 3)), jnp.float32)
    changed = augment(dataclasses.replace(CONFIG, affine_colour=0.3), jax.random.key(0), images)
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1
    plain = dataclasses.replace(CONFIG, crop_padding=0, flip=False)
    np.testing.assert_array_equal(augment(plain, jax.random.key(0), images), images)

    labels = jnp.eye(4)
    mixed, targets = cutmix(jax.random.key(3), images, labels)
    own = (mixed == images).all(-1).mean((1, 2))
    np.testing.assert_allclose(targets[jnp.arange(4), jnp.arange(4)], own, atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


def test_classes_that_do_not_fit_are_refused(data, tmp_path):
    with pytest.raises(tm.InputError, match="expected the 2 classes"):
        train(CONFIG, ViT(**MODEL), data, data._replace(class_names=("a", "b", "c")), tmp_path, lambda _: None)


@pytest.mark.parametrize("name", ["cifar10_vit", "cifar10_vit_cpu", "cifar10_finetune"])
def test_the_shipped_recipes_are_valid(name):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]
    assert tm.build(config.model).num_classes == 10
