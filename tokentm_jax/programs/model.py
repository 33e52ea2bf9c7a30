"""Models as programs: `Function` is a model as it is given, and `Model` is its program, which methods work on."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import eval_jaxpr

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.inputs.values import check_inputs, looked_up, of, values
from tokentm_jax.maths.scores import CLASS_LOGIT, Question, explained
from tokentm_jax.programs.flat import flatten
from tokentm_jax.programs.reading import Reading, read
from tokentm_jax.programs.running import Evaluation, Plan, Rules
from tokentm_jax.programs.sample import for_one_sample
from tokentm_jax.programs.structure import Structure, find

Notes = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Applied:
    """A Linen module, or one of its methods, as a function `(params, inputs) -> outputs`."""

    module: Any
    method: str = "__call__"

    def __call__(self, params: Any, inputs: Any) -> Any:
        if self.method == "__call__":
            return self.module.apply({"params": params}, inputs)
        return self.module.apply({"params": params}, inputs, method=self.method)


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

    @property
    def module(self) -> Any:
        """The Linen module that it applies, or None. Grid, prefix and read-out are then the module's own."""
        return self.function.module if isinstance(self.function, Applied) else None

    @property
    def name(self) -> str:
        """What it is called in a sentence."""
        named = self.function if self.module is None else type(self.module)
        return getattr(named, "__name__", "the function")

    def wide(self) -> "Function":
        """The same model with activations in float32 at least."""
        dtype = getattr(self.module, "dtype", None)
        if dtype is None or jnp.finfo(dtype).bits >= 32:
            return self
        return dataclasses.replace(self, function=Applied(self.module.clone(dtype=jnp.float32)))

    def look_up(self, params: Any, inputs: Any) -> Any:
        """What is differentiated: word pieces become their embeddings, and all else is that already."""
        return looked_up(inputs, self.module, params)

    def read(self, params: Any, inputs: Any) -> "Model":
        """Its program, from a cache. Raises InputError for one that does not give arrays per sample."""
        types = lambda tree: tuple((jnp.shape(a), jax.dtypes.canonicalize_dtype(a.dtype)) for a in tree)  # noqa: E731
        leaves, tree = jax.tree.flatten(params)
        own, own_tree = jax.tree.flatten(inputs)
        one = tuple((shape[1:], kind) for shape, kind in types(own))
        leaves = [a if hasattr(a, "dtype") else np.asarray(a) for a in leaves]
        return _read(self, tree, types(leaves), own_tree, one, jax.sharding.get_abstract_mesh())


@lru_cache(maxsize=64)
def _read(function: Function, tree: Any, shapes: Any, inputs_tree: Any, inputs: Any, mesh: Any) -> "Model":
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    one = jax.tree.unflatten(inputs_tree, [jax.ShapeDtypeStruct((1, *shape), kind) for shape, kind in inputs])
    program, outputs = jax.make_jaxpr(function.function, return_shape=True)(params, one)
    arrays = jax.tree.leaves(outputs)
    if not arrays or any(array.shape[:1] != (1,) for array in arrays):
        shown = [list(array.shape) for array in arrays]
        raise InputError(f"the function must give arrays [B, ...] for inputs [B, ...], got {shown} for a batch of one")
    own = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.jaxpr.invars]
    own = [*own[: -len(inputs)], *(jax.ShapeDtypeStruct(*shape) for shape in inputs)]
    single = jax.make_jaxpr(for_one_sample(program, len(inputs)))(*own)
    return Model(function, Program(single, jax.tree.structure(outputs), len(inputs), of(one).regular))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A program, read when a method asks for it: a model without attention has input gradients all the same."""

    jaxpr: Any  # a closed one, for one sample without an axis of samples
    outputs: Any  # the tree of its outputs
    arrays: int  # of which the inputs of a sample consist; what is explained is the first
    regular: bool  # whether maps are a grid of patches; else rows of all tokens

    @cached_property
    def reading(self) -> Reading:
        flat = flatten(self.jaxpr)
        return read(flat, [flat.inputs[-self.arrays]])

    @cached_property
    def structure(self) -> Structure:
        return find(self.reading, self.reading.flat.inputs[-self.arrays])


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its program, and the backward rules by which that is evaluated; made by `Function.read`."""

    source: Function
    program: Program
    rules: Rules = dataclasses.field(default_factory=dict)

    @property
    def reading(self) -> Reading:
        return self.program.reading

    @property
    def structure(self) -> Structure:
        return self.program.structure

    # ---- what methods read of a model ----
    @cached_property
    def grid(self) -> tuple[int, int] | None:
        """The patch grid; None of texts. Raises InputError where it is not given and cannot be told, or where the two
        differ."""
        if hasattr(self.source.module, "grid"):
            return self.source.module.grid
        if not self.program.regular:
            return None
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
        if hasattr(self.source.module, "tiling"):
            return self.source.module.tiling
        return self.structure.tiling if self.has_blocks else None

    @cached_property
    def prefix(self) -> int:
        """How many tokens come before those of the patches. Raises InputError as `grid`."""
        if hasattr(self.source.module, "prefix"):
            return self.source.module.prefix
        if self.grid is None:
            return 0
        gh, gw = self.grid
        left = self.structure.tokens - gh * gw
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
        if hasattr(self.source.module, "readout"):
            return self.source.module.readout
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

    def reads(self, mask: Array) -> Array:
        """How the head reads the tokens [B, N] of padded texts, of which those of the mask [B, N] are there."""
        if hasattr(self.source.module, "reads"):
            return self.source.module.reads(mask)
        if self.source.readout == "avg":
            shares = jnp.asarray(mask, jnp.float32)
            return shares / jnp.maximum(shares.sum(-1, keepdims=True), 1)
        return jnp.broadcast_to(jnp.asarray(self.readout, jnp.float32), mask.shape)

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

    # ---- the same model otherwise ----
    def wide(self, params: Any, inputs: Any) -> "Model":
        """The same model in float32 at least, for such parameters and inputs. Raises Unfit for a function that
        computes in less, whatever it is given."""
        model = self.source.wide().read(params, inputs).by(self.rules)
        types = [t for t in _types(model.reading) if jnp.issubdtype(t, jnp.floating) and jnp.finfo(t).bits < 32]
        if types:
            raise Unfit(f"this method needs a function that computes in float32; this one computes in {types[0]}")
        return model

    def by(self, rules: Rules) -> "Model":
        """The same model with other backward rules."""
        return dataclasses.replace(self, rules=rules)

    # ---- evaluation ----
    def apply(self, variables: Any, inputs: Any) -> Any:
        """The outputs for a batch, as `apply` of a Linen module gives them."""
        params = variables["params"]
        if self.rules:
            run = lambda x: self.evaluate(params, x, Plan(self.rules), None, None)[0]  # noqa: E731
        else:
            leaves, closed = jax.tree.leaves(params), self.program.jaxpr

            def run(x: Any) -> Any:
                outputs = eval_jaxpr(closed.jaxpr, closed.consts, *leaves, *jax.tree.leaves(x))
                return jax.tree.unflatten(self.program.outputs, outputs)

        return jax.vmap(run)(inputs)

    def evaluate(self, params: Any, sample: Any, plan: Plan, extra: Any, state: Any) -> tuple[Any, Notes, Any]:
        """The outputs for one sample, the notes of the plan's taps, and their state."""
        inputs = [*jax.tree.leaves(params), *jax.tree.leaves(sample)]
        done = Evaluation(self.reading, plan, inputs, state, extra).run()
        return jax.tree.unflatten(self.program.outputs, done.outputs), done.notes, done.state

    def per_sample(
        self, one: Callable[[Any, Callable[[Any], Array]], tuple[Any, Any]], inputs: Any, target: Any
    ) -> tuple[Any, dict[str, Any]]:
        """`one(sample, score) -> (arrays, outputs)` for every sample of a batch, and what `explained` says of them.

        `score(outputs)` is the number that is explained, of one sample's outputs.
        """
        asked = target if isinstance(target, Question) else Question(CLASS_LOGIT, target)
        count = values(inputs).shape[0]
        kinds = jax.tree.unflatten(self.program.outputs, self.program.jaxpr.out_avals)
        kinds = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), kinds)
        jax.eval_shape(lambda outputs: explained(outputs, target)[0], kinds)  # refuses what cannot be asked
        own = asked.of_samples(count)

        def of_sample(sample: Any, own: Question | None, index: Array) -> tuple[Any, Any]:
            def score(outputs: Any) -> Array:
                if own is not None:
                    return explained(*jax.tree.map(lambda a: a[None], (outputs, own)))[0][0]
                # A custom score is written for the batch: it sees this sample in every place.
                every = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), outputs)
                return explained(every, target)[0][index]

            return one(sample, score)

        known, outputs = jax.vmap(of_sample)(inputs, own, jnp.arange(count))
        return known, explained(outputs, target)[1]

    def head(self, params: Any, sample: Any) -> Callable[[Array], Any]:
        """What follows the last residual sum: tokens as they leave a block -> outputs of one sample."""
        structure = self.structure
        flat, facts = structure.reading.flat, structure.reading.facts
        inputs = [*jax.tree.leaves(params), *jax.tree.leaves(sample)]
        known = Evaluation(structure.reading, Plan(self.rules), inputs)
        del known.values[flat.inputs[-self.program.arrays]]  # a head that reads more than the tokens is refused below

        def head(tokens: Array) -> Any:
            outputs = []
            for out in flat.outputs:
                if facts[out].above >> structure.last & 1 == 0:
                    raise Unfit("an output of this function does not read the blocks' tokens")
                try:
                    outputs.append(known.function([structure.last], out)(tokens))
                except KeyError:
                    raise Unfit("the head reads more than the tokens that leave the last block") from None
            return jax.tree.unflatten(self.program.outputs, outputs)

        return head


def _types(reading: Reading) -> list[Any]:
    """The types of all values that depend on the input."""
    own = [reading.flat.types[number].dtype for number in reading.facts]
    return own + [kind for body in reading.bodies.values() for kind in _types(body)]


# ---- what may be a model ------------------------------------------------------------------------------------------


def function_of(model: Any, grid: Any = None, prefix: Any = None, readout: Any = None) -> Function:
    """A function or Linen module as a model. Raises InputError, with what to do, for anything else, and for a module
    that is told what it shows itself."""
    if isinstance(model, Function):
        return model
    check_module(model)
    if is_function(model):
        readout = readout if readout is None or isinstance(readout, str) else tuple(readout)
        return Function(model, grid, prefix, readout)
    if (grid, prefix, readout) != (None, None, None):
        raise InputError("grid, prefix and readout are for functions: a module has its own")
    return Function(Applied(model))


def check_module(module: Any) -> None:
    """InputError, with what to do, for what is neither a Linen module nor a function of parameters and inputs."""
    if hasattr(module, "apply") and not isinstance(module, type):
        return
    what, found = (
        "the model must be a function (params, inputs) -> outputs or a Flax Linen module",
        type(module).__name__,
    )
    if hasattr(module, "module") and hasattr(module, "params"):
        raise InputError(f"{what}, got a {found}: give its `module`, and then its `params`")
    if any(base.__module__.startswith("flax.nnx") for base in inspect.getmro(type(module))):
        raise InputError(
            f"{what}, got the NNX module {found}: split it, `graph, state = nnx.split(model)`, and give "
            "lambda state, images: nnx.merge(graph, state)(images), and then `state`"
        )
    if is_function(module):
        return
    if callable(module) and not isinstance(module, type):
        raise InputError(f"{what}, got a {found}: give lambda params, images: ...")
    raise InputError(f"{what}, got {module!r:.80}")


def is_function(model: Any) -> bool:
    """Whether a model is a function `(params, inputs) -> outputs`, and not a module of some library that is called."""
    libraries = {base.__module__.partition(".")[0] for base in inspect.getmro(type(model))}
    if not callable(model) or isinstance(model, type) or libraries & {"flax", "equinox", "keras", "haiku", "penzai"}:
        return False
    try:
        inspect.signature(model).bind(None, None)
    except (TypeError, ValueError):
        return False
    return not hasattr(model, "apply")


def check_model(model: Function, params: Any, inputs: Any) -> None:
    """InputError for what are not the parameters of a Linen module, or not inputs."""
    if isinstance(model.module, nn.Module) and (not isinstance(params, Mapping) or not params):
        raise InputError("params must be the nested dictionary of the module's parameters")
    check_inputs(inputs)
