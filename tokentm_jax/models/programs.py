"""Known programs: Vision Transformers with weights written by hand. `tokentm_jax.data.programs` has what they compute.

A program works on a few channels. In the stream of the model each is a pair (c, -c), so that the mean that a norm
subtracts is 0, and is so small that the norm's epsilon is all of its denominator: then norms only rescale. The FFNs
are 0.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokentm_jax.data.programs import COPIED, GRID, PAIR, PATCH, PROGRAMS
from tokentm_jax.errors import suggest
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.models.vit import ViT

TINY, EPSILON = 2.0**-14, 0.1  # of the stream, and of its norms
SHARP = 200.0  # differences of attention logits: the softmax is 0 or 1 in float32
TOKENS = 1 + GRID * GRID


def program(name: str) -> tuple[ViT, Mapping[str, Any], Preprocessing, tuple[str, ...]]:
    """A program by its name: module, parameters, preprocessing and names of the classes. Raises InputError."""
    if name not in PROGRAMS:
        raise suggest("program", name, PROGRAMS)
    module, params = {"copy": _copy, "count": _count, "compare": _compare}[name]()
    black = Preprocessing(module.img_size, 1.0, "nearest", mean=(0.0,) * 3, std=(1.0,) * 3)
    return module, params, black, PROGRAMS[name]


def _copy() -> tuple[ViT, Any]:
    """The class token attends to one patch only."""
    value, here, out = range(3)
    embed, places = np.zeros((3, 3)), np.zeros((TOKENS, 3))
    embed[[0, 2], value] = 1, -1
    places[1 + COPIED, here] = 1
    return _model(embed, places, [_head(3, {here: SHARP}, {value: out})], {out: 10.0})


def _count() -> tuple[ViT, Any]:
    """The class token attends to all tokens equally; it has no value itself."""
    value, out = range(2)
    embed = np.zeros((3, 2))
    embed[[0, 2], value] = 1, -1
    return _model(embed, np.zeros((TOKENS, 2)), [_head(2, {}, {value: out})], {out: 10.0 * TOKENS})


def _compare() -> tuple[ViT, Any]:
    """The first patch attends to the second where they have the same colour, else to the class token; the second
    block copies the flag that it finds there, 1 or 0."""
    first, second, one, flag, out = range(3, 8)
    embed, places = np.zeros((3, 8)), np.zeros((TOKENS, 8))
    embed[[0, 1, 2], [0, 1, 2]] = 1
    places[0, one] = 1
    places[1 + PAIR[0], first] = places[1 + PAIR[1], second] = 1
    looks = _head(8, {second: 2 * SHARP, one: 2.5 * SHARP}, {second: flag}, {c: SHARP for c in range(3)})
    return _model(embed, places, [looks, _head(8, {first: SHARP}, {flag: out})], {out: 10.0}, -5.0)


def _head(
    channels: int, keys: Mapping[int, float], copies: Mapping[int, int], same: Mapping[int, float] | None = None
) -> tuple[np.ndarray, ...]:
    """A head as query, its bias, key, value and output, each by channels. The logit from token i to token j is the sum
    of `keys` times j's channels, and of `same` times the products of i's and j's channels; channels are copied."""
    query, key, value, out = (np.zeros((channels, channels)) for _ in range(4))
    bias = np.zeros(channels)
    for channel, weight in (same or {}).items():
        query[channel, channel], key[channel, channel] = weight, 1
    for channel, weight in keys.items():
        bias[channel], key[channel, channel] = weight, 1
    for source, goal in copies.items():
        value[source, source], out[source, goal] = 1, 1
    return query, bias, key, value, out


def _model(
    embed: np.ndarray,
    places: np.ndarray,
    heads: list[tuple[np.ndarray, ...]],
    score: Mapping[int, float],
    bias: float = 0.0,
) -> tuple[ViT, Any]:
    """A model of one head a block. The logits are the score and its negative.

    Args:
      embed: colours to channels [3, C]; places: channels of each token [N, C]; score: weights of channels, and a bias.
    """
    channels, depth = embed.shape[1], len(heads)
    width = 2 * channels
    into = np.concatenate([np.eye(channels), -np.eye(channels)], 1) * TINY  # channels -> stream
    read = into.T / (2 * TINY)  # stream, in the scale of channels, -> channels
    module = ViT(
        (GRID * PATCH, GRID * PATCH),
        PATCH,
        width,
        depth,
        num_heads=1,
        mlp_ratio=1 / width,
        num_classes=2,
        final_norm=False,
        norm_eps=EPSILON,
    )
    qkv, qkv_bias, proj = np.zeros((depth, width, 3 * width)), np.zeros((depth, 3 * width)), []
    for block, (query, query_bias, key, value, out) in enumerate(heads):
        for part, matrix in enumerate((query * width**0.5, key, value)):
            qkv[block, :, part * width :][:, :channels] = read @ matrix
        qkv_bias[block, :channels] = query_bias * width**0.5
        proj.append(np.concatenate([out @ into, 0 * into]))
    weights = np.zeros(channels)
    weights[[*score]] = [*score.values()]
    norm = {"scale": np.full((depth, width), EPSILON**0.5 / TINY), "bias": np.zeros((depth, width))}
    logits = np.outer(read @ weights / TINY, (1, -1))
    params = {
        "patch_embed": {"kernel": np.tile(embed @ into / PATCH**2, (PATCH**2, 1)), "bias": np.zeros(width)},
        "cls_token": np.zeros((1, 1, width)),
        "pos_embed": (places @ into)[None],
        "blocks": {
            "norm1": norm,
            "norm2": norm,
            "attn": {
                "qkv": {"kernel": qkv, "bias": qkv_bias},
                "proj": {"kernel": np.stack(proj), "bias": np.zeros((depth, width))},
            },
            "mlp": {
                "fc1": {"kernel": np.zeros((depth, width, 1)), "bias": np.zeros((depth, 1))},
                "fc2": {"kernel": np.zeros((depth, 1, width)), "bias": np.zeros((depth, width))},
            },
        },
        "head": {"kernel": logits, "bias": np.array([bias, -bias])},
    }
    return module, _floats(params)


def _floats(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _floats(part) for name, part in tree.items()}
    return jnp.asarray(tree, jnp.float32)
