"""Models as programs: `Function` is a model of the user, and `Model` is its program, the input of methods."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, Union

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import eval_jaxpr

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.inputs.texts import last_token
from tokentm_jax.inputs.values import check_inputs, looked_up, of, values
from tokentm_jax.maths import mixed, primitives
from tokentm_jax.maths.primitives import PyTree
from tokentm_jax.maths.scores import CLASS_LOGIT, Question, explained, is_open
from tokentm_jax.programs.flat import flatten
from tokentm_jax.programs.pieces import pieces_of
from tokentm_jax.programs.reading import Reading, read
from tokentm_jax.programs.running import Evaluation, Memory, Plan, Rules
from tokentm_jax.programs.sample import for_one_sample
from tokentm_jax.programs.structure import Structure, find

Readout = Literal["token", "avg", "last"] | Sequence[float] | Array | None


class Module(Protocol):
    """A Linen module, or another object with its `apply`."""

    def apply(self, variables: PyTree, inputs: PyTree, /) -> PyTree: ...


Explainable = Union[Module, Callable[..., PyTree], "Function"]  # a module, or a function `(params, inputs) -> outputs`
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
class AfterLast:
    """A function of texts with outputs [B, N, V] at all tokens, as one with those of the last token, [B, V]."""

    function: Callable[..., PyTree]

    def __call__(self, params: Any, texts: Any) -> Any:
        outputs = self.function(params, texts)
        if getattr(outputs, "ndim", 0) != 3:
            found = [list(array.shape) for array in jax.tree.leaves(outputs)]
            raise InputError(f"a token is explained by logits [B, N, V], and the outputs are {found}")
        return texts.last(outputs)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function `(params, inputs [B, ...]) -> outputs [B, ...]` of any library as a model.

    Args:
      function: it must treat the samples of a batch independently; it is traced for a batch of one.
      grid: patches (height, width), if they are not found in the program.
      prefix: tokens before those of the patches, if not found.
      readout: how the head reads the tokens, if not found: "token", "avg", "last" (of texts: their last token) or a
        share for each.
      fused_attention: whether a kernel computes attention that is plain, on a GPU or TPU.
    """

    function: Callable[..., PyTree]
    grid: tuple[int, int] | None = None
    prefix: int | None = None
    readout: Readout = None
    fused_attention: bool = False

    @property
    def module(self) -> Any:
        """The Linen module that it applies, or None. Grid, prefix and read-out are then the module's."""
        return self.function.module if isinstance(self.function, Applied) else None

    @property
    def name(self) -> str:
        """Its name in messages."""
        named = self.function if self.module is None else type(self.module)
        return getattr(named, "__name__", "the function")

    def wide(self) -> "Function":
        """The same model with activations and products in float32 at least."""
        dtype, changed = getattr(self.module, "dtype", None), {}
        if dtype is not None and jnp.finfo(dtype).bits < 32:
            changed["dtype"] = jnp.float32
        if getattr(self.module, "linear", None) is mixed.linear:
            changed["linear"] = primitives.linear
        if not changed:
            return self
        applied: Any = self.function
        wider = dataclasses.replace(applied, module=self.module.clone(**changed))
        return dataclasses.replace(self, function=wider)

    def of_next(self) -> "Function":
        """A decoder, which has logits at all tokens of a text, as a model of the token that follows the text."""
        known = hasattr(self.module, "after")
        function = Applied(self.module, "after") if known else AfterLast(self.function)
        return dataclasses.replace(self, function=function, readout="last")

    def look_up(self, params: Any, inputs: Any) -> Any:
        """The inputs that are differentiated: embeddings of word pieces, or the same inputs."""
        return looked_up(inputs, self.module, params)

    def read(self, params: Any, inputs: Any) -> "Model":
        """Its program, from a cache. Raises InputError for a function that does not return arrays per sample."""
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
    """A program. It is read when a method needs it, because a model without attention still has input gradients."""

    jaxpr: Any  # a closed jaxpr, for one sample without an axis of samples
    outputs: Any  # the tree of its outputs
    arrays: int  # number of arrays in the inputs of a sample; the first is explained
    regular: bool  # whether maps are a grid of patches; else rows of all tokens

    @cached_property
    def reading(self) -> Reading:
        flat = flatten(self.jaxpr)
        return read(flat, [flat.inputs[-self.arrays]])

    @property
    def explained(self) -> int:
        """The explained input in `reading`."""
        return self.reading.flat.inputs[-self.arrays]

    @cached_property
    def structure(self) -> Structure:
        return find(self.reading, self.explained)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its program, its backward rules, and what its passes store; made by `Function.read`."""

    source: Function
    program: Program
    rules: Rules = dataclasses.field(default_factory=dict)
    memory: Memory | None = None

    @property
    def reading(self) -> Reading:
        return self.program.reading

    @property
    def structure(self) -> Structure:
        return self.program.structure

    # ---- properties for methods ----
    @cached_property
    def grid(self) -> tuple[int, int] | None:
        """The patch grid; None for texts. Raises InputError if it is unknown and not given, or if the two differ."""
        if hasattr(self.source.module, "grid"):
            return self.source.module.grid
        if not self.program.regular:
            return None
        if self.source.grid is None:
            grid = self.structure.grid
            if grid is None:
                raise InputError("the grid of patches of this function is unknown: specify grid=(height, width)")
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
        """The tiling of a convolution that makes the patches; None: patches do not overlap."""
        if hasattr(self.source.module, "tiling"):
            return self.source.module.tiling
        return self.structure.tiling if self.has_blocks else None

    @cached_property
    def prefix(self) -> int:
        """The number of tokens before those of the patches. Raises InputError as `grid`."""
        if hasattr(self.source.module, "prefix"):
            return self.source.module.prefix
        if self.grid is None:
            return 0
        gh, gw = self.grid
        left = self.structure.tokens - gh * gw
        known = self.structure.prefix
        if known is None and self.source.prefix is None:
            raise InputError("the number of tokens before those of the patches is unknown: specify prefix=")
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
                raise InputError("how the head reads the tokens is unknown: specify readout='token', 'avg' or shares")
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
        """How the head reads the tokens [B, N] of padded texts, whose mask [B, N] is true for present tokens."""
        if self.source.readout == "last":
            return last_token(mask)
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

    # ---- variants of the model ----
    def wide(self, params: Any, inputs: Any) -> "Model":
        """The same model in float32 at least, for these types of parameters and inputs.

        Raises Unfit for a function that always computes in less.
        """
        model = self.source.wide().read(params, inputs).by(self.rules).storing(self.memory)
        types = [t for t in _types(model.reading) if jnp.issubdtype(t, jnp.floating) and jnp.finfo(t).bits < 32]
        if types:
            raise Unfit(f"this method needs a function that computes in float32; this one computes in {types[0]}")
        return model

    def by(self, rules: Rules) -> "Model":
        """The same model with other backward rules."""
        return dataclasses.replace(self, rules=rules)

    def storing(self, memory: Memory | None) -> "Model":
        """The same model, whose blocks store this for the backward pass; None: all that it reads."""
        return dataclasses.replace(self, memory=memory)

    # ---- evaluation ----
    def apply(self, variables: Any, inputs: Any) -> Any:
        """The outputs for a batch, as from `apply` of a Linen module."""
        params = variables["params"]
        stages = self.structure.stages if self.has_blocks else []
        by_steps = self.rules or self.source.fused_attention or (stages and self.memory)
        if by_steps or any(pieces_of(stage.reading) for stage in stages):
            run = lambda x: self.evaluate(params, x, Plan(self.rules), None, None)[0]  # noqa: E731
        else:
            leaves, closed = jax.tree.leaves(params), self.program.jaxpr

            def run(x: Any) -> Any:
                outputs = eval_jaxpr(closed.jaxpr, closed.consts, *leaves, *jax.tree.leaves(x))
                return jax.tree.unflatten(self.program.outputs, outputs)

        return jax.vmap(run)(inputs)

    def settled(self, params: Any, inputs: Any, target: Any) -> Any:
        """The target with the predicted class put in, for methods that need it before their pass."""
        if not is_open(target):
            return target
        found = lambda: explained(self.apply({"params": params}, inputs), target)[1]["target"]  # noqa: E731
        own = target.target if isinstance(target, Question) else target
        if own is None:
            return found()
        classes = own.classes.astype(int)
        known = target._replace(target=classes) if isinstance(target, Question) else classes
        return jax.lax.cond(own.given.all(), lambda: known, found)

    def evaluate(self, params: Any, sample: Any, plan: Plan, extra: Any, state: Any) -> tuple[Any, Notes, Any]:
        """The outputs for one sample, the notes of the plan's taps, and their state.

        With a second plan, the outputs are a pair: those of the second evaluation are equal and have its
        backward pass.
        """
        inputs = [*jax.tree.leaves(params), *jax.tree.leaves(sample)]
        plan = dataclasses.replace(plan, memory=self.memory, fused=self.source.fused_attention)
        done = Evaluation(self.reading, plan, inputs, state, extra).run()
        outputs = [jax.tree.unflatten(self.program.outputs, e.outputs) for e in (done, done.second) if e is not None]
        return outputs[0] if done.second is None else outputs, done.notes, done.state

    def per_sample(
        self, one: Callable[[Any, Callable[[Any], Array]], tuple[Any, Any]], inputs: Any, target: Any
    ) -> tuple[Any, dict[str, Any]]:
        """`one(sample, score) -> (arrays, outputs)` for every sample of a batch, and the details of `explained`.

        `score(outputs)` is the explained number of one sample's outputs.
        """
        asked = target if isinstance(target, Question) else Question(CLASS_LOGIT, target)
        count = values(inputs).shape[0]
        kinds = jax.tree.unflatten(self.program.outputs, self.program.jaxpr.out_avals)
        kinds = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), kinds)
        jax.eval_shape(lambda outputs: explained(outputs, target)[0], kinds)  # raises for an invalid target
        own = asked.of_samples(count)

        def of_sample(sample: Any, own: Question | None, index: Array) -> tuple[Any, Any]:
            def score(outputs: Any) -> Array:
                if own is not None:
                    return explained(*jax.tree.map(lambda a: a[None], (outputs, own)))[0][0]
                # A custom score is written for a batch: it gets this sample at every position.
                every = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), outputs)
                return explained(every, target)[0][index]

            return one(sample, score)

        known, outputs = jax.vmap(of_sample)(inputs, own, jnp.arange(count))
        return known, explained(outputs, target)[1]

    def head(self, params: Any, sample: Any) -> Callable[[Array], Any]:
        """The part after the last residual sum: tokens that leave a block -> outputs of one sample."""
        reading, last = self.reading, self.structure.last
        inputs = [*jax.tree.leaves(params), *jax.tree.leaves(sample)]
        known = Evaluation(reading, Plan(self.rules), inputs)
        del known.values[self.program.explained]  # a head that reads more than the tokens raises below

        def head(tokens: Array) -> Any:
            outputs = []
            for out in reading.flat.outputs:
                if not reading.descends(out, last):
                    raise Unfit("an output of this function does not read the tokens of the blocks")
                try:
                    outputs.append(known.function([last], out)(tokens))
                except KeyError:
                    raise Unfit("the head reads more than the tokens that leave the last block") from None
            return jax.tree.unflatten(self.program.outputs, outputs)

        return head


def _types(reading: Reading) -> list[Any]:
    """The types of all values that depend on the input."""
    own = [reading.flat.types[number].dtype for number in reading.facts]
    return own + [kind for body in reading.bodies.values() for kind in _types(body)]


# ---- valid models -------------------------------------------------------------------------------------------------


def function_of(
    model: Any, grid: Any = None, prefix: Any = None, readout: Readout = None, fused_attention: bool = False
) -> Function:
    """A function or Linen module as a model.

    Raises InputError, with advice, for anything else, and for a grid, prefix or readout of a module.
    """
    if isinstance(model, Function):
        return model
    check_module(model)
    if is_function(model):
        readout = readout if readout is None or isinstance(readout, str) else tuple(readout)
        return Function(model, grid, prefix, readout, fused_attention)
    if (grid, prefix, readout) != (None, None, None):
        raise InputError("grid, prefix and readout are for functions: a module has them already")
    return Function(Applied(model), fused_attention=fused_attention)


def check_module(module: Any) -> None:
    """InputError, with advice, for anything but a Linen module or a function of parameters and inputs."""
    if hasattr(module, "apply") and not isinstance(module, type):
        return
    what = "the model must be a function (params, inputs) -> outputs or a Flax Linen module"
    found = type(module).__name__
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
    """Whether a model is a function `(params, inputs) -> outputs`, and not a callable module of a library."""
    libraries = {base.__module__.partition(".")[0] for base in inspect.getmro(type(model))}
    if not callable(model) or isinstance(model, type) or libraries & {"flax", "equinox", "keras", "haiku", "penzai"}:
        return False
    try:
        inspect.signature(model).bind(None, None)
    except (TypeError, ValueError):
        return False
    return not hasattr(model, "apply")


def check_model(model: Function, params: Any, inputs: Any) -> None:
    """InputError for invalid parameters of a Linen module, or invalid inputs."""
    if isinstance(model.module, nn.Module) and (not isinstance(params, Mapping) or not params):
        raise InputError("params must be the nested dictionary of the module's parameters")
    check_inputs(inputs)
