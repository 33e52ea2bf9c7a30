"""Names of the files that `tokentm explain` writes, of which none is a user's or the answer to another question."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokentm_jax.errors import InputError
from tokentm_jax.files import question_in
from tokentm_jax.identity import digest


def question_of(given: Sequence[Path | str], question: str) -> str:
    """The digest by which a file is known to answer a question about these photos, recordings or texts."""
    places = [os.path.realpath(g) if isinstance(g, Path) and "\0" not in str(g) else str(g) for g in given]
    return digest(places, question)


def output_names(
    given: Sequence[Path | str], out: Path, suffixes: Sequence[str] = (".png", ".npz"), question: str = ""
) -> dict[int, str]:
    """A file name without suffix for each sample by its place: that of the photo or recording, with a number where two
    would meet, or where a file of others or the answer to another question is; of a text "text" with a number."""
    stems = [_cut(each.stem) if isinstance(each, Path) else "" for each in given]
    own = {stem.lower() for stem in stems}  # file systems that ignore case would join them
    inputs = _real(given)
    used: set[str] = set()
    names: dict[int, str] = {}
    for place, (each, stem) in enumerate(zip(given, stems, strict=True)):
        answer = question_of([each], question)
        for number in itertools.count(1):
            name = f"{stem or 'text'}-{number}" if number > 1 or not isinstance(each, Path) else stem
            taken = name.lower() in used or (number > 1 and name.lower() in own)
            if not taken and all(_may_write(out / f"{name}{suffix}", inputs, answer) for suffix in suffixes):
                break
        used.add(name.lower())
        names[place] = name
    return names


def sheet_names(
    batches: Sequence[Sequence[Path | str]], out: Path, suffix: str, question: str, stem: str = "sheet"
) -> list[str]:
    """A file name without suffix for what compares the samples of each batch, as `output_names`."""
    inputs = _real(itertools.chain(*batches))
    numbered = (f"{stem}-{i}" for i in itertools.count(1))
    if len(batches) == 1:
        numbered = itertools.chain([stem], itertools.islice(numbered, 1, None))
    return [
        next(name for name in numbered if _may_write(out / f"{name}{suffix}", inputs, question_of(batch, question)))
        for batch in batches
    ]


def _cut(stem: str) -> str:
    """The first 150 bytes of a name, in whole characters: a suffix, a number and a method's name need room too."""
    while len(os.fsencode(stem)) > 150:
        stem = stem[:-1]
    return stem


def _real(given: Iterable[Path | str]) -> set[str]:
    """Where paths lead; those that lead nowhere are left out."""
    found = set()
    for path in (each for each in given if isinstance(each, Path)):
        with contextlib.suppress(OSError, ValueError):  # a name too long, or with a NUL
            found.add(os.path.realpath(path))
    return found


def _may_write(file: Path, photos: set[str], question: str) -> bool:
    """Whether a file is not there, or is this program's answer to the question and nobody asked to explain it."""
    if not os.path.lexists(file):
        return True
    return question_in(file) == question and os.path.realpath(file) not in photos


def require_free(file: Path, question: str) -> None:
    """InputError where another process has written a file since its name was chosen."""
    if not _may_write(file, set(), question):
        raise InputError(f"{file} is there by now, and answers another question: run the same command again")
