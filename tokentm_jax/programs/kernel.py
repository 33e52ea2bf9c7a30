"""Attention that never writes its weights to memory, forward and backward, with the row of TokenTM and GAE: Pallas.

All functions are for one head; `jax.vmap` makes heads and batches. Q queries, K keys, E channels of a head. With the
weights A and the gradient G of the logit at them, `part_k = sum over q of row_q relu(A_qk G_qk)` is what one head
gives to the keys: the mean of it over heads is `r Ā` of `maths.tokentm`.

    S = scale q kᵀ + bias,    A = exp(S - logsumexp),    tokens = A v
    G = dtokens vᵀ,    dS = A ⊙ (G - (dtokens ⊙ tokens) 1),    dq = scale dS k,    dk = scale dSᵀ q,    dv = Aᵀ dtokens

Three kernels: forward, and backward by blocks of queries (dq) and by blocks of keys (dk, dv, part). Each keeps one
block in registers and goes over the tiles of the other side, so that A, G and dS exist for one tile only
(FlashAttention, Dao et al., 2022). Tiles are [keys, queries]: numbers of queries then are rows [1, Q], which a TPU
stores without padding.

The kernels are for NVIDIA GPUs (Triton) and TPUs (Mosaic). On other devices the same results come from the plain form.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from tokentm_jax.maths.primitives import wide

TOKENS = "tokens of attention"  # name of the results that the backward pass reads, for policies of `jax.checkpoint`

CUDA_TILE = 64  # keys or queries; half of it for heads of more than 64 channels, for the shared memory of an SM
CUDA_LEAST = 16  # keys, queries or channels in a product of Triton
TPU_TILE = 128  # keys or queries: lanes of a TPU's registers
VMEM_BYTES = 64 * 2**20  # that a kernel may use; a v5e has 128 MiB
TPU_BYTES = 56 * 2**20  # of these, for two arrays of one head and a part of the bias


class Tile(NamedTuple):
    """How a head is cut for one kind of device."""

    size: int  # queries or keys of a block
    channels: int  # of a head, with padding
    params: Any = None  # of Pallas's compiler
    interpret: bool = False  # run the kernel's steps as JAX, on any device


def cuda_tile(queries: int, keys: int, channels: int) -> Tile:
    """Sides are powers of two, of at least 16, as Triton needs them."""
    from jax.experimental.pallas import triton

    width = max(CUDA_LEAST, _power_of_two(channels))
    largest = CUDA_TILE if width <= 64 else CUDA_TILE // 2
    size = min(largest, max(CUDA_LEAST, _power_of_two(max(queries, keys))))
    return Tile(size, width, triton.CompilerParams(num_warps=4, num_stages=2))


def tpu_tile(queries: int, keys: int, channels: int, bytes_each: int) -> Tile | None:
    """Tiles of 128 x 128; None if the arrays of one head are too large for VMEM."""
    from jax.experimental.pallas import tpu

    lanes = -(-channels // TPU_TILE) * TPU_TILE
    rows = -(-max(queries, keys) // TPU_TILE) * TPU_TILE
    held = 2 * rows * (2 * lanes * bytes_each + TPU_TILE * 4)  # two whole arrays and a bias, each in two buffers
    if held > TPU_BYTES:
        return None
    return Tile(TPU_TILE, channels, tpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ---- the plain form -------------------------------------------------------------------------------------------------


def _plain_weights(q: Array, k: Array, bias: Array | None, scale: float) -> tuple[Array, Array]:
    """A [Q, K] and logsumexp [Q], in float32 at least."""
    scores = jnp.einsum("qe,ke->qk", wide(q), wide(k)) * scale
    scores = scores if bias is None else scores + bias
    logsumexp = jax.nn.logsumexp(scores, axis=-1)
    return jnp.exp(scores - logsumexp[:, None]), logsumexp


def plain_forward(
    q: Float[Array, "Q E"],
    k: Float[Array, "K E"],
    v: Float[Array, "K E"],
    bias: Float[Array, "Q K"] | None,
    scale: float,
) -> tuple[Float[Array, "Q E"], Float[Array, " Q"]]:
    """The tokens and logsumexp of one head, as `forward`, with arrays [Q, K]."""
    attention, logsumexp = _plain_weights(q, k, bias, scale)
    return (attention @ wide(v)).astype(q.dtype), logsumexp


def plain_backward(
    q: Float[Array, "Q E"],
    k: Float[Array, "K E"],
    v: Float[Array, "K E"],
    bias: Float[Array, "Q K"] | None,
    tokens: Float[Array, "Q E"],
    logsumexp: Float[Array, " Q"],
    dtokens: Float[Array, "Q E"],
    row: Float[Array, " Q"],
    scale: float,
) -> tuple[Float[Array, "Q E"], Float[Array, "K E"], Float[Array, "K E"], Float[Array, " K"]]:
    """dq, dk, dv and part of one head, as `backward`, with arrays [Q, K]."""
    attention, _ = _plain_weights(q, k, bias, scale)
    gradient = jnp.einsum("qe,ke->qk", wide(dtokens), wide(v))
    product = attention * gradient
    dscores = scale * (product - attention * product.sum(-1, keepdims=True))
    part = row @ jax.nn.relu(product).astype(row.dtype)
    dq, dk, dv = dscores @ wide(k), dscores.T @ wide(q), attention.T @ wide(dtokens)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), part


# ---- kernels --------------------------------------------------------------------------------------------------------
# References of one block, of all of another side, and of results. Products sum in float32.


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    contracted = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _scores(key: Array, query: Array, bias: Array | None, scale: float, start: Any, keys: int | None) -> Array:
    """S [keys, queries] of a tile whose keys are numbered from `start`; -inf for padding, from number `keys` on."""
    scores = _dot(key, query, 1, 1) * scale
    if bias is not None:
        scores += bias
    if keys is None:
        return scores
    number = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where(number < keys, scores, -jnp.inf)


def _over_tiles(count: int, size: int, body: Callable[[Any, Any, Any], Any], start: Any) -> Any:
    """`body(slice of a tile, its start, carry)` over all tiles."""
    from jax.experimental import pallas as pl

    def turn(i: Any, carry: Any) -> Any:
        first = pl.multiple_of(i * size, size)
        return body(pl.ds(first, size), first, carry)

    return jax.lax.fori_loop(0, count, turn, start)


def _forward_kernel(*refs: Any, biased: bool, scale: float, size: int, keys: int | None) -> None:
    """By queries: tokens and logsumexp, in one pass over the keys whose sums are rescaled when the maximum grows."""
    q, k, v, *bias, tokens, logsumexp = refs
    query = q[...]
    columns = (1, query.shape[0])

    def tile(of: Any, first: Any, carry: Any) -> Any:
        highest, total, mixed = carry
        scores = _scores(k[of, :], query, bias[0][of, :] if biased else None, scale, first, keys)
        higher = jnp.maximum(highest, scores.max(0, keepdims=True))
        weights, shrunk = jnp.exp(scores - higher), jnp.exp(highest - higher)
        value = v[of, :]
        mixed = mixed * shrunk + _dot(value, weights.astype(value.dtype), 0, 0)
        return higher, total * shrunk + weights.sum(0, keepdims=True), mixed

    lowest = jnp.full(columns, jnp.finfo(jnp.float32).min, jnp.float32)
    start = (lowest, jnp.zeros(columns, jnp.float32), jnp.zeros(query.shape[::-1], jnp.float32))
    highest, total, mixed = _over_tiles(k.shape[0] // size, size, tile, start)
    tokens[...] = (mixed / total).T.astype(tokens.dtype)
    logsumexp[...] = highest + jnp.log(total)


def _queries_kernel(*refs: Any, biased: bool, scale: float, size: int, keys: int | None) -> None:
    """By queries: dq."""
    q, k, v, *bias, dtokens, logsumexp, share, dq = refs
    query, dtoken, normaliser, mean = q[...], dtokens[...], logsumexp[...], share[...]

    def tile(of: Any, first: Any, total: Array) -> Array:
        key = k[of, :]
        scores = _scores(key, query, bias[0][of, :] if biased else None, scale, first, keys)
        dscores = jnp.exp(scores - normaliser) * (_dot(v[of, :], dtoken, 1, 1) - mean)
        return total + _dot(dscores.astype(key.dtype), key, 0, 0)

    total = _over_tiles(k.shape[0] // size, size, tile, jnp.zeros(query.shape, jnp.float32))
    dq[...] = (total * scale).astype(dq.dtype)


def _keys_kernel(*refs: Any, biased: bool, scale: float, size: int, keys: int | None) -> None:
    """By keys: dk, dv and part."""
    from jax.experimental import pallas as pl

    q, k, v, *bias, dtokens, logsumexp, share, row, dk, dv, part = refs
    key, value = k[...], v[...]
    own = pl.program_id(0) * size

    def tile(of: Any, first: Any, carry: Any) -> Any:
        to_key, to_value, given = carry
        query, dtoken = q[of, :], dtokens[of, :]
        scores = _scores(key, query, bias[0][:, of] if biased else None, scale, own, keys)
        attention, gradient = jnp.exp(scores - logsumexp[:, of]), _dot(value, dtoken, 1, 1)
        dscores = attention * (gradient - share[:, of])
        to_key += _dot(dscores.astype(query.dtype), query, 1, 0)
        to_value += _dot(attention.astype(dtoken.dtype), dtoken, 1, 0)
        given += (jnp.maximum(attention * gradient, 0) * row[:, of]).sum(1, keepdims=True)
        return to_key, to_value, given

    zeros = jnp.zeros(key.shape, jnp.float32)
    start = (zeros, zeros, jnp.zeros((size, 1), jnp.float32))
    to_key, to_value, given = _over_tiles(q.shape[0] // size, size, tile, start)
    dk[...], dv[...] = (to_key * scale).astype(dk.dtype), to_value.astype(dv.dtype)
    part[...] = given.T


def _padded(x: Array, *sides: int) -> Array:
    return jnp.pad(x, [(0, after - before) for before, after in zip(x.shape, sides, strict=True)])


class _Cut(NamedTuple):
    """The arrays of a head with padding, and how kernels read them."""

    tile: Tile
    queries: int
    keys: int
    scale: float

    def side(self, n: int) -> int:
        return -(-n // self.tile.size) * self.tile.size

    def arrays(self, q: Array, k: Array, v: Array, bias: Array | None) -> list[Array]:
        rows, columns = self.side(self.queries), self.side(self.keys)
        own = [self.tokens(q), _padded(k, columns, self.tile.channels), _padded(v, columns, self.tile.channels)]
        return own if bias is None else [*own, _padded(wide(bias).T, columns, rows)]

    def tokens(self, x: Array) -> Array:
        return _padded(x, self.side(self.queries), self.tile.channels)

    def row(self, x: Array) -> Array:
        """Numbers of queries [Q] as [1, Q] with padding."""
        return _padded(x.astype(jnp.float32)[None], 1, self.side(self.queries))

    def run(self, kernel: Callable[..., None], given: list[Array], names: str, results: str, kinds: list[Any]) -> Any:
        """A kernel over its blocks. Names of arrays: "q" rows of queries, "k" rows of keys, "b" bias, "r" numbers of
        queries, "p" numbers of keys; capital letters are read whole, small ones by blocks."""
        from jax.experimental import pallas as pl

        rows, columns, (size, channels, *_) = self.side(self.queries), self.side(self.keys), self.tile
        by_queries = "q" in names
        shapes = {
            "q": (rows, channels),
            "k": (columns, channels),
            "b": (columns, rows),
            "r": (1, rows),
            "p": (1, columns),
        }

        def spec(name: str) -> Any:
            shape, small = shapes[name.lower()], name.islower()
            axis = {"q": 0, "k": 0, "b": int(by_queries), "r": 1, "p": 1}[name.lower()]
            block = tuple(size if small and i == axis else side for i, side in enumerate(shape))
            return pl.BlockSpec(block, lambda i: tuple(i if small and a == axis else 0 for a in range(2)))

        masked = None if columns == self.keys else self.keys
        options = {"biased": "b" in names, "scale": self.scale, "size": size, "keys": masked}
        return pl.pallas_call(
            partial(kernel, **options),
            [jax.ShapeDtypeStruct(shapes[name], kind) for name, kind in zip(results, kinds, strict=True)],
            grid=((rows if by_queries else columns) // size,),
            in_specs=[spec(name) for name in names],
            out_specs=[spec(name) for name in results],
            compiler_params=self.tile.params,
            interpret=self.tile.interpret,
        )(*given)


def forward(
    q: Float[Array, "Q E"],
    k: Float[Array, "K E"],
    v: Float[Array, "K E"],
    bias: Float[Array, "Q K"] | None,
    scale: float,
    tile: Tile,
) -> tuple[Float[Array, "Q E"], Float[Array, " Q"]]:
    """Attention of one head in a kernel.

    Args:
      q, k, v: queries, keys and values, of one type.
      bias: what is added to the scores after their scale, such as a mask of large negative numbers; None: nothing.
      scale: of the scores.
      tile: for the device.

    Returns:
      The tokens, and the logsumexp of the scores in float32.
    """
    cut = _Cut(tile, len(q), len(k), scale)
    names = "qKKb" if bias is not None else "qKK"
    arrays = cut.arrays(q, k, v, bias)
    tokens, logsumexp = cut.run(_forward_kernel, arrays, names, "qr", [q.dtype, jnp.float32])
    return tokens[: len(q), : v.shape[1]], logsumexp[0, : len(q)]


def backward(
    q: Float[Array, "Q E"],
    k: Float[Array, "K E"],
    v: Float[Array, "K E"],
    bias: Float[Array, "Q K"] | None,
    tokens: Float[Array, "Q E"],
    logsumexp: Float[Array, " Q"],
    dtokens: Float[Array, "Q E"],
    row: Float[Array, " Q"],
    scale: float,
    tile: Tile,
) -> tuple[Float[Array, "Q E"], Float[Array, "K E"], Float[Array, "K E"], Float[Array, " K"]]:
    """The backward pass of `forward` in two kernels, with what the row gives to the keys.

    Args:
      q, k, v, bias, scale, tile: as for `forward`.
      tokens, logsumexp: what it returned.
      dtokens: gradient of the logit at the tokens.
      row: r of the queries.

    Returns:
      Gradients dq, dk and dv, and `part_k = sum over q of row_q relu(A_qk G_qk)` in float32.
    """
    cut = _Cut(tile, len(q), len(k), scale)
    share = (wide(dtokens) * wide(tokens)).sum(-1)  # of every query: sum over k of A G
    given = [*cut.arrays(q, k, v, bias), cut.tokens(dtokens), cut.row(logsumexp), cut.row(share)]
    b = "b" * (bias is not None)
    (dq,) = cut.run(_queries_kernel, given, f"qKK{b}qrr", "q", [q.dtype])
    kinds = [k.dtype, v.dtype, jnp.float32]
    dk, dv, part = cut.run(_keys_kernel, [*given, cut.row(row)], f"Qkk{b}QRRR", "kkp", kinds)
    width = q.shape[1]
    return dq[: len(q), :width], dk[: len(k), :width], dv[: len(k), : v.shape[1]], part[0, : len(k)]


# ---- attention with a row -------------------------------------------------------------------------------------------


def _by_device(plain: Callable[..., Any], kernel: Callable[..., Any], *arrays: Any, scale: float) -> Any:
    """The kernel on a GPU or TPU, and the plain form on other devices or where the kernel does not fit."""
    q, k, v = arrays[:3]
    width, shared = max(q.shape[-1], v.shape[-1]), {q.dtype, k.dtype, v.dtype}
    simple = partial(plain, scale=scale)
    if len(shared) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return simple(*arrays)
    sides = len(q), len(k), width
    on_tpu = tpu_tile(*sides, q.dtype.itemsize)
    tiles = {"cuda": cuda_tile(*sides), "tpu": None if q.dtype == jnp.float16 else on_tpu}
    own = {name: partial(kernel, scale=scale, tile=tile) for name, tile in tiles.items() if tile is not None}
    return jax.lax.platform_dependent(*arrays, default=simple, **own)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_with_row(
    scale: float,
    q: Float[Array, "Q E"],
    k: Float[Array, "K E"],
    v: Float[Array, "K E"],
    bias: Float[Array, "Q K"] | None,
    u: Float[Array, " K"],
) -> tuple[Float[Array, "Q E"], Float[Array, " Q"]]:
    """The tokens of one head, and zeros that are added to a stream u of zeros, as `maths.variants.attention_layer`.

    Backward, the cotangent of the tokens is their gradient, and that of the zeros is a row r of the queries. That of u
    becomes `sum over q of r_q relu(A_qk G_qk)`. The bias gets none.
    """
    return _forward_rule(scale, q, k, v, bias, u)[0]


def _forward_rule(scale: float, q: Array, k: Array, v: Array, bias: Array | None, u: Array) -> tuple[Any, ...]:
    found = _by_device(plain_forward, forward, q, k, v, bias, scale=scale)
    tokens, logsumexp = (checkpoint_name(x, TOKENS) for x in found)
    zeros = jnp.broadcast_to(u[:1], len(q))  # of this head: without u, all heads would share them, and their cotangent
    return (tokens, zeros), (q, k, v, bias, tokens, logsumexp)


def _backward_rule(scale: float, saved: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    dtokens, row = cotangents
    dq, dk, dv, part = _by_device(plain_backward, backward, *saved, dtokens, row, scale=scale)
    return dq, dk, dv, None, part.astype(row.dtype)


attention_with_row.defvjp(_forward_rule, _backward_rule)
