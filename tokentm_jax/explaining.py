"""From a batch of photos to files: the work of `tokentm explain`."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from tokentm_jax.errors import InputError
from tokentm_jax.identity import version_of
from tokentm_jax.terminal import complain, console, memory_errors, printable

if TYPE_CHECKING:
    import numpy as np

    from tokentm_jax.loading import LoadedViT


@dataclasses.dataclass(frozen=True)
class Run:
    """One batch's way from photos to files."""

    vit: "LoadedViT"
    methods: list[str]
    options: dict[str, Any]
    target: int | None
    out: Path
    names: dict[Path, str]
    sheet: str
    rows: int  # every batch is filled up to so many photos: another shape would be compiled again

    def explain(self, paths: Sequence[Path], results: dict[str, dict[str, Any]], skip_unfit: bool) -> None:
        """Explain the photos; `results` gets an entry for each, with its classes and files or its error."""
        import numpy as np

        from tokentm_jax.interface import explain as explain_batch
        from tokentm_jax.photos import fit, open_photo, view

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
        with memory_errors():
            logits = np.asarray(self.vit.logits(images), np.float64)
        targets = logits.argmax(-1) if self.target is None else np.full(len(logits), self.target)
        maps: dict[str, np.ndarray] = {}
        for method in self.methods:
            try:
                with memory_errors():
                    found = explain_batch(self.vit, images, method, targets.astype(np.int32), **self.options)
                maps[method] = np.asarray(found, np.float32)
            except InputError as error:
                if not skip_unfit:
                    raise
                complain(f"{method} is left out: {error}")
        if not maps:
            raise InputError("no method can explain this model")
        kept = []
        for i, path in enumerate(good):
            if np.isfinite(logits[i]).all() and all(np.isfinite(m[i]).all() for m in maps.values()):
                results[str(path)] = describe(self.vit, logits[i], int(targets[i]))
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
            suffix = f".{method}.npz" if len(self.methods) > 1 else ".npz"
            file = self.out / f"{self.names[path]}{suffix}"
            part = file.with_name(f".{file.name}.{os.getpid()}.part")
            try:
                with part.open("wb") as stream:
                    np.savez_compressed(
                        stream,
                        map=heatmap,
                        target=np.int32(result["target"]["class"]),
                        target_name=result["target"]["name"],
                        probability=np.float32(result["target"]["probability"]),
                        photo=printable(path),
                        model=self.vit.name,
                        method=method,
                        options=json.dumps(self.options),
                        versions=json.dumps(versions),
                    )
                os.replace(part, file)
            finally:
                part.unlink(missing_ok=True)
            result["files"].append(str(file))

    def _draw(
        self,
        paths: list[Path],
        results: list[dict[str, Any]],
        views: list["np.ndarray"],
        maps: dict[str, "np.ndarray"],
    ) -> None:
        from tokentm_jax.figure import overlay_figure, sheet, write_png

        titles = [f"{r['target']['name']} {r['target']['probability']:.1%}" for r in results]
        if len(self.methods) > 1:
            file = self.out / f"{self.sheet}.png"
            write_png(sheet(views, titles, {m: list(maps[m]) for m in maps}, self.vit.name), file)
            for result in results:
                result["files"].insert(0, str(file))
            return
        for i, (path, result) in enumerate(zip(paths, results, strict=True)):
            parts = [printable(Path(path.name)), self.vit.name, self.methods[0]]
            best = result["top5"][0]
            if best["class"] != result["target"]["class"]:
                parts.insert(0, f"predicted: {best['name']} {best['probability']:.1%}")
            file = self.out / f"{self.names[path]}.png"
            write_png(overlay_figure(views[i], maps[self.methods[0]][i], titles[i], " · ".join(parts)), file)
            result["files"].insert(0, str(file))


def describe(vit: "LoadedViT", logits: "np.ndarray", target: int) -> dict[str, Any]:
    """The top five classes of one photo and the explained one, from its logits [classes]."""
    import numpy as np

    odds = np.exp(logits - logits.max())
    probabilities = odds / odds.sum()

    def entry(index: int) -> dict[str, Any]:
        return {"class": index, "name": vit.class_name(index), "probability": float(probabilities[index])}

    top = np.argsort(-probabilities, kind="stable")[:5]
    return {"top5": [entry(int(i)) for i in top], "target": entry(target), "files": []}


def output_names(paths: Sequence[Path], out: Path) -> dict[Path, str]:
    """A file name without suffix for each photo: its own, with a number where two would meet or where the picture
    would replace one of the photos."""
    photos = {path.resolve() for path in paths}
    stems = {path: os.fsdecode(os.fsencode(path.stem)[:150]) for path in paths}
    own = {stem.lower() for stem in stems.values()}  # file systems that ignore case would join them
    used: set[str] = set()
    names: dict[Path, str] = {}
    for path, stem in stems.items():
        name, number = stem, 1
        while (
            name.lower() in used or (number > 1 and name.lower() in own) or (out / f"{name}.png").resolve() in photos
        ):
            number += 1
            name = f"{stem}-{number}"
        used.add(name.lower())
        names[path] = name
    return names


def fail(results: dict[str, dict[str, Any]], path: str, error: InputError) -> None:
    results[path] = {"error": str(error)}
    complain(str(error))


def print_result(path: str, result: dict[str, Any]) -> None:
    table = Table(title=Text(printable(Path(path))), title_justify="left", title_style="bold", box=None)
    table.add_column("Class")
    table.add_column("Probability", justify="right")
    table.add_column("")
    entries = result["top5"]
    if result["target"] not in entries:
        entries = [*entries, result["target"]]
    for entry in entries:
        explained = "<- explained" if entry["class"] == result["target"]["class"] else ""
        table.add_row(Text(entry["name"]), f"{entry['probability']:.1%}", explained)
    console().print(table)
    for file in result["files"]:
        click.echo(f" {printable(Path(file))}")
    click.echo()
