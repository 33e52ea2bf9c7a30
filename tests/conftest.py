"""Strict types everywhere, and where the shared data lies."""

import json
import os
import signal
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling is most of the time of these tests; the numbers do not depend on it. (A slow test of the contract checks
# that: it runs itself with this variable set, on the programs that users run.)
if "TEST_OPTIMISED" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (
        0,
        11,
    ):  # an unknown flag ends the process, and later versions were not tried
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background jobs of a shell; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of sharding

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and data beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def random_vit(shared):
    """(module, params, arrays): the small random ViT of the goldens and the reference's results on it."""
    from tokentm_jax.models.architectures import build
    from tokentm_jax.models.checkpoint import read_checkpoint

    module = build(json.loads((shared / "goldens/random_vit_a.json").read_text()))
    arrays = dict(np.load(shared / "goldens/random_vit_a.npz"))
    return module, read_checkpoint(module, shared / "goldens/random_vit_a.safetensors"), arrays


@pytest.fixture(scope="session")
def deit(shared):
    """The real DeiT-tiny."""
    import tokentm_jax as tm

    return tm.load("deit_tiny_patch16_224", shared / "data/deit_tiny_patch16_224.safetensors")


def tiny_vit(depth):
    """A loaded model that compiles fast, for images of 16 x 24 pixels and 5 classes."""
    from tokentm_jax.data.preprocessing import HALF, Preprocessing
    from tokentm_jax.models.architectures import build
    from tokentm_jax.models.loading import LoadedViT
    from tokentm_jax.models.vit import init_params

    module = build(dict(img_size=[16, 24], patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=5))
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, init_params(module, jax.random.key(0)))
    return LoadedViT(module, params, Preprocessing((16, 24), 1.0, "bilinear", **HALF), None, "tiny")
