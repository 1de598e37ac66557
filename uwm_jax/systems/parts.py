"""Parts of networks and samplers that several systems make of their config fields (`fields.py`)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.models import layers
from uwm_jax.models.obs_encoder import ObsEncoder


def schedule(d: ConfigDict, **more: Any) -> Schedule:
    """The noise schedule and DDIM sampler of `config.diffusion`; `more` are further arguments of `Schedule`."""
    return Schedule(
        num_train_steps=d.num_train_steps,
        num_inference_steps=d.num_inference_steps,
        beta_schedule=d.beta_schedule,
        spacing=d.spacing,
        **more,
    )


def transformer(m: Any) -> dict[str, Any]:
    """Arguments of a network with a transformer of `config.model`: widths, depth, loops, recomputation, precision,
    attention."""
    return {
        "embed_dim": m.embed_dim,
        "depth": m.depth,
        "num_heads": m.num_heads,
        "mlp_ratio": m.mlp_ratio,
        "qkv_bias": m.qkv_bias,
        "remat": m.remat,
        "adaln": m.adaln,
        "adaln_rank": m.adaln_rank,
        "scan_blocks": layers.scans_by_default() if m.scan_blocks is None else m.scan_blocks,
        "dtype": jnp.dtype(m.dtype),
        "attention": m.attention,
    }


def obs_encoder(m: Any, **more: Any) -> ObsEncoder:
    """The ResNet encoder of `config.model`; `more` are further fields of `ObsEncoder`."""
    encoder = m.encoder
    return ObsEncoder(
        stage_sizes=tuple(encoder.stage_sizes),
        width=encoder.width,
        pool=encoder.pool,
        embed_dim=m.embed_dim,
        use_low_dim=encoder.use_low_dim,
        use_language=encoder.use_language,
        dtype=jnp.dtype(m.dtype),
        **more,
    )
