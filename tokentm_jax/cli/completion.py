"""Completion of names by the shell: methods, models, classes and sample data; and of files for every other text.

Click does the rest: `eval "$(_TOKENTM_COMPLETE=bash_source tokentm)"`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from tokentm_jax.errors import InputError
from tokentm_jax.samples import SAMPLES

FILES = ("samples", "what", "data", "recipe", "checkpoint", "out", "classes", "runs", "maps", "label_map")


def _methods(ctx: click.Context) -> Iterable[str]:
    from tokentm_jax.methods.table import METHODS

    return [*METHODS, "all"]


def _models(ctx: click.Context) -> Iterable[str]:
    from tokentm_jax.models.architectures import ARCHITECTURES
    from tokentm_jax.models.loading import shipped, shipped_folders

    return [*shipped(), *shipped_folders(), *ARCHITECTURES]


def _classes(ctx: click.Context) -> Iterable[str]:
    """The classes of the model that is named, or of the default one; of ImageNet where the model is not shipped."""
    from tokentm_jax.data.labels import read_names
    from tokentm_jax.models.checkpoint import read_description
    from tokentm_jax.models.loading import DEFAULT_MODEL, shipped

    model, checkpoint, classes = (ctx.params.get(name) for name in ("model", "checkpoint", "classes"))
    if classes:
        return read_names(Path(classes))[0]
    name = model or (DEFAULT_MODEL if ctx.command.name != "explain-audio" else "spoken_digits")
    file = shipped().get(name) if checkpoint is None else Path(checkpoint)
    description = read_description(file) if file is not None and file.is_file() else None
    if description is not None and description["class_names"]:
        return description["class_names"]
    return read_names(IMAGENET_CLASSES)[0] if IMAGENET_CLASSES.is_file() else ()


IMAGENET_CLASSES = Path(__file__).resolve().parent.parent / "data" / "imagenet_1k.json"
SEVERAL = ("method", "methods", "targets")  # as a,b,c
NAMES: dict[str, Callable[[click.Context], Iterable[str]]] = {
    "method": _methods,
    "methods": _methods,
    "model": _models,
    "target": _classes,
    "targets": _classes,
    "versus": _classes,
    "sets": lambda ctx: [*SAMPLES, "all"],
}


class Completed(click.ParamType):
    """Another type, with completion; of files where `names` is None."""

    def __init__(self, kind: click.ParamType, names: Callable[[click.Context], Iterable[str]] | None) -> None:
        self.name, self.convert, self._names = kind.name, kind.convert, names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self._names is None:
            return [CompletionItem(incomplete, type="file")]
        before, comma, last = incomplete.rpartition(",") if param.name in SEVERAL else ("", "", incomplete)
        try:
            names = ["_".join(name.split()) for name in self._names(ctx)]
        except (InputError, OSError):  # of a file that is no checkpoint: there is nothing to complete
            return []
        found = [name for name in dict.fromkeys(names) if name.casefold().startswith(last.casefold())]
        items = [CompletionItem(f"{before}{comma}{name}") for name in found]
        return items if items or param.name != "model" else [CompletionItem(incomplete, type="file")]


def add_completion(commands: Iterable[click.Command]) -> None:
    """Give the options and arguments of commands completion, by their names."""
    for command in commands:
        add_completion(getattr(command, "commands", {}).values())
        for param in command.params:
            if param.name in NAMES or param.name in FILES:
                param.type = Completed(param.type, NAMES.get(param.name))
