"""The one exception for bad input, and its wording for unknown names."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given from outside is wrong: a file, a name, a value.

    The message is one sentence that names the file or field and what was expected; the command line prints it
    without a traceback and exits with code 2.
    """


def suggest(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Error for a name that is not among `known`: "unknown model 'x'; did you mean 'y'?"."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    if close:
        return InputError(f"unknown {kind} {name!r}; did you mean {close[0]!r}?")
    if len(names) > 12:
        names = [*names[:12], f"... ({len(names)} in all)"]
    return InputError(f"unknown {kind} {name!r}; known: {', '.join(names) or 'none'}")
