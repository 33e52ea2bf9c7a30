"""What is written replaces nothing of the user's: the rule of every writer, in the file system itself."""

import json
import os
import stat
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokentm_jax as tm
from tests.conftest import tiny_vit
from tokentm_jax import files
from tokentm_jax.errors import InputError

TEXT = "<p>mine</p>"


def there(path):
    """Everything at and below a path: kind, and content or where a link leads. It waits for no pipe."""
    found = {}
    for place in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]:
        mode = os.lstat(place).st_mode
        content = os.readlink(place) if stat.S_ISLNK(mode) else place.read_bytes() if stat.S_ISREG(mode) else None
        found[place] = stat.S_IFMT(mode), os.lstat(place).st_ino, content
    return found


def make(kind, path):
    """Something of the user's at a path, and what else must stay as it is."""
    mine = path.with_name("mine")
    if kind == "file":
        path.write_text(TEXT)
    elif kind == "empty file":
        path.touch()
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "folder":
        (path / "sub").mkdir(parents=True)
        (path / "sub/a.tex").write_text(TEXT)
    elif kind == "link to a file":
        mine.write_text(TEXT)
        path.symlink_to(mine)
    elif kind == "link to a folder":
        mine.mkdir()
        (mine / "a.tex").write_text(TEXT)
        path.symlink_to(mine)
    elif kind == "dangling link":
        path.symlink_to(mine)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "photo":
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, "PNG")
    return [path, mine]


KINDS = (
    "file", "empty file", "photo", "empty folder", "folder", "link to a file", "link to a folder", "dangling link",
    "pipe",
)  # fmt: skip
FILES = ("file", "empty file", "photo")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_never_replaces_what_is_not_a_file(kind, overwrite, tmp_path):
    path = tmp_path / "page.html"
    places = make(kind, path)
    before = [there(place) for place in places if os.path.lexists(place)]
    called = []

    def write(part):
        called.append(part)
        part.write_text("ours")

    if overwrite and kind in FILES:
        files.replace(path, write, overwrite=True)
        assert path.read_text() == "ours"
        return
    with pytest.raises(InputError, match="choose another name"):
        files.replace(path, write, overwrite=overwrite)
    assert [there(place) for place in places if os.path.lexists(place)] == before
    assert not called  # refused before any work
    assert {p.name for p in tmp_path.iterdir()} <= {"page.html", "mine"}  # and nothing is left behind


@pytest.mark.parametrize("kind", KINDS)
def test_what_appears_while_a_file_is_written_stays(kind, tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(InputError, match="choose another name"):
        files.replace(path, lambda part: (part.write_text("ours"), make(kind, path)))
    assert kind != "file" or path.read_text() == TEXT
    assert kind != "folder" or (path / "sub/a.tex").read_text() == TEXT


@pytest.mark.parametrize("moved", [1, 2])
def test_a_checkpoint_survives_an_interruption_between_its_moves(moved, tmp_path, monkeypatch):
    """Ctrl-C after the old folder was moved aside keeps it; after the new one is there, that one stays."""
    path, moves, move = tmp_path / "model", [], os.replace
    path.mkdir()
    (path / "weights").write_text("old")

    def interrupted(source, target):
        move(source, target)
        moves.append(target)
        if len(moves) == moved:
            raise KeyboardInterrupt

    def write(part):
        part.mkdir()
        (part / "weights").write_text("new")

    monkeypatch.setattr(files, "ours", lambda path: True)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.replace(path, write, folder=True)
    assert (path / "weights").read_text() == ["old", "new"][moved - 1]
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_replaces_neither_files_nor_folders_of_others(kind, tmp_path):
    vit = tiny_vit(1)
    for name, overwrite in (("model", False), ("model", True), ("model.safetensors", False)):
        path = tmp_path / f"in {name} {overwrite}" / name
        path.parent.mkdir(parents=True)
        places = make(kind, path)
        before = [there(place) for place in places if os.path.lexists(place)]
        with pytest.raises(InputError, match="choose another name"):
            tm.models.write_checkpoint(path, vit.module, vit.params, vit.preprocessing, overwrite=overwrite)
        assert [there(place) for place in places if os.path.lexists(place)] == before


def test_a_checkpoint_with_something_else_in_its_depth_stays(tmp_path):
    vit = tiny_vit(1)
    path = tm.models.write_checkpoint(tmp_path / "model", vit.module, vit.params, vit.preprocessing)
    tm.models.write_checkpoint(path, vit.module, vit.params, vit.preprocessing)  # this program's own gives way
    for name in ("params/d/thesis.tex", "params/ocdbt.process_0/d/mine"):
        (path / name).write_text(TEXT)
        before = there(path)
        with pytest.raises(InputError, match="was not written by this program"):
            tm.models.write_checkpoint(path, vit.module, vit.params, vit.preprocessing)
        assert there(path) == before
        (path / name).unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_figures_and_pages_are_known_by_their_metadata(tmp_path):
    """As Matplotlib and Pillow write it; the same formats by others are not."""
    from matplotlib.figure import Figure

    how: dict[str, Any] = {
        "png": lambda mark: {"metadata": {"Software": mark}},
        "svg": lambda mark: {"metadata": {"Creator": mark}},
        "pdf": lambda mark: {"metadata": {"Creator": mark}},
        "jpg": lambda mark: {"pil_kwargs": {"comment": mark}},
    }
    for suffix, given in how.items():
        for question in ("", "0123456789abcdef", "f" * 16):
            Figure().savefig(tmp_path / f"x.{suffix}", **given(files.generator(question)))
            assert files.question_in(tmp_path / f"x.{suffix}") == question
        Figure().savefig(tmp_path / f"x.{suffix}", **given("another program, not tokentm_jax"))
        assert not files.ours(tmp_path / f"x.{suffix}")
    exif = Image.Exif()
    exif[0x131] = files.generator()
    Image.new("RGB", (4, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert files.ours(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    "content",
    [
        "# tokentm_jax\n\nmy notes on <!-- tokentm_jax 1.0 --> marks\n",
        "<!doctype html><p>written by tokentm_jax 1.0</p>",
        json.dumps({"tokens": 1}),
        json.dumps({"run": {"versions": {"jax": "1"}}}),
        json.dumps(["tokentm_jax"]),
        "tokentm_jax 1.0",
        "{",
        "",
    ],
)
def test_texts_of_others_are_not_ours(content, tmp_path):
    path = tmp_path / "file"
    path.write_text(content)
    assert not files.ours(path)
