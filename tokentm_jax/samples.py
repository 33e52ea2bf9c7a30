"""Sample data: public files for the project's configs and tables, and their paths on this machine.

A set is searched in the folder of the environment variable `TOKENTM_DATA` (default: `../shared/data`), and then in the
cache folder, into which `tokentm data fetch` writes it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokentm_jax.errors import suggest

VARIABLE, BESIDE = "TOKENTM_DATA", "../shared/data"
ARCHIVE = "https://github.com/{}/archive/{}.zip"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One set."""

    about: str
    licence: str  # of the originals
    origin: str  # OWNER/NAME of a repository on GitHub, or the name of an installed Python package
    version: str  # commit of the repository, or version of the package
    sha256: str  # of the chosen originals, see `tokentm_jax.data.originals`
    originals: int  # bytes of these
    download: int  # approximate bytes of the archive; 0 for an installed package
    files: Mapping[str, str]  # pattern of an original's path -> path of its copy, perhaps in a zip, or a tensor's name
    made: Sequence[str]  # resulting files or folders, as paths inside a data folder
    parts: Mapping[str, str]  # name of a part -> path inside a data folder; "" is the only part or the whole set

    @property
    def address(self) -> str:
        """The public address of the originals."""
        if self.download:
            return ARCHIVE.format(self.origin, self.version)
        return f"the Python package {self.origin} {self.version}"


_FILE = Path(__file__).with_name("samples.json")
SAMPLES = {name: Sample(**fields) for name, fields in json.loads(_FILE.read_text("utf-8")).items()}


def cache() -> Path:
    """The folder of fetched sets; it may be missing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tokentm_jax" / "data"


def folder_of(name: str) -> Path | None:
    """The first data folder with all of a set, or None. Raises InputError for an unknown set."""
    if name not in SAMPLES:
        raise suggest("sample data", name, SAMPLES)
    folders = (Path(os.environ.get(VARIABLE) or BESIDE), cache())
    return next((f for f in folders if all(os.path.lexists(f / path) for path in SAMPLES[name].made)), None)


def sample_data(name: str, part: str = "") -> str:
    """The path of sample data, for a config.

    Args:
      name: of a set: "photos", "masks", "deit_tiny", "cifar10", "sentences", "minilm" or "recordings".
      part: "train" or "test" of "cifar10", "train" or "dev" of "sentences".

    Returns:
      Its path in the first data folder that has the set. If no folder has it, the path after
      `tokentm data fetch NAME`; opening it raises an error with this command.

    Raises:
      InputError: an unknown set or part.
    """
    folder = folder_of(name) or cache()
    parts = SAMPLES[name].parts
    if part not in parts:
        raise suggest("part", part, parts, of=f"the sample data {name!r}")
    return str(folder / parts[part])


def hint(path: str | os.PathLike[str]) -> str:
    """How to get the set of a missing path in the cache folder; "" for every other path."""
    try:
        inside = Path(path).relative_to(cache())
    except ValueError:
        return ""
    for name, sample in SAMPLES.items():
        places = [Path(place) for place in (*sample.made, *sample.parts.values())]
        if any(inside == place or place in inside.parents for place in places) and folder_of(name) is None:
            return f": `tokentm data fetch {name}` fetches it, or {VARIABLE} names a folder that has it"
    return ""
