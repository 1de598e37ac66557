"""The benchmark on tiny models: its numbers belong together, what torch does beside it, its flags and its file."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import benchmark_step, cli
from uwm_jax import config as config_lib
from uwm_jax.benchmarking import memory, timing
from uwm_jax.errors import UserError
from uwm_jax.synthetic import synthetic_codec, synthetic_system

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


ROWS = ["latents/forward_backward", "pixels/step", "policy"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def results() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "BLOCK_SECONDS", 0.0)  # one call each
        return benchmark_step.benchmark(tiny("pca"), 3, ACTION_DIM, ROWS, beside_torch=HAS_TORCH, frame_size=(20, 30))


@pytest.mark.slow
def test_numbers_of_a_row_belong_together(results: dict) -> None:
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    assert all(math.isfinite(value) and value > 0 for value in numbers.values())
    assert {name.rsplit("/", 1)[0] for name in results if "/" in name} == set(ROWS)
    system, _ = synthetic_system(tiny("pca"), ACTION_DIM)
    counted = system.flops()
    network, encoder = counted.trained["network"], counted.trained["encoder"]
    assert counted.frozen > 0
    for row, samples, operations in (
        ("latents/forward_backward", 2, 3 * (network + encoder)),
        ("pixels/step", 2, counted.training),
        ("policy", 1, 2 * network + encoder),
    ):
        rate = samples / results[f"{row}/seconds"]
        assert results[f"{row}/samples_per_second"] == pytest.approx(rate)
        assert results[f"{row}/gflop_per_sample"] == pytest.approx(operations / 1e9)
        assert results[f"{row}/tflop_per_second"] == pytest.approx(operations * rate / 1e12)
        assert f"{row}/mfu" not in results  # a CPU's peak is not known
    assert results["train_step_s"] == results["pixels/step/seconds"]
    assert results["samples_per_second"] == results["pixels/step/samples_per_second"]
    assert results["policy_sample_s"] == results["policy/seconds"]


@pytest.mark.slow
def test_the_step_holds_more_memory_than_its_state(results: dict) -> None:
    trained = (results["network_parameters_m"] + results["encoder_parameters_m"]) * 1e6
    state = 4 * 3 * trained / 2**30  # float32 parameters and both of Adam's moments
    assert state < results["pixels/step/memory_gib"] < 50 * state


@pytest.mark.slow
def test_parameters_are_those_of_the_model(results: dict) -> None:
    assert results["network_parameters_m"] * 1e6 == pytest.approx(network_parameters(SIZE // 8, 12), abs=0.5)
    # conv1 7x7 and its norm; one block of two 3x3 convolutions with norms; fc
    encoder = 7 * 7 * 3 * WIDTH + 2 * WIDTH + 2 * (9 * WIDTH * WIDTH + 2 * WIDTH) + dense(WIDTH, D)
    assert results["encoder_parameters_m"] * 1e6 == pytest.approx(encoder, abs=0.5)
    assert results["codec_parameters_m"] * 1e6 == pytest.approx(SIZE * SIZE * 3 + 8 * 8 * 3 * 12 + 1, abs=0.5)


@pytest.mark.parametrize(("codec", "count"), [("pixels", 0), ("vae", 83_653_863)])
def test_synthetic_codecs_have_the_arrays_of_real_ones(codec: str, count: int) -> None:
    shapes = jax.eval_shape(lambda: synthetic_codec(tiny(codec))[1])
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_a_state_that_does_not_fit_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes")

    monkeypatch.setattr(benchmark_step, "Model", full)
    with pytest.raises(UserError, match=r"^the training state .* does not fit.*config.batch_size"):
        benchmark_step.benchmark(tiny("pixels"), 1, ACTION_DIM)


@pytest.mark.slow
@pytest.mark.torch
def test_torch_runs_beside_ours_in_the_same_run(results: dict) -> None:
    pytest.importorskip("torch")
    text = benchmark_step.table(results)
    table = text.split("\n\n")[2].splitlines()
    assert len(table) == 1 + len(ROWS)
    for row, line in zip(ROWS, table[1:], strict=True):
        low, high = results[f"{row}/torch_ratio_range"]
        assert 0 < low <= results[f"{row}/torch_ratio"] <= high
        for side in ("", "torch_"):
            low, high = results[f"{row}/{side}seconds_range"]
            assert 0 < low <= results[f"{row}/{side}seconds"] <= high
            assert f"{results[f'{row}/{side}seconds']:.4f} ({low:.4f} to {high:.4f})" in " ".join(line.split())
        assert line.startswith(row + " ") and line.endswith(f" {results[f'{row}/torch_cpu_ratio']:.3f}")


def test_the_table_has_the_columns_that_there_are_numbers_for() -> None:
    results = {
        "device": "chip", "batch_size": 4, "dtype": "bfloat16",
        "network_parameters_m": 384.92, "encoder_parameters_m": 11.57, "codec_parameters_m": 83.65,
        "latents/step/seconds": 0.025, "latents/step/samples_per_second": 160.0, "latents/step/mfu": 0.4,
        "policy/seconds": 0.5, "policy/samples_per_second": 2.0, "peak_memory_gib": 12.5,
    }  # fmt: skip
    lines = benchmark_step.table(results).splitlines()
    assert lines[0] == "chip, batch 4, bfloat16"
    assert lines[3].split() == ["seconds", "samples/s", "MFU"]
    assert lines[4].split() == ["latents/step", "0.0250", "160.000", "0.400"]
    assert lines[5].split() == ["policy", "0.5000", "2.000", "-"]
    assert lines[-1].endswith("12.50 GiB")


def test_the_step_from_pixels_is_set_against_that_from_latents() -> None:
    rows = {"pixels/step/seconds": 6.0, "pixels/step/gflop_per_sample": 90.0}
    assert benchmark_step._summary(rows) == {"train_step_s": 6.0}
    rows |= {"latents/step/seconds": 1.5, "latents/step/gflop_per_sample": 10.0}
    ratios = benchmark_step._summary(rows)
    assert ratios == {"train_step_s": 6.0, "pixels_to_latents/seconds": 4.0, "pixels_to_latents/flops": 9.0}
    assert "takes 4.00 times the time and 9.00 times the operations" in benchmark_step.table(FAKE | rows | ratios)


def test_the_table_says_what_torch_lacks() -> None:
    row = {"seconds": 1.0, "samples_per_second": 1.0}
    results = FAKE | {"torch_threads": 2} | {f"pixels/forward/{name}": value for name, value in row.items()}
    assert "pip install diffusers" in benchmark_step.table(results)
    beside = {"torch_seconds": 2.0, "torch_ratio": 0.5, "torch_ratio_range": [0.4, 0.6]}
    results |= {f"pixels/forward/{name}": value for name, value in beside.items()}
    lines = benchmark_step.table(results).splitlines()
    assert lines[0] == "cpu, batch 1, float32, torch on 2 threads"
    assert lines[4].split() == ["pixels/forward", "1.0000", "1.000"]
    assert lines[7].split() == ["pixels/forward", "1.0000", "2.0000", "0.500", "(0.400", "to", "0.600)"]
    assert len(lines) == 8


def test_peak_memory_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def of_torch(description: dict, inputs: dict, row: str) -> float | None:
        asked.append((row, sorted(inputs)))
        return 2**29 if row == "policy" else None  # as where diffusers is missing

    monkeypatch.setattr(memory, "of_ours", lambda *arguments: 2**30)
    monkeypatch.setattr(memory, "of_torch", of_torch)
    rows, ours = ["policy", "codec"], {"policy/peak_memory_gib": 1.0, "codec/peak_memory_gib": 1.0}
    assert benchmark_step._peaks(tiny("pixels"), ACTION_DIM, rows, False, None) == ours
    assert asked == []
    both = benchmark_step._peaks(tiny("pixels"), ACTION_DIM, rows, True, None)
    assert both == ours | {"policy/torch_peak_memory_gib": 0.5, "policy/torch_memory_ratio": 2.0}
    assert asked == [("policy", ["action", "action_mask", "obs/camera", "row"]), ("codec", ["images", "row"])]
    lines = benchmark_step.table(FAKE | both).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["codec", "1.000", "-", "-"],
        ["policy", "1.000", "0.500", "2.000"],
    ]


# --- the command -------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    before = set(flags.FLAGS)
    benchmark_step.define_flags()
    try:
        return cli.call(benchmark_step.main, ["benchmark_step", *arguments])
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


FAKE = {
    "device": "cpu", "batch_size": 1, "dtype": "float32",
    "network_parameters_m": 1.0, "encoder_parameters_m": 1.0, "codec_parameters_m": 1.0,
    "train_step_s": 0.5,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls of the benchmark by the command; the benchmark itself does nothing."""
    calls: list[tuple] = []

    def benchmark(config: ConfigDict, *arguments: object) -> dict:
        calls.append(arguments)
        return FAKE

    monkeypatch.setattr(benchmark_step, "benchmark", benchmark)
    return calls


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    (tmp_path / "config.py").write_text("from uwm_jax.config import base as get_config\n")
    return [f"--config={tmp_path / 'config.py'}", "--steps=2"]


def test_the_file_is_whole_or_refused_before_the_work(
    tmp_path: Path, calls: list, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for bad in (tmp_path, tmp_path / "config.py" / "out.json"):
        assert command(*line, f"--json={bad}") == 2
        assert "--json" in capsys.readouterr().err
    for flag in ("--part=nothing", "--memory=nothing", "--frame_size=180", "--frame_size=0,320", "--frame_size=a,b"):
        assert command(*line, flag) == 2
        assert flag.split("=")[0] in capsys.readouterr().err
    assert calls == []
    assert command(*line, "--notorch", "--part=latents/step", f"--json={tmp_path / 'new' / 'out.json'}") == 0
    assert calls == [(2, 10, ["latents/step"], False, None, [])]
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == FAKE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]
    assert command(*line, "--notorch", "--part=codec", "--frame-size=180,320", "--memory=network,policy") == 0
    assert calls[-1] == (2, 10, ["codec"], False, (180, 320), ["network/forward", "network/forward_backward", "policy"])


def test_torch_is_there_by_default_only_where_it_can_be(
    calls: list, line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for spec, backend, wanted in ((object(), "cpu", True), (None, "cpu", False), (object(), "gpu", False)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert command(*line) == 0
        assert calls[-1][3] is wanted
        assert ("uwm-jax[torch]" in capsys.readouterr().out) == (spec is None)
        assert command(*line, "--torch") == (0 if wanted else 2)
        assert wanted or "--torch: " in capsys.readouterr().err
        assert command(*line, "--notorch") == 0
        assert calls[-1][3] is False
        assert command(*line, "--memory=policy") == (0 if backend == "cpu" else 2)
        assert ("--memory: " in capsys.readouterr().err) == (backend != "cpu")


def test_data_readers_and_torch_are_not_imported() -> None:
    # So that it runs where only jax and what the model needs are installed.
    heavy = "grain tensorflow tensorflow_datasets array_record simplejpeg safetensors huggingface_hub torch orbax"
    code = (
        f"import sys, uwm_jax.benchmark_step; found = set({heavy.split()}) & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
