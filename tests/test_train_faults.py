"""Runs on data with a damaged record: they go on by rule, count it, and count on when they continue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_faults import unique
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step


def lines_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_goes_on_and_its_counts_continue(make_tiny_config, tmp_path, capsys):
    config = make_tiny_config()
    config.data.path = str(shutil.copytree(config.data.path, tmp_path / "data"))
    config.eval.every, config.log_every, config.checkpoint.every, config.total_steps = 0, 1, 2, 6
    loader = Loader(RunData(config.data, seed=0), batch_size=config.batch_size)
    dataset, traces = Dataset(config.data.path), [loader.describe(position) for position in range(6 * 4)]
    chunk = traces[9].episode, traces[9].origin // 8  # that of a row of the third step; 8 steps lie in a chunk
    frames = (0, 1, 5, 6)
    rows = [chunk in {(t.episode, (t.origin + i) // 8) for i in frames} for t in traces]
    expected = np.cumsum(np.reshape(rows, (6, 4)).sum(axis=1))
    record, file = dataset.record(*chunk), Path(config.data.path) / dataset.locate(chunk[0], 8 * chunk[1]).shard
    data = bytearray(file.read_bytes())
    data[unique(data, record)] ^= 1
    file.write_bytes(data)

    with pytest.raises(UserError, match=f"{file.name}: record .* cannot be read"):
        train(config, tmp_path / "ends")
    first = int(np.flatnonzero(expected)[0])
    assert latest_step(tmp_path / "ends") == (first or None), "the steps before it are saved"

    config.data.max_bad_records = 3
    train(config, tmp_path / "whole")
    assert capsys.readouterr().err.count("warning: bad record") == 1
    train(config, tmp_path / "ends")  # the number may differ when a run continues
    for workdir in (tmp_path / "whole", tmp_path / "ends"):
        lines = [line for line in lines_of(workdir) if line["step"] > first]
        assert [line["data/bad_rows"] for line in lines] == expected[first:].tolist()
        assert {line["data/bad_records"] for line in lines} == {1}
    stored = [Checkpoints(tmp_path / name, read_only=True).newest_readable() for name in ("whole", "ends")]
    assert stored[0].data_iter == stored[1].data_iter
    assert stored[0].data_iter["bad"]["rows"] == expected[-1]
    losses = [[line["loss"] for line in lines_of(tmp_path / name)] for name in ("whole", "ends")]
    assert losses[0] == losses[1], "bit for bit"
