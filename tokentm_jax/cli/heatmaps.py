"""From a batch of photos or recordings to files: the work of `tokentm explain` and `tokentm explain-audio`."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.table import Table
from rich.text import Text

from tokentm_jax.cli.terminal import complain, console, memory_errors
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import question_in, replace, version_of
from tokentm_jax.identity import digest

if TYPE_CHECKING:
    import numpy as np

    from tokentm_jax.models.loading import Model


EACH = "each"  # the target that is several classes
FEW = 10  # classes of a model for which these are all of them; of other models they are the most probable `TOP`
TOP = 5


class Asked(NamedTuple):
    """What maps explain: a class by its number or its rank, or a prompt with its embedding [E]; `part` is in the names
    of files."""

    index: int | None = None
    rank: int = 0  # among a photo's classes, of which the predicted one has rank 0
    prompt: str | None = None
    embedding: Any = None
    part: str = ""

    @property
    def identity(self) -> list[Any]:
        """What tells it from other questions, as JSON."""
        return [self.index, self.rank, self.prompt]

    def classes(self, outputs: "np.ndarray") -> "np.ndarray":
        """The class of each photo [B] by the model's outputs [B, C], int32."""
        import numpy as np

        if self.index is not None:
            return np.full(len(outputs), self.index, np.int32)
        return np.argsort(-outputs, axis=-1, kind="stable")[:, self.rank].astype(np.int32)


def classes_asked(vit: "Model", targets: Sequence[str | int], versus: int | None = None) -> list[Asked]:
    """The classes that targets name, each once; the predicted one without a target.

    A target is a class by name or number, several of them with commas between (a name that has commas is one class),
    or "each": all classes of a model with up to `FEW` except `versus`, and else the `TOP` most probable ones of each
    photo. Raises InputError.
    """
    found = [asked for target in targets for asked in _classes_of(vit, target, versus)]
    return list(dict.fromkeys(found)) if targets else [Asked()]


def _classes_of(vit: "Model", target: str | int, versus: int | None) -> list[Asked]:
    try:
        index = vit.class_index(target)
        return [Asked(index, part=class_part(vit, index))]
    except InputError:
        if target == EACH:
            count = vit.module.num_classes
            if count <= FEW:
                return [Asked(index, part=class_part(vit, index)) for index in range(count) if index != versus]
            return [Asked(rank=rank, part=f"top-{rank + 1}") for rank in range(TOP)]
        if not isinstance(target, str) or "," not in target:
            raise
    return [asked for part in target.split(",") for asked in _classes_of(vit, part.strip(), versus)]


def class_part(vit: "Model", index: int) -> str:
    """How names of files call a class: its name before the first comma, with its number where the model has another
    class of that name."""
    named = [re.sub(r"\W+", "-", name.split(",")[0].lower()).strip("-")[:40] for name in vit.class_names or ()]
    if not named or not named[index]:
        return f"class-{index}"
    return named[index] if named.count(named[index]) == 1 else f"{named[index]}-{index}"


def prompts_asked(vit: "Model", prompts: Sequence[str]) -> list[Asked]:
    """Raises InputError as `embed_text`."""
    pairs = enumerate(zip(prompts, vit.embed_text(prompts), strict=True), 1)
    return [Asked(prompt=prompt, embedding=e, part=f"text-{k}") for k, (prompt, e) in pairs]


class Column(NamedTuple):
    """One map of every photo: its method, what it explains, and how its file ends."""

    method: str
    asked: Asked
    suffix: str


def columns_of(methods: Sequence[str], asked: Sequence[Asked]) -> list[Column]:
    """A column for each method and question."""
    columns = []
    for one in asked:
        for method in methods:
            parts = [method] * (len(methods) > 1) + [one.part] * (len(asked) > 1) + ["npz"]
            columns.append(Column(method, one, "." + ".".join(parts)))
    return columns


class Pictures(NamedTuple):
    """How pictures are drawn: the title (None: what is explained), the format, and the look of maps."""

    title: str | None
    kind: str
    look: Any


@dataclasses.dataclass(frozen=True)
class Writer:
    """Makes the files of a batch of photos, or of recordings for a model that takes these."""

    vit: "Model"
    columns: list[Column]
    options: dict[str, Any]
    versus: int | None
    out: Path
    names: dict[Path, str]
    sheet: str
    question: str  # about every photo, as `question_of` takes it
    rows: int  # every batch is filled up to this number of photos: another shape would be compiled again
    pictures: Pictures

    def write(self, paths: Sequence[Path], results: dict[str, dict[str, Any]], skip_unfit: bool) -> None:
        """Explain photos and write their files; `results` gets an entry for each: classes and files, or an error."""
        import numpy as np

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
        maps: list[tuple[Column, np.ndarray]] = []
        for column in self.columns:
            try:
                maps.append((column, self._explain(images, outputs, column)))
            except InputError as error:
                if not skip_unfit:
                    raise
                complain(f"{column.method} is left out: {error}")
        if not maps:
            raise InputError("no method can explain this model")
        kept = []
        for i, path in enumerate(good):
            targets = self._targets(outputs[i])
            if self.versus is not None and self.versus in targets:
                name = self.vit.class_name(self.versus)
                fail(results, str(path), InputError(f"{path}: {name!r} is the predicted class itself; name a target"))
            elif np.isfinite(outputs[i]).all() and all(np.isfinite(m[i]).all() for _, m in maps):
                results[str(path)] = self._describe(outputs[i], targets)
                self._write_maps(path, results[str(path)], [(column, m[i]) for column, m in maps])
                kept.append(i)
            else:
                fail(results, str(path), InputError(f"the model gives no finite numbers for {path}"))
        if kept:
            entries = [results[str(good[i])] for i in kept]
            self._draw([good[i] for i in kept], entries, [views[i] for i in kept], [(c, m[kept]) for c, m in maps])

    def _explain(self, images: "np.ndarray", outputs: "np.ndarray", column: Column) -> "np.ndarray":
        import numpy as np

        from tokentm_jax.maths.scores import Cosine, Versus
        from tokentm_jax.methods.explain import explain

        asked = column.asked
        if asked.prompt is not None:
            score, target = Cosine(asked.embedding), None
        else:
            score, target = None if self.versus is None else Versus(self.versus), asked.classes(outputs)
        with memory_errors():
            return np.asarray(
                explain(self.vit, images, column.method, target, score=score, **self.options), np.float32
            )

    def _asked(self) -> list[Asked]:
        """The questions, each once."""
        return list({column.asked.part: column.asked for column in self.columns}.values())

    def _place(self, column: Column) -> int:
        """Of a column's question among all."""
        return [asked.part for asked in self._asked()].index(column.asked.part)

    def _targets(self, outputs: "np.ndarray") -> list[int]:
        """The classes that are explained for a photo, by the model's outputs [C]."""
        return [int(asked.classes(outputs[None])[0]) for asked in self._asked() if asked.prompt is None]

    def _look(self, path: Path) -> tuple["np.ndarray", "np.ndarray"]:
        """The model's input of a file, float32 [H, W, C] in [0, 1], and a picture of it. Raises InputError."""
        from tokentm_jax.data.sources import Example

        reader = self.vit.preprocessing
        content = reader.of.opened(path)
        if (said := reader.of.notice(content, reader, str(path))) is not None:
            click.echo(f"Notice: {printable(said)}", err=True)
        return reader.image(Example(str(path), content)), reader.picture(content)

    def _shown(self, heatmap: "np.ndarray") -> "np.ndarray":
        """A map as it lies on the picture."""
        return self.vit.preprocessing.shown(heatmap, self.vit.module, self.pictures.look.squares)

    def _describe(self, outputs: "np.ndarray", targets: list[int]) -> dict[str, Any]:
        import numpy as np

        prompts = {asked.prompt: asked.embedding for asked in self._asked() if asked.prompt is not None}
        if not prompts:
            return describe(self.vit, outputs, targets, self.versus)
        direction = outputs / np.linalg.norm(outputs)
        return {"prompts": [{"text": t, "cosine": float(direction @ e)} for t, e in prompts.items()], "files": []}

    def _answer(self, result: dict[str, Any], column: Column) -> tuple[str, str]:
        """What a map of a photo explains, and the number that the model gives for it: of a class the name and the
        probability, of a prompt the text and the cosine."""
        place = self._place(column)
        if column.asked.prompt is not None:
            return column.asked.prompt, f"{result['prompts'][place]['cosine']:.3f}"
        target = result["targets"][place]
        versus = result.get("versus")
        other = "" if versus is None else f" versus {versus['name']} {versus['probability']:.1%}"
        return target["name"], f"{target['probability']:.1%}{other}"

    def _write_maps(self, path: Path, result: dict[str, Any], maps: Sequence[tuple[Column, "np.ndarray"]]) -> None:
        import numpy as np

        versions = {name: version_of(name) for name in ("tokentm_jax", "jax", "flax")}
        for column, heatmap in maps:
            file = self.out / f"{self.names[path]}{column.suffix}"
            place = self._place(column)
            if column.asked.prompt is None:
                target = result["targets"][place]
                asked = {
                    "target": np.int32(target["class"]),
                    "target_name": target["name"],
                    "probability": np.float32(target["probability"]),
                    "versus": result["versus"]["name"] if "versus" in result else "",
                }
            else:
                entry = result["prompts"][place]
                asked = {"prompt": entry["text"], "cosine": np.float32(entry["cosine"])}
            members = {  # `files.question_in` knows the file by them
                "question": question_of([path], self.question),
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

            require_free(file, question_of([path], self.question))
            replace(file, write)
            result["files"].append(str(file))

    def _draw(
        self,
        paths: list[Path],
        results: list[dict[str, Any]],
        views: list["np.ndarray"],
        maps: Sequence[tuple[Column, "np.ndarray"]],
    ) -> None:
        from tokentm_jax.cli.figure import Explained, Panel, Scales, arranged, grid, overlay_figure
        from tokentm_jax.identity import write_figure

        title, kind, look = self.pictures
        if len(self.columns) > 1:
            explained = []
            for column, found in maps:
                answers = [self._answer(result, column) for result in results]
                names, values = zip(*answers, strict=True)
                shown = [self._shown(heatmap) for heatmap in found]
                explained.append(Explained(column.method, column.asked.part, shown, names, values))
            photos = [Panel(shown, printable(path.name)) for path, shown in zip(paths, views, strict=True)]
            file = self.out / f"{self.sheet}.{kind}"
            methods = {column.method for column in self.columns}
            heading = " · ".join([self.vit.name, *(methods if len(methods) == 1 else ())]) if title is None else title
            drawn = grid(arranged(photos, explained, look), heading, look)
            write_figure(drawn, file, question=question_of(paths, self.question))
            for result in results:
                result["files"].insert(0, str(file))
            return
        ((column, found),) = maps
        reader = self.vit.preprocessing
        what, axes = reader.of.FRAME, reader.of.scales(reader)
        scales = None if axes is None else Scales(*axes)
        for i, (path, result) in enumerate(zip(paths, results, strict=True)):
            parts = [printable(path.name), self.vit.name, column.method]
            if column.asked.prompt is None and (best := result["top5"][0])["class"] != result["target"]["class"]:
                parts.insert(0, f"predicted: {best['name']} {best['probability']:.1%}")
            above = (" ".join(self._answer(result, column)), " · ".join(parts)) if title is None else (title, "")
            file = self.out / f"{self.names[path]}.{kind}"
            drawn = overlay_figure(views[i], self._shown(found[i]), *above, what, scales, look)
            write_figure(drawn, file, question=question_of([path], self.question))
            result["files"].insert(0, str(file))


def softmax(logits: "np.ndarray") -> "np.ndarray":
    """Probabilities [..., classes] of logits, in float64."""
    import numpy as np

    logits = np.asarray(logits, np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def describe(vit: "Model", logits: "np.ndarray", targets: Sequence[int], versus: int | None = None) -> dict[str, Any]:
    """The top five classes of one photo, the explained ones ("target" is the first of the "targets") and the one that
    they are compared with, from logits [classes]."""
    import numpy as np

    probabilities = softmax(logits)

    def entry(index: int) -> dict[str, Any]:
        return {"class": index, "name": vit.class_name(index), "probability": float(probabilities[index])}

    top = np.argsort(-probabilities, kind="stable")[:5]
    explained = [entry(target) for target in targets]
    compared = {} if versus is None else {"versus": entry(versus)}
    return {
        "top5": [entry(int(i)) for i in top],
        "target": explained[0],
        "targets": explained,
        **compared,
        "files": [],
    }


def question_of(paths: Sequence[Path], question: str) -> str:
    """The digest by which a file is known to answer a question about these photos."""
    return digest([os.path.realpath(path) if "\0" not in str(path) else str(path) for path in paths], question)


def output_names(
    paths: Sequence[Path], out: Path, suffixes: Sequence[str] = (".png", ".npz"), question: str = ""
) -> dict[Path, str]:
    """A file name without suffix for each photo: that of the photo, with a number where two would meet, or where a
    file of others or the answer to another question is."""
    stems = {path: _cut(path.stem) for path in paths}
    own = {stem.lower() for stem in stems.values()}  # file systems that ignore case would join them
    photos = _real(paths)
    used: set[str] = set()
    names: dict[Path, str] = {}
    for path, stem in stems.items():
        for number in itertools.count(1):
            name = stem if number == 1 else f"{stem}-{number}"
            taken = name.lower() in used or (number > 1 and name.lower() in own)
            of_photo = question_of([path], question)
            if not taken and all(_may_write(out / f"{name}{suffix}", photos, of_photo) for suffix in suffixes):
                break
        used.add(name.lower())
        names[path] = name
    return names


def sheet_names(batches: Sequence[Sequence[Path]], out: Path, suffix: str, question: str) -> list[str]:
    """A file name without suffix for the comparison picture of each batch of photos, as `output_names`."""
    photos = _real(itertools.chain(*batches))
    numbered = (f"sheet-{i}" for i in itertools.count(1))
    candidates = itertools.chain(["sheet"], itertools.islice(numbered, 1, None)) if len(batches) == 1 else numbered
    questions = [question_of(batch, question) for batch in batches]
    return [
        next(name for name in candidates if _may_write(out / f"{name}{suffix}", photos, of_batch))
        for of_batch in questions
    ]


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


def _may_write(file: Path, photos: set[str], question: str) -> bool:
    """Whether a file is not there, or is this program's answer to the question and nobody asked to explain it."""
    if not os.path.lexists(file):
        return True
    return question_in(file) == question and os.path.realpath(file) not in photos


def require_free(file: Path, question: str) -> None:
    """InputError where another process has written a file since its name was chosen."""
    if not _may_write(file, set(), question):
        raise InputError(f"{file} is there by now, and answers another question: run the same command again")


def fail(results: dict[str, dict[str, Any]], path: str, error: InputError) -> None:
    results[path] = {"error": str(error)}
    complain(str(error))


def print_result(path: str, result: dict[str, Any]) -> None:
    table = Table(box=None)
    if "prompts" in result:
        table.add_column("Prompt")
        table.add_column("Cosine", justify="right")
        for entry in result["prompts"]:
            table.add_row(Text(printable(entry["text"])), f"{entry['cosine']:.3f}")
    else:
        _list_classes(table, result)
    console().print(Text(printable(path), style="bold"), soft_wrap=True)  # whole, to be copied
    console().print(table)
    for file in result["files"]:
        click.echo(f" {printable(file)}")
    click.echo()


def _list_classes(table: Table, result: dict[str, Any]) -> None:
    table.add_column("Class")
    table.add_column("Probability", justify="right")
    table.add_column("")
    marks = {entry["class"]: "<- explained" for entry in result["targets"]}
    compared = [result["versus"]] if "versus" in result else []
    marks |= {entry["class"]: "<- compared with" for entry in compared}
    others = [entry for entry in (*result["targets"], *compared) if entry not in result["top5"]]
    for entry in (*result["top5"], *others):
        explained = marks.get(entry["class"], "")
        table.add_row(Text(printable(entry["name"])), f"{entry['probability']:.1%}", explained)
