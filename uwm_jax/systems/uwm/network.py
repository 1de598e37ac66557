"""The trainable whole: observation encoder and noise-prediction network under one tree of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from uwm_jax.models.obs_encoder import ObsEncoder
from uwm_jax.systems import parts
from uwm_jax.systems.uwm.dit import DiT

Array = jax.Array
Prediction = tuple[dict[str, Array], dict[str, Array]]


class UWMNetwork(nn.Module):
    """`obs_encoder` and `noise_pred_net`; parameters lie under these two names.

    Call through `apply(..., method=...)`: `encode_obs` once per observation, then either `__call__` (training:
    one evaluation, every row at its own timesteps) or `modulation` once and `predict` per step (sampling).
    Arguments and results are documented at `ObsEncoder` and `DiT`.
    """

    obs_encoder: ObsEncoder
    noise_pred_net: DiT

    def encode_obs(self, images: Array, low_dim: Mapping[str, Array] | None = None, text: Array | None = None) -> Array:
        """Frames (B, V, T, H, W, 3) in [0, 1], {key: (B, T, D)}, (B, E) -> features (B, F) float32."""
        return self.obs_encoder(images, low_dim, text)

    def __call__(self, global_cond: Array, noisy: Mapping[str, Array], timestep: Mapping[str, Array]) -> Prediction:
        """Predictions and intermediates of `DiT` for features (B, F) and timesteps (B,)."""
        return self.noise_pred_net(global_cond, noisy, timestep)

    def modulation(self, global_cond: Array, timestep: Mapping[str, Array]) -> dict[str, Array]:
        """Modulations of all sampler steps (S,), leading axis S (`DiT.modulation`)."""
        return self.noise_pred_net.modulation(global_cond, timestep)

    def predict(self, noisy: Mapping[str, Array], modulation: Mapping[str, Array]) -> Prediction:
        """One evaluation with one step's slice of `modulation` (`DiT.predict`)."""
        return self.noise_pred_net.predict(noisy, modulation)

    def init_all(
        self,
        images: Array,
        low_dim: Mapping[str, Array] | None,
        text: Array | None,
        noisy: Mapping[str, Array],
        timestep: Mapping[str, Array],
    ) -> Prediction:
        """Both parts in a row: `init(key, ..., method="init_all")` makes every parameter."""
        return self(self.encode_obs(images, low_dim, text), noisy, timestep)


def network_from_config(
    model_config: Any,
    *,
    action_dim: int,
    action_len: int,
    num_views: int,
    num_frames: int,
    latent_shape: tuple[int, ...],
) -> UWMNetwork:
    """The network that `config.model` describes.

    Args:
        model_config: attributes as in `config.model`.
        action_dim, action_len: shape of an action chunk.
        num_views, num_frames: cameras, and frames of the current observation.
        latent_shape: (V, T, h, w, C) of the next observation's latents.

    Raises:
        ValueError: the next observation has other views or another number of frames than the current one, or (at
            init) widths, heads or patches do not fit.
    """
    if tuple(latent_shape[:2]) != (num_views, num_frames):
        raise ValueError(
            f"current and next observation must have the same views and frames, found {(num_views, num_frames)} "
            f"and {tuple(latent_shape[:2])}"
        )
    return UWMNetwork(
        obs_encoder=parts.obs_encoder(model_config),
        noise_pred_net=DiT(
            action_dim=action_dim,
            action_len=action_len,
            latent_shape=tuple(latent_shape),
            patch=tuple(model_config.patch),
            num_registers=model_config.num_registers,
            timestep_embed_dim=model_config.timestep_embed_dim,
            **parts.transformer(model_config),
        ),
    )
