"""What MkDocs does beside its plugins: equations become MathML, the help of the commands becomes a page, and so does
every notebook, as it was executed. The colours and the type are those of the package's own pages.

MathML is made when the site is built, so that a page needs neither JavaScript nor another server to show it.
"""

import html
import io
import re
from pathlib import Path

import click
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter
from PIL import Image, ImageOps

from tokentm_jax.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("methods.jpg",)  # of notebooks/
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]+)\)")  # its picture lies on another server
# What pymdownx.arithmatex makes of $...$ and of $$...$$.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    for name in PICTURES:
        files.append(File.generated(config, f"images/{name}", abs_src_path=str(ROOT / "notebooks" / name)))
    look = ROOT / "tokentm_jax" / "cli" / "page" / "look.css"
    files.append(File.generated(config, "look.css", abs_src_path=str(look)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, content in _notebook(path):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def _notebook(path):
    """A notebook as a page, and its pictures: name and content of each."""
    place = {"unique_key": path.stem, "output_files_dir": path.stem}
    text, resources = MarkdownExporter().from_filename(str(path), resources=place)
    text = BADGE.sub(r"[Open this notebook in Colab](\1)", text)
    text = text.replace("](../docs/", "](../").replace("![jpeg](", "![What the cell drew](")
    pictures = resources["outputs"]
    covers = [(f"{path.stem}/cover.jpg", _cover(list(pictures.values())[-1]))] if pictures else []
    return [(f"{path.stem}.md", text.replace("![png](", "![What the cell drew](")), *pictures.items(), *covers]


def _cover(content):
    """A notebook's last picture, for the gallery: 480 x 270 pixels."""
    picture = ImageOps.pad(Image.open(io.BytesIO(content)).convert("RGB"), (480, 270), color="white")
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def on_page_markdown(markdown, **_):
    return re.sub(r"^::: commands$", lambda _: "\n\n".join(_helps()), markdown, flags=re.MULTILINE)


def on_page_content(content, **_):
    return EQUATION.sub(_mathml, content)


def _helps():
    """A section of Markdown for each command: what `--help` prints. (mkdocs-click loses <names> and examples.)"""
    commands = dict(main.commands)
    for name, group in main.commands.items():
        commands |= {f"{name} {own}": command for own, command in getattr(group, "commands", {}).items()}
    for name, command in sorted(commands.items()):
        context = click.Context(command, info_name=f"tokentm {name}", max_content_width=88, terminal_width=88)
        context.help_option_names = ["-h", "--help"]
        yield f"## tokentm {name}\n\n```text\n{command.get_help(context)}\n```"


def _mathml(found):
    tag, latex = found[1], html.unescape(found[2]).strip()
    shown = convert(latex, display="block" if tag == "div" else "inline")
    return f'<{tag} class="equation">{shown}</{tag}>'
