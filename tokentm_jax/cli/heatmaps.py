"""From a batch of photos, recordings or texts to files: the work of `tokentm explain`."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.table import Table
from rich.text import Text

from tokentm_jax.cli.names import question_of, require_free
from tokentm_jax.cli.terminal import complain, console, memory_errors
from tokentm_jax.cli.words import print_words
from tokentm_jax.errors import InputError, printable
from tokentm_jax.files import replace, version_of

if TYPE_CHECKING:
    import numpy as np

    from tokentm_jax.inputs.pictures import Panel
    from tokentm_jax.inputs.words import Word
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
        """What identifies it among questions, as JSON."""
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


class Sample(NamedTuple):
    """One of what is to be explained."""

    name: str  # what messages call it: a path, or "text 1"
    given: Path | str  # a file, or a text
    file: str  # the name of its files, without suffix


class Found(NamedTuple):
    """The samples of a batch that could be explained, what their maps are shown on, and for each column their maps."""

    samples: list[Sample]
    panels: list["Panel"]
    maps: list[tuple[Column, "np.ndarray"]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command asks about its samples."""

    vit: "Model"
    columns: list[Column]
    options: dict[str, Any]
    rows: int  # every batch is filled up to this number of samples: another shape would be compiled again
    skip_unfit: bool  # a method that cannot explain this model is left out, instead of an error
    versus: int | None = None
    squares: bool = False

    def explained(self, samples: Sequence[Sample], results: dict[str, dict[str, Any]]) -> Found:
        """Explain a batch of samples; `results` gets an entry for each: its classes, or an error."""
        import numpy as np

        good, inputs, panels = [], [], []
        for sample in samples:
            try:
                given, panel = self._read(sample)
                inputs.append(given)
                panels.append(panel)
                good.append(sample)
            except InputError as error:
                fail(results, sample.name, error)
        if not good:
            return Found([], [], [])
        reader = self.vit.preprocessing
        batch = reader.stacked(inputs + inputs[-1:] * (self.rows - len(inputs)))
        outputs = np.asarray(self.vit.logits(batch), np.float64)
        maps: list[tuple[Column, np.ndarray]] = []
        for column in self.columns:
            try:
                maps.append((column, self._explain(batch, outputs, column)))
            except InputError as error:
                if not self.skip_unfit:
                    raise
                complain(f"{column.method} is left out: {error}")
        if not maps:
            raise InputError("no method can explain this model")
        kept = []
        for i, sample in enumerate(good):
            targets = self._targets(outputs[i])
            if self.versus is not None and self.versus in targets:
                name = self.vit.class_name(self.versus)
                error = InputError(f"{sample.name}: {name!r} is the predicted class itself; name a target")
                fail(results, sample.name, error)
            elif np.isfinite(outputs[i]).all() and all(np.isfinite(m[i]).all() for _, m in maps):
                results[sample.name] = self._describe(outputs[i], targets)
                for column, m in maps:
                    self._add_words(results[sample.name], column, panels[i].words(m[i]))
                kept.append(i)
            else:
                fail(results, sample.name, InputError(f"the model gives no finite numbers for {sample.name}"))
        return Found([good[i] for i in kept], [panels[i] for i in kept], [(column, m[kept]) for column, m in maps])

    def _explain(self, batch: Any, outputs: "np.ndarray", column: Column) -> "np.ndarray":
        import numpy as np

        from tokentm_jax.maths.scores import Cosine, Versus
        from tokentm_jax.methods.explain import explain

        asked = column.asked
        if asked.prompt is not None:
            score, target = Cosine(asked.embedding), None
        else:
            score, target = None if self.versus is None else Versus(self.versus), asked.classes(outputs)
        with memory_errors():
            return np.asarray(explain(self.vit, batch, column.method, target, score=score, **self.options), np.float32)

    def asked(self) -> list[Asked]:
        """The questions, each once."""
        return list({column.asked.part: column.asked for column in self.columns}.values())

    def place(self, column: Column) -> int:
        """Of a column's question among all."""
        return [asked.part for asked in self.asked()].index(column.asked.part)

    def _targets(self, outputs: "np.ndarray") -> list[int]:
        """The classes that are explained for a sample, by the model's outputs [C]."""
        return [int(asked.classes(outputs[None])[0]) for asked in self.asked() if asked.prompt is None]

    def _read(self, sample: Sample) -> tuple[Any, "Panel"]:
        """The model's input of a sample, and what its maps are shown on. Raises InputError."""
        from tokentm_jax.data.sources import Example

        reader = self.vit.preprocessing
        content = reader.opened(sample.given)
        if (said := reader.notice(content, sample.name)) is not None:
            click.echo(f"Notice: {printable(said)}", err=True)
        title = sample.given.name if isinstance(sample.given, Path) else sample.name
        return reader.sample(Example(sample.name, content)), reader.panel(content, printable(title))

    def _describe(self, outputs: "np.ndarray", targets: list[int]) -> dict[str, Any]:
        import numpy as np

        prompts = {asked.prompt: asked.embedding for asked in self.asked() if asked.prompt is not None}
        if not prompts:
            return describe(self.vit, outputs, targets, self.versus)
        direction = outputs / np.linalg.norm(outputs)
        return {"prompts": [{"text": t, "cosine": float(direction @ e)} for t, e in prompts.items()], "files": []}

    def _add_words(self, result: dict[str, Any], column: Column, words: Sequence["Word"]) -> None:
        """The scores of a text's words, in the entry of the class that they explain."""
        if words:
            listed = [{"word": w.text, "score": w.score, "start": w.start, "end": w.end} for w in words]
            result["targets"][self.place(column)].setdefault("methods", {})[column.method] = listed

    def answer(self, result: dict[str, Any], column: Column) -> tuple[str, str]:
        """What a map of a sample explains, and the number that the model gives for it: of a class the name and the
        probability, of a prompt the text and the cosine."""
        place = self.place(column)
        if column.asked.prompt is not None:
            return column.asked.prompt, f"{result['prompts'][place]['cosine']:.3f}"
        target = result["targets"][place]
        versus = result.get("versus")
        other = "" if versus is None else f" versus {versus['name']} {versus['probability']:.1%}"
        return target["name"], f"{target['probability']:.1%}{other}"

    def shown(self, heatmap: "np.ndarray") -> "np.ndarray":
        """A map as it lies on its panel."""
        return self.vit.preprocessing.shown(heatmap, self.vit.module, self.squares)


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes what was found to files: maps, and pictures in the format `kind` (a title of None: what is explained)."""

    job: Job
    out: Path
    question: str  # about every sample, as `question_of` takes it
    kind: str
    title: str | None
    look: Any

    def write(self, found: Found, results: dict[str, dict[str, Any]], sheet: str) -> None:
        for i, sample in enumerate(found.samples):
            self._write_maps(sample, results[sample.name], found, i)
        if found.samples and self.kind != "html":
            self._draw(found, [results[sample.name] for sample in found.samples], sheet)

    def _write_maps(self, sample: Sample, result: dict[str, Any], found: Found, place: int) -> None:
        import numpy as np

        versions = {name: version_of(name) for name in ("tokentm_jax", "jax", "flax")}
        question = question_of([sample.given], self.question)
        for column, maps in found.maps:
            file = self.out / f"{sample.file}{column.suffix}"
            own = self.job.place(column)
            if column.asked.prompt is None:
                target = result["targets"][own]
                asked = {
                    "target": np.int32(target["class"]),
                    "target_name": target["name"],
                    "probability": np.float32(target["probability"]),
                    "versus": result["versus"]["name"] if "versus" in result else "",
                }
            else:
                entry = result["prompts"][own]
                asked = {"prompt": entry["text"], "cosine": np.float32(entry["cosine"])}
            words = found.panels[place].words(maps[place])
            of_words = {"words": [w.text for w in words], "scores": np.array([w.score for w in words], np.float32)}
            members = {  # `files.question_in` knows the file by them
                "question": question,
                "map": maps[place],
                **asked,
                **(of_words if words else {}),
                "photo" if isinstance(sample.given, Path) else "text": printable(sample.given),
                "model": self.job.vit.name,
                "method": column.method,
                "options": json.dumps(self.job.options),
                "versions": json.dumps(versions),
            }

            def write(part: Path, members: dict[str, Any] = members) -> None:
                with part.open("wb") as stream:  # a name without .npz would get it
                    np.savez_compressed(stream, **members)

            require_free(file, question)
            replace(file, write)
            result["files"].append(str(file))

    def _draw(self, found: Found, results: list[dict[str, Any]], sheet: str) -> None:
        from tokentm_jax.cli.figure import Explained, Scales, arranged, grid, overlay_figure
        from tokentm_jax.identity import write_figure

        job, reader = self.job, self.job.vit.preprocessing
        if len(job.columns) > 1 or reader.frame is None:
            explained = []
            for column, maps in found.maps:
                names, values = zip(*(job.answer(result, column) for result in results), strict=True)
                shown = [job.shown(heatmap) for heatmap in maps]
                explained.append(Explained(column.method, column.asked.part, shown, names, values))
            file = self.out / f"{sheet}.{self.kind}"
            methods = {column.method for column in job.columns}
            heading = " · ".join([job.vit.name, *(methods if len(methods) == 1 else ())])
            heading = heading if self.title is None else self.title
            drawn = grid(arranged(found.panels, explained, self.look), heading, self.look)
            write_figure(drawn, file, question=question_of([one.given for one in found.samples], self.question))
            for result in results:
                result["files"].insert(0, str(file))
            return
        ((column, maps),) = found.maps
        scales = None if reader.scales is None else Scales(*reader.scales)
        for sample, panel, result, heatmap in zip(found.samples, found.panels, results, maps, strict=True):
            parts = [panel.title, job.vit.name, column.method]
            if column.asked.prompt is None and (best := result["top5"][0])["class"] != result["target"]["class"]:
                parts.insert(0, f"predicted: {best['name']} {best['probability']:.1%}")
            above = (
                (" ".join(job.answer(result, column)), " · ".join(parts)) if self.title is None else (self.title, "")
            )
            file = self.out / f"{sample.file}.{self.kind}"
            drawn = overlay_figure(panel.picture, job.shown(heatmap), *above, reader.frame, scales, self.look)
            write_figure(drawn, file, question=question_of([sample.given], self.question))
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


def fail(results: dict[str, dict[str, Any]], path: str, error: InputError) -> None:
    results[path] = {"error": str(error)}
    complain(str(error))


def print_result(given: str, result: dict[str, Any], signed: set[str]) -> None:
    """`signed` are the methods whose scores of words have signs."""
    table = Table(box=None)
    if "prompts" in result:
        table.add_column("Prompt")
        table.add_column("Cosine", justify="right")
        for entry in result["prompts"]:
            table.add_row(Text(printable(entry["text"])), f"{entry['cosine']:.3f}")
    else:
        _list_classes(table, result)
    console().print(Text(printable(given), style="bold"), soft_wrap=True)  # whole, to be copied
    console().print(table)
    for target in result.get("targets", ()):
        if "methods" in target:
            print_words(given, target, signed)
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
    best = {entry["class"] for entry in result["top5"]}
    others = [entry for entry in (*result["targets"], *compared) if entry["class"] not in best]
    for entry in (*result["top5"], *others):
        explained = marks.get(entry["class"], "")
        table.add_row(Text(printable(entry["name"])), f"{entry['probability']:.1%}", explained)
