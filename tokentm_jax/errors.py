"""The one exception for bad input, and its wording for unknown names."""

import difflib
from collections.abc import Iterable

LONGEST = 900  # characters of a message


class InputError(ValueError):
    """Something given from outside is wrong: a file, a name, a value.

    The message is one sentence that names the file or field and what was expected; the command line prints it
    without a traceback and exits with code 2. It is one line of at most `LONGEST` characters that any terminal can
    show, whatever the names of files and classes in it hold.
    """

    def __init__(self, message: object) -> None:
        text = " ".join(str(message).encode("utf-8", "replace").decode().split())
        text = "".join(c if c.isprintable() else "?" for c in text)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 + 5 :]}"
        super().__init__(text)


def suggest(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Error for a name that is not among `known`: "unknown model 'x'; did you mean 'y'?"."""
    names, given = sorted(known), str(name)[:100]
    close = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.6)
    if close:
        return InputError(f"unknown {kind} {given!r}; did you mean {close[0]!r}?")
    if len(names) > 12:
        names = [*names[:12], f"... ({len(names)} in all)"]
    return InputError(f"unknown {kind} {given!r}; known: {', '.join(names) or 'none'}")
