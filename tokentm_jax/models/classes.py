"""The classes of a data set as classes of a model. Names decide, never their order."""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np

from tokentm_jax.data.examples import Source
from tokentm_jax.data.labels import LabelMap, alike, number, read_label_map
from tokentm_jax.errors import InputError
from tokentm_jax.models.loading import Model

SHOWN = 5  # classes that an error names
_ADVICE = "give a label map (--label-map FILE), or class names to the model"


def translation(vit: Model, source: Source, label_map: LabelMap | str | None = None) -> np.ndarray | None:
    """The model's class of each of the source's classes [classes]; None if both have the same numbers.

    A class is found by the label map, else by its exact name, its wnid, or the only name that differs just in case,
    underscores and spaces. If the model's names are unknown, class names that are numbers ("7", "007") are used.

    Raises InputError for classes that the model does not have, each with the nearest name of the model, for ambiguous
    names, for two classes that map to the same class, and for a label map that does not fit.
    """
    names, mapped = source.class_names, read_label_map(label_map) or {}
    if names is None or not source.named:
        if mapped:
            raise InputError(f"{source.name} gives its classes by number: a label map has no names to map")
        return None
    if not mapped and names == vit.class_names:
        return None
    found: dict[str, int] = {}
    for name, value in mapped.items():
        if name not in names:
            other = f"which is not a class of {source.name}{_nearest(name, names)}"
            raise InputError(f"the label map has {name!r}, {other}")
        try:
            found[name] = vit.class_index(value)
        except InputError as error:
            raise InputError(f"the label map gives {name!r} a class that the model lacks: {error}") from None
    found |= _found(vit, source, [name for name in names if name not in found])
    return np.array([found[name] for name in names], np.int32)


def known_classes(vit: Model, source: Source) -> tuple[np.ndarray | None, str]:
    """As `translation` without a label map, but -1 for classes that the model lacks, and a sentence with these."""
    names = source.class_names
    if names is None or not source.named or names == vit.class_names:
        return None, ""
    classes = candidates(vit, names)
    unknown = [name for name, found in classes.items() if len(found) != 1]
    table = np.array([classes[name][0] if len(classes[name]) == 1 else -1 for name in names], np.int32)
    return table, _unknown(vit, source, unknown) if unknown else ""


def candidates(vit: Model, names: Iterable[str]) -> dict[str, list[int]]:
    """The classes that each name can be: its exact name, else wnid, else alike; by number without names."""
    if vit.class_names is None:
        numbers = {name: number(name) for name in names}
        return {name: [n] if n is not None and 0 <= n < vit.module.num_classes else [] for name, n in numbers.items()}
    known: tuple[dict[str, list[int]], ...] = ({}, {}, {})  # the exact names, the wnids, the names alike
    for i, name in enumerate(vit.class_names):
        known[0].setdefault(name, []).append(i)
        known[2].setdefault(alike(name), []).append(i)
    for i, wnid in enumerate(vit.wnids or ()):
        known[1].setdefault(wnid, []).append(i)
    return {name: known[0].get(name) or known[1].get(name) or known[2].get(alike(name), []) for name in names}


def _unknown(vit: Model, source: Source, unknown: Sequence[str]) -> str:
    shown = ", ".join(f"{name[:60]!r}{_nearest(name, vit.class_names or ())}" for name in unknown[:SHOWN])
    more = f", and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    count = f"{len(unknown)} of its {len(source.class_names or ())} classes"
    return f"{source.name}: {vit.name} does not know {count}: {shown}{more}; {_ADVICE}"


def _found(vit: Model, source: Source, names: list[str]) -> dict[str, int]:
    """The model's only class of each name."""
    every, classes = candidates(vit, names), vit.module.num_classes
    if vit.class_names is None and any(number(name) is None for name in names):
        counts = f"has {len(source.class_names or ())} classes, {vit.name} has {classes}, whose names are unknown"
        raise InputError(f"{source.name} {counts}; {_ADVICE}")
    unknown = [name for name in names if not every[name]]
    if unknown and vit.class_names is None:
        limits = f"{vit.name} has 0 to {classes - 1}"
        raise InputError(f"{source.name}: its class {unknown[0]!r} is out of range: {limits}")
    owner: dict[int, str] = {}
    for name, indices in every.items():
        if len(indices) > 1:
            several = ", ".join(map(str, indices))
            raise InputError(f"{source.name}: {vit.name} has the classes {several} of the name {name!r}; {_ADVICE}")
        for index in indices:
            other = owner.setdefault(index, name)
            if other != name and vit.class_names is None:
                shown = ", ".join(sorted(names)[:SHOWN])
                raise InputError(f"{source.name} has two classes of the same number: {shown}, ...")
            if other != name:
                raise InputError(f"{source.name}: {other!r} and {name!r} are both class {index} of {vit.name}")
    if unknown:
        raise InputError(_unknown(vit, source, unknown))
    return {name: indices[0] for name, indices in every.items()}


def _nearest(name: str, known: tuple[str, ...]) -> str:
    names = {alike(other): other for other in known}
    close = difflib.get_close_matches(alike(name)[:100], names, n=1, cutoff=0.0)
    return f" (nearest: {names[close[0]][:60]!r})" if close else ""
