"""What the program says of itself: its help, and what the shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokentm_jax.cli.main import main


def test_the_program_without_a_command_prints_its_help_whole():
    bare, asked = (CliRunner().invoke(main, args, prog_name="tokentm", terminal_width=80) for args in ([], ["--help"]))
    assert bare.exit_code == 0 and bare.output == asked.output
    lines = bare.output.splitlines()
    listed = lines[lines.index("Commands:") + 1 :]
    assert [line.split()[0] for line in listed] == sorted({*main.commands} - {"train"})  # a line for each, and
    for line in listed:
        assert line.endswith(".") and not line.endswith("...") and len(line) <= 80  # not one is cut
    of_data = CliRunner().invoke(main, ["data", "--help"], prog_name="tokentm", terminal_width=80).output
    assert of_data.splitlines()[-1] == "  fetch  Download sample data and check their SHA-256."


def completed(*words):
    """What Bash is given for the last of the words."""
    env = {
        "_TOKENTM_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["tokentm", *words]),
        "COMP_CWORD": str(len(words)),
    }
    return [
        line.partition(",")[2] for line in CliRunner().invoke(main, [], prog_name="tokentm", env=env).output.split()
    ]


def test_names_are_completed(tmp_path):
    from tokentm_jax.methods.table import METHODS
    from tokentm_jax.models.architectures import ARCHITECTURES

    assert completed("expl") == ["explain", "explain-audio", "explain-lm", "explain-text"]
    assert completed("dataset", "photos", "--methods", "gae,li") == [f"gae,{m}" for m in METHODS if m.startswith("li")]
    assert completed("explain", "--method", "al") == ["all"]
    assert completed("explain", "--model", "deit_tiny_p") == [n for n in ARCHITECTURES if n.startswith("deit_tiny_p")]
    assert completed("explain", "--model", "cifar10_v") == ["cifar10_vit"]
    assert completed("explain", "--target", "C") == ["cat"]  # of the shipped model
    assert completed("explain-audio", "--class", "7") == ["7"]
    names = tmp_path / "names.txt"
    names.write_text("tabby cat\nTiger cat\nteddy\n")
    own = completed("explain", "--classes", str(names), "--versus", "t")
    assert own == ["tabby_cat", "Tiger_cat", "teddy"]  # one word of the shell, which the command understands
    assert completed("explain", "--checkpoint", str(names), "--target", "t") == []  # it is no checkpoint
    assert completed("data", "fetch", "m") == ["masks", "minilm"]
    assert completed("explain", "ph") == ["ph"]  # a file: Bash itself looks for it


def test_underscores_are_spaces_in_the_name_of_a_class():
    from tokentm_jax import InputError
    from tokentm_jax.inputs.images import HALF, Preprocessing
    from tokentm_jax.models import build
    from tokentm_jax.models.loading import Model

    module = build(dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5))
    names = ("ant", "tabby cat", "a_b", "a b", "fox")
    vit = Model(module, {}, Preprocessing((16, 16), 1.0, "bilinear", **HALF), names, "tiny")
    assert vit.class_index("Tabby_Cat") == 1
    assert (vit.class_index("a_b"), vit.class_index("a b")) == (2, 3)  # the exact name comes first
    with pytest.raises(InputError, match="unknown class"):
        vit.class_index("tabbycat")


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs Bash")
def test_the_documented_line_installs_completion(tmp_path):
    page = (Path(__file__).resolve().parent.parent / "docs/reference/command-line.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("eval ")]
    program = tmp_path / "tokentm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from tokentm_jax.__main__ import run; run()" "$@"\n')
    program.chmod(0o755)
    script = f"{line}\nCOMP_WORDS=(tokentm data fetch mi); COMP_CWORD=3\n_tokentm_completion tokentm\necho $COMPREPLY"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["minilm"], done.stderr
