"""Which methods should `tokentm_mix` mix? All mixes of up to five methods by known causes: choice and confirmation.

    python tests/benchmark/mixes.py --runs runs/mixes --out tests/benchmark/results/mixes.md     (about 10 minutes)
    python tests/benchmark/mixes.py --runs runs/mixes --removal runs/removal --figure mixes.png

`--removal` is a finished run of `tokentm evaluate configs/perturbation.py:rows=mixes,half=odd`: the figure has its
AOPC, and the mean by known causes of the odd half.

The maps of the members are computed once, in evaluations that resume, for the data of `configs/causes.py`: all rules
of rendered scenes, 2 x 2 mosaics of CIFAR-10 and of photos. A mix is what `tokentm_mix` computes, the squared mean of
maps scaled to [0, 1]. The even half of the data chooses, the odd half confirms; they share no photo and no scene.
"""

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from agreement import fronted
from annotated_types import Ge
from common import parser, publish, table
from jax import Array
from matplotlib.figure import Figure

import tokentm_jax as tm
from tokentm_jax import EvaluateConfig, metrics
from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.configs import Row, rows
from tokentm_jax.data.scenes import RULES
from tokentm_jax.methods.table import METHODS
from tokentm_jax.metrics.removal import by_patch
from tokentm_jax.metrics.task import Predict, Subject, Task
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.runs.evaluate import evaluate
from tokentm_jax.runs.records import table_of
from tokentm_jax.runs.report import Finished, open_finished

MEMBERS = (
    *rows("tokentm", "gae", "libra_tokentm", "libra_gae", "libra_attcat", "libra_full_grad"),
    *rows("legrad", "conservative_lrp", "attn_lrp"),
    Row("attn_lrp tokentm", "tokentm", {"rules": "attn_lrp"}),
    Row("attn_lrp gae", "gae", {"rules": "attn_lrp"}),
)
FORMER = ("libra_tokentm", "libra_full_grad", "legrad", "conservative_lrp")
DEFAULT = tuple(inspect.signature(METHODS["tokentm_mix"].function).parameters["methods"].default.split(","))
NAMED = {
    frozenset(FORMER): "former mix",
    frozenset(DEFAULT): "tokentm_mix",
    frozenset((*DEFAULT, "libra_attcat")): "mix of 5",
    frozenset(("libra_tokentm", "libra_gae", "libra_attcat", "legrad")): "with AttCAT",
    frozenset(("libra_tokentm", "libra_gae", "conservative_lrp", "legrad")): "with Conservative LRP",
    frozenset(("libra_tokentm", "libra_gae", "libra_full_grad")): "without LeGrad",
}
RECIPE = Path(__file__).parents[2] / "configs/causes.py"
LIMITS = {"cifar10": 600, "mosaic": 300}  # cells; 192 scenes of each rule
COLUMNS = ("correlation", "on causes", "CIFAR-10 share", "CIFAR-10 auc", "photos share", "photos auc")
NOTES = """Means over the even half of the data, which chose, and the odd half, which confirms. "correlation": of the
relevance of parts with their effects, mean of all rules of rendered scenes; "on causes": the share of the parts'
relevance that is on parts with an effect, the same mean; "share" and "auc": relevance in the right cell of 2 x 2
mosaics. "mean" is the mean of the six columns. **Bold**: worse than the former mix by more than 0.005. The first mixes
are those with the best mean on the even half among mixes that are worse than it in no column there by more than that.
One method is taken as it is."""


class Data(NamedTuple):
    """What was recorded of one kind of data: the maps of each member [n, patches], the truth, and the half of each."""

    maps: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    odd: np.ndarray


def recording(task: Task) -> Task:
    """The task, which also records the map and the truth of each patch."""

    def compute(
        predict: Predict, subject: Subject, maps: Array, *, patches: Annotated[int, Ge(1)] = 64
    ) -> dict[str, Array]:
        def flat(grids: Array) -> Array:
            return jnp.pad(grids.reshape(len(maps), -1), ((0, 0), (0, patches)))[:, :patches]

        assert subject.masks is not None
        tokens = by_patch(maps, subject.grid, subject.tiling)
        found = {**task.compute(predict, subject, maps), "map": flat(tokens)}
        if task.shared is None:
            return found | {"inside": flat(by_patch(subject.masks.astype(bool).astype(maps.dtype), subject.grid))}
        parts = subject.masks.astype(jnp.int32)
        each = [flat(by_patch((parts == part).astype(maps.dtype), subject.grid)) for part in range(1, 9)]
        return found | {"shown": jnp.stack(each, 1)}

    return dataclasses.replace(task, compute=compute)


def recorded(data: str, folder: Path) -> Data:
    config = read_recipe(Path(f"{RECIPE}:data={data}"), EvaluateConfig)
    name = f"recorded_{config.task}"
    TASKS.setdefault(name, recording(TASKS[config.task]))
    options = {**config.options, "patches": 196 if data == "mosaic" else 64}
    limit = LIMITS.get(data, 192)
    evaluate(dataclasses.replace(config, task=name, rows=MEMBERS, limit=limit, options=options), out=folder)
    run = open_finished(folder)
    maps, found = {}, {}
    for row in MEMBERS:
        done, found = table_of(row, run.config.explained, run.clean, run.records(row), run.keys)
        maps[row.name] = found[f"{run.config.explained[0]}_map"]
    truth = {name.partition("_")[2]: array for name, array in found.items()}
    odd = np.array([int("".join(c for c in key.split("/")[0] if c.isdigit())) % 2 for key in done])
    if "caused" in truth:
        counted = truth["caused"].astype(bool)
        maps = {name: array[counted] for name, array in maps.items()}
        truth = {name: array[counted] for name, array in truth.items()}
        odd = odd[counted]
    return Data(maps, truth, odd)


@jax.jit
def mixed(maps: list[Array]) -> Array:
    """What `tokentm_mix` makes of the maps [n, patches] of its members; one map stays as it is."""
    return maps[0] if len(maps) == 1 else tm.combine([m[:, None] for m in maps], "mean", power=2)[:, 0]


@jax.jit
def pointed(maps: Array, inside: Array) -> tuple[Array, Array]:
    found = metrics.pointing(maps[:, None], inside[:, None])
    return found["share"], found["auc"]


@jax.jit
def followed(maps: Array, shown: Array, drops: Array) -> tuple[Array, Array]:
    relevance = jnp.einsum("bkn,bn->bk", (shown > 0).astype(maps.dtype), maps)
    found = metrics.effects(relevance, drops, (shown > 0).any(2), 1.0)
    return found["linear_correlation"], 1 - found["without_effect"]


def measured(members: tuple[str, ...], data: dict[str, Data]) -> np.ndarray:
    """[2, 6]: the columns of the even and of the odd half."""
    halves: list[list[np.ndarray]] = [[], []]
    for name, one in data.items():
        mix = mixed([one.maps[member] for member in members])
        if name in RULES:
            both = followed(mix, one.truth["shown"], one.truth["drop"])
        else:
            both = pointed(mix, one.truth["inside"])
        for half, values in enumerate(halves):
            values.append(np.array([np.asarray(each)[one.odd == half].mean() for each in both]))
    scenes = [name in RULES for name in data]
    return np.stack([
        np.concatenate([
            np.mean([v for v, is_scene in zip(values, scenes, strict=True) if is_scene], 0),
            *(v for v, is_scene in zip(values, scenes, strict=True) if not is_scene),
        ])
        for values in halves
    ])  # fmt: skip


def trade(run: Finished, results: dict[tuple[str, ...], np.ndarray]) -> Figure:
    """AOPC of the rows of a run against the mean by known causes, both on the odd half."""
    every = {frozenset(mix): values[1].mean() for mix, values in results.items()}
    places = {}
    for row in run.config.rows:
        mixed = row.method == "tokentm_mix"
        members = frozenset(str(row.options.get("methods", ",".join(DEFAULT))).split(",") if mixed else [row.name])
        aopc = [f["value"] for f in run.figures if (f["method"], f["metric"]) == (row.name, "aopc")]
        if aopc and members in every and row.options.keys() <= {"methods"}:
            places[NAMED.get(members, row.name)] = aopc[0], every[members]
    names = [*places]
    x, y = np.array([*places.values()]).T
    return fronted(names, x, y, "AOPC by removal of pixels of photos, higher is better")


def main(runs: Path, out: Path | None, removal: Path | None, figure: Path | None) -> None:
    data = {name: recorded(name, runs / name) for name in (*RULES, *LIMITS)}
    names = [row.name for row in MEMBERS]
    every = [mix for size in range(1, 6) for mix in itertools.combinations(names, size)]
    results = {mix: measured(mix, data) for mix in every}
    by_name = {tuple(sorted(mix)): mix for mix in every}
    former, default = (by_name[tuple(sorted(mix))] for mix in (FORMER, DEFAULT))
    base = results[former]
    fit = [mix for mix in every if (results[mix][0] >= base[0] - 0.005).all()]
    fit.sort(key=lambda mix: -results[mix][0].mean())
    shown = list(dict.fromkeys([*fit[:8], default, former, *((name,) for name in names)]))

    def cells(half: int, mix: tuple[str, ...]) -> list[str]:
        worse = results[mix][half] < base[half] - 0.005
        values = [f"**{v:.3f}**" if w else f"{v:.3f}" for v, w in zip(results[mix][half], worse, strict=True)]
        return [*values, f"{results[mix][half].mean():.3f}"]

    def of_half(half: int) -> str:
        kinds = {default: " (`tokentm_mix`)", former: " (the former mix)"}
        lines = [[", ".join(f"`{m}`" for m in mix) + kinds.get(mix, ""), *cells(half, mix)] for mix in shown]
        return table(["members", *COLUMNS, "mean"], lines)

    counted = ", ".join(f"{name} {len(one.odd)}" for name, one in data.items())
    if removal is not None and figure is not None:
        trade(open_finished(removal), results).savefig(figure)
    publish(
        out,
        "# Mixes of methods by known causes",
        NOTES,
        f"{len(every)} mixes, of which {len(fit)} are worse than the former mix nowhere. Images or cells: {counted}.",
        "## The even half, which chose",
        of_half(0),
        "## The odd half",
        of_half(1),
    )


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/mixes"), help="where the evaluations are kept")
    arguments.add_argument("--removal", type=Path, help="a finished run of configs/perturbation.py")
    arguments.add_argument("--figure", type=Path, help="write the picture of the trade-off")
    given = arguments.parse_args()
    main(given.runs, given.out, given.removal, given.figure)
