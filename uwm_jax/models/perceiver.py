"""Perceiver resampler: any number of tokens to a fixed number (Alayrac et al., 2022, arXiv:2204.14198, section 3.1).

Learned latents attend to the tokens and to themselves, in a few layers of cross-attention and MLP.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models import flops
from uwm_jax.models.activations import constrain
from uwm_jax.models.attention import attend
from uwm_jax.models.initializers import normal, torch_linear
from uwm_jax.models.preln import layer_norm
from uwm_jax.models.products import dot_general
from uwm_jax.models.stack import Stack
from uwm_jax.models.transformer import exact_gelu

Array = jax.Array
EPSILON = 1e-5
MLP_RATIO = 4


class ResamplerLayer(nn.Module):
    """latents += attention(latents; tokens and latents); latents += MLP(latents). No layer has a bias.

    `to_q/kernel` is (D, heads, dim_head), `to_kv/kernel` (D, 2, heads, dim_head) with k, v on its second axis,
    `to_out/kernel` (heads, dim_head, D).
    """

    heads: int
    dim_head: int
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(self, latents: Array, tokens: Array) -> Array:
        """Latents (N, L, D) float32 and tokens (N, T, D) -> latents."""
        d = latents.shape[-1]

        def dense(features: Any, name: str, inputs: int, axis: Any = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis=axis,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=torch_linear(inputs),
                dot_general=dot_general,
                name=name,
            )

        queries = layer_norm(EPSILON, name="norm_latents")(latents)
        inputs = jnp.concatenate([layer_norm(EPSILON, name="norm_media")(tokens), queries], axis=1)
        q = constrain(dense((self.heads, self.dim_head), "to_q", d)(queries), "batch", "length", "heads")
        kv = dense((2, self.heads, self.dim_head), "to_kv", d)(inputs)
        kv = constrain(kv, "batch", "length", None, "heads")
        y = attend(q, kv[:, :, 0], kv[:, :, 1], kind=self.attention)
        y = dense(d, "to_out", self.heads * self.dim_head, axis=(-2, -1))(y)
        latents = constrain(latents + y.astype(jnp.float32), "batch", "length")
        y = layer_norm(EPSILON, name="norm_ff")(latents)
        hidden = constrain(dense(MLP_RATIO * d, "fc1", d)(y), "batch", "length", "hidden")
        y = dense(d, "fc2", MLP_RATIO * d)(exact_gelu(hidden))
        return constrain(latents + y.astype(jnp.float32), "batch", "length")


class Resampler(nn.Module):
    """Tokens (N, T, D) -> (N, num_latents, D) float32.

    Fields:
        num_latents: learned queries, the number of outputs.
        depth, heads, dim_head: layers, and their attention.
        scan, remat: as in `Stack`.
        dtype: of the products.
        attention: one of `attention.KINDS`.
    """

    num_latents: int = 9
    depth: int = 3
    heads: int = 4
    dim_head: int = 128
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: str = "xla"

    def flops(self, tokens: int, width: int) -> float:
        """Operations of the products on `tokens` tokens of `width` channels."""
        inner, latents = self.heads * self.dim_head, self.num_latents
        keys = tokens + latents
        layer = 2 * flops.dense(width, inner, latents) + flops.dense(width, 2 * inner, keys)
        layer += flops.attention(latents, inner, keys) + 2 * flops.dense(width, MLP_RATIO * width, latents)
        return self.depth * layer

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        n, _, d = tokens.shape
        latents = self.param("latents", normal(1.0), (self.num_latents, d))
        tokens = tokens + self.param("media_pos_emb", normal(1.0), (1, 1, d))
        layer = ResamplerLayer(self.heads, self.dim_head, self.dtype, self.attention, parent=None)
        x = jnp.broadcast_to(latents, (n, self.num_latents, d))
        x = Stack(layer, self.depth, self.scan, self.remat, name="layers")(constrain(x, "batch", "length"), tokens)
        return layer_norm(EPSILON, name="norm")(x)
