"""The check of retired idioms, `.ci/words.py`."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_an_idiom_is_found_with_its_file_line_and_replacement(tmp_path):
    spec = importlib.util.spec_from_file_location("words", ROOT / ".ci" / "words.py")
    assert spec is not None and spec.loader is not None
    words = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(words)
    written = {
        "page.md": "# A page\n\n```python\nx = 'yardstick'\n```\n\n`in place of`, the mean in\nplace of the sum.\n",
        "code.py": '"""A mean."""\n\n\ndef mean():  # in place\n    # of the sum\n    return "instead"\n',
        "notebook.ipynb": json.dumps(
            {"cells": [{"cell_type": kind, "source": [f"{kind} in place of\n"]} for kind in ("code", "markdown")]},
            indent=1,
        ),
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    found = [line for name in written for line in words.problems(tmp_path / name, name)]
    assert found == [
        "page.md:7: 'in place of': write instead of",
        "code.py:4: 'in place of': write instead of",
        "notebook.ipynb:12: 'in place of': write instead of",
    ]
