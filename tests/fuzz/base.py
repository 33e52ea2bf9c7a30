"""What all cases start from, made once: `python -m fuzz.base FOLDER`."""

import io
import os
import sys
import zipfile
from pathlib import Path

import h5py
import jax
import numpy as np
import safetensors.numpy
from PIL import Image

NAMES = ("ant", "bee", "cat", "dog", "eel")
OPTIONS = dict(img_size=[16, 24], patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5)
EVALUATE = """
from tokentm_jax import EvaluateConfig
from tokentm_jax.configs import rows
config = EvaluateConfig("tiny", "perturbation", "data", rows("tokentm", "rollout"), batch_size=2, checkpoint={!r})
"""
TRAIN = f"""
from models.training.recipe import TrainConfig
config = TrainConfig(name="tiny", train_data="data", test_data="data", model={OPTIONS!r}, epochs=1, warmup_epochs=0.5,
                     batch_size=5)
"""


def png(seed: int, size: tuple[int, int] = (16, 24)) -> bytes:
    """A random photo of (height, width) pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_mat(path: Path) -> None:
    """Laid out like gtsegs_ijcv.mat."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for name in ("img", "gt"):
            table = file.create_dataset(f"value/{name}", (3, 1), h5py.ref_dtype)
            for i in range(3):
                if name == "img":
                    stored = file.create_dataset(f"refs/img{i}", data=rng.integers(0, 256, (3, 24, 16), np.uint8))
                else:
                    mask = file.create_dataset(f"refs/mask{i}", data=rng.integers(0, 2, (24, 16), np.uint8))
                    stored = file.create_dataset(f"refs/gt{i}", (1, 1), h5py.ref_dtype)
                    stored[0, 0] = mask.ref
                table[i, 0] = stored.ref


def google(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's names -> those of Google's releases, for the tiny model."""
    heads, d = 2, 16
    arrays = {
        "embedding/kernel": tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": tensors["patch_embed.proj.bias"],
        "cls": tensors["cls_token"],
        "Transformer/posembed_input/pos_embedding": tensors["pos_embed"],
        "head/kernel": tensors["head.weight"].T,
        "head/bias": tensors["head.bias"],
    }
    block = "Transformer/encoderblock_0/"
    for ours, theirs in (("norm", "Transformer/encoder_norm"), ("blocks.0.norm1", block + "LayerNorm_0")):
        arrays |= {f"{theirs}/scale": tensors[f"{ours}.weight"], f"{theirs}/bias": tensors[f"{ours}.bias"]}
    arrays |= {f"{block}LayerNorm_2/scale": tensors["blocks.0.norm2.weight"]}
    arrays |= {f"{block}LayerNorm_2/bias": tensors["blocks.0.norm2.bias"]}
    attention = f"{block}MultiHeadDotProductAttention_1/"
    for i, name in enumerate(("query", "key", "value")):
        rows = slice(i * d, (i + 1) * d)
        kernel = tensors["blocks.0.attn.qkv.weight"][rows].T
        arrays[f"{attention}{name}/kernel"] = kernel.reshape(d, heads, d // heads)
        arrays[f"{attention}{name}/bias"] = tensors["blocks.0.attn.qkv.bias"][rows].reshape(heads, d // heads)
    arrays[f"{attention}out/kernel"] = tensors["blocks.0.attn.proj.weight"].T.reshape(heads, d // heads, d)
    arrays[f"{attention}out/bias"] = tensors["blocks.0.attn.proj.bias"]
    for i in (0, 1):
        arrays[f"{block}MlpBlock_3/Dense_{i}/kernel"] = tensors[f"blocks.0.mlp.fc{i + 1}.weight"].T
        arrays[f"{block}MlpBlock_3/Dense_{i}/bias"] = tensors[f"blocks.0.mlp.fc{i + 1}.bias"]
    return arrays


def tokentm(*arguments: str) -> None:
    from click.testing import CliRunner
    from everything import everything

    result = CliRunner().invoke(everything, arguments)
    assert result.exit_code == 0, result.output


def make(out: Path) -> None:
    import tokentm_jax as tm

    out.mkdir(parents=True)
    os.chdir(out)
    module = tm.models.build(OPTIONS)
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, tm.models.init_params(module, jax.random.key(0)))
    preprocessing = tm.inputs.Preprocessing((16, 24), 1.0, "bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for name in ("tiny.safetensors", "orbax"):
        tm.models.write_checkpoint(name, module, params, preprocessing, NAMES)
    np.savez("google.npz", **google(safetensors.numpy.load_file("tiny.safetensors")))
    (out / "photo.png").write_bytes(png(0))
    with zipfile.ZipFile("classes.zip", "w") as archive:
        for i in range(10):
            file = out / "data" / NAMES[i % 5] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(i))
            archive.writestr(f"{NAMES[i % 5]}/{i}.png", png(i))
    write_mat(out / "seg.mat")
    checkpoint = str(out / "tiny.safetensors")
    (out / "evaluate.py").write_text(EVALUATE.format(checkpoint))
    (out / "train.py").write_text(TRAIN)
    sizes = ("--batch-size", "2", "--shard-size", "4")
    tokentm("dataset", "data", "--out", "store", "--checkpoint", checkpoint, "--methods", "tokentm,rollout", *sizes)
    tokentm("evaluate", "evaluate.py", "--out", "run")
    tokentm("train", "train.py", "--out", "trained")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
