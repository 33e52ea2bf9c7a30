"""Strict types and shapes everywhere, and where the shared data lies."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import jax
import jaxlib
import jaxtyping
import numpy as np
import pytest

if "TEST_TYPES" in os.environ:  # the shapes in annotations hold in every test; this takes 13 % more time
    jaxtyping.install_import_hook(["tokentm_jax.maths", "tokentm_jax.metrics"], "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # `load` would keep programs in the home folder
# Compiling is most of the time of these tests; the numbers do not depend on it. (A slow test of the contract checks
# that: it runs itself with this variable set, on the programs that users run.)
if "TEST_OPTIMISED" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    # An unknown flag ends the process, and later versions were not tried.
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background jobs of a shell; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of sharding

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


CHEAP = {  # options of methods that take many passes
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"steps": 2},
    "expected_gradients": {"samples": 2},
    "beyond_intuition": {"steps": 2},
    "rise": {"samples": 6},
    "shapley": {"pairs": 2},
    "mda": {"candidates": 3},
    "combination": {"methods": "gae,grad_cam"},
}


def mostly_slow(names, quick):
    """Values of `pytest.mark.parametrize`: those that are in `quick` by default, the others with the slow tests."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture
def compilations():
    """A list that gets an element for each program that is compiled."""
    found = []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture
def wrong_types(monkeypatch):
    """For tests of errors: wrong types reach the functions, whose annotations are not checked then."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


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


@pytest.fixture(scope="session")
def small():
    """(module, params, image): every array of the model is random and float64, biases and norms too."""
    from tokentm_jax.models.vit import ViT, init_params

    module = ViT(img_size=(4, 6), patch_size=2, embed_dim=8, depth=2, num_heads=2, num_classes=4)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, s: rng.normal(size=s.shape) * 0.4 + (path[-1].key == "scale"), shapes
    )
    return module, params, rng.normal(size=(4, 6, 3))


@pytest.fixture
def briefly(monkeypatch):
    """A refusal does not list what works without: it would trace every method, and `test_plain` has the lists."""
    monkeypatch.setattr("tokentm_jax.methods.explain.methods_for", lambda *_, **__: [])


def tiny_vit(depth):
    """A loaded model that compiles fast, for images of 16 x 24 pixels and 5 classes."""
    from tokentm_jax.inputs.images import HALF, Preprocessing
    from tokentm_jax.models.architectures import build
    from tokentm_jax.models.loading import Model
    from tokentm_jax.models.vit import init_params

    module = build(dict(img_size=[16, 24], patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=5))
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, init_params(module, jax.random.key(0)))
    return Model(module, params, Preprocessing((16, 24), 1.0, "bilinear", **HALF), None, "tiny")


def tiny_bert(**fields):
    """(module, params) of a random text model that compiles fast, with 30 word pieces and 3 classes."""
    from tokentm_jax.models.bert import Bert
    from tokentm_jax.models.vit import init_params

    module = Bert(30, 16, 16, 2, 2, 24, 3, mask_id=3, **fields)
    return module, jax.tree.map(lambda a: a * 8 if a.ndim > 1 else a + 0.1, init_params(module, jax.random.key(0)))


def batch(lengths, size):
    """Random texts; each depends only on its length."""
    import tokentm_jax as tm

    ids, types = np.zeros((2, len(lengths), size), np.int32)
    mask, special = np.zeros(ids.shape, bool), np.ones(ids.shape, bool)
    for row, length in enumerate(lengths):
        ids[row, :length] = np.random.default_rng(length).integers(5, 30, length)
        types[row, length // 2 : length] = 1
        mask[row, :length], special[row, 1 : length - 1] = True, False
    return tm.inputs.Tokens(ids, mask, types, special)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face Hub on the loopback (`hub.Hub`), which serves the folder `hub.folder` to the real client."""
    client = pytest.importorskip("huggingface_hub")
    from hub import Hub

    folder, cache = tmp_path / "served", tmp_path / "cache"
    folder.mkdir()
    server = Hub(folder)
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its attempts
    yield server
    server.stop()
    client.close_session()


@contextmanager
def opened(address, **context):
    """A page in a real browser, or a reason to skip. It must send nothing elsewhere, and complain of nothing."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    own = ("data:", "file:") if address.startswith("file:") else ("data:", "blob:", address)
    with api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = chromium.new_context(**context).new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(own) or complaints.append(r.url))
        page.goto(address)
        try:
            yield page
            assert complaints == []
        finally:
            chromium.close()
