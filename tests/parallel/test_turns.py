"""Turns of one process: when it goes on, when it saves, why it ends, and what it says then."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import time

import pytest

from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.parallel import signals, turns
from uwm_jax.parallel.ahead import Ahead
from uwm_jax.parallel.turns import Left, Turns


@pytest.fixture
def hanging():
    """A function that makes items of which the second never comes."""
    event = threading.Event()

    def items():
        yield 1
        event.wait()

    yield lambda: Ahead(items(), waits_for=lambda: "shard 7, record 3")
    event.set()


@pytest.fixture(autouse=True)
def handlers():
    """Those of a process that ignores none, also where these tests run in the background of a script."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals.NAMES}
    yield
    signals.restore()
    for number, handler in before.items():
        assert signal.signal(number, handler) is signal.default_int_handler


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_signal_is_a_request_however_often_it_comes(number, name, status):
    data = Ahead(iter(int, 1))
    signals.take()
    with Turns(0) as run:
        assert run.next(data).end is None
        for _ in range(4):
            signal.raise_signal(number)
        end = run.next(data).end
        assert end is not None and run.next(data).end is end, "true ever after"
    error = end(41)
    assert isinstance(error, Preempted) and error.status == status
    assert str(error) == f"told to end ({name}): step 41 is saved; the same command continues from it."
    assert "before the first step" in str(end(0))


def test_a_signal_that_comes_before_the_turns_is_unheeded():
    signals.take(signal.SIGTERM)
    assert signals.unheeded() is None
    signal.raise_signal(signal.SIGTERM)
    assert signals.unheeded() == signals.received() == signal.SIGTERM
    signals.take()
    assert signals.unheeded() is None and signals.received() == signal.SIGTERM


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.take()
    signal.raise_signal(signal.SIGHUP)
    assert signals.received() is None
    signals.restore()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_signal_ends_a_wait_for_data_that_never_comes(hanging, monkeypatch):
    monkeypatch.setattr(turns, "NAMED_AFTER_SECONDS", 0.05)
    data = hanging()
    signals.take()
    with Turns(0) as run:
        assert run.next(data).end is None
        next(data)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        end = run.next(data).end
        assert end is not None and time.monotonic() - began < 5
    assert "The run had waited for shard 7, record 3." in str(end(3))


def test_data_that_does_not_come_ends_the_run_by_itself(hanging):
    data = hanging()
    with Turns(0.2) as run:
        assert run.next(data).end is None
        next(data)
        end = run.next(data).end
    error = end(3)
    assert isinstance(error, RunError) and not isinstance(error, Preempted)
    assert str(error) == (
        "the run got no data in 0.2 s (config.hang_seconds); it waits for shard 7, record 3. Step 3 is saved; the same "
        "command continues from it."
    )


def test_an_error_of_the_data_ends_the_run_with_it():
    error = UserError("shard 3 is damaged")

    def items():
        yield 1
        raise error

    data = Ahead(items())
    with Turns(0) as run:
        assert run.next(data).end is None
        next(data)
        assert run.next(data).end(1) is error


def test_an_evaluation_is_left_by_all_that_ends_a_run(hanging):
    signals.take()
    with Turns(0) as run:
        assert list(run.each(iter("abc"))) == ["a", "b", "c"]
        with pytest.raises(Left):
            for _ in run.each(iter("abc")):
                signal.raise_signal(signal.SIGINT)
        assert run.next(hanging()).end is not None
    signals.restore()
    with Turns(0.2) as run, pytest.raises(Left):
        list(run.each(iter(lambda: threading.Event().wait(60), 1)))


@pytest.mark.parametrize("error", [UserError("shard 3 is damaged"), ZeroDivisionError("a defect")])
def test_an_error_of_the_data_of_an_evaluation_ends_the_run_with_it(error):
    """Itself, with its traceback if it is a defect, though the evaluation's data is closed by then."""

    def items():
        yield 1
        raise error

    with Turns(0) as run:
        with pytest.raises(Left):
            list(run.each(items()))
        end = run.next(Ahead(iter(int, 1))).end
        assert end is not None and end(3) is error


def test_a_second_signal_cuts_what_may_be_cut():
    signals.take()
    with pytest.raises(Left), signals.may_be_cut(Left()):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # while it saves


def test_it_saves_by_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])
    data = Ahead(iter(int, 1))
    data.ready(10)
    with Turns(0, every_minutes=2) as run:
        seen = []
        for minute in range(1, 8):
            now[0] = 60.0 * minute
            if run.next(data).save:
                seen.append(minute)
                run.saved()
    assert seen == [2, 4, 6]
    with Turns(0) as run:
        now[0] += 1e6
        assert not run.next(data).save


def test_a_stdout_that_nobody_reads_ends_a_run_in_good_order(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    data = Ahead(iter(int, 1))
    with os.fdopen(writer, "w") as broken, Turns(0) as run:
        monkeypatch.setattr(sys, "stdout", broken)
        for _ in range(3):
            signals.say("step 7")
        monkeypatch.undo()
        error = run.next(data).end(7)
    assert type(error) is RunError and "stdout can no longer be written (Broken pipe). Step 7 is saved" in str(error)


def test_a_stdout_on_a_disk_that_is_full_for_a_while_ends_no_run(monkeypatch, capsys):
    class Full(io.StringIO):
        room = False

        def flush(self):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")

    log = Full()
    with Turns(0) as run:
        monkeypatch.setattr(sys, "stdout", log)
        for _ in range(3):
            signals.say("lost, or late")
        log.room = True
        signals.say("step 8")
        monkeypatch.undo()
        assert run.next(Ahead(iter(int, 1))).end is None
    assert log.getvalue().endswith("step 8\n")
    assert capsys.readouterr().err.count("stdout cannot be written (No space left on device)") == 1
