"""A ViT's subclass is explained as what it computes: never as its parent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHEAP, mostly_slow

import tokentm_jax as tm
from tokentm_jax.methods.explain import explain_fn
from tokentm_jax.methods.table import METHODS
from tokentm_jax.models.vit import ViT, init_params

FIELDS = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
QUICK = ("legrad", "lrp")
CASES = mostly_slow(METHODS, QUICK)


class OwnParts(ViT):
    """Other steps where the parent calls them: at the embedding and at the head."""

    def embed(self, images):
        return 2 * super().embed(images)

    def classify(self, tokens):
        return super().classify(tokens[..., ::-1])


class OwnPass(ViT):
    """The same numbers by a forward pass of its own: the head still is the parent's."""

    def __call__(self, images):
        tokens, _ = self.blocks(2 * self.embed(images), None)
        return self.classify(tokens[..., ::-1])


class OwnBlocks(ViT):
    """Other blocks than `block()` gives."""

    def setup(self):
        super().setup()
        self.extra = self.param("extra", lambda _: jnp.ones(()))

    def block(self):
        return super().block().clone(norm_eps=10.0)


@pytest.fixture(scope="module")
def models():
    """(params, images, params of the plain ViT that computes what `OwnParts` and `OwnPass` do)."""
    rng = np.random.default_rng(0)
    params = init_params(ViT(**FIELDS), jax.random.key(0))
    params = jax.tree.map(lambda a: a * 8 + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)
    embedding = ("patch_embed", "cls_token", "pos_embed")
    same = {k: jax.tree.map(lambda a: 2 * a, v) if k in embedding else v for k, v in params.items()}
    same["norm"] = jax.tree.map(lambda a: a[::-1], params["norm"])
    same["head"] = {**params["head"], "kernel": params["head"]["kernel"][::-1]}
    return params, rng.normal(size=(2, 8, 12, 3)).astype(np.float32), same


@pytest.mark.parametrize("method", CASES)
def test_a_subclass_is_explained(briefly, models, method):
    params, images, same = models
    target = jnp.array([0, 2], jnp.int32)
    explain = lambda kind: explain_fn(kind(**FIELDS), method, **CHEAP.get(method, {}))  # noqa: E731
    kinds = [OwnParts, OwnPass]
    if method == "token_dropping":
        with pytest.raises(tm.InputError, match="OwnPass has another one"):
            explain(kinds.pop())(params, images, target)
    program = jax.jit(lambda p, q, x, t: (explain(ViT)(q, x, t), [explain(kind)(p, x, t) for kind in kinds]))
    expected, found = program(params, same, images, target)
    quotients = method in ("lrp", "partial_lrp", "transformer_attribution", "res_lrp")
    for maps in found:
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=(1e-3 if quotients else 1e-5) * scale)


def test_a_pass_that_may_be_another_is_not_taken_for_the_parents(models):
    """`block()` disagrees with what runs: what runs is explained."""
    params, images, _ = models
    own = {**params, "extra": jnp.ones(())}
    program = jax.jit(lambda p, x: (explain_fn(OwnBlocks(**FIELDS))(own, x), explain_fn(ViT(**FIELDS))(p, x)))
    found, expected = program(params, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
