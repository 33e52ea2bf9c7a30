"""The files that a public repository has: workflows, metadata, rules."""

import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

import tokentm_jax as tm

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://github.com/tokentm-jax/tokentm_jax"
PYTHONS = ["3.11", "3.12", "3.13"]
MAKEFILE = (ROOT / "Makefile").read_text()


def module(path):
    """A Python file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def workflow(name):
    content = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    content["on"] = content.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return content


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / ".github/workflows").glob("*")))
def test_workflows_run_commands_that_exist(file):
    content = workflow(file)
    assert {"name", "on", "permissions", "jobs"} <= set(content)
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for name, job in content["jobs"].items():
        assert job["runs-on"] and job["timeout-minutes"], name
        chosen = [row["target"] for row in job.get("strategy", {}).get("matrix", {}).get("include", [])]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            command, *words = step.get("run", "pip").replace("${{ matrix.target }}", " ".join(chosen)).split()
            if command == "make":
                assert {word for word in words if "=" not in word} <= targets, step
            elif command == "python":
                assert (ROOT / words[0]).exists(), step
            elif command.startswith(".ci/"):
                assert (ROOT / command).stat().st_mode & 0o100, step


def test_every_python_is_tested():
    jobs = workflow("ci.yml")["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == PYTHONS
    assert jobs["everything"]["strategy"]["matrix"]["python"] == PYTHONS
    assert {row["target"] for row in jobs["versions"]["strategy"]["matrix"]["include"]} == {"lowest", "newest"}
    named = [line.rpartition(" ")[2] for line in project()["classifiers"] if "Python :: 3." in line]
    assert named == PYTHONS
    assert project()["requires-python"] == ">=3.11,<3.14"


def test_a_release_is_published_for_the_tag_of_its_version():
    publish = workflow("publish.yml")
    assert publish["on"] == {"push": {"tags": ["v*"]}}
    build, upload = publish["jobs"]["build"], publish["jobs"]["publish"]
    assert any("check_version.py" in step.get("run", "") for step in build["steps"])
    assert upload["needs"] == "build" and upload["permissions"] == {"id-token": "write"}
    assert "password" not in (ROOT / ".github/workflows/publish.yml").read_text().replace("stored password", "")


@pytest.fixture
def check_version():
    return module(ROOT / ".ci" / "check_version.py")


def test_the_tag_is_compared_with_every_file(check_version, tmp_path):
    assert check_version.problems(f"v{tm.__version__}") == []
    other = check_version.problems("v9.9.9")
    for name in (*check_version.PLACES, "docs/releases/9.9.9.md"):
        assert any(line.startswith(name) for line in other), name
    for name in check_version.PLACES:  # one file that was forgotten
        copy = tmp_path / name.replace("/", "-")
        for place in (*check_version.PLACES, f"docs/releases/{tm.__version__}.md"):
            (copy / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / place, copy / place)
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace(tm.__version__, "0.0.1"))
        assert [line.partition(" ")[0] for line in check_version.problems(f"v{tm.__version__}", copy)] == [name]


def test_addresses_are_those_of_one_repository():
    urls = project()["urls"]
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(urls)
    assert urls["Source"] == ADDRESS and urls["Issues"] == f"{ADDRESS}/issues"
    pages = ["README.md", "SECURITY.md", "CITATION.cff", "mkdocs.yml", ".zenodo.json", ".github/SUPPORT.md"]
    for page in pages:
        for owner, name in re.findall(r"github\.com/([\w-]+)/([\w-]*tokentm[\w-]*)", (ROOT / page).read_text()):
            assert f"https://github.com/{owner}/{name}" == ADDRESS, page


def test_read_the_docs_and_zenodo():
    docs = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    assert docs["version"] == 2 and docs["mkdocs"] == {"configuration": "mkdocs.yml", "fail_on_warning": True}
    assert docs["build"]["tools"]["python"] in PYTHONS
    zenodo = json.loads((ROOT / ".zenodo.json").read_text())
    assert zenodo["license"] == project()["license"] and zenodo["version"] == tm.__version__
    for name in ("CODE_OF_CONDUCT.md", "SECURITY.md", ".github/SUPPORT.md"):
        assert len((ROOT / name).read_text().split()) > 50, name


def test_the_wheel_has_the_shipped_models_and_no_training():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = [*(ROOT / "models").iterdir(), *(ROOT / "models/explainers").iterdir()]
    others = ("training", "explainers", "__pycache__")
    shipped = {str(path.relative_to(ROOT)) for path in files if path.name not in others}
    assert build["packages"] == ["tokentm_jax"] and build["force-include"].keys() == shipped


def test_the_readme_on_pypi_has_absolute_addresses():
    pytest.importorskip("hatchling")
    hook = module(ROOT / "hatch_build.py")
    text = "[a](docs/a.md#b) ![p](x/p.jpg) [![i](https://e.org/i.svg)](LICENSE) [c](#c) [d](https://e.org)"
    raw = ADDRESS.replace("github.com", "raw.githubusercontent.com")
    assert hook.absolute(text, ADDRESS) == (
        f"[a]({ADDRESS}/blob/main/docs/a.md#b) ![p]({raw}/main/x/p.jpg) "
        f"[![i](https://e.org/i.svg)]({ADDRESS}/blob/main/LICENSE) [c](#c) [d](https://e.org)"
    )
    metadata = {"urls": project()["urls"]}
    hook.ReadmeHook(str(ROOT), {}).update(metadata)
    assert metadata["readme"]["content-type"] == "text/markdown"
    targets = re.findall(r"\]\(([^)]+)\)", metadata["readme"]["text"])
    assert len(targets) > 20 and all(target.startswith("https://") for target in targets)
    assert "readme" in project()["dynamic"]
