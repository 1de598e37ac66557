"""A run keeps its best checkpoint by its own evaluations, also when it continues."""

from __future__ import annotations

import json

import pytest

from uwm_jax.reporting import pictures
from uwm_jax.train import train

METRIC = "eval/policy/action_mse"


@pytest.mark.slow
def test_the_best_checkpoint_by_an_evaluation_stays(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})  # which takes seconds
    config, workdir = tiny_config, tmp_path / "run"
    config.eval.every, config.checkpoint.every, config.checkpoint.keep = 1, 1, 1
    config.checkpoint.keep_best = METRIC
    for config.total_steps in (3, 6):
        train(config, workdir)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        best = min(lines, key=lambda x: (x[METRIC], -x["step"]))["step"]
        kept = {int(p.name) for p in (workdir / "checkpoints").iterdir()}
        assert kept == {best, config.total_steps}
