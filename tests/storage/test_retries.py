"""Calls are repeated within a limit, with a clock that does not tick by itself."""

from __future__ import annotations

import pytest

from uwm_jax.storage import retries
from uwm_jax.storage.retries import Passing, repeat


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def failing(times: int, **how):
    """A call that works after this many failures."""
    left = [times]

    def attempt() -> str:
        if left[0]:
            left[0] -= 1
            raise Passing("503 busy", 503, **how)
        return "done"

    return attempt


def test_pauses_grow_and_are_drawn(capsys):
    clock = Clock()
    assert repeat(failing(6), "gs://b/k: reading", clock, clock.sleep) == "done"
    for at, pause in enumerate(clock.pauses):
        assert 0.25 * 2**at <= pause <= 0.5 * 2**at
    assert len(set(clock.pauses)) == 6
    told = capsys.readouterr().err  # the pauses of at least 2 s
    assert told.count("gs://b/k: reading: 503 busy; attempt") == sum(p >= 2 for p in clock.pauses) > 0


def test_the_last_failure_is_raised_once_no_time_is_left():
    clock = Clock()
    with pytest.raises(Passing, match=r"503 busy \(\d+ attempts in \d+ s\)") as e:
        repeat(failing(10**6), "gs://b/k: reading", clock, clock.sleep)
    assert e.value.status == 503 and retries.TOTAL_SECONDS - retries.LONGEST_PAUSE <= clock.now < retries.TOTAL_SECONDS
    assert max(clock.pauses) <= retries.LONGEST_PAUSE


def test_a_block_limits_its_calls(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(retries.time, "monotonic", clock)
    with retries.within(5), retries.within(100):
        assert 4.9 < retries.left(60) <= 5 and retries.left(1) == 1
        with pytest.raises(Passing):
            repeat(failing(10**6), "gs://b/k: reading", clock, clock.sleep)
        assert clock.now < 5
    assert retries.left(60) == 60


def test_other_failures_are_raised_at_once():
    clock = Clock()

    def attempt() -> None:
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        repeat(attempt, "gs://b/k: reading", clock, clock.sleep)
    assert not clock.pauses
