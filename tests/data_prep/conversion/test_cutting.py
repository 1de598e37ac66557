"""The tasks of a job of many inputs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.conversion import cutting
from data_prep.sources.inputs import Found, Input
from uwm_jax.data.chunks import plan_layout
from uwm_jax.data.episodes import serialize_episode
from uwm_jax.data.features import Feature

FEATURES = {"steps/action": Feature((1,), "float32")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Input):
    """One episode of `size` steps."""

    def episodes(self) -> Iterator[Found]:
        yield Found(serialize_episode(FEATURES, {"steps/action": [[0.0]] * self.size}), size=self.size)


def test_few_tasks_are_handed_out_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited, wait = [], concurrent.futures.wait
    monkeypatch.setattr(concurrent.futures, "wait", lambda fs, **options: waited.append(len(fs)) or wait(fs, **options))
    layout = plan_layout(FEATURES, 8, {})
    inputs = [Steps(name=str(i), size=i + 1) for i in range(12)]
    jobs = [cutting.Job("train", i, part, layout, 1 << 20, tmp_path) for i, part in enumerate(inputs)]
    found = cutting.run_jobs(jobs, workers=1)
    assert [result.lengths for result in found] == [[i + 1] for i in range(12)]
    assert 1 <= max(waited) <= 4
