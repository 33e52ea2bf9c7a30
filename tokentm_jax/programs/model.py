"""Functions of any library as models: `Found` is what `capture` and the methods ask for, read from the program."""

import dataclasses
from collections.abc import Callable, Collection
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import eval_jaxpr

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.maths.scores import CLASS_LOGIT, Question, explained
from tokentm_jax.models.capture import GRADIENTS, Trace
from tokentm_jax.programs.flat import flatten
from tokentm_jax.programs.reading import Reading, read
from tokentm_jax.programs.running import Evaluation, Plan, Rules, scan_key
from tokentm_jax.programs.sample import for_one_sample
from tokentm_jax.programs.structure import Attention, Layer, Structure, find, rows_from

Notes = dict[Any, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A function `f(params, inputs) -> outputs` as a model, read for one sample; made by `found`.

    What a method asks for is read when it is asked for: a model without attention has input gradients all the same.
    """

    source: "Function"
    program: Any  # its closed jaxpr for a batch of one
    outputs: Any  # the tree of its outputs
    rules: Rules = dataclasses.field(default_factory=dict)

    @cached_property
    def reading(self) -> Reading:
        flat = flatten(self.program)
        return read(flat, [flat.inputs[-1]])

    @cached_property
    def structure(self) -> Structure:
        return find(self.reading, self.reading.flat.inputs[-1])

    # ---- what methods read of a module ----
    @cached_property
    def grid(self) -> tuple[int, int]:
        """The patch grid. Raises InputError where it is not given and cannot be told, or where the two differ."""
        if self.source.grid is None:
            grid = self.structure.grid
            if grid is None:
                raise InputError(
                    "the grid of patches cannot be told from this function: give it as grid=(height, width)"
                )
            return grid
        try:
            known = self.structure.grid
        except Unfit:
            return self.source.grid
        if known is not None and tuple(known) != tuple(self.source.grid):
            raise InputError(f"grid must be {known}, as this function cuts its input, got {tuple(self.source.grid)}")
        return self.source.grid

    @cached_property
    def tiling(self) -> Any:
        """How the patches are cut, where a convolution does it; else None: side by side."""
        return self.structure.tiling if self.has_blocks else None

    @cached_property
    def prefix(self) -> int:
        """How many tokens come before those of the patches. Raises InputError as `grid`."""
        left = self.structure.tokens - self.grid[0] * self.grid[1]
        known = self.structure.prefix
        if known is None and self.source.prefix is None:
            raise InputError("how many tokens come before those of the patches cannot be told: give it as prefix=")
        if left < 0 or self.source.prefix not in (None, left):
            raise InputError(
                f"grid and prefix must make the {self.structure.tokens} tokens of this function, got {self.grid} and "
                f"{self.source.prefix}"
            )
        return left

    @cached_property
    def readout(self) -> tuple[float, ...]:
        """How the head reads the tokens: a share for each. Raises InputError as `grid`."""
        n, given = self.structure.tokens, self.source.readout
        if given is None:
            if self.structure.readout is None:
                raise InputError("how the head reads the tokens cannot be told: give readout='token', 'avg' or shares")
            return self.structure.readout
        if given == "token":
            given = (1.0,) + (0.0,) * (n - 1)
        elif given == "avg":
            given = (0.0,) * self.prefix + (1 / (n - self.prefix),) * (n - self.prefix)
        if isinstance(given, str) or len(given) != n:
            raise InputError(f"readout must be 'token', 'avg' or a share for each of {n} tokens, got {given!r:.80}")
        known = self.structure.readout
        if known is not None and not np.allclose(known, given, atol=1e-4):
            raise InputError("readout is not how this function reads its tokens: leave it out")
        return tuple(map(float, given))

    @cached_property
    def has_blocks(self) -> bool:
        """Whether a Transformer was found."""
        try:
            return self.structure.depth > 0
        except Unfit:
            return False

    @property
    def depth(self) -> int:
        return self.structure.depth

    @property
    def post_norm(self) -> bool:
        return self.structure.post_norm

    def of(self, params: Any, inputs: Any) -> "Found":
        """The same function and rules for parameters and inputs of another type."""
        return self.source.read(params, inputs).clone(self.rules)

    def require_float32(self) -> None:
        """Raises Unfit for a function that computes in less than float32, whatever its parameters and inputs are."""
        types = [
            kind for kind in _types(self.reading) if jnp.issubdtype(kind, jnp.floating) and jnp.finfo(kind).bits < 32
        ]
        if types:
            raise Unfit(f"this method needs a function that computes in float32; this one computes in {types[0]}")

    def clone(self, rules: Rules) -> "Found":
        """The same function with other backward rules."""
        return dataclasses.replace(self, rules=rules)

    def apply(self, variables: Any, inputs: Array, mutable: Any = ()) -> Any:
        """As `apply` of a Linen module."""
        if self.rules:
            run = lambda x: self.evaluate(variables["params"], x, Plan(self.rules), None, None)[0]  # noqa: E731
        else:
            program, leaves = self.program, jax.tree.leaves(variables["params"])

            def run(x: Array) -> Any:
                outputs = eval_jaxpr(program.jaxpr, program.consts, *leaves, x)
                return jax.tree.unflatten(self.outputs, outputs)

        return jax.vmap(run)(inputs)

    def evaluate(self, params: Any, sample: Array, plan: Plan, extra: Any, state: Any) -> tuple[Any, Notes, Any]:
        """The outputs for one sample, the notes of the plan's taps, and their state."""
        inputs = [*jax.tree.leaves(params), sample]
        done = Evaluation(self.reading, plan, inputs, state, extra).run()
        return jax.tree.unflatten(self.outputs, done.outputs), done.notes, done.state

    def head(self, params: Any) -> Callable[[Array], Any]:
        """What follows the last residual sum: tokens as they leave a block -> outputs of one sample."""
        structure = self.structure
        flat, facts = structure.reading.flat, structure.reading.facts
        sample = jnp.zeros(flat.types[flat.inputs[-1]].shape, flat.types[flat.inputs[-1]].dtype)
        known = Evaluation(structure.reading, Plan(self.rules), [*jax.tree.leaves(params), sample])
        del known.values[flat.inputs[-1]]  # a head that reads more than the tokens is refused below

        def head(tokens: Array) -> Any:
            outputs = []
            for out in flat.outputs:
                if facts[out].above >> structure.last & 1 == 0:
                    raise Unfit("an output of this function does not read the blocks' tokens")
                try:
                    outputs.append(known.function([structure.last], out)(tokens))
                except KeyError:
                    raise Unfit("the head reads more than the tokens that leave the last block") from None
            return jax.tree.unflatten(self.outputs, outputs)

        return head

    def token_rows(self) -> list[tuple[Reading, dict[int, Any], bool]]:
        """For each program that has a part of the stream: where the tokens are in its values, see `structure.rows`."""
        structure = self.structure
        found = []
        for stage in structure.stages:
            if stage.scan is not None:
                found.append(
                    (
                        stage.reading,
                        rows_from(stage.reading, stage.blocks[0][0].stream, structure.tokens, stage),
                        False,
                    )
                )
        own = [stage for stage in structure.stages if stage.scan is None]
        start = own[0].blocks[0][0].stream if own else structure.last
        found.append(
            (structure.reading, rows_from(structure.reading, start, structure.tokens, own[0] if own else None), True)
        )
        return found

    # ---- arrays of all blocks ----
    def capture(self, params: Any, inputs: Array, target: Any, fields: Collection[str]) -> Trace:
        """As `tokentm_jax.capture`."""
        one = partial(self._capture_one, params, fields=fields)
        known, details = self.per_sample(one, inputs, target)
        batch_first = ("input_grads",)
        known = {name: a if name in batch_first else jnp.moveaxis(a, 0, 1) for name, a in known.items()}
        everything: dict[str, Any] = {**dict.fromkeys(Trace._fields), **known, **details}
        return Trace(**everything)

    def per_sample(self, one: Callable[[Array, Any], tuple[Any, Any]], inputs: Array, target: Any) -> tuple[Any, Any]:
        """`one(sample, target of a batch of one) -> (arrays, details)` for every sample of a batch."""
        asked = target if isinstance(target, Question) else Question(CLASS_LOGIT, target)
        asked = asked.of_samples(len(inputs))

        def of_sample(sample: Array, asked: Question) -> tuple[Any, Any]:
            own = jax.tree.map(lambda a: a[None], asked)
            known, details = one(sample, own if isinstance(target, Question) else own.target)
            return known, jax.tree.map(lambda a: a[0], details)

        return jax.vmap(of_sample)(inputs, asked)

    def _capture_one(self, params: Any, sample: Array, target: Any, fields: Collection[str]) -> tuple[Any, Any]:
        points = {point for field, point in GRADIENTS.items() if field in fields}
        places = self._places({*fields, *points} - {"input_grads"})
        taps = {reading: {at: partial(_note, known) for at, known in own.items()} for reading, own in places.items()}
        plan = Plan(self.rules, taps)
        zeros = self._zeros(points, "final_tokens" in fields) if points else {}

        def score(zeros: Any, sample: Array) -> tuple[Array, Any]:
            outputs, notes, _ = self.evaluate(params, sample, plan, zeros, None)
            own, details = explained(jax.tree.map(lambda a: a[None], outputs), target)
            return own.sum(), (notes, details)

        known: dict[str, Any] = {}
        if points or "input_grads" in fields:
            (grads, known["input_grads"]), (notes, details) = jax.grad(score, (0, 1), has_aux=True)(zeros, sample)
            if "input_grads" not in fields:
                del known["input_grads"]
            for field, point in GRADIENTS.items():
                if field in fields:
                    known[field] = self._of_blocks(point, grads, plain=True, final="final_tokens" in fields)
        else:
            _, (notes, details) = score({}, sample)
        for name in fields:
            if name in POINTS and name != "final_tokens":
                known[name] = self._of_blocks(name, notes, plain=False, final="final_tokens" in fields)
        return known, details

    def _places(self, names: Collection[str]) -> dict[Reading, dict[int, dict[str, Any]]]:
        """The values that hold what is asked for, in each of the programs: their names, each with its block."""
        places: dict[Reading, dict[int, dict[str, Any]]] = {}
        for stage in self.structure.stages if names else ():
            own = places.setdefault(stage.reading, {})
            for block in stage.blocks:
                for name in names:
                    if name in POINTS and name != "final_tokens":
                        number = POINTS[name](stage.reading, block)
                        own.setdefault(number, {})[name] = block
        if "final_tokens" in names:
            places.setdefault(self.structure.reading, {}).setdefault(self.structure.last, {})["tokens"] = None
        return places

    def _zeros(self, points: Collection[str], final: bool) -> Notes:
        """Zeros to add at every point whose gradient is asked for."""
        zeros: Notes = {}
        for stage in self.structure.stages:
            own = zeros if stage.scan is None else zeros.setdefault(scan_key(stage.scan), {})
            lead = () if stage.scan is None else (stage.length,)
            for block in stage.blocks:
                for point in points:
                    number = POINTS[point](stage.reading, block)
                    kind = stage.reading.flat.types[number]
                    own[number] = jnp.zeros((*lead, *kind.shape), kind.dtype)
        if final and "tokens" in points:
            kind = self.structure.reading.flat.types[self.structure.last]
            zeros[self.structure.last] = jnp.zeros(kind.shape, kind.dtype)
        return zeros

    def _of_blocks(self, name: str, notes: Notes, plain: bool, final: bool) -> Array:
        """The arrays of all blocks called `name`, in one layout: [L, H, N, N] or [L, N, D]."""
        parts = []
        for stage in self.structure.stages:
            own = notes if stage.scan is None else notes[scan_key(stage.scan)]
            arrays = []
            for block in stage.blocks:
                array = own[POINTS[name](stage.reading, block)]
                array = array if plain else array[name]
                lead = array if stage.scan is not None else array[None]
                arrays.append(jax.vmap(partial(self.canonical, name, block[0].attention))(lead))
            parts.append(jnp.stack(arrays, 1).reshape(-1, *arrays[0].shape[1:]))
        if name == "tokens" and final:
            last = notes[self.structure.last]
            parts.append(self.canonical("tokens", None, last if plain else last["tokens"])[None])
        return jnp.concatenate(parts)

    def canonical(self, name: str, attention: Attention | None, array: Array) -> Array:
        """One block's array as [H, N, N] or [N, D]."""
        n = self.structure.tokens
        if name == "attention":
            assert attention is not None
            return canonical(attention, array)
        return array.reshape(n, -1)


def _note(names: dict[str, Any], evaluation: Evaluation) -> Any:
    """A tap that adds what is handed in, and notes the value, or what `TAKEN` makes of it."""

    def tap(value: Array, state: Any, extra: Any) -> Any:
        if extra is not None:
            value = value + extra
        evaluation.values[evaluation.current] = value
        return (
            value,
            state,
            {name: TAKEN[name](evaluation, block) if name in TAKEN else value for name, block in names.items()},
        )

    return tap


def transformed_value(evaluation: Evaluation, block: list[Layer]) -> Array:
    """x~ of the attention layer: its branch with attention replaced by the identity, without its last bias."""
    attention = block[0].attention
    assert attention is not None
    weights = evaluation.values[attention.weights]
    branch = evaluation.function([attention.weights], block[0].branch)
    return jax.jvp(branch, (jnp.zeros_like(weights),), (identity_of(attention, weights),))[1]


def canonical(attention: Attention, array: Array) -> Array:
    """Attention weights as [H, N, N]."""
    n = array.shape[attention.key]
    return jnp.moveaxis(array, (attention.query, attention.key), (-2, -1)).reshape(-1, n, n)


def identity_of(attention: Attention, weights: Array) -> Array:
    """Attention of each token to itself only, in the layout of `weights`."""
    n = weights.shape[attention.key]
    shape = [1] * weights.ndim
    shape[attention.query] = shape[attention.key] = n
    return jnp.broadcast_to(jnp.eye(n, dtype=weights.dtype).reshape(shape), weights.shape)


TAKEN: dict[str, Callable[[Evaluation, list[Layer]], Array]] = {"transformed_value": transformed_value}


def _normalised(reading: Reading, block: list[Layer]) -> int:
    """What the attention reads: the stream behind its norm, or the stream itself."""
    layer = block[0]
    norm = next(
        (n for n in reading.norms if n.of[2] == layer.stream and reading.descends(layer.branch, n.outputs[0])), None
    )
    if norm is None:
        return layer.stream
    end = norm.outputs[0]
    for step in reading.flat.steps:
        if step.kind in ("scale", "bias") and end in step.inputs[:2]:
            end = step.outputs[0]
    return end


def _ffn(block: list[Layer]) -> Layer:
    if len(block) < 2:
        raise InputError("a block of this function has no FFN layer, which this explanation needs")
    return block[1]


# Field of `Trace` -> the value of a block that holds it.
POINTS: dict[str, Callable[[Reading, list[Layer]], int]] = {
    "attention": lambda reading, block: block[0].attention.weights,  # type: ignore[union-attr]
    "tokens": lambda reading, block: block[0].stream,
    "normalised": _normalised,
    "attention_branch": lambda reading, block: block[0].branch,
    "transformed_value": lambda reading, block: block[0].branch,
    "ffn_branch": lambda reading, block: _ffn(block).branch,
    "middle": lambda reading, block: block[0].normed,  # type: ignore[return-value]
    "after": lambda reading, block: _ffn(block).normed,  # type: ignore[return-value]
    "final_tokens": lambda reading, block: -1,
}


def _types(reading: Reading) -> list[Any]:
    """The types of all values that depend on the input."""
    own = [reading.flat.types[number].dtype for number in reading.facts]
    return own + [kind for body in reading.bodies.values() for kind in _types(body)]


@dataclasses.dataclass(frozen=True)
class Function:
    """A function `(params, inputs [B, ...]) -> outputs [B, ...]` of any library as a model.

    Args:
      function: it must treat the samples of a batch independently; it is traced for a batch of one.
      grid: patches (height, width), where the program does not show them.
      prefix: tokens before those of the patches, likewise.
      readout: how the head reads the tokens: "token", "avg" or a share for each; likewise.
    """

    function: Callable[..., Any]
    grid: tuple[int, int] | None = None
    prefix: int | None = None
    readout: Any = None

    def apply(self, variables: Any, inputs: Array) -> Any:
        """As `apply` of a Linen module."""
        return self.function(variables["params"], inputs)

    def read(self, params: Any, inputs: Any) -> Found:
        """Its program, from a cache. Raises InputError for one that does not give arrays per sample."""
        leaves, tree = jax.tree.flatten(params)
        shapes = tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)
        sample = (tuple(inputs.shape[1:]), jax.dtypes.canonicalize_dtype(inputs.dtype))
        return _read(self, tree, shapes, sample, jax.sharding.get_abstract_mesh())


@lru_cache(maxsize=32)
def _read(function: Function, tree: Any, shapes: tuple[Any, ...], sample: tuple[Any, Any], mesh: Any) -> Found:
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    one = jax.ShapeDtypeStruct((1, *sample[0]), sample[1])
    program, outputs = jax.make_jaxpr(function.function, return_shape=True)(params, one)
    arrays = jax.tree.leaves(outputs)
    if not arrays or any(array.shape[:1] != (1,) for array in arrays):
        shown = [list(array.shape) for array in arrays]
        raise InputError(f"the function must give arrays [B, ...] for inputs [B, ...], got {shown} for a batch of one")
    own = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.jaxpr.invars]
    own[-1] = jax.ShapeDtypeStruct(*sample)
    return Found(function, jax.make_jaxpr(for_one_sample(program))(*own), jax.tree.structure(outputs))
