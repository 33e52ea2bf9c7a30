"""The entry points: `explain` for photos and a loaded model, `explain_fn` for pipelines, `compiled` for runs."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial, reduce
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tokentm_jax.errors import InputError, Unfit, suggest
from tokentm_jax.inputs.reader import Reader
from tokentm_jax.inputs.values import readable, seen
from tokentm_jax.maths.primitives import PyTree
from tokentm_jax.maths.scores import Chosen, Cosine, Question, Target, Versus, as_numbers, listed, question
from tokentm_jax.methods.sharing import Explanation, together
from tokentm_jax.methods.table import METHODS, Method
from tokentm_jax.methods.targets import class_numbers, target_of
from tokentm_jax.models.loading import require_loaded
from tokentm_jax.programs.inspection import Inspection, inspected
from tokentm_jax.programs.model import Explainable, Function, Readout, check_model, function_of
from tokentm_jax.programs.next_token import of_next
from tokentm_jax.programs.running import KINDS

if TYPE_CHECKING:
    from tokentm_jax.models.loading import Model


def explain_fn(
    module: Explainable,
    method: str | Method | Callable[..., Explanation] = "tokentm",
    *,
    score: Callable[..., Array] | None = None,
    details: bool = False,
    differentiate_anyway: bool = False,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    readout: Readout = None,
    fused_attention: bool = False,
    **options: object,
) -> Callable[..., PyTree]:
    """A pure function `(params, inputs, target=None) -> maps` to `jit`, `vmap`, shard, export or differentiate.

    Args:
      module: a function `(params, inputs) -> outputs` of any library, or a Linen module such as `ViT`; its program is
        read (see `inspect`).
      method: a name of `METHODS`, or a function such as those of its rows.
      score: what is explained, a function `(outputs, target) -> [B]` or `outputs -> [B]` of what the module gives,
        such as those of `tokentm_jax.maths.scores`; None for the logit of the class.
      details: return `(maps, details)`, with `logits`, `target`, `score` and what else the method reports.
      differentiate_anyway: let JAX differentiate maps without a true derivative (`METHODS[method].differentiable` is
        False), with what the rules hold constant held constant. By default their differentiation raises InputError.
      grid, prefix, readout: of a function, what its program does not show: the patches (height, width), the tokens
        before those of the patches, how the head reads the tokens ("token", "avg", of texts "last", or a share each).
      fused_attention: on an NVIDIA GPU or a TPU, compute attention in a kernel that never writes its weights to
        memory, forward and backward with the row of TokenTM and GAE. It applies where nothing else reads the weights,
        the backward rules are "plain", and attention is plain: scale, mask or bias, softmax, product with the values,
        at most 128 channels a head, in one type of at most 32 bits. Such maps cannot be differentiated. Off by
        default, because it has not been timed on a device.
      **options: the method's options. `rules`, of methods of gradients, chooses their backward rules: a name ("plain",
        "libra", "conservative", "attn_lrp", "res_lrp", "lrp") or a mapping from kinds of steps to
        rules `rule(f, *inputs)` (`tokentm_jax.programs.running` lists them).

    Returns:
      A function of parameters, normalised images [B, H, W, 3] (or `Tokens` of texts) and an optional class per sample
      [B] (the predicted class where None; or what else the score takes as its target), giving token maps [B, gh, gw],
      or pixel maps [B, H, W] for the methods that say so; for texts, scores [B, N] of the tokens.

      A compiled function can refuse nothing, so a sample without a true map has NaN in all of it, and the others are
      as without it: where a pixel is NaN or infinite, where the logits or the score are, or where the class is one
      that the model does not have (negative ones too). In the details the floats are NaN for such a sample; the
      logits, and the classes, stay what they are where only the class is wrong.

    Raises:
      InputError: no such method or option; when called, a score of another shape or type than [B] floats; when
        differentiated, a map without a true derivative.
    """
    model = function_of(module, grid, prefix, readout, fused_attention)
    name, row = _found(method)
    rules = _custom_rules(name, row, options)
    explainer = _explainer(model, {name: (row, options)}, details, differentiate_anyway, rules)
    asked = None if score is None else question(score)

    def explain_one(params: Any, inputs: Any, target: Any = None) -> Any:
        return explainer(params, inputs, target if asked is None else asked._replace(target=target))[name]

    return explain_one


def _custom_rules(method: str, row: Method, options: dict[str, Any]) -> Mapping[str, Any]:
    """The option `rules` where it is a mapping, taken out of the options; else no rules."""
    if not isinstance(options.get("rules"), Mapping):
        return {}
    rules = options.pop("rules")
    if not row.takes_rules:
        raise InputError(f"the method {method!r} takes no rules: it has its own")
    for kind, rule in rules.items():
        if kind not in KINDS:
            raise suggest("kind of step", kind, KINDS)
        if not callable(rule):
            raise InputError(f"the rule of {kind!r} must be a function rule(f, *inputs), got {rule!r:.80}")
    return rules


def inspect(
    function: Explainable,
    params: PyTree,
    inputs: PyTree,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    readout: Readout = None,
) -> Inspection:
    """What is found in a function, and which methods explain it.

    Args:
      function: `(params, inputs) -> outputs` of any library.
      params: its parameters, or their shapes.
      inputs: an array [B, ...] or a `jax.ShapeDtypeStruct`.
      grid, prefix, readout: as for `explain_fn`.

    Returns:
      What was found; `print` shows it as a table.

    Raises:
      InputError: no function of two arguments, or one that does not give arrays per sample.
    """
    model = function_of(function, grid, prefix, readout)
    inputs = jax.eval_shape(model.look_up, params, inputs)
    return inspected(model.read(params, inputs), lambda: methods_for(model, params, inputs))


def _found(method: Any) -> tuple[str, Method]:
    """Name and row of a method: one of the table, a row, or a function. Raises InputError for anything else."""
    if isinstance(method, Method) or callable(method):
        row: Method = method if isinstance(method, Method) else Method(method)  # pyright: ignore[reportArgumentType]
        return getattr(row.function, "__name__", "method"), row
    if not isinstance(method, str) or method not in METHODS:
        raise suggest("method", method, METHODS)
    return method, METHODS[method]


_NO_DERIVATIVE = (
    "maps of '{}' have no true derivative, since its rules hold values constant: use a method with "
    "`tm.METHODS[name].differentiable`, put jax.lax.stop_gradient around its parameters and inputs where no "
    "derivative is wanted, or give explain_fn the option differentiate_anyway=True"
)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_derivative(reason: str, found: Any) -> Any:
    """What a method has found, or reads, as it is; its differentiation raises InputError."""
    return found


@_without_derivative.defjvp
def _refuse(reason: str, found: Any, changes: Any) -> Any:
    raise InputError(reason)


def _explainer(
    model: Function,
    methods: Mapping[str, tuple[Method, Mapping[str, Any]]],
    details: bool,
    anyway: bool = False,
    rules: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., dict[str, Any]]:
    """What `explain_fn` returns, for several methods with their options: by name."""
    members = {
        name: row.member(name, {**options, "rules": "plain"} if rules else options)
        for name, (row, options) in methods.items()
    }
    refused = {name for name, (row, options) in methods.items() if rules or not row.has_derivative(options)}

    def explain_inputs(params: Any, inputs: Array, target: Any = None) -> Any:
        inputs = model.look_up(params, inputs)
        asked_of, inputs, target, within = of_next(model, inputs, target)
        program = asked_of.read(params, inputs).by(rules)
        # Zeros replace what cannot be read, so that no NaN meets a zero in a derivative.
        fine, read = readable(inputs)
        fine = fine & within
        try:
            if model.fused_attention:
                reason = "maps by fused_attention have no derivative: leave it out"
                params, read = _without_derivative(reason, (params, read))
            explanations = together(members, program, params, read, target)
        except Unfit as error:
            others = ", ".join(methods_for(model, params, inputs, target)) or "no method"
            raise InputError(f"{error}; what works without is {others}") from None
        for name in () if anyway else refused:
            explanations[name] = _without_derivative(_NO_DERIVATIVE.format(name), explanations[name])
        return {name: checked(*found, fine, inputs) for name, found in explanations.items()}

    def checked(maps: Array, found: Any, fine: Array, inputs: Any) -> Any:
        if not {"logits", "target", "score"} <= {*found}:
            raise InputError(
                f"a method's details must have 'logits', 'target' and 'score', as trace.details() gives them, got "
                f"{sorted(found)}"
            )
        outputs, asked = found["logits"], found["target"]
        finite = [jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(outputs)]
        whole = reduce(jnp.logical_and, finite, fine)
        true = whole & jnp.isfinite(found["score"])  # which is NaN for a class that the model does not have
        mask, shape = seen(inputs), maps.shape

        def marked(array: Array) -> Array:
            if mask is not None and getattr(array, "shape", None) == shape:
                array = jnp.where(mask, array[:, 0], 0)  # maps of texts [B, 1, N] -> [B, N], with zeros for padding
            return _nan_unless(true, array)

        if not details:
            return marked(maps)
        more = {name: marked(array) for name, array in found.items() if name not in ("logits", "target")}
        target = asked.target if isinstance(asked, Question) else asked
        outputs = jax.tree.map(partial(_nan_unless, whole), outputs)
        return marked(maps), {**more, "logits": outputs, "target": target}

    def placed(params: Any, inputs: Array, target: Any = None) -> Any:
        check_model(model, params, inputs)
        sharding = jax.typeof(jax.tree.leaves(inputs)[0]).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return explain_inputs(params, inputs, target)
        # The compiler places what is inside; all results have the batch's axis first, and are placed like it.
        alike: Any = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
        inside: Any = jax.sharding.auto_axes(explain_inputs, out_sharding=alike)
        return inside(params, inputs, target)

    return placed


def methods_for(
    module: Explainable,
    params: PyTree,
    inputs: PyTree,
    target: Target = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    readout: Readout = None,
) -> list[str]:
    """The methods of the table that can explain a model; each is traced with its default options.

    Args:
      module, params: the model, as for `explain_fn`.
      inputs: normalised images [B, H, W, C], or a `jax.ShapeDtypeStruct` of them; or `Tokens` of texts.
      target: as for `explain_fn`'s function.
      grid, prefix, readout: as for `explain_fn`.

    Returns:
      Their names, in the order of the table.
    """
    model = function_of(module, grid, prefix, readout)
    check_model(model, params, inputs)
    target = listed(target)
    inputs = jax.eval_shape(model.look_up, params, inputs)
    program = model.read(params, inputs)
    found = []
    for name, row in METHODS.items():
        try:
            jax.eval_shape(partial(row.bind(name, {}), program), params, inputs, target)
            found.append(name)
        except ValueError:  # InputError, or JAX's own for a loop that it cannot differentiate
            continue
    return found


def _nan_unless(true: Array, array: Array) -> Array:
    """The samples of `array` [B, ...] where `true` [B], and NaN for the others; whole numbers stay."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jnp.where(true.reshape(-1, *(1,) * (array.ndim - 1)), array, jnp.nan)


def compiled(
    module: Any,
    methods: Mapping[Any, Mapping[str, Any]],
    *,
    details: Sequence[str] | None = (),
    preprocessing: Reader | None = None,
) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    """The one compiled program that explains by these methods, from a cache that all of the package shares.

    Args:
      module: as for `explain_fn`.
      methods: names of `METHODS`, or functions, and the options of each.
      details: names of the details that are wanted, of the first method; None for all that it reports.
      preprocessing: where given, the program takes batches of a data set, such as pixels uint8 [B, H, W, 3], or what
        `explain` takes, and makes the model's input of them.

    Returns:
      A function `(params, inputs, target)` that gives each method's maps, by name, and the details. The target is as
      in `explain_fn`, or a `Question`. Without one, every method explains the class that the first one found to be
      predicted.

    Raises:
      InputError: no such method or option.
    """
    rows = {_found(method)[0]: (method, options) for method, options in methods.items()}
    return compiled_rows(module, rows, details=details, preprocessing=preprocessing)


def compiled_rows(
    module: Any,
    rows: Mapping[str, tuple[Any, Mapping[str, Any]]],
    *,
    details: Sequence[str] | None = (),
    preprocessing: Reader | None = None,
) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    """`compiled` for names of rows, each with its method and options: a method may be in several."""
    found = [(name, _found(method)[1], options) for name, (method, options) in rows.items()]
    if preprocessing is not None:
        found = [(name, row, row.suited(options, preprocessing)) for name, row, options in found]
    checked = tuple((name, row, tuple(sorted(row.check(name, options).items()))) for name, row, options in found)
    return _compiled(function_of(module), checked, None if details is None else tuple(details), preprocessing)


@lru_cache(maxsize=128)
def _compiled(
    model: Function,
    methods: tuple[tuple[str, Method, tuple[tuple[str, Any], ...]], ...],
    details: tuple[str, ...] | None,
    preprocessing: Reader | None,
) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    explainer = _explainer(model, {name: (row, dict(options)) for name, row, options in methods}, True, True)

    def program(params: Any, inputs: Array, target: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        if preprocessing is not None:
            inputs = preprocessing.normalise(preprocessing.unit(inputs))
        found = explainer(params, inputs, target)
        reported = next(iter(found.values()))[1]
        maps = {name: own for name, (own, _) in found.items()}
        return maps, reported if details is None else {name: reported[name] for name in details}

    return jax.jit(program)


def explain(
    vit: "Model",
    images: PyTree,
    method: str | Method | Callable[..., Explanation] = "tokentm",
    target: Target = None,
    *,
    score: Callable[..., Array] | None = None,
    text: str | Sequence[str] | None = None,
    details: bool = False,
    **options: object,
) -> PyTree:
    """Heatmaps of a batch of photos, or scores of the tokens of texts.

    Args:
      vit: from `tokentm_jax.load`.
      images: array [B, H, W, 3] in [0, 1], as `vit.read` gives them; normalisation is inside. For a text model, the
        `Tokens` that its `read` gives.
      method: a name of `METHODS`, or a function `(model, params, inputs, target, *, option=default)` that returns
        maps and details.
      target: a class for all samples, or one per sample [B], by number or by name; None for each sample's predicted
        class. A custom score may take other arrays, with the batch first.
      score: what is explained, as in `explain_fn`; None for the logit of the class.
      text: a prompt for all samples, or one per sample, instead of a score: the cosine of what the prompt and the
        image mean to a model with a text tower, such as CLIP.
      details: return `(maps, details)`, with `logits`, `target`, `score` and what else the method reports.
      **options: the method's options, for example `ffn=False`.

    Returns:
      Token maps [B, gh, gw] or pixel maps [B, H, W], not rescaled; `to_pixels` makes pixels in [0, 1] of them. For
      texts, scores [B, N] of the tokens, 0 for padding; `words` makes scores of words of them.

    Raises:
      InputError: images that `Preprocessing.checked` refuses, a class that the model does not have, no such method
        or option, a score that is not one floating-point number per sample.

    Examples:
        >>> import tokentm_jax as tm
        >>> vit = tm.load()
        >>> not_a_dog = tm.scores.Versus(vit.class_index("dog"))
        >>> tm.explain(vit, vit.read("cat.jpg"), score=not_a_dog).shape
        (1, 8, 8)
    """
    wanted = None if details else ()
    found, reported = explain_with(wanted, vit, images, {method: options}, target, score, text)
    (maps,) = found.values()
    return (maps, reported) if details else maps


def explain_with(
    details: Sequence[str] | None,
    vit: "Model",
    images: PyTree,
    methods: Mapping[Any, Mapping[str, object]],
    target: Target = None,
    score: Callable[..., Array] | None = None,
    text: str | Sequence[str] | None = None,
) -> tuple[dict[str, Array], dict[str, PyTree]]:
    """Heatmaps as from `explain` by several methods, each with its options; and details as from `compiled`."""
    require_loaded(vit)
    program = compiled(vit.module, methods, details=details, preprocessing=vit.preprocessing)
    inputs = vit.preprocessing.checked(images)
    samples = len(jax.tree.leaves(inputs)[0])
    if text is not None:
        if score is not None or target is not None:
            raise InputError("text is what is explained: leave out score and target")
        embeddings = vit.embed_text(text)
        if len(embeddings) not in (1, samples):
            raise InputError(f"text must be one prompt or one per sample ({samples}), got {len(embeddings)}")
        score = Cosine(embeddings[0] if len(embeddings) == 1 else embeddings)
    if score is None:
        vit.require_classes()
    asked = question(score)
    if target is not None:
        target = target_of(vit, target, asked, samples)
    named = all(isinstance(method, str) for method in methods)
    if asked.of_logits and named:  # one program for the predicted class and for any other
        classes: Any = np.zeros(samples, np.int32) if target is None else target
        target = Chosen(classes, np.full(samples, target is not None))
    if isinstance(asked.score, Versus):
        asked = asked._replace(score=Versus(class_numbers(vit, "the other class", asked.score.other, samples)))
    asked = asked._replace(score=jax.tree.map(as_numbers, asked.score))
    if score is not None:
        target = asked._replace(target=target)
    return program(vit.params, inputs, target)
