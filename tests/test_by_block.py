"""TokenTM block by block: against the method with fewer blocks, and a slow loop in float64."""

import jax
import numpy as np
import pytest
from conftest import tiny_vit

import tokentm_jax as tm
from tokentm_jax.methods.by_block import by_block


@pytest.mark.slow
def test_by_block_is_the_method_with_fewer_blocks_and_a_slow_loop():
    vit = tiny_vit(3)
    module, params = vit.module, vit.params
    images = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))
    target = np.array([1, 0], np.int32)
    found = jax.jit(lambda x: by_block(module, params, x, target))(images)
    depth = module.depth
    for end in range(1, depth + 1):
        expected = jax.jit(tm.explain_fn(module, "tokentm", end_block=end))(params, images, target)
        np.testing.assert_allclose(found.contribution[:, end - 1], expected, rtol=2e-5, atol=1e-7)

    trace = jax.tree.map(
        lambda a: np.asarray(a, np.float64), jax.jit(lambda x: tm.capture(module, params, x, target))(images)
    )
    before = [trace.tokens[:depth], trace.tokens[:depth] + trace.attention_branch]
    for layer, original, after in zip(
        (found.attention, found.ffn), before, (trace.transformed_value, trace.ffn_branch), strict=True
    ):
        for block in range(depth):
            for sample in range(len(images)):
                pairs = list(zip(original[block, sample], after[block, sample], strict=True))
                lengths = [np.linalg.norm(y) / np.linalg.norm(x) for x, y in pairs]
                cosines = [np.exp(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in pairs]
                neccs = np.array(cosines) / np.mean(cosines)
                for name, expected in (("length", lengths), ("necc", neccs), ("weight", lengths * neccs)):
                    got = np.asarray(getattr(layer, name))[sample, block].ravel()
                    np.testing.assert_allclose(got, np.asarray(expected)[module.prefix :], rtol=1e-4)
