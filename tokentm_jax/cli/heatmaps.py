"""From a batch of photos, recordings or texts to files: the work of `tokentm explain`."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from rich.text import Text

from tokentm_jax.cli.figure import Explained, Scales, arranged, grid, overlay_figure
from tokentm_jax.cli.names import question_of, require_free
from tokentm_jax.cli.terminal import complain, console, memory_errors, print_table, running
from tokentm_jax.cli.words import print_words
from tokentm_jax.data.examples import Example
from tokentm_jax.errors import InputError, printable
from tokentm_jax.identity import write_figure, write_maps
from tokentm_jax.inputs.pictures import Panel
from tokentm_jax.maths.scores import Cosine, Versus
from tokentm_jax.methods.explain import explain_with
from tokentm_jax.methods.sharing import grouped
from tokentm_jax.methods.table import METHODS
from tokentm_jax.models.loading import Model

EACH = "each"  # the target that is several classes
FEW = 10  # classes of a model for which these are all of them; of other models they are the most probable `TOP`
TOP = 5
Results = dict[str, dict[str, Any]]  # by what messages call a sample


class Asked(NamedTuple):
    """What maps explain: a class by its number or its rank, or a prompt with its embedding [E]; `part` is in the names
    of files."""

    index: int | None = None
    rank: int = 0  # among a photo's classes, of which the predicted one has rank 0
    prompt: str | None = None
    embedding: Any = None
    part: str = ""

    def classes(self, outputs: np.ndarray) -> np.ndarray:
        """The class of each photo [B] by the model's outputs [B, C], int32."""
        if self.index is not None:
            return np.full(len(outputs), self.index, np.int32)
        return np.argsort(-outputs, axis=-1, kind="stable")[:, self.rank].astype(np.int32)


def classes_asked(vit: Model, targets: Sequence[str | int], versus: int | None = None) -> list[Asked]:
    """The classes that targets name, each once; the predicted one without a target.

    A target is a class by name or number, several of them with commas between (a name that has commas is one class),
    or "each": all classes of a model with up to `FEW` except `versus`, and else the `TOP` most probable ones of each
    photo. Raises InputError.
    """
    found = [asked for target in targets for asked in _classes_of(vit, target, versus)]
    return list(dict.fromkeys(found)) if targets else [Asked()]


def _classes_of(vit: Model, target: str | int, versus: int | None) -> list[Asked]:
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


def class_part(vit: Model, index: int) -> str:
    """How names of files call a class: its name before the first comma, with its number where the model has another
    class of that name."""
    named = [re.sub(r"\W+", "-", name.split(",")[0].lower()).strip("-")[:40] for name in vit.class_names or ()]
    if not named or not named[index]:
        return f"class-{index}"
    return named[index] if named.count(named[index]) == 1 else f"{named[index]}-{index}"


def prompts_asked(vit: Model, prompts: Sequence[str]) -> list[Asked]:
    """Raises InputError as `embed_text`."""
    pairs = enumerate(zip(prompts, vit.embed_text(prompts), strict=True), 1)
    return [Asked(prompt=prompt, embedding=e, part=f"text-{k}") for k, (prompt, e) in pairs]


class Column(NamedTuple):
    """One map of every photo: its method, what it explains, and how its file ends."""

    method: str
    asked: Asked
    suffix: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.asked.part, self.method


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
    file: str = ""  # the name of its files, without suffix


class Found(NamedTuple):
    """A sample that could be explained, what its maps are shown on, its classes, and its maps."""

    sample: Sample
    panel: Panel
    result: dict[str, Any]
    maps: list[tuple[Column, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command asks about its samples."""

    vit: Model
    columns: Sequence[Column]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: int = 1  # every batch is filled up to this number of samples: another shape would be compiled again
    skip_unfit: bool = False  # a method that cannot explain this model is left out, instead of an error
    versus: int | None = None
    squares: bool = False

    def run(
        self,
        batches: Sequence[Sequence[Sample]],
        results: Results,
        write: Callable[[list[Found], int], Any] | None = None,
    ) -> list[Any]:
        """Explain batches, and `write` each with its number; returns the panels of the texts. `results` gets an entry
        for each sample: its classes, or an error."""
        texts = []
        with running("Explaining", sum(map(len, batches))) as step:
            for number, batch in enumerate(batches):
                found = self.explained(batch, results)
                if write is not None:
                    write(found, number)
                texts += [one.panel for one in found if not one.panel.plain]
                step(len(batch))
        return texts

    def explained(self, samples: Sequence[Sample], results: Results) -> list[Found]:
        """Those samples of a batch that can be explained."""
        read = []
        for sample in samples:
            try:
                read.append((sample, *self._read(sample)))
            except InputError as error:
                fail(results, sample.name, error)
        if not read:
            return []
        inputs = [given for _, given, _ in read]
        outputs, maps = self.maps(self.vit.preprocessing.stacked(inputs + inputs[-1:] * (self.rows - len(inputs))))
        done = []
        for i, (sample, _, panel) in enumerate(read):
            own = [(column, m[i]) for column, m in maps]
            if not (np.isfinite(outputs[i]).all() and all(np.isfinite(m).all() for _, m in own)):
                fail(results, sample.name, InputError(f"the model gives no finite numbers for {sample.name}"))
                continue
            result = self.described(outputs[i])
            if self.versus is not None and self.versus in [entry["class"] for entry in result["targets"]]:
                said = f"{self.vit.class_name(self.versus)!r} is the predicted class itself; name a target"
                fail(results, sample.name, InputError(f"{sample.name}: {said}"))
                continue
            for column, m in own:
                if words := panel.words(m):
                    listed = [{"word": w.text, "score": w.score, "start": w.start, "end": w.end} for w in words]
                    self.entry(result, column).setdefault("methods", {})[column.method] = listed
            results[sample.name] = result
            done.append(Found(sample, panel, result, own))
        return done

    def _read(self, sample: Sample) -> tuple[Any, Panel]:
        """The model's input of a sample, and what its maps are shown on. Raises InputError."""
        reader = self.vit.preprocessing
        content = reader.opened(sample.given)
        if (said := reader.notice(content, sample.name)) is not None:
            click.echo(f"Notice: {printable(said)}", err=True)
        title = sample.given.name if isinstance(sample.given, Path) else sample.name
        return reader.sample(Example(sample.name, content)), reader.panel(content, printable(title))

    def maps(self, batch: Any) -> tuple[np.ndarray, list[tuple[Column, np.ndarray]]]:
        """The model's outputs [B, C] for a batch, and for each column its maps."""
        outputs: np.ndarray | None = None  # the first method computes them too
        maps: dict[tuple[str, str], np.ndarray] = {}
        for columns in self.groups:
            asked = columns[0].asked
            score: Any = None if self.versus is None else Versus(self.versus)
            target: Any = None
            if asked.prompt is not None:
                score = Cosine(asked.embedding)
            elif asked.index is not None:
                target = asked.index
            elif asked.rank or outputs is not None:
                outputs = self._outputs(batch) if outputs is None else outputs
                target = asked.classes(outputs)
            found, own = self._explained(columns, batch, target, score)
            maps |= found
            outputs = own if outputs is None else outputs
        if outputs is None:
            raise InputError("no method can explain this model")
        return outputs, [(column, maps[column.key]) for column in self.columns if column.key in maps]

    @cached_property
    def groups(self) -> list[list[Column]]:
        """The columns in the order of computation: those of one question whose methods can share a pass, together."""
        groups = []
        for part in self.questions:
            columns = {column.method: column for column in self.columns if column.asked.part == part}
            members = {method: METHODS[method].member(method, self.options) for method in columns}
            groups += [[columns[method] for method in methods] for methods in grouped(members)]
        return groups

    def _explained(
        self, columns: Sequence[Column], batch: Any, target: Any, score: Any
    ) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray | None]:
        """The maps of columns of one question, by one program, and the outputs; where it cannot explain the model, by
        one program each."""
        try:
            with memory_errors():
                methods = {column.method: self.options for column in columns}
                maps, details = explain_with(("logits",), self.vit, batch, methods, target, score)
                found = {column.key: np.asarray(maps[column.method], np.float32) for column in columns}
                return found, np.asarray(details["logits"], np.float64)
        except InputError as error:
            if len(columns) == 1:
                if not self.skip_unfit:
                    raise
                complain(f"{columns[0].method} is left out: {error}")
                return {}, None
        single = [self._explained([column], batch, target, score) for column in columns]
        own = {key: found for maps, _ in single for key, found in maps.items()}
        return own, next((outputs for _, outputs in single if outputs is not None), None)

    def _outputs(self, batch: Any) -> np.ndarray:
        return np.asarray(self.vit.logits(batch), np.float64)

    @cached_property
    def questions(self) -> dict[str, Asked]:
        """What is asked, each once, by its part of names."""
        return {column.asked.part: column.asked for column in self.columns}

    def entry(self, result: dict[str, Any], column: Column) -> dict[str, Any]:
        """What a result has of a column's question."""
        entries = result["targets" if column.asked.prompt is None else "prompts"]
        return entries[[*self.questions].index(column.asked.part)]

    def described(self, outputs: np.ndarray) -> dict[str, Any]:
        """The outputs [C] for one sample as JSON: the top five classes, the explained ones ("target" is the first of
        the "targets") and the one that they are compared with; or the prompts with their cosines."""
        asked = [*self.questions.values()]
        if asked[0].prompt is not None:
            direction = outputs / np.linalg.norm(outputs)
            found = [{"text": one.prompt, "cosine": float(direction @ one.embedding)} for one in asked]
            return {"prompts": found, "files": []}
        probabilities = softmax(outputs)

        def entry(index: int) -> dict[str, Any]:
            return {"class": index, "name": self.vit.class_name(index), "probability": float(probabilities[index])}

        top = np.argsort(-probabilities, kind="stable")[:5]
        explained = [entry(int(one.classes(outputs[None])[0])) for one in asked]
        return {
            "top5": [entry(int(i)) for i in top],
            "target": explained[0],
            "targets": explained,
            **({} if self.versus is None else {"versus": entry(self.versus)}),
            "files": [],
        }

    def answer(self, result: dict[str, Any], column: Column) -> tuple[str, str]:
        """What a map of a sample explains, and the number that the model gives for it: of a class the name and the
        probability, of a prompt the text and the cosine."""
        entry, versus = self.entry(result, column), result.get("versus")
        if column.asked.prompt is not None:
            return entry["text"], f"{entry['cosine']:.3f}"
        other = "" if versus is None else f" versus {versus['name']} {versus['probability']:.1%}"
        return entry["name"], f"{entry['probability']:.1%}{other}"

    def shown(self, heatmap: np.ndarray) -> np.ndarray:
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

    def write(self, found: Sequence[Found], sheet: str) -> None:
        for one in found:
            for column, heatmap in one.maps:
                self._write_map(one, column, heatmap)
        if not found or self.kind == "html":
            return
        if len(self.job.columns) > 1 or self.job.vit.preprocessing.frame is None:
            self._write_figure(self._grid(found), sheet, found)
            return
        for one in found:
            self._write_figure(self._overlay(one), one.sample.file, [one])

    def _write_figure(self, drawn: Any, stem: str, found: Sequence[Found]) -> None:
        file = self.out / f"{stem}.{self.kind}"
        write_figure(drawn, file, question=question_of([one.sample.given for one in found], self.question))
        for one in found:
            one.result["files"].insert(0, str(file))

    def _grid(self, found: Sequence[Found]) -> Any:
        explained = []
        for k, (column, _) in enumerate(found[0].maps):
            names, values = zip(*(self.job.answer(one.result, column) for one in found), strict=True)
            shown = [self.job.shown(one.maps[k][1]) for one in found]
            explained.append(Explained(column.method, column.asked.part, shown, names, values))
        methods = {column.method for column in self.job.columns}
        heading = " · ".join([self.job.vit.name, *(methods if len(methods) == 1 else ())])
        rows = arranged([one.panel for one in found], explained, self.look)
        return grid(rows, heading if self.title is None else self.title, self.look)

    def _overlay(self, one: Found) -> Any:
        reader: Any = self.job.vit.preprocessing
        ((column, heatmap),) = one.maps
        parts = [one.panel.title, self.job.vit.name, column.method]
        if column.asked.prompt is None and (best := one.result["top5"][0])["class"] != one.result["target"]["class"]:
            parts.insert(0, f"predicted: {best['name']} {best['probability']:.1%}")
        above = " ".join(self.job.answer(one.result, column)), " · ".join(parts)
        above = above if self.title is None else (self.title, "")
        scales = None if reader.scales is None else Scales(*reader.scales)
        return overlay_figure(one.panel.picture, self.job.shown(heatmap), *above, reader.frame, scales, self.look)

    def _write_map(self, one: Found, column: Column, heatmap: np.ndarray) -> None:
        sample, result, entry = one.sample, one.result, self.job.entry(one.result, column)
        if column.asked.prompt is None:
            asked = {
                "target": np.int32(entry["class"]),
                "target_name": entry["name"],
                "probability": np.float32(entry["probability"]),
                "versus": result["versus"]["name"] if "versus" in result else "",
            }
        else:
            asked = {"prompt": entry["text"], "cosine": np.float32(entry["cosine"])}
        words = one.panel.words(heatmap)
        of_words = {"words": [w.text for w in words], "scores": np.array([w.score for w in words], np.float32)}
        question, file = question_of([sample.given], self.question), self.out / f"{sample.file}{column.suffix}"
        about = {
            **asked,
            **(of_words if words else {}),
            "photo" if isinstance(sample.given, Path) else "text": printable(sample.given),
            "model": self.job.vit.name,
            "method": column.method,
            "options": json.dumps(self.job.options),
        }
        require_free(file, question)
        write_maps(file, question, heatmap, about)
        result["files"].append(str(file))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [..., classes] of logits, in float64."""
    logits = np.asarray(logits, np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def fail(results: Results, path: str, error: InputError) -> None:
    results[path] = {"error": str(error)}
    complain(str(error))


def print_result(given: str, result: dict[str, Any], signed: set[str]) -> None:
    """`signed` are the methods whose scores of words have signs."""
    console().print(Text(printable(given), style="bold"), soft_wrap=True)  # whole, to be copied
    if "prompts" in result:
        rows = [(entry["text"], f"{entry['cosine']:.3f}") for entry in result["prompts"]]
        print_table(("Prompt", "Cosine"), rows, right=["Cosine"])
    else:
        compared = [result["versus"]] if "versus" in result else []
        marks = {entry["class"]: "<- explained" for entry in result["targets"]}
        marks |= {entry["class"]: "<- compared with" for entry in compared}
        listed = {entry["class"]: entry for entry in (*result["top5"], *result["targets"], *compared)}
        rows = [(e["name"], f"{e['probability']:.1%}", marks.get(index, "")) for index, e in listed.items()]
        print_table(("Class", "Probability", ""), rows, right=["Probability"])
    for target in result.get("targets", ()):
        if "methods" in target:
            print_words(given, target, signed)
    for file in result["files"]:
        click.echo(f" {printable(file)}")
    click.echo()
