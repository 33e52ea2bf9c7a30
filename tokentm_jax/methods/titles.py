"""Titles of the methods on pages, of `titles.toml`: a readable name, and one plain sentence."""

import tomllib
from pathlib import Path
from typing import NamedTuple

# By what a model takes: the default of the commands (docs/explanation/choosing.md)
RECOMMENDED = {
    "photo": "tokentm_mix",
    "recording": "tokentm_mix",
    "text": "attn_lrp",
    "photo with a question": "attn_lrp",
}
_TITLES: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("titles.toml").read_text(encoding="utf-8"))


class Title(NamedTuple):
    """The name of a method in words, and what it computes in one sentence."""

    name: str
    sentence: str


def title_of(method: str) -> Title:
    """The title of a method of the table; its name in words where it has none."""
    return Title(*_TITLES.get(method, (method.replace("_", " "), "")))
