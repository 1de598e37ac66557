"""Rows of latencies, and calls that take turns."""

from __future__ import annotations

import time

import pytest

from uwm_jax.benchmarking import clock, latency
from uwm_jax.benchmarking.latency import Row, in_turns, rows_of


def test_rows_of_a_model_are_next_to_each_other() -> None:
    rows = rows_of(("policy", "joint"), (3, 1), (10, 2))
    assert [row.name for row in rows] == [
        f"{use}/{views}_views/{steps}_steps" for views in (3, 1) for steps in (10, 2) for use in ("policy", "joint")
    ]
    assert Row("joint", 2, 0).name == "joint/2_views"


def test_each_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [0.0], iter((2.0, 0.0, 3.0))

    def call() -> None:
        now[0] += next(waits)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert clock.calls(call, 3) == [2, 0, 3]


def test_sides_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.0)
    asked: list[tuple[str, int]] = []

    def side(name: str) -> latency.Calls:
        def calls(count: int) -> list[float]:
            asked.append((name, count))
            return [float(len(asked))] * count

        return calls

    found = in_turns({"a": side("a"), "b": side("b")}, 12)
    assert asked == [("a", 3), ("b", 3), ("a", 5), ("b", 5), ("a", 5), ("b", 5), ("a", 2), ("b", 2)]
    assert found == {"a": [3.0] * 5 + [5.0] * 5 + [7.0] * 2, "b": [4.0] * 5 + [6.0] * 5 + [8.0] * 2}
