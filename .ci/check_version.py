"""Is a tag the version of the package, in every file that names it? One line for each file that disagrees.

python .ci/check_version.py v0.2.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = {  # file: where it names the version of a release
    "tokentm_jax/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    ".zenodo.json": r'^  "version": "(.+)",$',
    "CHANGELOG.md": r"^## (\d\S+) \(\d{4}-\d\d-\d\d\)$",  # the latest release
}


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """A sentence for each file whose version is not that of the tag, and for release notes that are missing."""
    version = tag.removeprefix("v")
    found = []
    for name, pattern in PLACES.items():
        match = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        if match is None or match[1] != version:
            found.append(f"{name} names {match[1] if match else 'no version'}, not {version}")
    if not (root / f"docs/releases/{version}.md").exists():
        found.append(f"docs/releases/{version}.md does not exist")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1])) or 0)
