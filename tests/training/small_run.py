"""Checkpoints of a run with a small state of every dtype; what the tests make, damage and compare.

Loaded by `conftest.py`, and imported by the programs that tests start.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, make_assets
from uwm_jax.training.checkpoints.retention import Retention
from uwm_jax.training.state import TrainState, create, make_optimizer


def state_at(step: int) -> TrainState:
    keys = jax.random.split(jax.random.key(step), 3)
    params = {"net": {"kernel": jax.random.normal(keys[0], (24, 16)), "bias": jax.random.normal(keys[1], (16,))}}
    state = create(base(), params, make_optimizer(base()))
    extra = {"half": jax.random.normal(keys[2], (8,), jnp.bfloat16), "flags": jnp.arange(5) % 2 == 0}
    return state.replace(step=jnp.int32(step), ema_params=jax.tree.map(jnp.copy, params), opt_state=(extra, params))


LIKE = jax.eval_shape(lambda: state_at(0))
CODEC = {"components": np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)}


def assets_of(note: str = "") -> dict:
    normalizer = Normalizer({"action": (np.full(4, 0.123456789), np.zeros(4))})
    window = WindowSpec.from_config(base().data.window)
    return make_assets(base(), DataSpec(window, {"wrist": (16, 16)}, {}, 4, 0, normalizer), note=note)


def save_steps(workdir: Path, *steps: int, keep: int | None = None) -> Path:
    checkpoints = Checkpoints(workdir, Retention(keep))
    for step in steps:
        checkpoints.save(state_at(step), {"position": 8 * step, "history": [[0, 1.5]]}, CODEC, assets_of())
    checkpoints.close()
    return workdir


def like() -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), LIKE)


def assert_is_step(state: TrainState, step: int) -> None:
    for found, saved in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        assert found.dtype == saved.dtype
        np.testing.assert_array_equal(found, saved)


def flip(file: Path, at: float = 0.5, bit: int = 4) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    file.write_bytes(bytes(content))


def largest_file(directory: Path) -> Path:
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != "commit_success.txt"]
    return max(files, key=lambda p: p.stat().st_size)
