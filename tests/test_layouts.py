"""Folders in the layouts of other libraries, against what these libraries answer; hostile folders; prompts."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import mostly_slow
from hub import COMMIT

import tokentm_jax as tm
from tokentm_jax.models import folders as layouts
from tokentm_jax.models.params import to_timm
from tokentm_jax.models.vit import init_params

GOLDENS = Path(__file__).parent / "goldens/layouts"
ANSWERS = dict(np.load(GOLDENS / "answers.npz"))
RESIZED = dict(np.load(GOLDENS / "resized.npz"))
PROMPTS = json.loads((GOLDENS / "prompts.json").read_text())
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
WITH_TEXT = ("clip", "open_clip", "siglip")


def unit(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_library(name):
    vit = tm.load(str(GOLDENS / name))
    made = init_params(vit.module, jax.random.key(0))
    assert jax.tree.map(jnp.shape, vit.params) == jax.tree.map(jnp.shape, made)
    outputs = jax.jit(lambda p, x: vit.module.apply({"params": p}, x))(vit.params, ANSWERS[f"{name}/images"])
    outputs = unit(outputs) if name in WITH_TEXT else np.asarray(outputs)
    np.testing.assert_allclose(outputs, ANSWERS[f"{name}/outputs"], atol=1e-5)
    assert (vit.text is not None) == (name in WITH_TEXT) and vit.name == name
    labelled = name in ("vit", "deit", "deit_teacher", "dinov2", "ast")
    assert vit.class_names == (tuple(f"label {i}" for i in range(5)) if labelled else None)


@pytest.mark.parametrize(
    "case", mostly_slow(sorted({key.partition("/")[0] for key in RESIZED}), ["vit@24x16", "dinov2_registers@8x12"])
)
def test_another_size_is_resampled_as_the_library_does_it(case):
    name, _, size = case.partition("@")
    vit = tm.load(str(GOLDENS / name), img_size=tuple(map(int, size.split("x"))))
    outputs = jax.jit(lambda p, x: vit.module.apply({"params": p}, x))(vit.params, RESIZED[f"{case}/images"])
    outputs = unit(outputs) if name in WITH_TEXT else np.asarray(outputs)
    np.testing.assert_allclose(outputs, RESIZED[f"{case}/outputs"], atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(WITH_TEXT, ["clip"]))
def test_prompts_are_those_of_the_library(name):
    vit = tm.load(checkpoint=GOLDENS / name)
    pytest.importorskip("tokenizers")
    np.testing.assert_array_equal(vit.text.tokenizer(PROMPTS), ANSWERS[f"{name}/ids"])
    embedded = vit.embed_text(PROMPTS)
    assert embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, ANSWERS[f"{name}/text"], atol=1e-5)
    np.testing.assert_allclose(vit.embed_text(PROMPTS[0]), embedded[:1], atol=1e-6)

    images = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
    maps, details = tm.explain(vit, images, "gae", text=PROMPTS, details=True)
    outputs = unit(np.asarray(vit.logits(images)))
    np.testing.assert_allclose(details["score"], (outputs * embedded).sum(-1), atol=1e-5)
    alone = tm.explain(vit, images[1:2], "gae", text=PROMPTS[1])
    np.testing.assert_allclose(alone[0], maps[1], rtol=1e-4, atol=1e-7)
    handed_over = tm.explain(vit, images[1:2], "gae", score=tm.scores.Cosine(embedded[1]))
    np.testing.assert_allclose(handed_over, alone, rtol=1e-5, atol=1e-8)


def test_preprocessing_is_that_of_the_folder():
    photo = tm.load(str(GOLDENS / "clip")).preprocessing
    assert (photo.size, photo.crop_pct, photo.interpolation, photo.crop_mode) == ((16, 16), 1.0, "bicubic", "center")
    photo = tm.load(str(GOLDENS / "vit")).preprocessing
    assert (photo.crop_mode, photo.interpolation, photo.mean) == ("squash", "bilinear", (0.5, 0.4, 0.3))
    assert tm.load(str(GOLDENS / "deit")).preprocessing.crop_pct == 16 / 18


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("clip", {"size": 18, "crop_size": 16}, (16 / 18, "center")),  # of CLIP a number is the short side's
        ("dinov2", {"size": 16, "do_center_crop": True, "crop_size": {"height": 12, "width": 12}}, (0.75, "center")),
        ("vit", {"size": 16}, (1.0, "squash")),
        ("vit", {"size": [16, 16]}, (1.0, "squash")),
    ],
)
def test_sizes_of_processors(tmp_path, name, fields, expected):
    shutil.copytree(GOLDENS / name, tmp_path / name)
    changed(tmp_path / name / "preprocessor_config.json", **fields)
    photo = tm.load(str(tmp_path / name)).preprocessing
    assert (photo.crop_pct, photo.crop_mode) == expected


def test_dinov2_takes_photos_of_the_processors_size(tmp_path):
    """As `transformers` does: its position embeddings are resampled, whatever size the config says."""
    shutil.copytree(GOLDENS / "dinov2", tmp_path / "dinov2")
    changed(
        tmp_path / "dinov2/preprocessor_config.json", size={"shortest_edge": 32}, do_center_crop=True, crop_size=28
    )
    vit = tm.load(str(tmp_path / "dinov2"))
    assert (vit.module.img_size, vit.preprocessing.size, vit.preprocessing.crop_pct) == ((28, 28), (28, 28), 28 / 32)
    told = tm.load(str(GOLDENS / "dinov2"), img_size=28)  # whose outputs are the library's: the test above
    jax.tree.map(np.testing.assert_array_equal, vit.params, told.params)
    assert tm.load(str(tmp_path / "dinov2"), img_size=16).module.img_size == (16, 16)
    changed(tmp_path / "dinov2/preprocessor_config.json", size={"height": 20, "width": 24}, do_center_crop=False)
    assert tm.load(str(tmp_path / "dinov2")).module.img_size == (20, 24)
    changed(tmp_path / "dinov2/preprocessor_config.json", size={"shortest_edge": 32})  # of any proportions
    assert tm.load(str(tmp_path / "dinov2")).module.img_size == (16, 16)


def test_a_processor_of_another_size_than_the_models_is_told(tmp_path):
    """With `transformers`, such a folder takes no photo at all."""
    shutil.copytree(GOLDENS / "vit", tmp_path / "vit")
    changed(tmp_path / "vit/preprocessor_config.json", size={"height": 24, "width": 24})
    with pytest.warns(
        UserWarning, match=r"makes photos of 24 x 24 pixels, and the model takes 16 x 16: used is 16 x 16"
    ):
        assert tm.load(str(tmp_path / "vit")).preprocessing.size == (16, 16)


HUGGING_FACE = json.loads((GOLDENS.parent / "architectures_hf.json").read_text())
OF_PHOTOS = {kind: kind for kind in ("vit", "deit", "dinov2", "clip", "siglip")}
OF_PHOTOS |= {"dinov2_with_registers": "dinov2_registers", "audio-spectrogram-transformer": "ast"}
READ = {"CLIPModel", "SiglipModel", "DeiTForImageClassificationWithTeacher", "ASTForAudioClassification", "ASTModel"}
READ |= {
    f"{name}{end}"
    for name in ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters")
    for end in ("ForImageClassification", "Model")
}


@pytest.mark.parametrize("kind", OF_PHOTOS)
def test_architectures_that_are_not_read_are_refused_by_name(tmp_path, kind):
    """Every one that `transformers` has."""
    folder = tmp_path / kind
    shutil.copytree(GOLDENS / OF_PHOTOS[kind], folder)
    for name in [*set(HUGGING_FACE[kind]) - READ, "Model", "ViTForEverything"]:
        changed(folder / "config.json", architectures=[name])
        with pytest.raises(tm.InputError, match=f"the architecture '{name}' is not supported; known: "):
            tm.load(str(folder))
    if kind == "vit":  # the weights say the rest
        changed(folder / "config.json", architectures=["ViTModel"])
        assert tm.load(str(folder)).module.num_classes == 5


def test_what_weights_lack_or_have_beside_the_model_is_told(tmp_path):
    for name, known in (("vit", "ViTForImageClassification"), ("dinov2", "Dinov2ForImageClassification")):
        shutil.copytree(GOLDENS / name, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = {n: t for n, t in safetensors.numpy.load_file(file).items() if not n.startswith("classifier.")}
        safetensors.numpy.save_file(tensors, file)
        with pytest.raises(tm.InputError, match=f"lack the classifier of {known}"):
            tm.load(str(tmp_path / name))
    pooler = {"pooler.dense.bias": np.zeros(24, np.float32), "pooler.dense.weight": np.zeros((24, 24), np.float32)}
    safetensors.numpy.save_file({**tensors, **pooler}, file)
    changed(tmp_path / "dinov2/config.json", architectures=["Dinov2Model"])
    with pytest.warns(UserWarning, match="dinov2: left out of its weights: pooler; the outputs are the features that"):
        assert not tm.load(str(tmp_path / "dinov2")).module.num_classes


def test_a_tokenizer_is_known_by_its_content(folder):
    pytest.importorskip("tokenizers")
    first, file = tm.load(str(folder)), folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    file.write_text(json.dumps(content))
    second = tm.load(str(folder))
    np.testing.assert_array_equal(first.text.tokenizer(["a cat"]), second.text.tokenizer(["a dog"]))
    assert not np.array_equal(first.text.tokenizer(["a cat"]), second.text.tokenizer(["a cat"]))


FILES = ["config.json", "preprocessor_config.json", "model.safetensors", "tokenizer.json", "vocab.json", layouts.INDEX]


@pytest.mark.parametrize("name", [*FILES, "part.safetensors", "open_clip_config.json"])
def test_a_pipe_in_a_folder_is_not_waited_for(folder, name):
    if name in ("vocab.json", layouts.INDEX, "part.safetensors"):  # which are looked at where the usual file is not
        (folder / ("tokenizer.json" if name == "vocab.json" else "model.safetensors")).unlink()
        (folder / "merges.txt").write_text("#version")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(tm.InputError, match=f"{name} is not a regular file"):
        tm.load(str(folder))


def test_sides_may_be_lists(folder):
    one = tm.load(str(folder))
    content = json.loads((folder / "config.json").read_text())
    changed(
        folder / "config.json",
        vision_config={**content["vision_config"], "image_size": [16, 16], "patch_size": [4, 4]},
    )
    assert tm.load(str(folder)).module == one.module


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("text_cfg", {"pool_type": "eos"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"heads": 3}),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}),
        ("preprocess_cfg", {"resize_mode": "longest"}),
    ],
)
def test_what_open_clip_can_and_this_cannot_is_refused(tmp_path, section, fields):
    shutil.copytree(GOLDENS / "open_clip", tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_config.json"
    content = json.loads(file.read_text())
    (content if section == "preprocess_cfg" else content["model_cfg"])[section] |= fields
    file.write_text(json.dumps(content))
    with pytest.raises(tm.InputError, match=f"{next(iter(fields))}|number of heads, 3"):
        tm.load(str(tmp_path / "clip"))


def test_weights_of_two_libraries_in_one_folder(tmp_path):
    shutil.copytree(GOLDENS / "open_clip", tmp_path / "clip")
    shutil.copy(GOLDENS / "clip" / "model.safetensors", tmp_path / "clip")
    one, two = tm.load(str(tmp_path / "clip")), tm.load(str(GOLDENS / "open_clip"))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDENS / "clip", tmp_path / "clip")
    return tmp_path / "clip"


def changed(file, **fields):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **fields}))


def test_weights_in_shards(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in own}, folder / part)
    (folder / "model.safetensors").unlink()
    places = {name: part for part, own in parts.items() for name in own}
    (folder / layouts.INDEX).write_text(json.dumps({"weight_map": places}))
    one, two = tm.load(str(folder)), tm.load(str(GOLDENS / "clip"))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    jax.tree.map(np.testing.assert_array_equal, one.text.params, two.text.params)


def of_config(**fields):
    return lambda folder: changed(folder / "config.json", **fields)


def of_file(name, text):
    return lambda folder: (folder / name).write_text(text)


def of_weights(change):
    def write(folder):
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        safetensors.numpy.save_file(change(tensors), folder / "model.safetensors")

    return write


def of_index(name):
    def write(folder):
        (folder / "model.safetensors").unlink()
        (folder / layouts.INDEX).write_text(json.dumps({"weight_map": {"logit_scale": name}}))

    return write


WRONG = {
    "swin": (of_config(model_type="swin"), "the model type 'swin' is not supported; known: vit, deit, dinov2"),
    "no type": (of_config(model_type=None), "config.json: 'model_type' must be a valid string, got None"),
    "no object": (of_file("config.json", "[]"), "config.json must be an object"),
    "no JSON": (of_file("config.json", "{"), "config.json is not valid JSON"),
    "section": (of_config(vision_config=3), "'vision_config' must be an object"),
    "depth": (
        of_config(vision_config={"num_hidden_layers": -1}),
        "'num_hidden_layers' must be greater than or equal to 1, got -1",
    ),
    "activation": (of_config(vision_config={"hidden_act": "relu"}), "'hidden_act' must be one of gelu, quick_gelu"),
    "channels": (of_config(vision_config={"num_channels": 1}), "'num_channels' must be 3: nothing else is supported"),
    "contradiction": (of_config(vision_config={"hidden_size": 48}), "does not fit the model"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "path": (of_index("../clip/model.safetensors"), "'weight_map' must name files of this folder"),
    "absolute": (of_index("/etc/passwd"), "'weight_map' must name files of this folder"),
    "missing shard": (of_index("x.safetensors"), "x.safetensors"),
    "no projection": (
        of_weights(lambda t: {k: v for k, v in t.items() if k != "visual_projection.weight"}),
        "lack 'visual_projection.weight'",
    ),
    "scale": (of_weights(lambda t: {**t, "logit_scale": np.full(3, 1.0, np.float32)}), "must be one finite number"),
    "large scale": (
        of_weights(lambda t: {**t, "logit_scale": np.full(1, 1e30, np.float32)}),
        "'logit_scale' in the weights",
    ),
    "heads": (of_config(text_config={"num_attention_heads": 7}), "must be a multiple of the number of heads, 7"),
    "deep": (of_config(text_config={"num_hidden_layers": 10**9}), "'num_hidden_layers' must be less than or equal to"),
    "infinite": (
        of_weights(lambda t: {**t, "visual_projection.weight": np.full((12, 24), np.inf, np.float32)}),
        "not finite numbers",
    ),
    "no preprocessing": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "lacks preprocessor_config.json",
    ),
    "deviation": (
        lambda folder: changed(folder / "preprocessor_config.json", image_std=[0, 0, 0]),
        "'std'[0] must be greater than 0",
    ),
    "resample": (lambda folder: changed(folder / "preprocessor_config.json", resample=9), "'resample' must be one of"),
    "size": (lambda folder: changed(folder / "preprocessor_config.json", size={}), "'shortest_edge'"),
    "no size": (lambda folder: changed(folder / "preprocessor_config.json", size=0), "'size'"),
    "factor": (lambda folder: changed(folder / "preprocessor_config.json", rescale_factor=1 / 127.5), "must be 1/255"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_one_sentence(folder, case):
    spoil, message = WRONG[case]
    spoil(folder)
    with pytest.raises(tm.InputError) as raised:
        tm.load(str(folder))
    assert message in str(raised.value)


PROMPTS_REFUSED = {
    "empty": ("", "a prompt must have 1 to"),
    "long": ("x" * 100_001, "a prompt must have 1 to"),
    "number": (3, "prompts must be a text or a list of texts"),
    "none": ([], "prompts must be a text or a list of texts"),
    "two": (["a", "b"], "text must be one prompt or one per sample (1), got 2"),
}


@pytest.mark.parametrize("case", PROMPTS_REFUSED)
def test_a_wrong_prompt_is_one_sentence(case):
    pytest.importorskip("tokenizers")
    prompt, message = PROMPTS_REFUSED[case]
    vit = tm.load(str(GOLDENS / "clip"))
    with pytest.raises(tm.InputError) as raised:
        tm.explain(vit, np.zeros((1, 16, 16, 3), np.float32), "rollout", text=prompt)
    assert message in str(raised.value)


def test_prompts_need_a_text_tower_and_a_tokenizer(folder):
    images = np.zeros((1, 16, 16, 3), np.float32)
    with pytest.raises(tm.InputError, match="vit has no text tower: a prompt is for models such as CLIP"):
        tm.explain(tm.load(str(GOLDENS / "vit")), images, text="a cat")
    with pytest.raises(tm.InputError, match="leave out score and target"):
        tm.explain(tm.load(str(folder)), images, text="a cat", target=1)
    (folder / "tokenizer.json").unlink()
    vit = tm.load(str(folder))
    assert vit.logits(images).shape == (1, 12)
    with pytest.raises(tm.InputError, match=r"has no tokenizer\.json for its prompts"):
        vit.embed_text("a cat")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(tm.InputError, match="no tokenizer that can be used"):
        tm.load(str(folder)).embed_text("a cat")


# ---- real weights: DeiT-tiny, renamed -------------------------------------------------------------------------------

HF_NAMES = (
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("head.", "classifier."),
)


def test_real_weights_in_another_layout_give_the_same_maps(deit, shared, tmp_path):
    """DeiT-tiny under Hugging Face's names, by hand: the same logits and maps."""
    tensors = {}
    for name, tensor in safetensors.numpy.load_file(shared / "data/deit_tiny_patch16_224.safetensors").items():
        if ".attn.qkv." in name:
            for part, own in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                tensors[f"vit.encoder.layer.{name[7:].replace('attn.qkv', f'attention.attention.{part}')}"] = own
            continue
        for ours, theirs in HF_NAMES:
            name = name.replace(ours, theirs) if ours in name else name
        name = name.replace("blocks.", "vit.encoder.layer.") if name.startswith("blocks.") else name
        tensors["vit.layernorm." + name[5:] if name.startswith("norm.") else name] = tensor
    config = {"model_type": "vit", "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
    config |= {"intermediate_size": 768, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
    config |= {"id2label": {str(i): name for i, name in enumerate(deit.class_names)}}
    photos = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    photos |= {"size": {"shortest_edge": 248}, "crop_size": 224, "do_center_crop": True}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(photos))
    other = tm.load(str(tmp_path))
    assert other.class_names == deit.class_names and other.module == deit.module
    images = np.random.default_rng(0).random((1, 224, 224, 3), np.float32)
    np.testing.assert_array_equal(other.logits(images), deit.logits(images))
    np.testing.assert_array_equal(tm.explain(other, images, "rollout"), tm.explain(deit, images, "rollout"))


def test_real_weights_of_big_vision_give_the_same_maps(deit, shared, tmp_path):
    """DeiT-tiny under big_vision's names, blocks stacked, by hand."""
    weights = safetensors.numpy.load_file(shared / "data/deit_tiny_patch16_224.safetensors")
    d, heads = 192, 3
    stack = lambda name, change: np.stack([change(weights[f"blocks.{i}.{name}"]) for i in range(12)])  # noqa: E731
    same, turn = lambda a: a, lambda a: a.T
    found = {
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "cls": weights["cls_token"],
        "pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    block = "Transformer/encoderblock"
    for i in (0, 1):
        found[f"{block}/LayerNorm_{i}/scale"] = stack(f"norm{i + 1}.weight", same)
        found[f"{block}/LayerNorm_{i}/bias"] = stack(f"norm{i + 1}.bias", same)
        found[f"{block}/MlpBlock_0/Dense_{i}/kernel"] = stack(f"mlp.fc{i + 1}.weight", turn)
        found[f"{block}/MlpBlock_0/Dense_{i}/bias"] = stack(f"mlp.fc{i + 1}.bias", same)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for k, part in enumerate(("query", "key", "value")):
        own = slice(k * d, (k + 1) * d)
        found[f"{attention}/{part}/kernel"] = stack("attn.qkv.weight", lambda a: a[own].T.reshape(d, heads, -1))  # noqa: B023
        found[f"{attention}/{part}/bias"] = stack("attn.qkv.bias", lambda a: a[own].reshape(heads, -1))  # noqa: B023
    found[f"{attention}/out/kernel"] = stack("attn.proj.weight", lambda a: a.T.reshape(heads, -1, d))
    found[f"{attention}/out/bias"] = stack("attn.proj.bias", same)
    np.savez(tmp_path / "big_vision.npz", **{f"params/{name}": array for name, array in found.items()})
    other = tm.load("deit_tiny_patch16_224", tmp_path / "big_vision.npz")
    jax.tree.map(np.testing.assert_array_equal, other.params, deit.params)


@pytest.mark.slow
def test_the_pool_that_reads_both(folder):
    """DINOv2's classifiers read the class token and the mean of the patches; the read-out says so."""
    vit = tm.load(str(GOLDENS / "dinov2"))
    assert vit.module.readout == (0.5,) + (0.5 / 16,) * 16
    images = jnp.asarray(np.random.default_rng(0).random((1, 16, 16, 3), np.float32))
    for method in ("tokentm", "conservative_lrp", "libra_full_grad"):
        maps, details = tm.explain(vit, images, method, details=True)
        assert np.isfinite(maps).all()
    np.testing.assert_allclose(details["completeness_gap"], 0, atol=1e-4)


# ---- timm's folders, and the hub ------------------------------------------------------------------------------------


def card(**changes):
    pretrained = {"tag": "fb_in1k", "input_size": [3, 8, 8], "crop_pct": 0.875, "mean": [0.1, 0.2, 0.3]}
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    made = {"architecture": "deit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": pretrained}
    return {**made, "model_args": arguments, **changes}


def tiny_weights(path, **options):
    module = tm.models.build({**card()["model_args"], "num_classes": 3, **options})
    shapes = jax.eval_shape(lambda key: tm.models.init_params(module, key), jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    safetensors.numpy.save_file(to_timm(params), path)


def test_a_timm_model_of_the_hub(hub):
    folder = hub.folder
    (folder / "config.json").write_text(json.dumps(card(label_names=["a", "b", "c"])))
    tiny_weights(folder / "model.safetensors")
    vit = tm.load("hf-hub:timm/some_vit@abc")
    assert {(repository, revision) for repository, revision, _ in hub.asked} == {
        ("timm/some_vit", "abc"), ("timm/some_vit", COMMIT)
    }  # fmt: skip
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file for *_, file in hub.asked}
    assert (vit.class_names, vit.module.num_classes, vit.name) == (("a", "b", "c"), 3, "timm/some_vit@abc")
    assert (vit.preprocessing.crop_pct, vit.preprocessing.mean) == (0.875, (0.1, 0.2, 0.3))
    with pytest.raises(tm.InputError, match="leave out the checkpoint"):
        tm.load("hf-hub:timm/some_vit", folder / "model.safetensors")
    tiny_weights(folder / "model.safetensors", depth=2)
    (folder / "config.json").write_text(json.dumps(card(model_args={**card()["model_args"], "depth": 2})))
    assert tm.load(str(folder)).module.depth == 2


def test_a_model_of_the_hub_in_shards(hub):
    folder = hub.folder
    shutil.copytree(GOLDENS / "vit", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    (folder / layouts.INDEX).write_text(json.dumps({"weight_map": {"x": "part-1.safetensors"}}))
    assert tm.load("hf-hub:google/vit").class_names is not None
    assert "part-1.safetensors" in [file for *_, file in hub.asked]


def test_the_hub_fails_with_a_sentence(hub):
    folder = hub.folder
    with pytest.raises(tm.InputError, match=r"config\.json of hf-hub:timm/x could not be downloaded \(the repository"):
        tm.load("hf-hub:timm/x")
    (folder / "config.json").write_text("{}")
    with pytest.raises(tm.InputError, match=r"model\.safetensors or .* of hf-hub:timm/x could not be downloaded"):
        tm.load("hf-hub:timm/x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "must be an object"),
        ("{", "is not valid JSON"),
        ("[" * 10**5, "is not valid JSON"),
        (json.dumps(card(model_args=[1])), "is not of a timm model"),
        (json.dumps(card(model_args={"name": "x"})), "is not of a timm model"),
        (json.dumps(card(architecture="resnet50")), "unknown model 'resnet50'"),
        (json.dumps(card(num_classes=-1)), "num_classes"),
        (json.dumps(card(model_args={}, pretrained_cfg={"input_size": 3})), "is not of a timm model"),
        (json.dumps(card(pretrained_cfg={"std": [0, 0, 0]})), "'std'"),
        (json.dumps(card(pretrained_cfg={"crop_mode": "border"})), "'crop_mode' must be 'center' or 'squash'"),
    ],
)
def test_a_wrong_card_is_one_sentence(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(tm.InputError, match=words):
        tm.load(str(tmp_path))


def test_a_model_of_the_cache_needs_no_network(hub, capfd, monkeypatch):
    """What the hub lacks is known there, too; the client's attempts are not shown, and not repeated."""
    (hub.folder / "config.json").write_text(json.dumps(card()))
    tiny_weights(hub.folder / "model.safetensors")
    first = tm.load("hf-hub:timm/some_vit")
    hub.stop()
    again = tm.load("hf-hub:timm/some_vit")
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    capfd.readouterr()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("waited for another attempt"))
    with pytest.raises(tm.InputError, match=r"of hf-hub:timm/other could not be downloaded \(.*refused\)$"):
        tm.load("hf-hub:timm/other")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("file", ["tokenizer.json", "modules.json", "1_Pooling/config.json", "model.safetensors"])
def test_a_network_that_drops_is_one_sentence(hub, capfd, file):
    """At a file that a model can do without, too: without it, another model would be loaded."""
    shutil.copytree(GOLDENS.parent / "texts/bert_encoder", hub.folder, dirs_exist_ok=True)
    (hub.folder / "modules.json").write_text("[]")
    (hub.folder / "1_Pooling").mkdir()
    (hub.folder / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    hub.silent.add(file)
    with pytest.raises(tm.InputError, match=f"^{file} of hf-hub:a/b could not be downloaded"):
        tm.load("hf-hub:a/b")
    assert capfd.readouterr() == ("", "")
    hub.silent.clear()
    assert tm.load("hf-hub:a/b").module.pool == "token"


def test_the_pooling_of_the_hub_is_where_its_modules_say(hub):
    shutil.copytree(GOLDENS.parent / "texts/bert_encoder", hub.folder, dirs_exist_ok=True)
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "2_Pooling"}]
    (hub.folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(tm.InputError, match=r"lacks 2_Pooling/config\.json"):
        tm.load("hf-hub:a/b")
    (hub.folder / "2_Pooling").mkdir()
    (hub.folder / "2_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    assert tm.load("hf-hub:a/c").module.pool == "token"


def test_a_silent_network_is_not_waited_for(hub, monkeypatch):
    """A firewall that drops packets, and a name server that answers nothing, end no request."""
    monkeypatch.setattr("tokentm_jax.models.hub.PATIENCE", 0.1)
    done = threading.Event()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: done.wait(60))
    with pytest.raises(tm.InputError, match=r"config\.json of hf-hub:a/b .*Hub does not answer within 0\.2 seconds\)"):
        tm.load("hf-hub:a/b")
    done.set()


def test_a_name_is_enough(hub, shared):
    """timm's default weights come from the hub, their names from the package."""
    (hub.folder / "model.safetensors").symlink_to(shared / "data/deit_tiny_patch16_224.safetensors")
    vit = tm.load("deit_tiny_patch16_224")
    assert hub.asked[-1] == ("timm/deit_tiny_patch16_224.fb_in1k", "main", "model.safetensors")
    assert (vit.name, vit.module.num_classes) == ("deit_tiny_patch16_224.fb_in1k", 1000)
    assert vit.class_index("tabby") == vit.class_index("n02123045") == 281 and vit.class_name(149) == "dugong"
    assert vit.preprocessing == tm.models.ARCHITECTURES["deit_tiny_patch16_224"][1]


def test_a_name_without_weights_is_one_sentence(hub, monkeypatch):
    for name, words in (
        ("vit_base_patch16_plus_240", "has no weights of 'vit_base_patch16_plus_240' on the hub"),
        ("deit_tiny_patch16_224.fb_in2k", "did you mean 'fb_in1k'"),
        ("deit_tiny_patch16_224", r"model\.safetensors of deit_tiny_patch16_224\.fb_in1k could not be downloaded"),
    ):
        with pytest.raises(tm.InputError, match=words):
            tm.load(name)
    hub.stop()
    with pytest.raises(tm.InputError, match=r"could not be downloaded \(.*Hub does not answer: .*refused\)"):
        tm.load("deit_small_patch16_224")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("deit_tiny_patch16_224", "hf-hub:a/b"):
        with pytest.raises(tm.InputError, match=rf"^{name} .*needs .*tokentm-jax\[hub\]"):
            tm.load(name)
