"""Values from outside against the type annotations they must meet: options, recipes, configs.

The annotation is the one place that says what a value may be: `Literal["mean", "max"]`, `int`,
`Annotated[int, Ge(1)]` (of `annotated_types`). pydantic does the checking, strictly: a bool is no number, a text is
no list; a whole number is accepted for a float, and NumPy's scalars count as Python's.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, get_type_hints

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tokentm_jax.errors import InputError

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, revalidate_instances="always")
_SHOWN = 80  # characters of a wrong value


@functools.lru_cache(maxsize=512)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)


def checked(where: str, annotation: Any, value: Any) -> Any:
    """The value, NumPy scalars as Python's. InputError "{where} must be ..., got ..." for one of another type."""
    value = _plain(value)
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        inside = "".join(f"[{part!r}]" for part in first["loc"] if isinstance(part, int) or isinstance(value, Mapping))
        start, _, expected = first["msg"].partition("Input should be ")
        fault = f"is wrong ({start})" if start else f"must be {expected}"
        raise InputError(f"{where}{inside} {fault}, got {_shown(value)}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None


def check_fields(config: Any, where: str) -> Any:
    """A dataclass whose every field meets its annotation. InputError "{where}: 'field' must be ..., got ..."."""
    hints = get_type_hints(type(config), include_extras=True)
    fields = {
        field.name: checked(f"{where}: {field.name!r}", hints[field.name], getattr(config, field.name))
        for field in dataclasses.fields(config)
    }
    return dataclasses.replace(config, **fields)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of over 4,300 digits; lists in lists
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
