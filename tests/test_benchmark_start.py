"""The measurement of starts runs real ones, cold and warm."""

from __future__ import annotations

import pytest
from absl import flags

from uwm_jax import benchmark_start, cli
from uwm_jax import config as config_lib
from uwm_jax.benchmark_start import benchmark
from uwm_jax.errors import RunError
from uwm_jax.training.startup import PARTS


@pytest.mark.slow
def test_cold_and_warm_starts_are_measured(tiny_config, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(tiny_config)!r}, 'test')\n"
    )
    found = benchmark([f"--config={config}"], starts=1)
    assert list(found) == ["cold", "warm"]
    for parts in found.values():
        assert list(parts) == [*PARTS, "xla", "first_step", "least", "most"]
        assert parts["least"] == parts["first_step"] == parts["most"]  # the medians of one
        seconds = sum(parts[name] for name in PARTS)
        assert seconds <= parts["first_step"] + 0.05  # their clock is finer than 10 ms, but for the process's own
        assert min(parts["imports"], parts["compile"], parts["step"]) > 0


def test_a_run_that_fails_is_told(tmp_path):
    with pytest.raises(RunError, match=r"uwm_jax.train --config=.*absent.py.*status 2.*absent.py"):
        benchmark([f"--config={tmp_path / 'absent.py'}"], starts=1)


def test_a_mistake_is_told_before_anything_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_start, "benchmark", lambda *_: pytest.fail("started"))
    (tmp_path / "config.py").write_text("from uwm_jax.config import base as get_config\n")
    before = set(flags.FLAGS)
    benchmark_start.define_flags()
    try:
        arguments = [f"--config={tmp_path / 'config.py'}", "--config.batch_sise=2"]
        assert cli.call(benchmark_start.main, ["benchmark_start", *arguments]) == 2
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    assert "Did you mean batch_size" in capsys.readouterr().err
