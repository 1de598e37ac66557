"""The benchmark on tiny models: finite numbers, the parameters of the model, and its file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import benchmark_step, cli
from uwm_jax import config as config_lib

D, DEPTH, REGISTERS, TIME, WIDTH, ACTION_DIM, SIZE = 16, 2, 3, 8, 16, 5, 16
ACTIONS, FRAMES, PATCH = 4, 2, (2, 2, 2)


def tiny(codec: str) -> ConfigDict:
    c = config_lib.base()
    c.batch_size = 2
    c.model.update(embed_dim=D, depth=DEPTH, num_heads=2, num_registers=REGISTERS, timestep_embed_dim=TIME, patch=PATCH)
    c.model.encoder.update(stage_sizes=(1,), width=WIDTH)
    c.model.codec.name = codec
    c.diffusion.num_inference_steps = 2
    c.data.update(cameras=("camera",), resize=(SIZE, SIZE), crop=(SIZE, SIZE))
    c.data.window.update(obs=(0, 1), action=(1, 2, 3, 4), next_obs=(5, 6))
    return c


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def network_parameters(latent: int, channels: int) -> int:
    """Of the DiT, written out: `latent` rows and columns of `channels`."""
    values, condition, hidden = math.prod(PATCH) * channels, FRAMES * D + TIME, 4 * D
    tokens = ACTIONS + (FRAMES // PATCH[0]) * (latent // PATCH[1]) * (latent // PATCH[2]) + REGISTERS
    block = dense(D, 3 * D) + dense(D, D) + dense(D, hidden) + dense(hidden, D) + dense(condition, 6 * D)
    action = dense(ACTION_DIM, hidden) + dense(hidden, D) + dense(D, hidden) + dense(hidden, ACTION_DIM)
    head = dense(condition, 2 * D) + dense(D, D)
    time = dense(2 * TIME, 4 * TIME) + dense(4 * TIME, TIME)
    video = dense(values, D) + dense(D, values)
    return DEPTH * block + action + head + time + video + (tokens + REGISTERS) * D


@pytest.mark.parametrize(("codec", "latent", "channels", "arrays"), [
    ("pixels", SIZE, 3, 0),
    ("pca", SIZE // 8, 12, SIZE * SIZE * 3 + 8 * 8 * 3 * 12 + 1),
])  # fmt: skip
def test_numbers_are_finite_and_parameters_those_of_the_model(
    codec: str, latent: int, channels: int, arrays: int
) -> None:
    results = benchmark_step.benchmark(tiny(codec), steps=1, action_dim=ACTION_DIM)
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    assert all(math.isfinite(value) for value in numbers.values())
    assert all(numbers[name] > 0 for name in ("train_step_s", "policy_sample_s", "compile_and_first_step_s"))
    assert results["samples_per_second"] == pytest.approx(2 / results["train_step_s"])
    assert results["network_parameters_m"] * 1e6 == pytest.approx(network_parameters(latent, channels), abs=0.5)
    # conv1 7x7 and its norm; one block of two 3x3 convolutions with norms; fc
    encoder = 7 * 7 * 3 * WIDTH + 2 * WIDTH + 2 * (9 * WIDTH * WIDTH + 2 * WIDTH) + dense(WIDTH, D)
    assert results["encoder_parameters_m"] * 1e6 == pytest.approx(encoder, abs=0.5)
    assert results["codec_parameters_m"] * 1e6 == pytest.approx(arrays, abs=0.5)


def command(*arguments: str) -> int:
    before = set(flags.FLAGS)
    benchmark_step.define_flags()
    try:
        return cli.call(benchmark_step.main, ["benchmark_step", *arguments])
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def test_the_file_is_whole_or_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def benchmark(config: ConfigDict, steps: int, action_dim: int) -> dict[str, float]:
        calls.append((steps, action_dim))
        return {"train_step_s": 0.5}

    monkeypatch.setattr(benchmark_step, "benchmark", benchmark)
    (tmp_path / "config.py").write_text("from uwm_jax.config import base as get_config\n")
    line = [f"--config={tmp_path / 'config.py'}", "--steps=2"]
    for bad in (tmp_path, tmp_path / "config.py" / "out.json"):
        assert command(*line, f"--json={bad}") == 2
        assert "--json" in capsys.readouterr().err
    assert calls == []
    assert command(*line, f"--json={tmp_path / 'new' / 'out.json'}") == 0
    assert calls == [(2, 10)]
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"train_step_s": 0.5}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]
