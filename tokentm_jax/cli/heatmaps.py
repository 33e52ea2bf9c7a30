"""From a batch of photos or recordings to files: the work of `tokentm explain` and `tokentm explain-audio`."""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.table import Table
from rich.text import Text

from tokentm_jax.cli.terminal import complain, console, memory_errors
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import ours, replace
from tokentm_jax.identity import version_of

if TYPE_CHECKING:
    import numpy as np

    from tokentm_jax.cli.figure import Scales
    from tokentm_jax.data.preprocessing import Preprocessing
    from tokentm_jax.models.loading import LoadedViT


class Column(NamedTuple):
    """One map of every photo: its method, what its prompt means to the model [E] (None: a class is explained), and how
    its file ends."""

    method: str
    prompt: str | None
    embedding: Any
    suffix: str


def columns_of(vit: "LoadedViT", methods: Sequence[str], prompts: Sequence[str]) -> dict[str, Column]:
    """A column for every method, or for every method and prompt, by its title. InputError as `embed_text`."""
    if not prompts:
        return {m: Column(m, None, None, f".{m}.npz" if len(methods) > 1 else ".npz") for m in methods}
    columns = {}
    for k, (prompt, embedding) in enumerate(zip(prompts, vit.embed_text(prompts), strict=True), 1):
        for method in methods:
            title = prompt if len(methods) == 1 else f"{method}: {prompt}"
            parts = [method] * (len(methods) > 1) + [f"text-{k}"] * (len(prompts) > 1) + ["npz"]
            columns[title] = Column(method, prompt, embedding, "." + ".".join(parts))
    return columns


@dataclasses.dataclass(frozen=True)
class Writer:
    """Makes the files of a batch of photos, or of recordings for a model that takes these."""

    vit: "LoadedViT"
    columns: dict[str, Column]
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

        from tokentm_jax.maths.scores import Cosine, Versus
        from tokentm_jax.methods.explain import explain

        good, inputs, views = [], [], []
        for path in paths:
            try:
                image, shown = self._look(path)
                inputs.append(image)
                views.append(shown)
                good.append(path)
            except InputError as error:
                fail(results, str(path), error)
        if not good:
            return
        images = np.stack(inputs + inputs[-1:] * (self.rows - len(inputs)))
        outputs = np.asarray(self.vit.logits(images), np.float64)
        targets = outputs.argmax(-1) if self.target is None else np.full(len(outputs), self.target)
        maps: dict[str, np.ndarray] = {}
        for title, column in self.columns.items():
            score, target = None if self.versus is None else Versus(self.versus), targets.astype(np.int32)
            if column.prompt is not None:
                score, target = Cosine(column.embedding), None
            try:
                with memory_errors():
                    found = explain(self.vit, images, column.method, target, score=score, **self.options)
                maps[title] = np.asarray(found, np.float32)
            except InputError as error:
                if not skip_unfit:
                    raise
                complain(f"{title} is left out: {error}")
        if not maps:
            raise InputError("no method can explain this model")
        kept = []
        for i, path in enumerate(good):
            if self.versus is not None and targets[i] == self.versus:
                name = self.vit.class_name(self.versus)
                fail(results, str(path), InputError(f"{path}: {name!r} is the predicted class itself; name a target"))
            elif np.isfinite(outputs[i]).all() and all(np.isfinite(m[i]).all() for m in maps.values()):
                results[str(path)] = self._describe(outputs[i], int(targets[i]))
                self._write_maps(path, results[str(path)], {title: m[i] for title, m in maps.items()})
                kept.append(i)
            else:
                fail(results, str(path), InputError(f"the model gives no finite numbers for {path}"))
        if kept:
            entries = [results[str(good[i])] for i in kept]
            self._draw([good[i] for i in kept], entries, [views[i] for i in kept], {m: maps[m][kept] for m in maps})

    def _look(self, path: Path) -> tuple["np.ndarray", "np.ndarray"]:
        """What the model sees of a file, float32 [H, W, C] in [0, 1], and a picture of that. Raises InputError."""
        import numpy as np

        from tokentm_jax.data import audio
        from tokentm_jax.data.photos import fit, open_photo, view

        preprocessing = self.vit.preprocessing
        if preprocessing.audio is None:
            photo = open_photo(path)
            return fit(photo, preprocessing).astype(np.float32) / 255, view(photo, preprocessing)
        recording = audio.open_recording(path)
        said = audio.notice(recording, preprocessing, str(path))
        if said is not None:
            click.echo(f"Notice: {printable(said)}", err=True)
        image = audio.spectrogram(recording, preprocessing, str(path))
        return image, audio.picture(image)

    def _shown(self, heatmap: "np.ndarray") -> "np.ndarray":
        """A map as it lies on the picture: the lowest frequency of a spectrogram is below, and where patches overlap,
        values stand at their centres."""
        import jax.numpy as jnp
        import numpy as np

        from tokentm_jax.maths.maps import resized

        if self.vit.preprocessing.audio is None:
            return heatmap
        size, tiling = self.vit.preprocessing.size, self.vit.module.tiling
        return np.asarray(resized(jnp.asarray(heatmap[None]), size, tiling))[0, ::-1]

    def _describe(self, outputs: "np.ndarray", target: int) -> dict[str, Any]:
        import numpy as np

        prompts = {c.prompt: c.embedding for c in self.columns.values() if c.prompt is not None}
        if not prompts:
            return describe(self.vit, outputs, target, self.versus)
        direction = outputs / np.linalg.norm(outputs)
        return {"prompts": [{"text": t, "cosine": float(direction @ e)} for t, e in prompts.items()], "files": []}

    def _write_maps(self, path: Path, result: dict[str, Any], maps: dict[str, "np.ndarray"]) -> None:
        import numpy as np

        versions = {name: version_of(name) for name in ("tokentm_jax", "jax", "flax")}
        for title, heatmap in maps.items():
            column = self.columns[title]
            file = self.out / f"{self.names[path]}{column.suffix}"
            if column.prompt is None:
                asked = {
                    "target": np.int32(result["target"]["class"]),
                    "target_name": result["target"]["name"],
                    "probability": np.float32(result["target"]["probability"]),
                    "versus": result["versus"]["name"] if "versus" in result else "",
                }
            else:
                cosines = {entry["text"]: entry["cosine"] for entry in result["prompts"]}
                asked = {"prompt": column.prompt, "cosine": np.float32(cosines[column.prompt])}
            members = {  # `files.ours` knows the file by them
                "map": heatmap,
                **asked,
                "photo": printable(path),
                "model": self.vit.name,
                "method": column.method,
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
        if len(self.columns) > 1:
            file = self.out / f"{self.sheet}.png"
            shown = {title: [self._shown(heatmap) for heatmap in found] for title, found in maps.items()}
            write_png(sheet(views, titles, shown, self.vit.name), file)
            for result in results:
                result["files"].insert(0, str(file))
            return
        for i, (path, result) in enumerate(zip(paths, results, strict=True)):
            ((title, column),) = self.columns.items()
            parts = [printable(path.name), self.vit.name, column.method]
            if column.prompt is None and (best := result["top5"][0])["class"] != result["target"]["class"]:
                parts.insert(0, f"predicted: {best['name']} {best['probability']:.1%}")
            file = self.out / f"{self.names[path]}.png"
            what, scales = "Photo", None
            if self.vit.preprocessing.audio is not None:
                what, scales = "Spectrogram", scales_of(self.vit.preprocessing)
            heatmap = self._shown(maps[title][i])
            write_png(overlay_figure(views[i], heatmap, titles[i], " · ".join(parts), what, scales), file)
            result["files"].insert(0, str(file))


def scales_of(preprocessing: "Preprocessing") -> "Scales":
    """Time in seconds and frequency in Hz at the axes of a spectrogram, the lowest frequency below."""
    import numpy as np

    from tokentm_jax.cli.figure import Scales

    (bins, frames), sound = preprocessing.size, preprocessing.audio
    assert sound is not None
    longest = sound.seconds(frames)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if longest / step < 6)
    centres = sound.frequencies(bins)
    x = [
        (((t * sound.sampling_rate - sound.window / 2) / sound.hop + 0.5) / frames, f"{t:g}")
        for t in np.arange(0, longest, step)
    ]
    octaves = [62.5 * 2**k for k in range(12)]
    y = [
        (1 - (np.interp(f, centres, np.arange(bins)) + 0.5) / bins, f"{f:g}")
        for f in octaves
        if centres[0] <= f <= centres[-1]
    ]
    return Scales("time [s]", [tick for tick in x if 0 <= tick[0] <= 1], "frequency [Hz]", y)


def _title(result: dict[str, Any]) -> str:
    """What is explained: the class with its probability, and the other one; or the prompts with their cosines."""
    if "prompts" in result:
        return "; ".join(f"{entry['text']} {entry['cosine']:.3f}" for entry in result["prompts"])
    classes = [result["target"], *([result["versus"]] if "versus" in result else [])]
    return " versus ".join(f"{entry['name']} {entry['probability']:.1%}" for entry in classes)


def softmax(logits: "np.ndarray") -> "np.ndarray":
    """Probabilities [..., classes] of logits, in float64."""
    import numpy as np

    logits = np.asarray(logits, np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def describe(vit: "LoadedViT", logits: "np.ndarray", target: int, versus: int | None = None) -> dict[str, Any]:
    """The top five classes of one photo, the explained one and the one it is compared with, from logits [classes]."""
    import numpy as np

    probabilities = softmax(logits)

    def entry(index: int) -> dict[str, Any]:
        return {"class": index, "name": vit.class_name(index), "probability": float(probabilities[index])}

    top = np.argsort(-probabilities, kind="stable")[:5]
    compared = {} if versus is None else {"versus": entry(versus)}
    return {"top5": [entry(int(i)) for i in top], "target": entry(target), **compared, "files": []}


def output_names(paths: Sequence[Path], out: Path, suffixes: Iterable[str] = (".npz",)) -> dict[Path, str]:
    """A file name without suffix for each photo: its own, with a number where two would meet or where something
    stands that may not be replaced."""
    stems = {path: _cut(path.stem) for path in paths}
    own = {stem.lower() for stem in stems.values()}  # file systems that ignore case would join them
    photos = _real(paths)
    suffixes = [".png", *suffixes]
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
    if "prompts" in result:
        table.add_column("Prompt")
        table.add_column("Cosine", justify="right")
        for entry in result["prompts"]:
            table.add_row(Text(printable(entry["text"])), f"{entry['cosine']:.3f}")
    else:
        _list_classes(table, result)
    console().print(table)
    for file in result["files"]:
        click.echo(f" {printable(file)}")
    click.echo()


def _list_classes(table: Table, result: dict[str, Any]) -> None:
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
