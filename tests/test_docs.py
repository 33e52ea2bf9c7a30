"""What the README, the documentation and the docstrings show and say.

Python examples are run, page by page, in a folder with a photo `cat.jpg`, labelled `photos`, and a recording
`seven.wav`. Commands are parsed, and those of `RUN` are run. Tables that list what the code has are compared with it.
"""

import base64
import dataclasses
import importlib
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import tokentm_jax as tm
from models.training.__main__ import train
from tokentm_jax.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for path in sorted((ROOT / "tokentm_jax").rglob("*.py")) if ">>> " in path.read_text()]
RUN = {  # commands whose results their pages go on with; the others are parsed
    "tokentm explain cat.jpg --target cat",
    "tokentm dataset photos/ --out maps --methods tokentm,gae",
    "tokentm evaluate configs/perturbation.py:data=cifar10_sample,model=cifar10_distilled --data photos/ --maps maps",
    "tokentm evaluate mine.py --out runs/mine",
    "tokentm evaluate drop.py",
}
SAVED = re.compile(r"Save this as `(\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)
OTHER_PROGRAMS = {"make", "pip", "podman", "pytest", "python", "tfds"}
INLINE = re.compile(r"`((?:tokentm|make|pytest|python) [^`]+)`")
REPOSITORY = "tokentm-jax/tokentm_jax"
FOLDERS = ("configs/", "docs/", "models/", "notebooks/", "tests/")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of the examples."""
    shutil.copy(ROOT / "notebooks" / "chelsea_face.jpg", tmp_path / "cat.jpg")
    photo = Image.open(tmp_path / "cat.jpg").resize((48, 40))
    for number, label in enumerate(("cat", "cat", "dog", "frog")):
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        photo.rotate(20 * number).save(tmp_path / "photos" / label / f"{number}.png")
    with wave.open(str(tmp_path / "seven.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes((8000 * np.sin(np.arange(4000) ** 1.5 / 100)).astype("<i2").tobytes())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def commands(text):
    """The commands of a shell example, a list of words each."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words):
    """The command exists with these options, and so do the files of the repository that it names."""
    for word in words:
        path = re.split("::?", word)[0]  # of a test, of the options of a config
        if path.startswith(FOLDERS) and "*" not in path:
            assert (ROOT / path).exists(), f"{path} does not exist"
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:2]) <= {*targets, "..."}, f"no such target: {words}"
    elif words[:3] == ["python", "-m", "models.training"]:
        train.make_context("train", words[3:])
    elif words[0] != "tokentm":
        assert words[0].rpartition("/")[2] in OTHER_PROGRAMS, f"unknown program: {words}"
    elif words[1:] != ["--help"]:
        command = main.commands[words[1]]
        command.make_context(f"tokentm {words[1]}", words[2:], help_option_names=["-h", "--help"])


def run_shell(example):
    for words in commands(example.parsed):
        try:
            check_command(words)
        except (AssertionError, KeyError, click.UsageError) as error:
            raise AssertionError(f"{example.path}, line {example.line}: {shlex.join(words)}: {error}") from None
        if shlex.join(words) in RUN:
            result = CliRunner().invoke(main, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, result.output


def parameter(page):
    slow = "```python" in page.read_text() or page.name == "report.md"
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("page", [parameter(page) for page in PAGES])
def test_examples_of_a_page(page, folder):
    from tokentm_jax.metrics.tasks import TASKS

    for name, recipe in SAVED.findall(page.read_text()):
        (folder / name).write_text(recipe)
    parsers = [PythonCodeBlockParser(), CodeBlockParser("sh", run_shell), SkipParser()]
    with patch.dict(tm.METHODS), patch.dict(TASKS):  # examples may add rows
        for example in Sybil(parsers).parse(page).examples():
            example.evaluate()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_examples_of_docstrings(source, folder):
    for example in Sybil([DocTestParser()], document_types={".py": PythonDocStringDocument}).parse(source).examples():
        example.evaluate()


def test_commands_within_sentences():
    found = [(page, command) for page in PAGES for command in INLINE.findall(page.read_text())]
    assert len(found) > 20
    for page, command in found:
        words = [word for word in commands(command)[0] if word not in ("...", "PHOTO...")]
        try:
            check_command([word for word in words if not word.endswith("=")])
        except click.MissingParameter:
            pass  # a sentence may name the command alone
        except (AssertionError, KeyError, click.UsageError) as error:
            raise AssertionError(f"{page}: {command}: {error}") from None


def test_links_of_the_readme():
    """Those of the pages are checked when the site is built."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_says_for_whom_it_is():
    for page in (ROOT / "docs").rglob("*.md"):
        if page.name != "index.md":
            title, purpose, *_ = page.read_text().split("\n\n")
            assert title.rpartition("\n")[2].startswith("# "), page
            assert re.fullmatch(r"\*For [^*]{40,}\.\*", purpose), page


def test_claims_that_did_not_hold_elsewhere_are_corrected():
    """By photos that are not part of the project's data: what no page may say, and what is said instead."""
    pages = {path: " ".join(path.read_text().split()) for path in [*PAGES, ROOT / "CHANGELOG.md"]}
    gone = (
        "level with `libra_gae`",
        "else is ahead of it anywhere",
        "better ones than TokenTM",
        "and TokenTM on photos.",
    )
    for path, text in pages.items():
        assert not [claim for claim in gone if claim in text], path
    for name in ("README.md", "docs/explanation/choosing.md", "docs/explanation/measured.md"):
        text = pages[ROOT / name]
        assert "[3.5, 8.6]" in text and "[0.9, 6.5]" in text, name
        assert "ranks, not amounts" in text or "they are not amounts" in text, name
    speed = pages[ROOT / "docs/explanation/speed.md"].partition("Beside PyTorch")[2]
    assert "AMD EPYC" in speed and "Xeon" in speed and "0.74 to 1.22" in speed


@pytest.mark.slow
def test_the_site_searches_and_asks_no_other_server_when_its_pages_are_opened_as_files(tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    pytest.importorskip("mkdocs", reason="needs MkDocs")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=300)
    with api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page, asked = chromium.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "index.html").as_uri())
        page.locator("input.md-search__input").click()
        page.keyboard.type("rollout")
        page.locator(".md-search-result__item", has_text="rollout").first.wait_for(timeout=30_000)
        chromium.close()
    assert asked and all(address.startswith(("file:", "data:", "blob:")) for address in asked)


def test_links_into_the_python_api():
    """To a heading or to a name, whose anchors the site makes after its links are checked."""
    api = (ROOT / "docs/reference/api.md").read_text()
    headings = {re.sub(r"\W+", "-", line.lower()).strip("-") for line in re.findall(r"^#+ (.+)$", api, re.M)}
    found = [("api.md", anchor) for anchor in re.findall(r"\]\(#([^)]+)\)", api)]
    for page in (ROOT / "docs").rglob("*.md"):
        found += [(page.name, anchor) for anchor in re.findall(r"api\.md#([^)]+)\)", page.read_text())]
    assert len(found) > 5
    for page, anchor in found:
        place, _, name = anchor.rpartition(".")
        assert anchor in headings or (place and hasattr(importlib.import_module(place), name)), f"{page}: {anchor}"


def cells(page, header):
    """The rows of the table that begins with `header`, without the backticks of their cells."""
    text = (ROOT / "docs" / page).read_text()
    table = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in table]


def test_the_table_of_methods_is_that_of_the_code():
    rows = {name: rest for name, *rest in cells("reference/methods.md", "| name | source |")}
    assert list(rows) == list(tm.METHODS)
    for name, (source, specific, output, derivative, kind, passes) in rows.items():
        method = tm.METHODS[name]
        assert (specific, output, passes) == ("yes" if method.class_specific else "no", method.output, method.passes)
        if name != "combination":  # which has what its methods have
            said = "yes" if method.differentiable else "no", "float32" if method.float32 else "the model's"
            assert (derivative, kind) == said
        assert method.paper.partition(",")[0] in source
    named = set(re.findall(r"`(\w+)`", (ROOT / "README.md").read_text().split("## What was measured")[0]))
    assert set(tm.METHODS) <= named


def test_every_option_is_documented():
    documented = set()
    methods: list[str] = []
    for names, option, *_ in cells("reference/methods.md", "| method | option |"):
        methods = [name.strip() for name in names.split(",")] if names else methods
        documented |= {(method, option) for method in methods}
    expected = set()
    for name, method in tm.METHODS.items():
        expected |= {(name, option) for option in method.known()}
    assert documented == expected


def test_every_field_and_name_is_documented():
    from models.training.recipe import AmortiseConfig, QuestionTrainConfig, TextTrainConfig, TrainConfig
    from tokentm_jax.configs import EvaluateConfig
    from tokentm_jax.metrics.tasks import TASKS
    from tokentm_jax.runs.leaderboard import LeaderboardConfig

    page = lambda name: (ROOT / "docs" / "reference" / name).read_text()  # noqa: E731
    configs, api = page("configs.md") + page("training.md"), page("api.md")
    kinds = (EvaluateConfig, LeaderboardConfig, TextTrainConfig, TrainConfig, AmortiseConfig, QuestionTrainConfig)
    fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    files = [path.name for folder in ("configs", "models/training/recipes") for path in (ROOT / folder).glob("*.py")]
    missing = [name for name in (*fields, *files) if f"`{name}`" not in configs]
    missing += [name for name in TASKS if f'"{name}"' not in configs]
    rooms = [name for name in tm.__all__ if inspect.ismodule(getattr(tm, name))]
    names = [name for name in tm.__all__ if name not in rooms or name in ("configs", "metrics", "scores", "weights")]
    names += [f"{room}.{name}" for room in ("inputs", "models") for name in getattr(tm, room).__all__]
    missing += [name for name in names if f"::: tokentm_jax.{name}\n" not in api]
    flax = {"parent", "name"}  # fields of every Linen module
    missing += [f.name for f in dataclasses.fields(tm.models.ViT) if f.name not in flax and f"`{f.name}`" not in api]
    missing += [name for name in tm.Trace._fields if f"`{name}`" not in page("capture.md")]
    assert not missing


def test_notebooks_are_executed_small_and_pages():
    import nbformat

    nav = (ROOT / "mkdocs.yml").read_text()
    files = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert {int(file.stem.partition("_")[0]) for file in files} == {*range(1, len(files) + 1)} and len(files) == 10
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        first, *_ = notebook.cells
        assert first.cell_type == "markdown" and "At the end of this page you " in first.source, file
        assert (
            f"colab.research.google.com/github/tokentm-jax/tokentm_jax/blob/main/notebooks/{file.name}" in first.source
        )
        assert "%pip install" in notebook.cells[1].source, file
        assert file.stat().st_size < 200_000, file
        assert f"notebooks/{file.stem}.md" in nav
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), file
        outputs = [output for cell in code for output in cell.outputs]
        assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], file
        texts = [o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs]
        shown = "\n".join(texts)
        assert not re.findall(r"(?:/(?:home|root|tmp|work|usr|opt)/|Warning|Traceback|could not be)", shown), file
        pictures = [content for o in outputs for kind, content in o.get("data", {}).items() if "image/" in kind]
        for picture in pictures:  # sharp on dense screens, too
            assert Image.open(io.BytesIO(base64.b64decode(picture))).width >= 900, file
