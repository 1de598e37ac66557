"""GR-1 (Wu et al., 2023, arXiv:2312.13139) in the form of the UWM paper's baseline: regression, without diffusion.

A ViT and a Perceiver resampler make a few tokens of every current frame. A transformer without positions or causal
mask reads them with learned queries, one for each action and one for each token of the next frames; from its outputs an
MLP makes the action chunk and a small transformer the pixels of the next frames. This differs from the original paper:
both directions attend, actions come as one chunk, the ViT is trained, and there is neither language nor
proprioception.

Parameters (D = embed_dim; kernels are (inputs..., outputs...)):

* `obs_encoder`: `vit` (`models/vit.py`), `resampler` (`models/perceiver.py`), `feat_head`, `patch_head`, and
  `pos_shift`, `pos_scale` (1, V*T, 1, D). `heads` is part of official checkpoints and used by nothing.
* `action_queries` (1, Ta, D), `obs_queries` (1, V*T*(latents + 1), D), `transformer` (`models/stack.py`).
* `action_head`: `fc1`, `fc2`, `fc3`.
* `decoder`: `proj`, `query_token` (1, 1, D), `pos_embed` (1, patches, D; the sin-cos table, never trained), `layers`,
  `norm`, and `head` (D, ph*pw*3), a patch flattened as (row, column, channel).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models import flops, layers
from uwm_jax.models.activations import constrain
from uwm_jax.models.initializers import normal, torch_linear
from uwm_jax.models.patches import unpatchify
from uwm_jax.models.perceiver import Resampler
from uwm_jax.models.preln import Block, Start, layer_norm, normal_start, torch_start
from uwm_jax.models.products import dot_general
from uwm_jax.models.sincos import sincos_table
from uwm_jax.models.stack import Stack
from uwm_jax.models.vit import ViT

Array = jax.Array
HEADS_INPUTS = 768  # columns of the unused `heads`, for any width of the ViT
EPSILON = 1e-5


def _dense(features: int, inputs: int, name: str, dtype: Any = jnp.float32) -> nn.Dense:
    """A linear layer with torch's default initialisation."""
    init = torch_linear(inputs)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, dot_general=dot_general, name=name)


class GR1Encoder(nn.Module):
    """Every frame (B, V, T, H, W, 3) to latents + 1 tokens: (B, V*T*(latents + 1), D) float32.

    Tokens run over (view, frame, token); the first token of a frame comes from the ViT's class token, the others from
    the resampler. The images are ImageNet-normalised.
    """

    vit: ViT
    resampler: Resampler
    embed_dim: int

    @property
    def tokens_per_frame(self) -> int:
        return self.resampler.num_latents + 1

    def flops(self, rows: int, columns: int) -> float:
        """Operations of the products for one frame of `rows` x `columns`."""
        width, tokens = self.vit.width, 1 + rows * columns // self.vit.patch**2
        heads = flops.dense(width, self.embed_dim, self.tokens_per_frame)
        return self.vit.flops(rows, columns) + self.resampler.flops(tokens, width) + heads

    @nn.compact
    def __call__(self, images: Array) -> Array:
        b, v, t, *image = images.shape
        d, width = self.embed_dim, self.vit.width
        self.param("heads", _init_heads, d)
        tokens = self.vit(images.reshape(b * v * t, *image))
        feature = _dense(d, width, "feat_head")(tokens[:, :1])
        patches = _dense(d, width, "patch_head")(self.resampler(tokens))
        x = jnp.concatenate([feature, patches], axis=1).reshape(b, v * t, -1, d)
        scale, shift = (
            self.param(name, nn.initializers.zeros, (1, v * t, 1, d)) for name in ("pos_scale", "pos_shift")
        )
        return constrain((x * (1.0 + scale) + shift).reshape(b, -1, d), "batch", "length")


def _init_heads(key: Array, features: int) -> dict[str, Array]:
    init = torch_linear(HEADS_INPUTS)
    kernel, bias = jax.random.split(key)
    return {"kernel": init(kernel, (HEADS_INPUTS, features)), "bias": init(bias, (features,))}


class ActionHead(nn.Module):
    """(B, Ta, D) -> (B, Ta, action_dim) float32."""

    action_dim: int
    dtype: Any

    def flops(self, actions: int, width: int) -> float:
        """Operations of the products on `actions` tokens of `width` channels."""
        half = width // 2
        hidden = flops.dense(width, half, actions) + flops.dense(half, half, actions)
        return hidden + flops.dense(half, self.action_dim, actions)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        x = nn.silu(_dense(d // 2, d, "fc1", self.dtype)(x))
        x = nn.silu(_dense(d // 2, d // 2, "fc2", self.dtype)(x))
        return _dense(self.action_dim, d // 2, "fc3")(x)


class ImageDecoder(nn.Module):
    """Tokens of an image (N, L, D) -> the image (N, H, W, 3) float32, in ImageNet-normalised units.

    Fields:
        size, patch: (rows, columns) of the image and of its patches.
        layer, depth, scan, remat: of the blocks, as in `Stack`.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    layer: Block
    depth: int
    scan: bool
    remat: str
    dtype: Any
    embed_dim: int

    def table(self) -> np.ndarray:
        """The sin-cos positions (patches, D) of an image."""
        rows, columns = (size // patch for size, patch in zip(self.size, self.patch, strict=True))
        return sincos_table(rows, columns, self.embed_dim)

    def flops(self, tokens: int) -> float:
        """Operations of the products for one image, from `tokens` tokens."""
        d, values = self.embed_dim, 3 * math.prod(self.patch)
        patches = 3 * math.prod(self.size) // values
        blocks = self.depth * self.layer.flops(tokens + patches, d)
        return flops.dense(d, d, tokens) + blocks + flops.dense(d, values, patches)

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        n, _, d = tokens.shape
        x = _dense(d, d, "proj", self.dtype)(tokens).astype(jnp.float32)
        table = self.param("pos_embed", lambda key: jnp.asarray(self.table())[None])
        query = self.param("query_token", nn.initializers.zeros, (1, 1, d)) + jax.lax.stop_gradient(table)
        x = jnp.concatenate([x, jnp.broadcast_to(query, (n, *query.shape[1:]))], axis=1)
        layer = self.layer.clone(parent=None)
        x = Stack(layer, self.depth, self.scan, self.remat, name="layers")(constrain(x, "batch", "length"))
        x = layer_norm(EPSILON, name="norm")(x[:, -query.shape[1] :])
        x = _dense(3 * math.prod(self.patch), d, "head")(x)
        return unpatchify(x, (1, *self.patch), (1, 1, *self.size, 3))[:, 0, 0]


class GR1Network(nn.Module):
    """The whole network: `encode`, then `predict`; `__call__` is both in a row.

    Fields:
        obs_encoder, transformer, action_head, decoder: its parts.
        num_views: cameras.
        action_len: rows of an action chunk.
    """

    obs_encoder: GR1Encoder
    transformer: Stack
    action_head: ActionHead
    decoder: ImageDecoder
    num_views: int
    action_len: int

    def flops(self, frames: int) -> dict[str, float]:
        """Operations of the products of one sample with `frames` current frames in all views: of the observation
        `encoder`, the transformer with the action head (`network`), and the image `decoder`."""
        tokens, d = self.obs_encoder.tokens_per_frame, self.obs_encoder.embed_dim
        length = 2 * frames * tokens + self.action_len
        layer = self.transformer.layer.flops(length, d)
        return {
            "encoder": frames * self.obs_encoder.flops(*self.decoder.size),
            "network": self.transformer.depth * layer + self.action_head.flops(self.action_len, d),
            "decoder": frames * self.decoder.flops(tokens),
        }

    def encode(self, images: Array) -> Array:
        """Normalised current frames (B, V, T, H, W, 3) to tokens (B, V*T*(latents + 1), D) (`GR1Encoder`)."""
        return self.obs_encoder(images)

    @nn.compact
    def predict(self, obs_tokens: Array, action_mask: Array | None = None) -> dict[str, Array]:
        """Actions and next frames.

        Args:
            obs_tokens: (B, n, D) of `encode`.
            action_mask: (B,) boolean; where False, no token attends to the action queries, so that the frames do not
                depend on what is there in place of actions. None: all True.

        Returns:
            {"action": (B, Ta, Da), "next_obs": (B, V, T, H, W, 3)} float32; frames in ImageNet-normalised units.
        """
        b, n, d = obs_tokens.shape
        action_queries = self.param("action_queries", normal(0.02), (1, self.action_len, d))
        obs_queries = self.param("obs_queries", normal(0.02), (1, n, d))
        queries = [jnp.broadcast_to(q, (b, *q.shape[1:])) for q in (action_queries, obs_queries)]
        x = constrain(jnp.concatenate([obs_tokens, *queries], axis=1), "batch", "length")
        mask = None
        if action_mask is not None:
            position = np.arange(x.shape[1])
            is_action = (position >= n) & (position < n + self.action_len)
            mask = action_mask[:, None, None] | ~is_action  # (B, 1, keys): the same for all queries
        x = self.transformer(x, mask)
        frames = self.decoder(x[:, n + self.action_len :].reshape(-1, self.obs_encoder.tokens_per_frame, d))
        return {
            "action": self.action_head(x[:, n : n + self.action_len]),
            "next_obs": frames.reshape(b, self.num_views, -1, *frames.shape[1:]),
        }

    def __call__(self, images: Array, action_mask: Array | None = None) -> dict[str, Array]:
        """`predict` for frames (B, V, T, H, W, 3); `init` through it makes every parameter."""
        return self.predict(self.encode(images), action_mask)


def network_from_config(model: Any, *, action_dim: int, action_len: int, num_views: int, crop: tuple[int, int]) -> Any:
    """The network that `config.model` describes.

    Args:
        model: attributes as in `config.model` of this system.
        action_dim, action_len: shape of an action chunk.
        num_views: cameras.
        crop: (rows, columns) of the images.
    """
    scan = layers.scans_by_default() if model.scan_blocks is None else model.scan_blocks
    common = {"scan": scan, "remat": model.remat, "dtype": jnp.dtype(model.dtype)}
    dtype, d = common["dtype"], model.embed_dim
    encoder, resampler, decoder = model.encoder, model.resampler, model.decoder

    attends = {"attention": model.attention}

    def block(part: Any, start: Start) -> Block:
        sizes = part.num_heads, int(d * part.mlp_ratio)
        return Block(*sizes, EPSILON, part.qkv_bias, start, dtype, **attends, parent=None)

    return GR1Network(
        obs_encoder=GR1Encoder(
            vit=ViT(encoder.patch, encoder.width, encoder.depth, encoder.mlp_dim, **common, **attends),
            resampler=Resampler(
                resampler.num_latents, resampler.depth, resampler.num_heads, resampler.head_dim, **common, **attends
            ),
            embed_dim=d,
        ),
        transformer=Stack(block(model, normal_start), model.depth, scan, model.remat),
        action_head=ActionHead(action_dim, dtype),
        decoder=ImageDecoder(
            tuple(crop), tuple(model.patch), block(decoder, torch_start), decoder.depth, **common, embed_dim=d
        ),
        num_views=num_views,
        action_len=action_len,
    )
