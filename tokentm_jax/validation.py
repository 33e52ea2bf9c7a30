"""Checks of untrusted values by type annotations: options, recipes, configs, JSON.

Only the annotation specifies the allowed values: `Literal["mean", "max"]`, `int`, `Annotated[int, Ge(1)]` (of
`annotated_types`), a TypedDict. pydantic checks them strictly: a bool is not a number, a text is not a list. A whole
number is accepted as a float, and NumPy's scalars as Python's.
"""

import dataclasses
import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import numpy as np
from annotated_types import Len
from pydantic import AfterValidator, ConfigDict, FailFast, TypeAdapter, ValidationError, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import is_typeddict

from tokentm_jax.errors import InputError, suggest

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, revalidate_instances="always")
_SHOWN = 80  # characters of a wrong value
_LONGEST_NAME = 100  # bytes


def _plain_name(name: str) -> str:
    bad = name in ("", ".", "..") or any(c in "/\\:" or not c.isprintable() for c in name)
    if bad or len(name.encode(errors="replace")) > _LONGEST_NAME:
        expected = "Input should be a plain name (of at most {most} bytes, without / \\ : and such)"
        raise PydanticCustomError("name", expected, {"most": _LONGEST_NAME})
    return name


Name = Annotated[str, AfterValidator(_plain_name)]  # of a file or folder; never a path
Text = Annotated[str, Len(1, 1000)]


class _FailFast(FailFast):
    """Stop at the first fault of a list; hashable, unlike pydantic's class."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


_FIRST_FAULT = _FailFast()


def lists_of(kind: Any, *lengths: int) -> Any:
    """The annotation of an array [n, *lengths] as lists in lists."""
    for length in reversed(lengths):
        kind = Annotated[list[kind], Len(length, length), _FIRST_FAULT]
    return Annotated[list[kind], _FIRST_FAULT]


@functools.lru_cache(maxsize=512)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    if is_typeddict(annotation):  # takes no config as an argument
        return TypeAdapter(with_config(_STRICT)(annotation))
    return TypeAdapter(annotation, config=_STRICT)


def checked(where: str, annotation: Any, value: Any) -> Any:
    """The value, NumPy scalars as Python's. InputError "{where} must be ..., got ..." for another type."""
    value = _plain(value)
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{where}{_fault(error, value)}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None


@functools.lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def check_fields(config: Any, where: str) -> Any:
    """The dataclass, with every field checked by its annotation, and NumPy scalars as Python's.

    InputError "{where}: 'field' must be ..., got ...".
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value = checked(f"{where}: {field.name!r}", hints[field.name], getattr(config, field.name))
        object.__setattr__(config, field.name, value)  # frozen, and perhaps in its `__post_init__`
    return config


def read_fields(kind: Callable[..., Any], values: Any, where: str) -> Any:
    """A dataclass from JSON values, whose lists become tuples. InputError for a field that is unknown or missing."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be a mapping of field names, got {type(values).__name__}")
    fields = {parameter.name: parameter for parameter in inspect.signature(kind).parameters.values()}
    for name in values:
        if name not in fields:
            raise suggest("field", name, fields, of=where)
    for name, parameter in fields.items():
        if name not in values and parameter.default is parameter.empty:
            raise InputError(f"{where}: {name!r} is missing")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def options_of(kind: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of every option: a function's keyword-only arguments, or a dataclass's fields."""
    hints, every = get_type_hints(kind, include_extras=True), dataclasses.is_dataclass(kind)
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if every or p.kind is p.KEYWORD_ONLY}


def check_options(where: str, known: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, each checked by its annotation in `known` (of `options_of`).

    InputError "unknown option 'name' of {where}; ..." or "option 'name' of {where} must be ..., got ...".
    """
    for name in options:
        if name not in known:
            raise suggest("option", name, known, of=where)
    return {name: checked(f"option {name!r} of {where}", known[name], value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _fault(error: ValidationError, value: Any) -> str:
    """The position inside the value, the expected value and the value there."""
    errors = error.errors(include_url=False, include_input=False)
    inside, wrong, rest = _find(value, errors[0]["loc"])
    if errors[0]["type"] == "missing":
        return f"{inside} lacks {rest[0]!r}"
    # Each branch of a union fails separately, at the same position.
    messages = [e["msg"] for e in errors if _find(value, e["loc"])[0] == inside]
    expected = [message.removeprefix("Input should be ") for message in dict.fromkeys(messages)]
    fault = f"must be {' or '.join(expected)}" if messages[0] != expected[0] else f"is wrong ({expected[0]})"
    return f"{inside} {fault}, got {_shown(wrong)}"


def _find(value: Any, place: Sequence[Any]) -> tuple[str, Any, Sequence[Any]]:
    """Follow a position: its text, the value there, and the rest that leads nowhere, such as the branch of a union."""
    inside = ""
    for number, part in enumerate(place):
        if dataclasses.is_dataclass(value) and hasattr(value, str(part)):
            value = getattr(value, str(part))
        elif isinstance(value, Mapping | list | tuple):
            try:
                value = value[part]
            except (LookupError, TypeError):
                return inside, value, place[number:]
        else:
            return inside, value, place[number:]
        inside += f"[{part!r}]"
    return inside, value, ()


def _shown(value: Any) -> str:
    """At most `_SHOWN` characters of a value of any size, depth and kind."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN
    try:
        text = short.repr(value)
    except Exception:  # a number with too many digits, an object whose `repr` fails
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
