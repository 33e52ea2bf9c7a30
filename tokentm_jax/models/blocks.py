"""The Transformer block of `ViT`, `Bert` and the text towers, and its parts, in Flax Linen. Axes as in `vit`."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokentm_jax.maths import primitives

Linear = Callable[[Array, Array, Array | None], Array]  # how linear maps are computed
trunc_normal = nn.initializers.truncated_normal(0.02)


class Module(nn.Module):
    """A Linen module that reads known parameters without tracing their initialisers, which takes longer."""

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            if arguments and getattr(value, "shape", None) == arguments[0]:  # the shape, in all modules here
                return value
        return super().param(name, init_fn, *arguments, **options)  # which makes it, or raises


class Affine(Module):
    """Parameters of a linear map; `primitives.linear` does the arithmetic."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", trunc_normal, (inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        return kernel, bias


class Norm(Module):
    """LayerNorm with learned scale and bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        return primitives.norm(x, scale, bias, self.eps)


class LayerScale(Module):
    """Per-channel gain of a branch, in the linear map before it, so that a residual sum follows the map."""

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
    both = np.tile(angles, 2) if rope.half else angles.repeat(2, -1)
    signs = sign.repeat(width // 2) if rope.half else np.tile(sign, width // 2)
    return np.cos(both).astype(np.float32), (np.sin(both) * signs).astype(np.float32)


class Attention(Module):
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
            tables = [jnp.asarray(table) for table in rotation(self.rope, d // h)]
            query, key = (primitives.rotate(x, *tables, half=self.rope.half) for x in (query, key))
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
            transformed_value = jnp.moveaxis(value, 1, 2).reshape(b, n, d) @ kernel.astype(x.dtype)
            _sow_all(self, attention=attention, value=value, transformed_value=transformed_value)
            _sow_all(self, value_kernel=projections[:, 2 * d :], output_kernel=kernel)
        if mask is not None:  # these are zero already; now their gradient is zero as well
            attention = jnp.where(mask[:, None, None], attention, 0)
        return self.linear(primitives.mix(attention, value), kernel, bias)


class FeedForward(Module):
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


class AttentionPool(Module):
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


class Block(Module):
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
        scales = (None, None) if self.init_values is None else (self.ls1, self.ls2)
        normalised = x if self.post_norm else self.norm1(x)
        attention_branch = self.attn(normalised, scales[0], mask)
        middle = x + attention_branch
        if self.post_norm:
            middle = self.norm1(middle)
        ffn_branch = self.mlp(middle if self.post_norm else self.norm2(middle), scales[1])
        after = middle + ffn_branch
        if self.post_norm:
            after = self.norm2(after)
            _sow_all(self, middle=middle, after=after)
        _sow_all(self, tokens=x, normalised=normalised, attention_branch=attention_branch, ffn_branch=ffn_branch)
        return after, None


def _sow_all(module: nn.Module, **arrays: Array) -> None:
    for name, array in arrays.items():
        module.sow("intermediates", name, array)


def scanned(depth: int, fields: Mapping[str, Any], unroll: int = 1, name: str | None = None) -> Any:
    """`depth` blocks as one loop, whose parameters and sown arrays are stacked."""
    axes: Any = {"params": 0, "intermediates": 0}
    rngs: Any = {"params": True}
    shared: Any = nn.broadcast  # the mask
    scan = nn.scan(Block, variable_axes=axes, split_rngs=rngs, in_axes=shared, length=depth, unroll=unroll)
    return scan(**fields, name=name)
