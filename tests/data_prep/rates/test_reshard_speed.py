from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.conversion.cutting import run_task
from data_prep.rates.reshard_speed import mb_per_s_per_core
from tests.data import rlds_source


def test_the_speed_is_that_of_the_input_and_of_the_cutting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rlds_source.make(tmp_path / "source", [4, 6])
    size = sum(file.stat().st_size for file in (tmp_path / "source").glob("toy-*"))
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])  # of the rounds: 4 s, 1 s and 2 s
    done = []
    monkeypatch.setattr("data_prep.rates.reshard_speed.time", type("clock", (), {"process_time": lambda: next(clock)}))
    monkeypatch.setattr("data_prep.rates.reshard_speed.run_task", lambda job: done.append(run_task(job)))
    (tmp_path / "parts").mkdir()
    assert mb_per_s_per_core(tmp_path / "source", tmp_path / "parts") == pytest.approx(size / 1e6 / 2.0)
    assert done == [True] * 6 and len(list((tmp_path / "parts").glob("*/result.json"))) == 6
