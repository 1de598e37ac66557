"""Latencies of tiny models: all sides answer the same, and what the command takes, prints and writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tests.benchmarking.conftest import tiny  # noqa: F401  # the model of the benchmark's tests
from uwm_jax import benchmark_inference, cli
from uwm_jax.benchmarking import latency
from uwm_jax.benchmarking.latency import Row

ROWS = [Row("policy", 2, 2), Row("forward", 2, 2), Row("inverse", 1, 1)]


def check_numbers(results: dict, rows: list[Row], sides: tuple[str, ...]) -> None:
    for number, row in enumerate(rows):
        for side in sides:
            low, high = results[f"{row.name}/{side}/range_ms"]
            p50, count = (results[f"{row.name}/{side}/{name}"] for name in ("p50_ms", "calls"))
            assert 0 < low <= p50 <= high < math.inf and count == (2 if number else 6)
            assert (f"{row.name}/{side}/p99_ms" in results) == (number == 0)
            if side != "jax":
                ratio = results[f"{row.name}/jax/p50_ms"] / p50
                assert results[f"{row.name}/{side}/jax_ratio"] == pytest.approx(ratio)
    first = rows[0].name
    for side in sides:
        every = sorted(results[f"{first}/{side}/ms"])
        assert len(every) == 6 and results[f"{first}/{side}/p50_ms"] == pytest.approx(sum(every[2:4]) / 2, abs=1e-3)
        assert results[f"{first}/{side}/p50_ms"] <= results[f"{first}/{side}/p99_ms"] <= every[-1] + 1e-3


@pytest.mark.slow
@pytest.mark.torch
def test_all_sides_answer_the_same(tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pytest.importorskip("torch")
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.0)
    results = benchmark_inference.benchmark(tiny, ROWS, calls=6, other_calls=2, action_dim=5, frame_size=(20, 30))
    check_numbers(results, ROWS, ("jax", "uwm_torch", "official"))
    differences = {key: results[key] for key in results if key.endswith("/difference")}
    assert len(differences) == 2 * len(ROWS) and max(differences.values()) < 5e-5
    assert results["not_run/uwm_torch_graphs"] == "CUDA graphs need an NVIDIA GPU"
    text = benchmark_inference.table(results)
    lines = [line.split("  ") for line in text.splitlines()]
    assert lines[1][1] == ROWS[0].name and "not run" in lines[1]
    assert "not run, uwm_torch, CUDA graphs: CUDA graphs need an NVIDIA GPU." in text


def test_jax_alone(tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.0)
    results = benchmark_inference.benchmark(tiny, ROWS[:2], ["jax"], calls=6, other_calls=2, action_dim=5)
    check_numbers(results, ROWS[:2], ("jax",))
    assert not any("torch" in key or "official" in key for key in results)


# --- the command -------------------------------------------------------------------------------------

FAKE = {
    "device": "cpu", "host": "a processor", "cores": 2, "dtype": "float32", "warm_up_calls": 3, "calls_in_turn": 5,
    "jax": "1.2", "torch": "2.3", "torch_threads": 2, "sides": ["jax", "official"],
    "rows": ["policy/3_views/10_steps", "joint/3_views/10_steps"],
    "policy/3_views/10_steps/jax/p50_ms": 40.0, "policy/3_views/10_steps/jax/p99_ms": 50.04,
    "policy/3_views/10_steps/jax/calls": 200, "policy/3_views/10_steps/official/p50_ms": 100.0,
    "policy/3_views/10_steps/official/p99_ms": 110.0, "policy/3_views/10_steps/official/jax_ratio": 0.4,
    "policy/3_views/10_steps/official/difference": 1e-6,
    "joint/3_views/10_steps/jax/p50_ms": 60.0, "joint/3_views/10_steps/jax/calls": 20,
}  # fmt: skip


def test_the_table_tells_what_was_measured_and_how() -> None:
    lines = benchmark_inference.table(FAKE | {"not_run/official": "there is no time"}).splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[:4]]
    assert cells == [
        ["p50 of calls, ms", "JAX", "official loop", "JAX / official loop"],
        ["policy/3_views/10_steps", "40.0", "100.0", "0.400"],
        ["joint/3_views/10_steps", "60.0", "not run", "not run"],
        ["policy/3_views/10_steps, p99", "50.0", "110.0"],
    ]
    assert "cpu, a processor, 2 cores, float32; jax 1.2, torch 2.3 on 2 threads" in lines[5]
    assert lines[6].startswith("200 and 20 calls after 3 of each side that do not count; turns of 5 calls")
    assert lines[7:] == ["Results differ from JAX's by 1.0e-06 at most.", "not run, official loop: there is no time."]


def test_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple] = []

    def benchmark(config: ConfigDict, *arguments: object) -> dict:
        calls.append(arguments)
        return FAKE

    def command(*arguments: str) -> int:
        line = ["benchmark_inference", f"--config={tmp_path / 'config.py'}", *arguments]
        return cli.call(benchmark_inference.main, line, benchmark_inference.define_flags)

    monkeypatch.setattr(benchmark_inference, "benchmark", benchmark)
    (tmp_path / "config.py").write_text("from uwm_jax.config import base as get_config\n")
    for flag, told in {
        "--uses=policy,dance": "--uses: expected some of policy, video, forward, inverse, joint, joined by commas; "
        "found 'dance'",
        "--views=4": "--views: expected numbers from 1 to 3, the cameras of config.data.cameras",
        "--views=one": "--views: ",
        "--steps=0": "--steps: expected numbers from 1 on",
        "--sides=official,theirs": "--sides: ",
        "--frame_size=180": "--frame_size: expected HEIGHT,WIDTH",
        f"--json={tmp_path}": "--json",
    }.items():
        assert command(flag) == 2
        assert told in capsys.readouterr().err
    assert calls == []
    assert command() == 0
    rows, sides, *rest = calls[-1]
    assert [row.name for row in rows[:2]] == ["policy/3_views/10_steps", "video/3_views/10_steps"] and len(rows) == 30
    assert sides == list(latency.SIDES) and rest == [200, 20, 10, None]
    output = tmp_path / "new" / "out.json"
    assert command("--uses=joint,policy", "--views=2", "--steps=4", "--sides=jax", "--calls=7", "--other_calls=1",
                   "--action_dim=6", "--frame_size=18,32", f"--json={output}") == 0  # fmt: skip
    assert calls[-1] == ([Row("policy", 2, 4), Row("joint", 2, 4)], ["jax"], 7, 1, 6, (18, 32))
    assert json.loads(output.read_text()) == FAKE
    assert "policy/3_views/10_steps" in capsys.readouterr().out
