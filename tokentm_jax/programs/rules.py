"""Backward rules as data: mappings from kinds of steps to functions `rule(f, *inputs)`; see `running`.

Arrays are of one sample, so a sum "over a sample" is the sum of the array.
"""

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from tokentm_jax.programs.pieces import tied
from tokentm_jax.programs.running import Rules, by_query

Activation = Literal["identity", "gradient"]
Variant = Literal["ours", "lrp"]
Stabiliser = Literal["signed", "reference"]

REFERENCE_EPSILON = 1e-9
# Share of the root mean square of the sample's denominators: the smallest power of ten with a rank correlation of
# 0.9999 between float32 and float64 on DeiT-tiny, in the median of many roundings (tests/benchmark/stabiliser.py).
SIGNED_EPSILON = 1e-4
# A sum of two numbers that cancel to less than this many roundings is zero.
ROUNDING = 16


def quotient_of(a: Array, b: Array, denominator: Array) -> Array:
    """`a / denominator`, zero where b or the denominator is zero."""
    nonzero = (b != 0) & (denominator != 0)
    return jnp.where(nonzero, a / jnp.where(nonzero, denominator, 1), 0)


def reference_quotient(a: Array, b: Array, mean_square: Array | None = None) -> Array:
    """`a / (b + 1e-9)`, zero where b is zero, as published: it is very large for b just below zero."""
    return quotient_of(a, b, b + REFERENCE_EPSILON)


def signed_quotient(a: Array, b: Array, mean_square: Array | None = None) -> Array:
    """`a / (b + eps sign(b))`, zero where b is zero, with eps relative to the scale of the sample's b.

    `mean_square` is that of the whole b, if this b is a part.
    """
    mean_square = jnp.square(b).mean() if mean_square is None else mean_square
    return quotient_of(a, b, b + SIGNED_EPSILON * jnp.sqrt(mean_square) * jnp.sign(b))


QUOTIENTS: dict[str, Callable[..., Array]] = {"reference": reference_quotient, "signed": signed_quotient}


def parts(x: Array) -> tuple[Array, Array]:
    """Positive and negative part: x = x+ + x-."""
    return jnp.maximum(x, 0), jnp.minimum(x, 0)


def with_backward(f: Any, inputs: tuple[Array, ...], backward: Any) -> Array:
    """`f(*inputs)` with the backward pass `backward(g, out, *inputs)`, a cotangent or None for each input.

    `f` must not close over a value of the program. `f.value` is its result where that is known.
    """

    def value(known: Array | None, *inputs: Array) -> Array:
        return f(*inputs) if known is None else known

    def forward(known: Array | None, *inputs: Array) -> tuple[Array, Any]:
        out = value(known, *inputs)
        return out, (out, inputs)

    step = jax.custom_vjp(value)
    step.defvjp(forward, lambda saved, g: (None, *backward(g, saved[0], *saved[1])))
    return step(getattr(f, "value", None), *inputs)


@jax.custom_jvp
def _multiple(x: Array, factor: Array, value: Array) -> Array:
    """The value, with the derivative of `factor x` for a constant factor."""
    return value


_multiple.defjvp(lambda values, tangents: (values[2], (tangents[0] * values[1]).astype(values[2].dtype)))


def gain(f: Any, x: Array) -> Array:
    """The identity rule: f as the product of x with the constant `f(x) / x`."""
    safe = jnp.where(x == 0, jnp.asarray(1e-6, x.dtype), x)
    return _multiple(x, stop_gradient(f(safe).astype(x.dtype) / safe), f(x))


def halved(f: Any, a: Array, b: Array) -> Array:
    """A product whose factors get half of the cotangent each."""
    return with_backward(f, (a, b), lambda g, _, a, b: tuple(d / 2 for d in jax.vjp(f, a, b)[1](g)))


LIBRA: Rules = {
    "softmax": lambda f, scores: stop_gradient(f(scores)),
    "norm": lambda f, x, statistic: f(x, stop_gradient(statistic)),
    "gate": lambda f, gate, x: f(stop_gradient(gate), x),
    "product": halved,
    "activation": gain,
}
# AttnLRP (Achtibat et al., ICML 2024) in its gradient form, R = x * g. The epsilon rule of a linear map, as epsilon
# goes to 0, and the softmax rule `R_in = x * (R - s sum R)` are the ordinary derivatives.
ATTN_LRP: Rules = {"mix": halved, "product": halved, "gate": halved, "norm": LIBRA["norm"], "activation": gain}


@lru_cache
def conservative(activation: Activation = "identity", pooler: Activation | None = None) -> Rules:
    """Conservative LRP (Ali et al., ICML 2022): attention weights, the deviation of norms, and the gates of SwiGLU
    (which is newer) are constant. With "identity" it is LibraGrad's pruned backward pass.

    `activation` is the rule of activations: "identity", `f(x) / x`, or "gradient", the ordinary derivative. With
    "identity" and without biases the model is linear in its tokens, so token * gradient sums to the logit. `pooler` is
    the rule of a single tanh, as in BERT's pooler; None: the same as `activation`.
    """

    def activated(f: Any, x: Array) -> Array:
        chosen = pooler if f.steps == ["tanh"] and pooler is not None else activation
        return gain(f, x) if chosen == "identity" else f(x)

    return {**LIBRA, "activation": activated}


@lru_cache
def res_lrp(gamma: float) -> Rules:
    """ResLRP (2026): AttnLRP with the gamma rule at sums.

    With R = out * g, out = a + b: a summand with the sign of the sum counts 1 + gamma times, so
    `R_a = a' / (a' + b') R`, `a' = a (1 + gamma [a out >= 0])`. If a and b nearly cancel, the plain rule gives shares
    of R without a bound; here |R_a| + |R_b| is at most `1 + 2 / gamma` times |R|.
    """

    def add(f: Any, a: Array, b: Array) -> Array:
        def backward(g: Array, out: Array, a: Array, b: Array) -> tuple[Array, Array]:
            gain_a, gain_b = (1 + gamma * (x * out >= 0).astype(x.dtype) for x in (a, b))
            share = g * quotient_of(out, out, a * gain_a + b * gain_b)
            return share * gain_a, share * gain_b

        return with_backward(f, (a, b), backward)

    return {
        **ATTN_LRP,
        "residual": add,
        "add": add,
        "position": lambda f, x, p: add(f, x, jnp.broadcast_to(p, x.shape)),
    }


def _passed_on(f: Any, x: Array, *more: Array) -> Array:
    """`f(x, *more)` with its relevance passed on to x unchanged, if the shapes are the same."""
    value = f(x, *more)
    return _multiple(x, jnp.ones((), x.dtype), value) if x.shape == value.shape else value


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _measured(quotient: Callable[..., Array], queries: int | None, x: Array) -> tuple[Array, Array]:
    """x, and the mean of its squares: one number, or [Q] of each query, if `queries` is their axis.

    Backward, the cotangent of the mean is that of the whole sample, and R becomes `R / x`.
    """
    return _measured_forward(quotient, queries, x)[0]


def _measured_forward(quotient: Any, queries: int | None, x: Array) -> tuple[tuple[Array, Array], Array]:
    return (x, jnp.square(x).mean([axis for axis in range(x.ndim) if axis != queries])), x


def _measured_backward(quotient: Any, queries: int | None, x: Array, cotangents: tuple[Array, Array]) -> tuple[Array]:
    r, mean_square = cotangents
    return (quotient(r, x, jnp.expand_dims(mean_square, [axis for axis in range(x.ndim) if axis != queries])),)


_measured.defvjp(_measured_forward, _measured_backward)


@lru_cache
def lrp(variant: Variant, stabiliser: Stabiliser) -> Rules:
    """Layer-wise relevance propagation: the cotangent is the relevance R. The variant is "ours" of Transformer
    Attribution (Chefer et al., CVPR 2021), or plain "lrp" (alpha = 1, beta = 0).

    Products and sums distribute R, other steps pass it on, and biases get none. A linear map has positive parts
    `P_ij = x_i+ w_ij+` and `Q_ij = x_i- w_ij-`: "ours" distributes R_j over `P + Q`, "lrp" distributes all of R_j over
    P and again over Q. "ours" rescales the branches of a sum so that a gets `|sum a| / (|sum a| + |sum b|)`.
    The stabiliser specifies how quotients treat denominators near zero.
    """
    quotient = QUOTIENTS[stabiliser]

    def shared(f: Any, inputs: tuple[Array, ...], backward: Any) -> Array:
        """`f(*inputs)` with the backward pass `backward(R / f(*inputs), out, *inputs)`."""
        measured: Any = _measured(quotient, getattr(f, "queries", None), with_backward(f, inputs, backward))
        out, means = measured
        if not hasattr(f, "means"):
            return tied(out, [means])
        f.means.append(means)
        return out

    def by_parts(f: Any, x: Array, kernels: tuple[Any, Any], r: Array) -> Array:
        """R of x, from the positive and negative parts of `f(x, kernel)`."""
        pulls = [jax.vjp(partial(_second, f, k), own) for own, k in zip(parts(x), kernels, strict=True)]
        (z_pos, pull_pos), (z_neg, pull_neg) = pulls
        if variant == "ours":
            s_pos = s_neg = quotient(r, z_pos + z_neg)
        else:
            s_pos, s_neg = quotient(r, z_pos), quotient(r, z_neg)
        x_pos, x_neg = parts(x)
        return x_pos * pull_pos(s_pos)[0] + x_neg * pull_neg(s_neg)[0]

    def by_sum(f: Any, out: Array, x: Array, kernel: Array, r: Array) -> Array:
        """The same for "ours", with a product less: `P + Q` is half the sum of `x w` and `|x| |w|`."""
        magnitude, pull_magnitude = jax.vjp(partial(_second, f, jnp.abs(kernel)), jnp.abs(x))
        _, pull = jax.vjp(partial(_second, f, kernel), x)
        z = (out + magnitude) / 2
        z = jnp.where(z > ROUNDING * jnp.finfo(z.dtype).eps * magnitude, z, 0)  # parts that cancel have no rest
        s = quotient(r, z)
        return (x * pull(s)[0] + jnp.abs(x) * pull_magnitude(s)[0]) / 2

    def linear(f: Any, x: Array, kernel: Array) -> Array:
        def backward(r: Array, out: Array, x: Array, kernel: Array) -> tuple[Array, None]:
            if variant == "ours":
                return by_sum(f, out, x, kernel, r), None
            return by_parts(f, x, parts(kernel), r), None

        return with_backward(f, (x, kernel), backward)

    def reduce(f: Any, x: Array) -> Array:
        return with_backward(f, (x,), lambda r, _, x: (by_parts(lambda x, _: f(x), x, (None, None), r),))

    def embed(f: Any, x: Array, kernel: Array) -> Array:
        def backward(r: Array, _: Array, x: Array, kernel: Array) -> tuple[Array, None]:
            w_pos, w_neg = parts(kernel)
            bound = x.min() * w_pos + x.max() * w_neg
            s = r / (f(x, kernel) - f(jnp.ones_like(x), bound) + REFERENCE_EPSILON)
            own, at_bound = (jax.vjp(partial(_second, f, w), x)[1](s)[0] for w in (kernel, bound))
            return x * own - at_bound, None

        return with_backward(f, (x, kernel), backward)

    def product(f: Any, a: Array, b: Array) -> Array:
        return shared(f, (a, b), lambda s, _, a, b: _of_inputs(f, s / 2, a, b))

    def add(f: Any, a: Array, b: Array) -> Array:
        def rescaled(r: Array, out: Array, a: Array, b: Array) -> tuple[Array, Array]:
            r_a, r_b = _of_inputs(f, quotient(r, out), a, b)
            sum_a, sum_b = r_a.sum(), r_b.sum()
            weight = r.sum() / (jnp.abs(sum_a) + jnp.abs(sum_b))
            r_a = r_a * quotient(jnp.abs(sum_a) * weight, sum_a)
            r_b = r_b * quotient(jnp.abs(sum_b) * weight, sum_b)
            return r_a, r_b

        if variant == "ours":
            return with_backward(f, (a, b), rescaled)
        return shared(f, (a, b), lambda s, _, a, b: _of_inputs(f, s, a, b))

    def fork(f: Any, x: Array) -> tuple[Array, Array]:
        @jax.custom_vjp
        def twice(x: Array) -> tuple[Array, Array]:
            return x, x

        twice.defvjp(lambda x: ((x, x), x), lambda x, rs: (x * (quotient(rs[0], x) + quotient(rs[1], x)),))
        return twice(x)

    def position(f: Any, x: Array, p: Array) -> Array:
        return add(wraps(f)(lambda a, b: a + b), x, jnp.broadcast_to(p, x.shape))

    by_query(product, _passed_on, *((add, position) if variant == "lrp" else ()))
    rules: dict[str, Any] = {
        "linear": linear,
        "embed": embed,
        "reduce": reduce,
        "position": position,
        **dict.fromkeys(("mix", "product", "gate"), product),
        **dict.fromkeys(("add", "residual", "turn"), add),
        **dict.fromkeys(("bias", "scale", "norm", "centre", "softmax", "activation"), _passed_on),
    }
    return rules | ({"fork": fork} if stabiliser == "reference" else {})


def _of_inputs(f: Any, s: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """R of both inputs of a product or sum from `s = R / f(a, b)`."""
    to_a, to_b = jax.vjp(f, a, b)[1](s)
    return a * to_a, b * to_b


def _second(f: Any, second: Any, first: Array) -> Array:
    return f(first, second)


RULES: dict[str, Rules] = {
    "plain": {},
    "libra": LIBRA,
    "conservative": LIBRA,
    "attn_lrp": ATTN_LRP,
    "res_lrp": res_lrp(1.0),
    "lrp": lrp("lrp", "signed"),
}
