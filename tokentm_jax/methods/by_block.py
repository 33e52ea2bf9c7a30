"""TokenTM block by block: the change of the tokens in each layer, and the growth of the contributions."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.inputs.values import read_out, token_map
from tokentm_jax.maths.primitives import ratio
from tokentm_jax.maths.tokentm import cosine, length, necc, transformation_weight
from tokentm_jax.maths.variants import TokenTM, contributions
from tokentm_jax.programs.capture import capture
from tokentm_jax.programs.model import function_of

OPTIONS = TokenTM()


class Layer(NamedTuple):
    """The change of the patches' tokens in the attention layers, or in the FFNs: [B, L, gh, gw] each."""

    length: Any  # L(x~) / L(x), the ratio of lengths
    necc: Any  # normalised exponential cosine correlation, with mean 1 over all tokens
    weight: Any  # w, the product of both


class ByBlock(NamedTuple):
    """Of a batch, for every block."""

    contribution: Any  # [B, L, gh, gw] heatmap of TokenTM when the blocks up to this one are aggregated
    attention: Layer
    ffn: Layer


def by_block(module: Any, params: Any, inputs: Array, target: Any = None) -> ByBlock:
    """The parts of TokenTM's heatmap by block, with the default options. For `jax.jit`.

    Args:
      module, params, inputs, target: as for `tokentm_jax.capture`; `module` reads images.

    Raises:
      InputError: no Transformer is found in the model.
    """
    model = function_of(module).read(params, inputs)
    trace = capture(model, params, inputs, target, OPTIONS.uses())
    blocks: Any = trace.blocks()

    def maps(rows: Array) -> Array:  # [L, B, N] -> [B, L, gh, gw]
        return jnp.moveaxis(jax.vmap(partial(token_map, model))(rows), 0, 1)

    def layer(original: Array, transformed: Array) -> Layer:  # [L, B, N, D] each
        lengths, direction = ratio(length(transformed), length(original)), necc(cosine(original, transformed))
        return Layer(maps(lengths), maps(direction), maps(transformation_weight(original, transformed)))

    def grown(blocks: Any, rows: Array) -> Array:  # one sample's arrays -> [L, N]
        depth = len(blocks.attention)
        ends = [TokenTM(end_block=end) for end in range(1, depth + 1)]
        return jnp.stack([contributions(blocks, blocks.tokens[0], rows, options) for options in ends])

    rows = jax.vmap(grown, in_axes=(1, 0), out_axes=1)(blocks, read_out(model, None, inputs))
    middle = blocks.tokens + blocks.attention_branch
    return ByBlock(maps(rows), layer(blocks.tokens, blocks.transformed_value), layer(middle, blocks.ffn_branch))
