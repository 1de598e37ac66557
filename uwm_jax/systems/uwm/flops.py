"""Operations of a Unified World Model's forward pass, from shapes; `uwm_jax.training.flops` says what counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from uwm_jax.models.flops import dense
from uwm_jax.models.resnet import ResNet
from uwm_jax.systems.base import Flops

if TYPE_CHECKING:
    from uwm_jax.systems.uwm.system import UWM


def count(system: UWM) -> Flops:
    """The operations of one sample: `network` is the diffusion transformer, `encoder` the observation encoder on all
    current frames, frozen the codec's encoder on all next frames."""
    return Flops({"network": _network(system), "encoder": _encoder(system)}, _codec(system))


def _condition_width(system: UWM) -> int:
    """F of `ObsEncoder`."""
    m, frames = system.config.model, len(system.cameras) * system.num_frames
    low_dim = system.num_frames * sum(system.spec.low_dim.values()) if m.encoder.use_low_dim else 0
    return frames * m.embed_dim + low_dim + (m.embed_dim if m.encoder.use_language else 0)


def _network(system: UWM) -> float:
    """`DiT`."""
    m = system.config.model
    steps, action_dim = system.action_shape
    views, *grid, channels = system.latent_shape
    d, t = m.embed_dim, m.timestep_embed_dim
    video = views * math.prod(n // p for n, p in zip(grid, m.patch, strict=True))
    patch = math.prod(m.patch) * channels
    length = steps + video + m.num_registers
    cond = _condition_width(system) + t

    attention = 4 * length * length * d
    # qkv 3 D, projection D, and the MLP there and back; the modulation of six rows is one product per sample.
    dense = 2 * length * d * (4 * d + 2 * int(m.mlp_ratio * d))
    blocks = m.depth * (attention + dense + 2 * cond * 6 * d)

    hidden = 4 * max(action_dim, d)
    actions = 2 * steps * (action_dim * hidden + hidden * d)  # the encoder; the decoder is its mirror
    patches = 2 * video * patch * d
    timesteps = 2 * (2 * t * 4 * t + 4 * t * t)
    head = 2 * cond * 2 * d + 2 * length * d * d
    return blocks + 2 * actions + 2 * patches + timesteps + head


def _encoder(system: UWM) -> float:
    """`ObsEncoder`: a `ResNet` for every frame, and the text's projection."""
    m, e = system.config.model, system.config.model.encoder
    resnet = ResNet(tuple(e.stage_sizes), e.width, m.embed_dim, e.pool)
    text = dense(system.spec.text_dim, m.embed_dim) if e.use_language else 0.0
    return len(system.cameras) * system.num_frames * resnet.flops(*system.config.data.crop) + text


def _codec(system: UWM) -> float:
    views, frames = system.latent_shape[:2]
    return system.codec.encode_flops(views * frames, *system.config.data.crop)
