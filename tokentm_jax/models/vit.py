"""Vision Transformer in Flax Linen.

Axes, for the whole project:

    B batch    L blocks    H heads    N tokens    D width    Q, K query and key tokens
    gh, gw patch grid (n = gh * gw patches, N = prefix + n)

The module is a frozen dataclass: it is its own configuration, hashable, and can be a static argument of `jit`.
Fields have the names and meanings of timm's `VisionTransformer`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.errors import InputError
from tokentm_jax.maths import primitives
from tokentm_jax.maths.maps import Tiling
from tokentm_jax.maths.primitives import wide

Linear = Callable[[Array, Array, Array | None], Array]  # how linear maps are computed
trunc_normal = nn.initializers.truncated_normal(0.02)


class Affine(nn.Module):
    """Parameters of a linear map; `primitives.linear` does the arithmetic."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", trunc_normal, (inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        return kernel, bias


class Norm(nn.Module):
    """LayerNorm with learned scale and bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        return primitives.norm(x, scale, bias, self.eps)


class LayerScale(nn.Module):
    """Per-channel gain of a branch, multiplied into the linear map before it.

    The numbers are the same, and nothing is between a branch and its residual sum.
    """

    init: float

    @nn.compact
    def __call__(self, kernel: Array, bias: Array | None) -> tuple[Array, Array | None]:
        gamma = self.param("gamma", nn.initializers.constant(self.init), (kernel.shape[-1],))
        return kernel * gamma, None if bias is None else bias * gamma


class Rope(NamedTuple):
    """Rotary positions of patches, by timm's `rope_type`: "cat" (EVA-02) or "dinov3"."""

    kind: str
    grid: tuple[int, int]
    prefix: int  # tokens before the patches, which are not rotated
    reference: tuple[int, int] | None  # grid of the pretraining; positions are scaled to it ("cat")
    temperature: float

    @property
    def half(self) -> bool:
        """Whether channels i and i + D/2 are rotated together, instead of 2i and 2i + 1."""
        return self.kind == "dinov3"


@lru_cache(maxsize=16)
def rotation(rope: Rope, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and signed sine of each token's angles, for heads of `width` channels: each [N, width], float32.

    The angle depends on the row for half of the channels, and on the column for the others. "cat": angle
    `position / temperature^(k / K)`; "dinov3": `2 pi centre / temperature^(k / K)` with centres in [-1, 1];
    K = width / 4.
    """
    bands = rope.temperature ** -(np.arange(width // 4) / (width // 4))
    if rope.kind == "dinov3":
        axes = [2 * np.pi * (2 * (np.arange(side) + 0.5) / side - 1) for side in rope.grid]
    else:
        scaled = rope.grid if rope.reference is None else rope.reference
        axes = [np.arange(side) / side * whole for side, whole in zip(rope.grid, scaled, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2, 1)
    angles = (places * bands).reshape(len(places), -1)  # [n, width / 2]
    angles = np.concatenate([np.zeros((rope.prefix, width // 2)), angles])
    sign = np.array([-1, 1])
    if rope.half:
        both = np.tile(angles, 2)
        return np.cos(both).astype(np.float32), (np.sin(both) * sign.repeat(width // 2)).astype(np.float32)
    both = angles.repeat(2, -1)
    return np.cos(both).astype(np.float32), (np.sin(both) * np.tile(sign, width // 2)).astype(np.float32)


class Attention(nn.Module):
    """Multi-head self-attention on normalised tokens.

    Sows `attention` [B, H, Q, K] (after softmax), `value` [B, H, N, D/H] and `transformed_value` [B, N, D]: the values
    after the output projection without its bias, `x~_j = sum_h V_j^h W_O^h`. Also the kernels of both projections,
    `value_kernel` and `output_kernel` [D, D].
    """

    num_heads: int
    qkv_bias: bool
    k_bias: bool
    qk_norm: bool
    rope: Rope | None
    proj_bias: bool
    norm_eps: float
    linear: Linear
    causal: bool

    @nn.compact
    def __call__(self, x: Array, scale_branch: LayerScale | None, mask: Array | None = None) -> Array:
        b, n, d = x.shape
        h = self.num_heads
        projections, bias = Affine(3 * d, self.qkv_bias and self.k_bias, name="qkv")(d)
        if self.qkv_bias and not self.k_bias:
            of_query, of_value = (self.param(f"{i}_bias", nn.initializers.zeros_init(), (d,)) for i in "qv")
            bias = jnp.concatenate([of_query, jnp.zeros_like(of_query), of_value])
        query, key, value = jnp.moveaxis(self.linear(x, projections, bias).reshape(b, n, 3, h, d // h), (2, 3), (0, 2))
        if self.qk_norm:
            query, key = Norm(self.norm_eps, name="q_norm")(query), Norm(self.norm_eps, name="k_norm")(key)
        if self.rope is not None:
            tables = map(jnp.asarray, rotation(self.rope, d // h))
            turn = partial(
                primitives.rotate, **dict(zip(("cosine", "sine"), tables, strict=True)), half=self.rope.half
            )
            query, key = turn(query), turn(key)
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key)
        if self.causal:
            scores = jnp.where(jnp.tril(jnp.ones((n, n), bool)), scores, jnp.finfo(scores.dtype).min / 2)
        if mask is not None:  # finite, so that no rule multiplies infinity by zero
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min / 2)
        attention = primitives.softmax(scores, (d // h) ** -0.5)
        kernel, bias = Affine(d, self.proj_bias, name="proj")(d)
        if scale_branch is not None:
            kernel, bias = scale_branch(kernel, bias)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", attention)
            self.sow("intermediates", "value", value)
            together = jnp.moveaxis(value, 1, 2).reshape(b, n, d)
            self.sow("intermediates", "transformed_value", together @ kernel.astype(x.dtype))
            self.sow("intermediates", "value_kernel", projections[:, 2 * d :])
            self.sow("intermediates", "output_kernel", kernel)
        if mask is not None:  # these are zero already; now their gradient is zero as well
            attention = jnp.where(mask[:, None, None], attention, 0)
        mixed = jnp.einsum("bhqk,bhkd->bqhd", attention, value).reshape(b, n, d)
        return self.linear(mixed, kernel, bias)


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity or a gate (SwiGLU) between them, and perhaps a norm.

    `layer` is "mlp", "swiglu" (gate and value are separate linear maps) or "swiglu_packed" (they are halves of one).
    """

    hidden: int
    activation: str
    layer: str
    scale_norm: bool
    norm_eps: float
    linear: Linear

    @nn.compact
    def __call__(self, x: Array, scale_branch: LayerScale | None) -> Array:
        d = x.shape[-1]
        if self.layer == "mlp":
            x = primitives.activation(self.linear(x, *Affine(self.hidden, name="fc1")(d)), self.activation)
        else:
            if self.layer == "swiglu":
                gate, x = (self.linear(x, *Affine(self.hidden, name=name)(d)) for name in ("fc1_g", "fc1_x"))
            else:
                gate, x = jnp.split(self.linear(x, *Affine(2 * self.hidden, name="fc1")(d)), 2, -1)
            x = primitives.silu(gate) * x
        if self.scale_norm:
            x = Norm(self.norm_eps, name="norm")(x)
        kernel, bias = Affine(d, name="fc2")(self.hidden)
        if scale_branch is not None:
            kernel, bias = scale_branch(kernel, bias)
        return self.linear(x, kernel, bias)


class AttentionPool(nn.Module):
    """The head of SigLIP: one learned query attends to the tokens [B, n, D], then an FFN layer -> [B, D]."""

    num_heads: int
    mlp_hidden: int
    activation: str
    norm_eps: float
    linear: Linear

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, n, d = x.shape
        h = self.num_heads
        latent = self.param("latent", nn.initializers.truncated_normal(d**-0.5), (1, 1, d)).astype(x.dtype)
        query = self.linear(latent + jnp.zeros_like(x[:, :1]), *Affine(d, name="q")(d)).reshape(b, 1, h, d // h)
        key, value = jnp.moveaxis(self.linear(x, *Affine(2 * d, name="kv")(d)).reshape(b, n, 2, h, d // h), 2, 0)
        attention = primitives.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key), (d // h) ** -0.5)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, value).reshape(b, 1, d)
        pooled = self.linear(mixed, *Affine(d, name="proj")(d))
        ffn = FeedForward(self.mlp_hidden, self.activation, "mlp", False, self.norm_eps, self.linear, name="mlp")
        return (pooled + ffn(Norm(self.norm_eps, name="norm")(pooled), None))[:, 0]


class Block(nn.Module):
    """Pre-norm block: `x' = x + MHSA(LN1(x))`, `x+ = x' + FFN(LN2(x'))`.

    Or with `post_norm`: `x' = LN1(x + MHSA(x))`, `x+ = LN2(x' + FFN(x'))`. A mask [B, N] is true for present tokens.

    Sows `tokens` (its input), `normalised` (the input of the attention: LN1 of `tokens`, or `tokens`),
    `attention_branch` and `ffn_branch`, and with `post_norm` `middle` (x') and `after` (x+), each [B, N, D].
    """

    num_heads: int
    mlp_hidden: int
    activation: str
    norm_eps: float
    qkv_bias: bool = True
    k_bias: bool = True
    qk_norm: bool = False
    rope: Rope | None = None
    proj_bias: bool = True
    init_values: float | None = None
    mlp_layer: str = "mlp"
    scale_mlp_norm: bool = False
    linear: Linear = primitives.linear
    post_norm: bool = False
    causal: bool = False  # whether a token attends only to itself and those before it

    def setup(self) -> None:
        self.norm1, self.norm2 = Norm(self.norm_eps), Norm(self.norm_eps)
        self.attn = Attention(
            *(self.num_heads, self.qkv_bias, self.k_bias, self.qk_norm, self.rope, self.proj_bias, self.norm_eps),
            *(self.linear, self.causal),
        )
        self.mlp = FeedForward(
            self.mlp_hidden, self.activation, self.mlp_layer, self.scale_mlp_norm, self.norm_eps, self.linear
        )
        if self.init_values is not None:
            self.ls1, self.ls2 = LayerScale(self.init_values), LayerScale(self.init_values)

    def __call__(self, x: Array, mask: Array | None = None) -> tuple[Array, None]:
        return self.feed(self.attend(x, mask)), None

    def attend(self, x: Array, mask: Array | None = None) -> Array:
        """The attention layer: x [B, N, D] -> x' [B, N, D]."""
        normalised = x if self.post_norm else self.norm1(x)
        attention_branch = self.attn(normalised, None if self.init_values is None else self.ls1, mask)
        self.sow("intermediates", "tokens", x)
        self.sow("intermediates", "normalised", normalised)
        self.sow("intermediates", "attention_branch", attention_branch)
        return self._joined("middle", self.norm1, x, attention_branch)

    def feed(self, x: Array) -> Array:
        """The FFN layer: x' [B, N, D] -> x+ [B, N, D]."""
        ffn_branch = self.mlp(x if self.post_norm else self.norm2(x), None if self.init_values is None else self.ls2)
        self.sow("intermediates", "ffn_branch", ffn_branch)
        return self._joined("after", self.norm2, x, ffn_branch)

    def _joined(self, name: str, norm: Norm, stream: Array, branch: Array) -> Array:
        joined = stream + branch
        if self.post_norm:
            joined = norm(joined)
            self.sow("intermediates", name, joined)
        return joined


class ViT(nn.Module):
    """Vision Transformer: normalised images [B, H, W, C] -> logits [B, classes], or features [B, D] for no classes.

    `dtype` is the type of the activations (None: of the images). Norms and softmax are computed in float32 at least.
    If the collection `intermediates` is mutable, the blocks sow their arrays, stacked over blocks.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: int | tuple[int, int] = 16  # side, or (height, width)
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000  # 0: no head, the outputs are the pooled features
    qkv_bias: bool = True
    k_bias: bool = True  # whether keys have a bias where `qkv_bias`; EVA's have none
    qk_norm: bool = False  # a norm of queries and of keys, per head
    proj_bias: bool = True
    init_values: float | None = None  # layer scale; None: no layer scale
    class_token: bool = True
    distilled: bool = False
    reg_tokens: int = 0
    pos_embed: str = "learn"  # or "none"
    no_embed_class: bool = False  # position embeddings for patches only
    rope_type: str | None = None  # rotary positions: "cat" (EVA-02) or "dinov3"
    rope_temperature: float = 10_000.0
    ref_feat_shape: tuple[int, int] | None = None  # see `Rope.reference`
    pre_norm: bool = False  # a norm before the first block, and no patch-embedding bias
    global_pool: str = "token"  # "token", "avg", both ("cat"), "map" (attention pooling), or "prefix" (AST's)
    final_norm: bool = True  # a norm after the last block, or after pooling
    fc_norm: bool | None = None  # norm after pooling instead of before; None: if pooling is "avg"
    activation: str = "gelu"
    mlp_layer: str = "mlp"  # see `FeedForward`
    scale_mlp_norm: bool = False  # a norm before the FFN's last linear map
    norm_eps: float = 1e-6
    patch_drop: float = 0.0  # share of patch tokens removed in training (with the rng "patch_drop")
    in_chans: int = 3
    stride: int | tuple[int, int] | None = None  # between patches; smaller if they overlap; None: the patch size
    dtype: Any = None
    linear: Linear = primitives.linear
    unroll: int = 1  # blocks per iteration of the loop: more are faster on a CPU, and compile longer

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (gh, gw)."""
        return self.tiling.grid(self.img_size)

    @property
    def tiling(self) -> Tiling:
        """Height and width of a patch, and the distances between patches."""
        patch, stride = (
            side if isinstance(side, tuple) else (side, side)
            for side in (self.patch_size, self.patch_size if self.stride is None else self.stride)
        )
        return Tiling(patch, stride)

    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and type of a batch of one."""
        return jax.ShapeDtypeStruct((1, *self.img_size, self.in_chans), jnp.float32)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patch tokens: class, distillation, registers."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def readout(self) -> tuple[float, ...]:
        """r0 [N]: the distribution with which the head reads tokens.

        With attention pooling the shares of patches depend on the image; here all are equal.
        """
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
        if self.class_token:
            self.cls_token = self.param("cls_token", trunc_normal, (1, 1, d))
        if self.distilled:
            self.dist_token = self.param("dist_token", trunc_normal, (1, 1, d))
        if self.reg_tokens:
            self.reg_token = self.param("reg_token", trunc_normal, (1, self.reg_tokens, d))
        positions = gh * gw + (0 if self.no_embed_class else self.prefix)
        self.positions = None
        if self.pos_embed == "learn":
            self.positions = self.param("pos_embed", trunc_normal, (1, positions, d))
        if self.pre_norm:
            self.norm_pre = Norm(self.norm_eps)
        scan = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=self.unroll,
        )
        self.blocks = scan(**self._block_fields)
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
        names = (
            ["cls_token"] * self.class_token + ["dist_token"] * self.distilled + ["reg_token"] * bool(self.reg_tokens)
        )
        # Adding zeros of the batch's shape broadcasts under sharding without a collective.
        prefix = [getattr(self, name).astype(x.dtype) + jnp.zeros_like(x[:, :1]) for name in names]
        if self.positions is None:
            x = jnp.concatenate([*prefix, x], axis=1)
        elif self.no_embed_class:
            x = jnp.concatenate([*prefix, x + self.positions.astype(x.dtype)], axis=1)
        else:
            x = jnp.concatenate([*prefix, x], axis=1) + self.positions.astype(x.dtype)
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
        return self._read(pooled, x)

    def read_part(self, tokens: Array, kept: Array, count: int) -> Array:
        """The outputs for embedded tokens [B, N, D] without the patches that are not `kept` [B, n].

        Each sample keeps the same `count` patches.
        """
        places = self.prefix + jnp.flatnonzero(kept[0], size=count)
        shown = jnp.concatenate([tokens[:, : self.prefix], tokens[:, places]], 1)
        return self.classify(self.blocks(shown, None)[0])

    def pool(self, tokens: Array) -> Array:
        """As `classify`, for a model with an attention pool, without the norm before it."""
        return self._read(self.attn_pool(tokens[:, self.prefix :]), tokens)

    def _read(self, pooled: Array, tokens: Array) -> Array:
        """Pooled tokens [B, D], and all tokens [B, N, D] -> logits [B, classes], or features."""
        if self._norms[1]:
            pooled = self.fc_norm_layer(pooled)
        if not self.num_classes:
            return wide(pooled)
        if self.distilled:
            # The mean of two heads, with the factors 1/2 in the weights, so that a residual sum remains.
            first, second = (
                jax.tree.map(lambda a: a / 2, head(self.embed_dim)) for head in (self.head, self.head_dist)
            )
            logits = self.linear(pooled, *first) + self.linear(tokens[:, 1], *second)
        else:
            logits = self.linear(pooled, *self.head(pooled.shape[-1]))
        return wide(logits)

    def _drop_patches(self, x: Array) -> Array:
        """Keep a random subset of each sample's patch tokens (PatchDropout, Liu et al., WACV 2023)."""
        patches = x[:, self.prefix :]
        kept = max(1, round(patches.shape[1] * (1 - self.patch_drop)))
        order = jax.random.uniform(self.make_rng("patch_drop"), patches.shape[:2]).argsort(-1)[:, :kept]
        select = jax.nn.one_hot(order, patches.shape[1], dtype=x.dtype)
        return jnp.concatenate([x[:, : self.prefix], select @ patches], axis=1)


@partial(jax.jit, static_argnums=0)
def init_params(module: Any, key: Array) -> Any:
    """Random float32 parameters of a module such as `ViT` or `Bert`, without other results of `init`."""
    return module.init(key, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), module.example()))["params"]
