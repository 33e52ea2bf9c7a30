"""Every command and every writing function meets what a user has there, and leaves it as it is, byte for byte."""

import errno
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import mostly_slow, tiny_vit
from everything import everything
from PIL import Image
from test_files import FILES, KINDS, make, there

import tokentm_jax as tm
from tokentm_jax import files
from tokentm_jax.errors import InputError
from tokentm_jax.identity import claimed

TEXTS = Path(__file__).parent / "goldens" / "texts"
IMPORTS = "import tokentm_jax as tm\nfrom models.training.recipe import TextTrainConfig, TrainConfig"
RECIPES = {
    "evaluate.py": "config = tm.EvaluateConfig('x', 'saco', 'photos', tm.configs.rows('rollout'), "
    "options={'groups': 2}, checkpoint='tiny.safetensors', batch_size=4)",
    "leaderboard.py": "config = tm.LeaderboardConfig('x', [tm.EvaluateConfig('saco', 'saco', 'photos', "
    "tm.configs.rows('rollout'), options={'groups': 2}, checkpoint='tiny.safetensors', batch_size=4)], "
    "('saco', 'saco'))",
    "texts.py": "config = tm.EvaluateConfig('x', 'eraser', 'texts.tsv', tm.configs.rows('rollout'), "
    f"{str(TEXTS / 'distilbert')!r}, batch_size=2)",
    "train.py": "config = TrainConfig('x', 'photos', 'photos', dict(img_size=16, patch_size=8, embed_dim=16, "
    "depth=1, num_heads=2, num_classes=2), 1, batch_size=2)",
    "train_text.py": f"config = TextTrainConfig('x', {str(TEXTS / 'bert_encoder')!r}, 'texts.tsv', 'texts.tsv', "
    "('bad', 'good'), epochs=1, batch_size=2)",
}
# The arguments of a command without --out, and the files and folders that it writes below that, "" being that itself.
RUN = ("identity.json", ".lock", "results.json", "results.md", "records")
COMMANDS = {
    "explain": (["explain", "photos/a/1.png", "--checkpoint", "tiny.safetensors"], ("", "1.png", "1.npz")),
    "explain of several": (
        ["explain", "photos/a/1.png", "photos/b/2.png", "--checkpoint", "tiny.safetensors", "--method",
         "rollout,raw_attention"],
        ("sheet.png", "1.rollout.npz", "2.raw_attention.npz"),
    ),
    "explain-audio": (["explain-audio", "sound.wav", "--method", "rollout"], ("sound.png", "sound.npz")),
    "explain-text": (
        ["explain-text", "a film", "--model", str(TEXTS / "distilbert"), "--method", "rollout"], ("page.html",)
    ),
    "explain-lm": (
        ["explain-lm", "the of", "--model", str(TEXTS.parent / "decoders/llama"), "--method", "rollout", "--most", "1",
         "--contrasts", "0"],
        ("page.html",),
    ),
    "report": (["report", "photos/a/1.png", "--checkpoint", "tiny.safetensors", "--methods", "rollout"],
               ("page.html",)),
    "convert": (["convert", "tiny.safetensors"], ("model.safetensors", "model")),
    "dataset": (
        ["dataset", "photos", "--checkpoint", "tiny.safetensors", "--methods", "rollout", "--batch-size", "4"],
        ("", "zarr.json", "maps", "maps/zarr.json", "status/zarr.json"),
    ),
    "evaluate": (["evaluate", "evaluate.py"], ("", *RUN, "curves.png")),
    "evaluate texts": (["evaluate", "texts.py"], RUN),
    "leaderboard": (
        ["leaderboard", "leaderboard.py"],
        ("", "identity.json", ".lock", "leaderboard.json", "leaderboard.md", "leaderboard.png", "saco", "maps"),
    ),
    "train": (["train", "train.py"], ("", "identity.json", ".lock", "log.jsonl", "checkpoints", "x.safetensors")),
    "train texts": (
        ["train", "train_text.py"],
        ("identity.json", ".lock", "log.jsonl", "checkpoints", "config.json", "model.safetensors", "tokenizer.json"),
    ),
}  # fmt: skip
ONE_FILE = ("explain-text", "explain-lm", "report", "convert")  # --out, or the last argument, is what is written
QUICK = ("explain-text", "report", "convert")  # which are run by default
FOLDERS = ("empty folder", "folder", "link to a folder")  # in which a command that is given one may write


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, photos, sentences, a recording and recipes."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    vit = tiny_vit(2)
    tm.models.write_checkpoint(folder / "tiny.safetensors", vit.module, vit.params, vit.preprocessing, list("abcde"))
    for number, name in enumerate(("a/1.png", "b/2.png", "a/3.png", "b/4.png")):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8) // (1 + number)).save(path)
    (folder / "texts.tsv").write_text("a good film\t1\na bad film\t0\n")
    sound = (0.1 * np.sin(np.arange(8000) / 5) * 32767).astype("<i2").tobytes()
    head = b"RIFF" + (36 + len(sound)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    form = b"\1\0\1\0" + (8000).to_bytes(4, "little") + (16000).to_bytes(4, "little") + b"\2\0\x10\0data"
    (folder / "sound.wav").write_bytes(head + form + len(sound).to_bytes(4, "little") + sound)
    for name, recipe in RECIPES.items():
        (folder / name).write_text(f"{IMPORTS}\n{recipe}\n")
    return folder


@pytest.fixture
def inside(world, monkeypatch):
    monkeypatch.chdir(world)
    (world / "cache").mkdir(exist_ok=True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(world / "cache"))
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes integer counts with floats
        yield


def run(*arguments):
    found = CliRunner().invoke(everything, [str(argument) for argument in arguments])
    assert "Traceback" not in found.output, found.output
    assert found.exit_code in (0, 2) and (found.exception is None or isinstance(found.exception, SystemExit))
    return found


def arguments_of(command, out, name):
    given, _ = COMMANDS[command]
    place = out / name if command in ONE_FILE else out
    return [*given, place] if command == "convert" else [*given, "--out", place]


def unchanged(before):
    """What was there is there; a folder may have got more."""
    for place, was in before.items():
        assert there(place).get(place) == was, place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("command", "name"),
    [
        pytest.param(command, name, marks=[] if command in QUICK else pytest.mark.slow)
        for command, (_, names) in COMMANDS.items()
        for name in names
    ],
)
def test_a_command_leaves_what_is_there(command, name, kind, inside, tmp_path):
    out = tmp_path / "out"
    path = out / name if name else out
    path.parent.mkdir(parents=True, exist_ok=True)
    before = {}
    for place in make(kind, path):
        if os.path.lexists(place):
            before |= there(place)
    tries = [[]]
    if (
        "--overwrite" in CliRunner().invoke(everything, [COMMANDS[command][0][0], "--help"]).output
        and kind not in FILES
    ):
        tries.append(["--overwrite"])
    for more in tries:
        found = run(*arguments_of(command, out, name), *more)
        unchanged(before)
        if command in ONE_FILE:
            assert found.exit_code == 2 and "choose another name" in found.output
            assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]
        elif name and not command.startswith("explain"):
            taken = kind in FOLDERS or (name, kind) == (".lock", "empty file")  # such a lock is empty, too
            assert found.exit_code == 2 or taken, found.output


@pytest.mark.parametrize("place", [".", "..", "~", "/", "/dev", "/dev/null", "/dev/stdout", "/dev/shm"])
@pytest.mark.parametrize("command", ONE_FILE)
def test_places_that_are_no_files(command, place, inside, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    here, place = sorted(os.listdir(".")), os.path.expanduser(place)
    assert run(*arguments_of(command, Path(place), "")).exit_code == 2
    assert run(*arguments_of(command, Path(place), ""), "--overwrite").exit_code == 2
    assert sorted(os.listdir(".")) == here and os.path.lexists(place)


def test_a_page_over_a_photo(inside, world):
    """Neither by its name, nor with --overwrite where it is the input."""
    photo = world / "photos/a/1.png"
    before = there(photo)
    given, _ = COMMANDS["report"]
    for out in (photo, world / "photos/b/../a/1.png"):
        assert "was not written by this program" in run(*given, "--out", out).output
        assert "is one of the photos" in run(*given, "--out", out, "--overwrite").output
    assert there(photo) == before


def test_a_figure_is_saved_over_its_own_kind_alone(tmp_path):
    figure = tm.show(np.ones((2, 3), np.float32))
    for kind in KINDS:
        path = tmp_path / kind / "figure.png"
        path.parent.mkdir()
        before = {p: w for place in make(kind, path) if os.path.lexists(place) for p, w in there(place).items()}
        for overwrite in (False, True)[: 1 + (kind not in FILES)]:
            with pytest.raises(InputError, match="choose another name"):
                figure.save(path, overwrite=overwrite)
            unchanged(before)
        if kind in FILES:
            figure.save(path, overwrite=True)
            figure.save(path)  # its own
            assert files.ours(path)


def test_results_over_files_of_others_with_leave(inside, tmp_path):
    """--overwrite replaces files; the folder of records, which is not one, stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.md").write_text("mine")
    given = ["evaluate", "evaluate.py", "--out", out]
    assert (
        "results.md is not a file of this program; choose another --out, or allow it with --ov" in run(*given).output
    )
    (out / "records").mkdir()
    assert "records is not a file of this program" in run(*given, "--overwrite").output
    assert (out / "results.md").read_text() == "mine"
    (out / "records").rmdir()
    assert run(*given, "--overwrite").exit_code == 0
    assert files.ours(out / "results.md")
    (out / "results.md").write_text("mine")
    assert "results.md exists and was not written by this program" in run(*given).output
    assert (out / "results.md").read_text() == "mine"


# ---- disks, clocks and other processes ------------------------------------------------------------------------------


@contextmanager
def mounted(path, options):
    """A small file system at a path, where that can be had."""
    path.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


WRITERS = mostly_slow(COMMANDS, {"report"})


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk(command, inside, tmp_path):
    """One sentence; what was there is whole, and nothing unfinished is left but in the folders of runs."""
    with mounted(tmp_path / "disk", "size=32k") as disk:
        (disk / "mine").write_text("mine")
        (disk / "filling").write_bytes(b"\0" * 24 * 1024)
        found = run(*arguments_of(command, disk / "out" if command not in ONE_FILE else disk, COMMANDS[command][1][0]))
        assert found.exit_code == 2, found.output
        assert "No space left" in found.output or "cannot be written" in found.output
        assert (disk / "mine").read_text() == "mine"
        assert not [p for p in disk.rglob("*") if p.name.endswith(".part")]


@pytest.mark.parametrize("command", WRITERS)
def test_a_read_only_folder(command, inside, tmp_path):
    with mounted(tmp_path / "disk", "size=32k") as disk:
        (disk / "mine").write_text("mine")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        out = disk if command in ONE_FILE else disk / "out"
        found = run(*arguments_of(command, out, COMMANDS[command][1][0]))
        assert found.exit_code == 2 and "Read-only file system" in found.output, found.output


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_takes_no_files(error, tmp_path, monkeypatch):
    """As above, without the right to mount."""
    path = tmp_path / "page.html"
    files.write_text(path, "<!doctype html>" + TAG)

    def fails(*_, **__):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", fails)
        with pytest.raises(InputError, match=f"page.html cannot be written: {os.strerror(error)}; as before"):
            files.write_text(path, "new", "; as before")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fails)
        with pytest.raises(InputError, match=os.strerror(error)):
            files.write_text(path, "new")
    assert path.read_text().endswith(TAG) and [p.name for p in tmp_path.iterdir()] == ["page.html"]


TAG = f'<meta name="generator" content="{files.generator()}">'


def test_mount_points_stay(tmp_path):
    path = tmp_path / "page.html"
    with mounted(path, "size=32k"):
        (path / "mine").write_text("mine")
        for write in (files.write_text, lambda p, t: files.replace(p, lambda part: part.mkdir(), folder=True)):
            with pytest.raises(InputError, match="choose another name"):
                write(path, "new")
        assert (path / "mine").read_text() == "mine"
    mine, file = tmp_path / "mine", tmp_path / "file.html"
    mine.write_text("<!doctype html>" + TAG)
    file.touch()
    subprocess.run(["mount", "--bind", mine, file], check=True)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            files.write_text(file, "new")
    finally:
        subprocess.run(["umount", file], check=True)
    assert mine.read_text().endswith(TAG) and {p.name for p in tmp_path.iterdir()} == {
        "page.html",
        "mine",
        "file.html",
    }


def test_many_writers_of_one_file(tmp_path):
    """Whoever is last, the file is one of theirs, whole, and nothing else is left."""
    path, texts = tmp_path / "page.html", [f"<!doctype html>{TAG}{k}" + "x" * 100_000 for k in range(8)]
    threads = [threading.Thread(target=files.write_text, args=(path, text)) for text in texts for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_two_processes_with_one_folder(inside, world, tmp_path):
    """Explanations get names of their own, results are of one process, and pages are whole."""

    def both(*commands):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        processes = [
            subprocess.Popen([sys.executable, "-m", "tokentm_jax", *map(str, command)], cwd=world, env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in commands
        ]  # fmt: skip
        return [(process.communicate(timeout=300)[0], process.returncode) for process in processes]

    explain = ["explain", "photos/a/1.png", "--checkpoint", "tiny.safetensors", "--out", tmp_path / "maps"]
    ended = both([*explain, "--target", "1"], [*explain, "--target", "2"])
    found = sorted(int(np.load(path)["target"]) for path in (tmp_path / "maps").glob("*.npz"))
    assert found in ([1, 2], [1], [2]) and len(found) == sum(code == 0 for _, code in ended)
    assert all("answers another question" in said for said, code in ended if code)
    run_ = ["evaluate", "evaluate.py", "--out", tmp_path / "run"]
    ended = both(run_, run_)
    assert 0 in (code for _, code in ended) and files.ours(tmp_path / "run/results.json")
    assert all("is being written by another process" in said for said, code in ended if code)
    page = ["report", "photos/a/1.png", "--checkpoint", "tiny.safetensors", "--methods", "rollout", "--out"]
    assert [code for _, code in both([*page, tmp_path / "page.html"], [*page, tmp_path / "page.html"])] == [0, 0]
    assert files.ours(tmp_path / "page.html")
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]


@pytest.mark.slow
def test_a_clock_that_goes_back(inside, tmp_path, monkeypatch):
    """The same results as with one that goes on; a run is taken up where it ended."""
    with monkeypatch.context() as patch:
        ticks = itertools.count(2e9, -3600)
        patch.setattr(time, "time", lambda: next(ticks))
        for number in range(2):
            assert run("evaluate", "evaluate.py", "--out", tmp_path / "back").exit_code == 0
            assert run("dataset", *COMMANDS["dataset"][0][1:], "--out", tmp_path / "maps").exit_code == 0
            assert run("report", tmp_path / "back", "--out", tmp_path / "page.html").exit_code == 0
            found = run("train", "train.py", "--out", tmp_path / "model")
            assert found.exit_code == 0 and ("resumed" in found.output) == bool(number), found.output
    assert run("evaluate", "evaluate.py", "--out", tmp_path / "on").exit_code == 0
    assert (tmp_path / "on/results.json").read_bytes() == (tmp_path / "back/results.json").read_bytes()


def test_the_lock_of_somebody_else_is_not_emptied(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with pytest.raises(InputError, match=r"\.lock is not a file of this program"), claimed(tmp_path, {}, ()):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"
