"""A decoder that sees an image: PaliGemma, Gemma 3, and the project's small model of scenes, by options.

Axes as in `decoder`, and n patches, of which each `pool` x `pool` square is one token of the image.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tokentm_jax.inputs.prompts import IMAGE, Prompts
from tokentm_jax.inputs.texts import Texts, Tokens
from tokentm_jax.models.blocks import Affine
from tokentm_jax.models.decoder import Decoder, NextWord, RMSNorm
from tokentm_jax.models.vit import ViT


class VisionDecoder(Decoder):
    """Vision-language model: `Prompts` -> logits [B, N, V] of the word piece that follows each token.

    The last tokens of a ViT's patches pass through a linear map, and are the embeddings of the prompt's tokens of the
    type `IMAGE`. So images and words are `Texts` for the decoder, which does the rest. With `together=(IMAGE, PROMPT)`
    the tokens of image and prompt attend to each other, as in PaliGemma; with `(IMAGE,)` those of the image, as in
    Gemma 3.
    """

    vision: ViT = ViT()  # no class token, no head: its tokens are read by `patch_tokens`
    pool: int = 1  # side of the square of patches whose mean is a token
    project_norm: float | None = None  # epsilon of a norm before the projection; None: no norm
    project_bias: bool = True

    @property
    def image_grid(self) -> tuple[int, int]:
        """Height and width of an image in tokens."""
        gh, gw = self.vision.grid
        return gh // self.pool, gw // self.pool

    def example(self) -> Prompts:
        """Shapes and types of a batch of one."""
        n = self.image_grid[0] * self.image_grid[1] + 2
        ids, flags = (jax.ShapeDtypeStruct((1, n), kind) for kind in (jnp.int32, jnp.bool_))
        return Prompts(self.vision.example(), Tokens(ids, flags, ids, flags))

    def setup(self) -> None:
        super().setup()
        if self.project_norm is not None:
            self.norm_project = RMSNorm(self.project_norm)
        self.project = Affine(self.embed_dim, self.project_bias)

    def look_up(self, tokens: Tokens | Prompts) -> Texts:
        """Word pieces -> their embeddings, and the image's tokens at their places; NaN for an unknown id."""
        given: Any = tokens
        if not hasattr(given, "images"):
            return super().look_up(given)
        return self.placed(given.tokens, self.image_tokens(given.images))

    def placed(self, words: Tokens, image: Array) -> Texts:
        """Word pieces [B, N] and the tokens of an image each, [B, K, D], as texts: the k-th token of the image is at
        the k-th place of its type."""
        shown = words.types == IMAGE
        places = jnp.clip(jnp.cumsum(shown, 1) - 1, 0, image.shape[1] - 1)
        own = jnp.take_along_axis(image, places[..., None], 1)
        text = super().look_up(words._replace(ids=jnp.where(shown, 0, words.ids)))
        return text._replace(
            embeddings=jnp.where(shown[..., None], own.astype(text.embeddings.dtype), text.embeddings)
        )

    def image_tokens(self, images: Array) -> Array:
        """Normalised images [B, H, W, C] -> their tokens [B, n / pool^2, D], as embeddings."""
        return self.projected(self.patch_tokens(images))

    def patch_tokens(self, images: Array) -> Array:
        """Normalised images [B, H, W, C] -> the tower's tokens [B, n, width of the tower]."""
        found = self.vision.patch_tokens(images.astype(self.dtype or images.dtype))
        assert isinstance(found, jax.Array)
        return found

    def projected(self, x: Array) -> Array:
        """The tower's tokens [B, n, width of the tower] -> the image's [B, n / pool^2, D], as embeddings."""
        if self.pool > 1:
            b, _, d = x.shape
            gh, gw = self.image_grid
            x = x.reshape(b, gh, self.pool, gw, self.pool, d).mean((2, 4)).reshape(b, gh * gw, d)
        if self.project_norm is not None:
            x = self.norm_project(x)
        x = self.linear(x, *self.project(x.shape[-1]))
        return x if self.embed_scale == 1 else x / self.embed_scale  # images are not scaled as words are


class NextSeenWord(NextWord, VisionDecoder):
    """The same model as a classifier: `Prompts` -> logits [B, V] of the word piece that follows each prompt."""
