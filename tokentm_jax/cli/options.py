"""What the commands share: kinds of arguments, options as KEY=VALUE, the output folder, the start of JAX."""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tokentm_jax.errors import InputError, suggest
from tokentm_jax.files import reason, require_ours

try:
    import resource
except ImportError:  # on Windows
    resource = None

MODELS_HELP = (
    "Timm name, shipped model, folder or hf-hub:OWNER/NAME (`tokentm models`); default: the checkpoint's own."
)


class Given(click.ParamType):
    """A text, or the path that it names, that is not empty: an empty path would be the current folder."""

    def __init__(self, kind: type[str] | type[Path]) -> None:
        self.kind = kind
        self.name = "path" if kind is Path else "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        if not str(value).strip() or "\0" in str(value):
            self.fail("must be a name that a file can have.", param, ctx)
        return self.kind(value)


PATH, TEXT = Given(Path), Given(str)
class_names = click.option("--classes", type=PATH, help="Class names: .json, or .txt with one per line.")
may_overwrite = click.option(
    "--overwrite", is_flag=True, help="Also replace files that this program did not write; folders never."
)
mixed_precision = click.option(
    "--mixed-precision", is_flag=True, help="Multiply in bfloat16 and sum in float32: faster on recent processors."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")


def changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that the command line changes; a path becomes its text."""
    known = {name: value for name, value in given.items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in known.items()}


def names_of(text: str) -> list[str]:
    """The names in "a, b, c", each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def methods_of(text: str) -> list[str]:
    """The methods in "a, b, c", or all of them for "all". Raises InputError for one that does not exist."""
    from tokentm_jax.methods.table import METHODS

    names = list(METHODS) if text == "all" else names_of(text)
    for name in names:
        if name not in METHODS:
            raise suggest("method", name, METHODS)
    return names


def parse_options(texts: Sequence[str]) -> dict[str, bool | int | float | str | None]:
    """The options by name, from KEY=VALUE each. Raises InputError for a text of another form and for a second one of
    a name."""
    options: dict[str, bool | int | float | str | None] = {}
    for key, value in map(parse_option, texts):
        if key in options:
            raise InputError(f"the option {key!r} is given twice")
        options[key] = value
    return options


def parse_option(text: str) -> tuple[str, bool | int | float | str | None]:
    """ "KEY=VALUE" -> key and the value as bool, int, float, None or else text."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise InputError(f"an option is given as KEY=VALUE, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return key, words[value.lower()]
    if re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        return key, int(value)
    if re.fullmatch(r"[+-]?([0-9]{1,18}\.?[0-9]{0,30}|\.[0-9]{1,30})(e[+-]?[0-9]{1,2})?", value, re.IGNORECASE):
        return key, float(value)
    return key, value


def require_place(out: Path, overwrite: bool) -> None:
    """InputError where a page cannot be written: before the work, and not after it."""
    require_ours(out, overwrite)
    if not out.parent.is_dir():
        raise InputError(f"the page {out} cannot be written: its folder does not exist")


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be written: {reason(error)}") from None


LEAST_ADDRESSES = 2**31  # bytes: with less, XLA ends the process while it compiles
SHARES = 4  # of a batch on a CPU at most: each has a copy of the parameters


def start_jax(batch_size: int | None = None) -> None:
    """Keep compiled programs between runs where that is possible, and raise InputError where JAX finds no device or
    the process may use too few addresses.

    With the size of batches that are spread over all devices, a CPU becomes several ones, as cores allow, unless JAX
    has been told how many: a batch in shares is computed faster than one that all cores work on.
    """
    import jax

    from tokentm_jax.inputs.decoding import cores
    from tokentm_jax.models.kept import keep_programs

    if resource is not None and 0 <= (most := resource.getrlimit(resource.RLIMIT_AS)[0]) < LEAST_ADDRESSES:
        needed = LEAST_ADDRESSES // 2**20
        raise InputError(f"this process may use {most // 2**20} MiB of addresses (ulimit -v), and JAX needs {needed}")
    flags = os.environ.get("XLA_FLAGS", "")
    told = jax.config.values["jax_num_cpu_devices"] > 0 or "host_platform_device_count" in flags
    if batch_size is not None and not told:
        most = min(SHARES, cores())
        with suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
    keep_programs()
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # that of a known platform that is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(f"JAX finds no device with JAX_PLATFORMS={platforms!r} ({reason(error)})") from None
