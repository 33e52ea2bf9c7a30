"""Functions compared by their code: a lambda that is written in a call is a new object each time, with the same code.

jax compiles a program again for a function that it does not know. `ByCode` is equal to another one where their code
and all values that they read from outside are equal, and immutable. The values are noted when it is made, so a later
change of a variable makes another key, and a new program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from jax import Array

CONSTANT = (int, float, complex, str, bytes, type(None), type(Ellipsis))
LIBRARIES = {"jax", "jaxlib", "numpy", "math", "builtins", "functools", "operator", "tokentm_jax"}  # do not change
DEPTH = 3  # functions that call functions


@dataclasses.dataclass(frozen=True)
class ByCode:
    """A function with its `key`; only keys are compared."""

    function: Callable[..., Any] = dataclasses.field(compare=False)
    key: tuple[Any, ...]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def by_code(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function that is equal to others of the same code.

    Args:
      function: any function.

    Returns:
      The function as a `ByCode`, or as it is where it reads values that may change, or belongs to a library.
    """
    if _library(function):
        return function
    try:
        return ByCode(function, _key(function, DEPTH))
    except _Unknown:
        return function


class _Unknown(Exception):
    """A value that may change without its name, such as an array or a list."""


def _key(value: Any, depth: int) -> tuple[Any, ...]:
    """What a value is compared by. Raises _Unknown."""
    if depth < 0:
        raise _Unknown
    if type(value) in CONSTANT or type(value) is bool:
        return type(value), repr(value) if isinstance(value, float | complex) else value  # -0.0 is another number
    if type(value) is tuple:
        return (tuple, *(_key(each, depth - 1) for each in value))
    if type(value) is functools.partial:
        named = tuple(sorted(value.keywords.items()))
        return functools.partial, *(_key(each, depth - 1) for each in (value.func, value.args, named))
    if _library(value):
        return "library", value
    if type(value) is not FunctionType or value.__dict__:
        raise _Unknown
    read = [value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items()))]
    try:
        read += [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # a variable without a value yet
        raise _Unknown from None
    names = sorted({name for code in _codes(value.__code__) for name in code.co_names} & value.__globals__.keys())
    read += [value.__globals__[name] for name in names]
    return value.__code__, value.__code__.co_filename, *names, *(_key(each, depth - 1) for each in read)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _library(value: Any) -> bool:
    """Whether a value is a module, a function or a type of a library whose objects do not change."""
    if not (isinstance(value, ModuleType | type) or callable(value)):
        return False
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    named = isinstance(value, ModuleType) or hasattr(value, "__qualname__")  # and not an object such as a partial
    return named and str(module).partition(".")[0] in LIBRARIES
