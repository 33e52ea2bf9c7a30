"""Make the files of this folder with timm, the reference for what a model computes.

    python tests/goldens/make_timm_goldens.py          (torch 2.13.0, timm 1.0.31; the project itself is not needed)
    python tests/goldens/make_timm_goldens.py table    only architectures.json, here and in the package

architectures.json    per table name: parameter count with 1000 classes, and [height, crop_pct, interpolation, mean,
                      std, crop_mode, repository on the hub or null] of every set of weights that timm knows under it
                      (by tag; the default one is the first)
KIND.safetensors      random weights of a tiny model of each kind
google.npz            random weights in the layout of Google's ViT releases
big_vision.npz        random weights of an attention-pooled model in the layout of big_vision, blocks stacked
tokentm_jax/models/architectures.json    per table name: the options of its module, the parameter count,
                      and per tag the preprocessing and the repository of the weights (the default ones first)
timm_logits.npz       KIND/images [2, H, W, 3] normalised, KIND/logits [2, 5]; KIND@HxW: the same weights at
                      another resolution, positions resampled by timm
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

# timm imports torchvision, whose compiled operators are missing in an installation for the CPU only.
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")

import timm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.layers import SwiGLUPacked  # noqa: E402
from timm.models import deit, eva, vision_transformer  # noqa: E402

HERE = Path(__file__).parent
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
KINDS = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "pooled": {"global_pool": "avg", "class_token": False, "qkv_bias": False, "mlp_ratio": 2.5},
    "pooled_prefix": {"global_pool": "avg", "fc_norm": False, "reg_tokens": 1, "init_values": 0.1},
    "pre_norm": {"pre_norm": True, "norm_eps": 1e-5, "activation": "quick_gelu"},
}
# Made after the others, each from a seed of its own.
LATER = {
    "map": {"global_pool": "map", "class_token": False, "reg_tokens": 1, "activation": "gelu_tanh"},
    "features": {"num_classes": 0, "mlp_layer": "swiglu_packed", "mlp_ratio": 1.5, "init_values": 0.1},
    "qk_norm": {"qk_norm": True, "final_norm": False, "pos_embed": "none"},
    "eva02": {"global_pool": "avg", "k_bias": False, "mlp_ratio": 2, "mlp_layer": "swiglu_packed", "rope_type": "cat",
              "ref_feat_shape": [3, 3]},
    "eva02_scaled": {"global_pool": "avg", "k_bias": False, "mlp_ratio": 2, "mlp_layer": "swiglu",
                     "scale_mlp_norm": True, "rope_type": "cat", "ref_feat_shape": [4, 4]},
    "dinov3": {"k_bias": False, "init_values": 0.1, "reg_tokens": 2, "pos_embed": "none", "rope_type": "dinov3",
               "rope_temperature": 100.0, "fc_norm": False, "norm_eps": 1e-5},
}  # fmt: skip
RESIZED = {"plain": [(24, 16), (8, 12)], "distilled": [(20, 28)], "registers": [(8, 16)]}


def make(options: dict) -> torch.nn.Module:
    """timm's model for our options."""
    options = {**TINY, **options}
    if "k_bias" in options:
        return make_eva(options)
    if options.get("mlp_layer") == "swiglu_packed":  # whose ratio counts gate and value
        options |= {"mlp_layer": SwiGLUPacked, "mlp_ratio": 2 * options["mlp_ratio"], "act_layer": torch.nn.SiLU}
    kind = deit.VisionTransformerDistilled if options.pop("distilled", False) else vision_transformer.VisionTransformer
    if "norm_eps" in options:
        options["norm_layer"] = partial(torch.nn.LayerNorm, eps=options.pop("norm_eps"))
    if "activation" in options:
        options["act_layer"] = options.pop("activation")
    return kind(**options).eval()


def make_eva(options: dict) -> torch.nn.Module:
    """timm's Eva for our options."""
    layer, rope = options.pop("mlp_layer", "mlp"), options.pop("rope_type")
    del options["k_bias"]
    ours = {"scale_mlp_norm": "scale_mlp", "reg_tokens": "num_reg_tokens", "fc_norm": "use_fc_norm"}
    options = {ours.get(name, name): value for name, value in options.items()}
    if "norm_eps" in options:
        options["norm_layer"] = partial(torch.nn.LayerNorm, eps=options.pop("norm_eps"))
    options |= {"use_abs_pos_emb": options.pop("pos_embed", "learn") == "learn", "use_rot_pos_emb": True}
    options |= {"rope_type": rope, "rope_rotate_half": rope == "dinov3", "swiglu_mlp": layer != "mlp"}
    return eva.Eva(**{"global_pool": "token", **options, "qkv_fused": layer != "swiglu"}).eval()


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """No parameter may be at a value (0, 1) that hides a mistake."""
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("norm1.weight") or name.endswith("norm2.weight") or "gamma" in name else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = centre + (0.2 if parameter.ndim > 1 else 0.3) * noise


def google_layout(weights: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """timm's names -> those of Google's releases (by hand, as an inverse of what readers do)."""
    out = {
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    d = weights["cls_token"].shape[-1]
    for i in range(TINY["depth"]):
        block, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for theirs, norm in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            out[f"{block}/{theirs}/scale"] = weights[f"{ours}.{norm}.weight"]
            out[f"{block}/{theirs}/bias"] = weights[f"{ours}.{norm}.bias"]
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * d, (j + 1) * d)
            out[f"{attention}/{part}/kernel"] = weights[f"{ours}.attn.qkv.weight"][rows].T.reshape(d, heads, -1)
            out[f"{attention}/{part}/bias"] = weights[f"{ours}.attn.qkv.bias"][rows].reshape(heads, -1)
        out[f"{attention}/out/kernel"] = weights[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, d)
        out[f"{attention}/out/bias"] = weights[f"{ours}.attn.proj.bias"]
        for j in (0, 1):
            out[f"{block}/MlpBlock_3/Dense_{j}/kernel"] = weights[f"{ours}.mlp.fc{j + 1}.weight"].T
            out[f"{block}/MlpBlock_3/Dense_{j}/bias"] = weights[f"{ours}.mlp.fc{j + 1}.bias"]
    return out


def big_vision_layout(weights: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """timm's names of an attention-pooled model -> those of big_vision, blocks stacked."""
    d = weights["pos_embed"].shape[-1]
    split = lambda a, i: a[i * d : (i + 1) * d]  # noqa: E731
    into = lambda w: w.T.reshape(d, heads, -1)  # noqa: E731

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def attention(parts: list[tuple[np.ndarray, np.ndarray]], out: str) -> dict[str, np.ndarray]:
        found = {}
        for part, (weight, bias) in zip(("query", "key", "value"), parts, strict=True):
            found |= {f"{part}/kernel": into(weight), f"{part}/bias": bias.reshape(heads, -1)}
        proj = dense(out)
        return found | {"out/kernel": proj["kernel"].reshape(heads, -1, d), "out/bias": proj["bias"]}

    def block(i: int) -> dict[str, np.ndarray]:
        own = f"blocks.{i}"
        qkv = [tuple(split(weights[f"{own}.attn.qkv.{leaf}"], k) for leaf in ("weight", "bias")) for k in range(3)]
        groups = {
            "LayerNorm_0": norm(f"{own}.norm1"),
            "LayerNorm_1": norm(f"{own}.norm2"),
            "MlpBlock_0/Dense_0": dense(f"{own}.mlp.fc1"),
            "MlpBlock_0/Dense_1": dense(f"{own}.mlp.fc2"),
            "MultiHeadDotProductAttention_0": attention(qkv, f"{own}.attn.proj"),
        }
        return {f"{group}/{name}": value for group, found in groups.items() for name, value in found.items()}

    pool = [(weights["attn_pool.q.weight"], weights["attn_pool.q.bias"])]
    pool += [tuple(split(weights[f"attn_pool.kv.{leaf}"], k) for leaf in ("weight", "bias")) for k in range(2)]
    groups = {
        "embedding": {
            "kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": weights["patch_embed.proj.bias"],
        },
        "Transformer/encoder_norm": norm("norm"),
        "MAPHead_0/MultiHeadDotProductAttention_0": attention(pool, "attn_pool.proj"),
        "MAPHead_0/LayerNorm_0": norm("attn_pool.norm"),
        "MAPHead_0/MlpBlock_0/Dense_0": dense("attn_pool.mlp.fc1"),
        "MAPHead_0/MlpBlock_0/Dense_1": dense("attn_pool.mlp.fc2"),
        "head": dense("head"),
    }
    flat = {f"{group}/{name}": value for group, found in groups.items() for name, value in found.items()}
    flat |= {"pos_embedding": weights["pos_embed"], "MAPHead_0/probe": weights["attn_pool.latent"]}
    blocks = [block(i) for i in range(TINY["depth"])]
    flat |= {f"Transformer/encoderblock/{n}": np.stack([b[n] for b in blocks]) for n in blocks[0]}
    text = {"params/txt/head/bias": np.zeros(3, np.float32), "params/t": np.ones(1, np.float32)}
    return {f"params/img/{name}": value for name, value in flat.items()} | text


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(0)
    results: dict[str, np.ndarray] = {}

    def record(name: str, model: torch.nn.Module, size: tuple[int, int]) -> None:
        images = torch.randn((2, 3, *size), generator=generator)
        results[f"{name}/images"] = images.permute(0, 2, 3, 1).numpy()
        results[f"{name}/logits"] = model(images).numpy()

    for kind, options in KINDS.items():
        model = make(options)
        randomise(model, generator)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, HERE / f"{kind}.safetensors")
        record(kind, model, (16, 16))
        for size in RESIZED.get(kind, []):
            other = make({**options, "img_size": size})
            other.load_state_dict(vision_transformer.checkpoint_filter_fn(dict(model.state_dict()), other))
            record(f"{kind}@{size[0]}x{size[1]}", other, size)
    model = make({})
    randomise(model, generator)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    np.savez(HERE / "google.npz", **google_layout(weights, TINY["num_heads"]))
    other = make({})
    other.load_pretrained(str(HERE / "google.npz"))  # timm's own reader says what the file means
    record("google", other, (16, 16))
    for seed, (kind, options) in enumerate(LATER.items(), 1):
        generator.manual_seed(seed)
        model = make(options)
        randomise(model, generator)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, HERE / f"{kind}.safetensors")
        record(kind, model, (16, 16))
    generator.manual_seed(100)
    options = {"global_pool": "map", "class_token": False}
    model = make(options)
    randomise(model, generator)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    np.savez(HERE / "big_vision.npz", **big_vision_layout(weights, TINY["num_heads"]))
    other = make(options)
    other.load_pretrained(str(HERE / "big_vision.npz"))
    record("big_vision", other, (16, 16))
    np.savez_compressed(HERE / "timm_logits.npz", **results)
    kinds = {k: {**TINY, **v} for k, v in {**KINDS, **LATER}.items()}
    (HERE / "kinds.json").write_text(json.dumps(kinds, indent=1) + "\n")


def repository(name: str, tag: str, hub_id: str | None) -> str | None:
    """Where timm downloads these weights from: an identifier that ends with "/" stands for its own name there."""
    return f"{hub_id}{name}.{tag}" if hub_id and hub_id.endswith("/") else hub_id or None


def module_options(name: str) -> tuple[torch.nn.Module, dict]:
    """timm's model of a name, and what timm makes it from as the options of our module."""
    with torch.device("meta"), Recorded() as recorded:
        model = timm.create_model(name, num_classes=1000)
    given = {key: value for key, value in recorded.arguments.items() if key in SAME}
    options = {"img_size": model.patch_embed.img_size[0], "patch_size": 16, **given}
    if isinstance(model, eva.Eva):
        options = {"global_pool": "avg", "k_bias": False, **options, **eva_options(recorded.arguments)}
    if isinstance(model, deit.VisionTransformerDistilled):
        options["distilled"] = True
    if "norm_layer" in recorded.arguments:
        options["norm_eps"] = recorded.arguments["norm_layer"].keywords["eps"]
    if "mlp_layer" in recorded.arguments:  # the only one: its ratio counts gate and value
        assert recorded.arguments["mlp_layer"] is SwiGLUPacked and recorded.arguments["act_layer"] is torch.nn.SiLU
        options |= {"mlp_layer": "swiglu_packed", "mlp_ratio": options["mlp_ratio"] / 2}
    elif "act_layer" in recorded.arguments:
        options["activation"] = recorded.arguments["act_layer"]
    return model, options


# Arguments of timm's models that are options of our module under the same name.
SAME = {"patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values", "class_token"}
SAME |= {"reg_tokens", "no_embed_class", "global_pool", "fc_norm", "pre_norm", "final_norm", "ref_feat_shape"}
SAME |= {"rope_temperature"}


def eva_options(arguments: dict) -> dict:
    """The options of timm's Eva that have other names here (the inverse of `make_eva`)."""
    options = {}
    if arguments.get("use_rot_pos_emb"):
        options["rope_type"] = arguments.get("rope_type", "cat")
    if not arguments.get("use_abs_pos_emb", True):
        options["pos_embed"] = "none"
    if arguments.get("swiglu_mlp"):
        apart = arguments.get("scale_mlp") or arguments.get("swiglu_align_to")
        options["mlp_layer"] = "swiglu" if apart else "swiglu_packed"
    theirs = {"scale_mlp": "scale_mlp_norm", "num_reg_tokens": "reg_tokens", "use_fc_norm": "fc_norm"}
    return options | {ours: arguments[name] for name, ours in theirs.items() if name in arguments}


class Recorded:
    """Within this context, the arguments with which timm builds a model are kept in `arguments`."""

    def __enter__(self):
        self.build = vision_transformer.build_model_with_cfg

        def build(*args, **arguments):
            self.arguments = arguments
            return self.build(*args, **arguments)

        for module in (deit, eva, vision_transformer):
            module.build_model_with_cfg = build
        return self

    def __exit__(self, *_):
        for module in (deit, eva, vision_transformer):
            module.build_model_with_cfg = self.build


def weights_of(name: str) -> dict[str, dict]:
    """Preprocessing and repository of every set of weights that timm knows under a name, the default one first."""
    tables = [module.default_cfgs for module in (deit, vision_transformer, eva)]
    known = next(table[name] for table in tables if name in table)
    assert known.tags[0] == known.default_with_tag[0]
    return {
        str(tag): {
            "size": list(cfg.input_size[1:]), "crop_pct": cfg.crop_pct, "interpolation": cfg.interpolation,
            "mean": list(cfg.mean), "std": list(cfg.std), "crop_mode": cfg.crop_mode,
            "repository": repository(name, tag, cfg.hf_hub_id),
        }
        for tag, cfg in ((tag, known.cfgs[tag]) for tag in known.tags)
    }  # fmt: skip


def table() -> None:
    """What timm knows of every name of the table."""
    package = HERE.parents[1] / "tokentm_jax/models/architectures.json"
    counted, rows = [], []
    for name in json.loads(package.read_text()):
        model, options = module_options(name)
        weights = weights_of(name)
        count = sum(p.numel() for p in model.parameters())
        tags = {tag: [cfg["size"][0], *list(cfg.values())[1:]] for tag, cfg in weights.items()}
        counted.append(f"{json.dumps(name)}: {json.dumps({'parameters': count, 'tags': tags})}")
        lines = ",\n".join(f"  {json.dumps(tag)}: {json.dumps(cfg)}" for tag, cfg in weights.items())
        start = f'{json.dumps(name)}: {{"options": {json.dumps(options)}, "parameters": {count}'
        rows.append(f'{start}, "weights": {{\n{lines}\n}}}}')
    (HERE / "architectures.json").write_text("{\n" + ",\n".join(counted) + "\n}\n")
    package.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        main()
    table()
