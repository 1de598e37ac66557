"""Remarks on data before a run trains on them, against values put into their columns."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from uwm_jax.config import base, source
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.data.windows import split_episodes

LENGTHS = [9] * 16
STEPS = sum(LENGTHS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remarks")
    rlds_source.make(root / "source", LENGTHS)
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    return root / "out"


def changed(made: Path, directory: Path, **columns: np.ndarray) -> str:
    """A copy of the dataset with these values in its columns, by their last names."""
    shutil.copytree(made, directory, ignore=shutil.ignore_patterns("derived_stats"))
    for name, values in columns.items():
        key = next(k for k in Dataset(made).column_keys if k.rpartition("/")[2] == name)
        rlds_source.write_column(directory, key, np.asarray(values, np.float32))
    return str(directory)


def config_for(path: str, **fields: Any) -> ConfigDict:
    c = base().data
    c.path, c.cameras, c.num_streams = path, ("wrist",), 1
    c.window.action, c.window.next_obs, c.val_ratio = (1, 2), (3, 4), 0.5
    c.update(fields)
    return c


def warnings(config: ConfigDict, clip: float = 1.0, fewest: int = 1, normalizer: Any = None) -> list[str]:
    return RunData(config, seed=0, normalizer=normalizer).warnings(clip, fewest)


def training_rows() -> np.ndarray:
    return np.concatenate([np.arange(9 * e, 9 * e + 9) for e in split_episodes(16, 0.5)[0]])


def test_raw_actions_beyond_the_clip_are_told_with_their_share(made: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (STEPS, 7))
    action[:, 2] = rng.uniform(0, 512, STEPS)
    action[:, 5] = rng.uniform(-1.4, 1.4, STEPS)  # beyond, but not far
    path = changed(made, tmp_path / "raw", action=action)
    (line,) = warnings(config_for(path, normalize="none"))
    values = action[training_rows(), 2].astype(np.float32)
    assert line.startswith(
        f"warning: action of {path} lies beyond +-1, normalised: column 2 ({np.mean(values > 1):.2%} "
    )
    assert f"up to {values.max():.4g}). config.diffusion.clip.action=1 cuts" in line and "can never be sampled" in line
    assert "column 5" not in line and "config.data.normalize=minmax" in line and "larger diffusion.clip.action" in line
    assert warnings(config_for(path, normalize="none"), clip=512.0) == []
    assert warnings(config_for(path, normalize="none"), clip=0.0) == []
    assert warnings(config_for(path, normalize="minmax")) == []


@pytest.mark.parametrize(
    ("size", "rare", "told"), [(2.0, 2 / 72, False), (2.0, 1 / 72, True), (30.0, 2 / 72, True), (1.1, 1 / 72, False)]
)
def test_a_quantile_range_that_is_narrow_against_what_occurs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, rare: float, told: bool
) -> None:
    """A few values somewhat out are what quantiles are for; one far out, or many, are a part of the task."""
    monkeypatch.setattr("uwm_jax.data.remarks._RARE", rare)
    action = np.tile(np.linspace(-1, 1, STEPS)[:, None], (1, 7))
    action[training_rows()[40], 3] = size  # one of 72 steps
    lines = warnings(config_for(changed(made, tmp_path / "spikes", action=action), normalize="quantile"))
    # Two of them lie outside, since the smallest does too.
    assert [("column 3 (2.78% " in line, "column 2 (" in line) for line in lines] == [(True, False)] * told


def test_what_a_given_normaliser_does_not_reach(made: Path, tmp_path: Path) -> None:
    """As an origin's in finetuning, whatever `config.data.normalize` says."""
    path = changed(made, tmp_path / "wide", action=np.tile(np.linspace(-4, 4, STEPS)[:, None], (1, 7)))
    narrow = Normalizer({"action": (np.full(7, 2, np.float32), np.zeros(7, np.float32))})
    (line,) = warnings(config_for(path), normalizer=narrow)
    share = np.mean(np.abs(np.linspace(-4, 4, STEPS)[training_rows()].astype(np.float32)) > 2)
    reach = np.abs(np.linspace(-4, 4, STEPS)[training_rows()]).max() / 2
    assert line.count(f"({share:.2%} of its values, up to {reach:.4g})") == 6 and "1 more" in line and 0.4 < share < 0.6
    assert "init_from_normalizer=fresh" in line


def test_inputs_that_no_network_can_read(made: Path, tmp_path: Path) -> None:
    path = changed(made, tmp_path / "inputs", state=np.linspace([-1, 0, 0], [1, 9, 700], STEPS))
    actions = (("action_dict/gripper_position", "identity"),)
    (line,) = warnings(config_for(path, normalize="none", action=actions, low_dim=("state",)))
    assert (
        line.startswith(f"warning: state of {path} lies beyond +-10, normalised: column 2 (") and "column 1" not in line
    )
    assert "hard to train" in line and "sampled" not in line


def test_each_source_is_looked_at_under_the_pooled_normaliser(made: Path, tmp_path: Path) -> None:
    near = changed(made, tmp_path / "near", action=np.tile(np.linspace(-1, 1, STEPS)[:, None], (1, 7)))
    far = np.tile(np.linspace(-1, 1, STEPS)[:, None], (1, 7))
    far[training_rows()[0]] = 50
    far = changed(made, tmp_path / "far", action=far)
    config = config_for("", normalize="quantile")
    config.sources = ConfigDict({"a": source(path=near), "b": source(path=far), "c": source(path=far)})
    config.sources.c.use_actions = False
    (line,) = warnings(config)
    assert "action of source 'b' (" in line


def test_transformed_actions_are_seen_as_the_model_has_them(made: Path, tmp_path: Path) -> None:
    velocity = np.zeros((STEPS, 6))
    velocity[:, 1], velocity[:, 4] = np.linspace(-5, 5, STEPS), np.linspace(-3, 3, STEPS)
    path = changed(made, tmp_path / "turned", cartesian_velocity=velocity)
    pairs = (("action_dict/gripper_position", "identity"), ("action_dict/cartesian_velocity", "xyz_euler_to_rot6d"))
    (line,) = warnings(config_for(path, normalize="none", action=pairs))
    assert line.count("column ") == 1 and "column 2 (" in line  # angles have become numbers within 1


def test_too_few_held_out_episodes_are_told_with_the_ratio_that_gives_enough(made: Path, tmp_path: Path) -> None:
    def told(ratio: float, **fields: Any) -> list[str]:
        return warnings(config_for(str(made), val_ratio=ratio, **fields), fewest=6)

    (line,) = told(0.05)
    assert line.startswith("warning: 1 of 16 episodes with windows is held out (config.data.val_ratio=0.05): ")
    assert "no verdict from fewer than 6. --config.data.val_ratio=0.35 in a new run" in line
    assert [len(split_episodes(16, r)[1]) for r in (0.34, 0.35)] == [5, 6]
    assert told(0.35) == told(0.0) == []  # without any, none was wanted

    half = ConfigDict({"some": source(include=[f"/robot/{i}/" for i in range(8)])})
    half.some.include = tuple(half.some.include)
    (line,) = told(0.2, sources=half)
    ratio = float(re.search(r"val_ratio=(\S+) in a new run", line)[1])
    held_out = [sum(e < 8 for e in split_episodes(16, r)[1]) for r in (ratio - 0.01, ratio)]
    assert held_out[0] < 6 <= held_out[1] < 8
    (line,) = warnings(config_for(str(made), val_ratio=0.2), fewest=16)
    assert line.endswith("More data is needed.")
