"""Weights read from every layout agree with timm; damaged and hostile files end in one sentence."""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tokentm_jax.errors import InputError
from tokentm_jax.files import stored_size
from tokentm_jax.inputs.images import HALF, Preprocessing
from tokentm_jax.models import checkpoint
from tokentm_jax.models.architectures import build
from tokentm_jax.models.checkpoint import (
    read_checkpoint,
    read_description,
    read_tensors,
    write_checkpoint,
)
from tokentm_jax.models.params import to_params, to_timm

GOLDENS = Path(__file__).parent / "goldens"
KINDS = json.loads((GOLDENS / "kinds.json").read_text())
SMALL = Preprocessing((16, 16), 1.0, **HALF)


@pytest.fixture(scope="module")
def timm_logits():
    return dict(np.load(GOLDENS / "timm_logits.npz"))


@pytest.fixture(scope="module")
def plain():
    """(module, params) of the plain tiny model."""
    module = build(KINDS["plain"])
    return module, read_checkpoint(module, GOLDENS / "plain.safetensors")


def logits_of(module, params, images):
    return np.asarray(jax.jit(module.apply)({"params": params}, images))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    return True


# ---- agreement with timm -------------------------------------------------------------------------------------------


OTHERS = ("plain@24x16", "plain@8x12", "distilled@20x28", "registers@8x16", "google", "big_vision")
POOLED = {**KINDS["plain"], "global_pool": "map", "class_token": False}


@pytest.mark.parametrize("case", [*KINDS, *OTHERS])
def test_logits_are_timms(case, timm_logits):
    kind, _, size = case.partition("@")
    file = GOLDENS / (f"{kind}.npz" if kind in ("google", "big_vision") else f"{kind}.safetensors")
    img_size = tuple(map(int, size.split("x"))) if size else None
    module = build({**KINDS, "big_vision": POOLED}.get(kind, KINDS["plain"]), img_size=img_size)
    logits = logits_of(module, read_checkpoint(module, file), timm_logits[f"{case}/images"])
    expected = timm_logits[f"{case}/logits"]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_reference_logits(random_vit):
    module, params, arrays = random_vit
    np.testing.assert_allclose(logits_of(module, params, arrays["images"]), arrays["logits"], atol=1e-5)


# ---- writing and reading back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_timm_names_round_trip(kind):
    module = build(KINDS[kind])
    written = read_tensors(GOLDENS / f"{kind}.safetensors")  # timm's names of today, and those of Eva as these
    ours = to_timm(read_checkpoint(module, GOLDENS / f"{kind}.safetensors"))
    assert ours.keys() == written.keys()
    assert equal(ours, written)


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_self_describing_round_trip(name, plain, tmp_path):
    module, params = plain
    for _ in range(2):  # the second time over the first
        path = write_checkpoint(tmp_path / name, module, params, SMALL, list("abcde"), {"top_1": 0.5})
    description = read_description(path)
    assert description is not None
    assert build(description["architecture"]) == module
    assert Preprocessing.from_dict(description["preprocessing"]) == SMALL
    assert (description["class_names"], description["top_1"]) == (list("abcde"), 0.5)
    assert equal(read_checkpoint(module, path), params)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_orbax_folder_is_checked_against_the_model(plain, tmp_path):
    path = write_checkpoint(tmp_path / "model", *plain, SMALL)
    with pytest.raises(InputError, match=r"wrong shape: head\.bias \[5\] instead of \[6\], head\.weight"):
        read_checkpoint(build(KINDS["plain"], num_classes=6), path)


def test_description_states_the_grid(tmp_path):
    """Positions of a 2 x 8 grid are 16 = 4 x 4: without the description they would be resampled from a square."""
    module = build(KINDS["plain"], img_size=(8, 32))
    params = to_params(module, read_tensors(GOLDENS / "plain.safetensors"), "plain", old_grid=(2, 8))
    path = write_checkpoint(tmp_path / "wide.safetensors", module, params, Preprocessing((8, 32), **HALF))
    assert equal(read_checkpoint(module, path), params)
    other = read_checkpoint(build(KINDS["plain"], img_size=(32, 8)), path)
    assert not np.array_equal(other["pos_embed"], params["pos_embed"])


def test_failed_write_leaves_the_old_file(plain, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "model.safetensors", *plain, SMALL)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be written: disk full"):
        write_checkpoint(path, *plain, SMALL, list("abcde"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_write_refuses(plain, tmp_path):
    with pytest.raises(InputError, match="3 class names for 5 classes"):
        write_checkpoint(tmp_path / "model.safetensors", *plain, SMALL, list("abc"))
    with pytest.raises(InputError, match=r"NAME\.safetensors"):
        write_checkpoint(tmp_path / "model.pth", *plain, SMALL)
    with pytest.raises(InputError, match="params does not fit"):
        write_checkpoint(tmp_path / "model", build(KINDS["distilled"]), plain[1], SMALL)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match="was not written by this program"):
        write_checkpoint(tmp_path / "photos", *plain, SMALL)
    assert (tmp_path / "photos/cat.jpg").exists()


def test_other_checkpoints_have_no_description():
    assert read_description(GOLDENS / "plain.safetensors") is None
    assert read_description(GOLDENS / "google.npz") is None


# ---- other layouts --------------------------------------------------------------------------------------------------


def save(path, tensors, metadata=None):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types(dtype, plain, tmp_path):
    module, params = plain
    if dtype is ml_dtypes.bfloat16:  # written by hand: older safetensors cannot write it from numpy
        header, data = {}, b""
        for name, tensor in to_timm(params).items():
            raw = tensor.astype(dtype).tobytes()
            header[name] = {
                "dtype": "BF16", "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(raw)]
            }  # fmt: skip
            data += raw
        text = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    else:
        path = save(tmp_path / "model.safetensors", {k: v.astype(dtype) for k, v in to_timm(params).items()})
    read = read_checkpoint(module, path)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), read, params)


def test_names_of_older_releases(tmp_path, timm_logits):
    """DeiT-3 named layer scale gamma_1, DINOv2 its registers register_tokens, with a position for the class token."""
    tensors = safetensors.numpy.load_file(GOLDENS / "registers.safetensors")
    old = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in tensors.items()}
    old["register_tokens"] = old.pop("reg_token")
    position = np.full((1, 1, 24), 0.5, np.float32)
    old["cls_token"] = old["cls_token"] - position
    old["pos_embed"] = np.concatenate([position, old["pos_embed"]], 1)
    old["mask_token"] = np.zeros((1, 24), np.float32)
    module = build(KINDS["registers"])
    params = read_checkpoint(module, save(tmp_path / "old.safetensors", old))
    logits = logits_of(module, params, timm_logits["registers/images"])
    np.testing.assert_allclose(logits, timm_logits["registers/logits"], atol=1e-5)


def test_a_layer_before_the_classifier(plain, tmp_path):
    """ImageNet-21k's first releases have pre_logits and a classifier of zeros, which says nothing either way."""
    module, params = plain
    extra = {"pre_logits.fc.weight": np.eye(24, dtype=np.float32), "pre_logits.fc.bias": np.zeros(24, np.float32)}
    read = save(tmp_path / "read.safetensors", to_timm(params) | extra)
    with pytest.raises(InputError, match="its classifier reads the layer pre_logits, which is not supported"):
        read_checkpoint(module, read)
    assert "head" not in read_checkpoint(module, read, reset_head=True)
    silent = {name: t * 0 if name.startswith("head.") else t for name, t in to_timm(params).items()}
    assert not read_checkpoint(module, save(tmp_path / "zero.safetensors", silent | extra))["head"]["kernel"].any()


def test_reset_head(plain, tmp_path):
    module, params = plain
    body = read_checkpoint(build(KINDS["plain"], num_classes=77), GOLDENS / "plain.safetensors", reset_head=True)
    assert equal(body, {name: value for name, value in params.items() if name != "head"})
    headless = {name: t for name, t in to_timm(params).items() if not name.startswith("head.")}
    assert "head" not in read_checkpoint(module, save(tmp_path / "body.safetensors", headless), reset_head=True)


def test_everything_wrong_is_listed_once(plain, tmp_path):
    tensors = to_timm(plain[1])
    del tensors["cls_token"], tensors["blocks.0.norm1.weight"], tensors["blocks.1.norm1.weight"]
    tensors["head.bias"] = tensors["head.bias"][:3]
    tensors["norm.bias"] = tensors["norm.bias"].astype(np.int32)
    tensors["rope"] = np.ones(2, np.float32)
    with pytest.raises(InputError) as caught:
        read_checkpoint(plain[0], save(tmp_path / "model.safetensors", tensors))
    for words in (
        "(missing: ",
        "cls_token",
        "blocks.*.norm1.weight (2 times)",
        "head.bias [3] instead of [5]",
        "norm.bias int32",
        "unexpected: rope",
        "model.safetensors does not fit",
    ):
        assert words in str(caught.value)


def test_wrong_model_for_the_checkpoint():
    with pytest.raises(InputError, match="missing: dist_token"):
        read_checkpoint(build(KINDS["distilled"]), GOLDENS / "plain.safetensors")
    with pytest.raises(InputError, match=r"blocks\.2\.attn"):
        read_checkpoint(build({**KINDS["plain"], "depth": 3}), GOLDENS / "plain.safetensors")
    with pytest.raises(InputError, match=r"wrong shape: patch_embed\.proj\.weight"):
        read_checkpoint(build({**KINDS["plain"], "patch_size": 8}), GOLDENS / "plain.safetensors")
    with pytest.raises(InputError, match="set fc_norm=False"):
        read_checkpoint(build({**KINDS["plain"], "global_pool": "avg"}), GOLDENS / "plain.safetensors")


def test_values_that_are_not_numbers(plain, tmp_path):
    tensors = to_timm(plain[1])
    tensors["head.bias"] = np.full(5, np.nan, np.float32)
    with pytest.raises(InputError, match=r"'head\.bias' has values that are not finite"):
        read_checkpoint(plain[0], save(tmp_path / "model.safetensors", tensors))


# ---- damaged and hostile files --------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def header_only(length, text=b"{}"):
    return struct.pack("<Q", length) + text


def npz(descr, shape):
    """An archive of one array that is only a header."""
    member, packed = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("embedding/kernel.npy", member.getvalue())
    return packed.getvalue()


def damaged_files():
    deep = header_only(10**6 + 5, b'{"a":' + b"[" * 10**6)
    whole = (GOLDENS / "plain.safetensors").read_bytes()
    zipped = (GOLDENS / "google.npz").read_bytes()
    overlap = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]}}).encode()
    float8 = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return {
        "empty.safetensors": (b"", "is empty"),
        "cut.safetensors": (whole[:-100], "damaged or incomplete"),
        "cut_header.safetensors": (whole[:50], "damaged or incomplete"),
        "five_bytes.safetensors": (whole[:5], "damaged or incomplete"),
        "huge_header.safetensors": (header_only(2**62), "damaged or incomplete"),
        "long_header.safetensors": (header_only(90_000_000), "damaged or incomplete"),
        "lying_shape.safetensors": (header_only(len(overlap), overlap) + b"12345678", "damaged or incomplete"),
        "float8.safetensors": (header_only(len(float8), float8) + b"1", "damaged or incomplete|does not fit"),
        "no_tensors.safetensors": (header_only(2), "does not fit"),
        "page.safetensors": (b"<!DOCTYPE html><html>", "damaged or incomplete"),
        "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\n", "is not a checkpoint"),
        "cut.npz": (zipped[: len(zipped) // 2], "damaged or incomplete"),
        "flipped.npz": (zipped[:5000] + bytes(2000) + zipped[7000:], "damaged or incomplete|not a checkpoint"),
        "deep.safetensors": (deep, "damaged or incomplete"),
        "twice.safetensors": (whole.replace(b'"norm.bias"', b'"head.bias"'), "damaged or incomplete"),
        "long.npz": (npz("<f4", (10**12,)), "damaged or incomplete .*shorter than its header states"),
        "longer.npz": (npz("<f4", (0, 10**30)), "not a checkpoint|damaged"),
        "empty_type.npz": (npz("|S0", (10**12,)), "refused as unsafe"),
        "negative.npz": (npz("<f4", (-1,)), "damaged or incomplete"),
        "structure.npz": (npz([("a", "<f4")], (1,)), "does not fit|damaged or incomplete"),
        "photo.pth": (b"\xff\xd8\xff\xe0 JFIF", "is not a checkpoint"),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_file_is_named(name, plain, tmp_path):
    content, words = damaged_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_checkpoint(plain[0], path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos_embed": (2, 17, 24)}, r"pos_embed \[2, 17, 24\] instead of \[1, 17, 24\]"),
        ({"pos_embed": (1, 5, 20)}, r"pos_embed \[1, 5, 20\] instead of"),
        ({"pos_embed": (1,)}, r"pos_embed \[1\] instead of"),
        ({"head.bias": (0,)}, r"head\.bias \[0\] instead of \[5\]"),
        ({"register_tokens": (1, 4, 24), "pos_embed": (3,)}, r"unexpected: register_tokens"),
        ({"register_tokens": (1, 4, 24), "cls_token": (1, 1, 3)}, r"unexpected: register_tokens"),
    ],
)
def test_other_shapes_are_named(changes, words, plain, tmp_path):
    tensors = {**to_timm(plain[1]), **{name: np.zeros(shape, np.float32) for name, shape in changes.items()}}
    with pytest.raises(InputError, match=words):
        read_checkpoint(plain[0], save(tmp_path / "model.safetensors", tensors))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BOOL", "I64", "C64"])
def test_other_types_are_named(dtype, plain, tmp_path):
    """Those that are no floating-point numbers, and those that NumPy lacks; float8 is read where it knows it."""
    path = save(tmp_path / "model.safetensors", {**to_timm(plain[1]), "head.bias": np.zeros(5, np.float32)})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    size = {"F8_E4M3": 1, "BOOL": 1, "I64": 8, "C64": 8}[dtype]
    end = max(entry["data_offsets"][1] for entry in header.values())
    header["mask_of_own"] = {"dtype": dtype, "shape": [5], "data_offsets": [end, end + 5 * size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + bytes(5 * size))
    with pytest.raises(InputError, match=r"model\.safetensors (is damaged|does not fit)"):
        read_checkpoint(plain[0], path)


def test_values_beyond_float32(plain, tmp_path):
    tensors = to_timm(plain[1]) | {"head.bias": np.full(5, 1e300)}
    with pytest.raises(InputError, match=r"'head\.bias' has values that are not finite"):
        read_checkpoint(plain[0], save(tmp_path / "model.safetensors", tensors))


def test_a_file_that_is_mostly_a_hole(plain, tmp_path):
    """Of 10 GB that take no room on the disk, nothing is read: a limit of memory would else end the process."""
    path, name = tmp_path / "model.safetensors", "blocks.0.mlp.fc1.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [2500, 10**6], "data_offsets": [0, 10**10]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 10**10)
    with open(path, "rb") as file:
        if stored_size(file) > 10**9:
            pytest.skip("this file system has no holes, or does not tell")
    with pytest.raises(InputError, match=r"model\.safetensors unpacks to 10\.0 GB and is refused as unsafe"):
        read_checkpoint(plain[0], path)


def test_more_than_the_memory(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    with pytest.raises(InputError, match="more than the memory"):
        read_tensors(GOLDENS / "plain.safetensors")


def test_missing_file_and_wrong_folder(plain, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_checkpoint(plain[0], tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"without description\.json"):
        read_checkpoint(plain[0], tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="is not a regular file"):
        read_checkpoint(plain[0], tmp_path / "pipe.safetensors")


def test_damaged_orbax_folder(plain, tmp_path):
    path = write_checkpoint(tmp_path / "model", *plain, SMALL)
    for file in (path / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="damaged or incomplete"):
        read_checkpoint(plain[0], path)


ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"head": [ONES]}, "'head' is not a parameter of a ViT"),
        ([ONES], "damaged or incomplete"),
        ({"head": {"bias": None}, "x": ONES}, r"'head\.bias' is not a parameter of a ViT"),
        ({"head": {"bias": "text"}, "x": ONES}, r"'head\.bias' is not a parameter of a ViT"),
        ({"head": {"bias": ONES.astype(np.int32)}}, r"'head\.bias' is not a parameter of a ViT"),
        ({"blocks": {"a": np.float32(1) + np.zeros((), np.float32)}}, r"'blocks\.a' is not a parameter of a ViT"),
        ({"blocks": {"a": np.ones((1000, 1), np.float32)}}, r"'blocks\.a' is not a parameter of a ViT"),
        ({"patch_embed": {"kernel": ONES}}, "damaged or incomplete"),
        ({"a": {"b": {"c": {"d": {"e": ONES}}}}}, r"unexpected: a\.b\.c\.d\.e"),
        ({"head": {"kernel": np.zeros((4000, 4000), np.float32)}}, "refused as unsafe"),
    ],
)
def test_orbax_trees_of_other_shapes(tree, words, plain, tmp_path):
    import orbax.checkpoint as ocp

    path = write_checkpoint(tmp_path / "model", *plain, SMALL)
    shutil.rmtree(path / "params")
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(path / "params", tree)
    with pytest.raises(InputError, match=words):
        read_checkpoint(plain[0], path)


def test_pipes_and_files_of_others_in_an_orbax_folder(plain, tmp_path):
    path = write_checkpoint(tmp_path / "model", *plain, SMALL)
    (path / "params/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="was not written by this program"):
        write_checkpoint(path, *plain, SMALL)
    assert (path / "params/notes.txt").read_text() == "mine"
    for name, words in (("params/_METADATA", "is not a regular file"), ("description.json", "without description")):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(InputError, match=words):
            read_checkpoint(plain[0], path)


# TensorStore's threads come too late to a loop that has ended with the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_a_full_disk(name, plain, tmp_path):
    """The limit of a file's size stands in for it. What was there stays, nothing half-written is left."""
    resource = pytest.importorskip("resource")
    path = write_checkpoint(tmp_path / name, *plain, SMALL)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=rf"{name} cannot be written: File too large$"):
            write_checkpoint(path, *plain, SMALL, list("abcde"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert equal(read_checkpoint(plain[0], path), plain[1])


def test_npz_with_objects_runs_nothing(plain, tmp_path):
    array = np.empty(1, object)
    array[0] = Malicious(tmp_path / "ran")
    np.savez(tmp_path / "model.npz", **{"embedding/kernel": array})
    with pytest.raises(InputError, match="Python objects"):
        read_checkpoint(plain[0], tmp_path / "model.npz")
    assert not (tmp_path / "ran").exists()


def test_npz_bomb(plain, tmp_path):
    np.savez_compressed(tmp_path / "model.npz", **{"embedding/kernel": np.zeros(10**7, np.int8)})
    with pytest.raises(InputError, match="refused as unsafe"):
        read_checkpoint(plain[0], tmp_path / "model.npz")


def test_npz_of_something_else(plain, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones(3))
    with pytest.raises(InputError, match="not a checkpoint"):
        read_checkpoint(plain[0], tmp_path / "data.npz")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.jpg", b"cat")
    with pytest.raises(InputError, match="not a checkpoint"):
        read_checkpoint(plain[0], tmp_path / "photos.zip")


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "npz"])
def test_pickle_runs_nothing(suffix, plain, tmp_path):
    """Neither with torch nor without it."""
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps({"head.bias": Malicious(tmp_path / "ran")}, protocol=2))
    with pytest.raises(InputError, match=rf"model\.{suffix}"):
        read_checkpoint(plain[0], path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("description", ["[", "[]", "{}", '{"architecture": {"depth": 1e9}, "preprocessing": {}}'])
def test_bad_description_is_refused(description, plain, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(to_timm(plain[1]), path, {checkpoint.MARK: description})
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_description(path)


# ---- PyTorch files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"model": t, "epoch": 3}, lambda t: {"state_dict": t}])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(wrap, legacy, plain, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.from_numpy(t) for name, t in to_timm(plain[1]).items()}
    path = tmp_path / "model.pth"
    torch.save(wrap(tensors), path, _use_new_zipfile_serialization=not legacy)
    assert equal(read_checkpoint(plain[0], path), plain[1])
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"model\.pth"):
        read_checkpoint(plain[0], path)


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "_orig_mod.module."])
def test_wrappers_of_training_code_are_left_out(prefix, plain, tmp_path):
    """Of all names or, as with a head of the own beside a backbone, of some; but not where two become one."""
    tensors = to_timm(plain[1])
    for some in (lambda name: True, lambda name: not name.startswith("head.")):
        wrapped = {prefix + name if some(name) else name: tensor for name, tensor in tensors.items()}
        assert equal(read_checkpoint(plain[0], save(tmp_path / "model.safetensors", wrapped)), plain[1])
    wrapped["norm.bias"] = tensors["norm.bias"] + 1
    with pytest.raises(InputError, match=r"model\.safetensors holds 'norm\.bias' twice, as '.*norm\.bias' and as '"):
        read_checkpoint(plain[0], save(tmp_path / "model.safetensors", wrapped))


def test_a_checkpoint_of_timms_training_script(plain, tmp_path):
    """Its arguments are a Namespace; with averaged weights beside the last ones, these are taken, as timm does."""
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(t) for name, t in to_timm(plain[1]).items()}
    other = {name: t + 1 for name, t in tensors.items()}
    args = argparse.Namespace(model="vit_tiny_patch16_224", lr=0.1, data=["a"], nested=argparse.Namespace(x=None))
    made = {"epoch": 3, "arch": "vit", "optimizer": {"state": {}}, "version": 2, "args": args, "metric": 71.5}
    path = tmp_path / "last.pth.tar"
    for held in ({"state_dict": other, "state_dict_ema": tensors}, {"state_dict": tensors}, {"model": tensors}):
        torch.save({**made, **held}, path)
        assert equal(read_checkpoint(plain[0], path), plain[1])
    args.model = Malicious(tmp_path / "ran")
    torch.save({**made, "state_dict": tensors}, path)
    with pytest.raises(InputError, match="refused as unsafe"):
        read_checkpoint(plain[0], path)
    assert not (tmp_path / "ran").exists()


def test_a_torch_file_that_holds_itself(plain, tmp_path):
    torch = pytest.importorskip("torch")
    content = {"x": torch.zeros(1)}
    content["model"] = content["state_dict"] = content
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(InputError, match="does not fit the model"):
        read_checkpoint(plain[0], tmp_path / "model.pth")


def test_a_torch_file_with_a_name_and_the_same_in_a_wrapper(plain, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(t) for name, t in to_timm(plain[1]).items()}
    torch.save({**tensors, "module.head.bias": tensors["head.bias"] + 1}, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"holds 'head\.bias' twice, as 'head\.bias' and as 'module\.head\.bias'"):
        read_checkpoint(plain[0], tmp_path / "model.pth")


def test_malicious_torch_file_runs_nothing(plain, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save({"model": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(InputError, match="refused as unsafe"):
        read_checkpoint(plain[0], path)
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="dictionary of tensors"):
        read_checkpoint(plain[0], path)


def test_torch_tensors_of_all_kinds(plain, tmp_path):
    """Those that are views of few numbers, or none at all, among them."""
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(t) for name, t in to_timm(plain[1]).items()}
    path = tmp_path / "model.pth"
    for bias, words in (
        (torch.zeros(5).to_sparse(), "is not a plain tensor"),
        (torch.zeros(5, device="meta"), "is not a plain tensor"),
        (torch.zeros(1).expand(10**11), "refused as unsafe"),
        (torch.zeros(5, dtype=torch.complex64).conj(), "complex64 instead of floating-point"),
        (torch.zeros(5, dtype=torch.int64), "int64 instead of floating-point"),
        (torch.tensor(1.0), r"head\.bias \[\] instead of"),
    ):
        torch.save({**tensors, "head.bias": bias}, path)
        with pytest.raises(InputError, match=words):
            read_checkpoint(plain[0], path)
    torch.save({**tensors, "head.bias": torch.nn.Parameter(torch.zeros(5, dtype=torch.complex64).conj().imag)}, path)
    assert not read_checkpoint(plain[0], path)["head"]["bias"].any()


def test_damaged_torch_files(plain, tmp_path):
    torch = pytest.importorskip("torch")
    path, draw = tmp_path / "model.pth", random.Random(0)
    for legacy in (False, True):
        tensors = {name: torch.from_numpy(t) for name, t in to_timm(plain[1]).items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for _ in range(50):
            content = bytearray(whole)
            for _ in range(4):
                content[draw.randrange(6000)] = draw.randrange(256)
            path.write_bytes(content[: draw.choice((len(whole), draw.randrange(len(whole))))])
            with contextlib.suppress(InputError):
                read_checkpoint(plain[0], path)


def test_without_torch_the_extra_is_named(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match=r"tokentm-jax\[torch\]"):
        read_checkpoint(plain[0], path)


def test_constant_positions_stay_constant():
    """A constant grid of positions stays constant at every size, also at the borders."""
    module = build(KINDS["plain"], img_size=(28, 12))
    tensors = read_tensors(GOLDENS / "plain.safetensors")
    tensors["pos_embed"] = np.full_like(tensors["pos_embed"], 0.25)
    params = to_params(module, tensors, "tensors")
    np.testing.assert_allclose(params["pos_embed"], np.full((1, 22, 24), 0.25), atol=1e-6)
    assert jnp.asarray(params["pos_embed"]).dtype == jnp.float32


def test_a_safetensors_header_may_begin_like_a_pickle(plain, tmp_path):
    """Its length is what comes first; 0x80 is also how a pickle begins."""
    tensors = to_timm(plain[1])
    for pad in range(0, 300):
        path = save(tmp_path / "model.safetensors", tensors, {"pad": "x" * pad})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header length of the wanted kind")
    path = path.rename(tmp_path / "model.bin")  # the name says nothing
    jax.tree.map(np.testing.assert_array_equal, read_checkpoint(plain[0], path), plain[1])
