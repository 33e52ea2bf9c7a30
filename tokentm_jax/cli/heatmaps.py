"""From a batch of photos to files: the work of `tokentm explain`."""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from tokentm_jax.cli.terminal import complain, console, memory_errors
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import ours, replace
from tokentm_jax.identity import version_of

if TYPE_CHECKING:
    import numpy as np

    from tokentm_jax.models.loading import LoadedViT


@dataclasses.dataclass(frozen=True)
class Writer:
    """Makes the files of a batch of photos."""

    vit: "LoadedViT"
    methods: list[str]
    options: dict[str, Any]
    target: int | None
    versus: int | None
    out: Path
    names: dict[Path, str]
    sheet: str
    rows: int  # every batch is filled up to so many photos: another shape would be compiled again

    def write(self, paths: Sequence[Path], results: dict[str, dict[str, Any]], skip_unfit: bool) -> None:
        """Explain photos and write their files; `results` gets an entry for each: classes and files, or an error."""
        import numpy as np

        from tokentm_jax.data.photos import fit, open_photo, view
        from tokentm_jax.maths.scores import Versus
        from tokentm_jax.methods.explain import explain

        good, inputs, views = [], [], []
        for path in paths:
            try:
                photo = open_photo(path)
                inputs.append(fit(photo, self.vit.preprocessing))
                views.append(view(photo, self.vit.preprocessing))
                good.append(path)
            except InputError as error:
                fail(results, str(path), error)
        if not good:
            return
        images = np.stack(inputs + inputs[-1:] * (self.rows - len(inputs))).astype(np.float32) / 255
        logits = np.asarray(self.vit.logits(images), np.float64)
        targets = logits.argmax(-1) if self.target is None else np.full(len(logits), self.target)
        score = None if self.versus is None else Versus(self.versus)
        maps: dict[str, np.ndarray] = {}
        for method in self.methods:
            try:
                with memory_errors():
                    found = explain(self.vit, images, method, targets.astype(np.int32), score=score, **self.options)
                maps[method] = np.asarray(found, np.float32)
            except InputError as error:
                if not skip_unfit:
                    raise
                complain(f"{method} is left out: {error}")
        if not maps:
            raise InputError("no method can explain this model")
        kept = []
        for i, path in enumerate(good):
            if self.versus is not None and targets[i] == self.versus:
                name = self.vit.class_name(self.versus)
                fail(results, str(path), InputError(f"{path}: {name!r} is the predicted class itself; name a target"))
            elif np.isfinite(logits[i]).all() and all(np.isfinite(m[i]).all() for m in maps.values()):
                results[str(path)] = describe(self.vit, logits[i], int(targets[i]), self.versus)
                self._write_maps(path, results[str(path)], {method: m[i] for method, m in maps.items()})
                kept.append(i)
            else:
                fail(results, str(path), InputError(f"the model gives no finite numbers for {path}"))
        if kept:
            entries = [results[str(good[i])] for i in kept]
            self._draw([good[i] for i in kept], entries, [views[i] for i in kept], {m: maps[m][kept] for m in maps})

    def _write_maps(self, path: Path, result: dict[str, Any], maps: dict[str, "np.ndarray"]) -> None:
        import numpy as np

        versions = {name: version_of(name) for name in ("tokentm_jax", "jax", "flax")}
        for method, heatmap in maps.items():
            file = self.out / f"{self.names[path]}{_suffix(method, self.methods)}"
            members = {  # `files.ours` knows the file by them
                "map": heatmap,
                "target": np.int32(result["target"]["class"]),
                "target_name": result["target"]["name"],
                "probability": np.float32(result["target"]["probability"]),
                "versus": result["versus"]["name"] if "versus" in result else "",
                "photo": printable(path),
                "model": self.vit.name,
                "method": method,
                "options": json.dumps(self.options),
                "versions": json.dumps(versions),
            }

            def write(part: Path, members: dict[str, Any] = members) -> None:
                with part.open("wb") as stream:  # a name without .npz would get it
                    np.savez_compressed(stream, **members)

            replace(file, write)
            result["files"].append(str(file))

    def _draw(
        self,
        paths: list[Path],
        results: list[dict[str, Any]],
        views: list["np.ndarray"],
        maps: dict[str, "np.ndarray"],
    ) -> None:
        from tokentm_jax.cli.figure import overlay_figure, sheet
        from tokentm_jax.identity import write_png

        titles = [_title(result) for result in results]
        if len(self.methods) > 1:
            file = self.out / f"{self.sheet}.png"
            write_png(sheet(views, titles, {m: list(maps[m]) for m in maps}, self.vit.name), file)
            for result in results:
                result["files"].insert(0, str(file))
            return
        for i, (path, result) in enumerate(zip(paths, results, strict=True)):
            parts = [printable(path.name), self.vit.name, self.methods[0]]
            best = result["top5"][0]
            if best["class"] != result["target"]["class"]:
                parts.insert(0, f"predicted: {best['name']} {best['probability']:.1%}")
            file = self.out / f"{self.names[path]}.png"
            write_png(overlay_figure(views[i], maps[self.methods[0]][i], titles[i], " · ".join(parts)), file)
            result["files"].insert(0, str(file))


def _title(result: dict[str, Any]) -> str:
    """What is explained: the class with its probability, and the other one that it is compared with."""
    classes = [result["target"], *([result["versus"]] if "versus" in result else [])]
    return " versus ".join(f"{entry['name']} {entry['probability']:.1%}" for entry in classes)


def describe(vit: "LoadedViT", logits: "np.ndarray", target: int, versus: int | None = None) -> dict[str, Any]:
    """The top five classes of one photo, the explained one and the one it is compared with, from logits [classes]."""
    import numpy as np

    odds = np.exp(logits - logits.max())
    probabilities = odds / odds.sum()

    def entry(index: int) -> dict[str, Any]:
        return {"class": index, "name": vit.class_name(index), "probability": float(probabilities[index])}

    top = np.argsort(-probabilities, kind="stable")[:5]
    compared = {} if versus is None else {"versus": entry(versus)}
    return {"top5": [entry(int(i)) for i in top], "target": entry(target), **compared, "files": []}


def output_names(paths: Sequence[Path], out: Path, methods: Sequence[str] = ("",)) -> dict[Path, str]:
    """A file name without suffix for each photo: its own, with a number where two would meet or where something
    stands that may not be replaced."""
    stems = {path: _cut(path.stem) for path in paths}
    own = {stem.lower() for stem in stems.values()}  # file systems that ignore case would join them
    photos = _real(paths)
    suffixes = [".png", *(_suffix(method, methods) for method in methods)]
    used: set[str] = set()
    names: dict[Path, str] = {}
    for path, stem in stems.items():
        for number in itertools.count(1):
            name = stem if number == 1 else f"{stem}-{number}"
            taken = name.lower() in used or (number > 1 and name.lower() in own)
            if not taken and all(_may_write(out / f"{name}{suffix}", photos) for suffix in suffixes):
                break
        used.add(name.lower())
        names[path] = name
    return names


def sheet_names(count: int, paths: Sequence[Path], out: Path) -> list[str]:
    """A file name without suffix for each of so many comparison pictures, where nothing stands that may not be
    replaced."""
    photos = _real(paths)
    numbered = (f"sheet-{i}" for i in itertools.count(1))
    candidates = itertools.chain(["sheet"], itertools.islice(numbered, 1, None)) if count == 1 else numbered
    free = (name for name in candidates if _may_write(out / f"{name}.png", photos))
    return list(itertools.islice(free, count))


def _suffix(method: str, methods: Sequence[str]) -> str:
    return f".{method}.npz" if len(methods) > 1 else ".npz"


def _cut(stem: str) -> str:
    """The first 150 bytes of a name, in whole characters: a suffix, a number and a method's name need room too."""
    while len(os.fsencode(stem)) > 150:
        stem = stem[:-1]
    return stem


def _real(paths: Iterable[Path]) -> set[str]:
    """Where paths lead; those that lead nowhere are left out."""
    found = set()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # a name too long, or with a NUL
            found.add(os.path.realpath(path))
    return found


def _may_write(file: Path, photos: set[str]) -> bool:
    """Whether a file is not there, or is one that this program wrote and nobody asked to explain."""
    return not os.path.lexists(file) or (ours(file) and os.path.realpath(file) not in photos)


def fail(results: dict[str, dict[str, Any]], path: str, error: InputError) -> None:
    results[path] = {"error": str(error)}
    complain(str(error))


MARKS = {"target": "<- explained", "versus": "<- compared with"}


def print_result(path: str, result: dict[str, Any]) -> None:
    table = Table(title=Text(printable(path)), title_justify="left", title_style="bold", box=None)
    table.add_column("Class")
    table.add_column("Probability", justify="right")
    table.add_column("")
    marks = {result[name]["class"]: mark for name, mark in MARKS.items() if name in result}
    entries = [
        *result["top5"],
        *(result[name] for name in MARKS if name in result and result[name] not in result["top5"]),
    ]
    for entry in entries:
        explained = marks.get(entry["class"], "")
        table.add_row(Text(printable(entry["name"])), f"{entry['probability']:.1%}", explained)
    console().print(table)
    for file in result["files"]:
        click.echo(f" {printable(file)}")
    click.echo()
