"""A few short demonstrations of PushT, the config of a model that compiles in seconds on them, and equal episodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_prep import demo
from uwm_jax.config import base
from uwm_jax.envs.parallel import EpisodeResult

SIZE = 16  # pixels of a frame's side
_DEMO = demo.Demo(episodes=4, image_size=SIZE, candidates=24, max_steps=40)


def make_demonstrations(output: Path) -> Path:
    """The beginnings of four demonstrations in the training layout, which count as solved."""
    run = demo.run_episode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_episode", lambda number, params: dataclasses.replace(run(number, params), solved=True))
        demo.make(_DEMO, output, workers=1)
    return output


def make_config(demonstrations: Path) -> ConfigDict:
    """Two steps on the demonstrations."""
    c = base()
    c.total_steps, c.batch_size, c.log_every = 2, 4, 1
    c.checkpoint.every = 2
    c.eval.num_windows = 4
    c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.num_registers = 32, 1, 2, 2
    c.model.timestep_embed_dim, c.model.patch = 16, (2, 2, 2)
    c.model.encoder.stage_sizes, c.model.encoder.width, c.model.encoder.pool = (1,), 16, "flatten"
    c.model.encoder.use_low_dim = True
    c.model.codec.name = "pca"
    c.diffusion.num_inference_steps = 2
    c.data.path, c.data.cameras, c.data.low_dim = str(demonstrations), ("image",), ("agent_pos",)
    c.data.val_ratio, c.data.num_streams, c.data.num_threads = demo.VAL_RATIO, 8, 1
    c.data.resize = c.data.crop = (SIZE, SIZE)
    return c


def same(a: EpisodeResult, b: EpisodeResult) -> bool:
    return (
        a.seed == b.seed
        and a.success == b.success
        and np.array_equal(a.scores, b.scores)
        and np.array_equal(a.actions, b.actions)
    )
