"""Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929), as torchvision builds it, without a classifier."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models import flops
from uwm_jax.models.activations import constrain
from uwm_jax.models.initializers import normal, torch_linear, xavier_uniform
from uwm_jax.models.patches import patchify
from uwm_jax.models.preln import Block, Initializer, layer_norm
from uwm_jax.models.products import dot_general
from uwm_jax.models.stack import Stack

Array = jax.Array
HEAD_WIDTH = 64  # of all torchvision's ViTs
EPSILON = 1e-6


def torchvision_start(layer: str, inputs: int) -> tuple[Initializer, Initializer]:
    """torchvision's initialisation of a ViT's blocks."""
    zeros = nn.initializers.zeros
    if layer == "proj":
        return torch_linear(inputs), zeros
    return xavier_uniform, zeros if layer == "qkv" else normal(1e-6)


class ViT(nn.Module):
    """Normalised images (N, H, W, 3) -> tokens (N, 1 + patches, width) float32 after the last LayerNorm.

    The first token is the class token; patches follow in row-major order. `conv_proj/kernel` is
    (patch*patch*3, width), a patch flattened as (row, column, channel).

    Fields:
        patch: rows and columns of a patch; must divide H and W.
        width: channels of a token, a multiple of 64, the width of a head.
        depth, mlp_dim: blocks, and hidden units of their MLPs.
        scan, remat: as in `Stack`.
        dtype: of the products.
        attention: one of `attention.KINDS`.
    """

    patch: int = 32
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: str = "xla"

    def flops(self, rows: int, columns: int) -> float:
        """Operations of the products for one image of `rows` x `columns`."""
        patches = rows * columns // self.patch**2
        blocks = self.depth * self._block().flops(1 + patches, self.width)
        return flops.dense(3 * self.patch**2, self.width, patches) + blocks

    @nn.compact
    def __call__(self, images: Array) -> Array:
        if self.width <= 0 or self.width % HEAD_WIDTH:
            raise ValueError(f"the ViT's width must be a positive multiple of {HEAD_WIDTH}, found {self.width}")
        if any(n % self.patch for n in images.shape[1:3]):
            raise ValueError(f"the ViT's patch {self.patch} must divide the images' size {images.shape[1:3]}")
        patches = patchify(images[:, None, None], (1, self.patch, self.patch))
        start = normal(math.sqrt(1 / patches.shape[-1]))
        project = nn.Dense(self.width, dtype=self.dtype, kernel_init=start, dot_general=dot_general, name="conv_proj")
        tokens = project(patches.astype(self.dtype)).astype(jnp.float32)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        tokens = jnp.concatenate([jnp.broadcast_to(first, (len(images), 1, self.width)), tokens], axis=1)
        x = tokens + self.param("pos_embedding", normal(0.02), (1, *tokens.shape[1:]))
        x = Stack(self._block(), self.depth, self.scan, self.remat, name="encoder")(constrain(x, "batch", "length"))
        return layer_norm(EPSILON, name="ln")(x)

    def _block(self) -> Block:
        return Block(
            num_heads=self.width // HEAD_WIDTH,
            mlp_dim=self.mlp_dim,
            epsilon=EPSILON,
            start=torchvision_start,
            dtype=self.dtype,
            attention=self.attention,
            parent=None,
        )
