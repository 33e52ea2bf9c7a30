"""Vision Transformer in Flax Linen.

Axes, for the whole project:

    B batch    L blocks    H heads    N tokens    D width    Q, K query and key tokens
    gh, gw patch grid (n = gh * gw patches, N = prefix + n)

The module is a frozen dataclass: it is its own configuration, hashable, and can be a static argument of `jit`.
Fields have the names and meanings of timm's `VisionTransformer`. Their types are the values that `build` allows.
"""

from functools import partial
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jax import Array
from jax.typing import DTypeLike

from tokentm_jax.errors import InputError
from tokentm_jax.maths import primitives
from tokentm_jax.maths.maps import Tiling
from tokentm_jax.maths.primitives import PyTree, wide
from tokentm_jax.models.blocks import Affine, AttentionPool, Block, Linear, Module, Norm, Rope, scanned, trunc_normal

LARGEST_DEPTH, MOST_CLASSES = 200, 1_000_000
Side = Annotated[int, Ge(1), Le(4096)]  # of an image, in pixels
Patch = Annotated[int, Ge(1), Le(256)]  # side of a patch


class ViT(Module):
    """Vision Transformer: normalised images [B, H, W, C] -> logits [B, classes], or features [B, D] for no classes.

    `dtype` is the type of the activations (None: of the images). Norms and softmax are computed in float32 at least.
    If the collection `intermediates` is mutable, the blocks sow their arrays, stacked over blocks.
    """

    img_size: tuple[Side, Side] = (224, 224)
    patch_size: Patch | tuple[Patch, Patch] = 16  # side, or (height, width)
    embed_dim: Annotated[int, Ge(1), Le(8192)] = 768
    depth: Annotated[int, Ge(1), Le(LARGEST_DEPTH)] = 12
    num_heads: Annotated[int, Ge(1), Le(256)] = 12
    mlp_ratio: Annotated[float, Ge(0), Le(64)] = 4.0
    num_classes: Annotated[int, Ge(0), Le(MOST_CLASSES)] = 1000  # 0: no head, the outputs are the pooled features
    qkv_bias: bool = True
    k_bias: bool = True  # whether keys have a bias where `qkv_bias`; EVA's have none
    qk_norm: bool = False  # a norm of queries and of keys, per head
    proj_bias: bool = True
    init_values: Annotated[float, Ge(0), Le(1e4)] | None = None  # layer scale; None: no layer scale
    class_token: bool = True
    distilled: bool = False
    reg_tokens: Annotated[int, Ge(0), Le(256)] = 0
    pos_embed: Literal["learn", "none"] = "learn"
    no_embed_class: bool = False  # position embeddings for patches only
    rope_type: Literal["cat", "dinov3"] | None = None  # rotary positions: of EVA-02, or DINOv3
    rope_temperature: Annotated[float, Ge(1), Le(1e9)] = 10_000.0
    ref_feat_shape: tuple[Side, Side] | None = None  # see `Rope.reference`
    pre_norm: bool = False  # a norm before the first block, and no patch-embedding bias
    # The class token, the mean of the patches, both, attention pooling, or the mean of the tokens before them (AST).
    global_pool: Literal["token", "avg", "cat", "map", "prefix"] = "token"
    final_norm: bool = True  # a norm after the last block, or after pooling
    fc_norm: bool | None = None  # norm after pooling instead of before; None: if pooling is "avg"
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    mlp_layer: Literal["mlp", "swiglu", "swiglu_packed"] = "mlp"  # see `FeedForward`
    scale_mlp_norm: bool = False  # a norm before the FFN's last linear map
    norm_eps: Annotated[float, Ge(0), Le(0.1)] = 1e-6
    patch_drop: float = 0.0  # share of patch tokens removed in training (with the rng "patch_drop")
    in_chans: Annotated[int, Ge(1), Le(64)] = 3
    stride: Patch | tuple[Patch, Patch] | None = None  # between patches, smaller if they overlap; None: the patch size
    dtype: DTypeLike | None = None
    linear: Linear = primitives.linear
    unroll: int = 1  # blocks per iteration of the loop: more are faster on a CPU, and compile longer

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (gh, gw)."""
        return self.tiling.grid(self.img_size)

    @property
    def tiling(self) -> Tiling:
        """Height and width of a patch, and the distances between patches."""
        sides = self.patch_size, self.stride or self.patch_size
        return Tiling(*(side if isinstance(side, tuple) else (side, side) for side in sides))

    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and type of a batch of one."""
        return jax.ShapeDtypeStruct((1, *self.img_size, self.in_chans), jnp.float32)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patch tokens: class, distillation, registers."""
        return sum(self._prefix_tokens.values())

    @property
    def _prefix_tokens(self) -> dict[str, int]:
        counts = {"cls_token": int(self.class_token), "dist_token": int(self.distilled), "reg_token": self.reg_tokens}
        return {name: count for name, count in counts.items() if count}

    @property
    def readout(self) -> tuple[float, ...]:
        """r0 [N]: the distribution with which the head reads tokens; equal shares of patches for attention pooling."""
        patches = self.grid[0] * self.grid[1]
        if self.global_pool == "cat":
            return (0.5,) + (0.0,) * (self.prefix - 1) + (0.5 / patches,) * patches
        if self.global_pool == "prefix":
            return (1 / self.prefix,) * self.prefix + (0.0,) * patches
        if self.global_pool != "token":
            return (0.0,) * self.prefix + (1 / patches,) * patches
        heads = 1 + int(self.distilled)
        return (1 / heads,) * heads + (0.0,) * (self.prefix - heads + patches)

    def setup(self) -> None:
        d = self.embed_dim
        gh, gw = self.grid
        self.patch_embed = Affine(d, not self.pre_norm)
        for name, count in self._prefix_tokens.items():
            setattr(self, name, self.param(name, trunc_normal, (1, count, d)))
        positions = gh * gw + (0 if self.no_embed_class else self.prefix)
        learned = self.pos_embed == "learn"
        self.positions = self.param("pos_embed", trunc_normal, (1, positions, d)) if learned else None
        if self.pre_norm:
            self.norm_pre = Norm(self.norm_eps)
        self.blocks = scanned(self.depth, self._block_fields, self.unroll)
        if self._norms[1]:
            self.fc_norm_layer = Norm(self.norm_eps, name="fc_norm")
        if self._norms[0]:
            self.norm = Norm(self.norm_eps)
        if self.global_pool == "map":
            hidden = int(d * self.mlp_ratio)
            self.attn_pool = AttentionPool(self.num_heads, hidden, self.activation, self.norm_eps, self.linear)
        if self.num_classes:
            self.head = Affine(self.num_classes)
        if self.distilled:
            self.head_dist = Affine(self.num_classes)

    @property
    def _norms(self) -> tuple[bool, bool]:
        """Whether there is a norm before pooling, and one after it."""
        after = self.global_pool == "avg" if self.fc_norm is None else self.fc_norm
        both = self.global_pool == "prefix"
        return self.final_norm and (both or not after), self.final_norm and (both or after)

    @property
    def _block_fields(self) -> dict[str, Any]:
        same = ("num_heads", "qkv_bias", "k_bias", "qk_norm", "proj_bias", "init_values", "activation", "mlp_layer")
        same += ("scale_mlp_norm", "norm_eps", "linear")
        rope = None
        if self.rope_type is not None:
            rope = Rope(self.rope_type, self.grid, self.prefix, self.ref_feat_shape, self.rope_temperature)
        hidden = int(self.embed_dim * self.mlp_ratio)
        return {**{name: getattr(self, name) for name in same}, "mlp_hidden": hidden, "rope": rope}

    def block(self) -> Block:
        """One block, to apply to a slice of `params["blocks"]`."""
        return Block(**self._block_fields, parent=None)

    def __call__(self, images: Array) -> Array:
        tokens, _ = self.blocks(self.embed(images), None)
        self.sow("intermediates", "final_tokens", tokens)
        return self.classify(tokens)

    def embed(self, images: Array) -> Array:
        """Normalised images [B, H, W, C] -> tokens [B, N, D] that enter the first block."""
        expected = (*self.img_size, self.in_chans)
        if images.shape[1:] != expected:
            raise InputError(f"images must be [B, {', '.join(map(str, expected))}] for this model, got {images.shape}")
        patches = self._patches(images.astype(self.dtype or images.dtype))
        x = self.linear(patches, *self.patch_embed(patches.shape[-1]))
        # Adding zeros of the batch's shape broadcasts under sharding without a collective.
        prefix = [getattr(self, name).astype(x.dtype) + jnp.zeros_like(x[:, :1]) for name in self._prefix_tokens]
        if self.positions is not None and self.no_embed_class:
            x = x + self.positions.astype(x.dtype)
        x = jnp.concatenate([*prefix, x], axis=1)
        if self.positions is not None and not self.no_embed_class:
            x = x + self.positions.astype(x.dtype)
        if self.patch_drop and self.has_rng("patch_drop"):
            x = self._drop_patches(x)
        return self.norm_pre(x) if self.pre_norm else x

    def _patches(self, x: Array) -> Array:
        """Images [B, H, W, C] -> patches [B, n, ph pw C]. If patches overlap, pixels are read more than once."""
        b, _, _, c = x.shape
        (gh, gw), ((ph, pw), stride) = self.grid, self.tiling
        if stride != (ph, pw) or x.shape[1:3] != (gh * ph, gw * pw):
            for axis, (count, side, step) in enumerate(((gh, ph, stride[0]), (gw, pw, stride[1])), 1):
                places = step * np.arange(count)[:, None] + np.arange(side)
                x = jnp.take(x, places.ravel().astype(np.int32), axis, mode="clip")
        x = x.reshape(b, gh, ph, gw, pw, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, gh * gw, ph * pw * c)

    def classify(self, tokens: Array) -> Array:
        """Tokens [B, N, D] that leave a block -> logits [B, classes], or features, in float32 at least."""
        x = self.norm(tokens) if self._norms[0] else tokens
        if self.global_pool == "map":
            pooled = self.attn_pool(x[:, self.prefix :])
        elif self.global_pool in ("avg", "cat", "prefix"):
            # The mean is a linear map over tokens, so that the rules of a linear map hold for it.
            read = x[:, : self.prefix] if self.global_pool == "prefix" else x[:, self.prefix :]
            read = jnp.swapaxes(read, 1, 2)
            weights = jnp.full((read.shape[-1], 1), 1 / read.shape[-1], x.dtype)
            pooled = self.linear(read, weights, None)[..., 0]
            if self.global_pool == "cat":
                pooled = jnp.concatenate([x[:, 0], pooled], axis=-1)
        else:
            pooled = x[:, 0]
        if self._norms[1]:
            pooled = self.fc_norm_layer(pooled)
        if not self.num_classes:
            return wide(pooled)
        if not self.distilled:
            return wide(self.linear(pooled, *self.head(pooled.shape[-1])))
        # The mean of two heads, with the factors 1/2 in the weights, so that a residual sum remains.
        heads = jax.tree.map(lambda a: a / 2, (self.head(self.embed_dim), self.head_dist(self.embed_dim)))
        return wide(self.linear(pooled, *heads[0]) + self.linear(x[:, 1], *heads[1]))

    def patch_tokens(self, images: Array) -> Array:
        """Normalised images [B, H, W, C] -> the patches' tokens [B, n, D] after the last block, and its norm if it is
        before the pooling."""
        tokens, _ = self.blocks(self.embed(images), None)
        return (self.norm(tokens) if self._norms[0] else tokens)[:, self.prefix :]

    def read_part(self, tokens: Array, kept: Array, count: int) -> Array:
        """Outputs for embedded tokens [B, N, D] with only the `count` `kept` patches [B, n], the same in all."""
        places = self.prefix + jnp.flatnonzero(kept[0], size=count)
        shown = jnp.concatenate([tokens[:, : self.prefix], tokens[:, places]], 1)
        return self.classify(self.blocks(shown, None)[0])

    def _drop_patches(self, x: Array) -> Array:
        """Keep a random subset of each sample's patch tokens (PatchDropout, Liu et al., WACV 2023)."""
        patches = x[:, self.prefix :]
        kept = max(1, round(patches.shape[1] * (1 - self.patch_drop)))
        order = jax.random.uniform(self.make_rng("patch_drop"), patches.shape[:2]).argsort(-1)[:, :kept]
        select = jax.nn.one_hot(order, patches.shape[1], dtype=x.dtype)
        return jnp.concatenate([x[:, : self.prefix], select @ patches], axis=1)


@partial(jax.jit, static_argnums=0)
def init_params(module: nn.Module, key: Array) -> PyTree:
    """Random parameters.

    Args:
      module: such as `ViT` or `Bert`.
      key: of the random numbers.

    Returns:
      float32 arrays; other results of `init` are left out.
    """
    return module.init(key, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), module.example()))["params"]
