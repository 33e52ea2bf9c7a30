"""The table of architectures against timm, and the refusal of what cannot be built."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import mostly_slow

from tokentm_jax.errors import InputError
from tokentm_jax.inputs.images import IMAGENET, Preprocessing
from tokentm_jax.models import architectures
from tokentm_jax.models.architectures import (
    ARCHITECTURES,
    architecture,
    build,
    config_of,
    repositories,
    repository_of,
)

TIMM = json.loads((Path(__file__).parent / "goldens/architectures.json").read_text())


def test_every_row_was_compared():
    assert TIMM.keys() == ARCHITECTURES.keys()


# One of each family; the others are slow.
TRACED = (
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_siglip_224",
)
TRACED += (
    "eva02_base_patch14_224",
    "eva02_tiny_patch14_224",
    "vit_small_plus_patch16_dinov3",
    "vit_giant_patch14_dinov2",
)


def test_the_table_has_timms_parameters():
    assert {name: row["parameters"] for name, row in architectures.TIMM.items()} == {
        name: found["parameters"] for name, found in TIMM.items()
    }


@pytest.mark.parametrize("name", mostly_slow(sorted(ARCHITECTURES), TRACED))
def test_parameter_count_is_timms(name):
    module = build(name)
    images = jax.ShapeDtypeStruct((1, *module.img_size, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == TIMM[name]["parameters"]


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit3_base_patch16_224", "vit_large_patch14_clip_224"])
def test_tag_changes_the_preprocessing(name):
    assert len({architecture(f"{name}.{tag}")[1] for tag in TIMM[name]["tags"]}) > 1


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_preprocessing_is_timms(name):
    for tag, (height, crop_pct, interpolation, mean, std, crop_mode, _) in TIMM[name]["tags"].items():
        ours = architecture(f"{name}.{tag}")[1]
        assert (ours.size, ours.interpolation) == ((height, height), interpolation), tag
        assert (list(ours.mean), list(ours.std)) == (mean, std), tag
        assert (ours.crop_pct, ours.crop_mode) == (crop_pct, crop_mode), tag
    if list(repositories(name)):
        assert architecture(name)[1] == architecture(f"{name}.{next(iter(TIMM[name]['tags']))}")[1]


def test_repositories_of_weights_are_timms():
    """Of every tag, and which one a name without tag means; what is on no hub is refused."""
    for name, found in TIMM.items():
        places = {tag: fields[-1] for tag, fields in found["tags"].items() if fields[-1]}
        assert list(repositories(name)) == list(places)
        for tag, place in places.items():
            assert repository_of(f"{name}.{tag}") == (f"{name}.{tag}", place)
        if places:
            assert repository_of(name) == (f"{name}.{next(iter(places))}", next(iter(places.values())))
    with pytest.raises(InputError, match="no weights of 'vit_large_patch14_224' on the hub"):
        repository_of("vit_large_patch14_224")
    with pytest.raises(InputError, match="unknown weights 'dinov' of vit_base_patch16_224; did you mean 'dino'"):
        repository_of("vit_base_patch16_224.dinov")


def test_overrides_reach_the_preprocessing():
    config, preprocessing = architecture("deit_tiny_patch16_224", img_size=(160, 96), num_classes=7)
    module = build(config)
    assert (module.img_size, module.num_classes, preprocessing.size) == ((160, 96), 7, (160, 96))
    assert build(config, img_size=32, num_classes=3, dtype="bfloat16").grid == (2, 2)


def test_config_round_trip():
    module = build("deit3_small_patch16_224", num_classes=3)
    assert build(json.loads(json.dumps(config_of(module)))) == module


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"qk_norm": 1}, "qk_norm"),
        ({"scale_attn_norm": True}, "scale_attn_norm"),
        ({"norm_layer": "rmsnorm"}, "norm_layer"),
        ({"pos_embed": "sincos"}, "pos_embed"),
        ({"rope_type": "mixed"}, "rope_type"),
        ({"rope_type": "cat", "num_heads": 256}, "a multiple of 4"),
        ({"ref_feat_shape": [16]}, "ref_feat_shape"),
        ({"mlp_layer": "gated"}, "mlp_layer"),
        ({"in_chans": 0}, "in_chans"),
        ({"dept": 3}, "did you mean 'depth'"),
        ({"depth": 0}, "depth"),
        ({"depth": 3.0}, "depth"),
        ({"depth": True}, "depth"),
        ({"depth": 10**5000}, "depth"),
        ({"depth": [[[[1]]]]}, "depth"),
        ({"embed_dim": -16}, "embed_dim"),
        ({"init_values": float("inf")}, "init_values"),
        ({"img_size": 4096, "patch_size": 8}, "262145 tokens are more than 65536"),
        ({"embed_dim": 10**9}, "embed_dim"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": 0, "distilled": True}, "distilled"),
        ({"num_heads": 7}, "heads do not divide"),
        ({"img_size": 225}, "multiple of the patch size"),
        ({"img_size": [224, "224"]}, "img_size"),
        ({"img_size": 10**6}, "img_size"),
        ({"patch_size": [16, 14, 3]}, "patch_size"),
        ({"patch_size": [16, 15]}, "224 is not a multiple of the patch size 15"),
        ({"img_size": 230, "stride": 16}, "230 is not a multiple of the patch size 16"),
        ({"stride": 17}, "17 leaves gaps between patches of 16"),
        ({"stride": [16, 0]}, "stride"),
        ({"class_token": False, "global_pool": "prefix"}, "needs a token before the patches"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"init_values": "small"}, "init_values"),
        ({"global_pool": "prr"}, "global_pool"),
        ({"activation": "relu"}, "activation"),
        ({"qkv_bias": 1}, "qkv_bias"),
        ({"class_token": False}, "needs a class token"),
        ({"distilled": True, "global_pool": "avg"}, "distilled"),
        ({"distilled": True, "fc_norm": True}, "norm before pooling"),
        ({"patch_drop": 0.5}, "patch_drop"),
    ],
)
def test_bad_option_is_named(options, words):
    with pytest.raises(InputError, match=words):
        build(options)


def test_unknown_name_and_type():
    with pytest.raises(InputError, match="did you mean 'vit_base_patch16_224'"):
        build("vit_base_pach16_224")
    with pytest.raises(InputError, match="list"):
        build(["vit"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="dtype"):
        build("vit_tiny_patch16_224", dtype="int8")
    with pytest.raises(InputError, match="dtype"):
        build("vit_tiny_patch16_224", dtype="float99")


def test_normalise():
    preprocessing = Preprocessing((2, 3), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    images = jnp.ones((1, 2, 3, 3), jnp.bfloat16)
    normal = preprocessing.normalise(images)
    assert normal.dtype == jnp.bfloat16
    assert normal[0, 0, 0].tolist() == [1.0, 3.0, 0.5]
    with pytest.raises(InputError, match=r"\[B, 2, 3, 3\], got \[1, 3, 2, 3\]"):
        preprocessing.normalise(jnp.ones((1, 3, 2, 3)))
    with pytest.raises(InputError, match="floating-point"):
        preprocessing.normalise(jnp.ones((1, 2, 3, 3), jnp.uint8))


def test_preprocessing_round_trip():
    preprocessing = Preprocessing((224, 160), 0.875, "bilinear", **IMAGENET)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", [0, 4], "'size'"),
        ("size", [4], "'size'"),
        ("size", 4, "'size'"),
        ("size", [4, True], "'size'"),
        ("size", [4, 10**9], "'size'"),
        ("crop_pct", 0, "'crop_pct'"),
        ("crop_pct", "1", "'crop_pct'"),
        ("interpolation", "cubic", "'interpolation' must be 'nearest', 'bilinear'"),
        ("interpolation", [1], "interpolation"),
        ("mean", [0.5, 0.5], "'mean'"),
        ("std", [0.5, 0, 0.5], "'std'"),
        ("std", [0.5, float("inf"), 0.5], "'std'"),
        ("colour", 1, "unknown field 'colour' of preprocessing"),
    ],
)
def test_bad_preprocessing_is_named(field, value, words):
    good = Preprocessing((4, 4), **IMAGENET).to_dict()
    with pytest.raises(InputError, match=words):
        Preprocessing.from_dict({**good, field: value})


def test_preprocessing_must_be_complete():
    with pytest.raises(InputError, match="'mean' is missing"):
        Preprocessing.from_dict({"size": [4, 4]})
    with pytest.raises(InputError, match="mapping"):
        Preprocessing.from_dict([1])
