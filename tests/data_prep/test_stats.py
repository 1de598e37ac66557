from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.reshard import reshard
from data_prep.stats import table, write_stats
from uwm_jax.data.records import Dataset
from uwm_jax.errors import UserError

_SPEC = importlib.util.spec_from_file_location("rlds_source", Path(__file__).parents[1] / "data" / "rlds_source.py")
rlds_source = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(rlds_source)


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
    text = table(splits["train"])
    assert "action[6]" in text and "observation/state[2]" in text and "reward " in text


def test_a_directory_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no training dataset here"):
        write_stats(tmp_path)
