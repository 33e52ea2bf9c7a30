"""The equations of TokenTM against a slow loop written from the definitions."""

from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from tokentm_jax.maths.tokentm import (
    aggregate,
    attention_map,
    cosine,
    initial_contribution,
    length,
    necc,
    transformation_weight,
)
from tokentm_jax.maths.variants import DIRECTIONS, READINGS, Blocks, TokenTM, contributions, sample_axes
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.programs.capture import KERNELS, SHOWN, capture

L, H, N, D = 3, 2, 5, 4

OPTIONS = [
    {},
    {"length": False},
    {"direction": "cosine"},
    {"direction": "none"},
    {"initialise": False},
    {"ffn": False},
    {"attention": "plain"},
    {"original": "normalised"},
    {"first_block": 1},
    {"first_block": 1, "end_block": 2},
    {"length": False, "direction": "none"},
    {"length": False, "direction": "none", "initialise": False, "ffn": False},
    {"length": False, "direction": "none", "heads": "each"},
    {"direction": "softmax"},
    {"heads": "each"},
    {"heads": "each", "original": "normalised", "attention": "plain"},
    {"heads": "each", "transformed": "linear", "direction": "cosine", "attention": "means"},
    {"transformed": "linear", "original": "normalised"},
    {"transformed": "stream"},
    {"ffn_transformed": "stream"},
    *READINGS.values(),
]


def random_blocks(seed=0, batch=()):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=(*batch, L, *shape)).astype(np.float32)

    attention = np.exp(normal(H, N, N))
    blocks = {
        "attention": attention / attention.sum(-1, keepdims=True),
        "attention_grad": normal(H, N, N),
        **{name: normal(N, D) for name in ("tokens", "normalised", "attention_branch", "ffn_branch")},
        "value": normal(H, N, D // H),
        **{name: rng.normal(size=(L, D, D)).astype(np.float32) for name in ("value_kernel", "output_kernel")},
    }
    together = np.moveaxis(blocks["value"], -3, -2).reshape(*batch, L, N, D)
    blocks["transformed_value"] = together @ blocks["output_kernel"]
    return blocks, jnp.asarray(blocks["tokens"][..., 0, :, :])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_full_map_and_row_equal_the_slow_loop(options):
    arrays, embedded = random_blocks()
    expected = oracle.full_map(arrays, embedded, **options)
    choices = TokenTM(**options)
    # What the choices do not use need not be there.
    blocks = Blocks(**{name: jnp.asarray(a) if name in choices.uses() else None for name, a in arrays.items()})
    embedded = embedded if choices.initialise else None
    full = contributions(blocks, embedded, jnp.eye(N), choices)
    np.testing.assert_allclose(full, expected, rtol=2e-5, atol=2e-6)
    row = np.random.default_rng(1).dirichlet(np.ones(N)).astype(np.float32)
    got = contributions(blocks, embedded, jnp.asarray(row), choices)
    np.testing.assert_allclose(got, row @ expected, rtol=2e-5, atol=2e-6)


def test_the_equations_of_the_paper_give_the_default_map():
    arrays, embedded = random_blocks()
    blocks = Blocks(**jax.tree.map(jnp.asarray, arrays))
    w_attn = transformation_weight(blocks.tokens, blocks.transformed_value)
    w_ffn = transformation_weight(blocks.tokens + blocks.attention_branch, blocks.ffn_branch)
    A_bar = jax.vmap(attention_map)(blocks.attention, blocks.attention_grad)
    full = initial_contribution(aggregate(jnp.eye(N), (A_bar, w_attn, w_ffn)), embedded)
    np.testing.assert_allclose(full, oracle.full_map(arrays, embedded), rtol=2e-5, atol=2e-6)


def test_hand_computed_weights():
    x = jnp.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    y = jnp.array([[6.0, 8.0], [0.0, 2.0], [1.0, 1.0]])
    np.testing.assert_allclose(length(x), [5, 1, 0])
    np.testing.assert_allclose(cosine(x, y), [1, 0, 0], atol=1e-7)
    mean = (np.e + 1 + 1) / 3
    np.testing.assert_allclose(necc(cosine(x, y)), [np.e / mean, 1 / mean, 1 / mean], rtol=1e-6)
    for direction, total in (("necc", mean), ("softmax", 3 * mean)):
        weights = transformation_weight(x, y, direction=DIRECTIONS[direction])
        np.testing.assert_allclose(weights, [2 * np.e / total, 2 / total, 0], rtol=1e-6)


def test_jit_and_vmap():
    arrays, embedded = random_blocks(batch=(2,))
    blocks, embedded = Blocks(**jax.tree.map(jnp.asarray, arrays)), jnp.asarray(embedded)
    row = jnp.full((N,), 1 / N)
    run = partial(contributions, options=TokenTM(heads="each"))
    batched = jax.jit(jax.vmap(run, in_axes=(sample_axes(0), 0, None)))(blocks, embedded, row)
    for b in range(2):
        sample = {k: a if k.endswith("_kernel") else a[b] for k, a in blocks._asdict().items() if a is not None}
        one = run(Blocks(**sample), embedded[b], row)
        np.testing.assert_allclose(batched[b], one, rtol=1e-5)


def test_gradient_agrees_with_finite_differences():
    with jax.enable_x64(True):
        arrays, _ = random_blocks()
        blocks = Blocks(**jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arrays))
        row = jnp.full((N,), 1 / N)

        @jax.jit
        def total(tokens):
            return contributions(blocks._replace(tokens=tokens), tokens[0], row).sum()

        gradient = jax.jit(jax.grad(total))(blocks.tokens)
        direction = jnp.asarray(np.random.default_rng(2).normal(size=gradient.shape))
        step = 1e-6
        up, down = total(blocks.tokens + step * direction), total(blocks.tokens - step * direction)
        np.testing.assert_allclose((gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-6)


def test_zero_tokens_stay_finite_and_differentiable():
    arrays, _ = random_blocks()
    arrays = {k: v if k.startswith("attention") and "branch" not in k else 0 * v for k, v in arrays.items()}
    blocks = Blocks(**jax.tree.map(jnp.asarray, arrays))

    def total(tokens):
        return contributions(blocks._replace(tokens=tokens), tokens[0], jnp.eye(N)).sum()

    assert total(blocks.tokens) == 0
    assert np.isfinite(jax.grad(total)(blocks.tokens)).all()


def test_the_row_form_builds_no_product_of_maps():
    """No [N, N] x [N, N] product anywhere in the program of the row form."""
    arrays, embedded = random_blocks()
    blocks = Blocks(**jax.tree.map(jnp.asarray, arrays))
    program = jax.make_jaxpr(contributions)(blocks, jnp.asarray(embedded), jnp.ones(N) / N)

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.outvars[0].aval.shape
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(inner)

    shapes = list(products(program.jaxpr))
    assert shapes and all(shape == (N,) for shape in shapes)


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize("bad", [{"direction": "up"}, {"attention": "none"}, {"original": "ln"}, {"heads": "all"}])
def test_unknown_choices_are_refused(bad):
    with pytest.raises(ValueError, match="must be one of"):
        TokenTM(**bad)


def test_heads_have_no_stream_of_their_own():
    with pytest.raises(ValueError, match="heads='each'"):
        TokenTM(heads="each", transformed="stream")


@pytest.mark.slow
def test_deit_tiny_equals_the_slow_loop(deit, shared):
    """On the real model: full map and heatmap of one photo against the float64 loop over the captured arrays."""
    arrays = np.load(shared / "goldens/deit_tiny.npz")
    inputs = deit.preprocessing.normalise(jnp.asarray(arrays["pixels"][:1], jnp.float32) / 255)
    target = jnp.asarray(arrays["target"][:1], jnp.int32)

    readings = [{}, {"heads": "each"}, *READINGS.values()]

    @jax.jit
    def run(params):
        trace = capture(deit.module, params, inputs, target, (*SHOWN, *KERNELS, "attention_grad"))
        maps = [explain_fn(deit.module, **options)(params, inputs, target) for options in readings]
        return trace.blocks()._asdict(), trace.tokens[0, 0], maps

    blocks, embedded, heatmaps = run(deit.params)
    known = {name: np.asarray(a) for name, a in blocks.items() if a is not None}
    sample = {name: a if name.endswith("_kernel") else a[:, 0] for name, a in known.items()}
    for options, heatmap in zip(readings, heatmaps, strict=True):
        expected = oracle.full_map(sample, embedded, **options)
        np.testing.assert_allclose(heatmap[0].ravel(), expected[0, 1:], rtol=1e-4, atol=1e-6 * expected[0].max())
