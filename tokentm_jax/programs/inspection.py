"""What was found in a function, as a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokentm_jax.errors import InputError
from tokentm_jax.programs.flat import Step, line_of
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.reading import Reading

REMOVAL = ("occlusion", "rise", "shapley", "kernel_shap", "mda")  # methods that need only a grid of patches


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `tokentm_jax.inspect`; `str` gives a table.

    Args:
      blocks: number of Transformer blocks, with all iterations of scans; 0 if no Transformer was found.
      heads: attention heads of a block.
      tokens: N, including the prefix.
      prefix: tokens before those of the patches; None if unknown.
      grid: patches (height, width); None if unknown.
      readout: share of each token in the input of the head [N]; None if unknown.
      steps: number of steps of each kind that rules know, with the source line of the first.
      unknown: what was not understood, one sentence each.
      methods: names of the methods that explain this function.
    """

    blocks: int
    heads: int
    tokens: int
    prefix: int | None
    grid: tuple[int, int] | None
    readout: tuple[float, ...] | None
    post_norm: bool
    scanned: bool
    steps: dict[str, tuple[int, str]]
    unknown: tuple[str, ...]
    methods: tuple[str, ...]

    def __str__(self) -> str:
        rows, more = {"blocks": "none: no Transformer was found"}, [f"with the option patch=: {', '.join(REMOVAL)}"]
        if self.blocks or self.grid is not None:
            more = []
            rows = {
                "blocks": f"{self.blocks}{' in a scan' if self.scanned else ''}",
                "heads": str(self.heads),
                "tokens": str(self.tokens),
                "prefix": _shown(self.prefix),
                "grid": _shown(self.grid),
                "read-out": _of_readout(self.readout),
                "norms": "after the sums" if self.post_norm else "before the layers",
            }
        width = max(len(kind) for kind in (*self.steps, "read-out"))
        lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
        lines += ["", "steps"]
        lines += [f"{kind:{width}}  {count:4d}   first at {line}" for kind, (count, line) in self.steps.items()]
        lines += ["", "not understood", *(self.unknown or ("nothing",))]
        lines += ["", "methods", ", ".join(self.methods) or "none", *more]
        return "\n".join(lines)


def _shown(value: Any) -> str:
    return "unknown: specify it" if value is None else str(value)


def _of_readout(readout: Sequence[float] | None) -> str:
    if readout is None:
        return _shown(None)
    shares = np.asarray(readout)
    read = np.flatnonzero(shares)
    if len(read) == 1:
        return f"token {read[0]}"
    same = np.allclose(shares[read], shares[read][0])
    return f"{'mean' if same else 'mixture'} of {len(read)} tokens, from {read[0]} to {read[-1]}"


def inspected(found: Model, methods: Callable[[], Sequence[str]]) -> Inspection:
    """What was found; `methods()` returns the names of the methods that work."""
    unknown: list[str] = []
    steps: dict[str, tuple[int, str]] = {}
    known: dict[str, Any] = dict.fromkeys(("blocks", "heads", "tokens"), 0) | {"post_norm": False, "scanned": False}
    known |= {"grid": found.source.grid, "prefix": None, "readout": None}
    try:
        _count(found.reading, 1, steps)
        unknown += _pools(found.reading)
        structure = found.structure
    except InputError as error:
        unknown.append(str(error))
    else:
        known |= {name: getattr(structure, name) for name in ("heads", "tokens", "post_norm")}
        known |= {"blocks": structure.depth, "scanned": any(stage.scan is not None for stage in structure.stages)}
        for name in ("grid", "prefix", "readout"):
            try:
                known[name] = getattr(found, name)
            except InputError as error:
                known[name] = None
                unknown.append(str(error))
    return Inspection(**known, steps=steps, unknown=tuple(dict.fromkeys(unknown)), methods=tuple(methods()))


def _count(reading: Reading, times: int, steps: dict[str, tuple[int, str]]) -> None:
    """Count the steps of each kind, in order."""
    for step in reading.flat.steps:
        if step in reading.bodies:
            _count(reading.bodies[step], times * step.params["length"], steps)
        for kind in ([step.kind] if step.kind else []) + ["activation"] * _activates(reading, step):
            count, line = steps.get(kind, (0, line_of(step)))
            steps[kind] = (count + times, line)


def _activates(reading: Reading, step: Step) -> bool:
    """Whether a non-linear group of elementwise steps ends with this one."""
    out = step.outputs[0]
    fact = reading.facts.get(out)
    if fact is None or fact.linear or fact.statistic or fact.reduced or out in reading.exempt:
        return False
    readers = [reading.facts[other.outputs[0]] for other in reading.flat.steps if out in other.inputs[:3]]
    return bool(readers) and not any(reader.root == fact.root or reader.statistic for reader in readers)


def _pools(reading: Reading) -> list[str]:
    """A sentence for every softmax that is not self-attention."""
    used = {step.of for step in reading.attentions}
    found = [
        f"{line_of(step)}: a softmax that is not contracted with values"
        for step in reading.softmaxes
        if not any(reading.facts[number].weights is step for number in used)
    ]
    return found + [line for body in reading.bodies.values() for line in _pools(body)]
