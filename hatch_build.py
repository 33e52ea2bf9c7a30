"""Metadata of the package: the README with absolute addresses, since PyPI shows it without the files beside it."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute(text: str, address: str) -> str:
    """Markdown whose relative links lead to a GitHub repository, and whose relative pictures come from there.

    Args:
      text: Markdown.
      address: of the repository, such as `https://github.com/owner/name`.

    Returns:
      The text with `address` in every relative link and picture; links within the page stay.
    """
    raw = address.replace("github.com", "raw.githubusercontent.com") + "/main/"
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\g<1>{raw}", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\g<1>{address}/blob/main/", text)


class ReadmeHook(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        readme = absolute(text, metadata["urls"]["Source"])
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
