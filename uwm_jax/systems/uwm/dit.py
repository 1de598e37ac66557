"""The noise-prediction network: a diffusion transformer over action tokens, video patches and registers.

Every block is modulated by (observation features, embedding of the two timesteps) through AdaLN-zero, with one timestep
for each modality as in "Unified World Models" (Zhu et al., 2025).

The blocks and their parameters are those of `models/transformer.py`, with the condition [observation features |
timestep embedding]. A flattened patch has the axes (frame, row, column, channel), channel innermost, in
`patch_encoder/kernel` (pt*ph*pw*C, D) as in `patch_decoder/kernel` (D, pt*ph*pw*C). Video tokens run over (view, frame,
row, column). With dtype bfloat16 the timestep embedding and the two output projections stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models import flops, patches
from uwm_jax.models.activations import constrain
from uwm_jax.models.adaln import StepConditions, Variant
from uwm_jax.models.transformer import INIT, MLP, BlockStack, Head, dense, sinusoid

Array = jax.Array


class DiT(nn.Module):
    """Predicts, from noisy actions and noisy latents, what the diffusion of each modality asks for.

    Shapes: `noisy` and predictions are {"action": (B, action_len, action_dim), "next_obs": (B, V, T, h, w, C)};
    timesteps are {"action": (B,), "next_obs": (B,)} integers from 0; `global_cond` (B, F) are the observation
    features. At initialisation both predictions are exactly 0.

    Fields:
        action_dim, action_len: columns and rows of an action chunk.
        latent_shape: (V, T, h, w, C) of the next observation's latents.
        patch: latent frames, rows and columns per video token; must divide (T, h, w).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the blocks.
        num_registers: learned tokens without an output of their own.
        timestep_embed_dim: width of the joint embedding of both timesteps; even, at least 4.
        scan_blocks, remat, attention: as `scan`, `remat` and `attention` of `BlockStack`.
        adaln, adaln_rank: the variant of AdaLN (`models/adaln.py`).
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
    num_registers: int = 8
    timestep_embed_dim: int = 512
    scan_blocks: bool = True
    remat: str = "none"
    adaln: str = "official"
    adaln_rank: int = 0
    dtype: Any = jnp.float32
    attention: str = "xla"

    @property
    def num_video_tokens(self) -> int:
        return patches.count(self.latent_shape, self.patch)

    @property
    def num_tokens(self) -> int:
        return self.action_len + self.num_video_tokens + self.num_registers

    def flops(self, num_features: int) -> float:
        """Operations of the products of one evaluation of one sample with `num_features` observation features."""
        d, t, hidden = self.embed_dim, self.timestep_embed_dim, 4 * max(self.action_dim, self.embed_dim)
        cond, patch_values = num_features + t, int(np.prod(self.patch)) * self.latent_shape[-1]
        action_encoder = MLP(hidden, d, parent=None).flops(self.action_dim, self.action_len)
        total = 2 * action_encoder  # the decoder is its mirror, and so is that of the patches
        total += 2 * flops.dense(patch_values, d, self.num_video_tokens)
        total += MLP(4 * t, t, parent=None).flops(2 * t)
        total += self._stack().flops(self.num_tokens, cond)
        return total + Head(d, self.dtype, parent=None).flops(self.num_tokens, cond)

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

    def setup(self) -> None:
        d, dtype = self.embed_dim, self.dtype
        self.stack = self._stack()
        hidden = 4 * max(self.action_dim, d)
        patch_values = int(np.prod(self.patch)) * self.latent_shape[-1]
        self.action_encoder = MLP(hidden, d, dtype=dtype)
        self.patch_encoder = dense(d, dtype=dtype)
        self.timestep_embedding = MLP(4 * self.timestep_embed_dim, self.timestep_embed_dim)
        if self.num_registers:
            self.registers = self.param("registers", INIT, (1, self.num_registers, d))
        self.pos_embed = self.param("pos_embed", INIT, (1, self.num_tokens, d))
        self.head = Head(d, dtype)
        self.action_decoder = MLP(hidden, self.action_dim, dtype=dtype, out_dtype=jnp.float32)
        self.patch_decoder = dense(patch_values, dtype=jnp.float32)

    @nn.compact
    def __call__(
        self, global_cond: Array, noisy: Mapping[str, Array], timestep: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """One evaluation, each row at its own timesteps.

        Returns the predictions (float32) and intermediates: `tokens` (B, L, D) after the positional table,
        `hidden` (depth, B, L, D) after every block, `final` (B, L, D) after the head; L runs over actions, video,
        registers. What is not used costs nothing under jit.
        """
        time = constrain(self._embed_timestep(timestep), "batch")
        cond = jnp.concatenate([global_cond.astype(jnp.float32), time], axis=-1)
        cond = constrain(nn.silu(cond), "batch")
        blocks, tokens = self.stack.params_of(self, cond.shape[-1]), self._tokens(noisy)
        x, hidden = self.stack(blocks, tokens, cond)
        return self._outputs(x, self.head.row_modulation(cond), {"tokens": tokens, "hidden": hidden})

    def modulation(self, global_cond: Array, timestep: Mapping[str, Array]) -> dict[str, Array]:
        """All AdaLN modulations of a sampler at once, for `predict`.

        Args:
            global_cond: (B, F).
            timestep: {"action": (S,), "next_obs": (S,)} integers, the same for all rows of the batch.

        Returns:
            {"blocks": (S, depth, B, 6, D), "head": (S, B, 2, D)} float32; slice s of both belongs to step s.
        """
        conditions = StepConditions.join(global_cond, self._embed_timestep(timestep))
        blocks = self.stack.params_of(self)
        return {
            "blocks": self.stack.modulation(blocks, conditions),
            "head": self.head.step_modulation(conditions),
        }

    def predict(
        self, noisy: Mapping[str, Array], modulation: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """`__call__` with one step's slice of `modulation`: {"blocks": (depth, B, 6, D), "head": (B, 2, D)}."""
        tokens = self._tokens(noisy)
        x, hidden = self.stack.apply_modulated(self.stack.params_of(self), tokens, modulation["blocks"])
        return self._outputs(x, modulation["head"], {"tokens": tokens, "hidden": hidden})

    def _embed_timestep(self, timestep: Mapping[str, Array]) -> Array:
        dim = self.timestep_embed_dim
        both = [sinusoid(timestep["action"], dim), sinusoid(timestep["next_obs"], dim)]
        return self.timestep_embedding(jnp.concatenate(both, axis=-1))

    def _tokens(self, noisy: Mapping[str, Array]) -> Array:
        """Action, video and register tokens with their positions: (B, L, D) float32."""
        action, latent = noisy["action"], noisy["next_obs"]
        batch = action.shape[0]
        expected = (batch, self.action_len, self.action_dim), (batch, *self.latent_shape)
        if (action.shape, latent.shape) != expected:
            raise ValueError(
                f"noisy action and next_obs must have the shapes {expected[0]} and {expected[1]}, "
                f"found {action.shape} and {latent.shape}"
            )
        video = self.patch_encoder(patches.patchify(latent.astype(self.dtype), self.patch))
        parts = [constrain(p, "batch", "length") for p in (self.action_encoder(action), video)]
        if self.num_registers:
            parts.append(jnp.broadcast_to(self.registers, (batch, *self.registers.shape[1:])))
        tokens = jnp.concatenate([p.astype(jnp.float32) for p in parts], axis=1) + self.pos_embed
        return constrain(tokens, "batch", "length")

    def _outputs(
        self, x: Array, head_modulation: Array, intermediates: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        x = constrain(self.head(x, head_modulation), "batch", "length")
        end = self.action_len + self.num_video_tokens
        video = self.patch_decoder(x[:, self.action_len : end])
        pred = {
            "action": self.action_decoder(x[:, : self.action_len]),
            "next_obs": patches.unpatchify(video, self.patch, self.latent_shape),
        }
        return pred, {**intermediates, "final": x}
