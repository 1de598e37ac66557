"""Trackers get every line of a run, and whatever they do, the run does not notice."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

import pytest

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.training.telemetry import trackers as trackers_lib
from uwm_jax.training.telemetry.event_file import EventFile
from uwm_jax.training.telemetry.log import MetricsLog, read_metrics
from uwm_jax.training.telemetry.tensorboard import TensorBoard
from uwm_jax.training.telemetry.tracker import RunFacts, Tracker
from uwm_jax.training.telemetry.trackers import QUEUE_LINES, Trackers
from uwm_jax.training.telemetry.wandb_tracker import Wandb


class Kept(Tracker):
    """Keeps what it is given."""

    def __init__(self):
        self.calls, self.threads = [], set()

    def _add(self, *call):
        self.calls.append(call)
        self.threads.add(threading.current_thread())

    def start(self, run):
        self._add("start", run)

    def log(self, step, scalars, pictures):
        self._add("log", step, scalars, pictures)

    def flush(self):
        self._add("flush")

    def close(self, failed):
        self._add("close", failed)


def facts(workdir):
    return RunFacts(workdir=workdir, config={"seed": 0}, step=20, group="")


def test_a_tracker_gets_every_line_in_a_thread_of_its_own(tmp_path):
    one, other = Kept(), Kept()
    trackers = Trackers({"one": lambda: one, "other": lambda: other}, facts(tmp_path))
    scalars = {"loss": 1.0}
    trackers.log(30, scalars, {"eval/modes": tmp_path / "modes.png"})
    scalars["loss"] = 2.0  # which is the caller's
    trackers.log(40, scalars)
    trackers.close(failed=True)
    for kept in (one, other):
        assert [call for call in kept.calls if call[0] != "flush"] == [
            ("start", facts(tmp_path)),
            ("log", 30, {"loss": 1.0}, {"eval/modes": tmp_path / "modes.png"}),
            ("log", 40, {"loss": 2.0}, {}),
            ("close", True),
        ]
        assert len(kept.threads) == 1 and threading.current_thread() not in kept.threads
    assert one.threads != other.threads


def test_what_was_logged_is_flushed_though_no_line_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers_lib, "FLUSH_SECONDS", 0.05)
    kept = Kept()
    trackers = Trackers({"kept": lambda: kept}, facts(tmp_path))
    trackers.log(30, {"loss": 1.0})
    deadline = time.monotonic() + 30
    while kept.calls[-2:] != [("flush",), ("flush",)] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ("log", 30, {"loss": 1.0}, {}) in kept.calls and kept.calls[-2:] == [("flush",), ("flush",)]
    trackers.close()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("two\nlines"), SystemExit(3)])
@pytest.mark.parametrize("where", ["__init__", "start", "log", "flush", "close"])
def test_one_that_fails_is_told_and_neither_the_run_nor_the_others_notice(tmp_path, capfd, where, error):
    def fail(*_):
        raise error

    broken, kept = type("Broken", (Kept,), {where: fail}), Kept()
    log = MetricsLog(tmp_path, 20, Trackers({"broken": broken, "kept": lambda: kept}, facts(tmp_path)))
    for step in range(21, 26):
        log.write(step, {"loss": 1.0})
    log.close()
    assert [x["step"] for x in read_metrics(tmp_path / "metrics.jsonl")] == list(range(21, 26))
    assert sum(call[0] == "log" for call in kept.calls) == 5 and kept.calls[-1] == ("close", False)
    first, *rest = capfd.readouterr().err.splitlines()
    told = "SystemExit: 3" if isinstance(error, SystemExit) else "No space left" if error.args[0] == 28 else "two lines"
    assert first.startswith("warning: config.trackers: broken ends here (") and told in first
    if where == "flush":  # after the first line, perhaps with others in the queue
        assert len(rest) <= 1
    else:
        assert rest == ["warning: config.trackers: broken lacks 5 of 5 lines of this start."] * (where != "close")


def within(seconds, function):
    """Runs a function that must not block, in a thread, so that a test that fails still ends."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it blocks for more than {seconds} s"


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_one_that_hangs_blocks_neither_a_line_nor_the_end(tmp_path, capfd, monkeypatch, where):
    """Nor the end of the process, which does not wait for what is left behind (`ending.exit_process`)."""
    hangs, left = threading.Event(), []
    monkeypatch.setattr(trackers_lib, "leave_behind", left.append)
    stuck = type("Stuck", (Kept,), {where: lambda *_: hangs.wait()})

    def write():
        trackers = Trackers({"stuck": stuck}, facts(tmp_path))
        for step in range(QUEUE_LINES + 10 if where != "close" else 10):
            trackers.log(step, {"loss": 1.0})
        trackers.close(seconds=0.5)

    try:
        within(30, write)
        said = capfd.readouterr().err
        if where == "close":
            assert said == "warning: config.trackers: stuck did not close in time.\n"
        else:
            slow, lost = said.splitlines()
            assert "stuck does not keep up: 1000 lines wait for it" in slow
            assert lost.endswith("stuck lacks 1010 of 1010 lines of this start: not all was written in time.")
        assert left == ["the tracker stuck"]
    finally:
        hangs.set()


def test_trackers_of_several_logs_end_side_by_side(tmp_path, monkeypatch):
    """As those of a sweep's members, each of which closes its own."""
    ended, feeds, logs = [], [], []

    def join(feed, deadline):
        ended.append([each._ending for each in feeds])
        feed._thread.join()

    monkeypatch.setattr(trackers_lib._Feed, "join", join)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        trackers = Trackers({"kept": Kept}, facts(tmp_path))
        feeds += trackers._feeds
        logs.append(MetricsLog(tmp_path / name, 20, trackers))
    with pytest.raises(KeyError), contextlib.ExitStack() as closing:
        for log in logs:
            closing.callback(log.close)
        for log in logs:
            closing.callback(log.end_trackers)
        raise KeyError
    assert ended == [[True] * 3] * 3, "none is waited for before all were told"
    assert all(feed._run_failed for feed in feeds)


def test_lines_that_a_slow_one_drops_are_counted_and_it_goes_on(tmp_path, capfd):
    goes_on, kept = threading.Event(), Kept()
    kept.start = lambda _: goes_on.wait()
    trackers = Trackers({"slow": lambda: kept}, facts(tmp_path))
    for step in range(QUEUE_LINES + 7):
        trackers.log(step, {})
    goes_on.set()
    deadline = time.monotonic() + 30
    while sum(call[0] == "log" for call in kept.calls) < QUEUE_LINES and time.monotonic() < deadline:
        time.sleep(0.01)
    trackers.log(5_000, {})
    trackers.close()
    assert [call[1] for call in kept.calls if call[0] == "log"] == [*range(QUEUE_LINES), 5_000]
    slow, lost = capfd.readouterr().err.splitlines()
    assert "slow does not keep up" in slow and lost.endswith("slow lacks 7 of 1008 lines of this start.")


def test_tensorboard_on_a_disk_that_hangs_blocks_nothing(tmp_path, capfd, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(EventFile, "write", lambda *_: hangs.wait())

    def write():
        trackers = Trackers({"tensorboard": TensorBoard}, facts(tmp_path))
        trackers.log(30, {"loss": 1.0})
        trackers.close(seconds=0.1)

    try:
        within(30, write)
        assert "tensorboard lacks 1 of 1 lines of this start: not all was written in time" in capfd.readouterr().err
    finally:
        hangs.set()


def test_trackers_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "our_tracker.py").write_text(
        "from uwm_jax.training.telemetry.tracker import Tracker\nclass Ours(Tracker): pass\nother = 3\n"
    )
    (tmp_path / "broken_tracker.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = trackers_lib.find(("tensorboard", "wandb", "our_tracker:Ours"))
    assert list(found) == ["tensorboard", "wandb", "our_tracker:Ours"]
    assert found["tensorboard"] is TensorBoard and found["wandb"] is Wandb
    assert found["our_tracker:Ours"] is sys.modules["our_tracker"].Ours
    for name, message in {
        "tensorbord": "or package.module:Class, found 'tensorbord'. Did you mean tensorboard?",
        "no_such_module:Ours": "ModuleNotFoundError: No module named 'no_such_module'",
        "broken_tracker:Ours": "ZeroDivisionError",
        "our_tracker:Theirs": "AttributeError",
        "our_tracker:other": "is 3; expected a class derived from uwm_jax.training.telemetry.tracker.Tracker",
        ":Ours": "cannot be imported",
    }.items():
        with pytest.raises(UserError) as caught:
            trackers_lib.find((name,))
        assert message in str(caught.value) and str(caught.value).startswith("config.trackers: ")


def test_wandb_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'uwm-jax\[wandb\]'"):
        trackers_lib.find(("wandb",))


def test_only_one_process_starts_them(tmp_path):
    config = config_lib.base()
    assert config.trackers == ("tensorboard",)
    trackers = trackers_lib.start(config, tmp_path, 0, writes=False)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert not list(tmp_path.iterdir())
    trackers_lib.start(config, tmp_path, 0, writes=True).close()
    assert (tmp_path / "tensorboard").is_dir()
