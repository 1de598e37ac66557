"""A dataset, a config that reads all kinds of its keys, and loaders of both: what the tests of the loader share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from uwm_jax.config import base
from uwm_jax.data.loader import Loader
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.rotations import xyz_euler_to_rot6d
from uwm_jax.data.run_data import RunData
from uwm_jax.data.sources import Source

LENGTHS = [21, 5, 100, 32, 12, 33]  # 129 training windows: 8 streams of 16 or more


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("loader")
    episodes = rlds_source.make(root / "source", LENGTHS)
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, chunk_steps=8, workers=1)
    return root / "out", episodes


@pytest.fixture
def config(made) -> ConfigDict:
    c = base().data
    c.path = str(made[0])
    c.cameras = ("wrist", "exterior")
    c.low_dim = ("state", "gripper")
    c.text = "embedding"
    c.action = (
        ("action_dict/cartesian_velocity", "xyz_euler_to_rot6d"),
        ("action_dict/gripper_position", "identity"),
        ("action", "identity"),
    )
    c.window.obs = (0, 1)
    c.window.action = (1, 2, 3, 4, 5, 6)
    c.window.next_obs = (7, 9)
    c.num_streams = 8
    c.num_threads = 2
    return c


def open_loader(
    config: ConfigDict, batch_size: int = 8, seed: int = 5, normalizer: Normalizer | None = None, **kwargs: Any
) -> Loader:
    return Loader(RunData(config, seed=seed, normalizer=normalizer), batch_size=batch_size, **kwargs)


def source_of(loader: Loader) -> Source:
    (source,) = loader.data.sources.values()
    return source


def take(loader: Loader, count: int) -> list[dict[str, np.ndarray]]:
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def raw_actions(episode: dict[str, Any]) -> np.ndarray:
    """(steps, 17) as the config joins them, straight from the source episode."""
    rows = []
    for step in episode["steps"]:
        velocity = step["action_dict"]["cartesian_velocity"].astype(np.float32)
        parts = [xyz_euler_to_rot6d(velocity), step["action_dict"]["gripper_position"], step["action"]]
        rows.append(np.concatenate(parts).astype(np.float32))
    return np.stack(rows)


def minmax(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset) of the normaliser that maps the range of these values onto [-1, 1]."""
    low, high = values.min(axis=0), values.max(axis=0)
    return np.where(high > low, (high - low) / 2, 1), (high + low) / 2
