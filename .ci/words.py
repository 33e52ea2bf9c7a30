"""Idioms that are hard to read for engineers with English as a second language: one line for each, with a replacement.

python .ci/words.py
"""

import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", ".github", "configs", "docs", "models", "notebooks", "tokentm_jax")
DEEP = ("docs",)  # with their folders
IDIOMS = {  # a regular expression, in which a space is any white space: what to write
    r"yardsticks?": "metric",
    r"in place of": "instead of",
    r"but for": "except",
    r"(?<!length.)alone": "only, or by itself",
    r"so man(y|ieth)": "N, or the n-th",
    r"says|tells": "specifies, states, reports, shows",
    r"(tell|told) (apart|from)": "distinguish, or: nearly tie",
    r"of (one's|its|their) own": "custom, separate, or nothing",
    r"stands? (in|beside|behind|between|there)": "is in, is next to, replaces",
    r"(puts?|is|are|was|were|comes?) (far |a little |slightly )?(ahead|behind)": "is better than, is worse than",
    r"ahead of (it|them|all|the|every|noise|TokenTM|GAE)": "better than",
    r"(is|are) level": "ties with",
    r"(six|seven|twelve|all|every|these|those|published|known|best|quoted) figures?": "metrics, numbers",
    r"(take|takes|taken|taking|took) [\w ]{0,20}away": "remove",
    r"(pixels?|patch|patches|words?|tokens?|window) (go|goes|have gone)": "are removed",
    r"(hears?|heard)": "receives",
    r"(model|teacher|student|head) (sees?|hears?)": "receives, reads",
    r"(is|are|was) (?-i:none)": "is not a ..., is missing",
    r"there (is|are) no \w+ (that|who)": "no ...",
    r"(can|and|for|to|of|by|so) who": "users who",
    r"by what (it|they) shows?": "depending on what it exposes",
    r"can(not)? be had": "is available",
    r"go(es)? on where": "resumes where",
    r"wants": "needs",
    r"speaks? (for|against)": "supports, is against",
    r"twins?": "version, counterpart",
    r"anew": "again",
    r"without a word": "silently",
    r"are dear": "are expensive",
}


def prose(path: Path) -> str:
    """The words of a file that people read, each on its line of the file: no code, no names in backticks."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        kept = {json.dumps(line, ensure_ascii=False) for cell in cells for line in cell["source"]}
        text = "\n".join(line if line.strip().rstrip(",") in kept else "" for line in text.split("\n"))
    elif path.suffix == ".py":
        lines = [""] * (text.count("\n") + 2)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if tokenize.tok_name[token.type] in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
                for number, line in enumerate(token.string.split("\n"), token.start[0]):
                    lines[number - 1] += f" {line.lstrip(' #')}"
        text = "\n".join(lines)
    elif path.name == "CHANGELOG.md":
        text = re.split(r"^## \d", text, maxsplit=1, flags=re.MULTILINE)[0]  # what is released stays as it was
    text = re.sub(r"^( *```).*?^\1", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "``", text)


def problems(path: Path, name: str) -> Iterator[str]:
    text = prose(path)
    for idiom, instead in IDIOMS.items():
        pattern = rf"\b({idiom})\b".replace(" ", r"\s+")
        for found in re.finditer(pattern, text, re.IGNORECASE):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{name}:{line}: '{' '.join(found[0].split())}': write {instead}"


def files(root: Path = ROOT) -> list[Path]:
    found = [path for folder in FOLDERS for path in (root / folder).glob("**/*" if folder in DEEP else "*")]
    return sorted(path for path in found if path.suffix in (".md", ".py", ".ipynb"))


if __name__ == "__main__":
    lines = [line for path in files() for line in problems(path, str(path.relative_to(ROOT)))]
    sys.exit("\n".join(lines) or 0)
