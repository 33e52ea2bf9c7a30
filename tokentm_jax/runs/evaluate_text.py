"""Evaluations of explanations of texts: methods x sentences -> results per sentence -> figures with intervals."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, Len, Lt

from tokentm_jax import metrics
from tokentm_jax.configs import RANDOM, Row, check_rows
from tokentm_jax.data.sentences import Sentences
from tokentm_jax.errors import InputError
from tokentm_jax.files import ours, read_json, reason, require_ours, write_json, write_text
from tokentm_jax.identity import claimed, environment, identity_of
from tokentm_jax.inputs.texts import Tokens, words
from tokentm_jax.methods.explain import compiled
from tokentm_jax.metrics.task import CLEAN, PREDICTED, Number
from tokentm_jax.metrics.texts import Probabilities, agreement, kendall, leave_one_out, read_lexicon, removal_curves
from tokentm_jax.models.loading import Model
from tokentm_jax.runs.records import Records, record_file
from tokentm_jax.runs.report import RowSettings, document, in_table, joined
from tokentm_jax.validation import Name, Text, check_fields, checked, lists_of

Share = Annotated[float, Ge(-1), Le(1)]


@dataclasses.dataclass(frozen=True)
class TextEvaluateConfig:
    """One table of methods on labelled sentences.

    Args:
      name: of the output folder; no path.
      model: a folder, as for `load`.
      data: see `tokentm_jax.data.sentences`.
      rows: the methods; a `random` row is added.
      ratings: for the class that a sentence is explained for, by its number: 1 if words that people rate as good speak
        for it, -1 for bad ones. None: no comparison with people.
      limit: so many sentences, spread evenly.
    """

    name: Name
    model: Text
    data: Text
    rows: Annotated[Sequence[Row], Len(1)]
    ratings: Annotated[tuple[int, ...], Len(2)] | None = None
    batch_size: Annotated[int, Ge(1), Le(4096)] = 32
    limit: Annotated[int, Gt(0)] | None = None
    seed: Annotated[int, Ge(0), Lt(2**31 - 2)] = 0


# Figure: its better end, digits, and what it is of the fields of the records.
def _drop(way: int, kept: int) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Area over the shares from 0 to 1 of the drop of the probability: [n]."""

    def of(table: Mapping[str, np.ndarray]) -> np.ndarray:
        curves = table["curves"][:, way, kept]
        whole = table["curves"][:, way, 0, :1]
        return metrics.unit_area(whole - curves)

    return of


COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]]] = {
    "comprehensiveness": ("higher", _drop(0, 0)),
    "sufficiency": ("lower", _drop(0, 1)),
    "comprehensiveness_masked": ("higher", _drop(1, 0)),
    "sufficiency_masked": ("lower", _drop(1, 1)),
    "kendall_leave_one_out": ("higher", lambda table: table["kendall"]),
    "top_word_rated": ("higher", lambda table: 100 * table["top_is_rated"][table["rated"]]),
    "agreement_with_people": ("higher", lambda table: table["agreement"][table["rated"]]),
}
RESULTS = ("results.json", "results.md")


def _fields(ways: int, rated: bool) -> dict[str, Any]:
    people = {"rated": list[bool], "top_is_rated": list[Share], "agreement": list[Share]} if rated else {}
    return {"curves": lists_of(Number, ways, 2, 11), "kendall": list[Share], **people}


def check_text_config(config: TextEvaluateConfig) -> TextEvaluateConfig:
    """The config with a `random` row, every field as its annotation says. Raises InputError as `check`."""
    config = check_fields(config, "the evaluation")
    check_rows(config.name, config.rows)
    for row in config.rows:
        if row.random_blocks is not None or row.by_patch or (row.method == RANDOM and row.options):
            raise InputError(f"random_blocks, by_patch and noise of pixels are for images, and {row.name!r} has them")
    if RANDOM not in [row.method for row in config.rows]:
        config = dataclasses.replace(config, rows=(*config.rows, Row(RANDOM, RANDOM)))
    return config


def evaluate_text(
    config: TextEvaluateConfig,
    text: Model,
    data: Sentences,
    out: Path,
    report: Callable[[int, int, Callable[[], list[dict[str, Any]]]], None] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run an evaluation to its end, or from where `out` stopped on; returns the content of `results.json`.

    The class that is predicted is explained. Results per sentence are kept after every batch, in `records`. Rows that
    an earlier run left in `out`, and that the config does not have, stay in the results. `overwrite` also replaces
    files in `out` that this program did not write.

    Raises:
      InputError: a config and model that do not go together, no lexicon where `ratings` need it, a full disk, or an
        `out` that holds another evaluation, files of others, or a run that is going on.
    """
    config = check_text_config(config)
    text.require_classes()
    lexicon = None if config.ratings is None else read_lexicon()
    if config.ratings is not None and len(config.ratings) != text.module.num_classes:
        raise InputError(f"'ratings' must name {text.module.num_classes} classes, got {len(config.ratings)}")
    run = {
        **environment(),
        "data": {"name": config.data, "identity": data.identity, "sentences": len(data.texts)},
        "model": {"name": text.name, "identity": _identity(text)},
        "seed": config.seed,
        "ratings": config.ratings and list(config.ratings),
    }
    terms = {**run, "data": {"name": Path(config.data).name, "identity": data.identity}}
    with claimed(out, terms, (*RESULTS, "records"), overwrite):
        for name in RESULTS:
            require_ours(out / name, overwrite)
        try:
            (out / "records").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{out / 'records'} cannot be written: {reason(error)}") from None
        return _evaluate(config, text, data, out, run, lexicon, report, overwrite)


def _identity(text: Model) -> str:
    return identity_of(text.module, text.params, text.preprocessing.to_dict())


def _evaluate(
    config: TextEvaluateConfig,
    text: Model,
    data: Sentences,
    out: Path,
    run: dict[str, Any],
    lexicon: Mapping[str, float] | None,
    report: Any,
    overwrite: bool,
) -> dict[str, Any]:
    ways = 1 if text.module.mask_id is None else 2
    fields = _fields(ways, lexicon is not None)
    whole = _with_kept_rows(config, out)
    records = {row.name: Records(record_file(out, row), fields, (PREDICTED,)) for row in whole.rows}
    clean = Records(out / "records" / "clean.jsonl", {"hit": list[bool]}, (CLEAN,))
    # By length, so that little of a batch is padding; every group has the same sentences whatever is done already.
    order = np.argsort([len(each) for each in data.texts], kind="stable")
    size = config.batch_size
    groups = [order[i : i + size].tolist() for i in range(0, len(order), size)]

    def figures(final: bool = False) -> list[dict[str, Any]]:
        return _figures(whole if final else config, clean, records, ways, lexicon is not None, final)

    for number, group in enumerate(groups, 1):
        keys = [f"{place:06d}" for place in group]
        waiting = [row for row in config.rows if any((key, PREDICTED) not in records[row.name].places for key in keys)]
        missing = [i for i, key in enumerate(keys) if (key, CLEAN) not in clean.places]
        if waiting or missing:
            full = group + group[-1:] * (size - len(group))
            given = [data.texts[place] for place in full]
            tokens = text.read(given)
            probability = Probabilities(text.logits)
            logits = np.asarray(text.logits(tokens))
            target = logits.argmax(-1).astype(np.int32)
            if missing:
                clean.append([(keys[i], CLEAN) for i in missing], {"hit": (target == data.labels[full])[missing]})
            losses = leave_one_out(probability, tokens, target)
            for row in waiting:
                scores = _scores(config, text, row, tokens, target, full)
                curves = removal_curves(probability, tokens, scores, target, text.module.mask_id)
                found = {"curves": curves.astype(np.float64), "kendall": _taus(scores, losses, tokens)}
                if lexicon is not None and config.ratings is not None:
                    found |= _people(text, given, scores, lexicon, [config.ratings[t] for t in target])
                new = [i for i, key in enumerate(keys) if (key, PREDICTED) not in records[row.name].places]
                parts = {name: np.asarray(array)[new] for name, array in found.items()}
                records[row.name].append([(keys[i], PREDICTED) for i in new], parts)
        if report is not None:
            report(number, len(groups), figures)
    run["methods"] = [dataclasses.asdict(row) for row in whole.rows]
    results = {"run": run, "rows": figures(True), "differences": _differences(whole, records, ways, lexicon)}
    write_json(out / "results.json", results, overwrite=overwrite)
    write_text(out / "results.md", text_markdown(whole, results), overwrite=overwrite)
    return results


def _with_kept_rows(config: TextEvaluateConfig, out: Path) -> TextEvaluateConfig:
    """As `report.with_kept_rows`; a row whose records are gone is left out."""
    path = out / "results.json"
    if not ours(path):
        return config
    listed = read_json(path)["run"].get("methods", [])  # not in results of earlier versions
    kept = [Row(**row) for row in checked(f"{path}: 'methods'", list[RowSettings], listed)]
    kept = [row for row in kept if record_file(out, row).is_file()]
    return check_text_config(dataclasses.replace(config, rows=joined(kept, config.rows)))


def _scores(
    config: TextEvaluateConfig, text: Model, row: Row, tokens: Tokens, target: np.ndarray, places: Sequence[int]
) -> np.ndarray:
    """Scores [B, N] of a row; those that are not finite count as zero."""
    if row.method == RANDOM:
        noise = [metrics.random_map(f"{place:06d}", (1, text.module.max_length), config.seed)[0] for place in places]
        return np.stack(noise)[:, : tokens.ids.shape[1]]
    program = compiled(text.module, {row.method: row.options})
    found = np.asarray(program(text.params, tokens, target)[0][row.method])
    return np.nan_to_num(found, posinf=0, neginf=0)


def _taus(scores: np.ndarray, losses: np.ndarray, tokens: Tokens) -> np.ndarray:
    taus = [kendall(a[~s], b[~s]) for a, b, s in zip(scores, losses, np.asarray(tokens.special), strict=True)]
    return np.array(taus)


def _people(
    text: Model, given: Sequence[str], scores: np.ndarray, lexicon: Mapping[str, float], signs: Sequence[int]
) -> dict[str, np.ndarray]:
    pairs = zip(words(text, list(given), scores), signs, strict=True)
    found = [agreement(listed, lexicon, sign) for listed, sign in pairs]
    return {name: np.array([each[name] for each in found]) for name in found[0]}


def _columns(ways: int, rated: bool) -> list[str]:
    gone = ([] if ways == 2 else ["comprehensiveness_masked", "sufficiency_masked"]) + (
        [] if rated else ["top_word_rated", "agreement_with_people"]
    )
    return [name for name in COLUMNS if name not in gone]


def _table(records: Records) -> dict[str, np.ndarray]:
    keys = sorted(records.places)
    return {name: records.take(name, keys) for name in records.fields}


def _figures(
    config: TextEvaluateConfig, clean: Records, records: Mapping[str, Records], ways: int, rated: bool, final: bool
) -> list[dict[str, Any]]:
    rows = []

    def add(row: str, metric: str, values: np.ndarray) -> None:
        value, low, high = metrics.bootstrap(values, seed=config.seed, resamples=1000 if final else 1)
        rows.append(
            {"method": row, "metric": metric, "value": value, "low": low, "high": high, "sentences": len(values)}
        )

    if clean.places:
        add(CLEAN, "accuracy", 100.0 * _table(clean)["hit"])
    for row in config.rows:
        if records[row.name].places:
            table = _table(records[row.name])
            for metric in _columns(ways, rated):
                values = COLUMNS[metric][1](table)
                if len(values):
                    add(row.name, metric, values)
    return rows


def _differences(
    config: TextEvaluateConfig, records: Mapping[str, Records], ways: int, lexicon: Any
) -> list[dict[str, Any]]:
    """Every row less the first, over the same sentences."""
    first, *others = config.rows
    base, found = _table(records[first.name]), []
    for row in others:
        table = _table(records[row.name])
        for metric in _columns(ways, lexicon is not None):
            ours, theirs = COLUMNS[metric][1](table), COLUMNS[metric][1](base)
            if len(ours):
                value, low, high = metrics.paired(ours, theirs, seed=config.seed)
                found.append(
                    {"method": row.name, "metric": metric, "baseline": first.name, "difference": value}
                    | {"low": low, "high": high, "sentences": len(ours)}
                )
    return found


def text_markdown(config: TextEvaluateConfig, results: Mapping[str, Any]) -> str:
    """`results.md`: a line per method, with intervals; a star where it differs from the first row's."""
    run, rows = results["run"], results["rows"]
    columns = list(dict.fromkeys(row["metric"] for row in rows if row["method"] != CLEAN))
    apart = {(d["method"], d["metric"]) for d in results["differences"] if d["low"] > 0 or d["high"] < 0}
    cells = {}
    for row in rows:
        star = "*" if (row["method"], row["metric"]) in apart else ""
        digits = 1 if row["metric"] in ("accuracy", "top_word_rated") else 3
        shown = f"{row['value']:.{digits}f}{star} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        cells[row["method"], row["metric"]] = shown
    arrows = {"higher": "↑", "lower": "↓"}
    heads = [f"{name.replace('_', ' ')} {arrows[COLUMNS[name][0]]}" for name in columns]
    lines = [
        f"# {config.name}",
        "",
        f"{run['model']['name']} on {run['data']['name']}: {run['data']['sentences']} sentences, seed {run['seed']}. "
        f"Accuracy {cells.get((CLEAN, 'accuracy'), '')} %. In brackets: 95 % intervals over sentences; * is a "
        f"difference from {in_table(config.rows[0].name)} over the same sentences whose interval excludes zero.",
        "",
        f"| method | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    for row in config.rows:
        lines.append(f"| {in_table(row.name)} | {' | '.join(cells.get((row.name, c), '') for c in columns)} |")
    return document(lines)
