"""A tiny model that the tests of the benchmark share."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from uwm_jax import config as config_lib


@pytest.fixture
def tiny() -> ConfigDict:
    """Two cameras and a low-dim key; frames of 16 x 24, cropped to 16 x 16."""
    c = config_lib.base()
    c.batch_size = 2
    c.model.update(embed_dim=16, depth=2, num_heads=2, num_registers=1, timestep_embed_dim=8, patch=(2, 2, 2))
    c.model.encoder.update(stage_sizes=(1,), width=16, use_low_dim=True)
    c.model.codec.name = "pca"
    c.diffusion.num_inference_steps = 2
    c.data.update(cameras=("b", "a"), low_dim=("state",), resize=(16, 24), crop=(16, 16))
    c.data.window.update(obs=(0, 1), action=(1, 2, 3, 4), next_obs=(5, 6))
    return c
