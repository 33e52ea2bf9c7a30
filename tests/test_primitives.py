"""The model's own derivatives: in every mode and order, against difference quotients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokentm_jax.maths import mixed, primitives
from tokentm_jax.models.vit import ViT, init_params

STEPS = {
    "norm": lambda x: primitives.norm(x, 1 + jnp.arange(4.0), jnp.arange(4.0), 1e-3),
    "norm, parameters": lambda x: primitives.norm(jnp.sin(x), x[0], x[1], 1e-3),
    "softmax": lambda x: primitives.softmax(x, 0.7),
    "gelu": lambda x: primitives.activation(x, "gelu"),
    "quick_gelu": lambda x: primitives.activation(x, "quick_gelu"),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def quotient(function, x, direction, step=1e-5):
    """Derivative of `function` (any tree of arrays) at x along a direction."""
    up, down = function(x + step * direction), function(x - step * direction)
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), up, down)


def check_modes(function, x):
    """Derivatives of a scalar function along directions: forward, reverse, and both ways to the second."""
    rng = np.random.default_rng(3)
    v, w = (jnp.asarray(rng.normal(size=x.shape)) for _ in range(2))
    gradient = jax.grad(function)

    def derivatives(x):
        along = lambda y: (gradient(y) * v).sum()  # noqa: E731
        return {
            "jvp": jax.jvp(function, (x,), (v,))[1],
            "grad": along(x),
            "reverse over reverse": (jax.grad(along)(x) * w).sum(),
            "hessian, forward over reverse": w.ravel() @ jax.hessian(function)(x).reshape(x.size, x.size) @ v.ravel(),
        }

    found = jax.jit(derivatives)(x)
    first = quotient(jax.jit(function), x, v)
    second = (quotient(jax.jit(gradient), x, v) * w).sum()
    for name, value in found.items():
        np.testing.assert_allclose(value, first if name in ("jvp", "grad") else second, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", STEPS)
def test_every_step_in_every_mode(name):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    check_modes(lambda x: (STEPS[name](x) * weights).sum(), x)


@pytest.mark.slow
def test_a_model_in_every_mode():
    module = ViT(img_size=(2, 4), patch_size=2, embed_dim=4, depth=2, num_heads=2, num_classes=2)
    params = init_params(module, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(a * 8 if a.ndim > 2 else a, jnp.float64), params)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
    check_modes(lambda x: module.apply({"params": params}, x.reshape(1, 2, 4, 3))[0, 1], image)


def test_reverse_mode_keeps_one_array_in_the_models_type():
    """What makes the steps cheap: of each, one array of its input's shape and type waits for the backward pass."""
    x = jnp.ones((4, 8, 16), jnp.bfloat16)
    ones = jnp.ones(16, jnp.bfloat16)
    for step in (
        lambda x: primitives.norm(x, ones, ones, 1e-3),
        lambda x: primitives.softmax(x, 0.7),
        lambda x: primitives.activation(x, "gelu"),
    ):
        kept = jax.tree.leaves(jax.vjp(step, x)[1])
        assert [a.dtype for a in kept if a.size >= x.size] == [jnp.bfloat16], step


@pytest.mark.parametrize("shape", [(3, 5, 8, 6), (7, 2, 4, 12), (1, 1, 2, 2)])
def test_mixed_precision_is_the_exact_product_of_rounded_operands(shape):
    """A linear map and its derivatives in float64, of operands that were rounded to bfloat16."""
    b, n, inputs, outputs = shape
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(b, n, inputs)), rng.normal(size=(b, n, outputs))
    kernel, bias = rng.normal(size=(inputs, outputs)), rng.normal(size=outputs)

    def rounded(a):
        return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)

    def total(x, kernel, bias):
        return (mixed.linear(x, kernel, bias) * jnp.asarray(weights, jnp.float32)).sum()

    given = [jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)]
    np.testing.assert_allclose(mixed.linear(*given), rounded(x) @ rounded(kernel) + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed.linear(*given[:2], None), rounded(x) @ rounded(kernel), rtol=1e-5, atol=1e-5)
    expected = (
        rounded(weights) @ rounded(kernel).T,
        rounded(x).reshape(-1, inputs).T @ rounded(weights).reshape(-1, outputs),
        weights.sum((0, 1)),
    )
    for gradient, wanted in zip(jax.jit(jax.grad(total, (0, 1, 2)))(*given), expected, strict=True):
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_mixed_precision_leaves_other_types_and_odd_maps_alone():
    rng = np.random.default_rng(0)
    for dtype, outputs in ((jnp.float64, 4), (jnp.bfloat16, 4), (jnp.float32, 3)):
        x, kernel = (jnp.asarray(rng.normal(size=size), dtype) for size in ((5, 6), (6, outputs)))
        found = mixed.linear(x, kernel, None)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, primitives.linear(x, kernel, None))
