"""The watchdog speaks when a step hangs, says where, and is quiet otherwise."""

from __future__ import annotations

import threading
import time

import pytest

from uwm_jax.parallel.watchdog import Watchdog


@pytest.fixture
def read_stderr(capfd):
    """Waits for a text on file descriptor 2 and returns all that came so far."""
    seen = ""

    def read(text: str) -> str:
        nonlocal seen
        for _ in range(1000):
            seen += capfd.readouterr().err
            if text in seen:
                return seen
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {seen!r}")

    return read


def test_a_hang_is_shown_with_step_and_stacks_again_and_again(read_stderr):
    hanging = threading.Event()

    def a_thread_that_hangs():
        hanging.wait()

    thread = threading.Thread(target=a_thread_that_hangs)
    thread.start()
    try:
        with Watchdog(0.2) as watchdog:
            assert "before the first step" in read_stderr("before the first step")
            watchdog.beat(41)
            shown = read_stderr("since step 41")
            assert "watchdog: process 0 of 1: nothing for" in shown
            assert "a_thread_that_hangs" in read_stderr("a_thread_that_hangs")
            dumps = shown.count("watchdog:")
            while read_stderr("watchdog:").count("watchdog:") < dumps + 2:
                time.sleep(0.01)
    finally:
        hanging.set()
        thread.join()


def test_quiet_while_steps_come(capfd):
    with Watchdog(30) as watchdog:
        for step in range(1000):
            watchdog.beat(step)
    assert capfd.readouterr().err == ""


def test_dumps_do_not_pile_up_after_one_beat(monkeypatch, capfd):
    """One dump for each further period without a beat, not one for each wake-up of the thread."""
    dumps = []
    watchdog = Watchdog(0.05)
    monkeypatch.setattr(watchdog, "_dump", lambda: dumps.append(time.monotonic()))
    began = time.monotonic()
    with watchdog:
        while len(dumps) < 3:
            time.sleep(0.005)
    assert all(at - began >= 0.05 * (i + 1) for i, at in enumerate(dumps))


def test_zero_switches_it_off():
    before = threading.active_count()
    with Watchdog(0) as watchdog:
        watchdog.beat(1)
        assert threading.active_count() == before


def test_a_watchdog_may_have_as_much_patience_as_a_config_says(monkeypatch):
    """An end of the thread would be a traceback in the middle of a run."""
    ended = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    with Watchdog(1e300) as watchdog:
        watchdog.beat(1)
        time.sleep(0.1)
    assert ended == []
