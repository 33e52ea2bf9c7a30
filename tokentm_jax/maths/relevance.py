"""Relevance rules: other backward passes for the primitives of the model.

`jax.vjp` of a model whose `primitives` are one of these tuples carries relevance where it would carry derivatives;
there is no second copy of the model. Two kinds:

* `lrp(variant, stabiliser)`: the cotangent IS the relevance R of the value (alpha = 1, beta = 0 rules). Products
  and sums share it out, all else passes it on. Biases get none.
* `conservative(activation)`, `attn_lrp()` and `res_lrp(gamma)`: the cotangent is a modified gradient g; value * g is
  the relevance. LibraGrad's pruned backward pass is `conservative("identity")`.

All values have the batch as their leading axis, and nothing is summed over it.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from tokentm_jax.maths import primitives
from tokentm_jax.maths.primitives import Primitives, wide

Variant = Literal["ours", "lrp"]
Stabiliser = Literal["signed", "reference"]
Quotient = Callable[[Array, Array], Array]

REFERENCE_EPSILON = 1e-9
# Of the root mean square of the sample's denominators: the smallest power of ten at which float32 and float64 agree
# in rank to 0.9999 on DeiT-tiny, in the median of many roundings (tests/benchmark/stabiliser.py).
SIGNED_EPSILON = 1e-4


def _samplewise(reduce: Callable[..., Array], x: Array) -> Array:
    """Reduce all axes but the first (the batch), keeping them as ones."""
    return reduce(x, axis=tuple(range(1, x.ndim)), keepdims=True)


def quotient_of(a: Array, b: Array, denominator: Array) -> Array:
    """`a / denominator`, zero where b or the denominator is."""
    nonzero = (b != 0) & (denominator != 0)
    return jnp.where(nonzero, a / jnp.where(nonzero, denominator, 1), 0)


def reference_quotient(a: Array, b: Array) -> Array:
    """`a / (b + 1e-9)`, zero where b is zero: as published, so it blows up for b just below zero."""
    return quotient_of(a, b, b + REFERENCE_EPSILON)


def signed_quotient(a: Array, b: Array) -> Array:
    """`a / (b + eps sign(b))`, zero where b is zero, with eps relative to the scale of that sample's b."""
    eps = SIGNED_EPSILON * jnp.sqrt(_samplewise(jnp.mean, jnp.square(b)))
    return quotient_of(a, b, b + eps * jnp.sign(b))


QUOTIENTS: dict[str, Quotient] = {"reference": reference_quotient, "signed": signed_quotient}


def parts(x: Array) -> tuple[Array, Array]:
    """Positive and negative part: x = x+ + x-."""
    return jnp.maximum(x, 0), jnp.minimum(x, 0)


def _linear_rule(variant: Variant, quotient: Quotient, x: Array, kernel: Array, r: Array) -> Array:
    """R [.., O] -> [.., I]. With `P_ij = x_i+ w_ij+` and `Q_ij = x_i- w_ij-`: the variant "ours" shares R_j over
    `P + Q` together, "lrp" gives all of R_j once over P and once over Q."""
    (x_pos, x_neg), (w_pos, w_neg) = parts(x), parts(kernel.astype(x.dtype))
    z_pos, z_neg = x_pos @ w_pos, x_neg @ w_neg
    if variant == "ours":
        s_pos = s_neg = quotient(r, z_pos + z_neg)
    else:
        s_pos, s_neg = quotient(r, z_pos), quotient(r, z_neg)
    return x_pos * (s_pos @ w_pos.T) + x_neg * (s_neg @ w_neg.T)


def _embed_rule(x: Array, kernel: Array, r: Array) -> Array:
    """z-B rule of the patch embedding: R [B, n, D] -> [B, n, p p 3], bounded by each image's minimum and maximum."""
    kernel = kernel.astype(x.dtype)
    low, high = _samplewise(jnp.min, x), _samplewise(jnp.max, x)
    w_pos, w_neg = parts(kernel)
    s = r / (x @ kernel - low * w_pos.sum(0) - high * w_neg.sum(0) + REFERENCE_EPSILON)
    return x * (s @ kernel.T) - low * (s @ w_pos.T) - high * (s @ w_neg.T)


def _add_rule(variant: Variant, quotient: Quotient, a: Array, b: Array, r: Array) -> tuple[Array, Array]:
    """`a * R / (a + b)` and `b * R / (a + b)`; "ours" then rescales the branches of each sample so that a carries
    `|sum a| / (|sum a| + |sum b|)` of the sample's relevance, sums of those two shares."""
    share = quotient(r, a + b)
    r_a, r_b = a * share, b * share
    if variant == "ours":
        sum_a, sum_b, total = (_samplewise(jnp.sum, v) for v in (r_a, r_b, r))
        weight = total / (jnp.abs(sum_a) + jnp.abs(sum_b))
        r_a = r_a * quotient(jnp.abs(sum_a) * weight, sum_a)
        r_b = r_b * quotient(jnp.abs(sum_b) * weight, sum_b)
    return r_a, r_b


@lru_cache
def lrp(variant: Variant, stabiliser: Stabiliser) -> Primitives:
    """Layer-wise relevance propagation: "ours" of Transformer Attribution (Chefer et al., CVPR 2021), or plain "lrp".

    The stabiliser chooses how quotients treat denominators near zero; see `reference_quotient`, `signed_quotient`.
    """
    quotient = QUOTIENTS[stabiliser]
    # Forward rules call the plain primitives, so that a map can itself be differentiated.

    @jax.custom_vjp
    def linear(x: Array, kernel: Array, bias: Array | None) -> Array:
        return primitives.linear(x, kernel, bias)

    linear.defvjp(
        lambda x, kernel, bias: (primitives.linear(x, kernel, bias), (x, kernel)),
        lambda saved, r: (_linear_rule(variant, quotient, saved[0], saved[1], r), None, None),
    )

    @jax.custom_vjp
    def embed(x: Array, kernel: Array, bias: Array | None) -> Array:
        return primitives.linear(x, kernel, bias)

    embed.defvjp(
        lambda x, kernel, bias: (primitives.linear(x, kernel, bias), (x, kernel)),
        lambda saved, r: (_embed_rule(saved[0], saved[1], r), None, None),
    )

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def product(equation: str, a: Array, b: Array) -> Array:
        return primitives.product(equation, a, b)

    def product_backward(equation: str, saved: tuple[Array, Array], r: Array) -> tuple[Array, Array]:
        z, back = jax.vjp(partial(jnp.einsum, equation), *saved)
        to_a, to_b = back(quotient(r, z))
        return saved[0] * to_a / 2, saved[1] * to_b / 2

    product.defvjp(lambda equation, a, b: (primitives.product(equation, a, b), (a, b)), product_backward)

    @jax.custom_vjp
    def same_shape_add(a: Array, b: Array) -> Array:
        return a + b

    same_shape_add.defvjp(
        lambda a, b: (a + b, (a, b)), lambda saved, r: _add_rule(variant, quotient, saved[0], saved[1], r)
    )

    @jax.custom_vjp
    def fork(x: Array) -> tuple[Array, Array]:
        return x, x

    # The published code stabilises even this; in exact arithmetic it is the sum of both.
    fork.defvjp(lambda x: ((x, x), x), lambda x, rs: (x * (quotient(rs[0], x) + quotient(rs[1], x)),))

    def rotate(x: Array, cosine: Array, sine: Array, half: bool) -> Array:
        other = primitives.swapped(x, half)
        return same_shape_add(_passed_on(x, x * cosine), _passed_on(other, other * sine))

    return Primitives(
        embed=embed,
        linear=linear,
        rotate=rotate,
        product=cast(Any, product),
        gate=partial(product, "...d,...d->...d"),
        fork=fork if stabiliser == "reference" else primitives.fork,
        add=lambda a, b: same_shape_add(a, jnp.broadcast_to(b, a.shape)),
        norm=lambda x, *parameters: _passed_on(x, primitives.norm(x, *parameters)),
        softmax=lambda scores, scale: _passed_on(scores, primitives.softmax(scores, scale)),
        activation=lambda x, function: _passed_on(x, primitives.activation(x, function)),
    )


@jax.custom_vjp
def _passed_on(x: Array, value: Array) -> Array:
    """`value`, a function of x, with its relevance passed on to x unchanged."""
    return value


_passed_on.defvjp(lambda x, value: (value, None), lambda _, r: (r, None))


def _norm_with_constant_deviation(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """LayerNorm that is differentiated as if its standard deviation were a constant."""
    centred = wide(x) - wide(x).mean(-1, keepdims=True)
    inverse = stop_gradient(jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps))
    return (centred * inverse * scale.astype(centred.dtype) + bias.astype(centred.dtype)).astype(x.dtype)


def _activation_as_gain(x: Array, function: str) -> Array:
    """`f(x)` differentiated as if it were x times the constant f(x) / x (the identity rule)."""
    safe = jnp.where(x == 0, jnp.asarray(1e-6, x.dtype), x)
    return x * stop_gradient(primitives.activation(safe, function) / safe)


Activation = Literal["identity", "gradient"]


@lru_cache
def conservative(activation: Activation, pooler: Activation | None = None) -> Primitives:
    """Conservative LRP (Ali et al., ICML 2022): attention weights and the deviation of LayerNorm held constant, and
    the gates of SwiGLU, which is newer.

    Without biases the model is then linear in its tokens, so that token * gradient sums to the logit, when the
    activation takes the "identity" rule `f(x) / x` too; "gradient" takes its ordinary derivative. `pooler` is the rule
    of a tanh, which is the pooler's of BERT; None: that of the other activations.
    """

    def activated(x: Array, function: str) -> Array:
        chosen = pooler if function == "tanh" and pooler is not None else activation
        return _activation_as_gain(x, function) if chosen == "identity" else primitives.activation(x, function)

    return Primitives(
        norm=_norm_with_constant_deviation,
        softmax=lambda scores, scale: stop_gradient(primitives.softmax(scores, scale)),
        gate=lambda gates, x: stop_gradient(gates) * x,
        activation=activated,
    )


@lru_cache
def attn_lrp() -> Primitives:
    """AttnLRP (Achtibat et al., ICML 2024), in its gradient form.

    With R = x * g: the epsilon rule of a linear map, in the limit of a vanishing epsilon, and the softmax rule
    `R_in = x * (R - s sum R)` are the ordinary derivatives; a product halves the gradient, so that its two factors
    share the relevance; LayerNorm's deviation is a constant; the activation takes the identity rule.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def product(equation: str, a: Array, b: Array) -> Array:
        return primitives.product(equation, a, b)

    def shared(equation: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        to_a, to_b = jax.vjp(partial(jnp.einsum, equation), *saved)[1](g)
        return to_a / 2, to_b / 2

    product.defvjp(lambda equation, a, b: (primitives.product(equation, a, b), (a, b)), shared)
    gate = partial(product, "...d,...d->...d")
    return Primitives(
        product=cast(Any, product), gate=gate, norm=_norm_with_constant_deviation, activation=_activation_as_gain
    )


@lru_cache
def res_lrp(gamma: float) -> Primitives:
    """ResLRP (2026): AttnLRP with the gamma rule at residual sums.

    With R = out * g, out = a + b: each summand that agrees in sign with the sum counts 1 + gamma times, so that
    `R_a = a' / (a' + b') R`, `a' = a (1 + gamma [a out >= 0])`. Where a and b nearly cancel, the plain rule makes the
    shares of R as large as they like; here |R_a| + |R_b| is at most `1 + 2 / gamma` times |R|.
    """

    @jax.custom_vjp
    def same_shape_add(a: Array, b: Array) -> Array:
        return a + b

    def backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        a, b = saved
        out = a + b
        gain_a, gain_b = (1 + gamma * (x * out >= 0).astype(x.dtype) for x in saved)
        share = g * quotient_of(out, out, a * gain_a + b * gain_b)
        return share * gain_a, share * gain_b

    same_shape_add.defvjp(lambda a, b: (a + b, (a, b)), backward)
    return attn_lrp()._replace(add=lambda a, b: same_shape_add(a, jnp.broadcast_to(b, a.shape)))


def with_factor_on_biases(rules: Primitives, factor: Array, readout: Array) -> Primitives:
    """The rules with every bias times a factor of its own for each sample and token, [B, N].

    After the tokens were read, the factor is that of the tokens that were, by their read-out [B, N]. The derivative by
    the factor is bias times gradient, summed over channels and steps.
    """

    def of(y: Array) -> Array:
        """The factors [B, ...] of the tokens in y: [B, D], [B, N, D] or [B, H, N, D]; one token is what was read, and
        fewer than N are the patches."""
        if y.ndim == 2 or y.shape[-2] == 1:
            return (factor * readout).sum(-1).reshape(-1, *(1,) * (y.ndim - 2))
        own = factor[:, factor.shape[1] - y.shape[-2] :]
        return own[:, None] if y.ndim == 4 else own

    def scaled(y: Array, bias: Array) -> Array:
        own = of(y)
        return (wide(y) + wide(bias) * own[..., None]).astype(y.dtype)

    def linear(x: Array, kernel: Array, bias: Array | None) -> Array:
        y = rules.linear(x, kernel, None)
        return y if bias is None else scaled(y, bias)

    def norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
        return scaled(rules.norm(x, scale, jnp.zeros_like(bias), eps), bias)

    return rules._replace(linear=linear, norm=norm)
