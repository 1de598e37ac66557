from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.conversion.dataset_stats import write_stats
from data_prep.conversion.training_layout import reshard
from data_prep.stats import table, warnings
from tests.data import rlds_source
from uwm_jax.data.records import Dataset
from uwm_jax.errors import UserError


def test_statistics_equal_numpys_and_carry_the_fingerprint(tmp_path: Path) -> None:
    episodes = rlds_source.make(tmp_path / "source", [9, 30, 14])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    file = tmp_path / "out" / "stats.json"
    written_by_reshard = json.loads(file.read_text())
    file.unlink()
    # Only columns are read.
    for shard in (tmp_path / "out").glob("*array_record*"):
        shard.write_bytes(bytes(shard.stat().st_size))
    splits = write_stats(tmp_path / "out")
    assert json.loads(file.read_text()) == written_by_reshard
    assert written_by_reshard["fingerprint"] == Dataset(tmp_path / "out").fingerprint

    actions = np.stack([s["action"] for e in episodes for s in e["steps"]]).astype(np.float32)
    stats = splits["train"]["action"]
    assert stats["count"] == 53 and stats["nonfinite"] == 0
    np.testing.assert_array_equal(stats["min"], actions.min(axis=0))
    np.testing.assert_array_equal(stats["max"], actions.max(axis=0))
    np.testing.assert_allclose(stats["mean"], actions.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["std"], actions.std(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["q01"], np.quantile(actions, 0.01, axis=0), rtol=1e-5)
    assert written_by_reshard["episodes"].startswith("all episodes of each split")
    text = table(splits["train"])
    assert "action[6]" in text and "observation/state[2]" in text and "reward " in text


def test_constant_and_broken_values_are_warned_of_once_per_key(tmp_path: Path) -> None:
    rlds_source.make(tmp_path / "source", [9, 30, 14])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    lines = warnings(write_stats(tmp_path / "out")["train"])
    assert "warning: action: 1 of 7 dimensions are constant ([6] = 0.5)" in lines
    assert "warning: is_last: constant ([0] = 0)" in lines
    assert not any("state" in line or "reward" in line for line in lines)

    file = tmp_path / "out" / "columns" / "train" / "action.npy"
    column = np.load(file)
    column[[3, 8], 0] = np.nan, np.inf
    rlds_source.write_column(tmp_path / "out", "action", column)
    lines = warnings(write_stats(tmp_path / "out")["train"])
    expected = "warning: action: 1 of 7 dimensions are constant ([6] = 0.5); 2 of 53 steps are NaN or infinite, "
    expected += "in 1 episode (0)"
    assert [line for line in lines if "action:" in line] == [expected]
    column[:] = np.nan
    rlds_source.write_column(tmp_path / "out", "action", column)
    lines = warnings(write_stats(tmp_path / "out")["train"])
    assert "warning: action: 53 of 53 steps are NaN or infinite, in 3 episodes (0, 1, 2)" in lines


def test_actions_are_described_without_what_rlds_leaves_undefined(tmp_path: Path) -> None:
    episodes = rlds_source.make(tmp_path / "source", [9, 30, 14])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    ends = np.cumsum([9, 30, 14]) - 1
    for key, value in (("is_last", 1), ("action", np.nan), ("action_dict/gripper_position", 0.0), ("reward", 99.0)):
        column = np.array(Dataset(tmp_path / "out").column(key))
        column[ends] = value
        rlds_source.write_column(tmp_path / "out", key, column)
    stats = write_stats(tmp_path / "out")["train"]
    for key in ("action", "action_dict/gripper_position"):
        assert (stats[key]["count"], stats[key]["nonfinite"]) == (50, 0)
    values = [s["action_dict"]["gripper_position"] for e in episodes for s in e["steps"][:-1]]
    np.testing.assert_allclose(stats["action_dict/gripper_position"]["min"], np.min(values, axis=0), rtol=1e-6)
    assert stats["reward"]["count"] == 53 and stats["reward"]["max"] == [99.0]


def test_the_command_prints_the_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from absl import flags

    from data_prep import stats

    rlds_source.make(tmp_path / "source", [9, 30])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    capsys.readouterr()
    values = flags.FlagValues()
    flags.DEFINE_string("dataset", str(tmp_path / "out"), "", flag_values=values)
    values(["stats"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats.cli, "FLAGS", values)
        stats.main(stats.cli.Call())
    printed = capsys.readouterr().out
    assert "warning: action: 1 of 7 dimensions are constant ([6] = 0.5)" in printed
    assert "train: 39 steps of all episodes" in printed and "stats.json" in printed


def test_a_directory_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no training dataset here"):
        write_stats(tmp_path)
