"""PAD's network: a diffusion transformer over actions and video with one timestep for both.

"Prediction with Action" (Guo et al., 2024), as the authors of "Unified World Models" (Zhu et al., 2025) implement it
for their comparison. The current frames enter as latents: their channels are joined to those of the noisy next frames,
current first. The condition of the AdaLN blocks (`models/transformer.py`) is the embedding of the timestep alone.

A flattened patch has the axes (frame, row, column, channel), channel innermost, in `patch_encoder/kernel`
(pt*ph*pw*2C, D) as in `patch_decoder/kernel` (D, pt*ph*pw*C). Video tokens run over (view, frame, row, column). With
dtype bfloat16 the timestep embedding and the two output projections stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models import flops, patches
from uwm_jax.models.activations import constrain
from uwm_jax.models.adaln import StepConditions, Variant
from uwm_jax.models.initializers import uniform
from uwm_jax.models.transformer import INIT, MLP, BlockStack, Head, dense, sinusoid

Array = jax.Array
Prediction = tuple[dict[str, Array], dict[str, Array]]


class PatchDecoder(nn.Module):
    """Tokens (B, N, D) -> flattened patches (B, N, pt*ph*pw*C) float32, with one bias for each of C channels.

    It equals a transposed convolution whose stride is its kernel, and starts as torch's does: uniform within
    1 / sqrt(pt*ph*pw*C), the bias too.
    """

    patch: tuple[int, int, int]
    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        positions = math.prod(self.patch)
        init = uniform(1 / math.sqrt(positions * self.channels))
        kernel = self.param("kernel", init, (x.shape[-1], positions * self.channels))
        bias = self.param("bias", init, (self.channels,))
        return x @ kernel + jnp.tile(bias, positions)


class PADNet(nn.Module):
    """Predicts, from noisy actions, noisy latents and the current latents, what the diffusion asks for.

    Shapes: `obs_latent` (B, V, T, h, w, C); `noisy` and predictions are {"action": (B, action_len, action_dim),
    "next_obs": (B, V, T, h, w, C)}; `timestep` (B,) integers from 0. At initialisation the action prediction is exactly
    0, and the video's is the bias of the patch decoder.

    `action_mask` (B,) is True for rows that have actions. In the others the learned `pad_tokens` replace the action
    tokens, and no token attends to them. Without it all rows have actions.

    Fields:
        action_dim, action_len: columns and rows of an action chunk.
        latent_shape: (V, T, h, w, C) of the latents of one observation.
        patch: latent frames, rows and columns per video token; must divide (T, h, w).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, remat, attention: as in `BlockStack`; scan_blocks: its `scan`.
        adaln, adaln_rank: the variant of AdaLN (`models/adaln.py`).
        timestep_embed_dim: even, at least 4.
        dtype: of the large products; parameters and outputs are float32.
    """

    action_dim: int
    action_len: int
    latent_shape: tuple[int, ...]
    patch: tuple[int, int, int] = (2, 4, 4)
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4
    qkv_bias: bool = True
    timestep_embed_dim: int = 512
    scan_blocks: bool = True
    remat: str = "none"
    adaln: str = "official"
    adaln_rank: int = 0
    dtype: Any = jnp.float32
    attention: str = "xla"

    def setup(self) -> None:
        d, dtype = self.embed_dim, self.dtype
        num_tokens = self.action_len + patches.count(self.latent_shape, self.patch)
        hidden = 4 * max(self.action_dim, d)
        self.stack = self._stack()
        self.action_encoder = MLP(hidden, d, jax.nn.silu, dtype=dtype)
        self.patch_encoder = dense(d, dtype=dtype)
        self.timestep_embedding = MLP(4 * self.timestep_embed_dim, self.timestep_embed_dim, jax.nn.silu)
        self.pos_embed = self.param("pos_embed", INIT, (1, num_tokens, d))
        self.pad_tokens = self.param("pad_tokens", INIT, (1, self.action_len, d))
        self.head = Head(d, dtype)
        self.action_decoder = MLP(hidden, self.action_dim, jax.nn.silu, dtype=dtype, out_dtype=jnp.float32)
        self.patch_decoder = PatchDecoder(self.patch, self.latent_shape[-1])

    @nn.compact
    def __call__(
        self, obs_latent: Array, noisy: Mapping[str, Array], timestep: Array, action_mask: Array | None = None
    ) -> Prediction:
        """One evaluation, each row at its own timestep.

        Returns the predictions (float32) and intermediates: `tokens` (B, L, D) after the positional table, `hidden`
        (depth, B, L, D) after every block, `final` (B, L, D) after the head; L runs over actions, then video.
        """
        cond = constrain(nn.silu(self._embed(timestep)), "batch")
        blocks = self.stack.params_of(self, cond.shape[-1])
        tokens, keys = self._tokens(obs_latent, noisy, action_mask)
        x, hidden = self.stack(blocks, tokens, cond, keys)
        return self._outputs(x, self.head.row_modulation(cond), {"tokens": tokens, "hidden": hidden})

    def modulation(self, timestep: Array) -> dict[str, Array]:
        """All AdaLN modulations of a sampler at timesteps (S,), the same for all rows, for `predict`.

        Returns {"blocks": (S, depth, 1, 6, D), "head": (S, 1, 2, D)} float32; slice s of both belongs to step s.
        """
        conditions = StepConditions.join(None, self._embed(timestep))
        blocks = self.stack.params_of(self)
        return {"blocks": self.stack.modulation(blocks, conditions), "head": self.head.step_modulation(conditions)}

    def predict(self, obs_latent: Array, noisy: Mapping[str, Array], modulation: Mapping[str, Array]) -> Prediction:
        """`__call__` with one step's slice of `modulation`, for rows that all have actions."""
        tokens, _ = self._tokens(obs_latent, noisy, None)
        x, hidden = self.stack.apply_modulated(self.stack.params_of(self), tokens, modulation["blocks"])
        return self._outputs(x, modulation["head"], {"tokens": tokens, "hidden": hidden})

    def flops(self) -> float:
        """Operations of the products of one evaluation of one sample."""
        d, t, hidden = self.embed_dim, self.timestep_embed_dim, 4 * max(self.action_dim, self.embed_dim)
        video = patches.count(self.latent_shape, self.patch)
        tokens, values = self.action_len + video, math.prod(self.patch) * self.latent_shape[-1]
        total = 2 * MLP(hidden, d, parent=None).flops(self.action_dim, self.action_len)  # the decoder is its mirror
        total += 3 * flops.dense(values, d, video)  # patches of current and noisy frames on the way in
        total += MLP(4 * t, t, parent=None).flops(t)
        total += self._stack().flops(tokens, t)
        return total + Head(d, self.dtype, parent=None).flops(tokens, t)

    def _stack(self) -> BlockStack:
        return BlockStack(
            self.embed_dim,
            self.depth,
            self.num_heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.scan_blocks,
            self.remat,
            self.dtype,
            self.attention,
            Variant(self.adaln, self.adaln_rank),
        )

    def _embed(self, timestep: Array) -> Array:
        return self.timestep_embedding(sinusoid(timestep, self.timestep_embed_dim))

    def _tokens(
        self, obs_latent: Array, noisy: Mapping[str, Array], action_mask: Array | None
    ) -> tuple[Array, Array | None]:
        """Action and video tokens with their positions (B, L, D) float32, and which of them may be attended to (B, L);
        None for all."""
        action, latent = noisy["action"], noisy["next_obs"]
        batch = action.shape[0]
        shapes = (batch, self.action_len, self.action_dim), *((batch, *self.latent_shape),) * 2
        if (action.shape, latent.shape, obs_latent.shape) != shapes:
            raise ValueError(
                f"noisy action, noisy next_obs and obs_latent must have the shapes {', '.join(map(str, shapes))}, "
                f"found {action.shape}, {latent.shape}, {obs_latent.shape}"
            )
        both = jnp.concatenate([obs_latent, latent], axis=-1).astype(self.dtype)
        video = self.patch_encoder(patches.patchify(both, self.patch)).astype(jnp.float32)
        actions = self.action_encoder(action).astype(jnp.float32)
        keys = None
        if action_mask is not None:
            actions = jnp.where(action_mask[:, None, None], actions, self.pad_tokens)
            seen = jnp.broadcast_to(action_mask[:, None], actions.shape[:2])
            keys = jnp.concatenate([seen, jnp.ones(video.shape[:2], bool)], axis=1)
        parts = [constrain(p, "batch", "length") for p in (actions, video)]
        return constrain(jnp.concatenate(parts, axis=1) + self.pos_embed, "batch", "length"), keys

    def _outputs(self, x: Array, head_modulation: Array, intermediates: dict[str, Array]) -> Prediction:
        x = constrain(self.head(x, head_modulation), "batch", "length").astype(jnp.float32)
        video = self.patch_decoder(x[:, self.action_len :])
        pred = {
            "action": self.action_decoder(x[:, : self.action_len]),
            "next_obs": patches.unpatchify(video, self.patch, self.latent_shape),
        }
        return pred, {**intermediates, "final": x}
