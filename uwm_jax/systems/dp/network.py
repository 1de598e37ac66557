"""The trainable whole of Diffusion Policy: the observation encoder and a noise predictor, under one tree of parameters.

Diffusion Policy (Chi et al. 2023, arXiv:2303.04137) as the Unified World Models code has it for comparison: a
transformer whose blocks the condition modulates through AdaLN-zero, or the 1-D U-Net. Features of the observation run
over frames first, then views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models.activations import constrain
from uwm_jax.models.adaln import StepConditions, Variant
from uwm_jax.models.obs_encoder import ObsEncoder
from uwm_jax.models.transformer import INIT, MLP, BlockStack, Head, sinusoid
from uwm_jax.models.unet1d import UNet1D
from uwm_jax.systems import parts

Array = jax.Array


class ActionTransformer(nn.Module):
    """Predicts, from noisy actions (B, action_len, action_dim), what diffusion asks for, in the same shape, float32.

    The blocks are those of `models/transformer.py`, with the condition [observation features | timestep embedding]; one
    token an action. At initialisation the prediction is exactly 0.

    Fields:
        action_dim, action_len: columns and rows of an action chunk.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the blocks.
        timestep_embed_dim: even, at least 4.
        scan_blocks, remat, attention: as `scan`, `remat` and `attention` of `BlockStack`.
        adaln, adaln_rank: the variant of AdaLN (`models/adaln.py`).
        dtype: of the large products; the timestep embedding and the output projection stay in float32.
    """

    action_dim: int
    action_len: int
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4
    qkv_bias: bool = True
    timestep_embed_dim: int = 256
    scan_blocks: bool = True
    remat: str = "none"
    adaln: str = "official"
    adaln_rank: int = 0
    dtype: Any = jnp.float32
    attention: str = "xla"

    def setup(self) -> None:
        if self.timestep_embed_dim < 4 or self.timestep_embed_dim % 2:
            raise ValueError(f"timestep_embed_dim must be even and at least 4, found {self.timestep_embed_dim}")
        d, dtype = self.embed_dim, self.dtype
        self.stack = self._stack()
        hidden = 4 * max(self.action_dim, d)
        self.action_encoder = MLP(hidden, d, dtype=dtype)
        self.timestep_embedding = MLP(4 * self.timestep_embed_dim, self.timestep_embed_dim)
        self.pos_embed = self.param("pos_embed", INIT, (1, self.action_len, d))
        self.head = Head(d, dtype)
        self.action_decoder = MLP(hidden, self.action_dim, dtype=dtype, out_dtype=jnp.float32)

    @nn.compact
    def __call__(self, global_cond: Array, noisy: Array, timestep: Array) -> Array:
        """One evaluation, each row at its own timestep.

        Args:
            global_cond: (B, F).
            noisy: (B, action_len, action_dim).
            timestep: (B,) integers from 0.
        """
        time = constrain(self._embed(timestep), "batch")
        cond = jnp.concatenate([global_cond.astype(jnp.float32), time], axis=-1)
        cond = constrain(nn.silu(cond), "batch")
        blocks = self.stack.params_of(self, cond.shape[-1])
        x, _ = self.stack(blocks, self._tokens(noisy), cond)
        return self._output(x, self.head.row_modulation(cond))

    def modulation(self, global_cond: Array, timestep: Array) -> dict[str, Array]:
        """All AdaLN modulations of a sampler's steps (S,) at once, for `predict`: {"blocks": (S, depth, B, 6, D),
        "head": (S, B, 2, D)}."""
        conditions = StepConditions.join(global_cond, self._embed(timestep))
        blocks = self.stack.params_of(self)
        return {
            "blocks": self.stack.modulation(blocks, conditions),
            "head": self.head.step_modulation(conditions),
        }

    def predict(self, noisy: Array, modulation: Mapping[str, Array]) -> Array:
        """`__call__` with one step's slice of `modulation`."""
        blocks = self.stack.params_of(self)
        x, _ = self.stack.apply_modulated(blocks, self._tokens(noisy), modulation["blocks"])
        return self._output(x, modulation["head"])

    def flops(self, num_features: int) -> float:
        """Operations of the products of one evaluation of one sample with `num_features` observation features."""
        d, t, hidden = self.embed_dim, self.timestep_embed_dim, 4 * max(self.action_dim, self.embed_dim)
        total = 2 * MLP(hidden, d, parent=None).flops(self.action_dim, self.action_len)  # the decoder is its mirror
        total += MLP(4 * t, t, parent=None).flops(t)
        total += self._stack().flops(self.action_len, num_features + t)
        return total + Head(d, self.dtype, parent=None).flops(self.action_len, num_features + t)

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

    def _tokens(self, noisy: Array) -> Array:
        expected = (noisy.shape[0], self.action_len, self.action_dim)
        if noisy.shape != expected:
            raise ValueError(f"noisy must have the shape {expected}, found {noisy.shape}")
        return constrain(self.action_encoder(noisy).astype(jnp.float32) + self.pos_embed, "batch", "length")

    def _output(self, x: Array, head_modulation: Array) -> Array:
        return self.action_decoder(constrain(self.head(x, head_modulation), "batch", "length"))


class DPNetwork(nn.Module):
    """`obs_encoder` and `noise_pred_net`; parameters lie under these two names.

    Call through `apply(..., method=...)`: `encode_obs` once per observation, then either `__call__` (training: one
    evaluation, every row at its own timestep) or `modulation` once and `predict` per step (sampling). Arguments and
    results are documented at `ObsEncoder`, `ActionTransformer` and `UNet1D`.
    """

    obs_encoder: ObsEncoder
    noise_pred_net: ActionTransformer | UNet1D

    def encode_obs(self, images: Array, low_dim: Mapping[str, Array] | None = None, text: Array | None = None) -> Array:
        """Frames (B, V, T, H, W, 3) in [0, 1], {key: (B, T, D)}, (B, E) -> features (B, F) float32."""
        return self.obs_encoder(images, low_dim, text)

    def __call__(self, global_cond: Array, noisy: Array, timestep: Array) -> Array:
        """The prediction for features (B, F) and timesteps (B,)."""
        return self.noise_pred_net(global_cond, noisy, timestep)

    def modulation(self, global_cond: Array, timestep: Array) -> dict[str, Array]:
        """Modulations of all sampler steps (S,), leading axis S."""
        return self.noise_pred_net.modulation(global_cond, timestep)

    def predict(self, noisy: Array, modulation: Mapping[str, Array]) -> Array:
        """One evaluation with one step's slice of `modulation`."""
        return self.noise_pred_net.predict(noisy, modulation)

    def init_all(
        self, images: Array, low_dim: Mapping[str, Array] | None, text: Array | None, noisy: Array, timestep: Array
    ) -> Array:
        """Both parts in a row: `init(key, ..., method="init_all")` makes every parameter."""
        return self(self.encode_obs(images, low_dim, text), noisy, timestep)


def network_from_config(model_config: Any, *, action_dim: int, action_len: int) -> DPNetwork:
    """The network that `config.model` describes.

    Args:
        model_config: attributes as in `config.model` of the system `dp`.
        action_dim, action_len: shape of an action chunk.

    Raises:
        ValueError: (at init) widths, heads, levels or lengths do not fit.
    """
    m = model_config
    net: ActionTransformer | UNet1D
    if m.predictor == "unet":
        net = UNet1D(
            dim=action_dim,
            length=action_len,
            down_dims=tuple(m.unet.down_dims),
            kernel_size=m.unet.kernel_size,
            groups=m.unet.groups,
            fourier=m.unet.fourier,
            timestep_embed_dim=m.timestep_embed_dim,
            dtype=jnp.dtype(m.dtype),
        )
    else:
        net = ActionTransformer(
            action_dim=action_dim,
            action_len=action_len,
            timestep_embed_dim=m.timestep_embed_dim,
            **parts.transformer(m),
        )
    return DPNetwork(obs_encoder=parts.obs_encoder(m, outermost="frame"), noise_pred_net=net)
