"""The arithmetic of tests/benchmark/roofline.py."""

import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import mostly_slow

from tokentm_jax.methods.explain import compiled, explain_fn
from tokentm_jax.methods.table import METHODS
from tokentm_jax.models.vit import ViT, init_params

SMALL = ViT((16, 24), patch_size=8, embed_dim=16, depth=5, num_heads=2, num_classes=7, mlp_ratio=3.0)

KERNELS = {(16, 48), (16, 16), (48, 16)}  # of a block; no activation has such a shape


@pytest.fixture(scope="module")
def roofline():
    sys.path.insert(0, str(Path(__file__).parent / "benchmark"))
    try:
        import roofline

        yield roofline
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def common(roofline):
    return sys.modules["common"]


def traced(program, module, batch):
    params = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, *module.img_size, 3), jnp.float32)
    return jax.make_jaxpr(program(module))(params, images)


# The others trace a layer twice, for the compiler to compute it once, or cost what other methods or the patches do.
TWICE = ("tokentm", "gae", "libra_tokentm", "libra_gae", "tokentm_mix", "combination", "kernel_shap")
ONE_BY_ONE = [name for name, row in METHODS.items() if name not in TWICE and "n " not in row.passes]


@pytest.mark.parametrize("method", mostly_slow(ONE_BY_ONE, ("transformer_attribution", "grad_cam")))
def test_methods_cost_the_passes_that_the_table_says(common, method):
    """What is traced, in forward passes. A backward pass to the inputs is one, by the rules of LRP four, and by those
    of Transformer Attribution three.

    "1/L B" is a backward pass through the last of the L blocks. Details are not read: those of `partial_lrp` have
    another pass.
    """
    module = ViT((32, 32), 16, embed_dim=96, depth=6, num_heads=3, num_classes=10)

    def cost(function):
        return common.read_products(traced(lambda _: function, module, 2))

    forward = cost(lambda params, images: module.apply({"params": params}, images))
    terms = re.findall("([0-9]+)(/L)?", METHODS[method].passes)
    stated = sum(int(number) / (module.depth if part else 1) for number, part in terms)
    assert cost(explain_fn(module, method)) / forward == pytest.approx(stated, rel=0.2)


def test_methods_of_one_run_cost_one_pass(common):
    """As one of them by itself, except the rows; a second set of rules costs a second pass."""
    module = ViT((32, 32), 16, embed_dim=96, depth=6, num_heads=3, num_classes=10)

    def cost(*names):
        run = compiled(module, {name: {} for name in names})
        return common.read_products(traced(lambda _: lambda params, images: run(params, images, None)[0], module, 2))

    assert cost("tokentm", "gae", "attcat", "input_gradient") == pytest.approx(cost("tokentm"), rel=0.05)
    assert cost("tokentm", "libra_attcat", "gae") == pytest.approx(cost("tokentm") + cost("libra_attcat"), rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("label", "passes"), [("forward", (1, 0)), ("forward and backward", (1, 1))])
def test_the_count_by_hand_is_that_of_the_traced_products(roofline, common, label, passes, fused):
    """Fused attention reads and writes the same arrays, except those of attention, and the logsumexp of each query."""
    batch, moved, tokens = 2, 0, 7
    found = list(common.products(traced(roofline.PROGRAMS[label][0], SMALL, batch).jaxpr))
    for times, equation in found:
        left, right = (v.aval.shape for v in equation.invars)
        out = equation.outvars[0].aval.shape
        if times > 1:  # of the blocks
            weights = [s for s in (left, right) if s in KERNELS]
            activations = [s for s in (left, right, out) if s not in KERNELS and not (fused and s.count(tokens) > 1)]
            moved += times * (2 * sum(map(math.prod, activations)) + 4 * sum(map(math.prod, weights)))
    _, backwards = passes
    again = backwards * 2 * SMALL.depth * SMALL.embed_dim * tokens**2  # the scores
    per_query = 4 * SMALL.depth * SMALL.num_heads * tokens
    cost = roofline.by_hand(SMALL, *passes, batch, fused)
    assert cost.flops == common.flops_of(found) / batch + fused * again
    assert cost.bytes == moved / batch + fused * backwards * 2 * per_query  # written once, read once


def test_fused_attention_at_a_vit_base(roofline):
    """Without the six times that attention [12, 197, 197] is read or written in each of 12 blocks, in bfloat16."""
    module = roofline.named_vit("vit_base_patch16_224")
    plain, fused = (roofline.by_hand(module, 1, 1, 64, fused) for fused in (False, True))
    attention, per_query = 12 * 197 * 197 * 2, 12 * 197 * 4
    assert plain.bytes - fused.bytes == 12 * (6 * attention - 2 * per_query)
    (row,) = roofline.by_size("vit_base_patch16_224", [1024], 64)
    assert row[:3] == ["vit_base_patch16_224", "1024 px", "4097"]
    assert float(row[6]) < float(row[5]) / 5  # MB


@pytest.mark.slow
def test_xla_counts_a_scan_once_and_the_unrolled_blocks_all(roofline):
    program = roofline.PROGRAMS["forward"][0]
    once = [
        roofline.compiled(program, SMALL.clone(depth=depth), 2, unroll=False).cost_analysis()["flops"]
        for depth in (3, 5)
    ]
    assert once[0] == once[1]
    whole = roofline.compiled(program, SMALL, 2).cost_analysis()
    found = roofline.counted(program, SMALL, 2)
    assert found.flops == pytest.approx(whole["flops"] / 2, rel=0.02)
    assert found.bytes == pytest.approx(whole["bytes accessed"] / 2, rel=0.05)
    assert found.flops > 2.5 * once[0] / 2
    assert 1 <= found.flops / roofline.hand_flops(SMALL, 1, 0) < 1.6  # elementwise work is much of so small a model


def test_the_slower_of_computing_and_moving_sets_the_pace(roofline):
    chip = roofline.Chip("toy", 100.0, 10.0, 1.0)  # the ridge is at 10 FLOP per byte
    computing, moving = roofline.Cost(200.0, 5.0), roofline.Cost(20.0, 5.0)
    assert (roofline.rate(computing, chip), roofline.limit(computing, chip)) == (0.5, "compute")
    assert (roofline.rate(moving, chip), roofline.limit(moving, chip)) == (2.0, "memory")
    assert roofline.rate(moving, chip, 0.25) == 0.5
    assert roofline.duration(86400 * 30, 10, 1) == "3.0 days"
    assert roofline.duration(3600 * 30, 10, 1) == "3.0 hours"
    assert roofline.duration(3600 * 30, 10, 4) == "45.0 minutes"
    assert roofline.duration(100, 10, 1) == "10 seconds"


def test_a_vit_base_costs_what_is_published(roofline):
    """17.6 G multiplications and additions for ViT-B/16 (DeiT, Touvron et al., ICML 2021, table 5)."""
    flops = roofline.hand_flops(roofline.named_vit("vit_base_patch16_224"), 1, 0)
    assert flops / 2e9 == pytest.approx(17.6, rel=0.01)
