"""A workdir of a small policy that nobody trained: numbers from a generator, nothing is compiled."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from tests.systems.small import small_config
from uwm_jax import systems
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.training.workdir import save_params_only

STEP = 300


def make(workdir: Path, path: str = "robot") -> Path:
    """Writes the workdir; `path` is that of its data."""
    config = small_config("dp")
    config.data.path, config.data.cameras, config.data.low_dim = path, ("front",), ("state",)
    spec = DataSpec(WindowSpec.from_config(config.data.window), {"front": (16, 16)}, {"state": 3}, 2, 0, Normalizer())
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(systems.make(config, spec, None).init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(x.dtype), shapes)
    save_params_only(workdir, config, spec, params, step=STEP)
    return workdir
