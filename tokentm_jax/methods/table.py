"""The table of explanation methods.

A method is a function `(model, params, inputs, target, **options) -> (maps, details)`: inputs are normalised images
[B, H, W, 3] or `Texts`, target is a class per sample [B] or None for the predicted one, maps are [B, gh, gw] (token
maps) or [B, H, W] (pixel maps), and for texts [B, 1, N], details is a dict of arrays with at least `logits`
[B, classes], `target` [B] and `score` [B]. It treats the samples of a batch independently. A new method is a function
and a row here, and a row in `tests/test_contract.py`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tokentm_jax.errors import InputError, suggest
from tokentm_jax.inputs.reader import Reader
from tokentm_jax.inputs.values import seen
from tokentm_jax.maths.maps import Normalisation, Power, combine
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.variants import TokenTM
from tokentm_jax.methods import attention, gradient, perturbation
from tokentm_jax.methods import lrp as relevance
from tokentm_jax.methods.perturbation import Removal
from tokentm_jax.methods.sharing import Explanation, Member, Share, together
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.running import Memory
from tokentm_jax.validation import check_options, options_of

TOKENS, PIXELS = "token map", "pixel map"
Gradient = Literal["own", "conservative_lrp", "attn_lrp"]
GRADIENTS = {"own": "plain", "conservative_lrp": "libra", "attn_lrp": "attn_lrp"}  # their rules


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table. `passes` is the cost in forward (F) and backward (B) passes of a model of L blocks for n
    patches.

    B is a gradient pass to the inputs, which costs about a forward pass; with the rules of LRP it costs four, and with
    those of Transformer Attribution three.
    """

    function: Callable[..., Explanation]
    paper: str = ""
    year: int = 0
    passes: str = "1 F + 1 B"
    class_specific: bool = True  # with the default options; see `looks_at_class`
    output: str = TOKENS
    differentiable: bool = True  # whether maps have a true derivative (no rule holds values constant)
    held: Callable[[Mapping[str, object]], bool] | None = None  # the options with which they have not
    takes_rules: bool = False  # whether the option `rules` sets the backward rules of its gradient, see `RuleNames`
    rules: str = "plain"  # the default rules
    takes_memory: bool = False  # whether the option `memory` sets what its pass stores, see `Memory`
    float32: bool = False  # whether it is always computed in float32 at least, because bfloat16 changes the maps
    options: type | None = None  # a frozen dataclass of options, if the function takes one
    classless: Callable[[Mapping[str, object]], bool] | None = None  # the options with which the class does not matter
    suit: Callable[[Mapping[str, object], Reader], Mapping[str, object]] | None = None  # see `suited`

    @property
    def summary(self) -> str:
        """The method in one line: the first line of its function's docstring."""
        line = (inspect.getdoc(self.function) or "").splitlines()[0]
        return line if self.rules != "libra" else f"On LibraGrad's pruned backward pass: {line}"

    def looks_at_class(self, options: Mapping[str, object]) -> bool:
        """Whether a map with these options depends on the explained class."""
        return self.class_specific and not (self.classless is not None and self.classless(options))

    def has_derivative(self, options: Mapping[str, object]) -> bool:
        """Whether a map with these options has a true derivative. Other maps are differentiated only on request."""
        held = self.held is not None and self.held(options)
        return self.differentiable and not held and options.get("rules", self.rules) == "plain"

    def known(self) -> dict[str, Any]:
        """Type of every option: the function's keyword-only arguments, and the fields of its dataclass."""
        own = {name: kind for name, kind in options_of(self.function).items() if name != "options"}
        rules = {"rules": relevance.RuleNames} if self.takes_rules else {}
        memory = {"memory": Memory} if self.takes_memory else {}
        return {**(options_of(self.options) if self.options else {}), **own, **rules, **memory}

    @property
    def share(self) -> Callable[..., Share | None] | None:
        """By the options, what the function reads from a pass that methods share; None: it has passes of its own."""
        return next((share for function, share in SHARES if function is self.function), None)

    def check(self, name: str, options: Mapping[str, object]) -> dict[str, Any]:
        """The options as plain Python values of the annotated types.

        Raises InputError for an unknown option, or a value of another type.
        """
        return check_options(f"the method {name!r}", self.known(), options)

    def suited(self, options: Mapping[str, object], preprocessing: Reader) -> dict[str, Any]:
        """The options for a model with this preprocessing, if an option depends on it."""
        return dict(options if self.suit is None else self.suit(options, preprocessing))

    def bind(self, name: str, options: Mapping[str, object]) -> Callable[..., Explanation]:
        """The function with its options checked and bound. InputError as `check`, and for conflicts."""
        return self.member(name, options).explain

    def member(self, name: str, options: Mapping[str, object]) -> Member:
        """The method with its options as a part of a run of several. InputError as `bind`."""
        values = self.check(name, options)
        rules, memory = values.pop("rules", self.rules), None
        function = relevance.by_rules(self.function, rules)
        if self.takes_memory:
            memory = values.pop("memory", "store")
            function = _storing(function, memory)
        if self.options is not None:
            fields = {field.name for field in dataclasses.fields(self.options)}
            choices = {key: values.pop(key) for key in fields & values.keys()}
            try:
                values["options"] = self.options(**choices)
            except ValueError as error:
                raise InputError(f"method '{name}': {error}") from None
        share = None if self.share is None else self.share(**values)
        if share is not None and rules != "plain":
            share = share._replace(rules=relevance.RULES[rules])
        function = at_least_float32(function) if self.float32 else function
        return Member(partial(function, **values), share, memory, self.float32)


def _storing(function: Callable[..., Explanation], memory: Memory) -> Callable[..., Explanation]:
    """A method whose passes store this; those of a combination store what it stores."""

    def stored(model: Model, params: Any, inputs: Any, target: Any, **options: Any) -> Explanation:
        return function(model.storing(memory), params, inputs, target, **options)

    return stored


def at_least_float32(function: Callable[..., Explanation]) -> Callable[..., Explanation]:
    """A method on the model in float32, or in float64 if it has that type: parameters, inputs and activations."""

    def widened(model: Model, params: Any, inputs: Any, target: Any, **options: Any) -> Explanation:
        params, inputs = jax.tree.map(_wide_floats, (params, inputs))
        return function(model.wide(params, inputs), params, inputs, target, **options)

    return widened


def _wide_floats(a: Any) -> Any:
    return wide(a) if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating) else a


def combination(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    methods: str = "tokentm,grad_cam",
    how: Literal["product", "mean"] = "product",
    normalisation: Normalisation = "min_max",
    weights: str = "",
    power: Power = 1.0,
    gradient: Gradient = "own",
) -> Explanation:
    """Product or mean ("how") of the normalised maps of several methods, named with commas between.

    `normalisation`, `power` and `weights` (of the mean) are those of `tokentm_jax.combine`; weights are numbers with
    commas between. Methods share passes of the model if possible, see `tokentm_jax.methods.sharing`. `gradient` names
    the method whose backward pass gives the gradient of TokenTM and GAE; "own" is the ordinary one.
    """
    names = _members(methods)
    try:
        numbers = [float(weight) for weight in weights.split(",")] if weights else None
    except ValueError:
        raise InputError(f"weights must be numbers with commas between, got {weights!r:.80}") from None
    found = together({name: _member(name, gradient, model.memory) for name in names}, model, params, inputs, target)
    maps, details = [each[0] for each in found.values()], next(iter(found.values()))[1]
    mask = seen(inputs)
    return combine(maps, how, normalisation, numbers, None if mask is None else mask[:, None], power), details


def _member(name: str, gradient: Gradient, memory: Memory | None) -> Member:
    """A member of a combination."""
    row, options = METHODS[name], {}
    if row.takes_memory and memory is not None:
        options["memory"] = memory
    if name in ("tokentm", "gae"):
        options["rules"] = GRADIENTS[gradient]
    return row.member(name, options)


def tokentm_mix(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    methods: str = "libra_tokentm,libra_gae,libra_full_grad,legrad",
    normalisation: Normalisation = "min_max",
    weights: str = "",
    power: Power = 2.0,
    gradient: Gradient = "own",
) -> Explanation:
    """The squared mean of TokenTM's normalised map and those of other methods; `combination` with chosen members.

    The square leaves the order of the patches as it is, and takes relevance from those without an effect.
    """
    mean = partial(combination, how="mean", normalisation=normalisation, weights=weights, power=power)
    return mean(model, params, inputs, target, methods=methods, gradient=gradient)


COMBINED = ("combination", "tokentm_mix")


def _members(methods: str) -> list[str]:
    """The methods of a combination. Raises InputError for an unknown method, or one that is named twice."""
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in METHODS or name in COMBINED:
            raise suggest("method", name, [m for m in METHODS if m not in COMBINED])
    if len(set(names)) < len(names):
        raise InputError(f"each method of a combination is named once, got {methods!r:.80}")
    return names


def _classless(options: Mapping[str, object]) -> bool:
    """Whether no member of a combination depends on the class."""
    return not any(METHODS[name].looks_at_class({}) for name in _members(str(options.get("methods", "tokentm"))))


def _held(options: Mapping[str, object]) -> bool:
    """Whether a member of a combination, or a shared pass, holds values constant."""
    names = _members(str(options.get("methods", "tokentm,grad_cam")))
    noted = "legrad" in names and any(METHODS[name].share is not None for name in names if name != "legrad")
    return noted or options.get("gradient", "own") != "own" or not all(METHODS[name].differentiable for name in names)


def _plain(options: Mapping[str, object]) -> bool:
    """Whether TokenTM uses no gradient, neither with attention nor in its weights."""
    weights: Any = options.get("weights")
    return options.get("attention") == "plain" and not TokenTM(weights=weights).takes("gradient")


# Methods that remove pixels, perhaps with black. Changes by one patch are small compared with rounding in bfloat16.
_removal = partial(Method, options=Removal, suit=perturbation.with_black, float32=True)
# Gradient methods, whose backward rules are an option. What a pass stores of all blocks is one, too.
_last_block = partial(Method, takes_rules=True)
_gradient = partial(_last_block, takes_memory=True)
_relevance = partial(Method, takes_memory=True)


def _libra(function: Callable[..., Explanation], paper: str = "Mehri et al., CVPR", **more: Any) -> Method:
    """A gradient method on LibraGrad's pruned backward pass."""
    return Method(function, paper, 2025, differentiable=False, rules="libra", **{"takes_memory": True, **more})


# What a function reads from a pass that methods share, by its options.
SHARES: tuple[tuple[Callable[..., Explanation], Callable[..., Share | None]], ...] = (
    (attention.tokentm, attention.tokentm_share),
    (attention.gae, attention.gae_share),
    (attention.attcat, attention.attcat_share),
    (attention.legrad, attention.legrad_share),
    (relevance.full_lrp, relevance.full_lrp_share),
    (relevance.conservative_lrp, relevance.conservative_lrp_share),
    (relevance.attention_lrp, relevance.attention_lrp_share),
    (relevance.residual_lrp, relevance.residual_lrp_share),
    (relevance.libra_full_grad, relevance.libra_full_grad_share),
    (gradient.input_gradient, gradient.input_gradient_share),
    (gradient.gradient_x_input, gradient.gradient_x_input_share),
)
METHODS: dict[str, Method] = {
    "tokentm": _gradient(attention.tokentm, "Wu et al., CVPR", 2024, options=TokenTM, classless=_plain),
    "gae": _gradient(attention.gae, "Chefer et al., ICCV", 2021),
    "transformer_attribution": _relevance(
        relevance.transformer_attribution, "Chefer et al., CVPR", 2021, "1 F + 4 B", float32=True
    ),
    "attcat": _gradient(attention.attcat, "Qiang et al., NeurIPS", 2022),
    "conservative_lrp": _relevance(relevance.conservative_lrp, "Ali et al., ICML", 2022, differentiable=False),
    "lrp": _relevance(relevance.full_lrp, "Bach et al., PLOS ONE", 2015, "1 F + 4 B", output=PIXELS, float32=True),
    "partial_lrp": Method(relevance.partial_lrp, "Voita et al., ACL", 2019, "1 F + 4/L B", float32=True),
    "rollout": _relevance(attention.rollout, "Abnar & Zuidema, ACL", 2020, "1 F", class_specific=False),
    "value_zeroing": Method(
        attention.value_zeroing, "Mohebbi et al., EACL", 2023, "n + 1 F", class_specific=False, float32=True
    ),
    "raw_attention": Method(attention.raw_attention, "Vaswani et al., NeurIPS", 2017, "1 F", class_specific=False),
    "grad_cam": _last_block(attention.grad_cam, "Selvaraju et al., ICCV", 2017, "1 F + 1/L B", float32=True),
    "grad_cam_tokens": _last_block(
        attention.grad_cam_tokens, "Selvaraju et al., ICCV", 2017, "1 F + 1/L B", float32=True
    ),
    "attn_lrp": _relevance(relevance.attention_lrp, "Achtibat et al., ICML", 2024, differentiable=False),
    "res_lrp": _relevance(relevance.residual_lrp, "ResLRP, arXiv", 2026, differentiable=False),
    "pa_lrp": _gradient(
        relevance.position_aware_lrp,
        "Bakish et al., arXiv",
        2025,
        output=PIXELS,
        differentiable=False,
        rules="attn_lrp",
        float32=True,
    ),
    "libra_full_grad": _relevance(relevance.libra_full_grad, "Mehri et al., CVPR", 2025, differentiable=False),
    "libra_attcat": _libra(attention.attcat),
    "libra_tokentm": _libra(
        attention.tokentm, "Wu et al. and Mehri et al., together", options=TokenTM, classless=_plain
    ),
    "libra_gae": _libra(attention.gae),
    "libra_grad_cam": _libra(attention.grad_cam, passes="1 F + 1/L B", float32=True, takes_memory=False),
    "beyond_intuition": _gradient(attention.beyond_intuition, "Chen et al., TMLR", 2023, "21 F + 1 B + 20/L B"),
    "legrad": Method(attention.legrad, "Bousselham et al., ICCV", 2025, "2 F"),
    "input_gradient": _gradient(gradient.input_gradient, "Simonyan et al., ICLR", 2014, output=PIXELS),
    "gradient_x_input": _gradient(
        gradient.gradient_x_input, "Shrikumar et al., arXiv", 2016, output=PIXELS, float32=True
    ),
    "smooth_grad": _gradient(gradient.smooth_grad, "Smilkov et al., arXiv", 2017, "26 F + 26 B", output=PIXELS),
    "integrated_gradients": _gradient(
        gradient.integrated_gradients, "Sundararajan et al., ICML", 2017, "34 F + 33 B", output=PIXELS, float32=True
    ),
    "expected_gradients": _gradient(
        gradient.expected_gradients,
        "Erion et al., Nature Machine Intelligence",
        2021,
        "51 F + 50 B",
        output=PIXELS,
        float32=True,
        suit=gradient.with_normalised,
    ),
    "occlusion": _removal(perturbation.occlusion, "Zeiler & Fergus, ECCV", 2014, "n + 1 F"),
    "token_dropping": Method(perturbation.token_dropping, "Jain et al., ICLR", 2022, "n + 1 F", float32=True),
    "rise": _removal(perturbation.rise, "Petsiuk et al., BMVC", 2018, "1001 F"),
    "shapley": _removal(perturbation.shapley, "Castro et al., COR", 2009, "16 (n - 1) + 2 F"),
    "kernel_shap": _removal(perturbation.shapley_by_kernel, "Lundberg & Lee, NeurIPS", 2017, "2002 F"),
    "mda": _removal(perturbation.metric_driven, "Walker et al., ICLR", 2025, "18 n + 3 F"),
    "caap": Method(
        perturbation.caap, "Izadi et al., arXiv", 2026, "n + 2 F", suit=perturbation.with_black, float32=True
    ),
    "tokentm_mix": Method(
        tokentm_mix,
        "named as future work by Wu et al.",
        2024,
        "1 F + 1 B",
        differentiable=False,
        classless=_classless,
        takes_memory=True,
    ),
    "combination": Method(
        combination,
        "named as future work by Wu et al.",
        2024,
        "those of its methods",
        classless=_classless,
        held=_held,
        takes_memory=True,
    ),
}
