"""What MkDocs does beside its plugins: equations become MathML, and pictures of the notebooks are pages' files, too.

MathML is made when the site is built, so that a page needs neither JavaScript nor another server to show it.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("cat.jpg", "espresso.jpg", "methods.jpg")  # of notebooks/, where the README shows them, too
# What pymdownx.arithmatex makes of $...$ and of $$...$$.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    for name in PICTURES:
        files.append(File.generated(config, f"images/{name}", abs_src_path=str(ROOT / "notebooks" / name)))
    return files


def on_page_content(content, **_):
    return EQUATION.sub(_mathml, content)


def _mathml(found):
    tag, latex = found[1], html.unescape(found[2]).strip()
    shown = convert(latex, display="block" if tag == "div" else "inline")
    return f'<{tag} class="equation">{shown}</{tag}>'
