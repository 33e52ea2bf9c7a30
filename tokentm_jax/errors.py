"""The exception for bad input, and its messages for unknown names and missing packages."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

LONGEST = 900  # characters of a message


def printable(text: object) -> str:
    """A text, such as the name of a file or class, as one line that is safe in any terminal.

    Control characters, line ends and bytes of an unknown encoding become question marks.
    """
    whole = str(text).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "?" for c in whole)


class InputError(ValueError):
    """An input is wrong: a file, a name, a value.

    The message is one sentence with the file or field and the expected value. The command line prints it without a
    traceback and exits with code 2. It is one line (`printable`) of at most `LONGEST` characters.
    """

    def __init__(self, message: object) -> None:
        text = printable(" ".join(str(message).split()))
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 + 5 :]}"
        super().__init__(text)


class Unfit(InputError):
    """A method needs something that the model does not expose."""


def suggest(kind: str, name: object, known: Iterable[str], of: str = "") -> InputError:
    """Error for a name that is not among `known`: "unknown option 'x' of gae; did you mean 'y'?"."""
    names, given = sorted(known), repr(str(name)[:100]) + (f" of {of}" if of else "")
    close = difflib.get_close_matches(str(name)[:100].lower(), names, n=1, cutoff=0.6)
    if close:
        return InputError(f"unknown {kind} {given}; did you mean {close[0]!r}?")
    if len(names) > 12:
        names = [*names[:12], f"... ({len(names)} in all)"]
    return InputError(f"unknown {kind} {given}; known: {', '.join(names) or 'none'}")


def require(package: str, extra: str, what: str) -> Any:
    """An optional package. InputError "{what} needs {package}: pip install 'tokentm-jax[{extra}]'" without it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{what} needs {package}: pip install 'tokentm-jax[{extra}]'") from None
