"""Blocks of a benchmark."""

from __future__ import annotations

import time

import pytest

from uwm_jax.benchmarking import clock, timing


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)


def test_both_sides_alternate_after_warming_up() -> None:
    calls: list[str] = []

    def torch(count: int) -> tuple[float, float]:
        calls.extend(["torch"] * count)
        return 1.0, 2.0

    timed = timing.measure(timing.Runner(lambda: calls.append("ours"), 0.0, None), torch, blocks=3)
    assert calls == ["ours", "torch", "ours", "torch"] + ["ours", "torch"] * 3
    assert len(timed.ours.wall) == len(timed.ours.cpu) == 3
    assert (timed.torch.wall, timed.torch.cpu) == ([1.0] * 3, [2.0] * 3)


def test_without_a_counterpart_there_are_no_blocks_of_it() -> None:
    timed = timing.measure(timing.Runner(lambda: None, 0.0, None), None, blocks=2)
    assert len(timed.ours.wall) == 2 and not timed.torch.wall and not timed.torch.cpu


def test_a_repetition_is_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"perf_counter": 0.0, "process_time": 0.0}
    for name in clocks:
        monkeypatch.setattr(time, name, lambda name=name: clocks[name])

    def repeat(count: int) -> None:
        clocks["perf_counter"] += 2.0 * count
        clocks["process_time"] += 3.0 * count

    assert clock.block(repeat, 4) == (2.0, 3.0)
