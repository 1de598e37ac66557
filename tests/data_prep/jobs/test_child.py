"""Processes that are replaced when they crash or hang."""

from __future__ import annotations

import errno
import multiprocessing.process
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from data_prep.jobs.child import Child, ChildError
from uwm_jax.errors import RunError


def work(argument: str, mark: Callable[[int], None]) -> tuple[str, int]:
    mark(3)
    if argument == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if argument == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if argument == "exit":
        os._exit(4)
    if argument == "raise":
        raise KeyError("a mistake")
    return argument.upper(), os.getpid()


@pytest.fixture(scope="module")
def child() -> Iterator[Child[str, tuple[str, int]]]:
    with Child(work) as child:
        yield child


def test_one_process_serves_until_it_fails(child: Child[str, tuple[str, int]], ends) -> None:
    results = [child.call(letter, 60) for letter in "ab"]
    assert [text for text, _ in results] == ["A", "B"]
    first = results[0][1]
    assert results[1][1] == first != os.getpid() and child.started == 1
    with pytest.raises(ChildError, match=r"no result within 0\.2 s") as raised:
        child.call("hang", 0.2)
    assert (raised.value.crashed, raised.value.mark) == (False, 3)
    assert ends(first)
    assert child.call("c", 60)[1] != first and child.started == 2


@pytest.mark.parametrize("how, message", [("crash", "SIGSEGV"), ("exit", "exit status 4")])
def test_a_crash_is_named(child: Child[str, tuple[str, int]], how: str, message: str) -> None:
    with pytest.raises(ChildError, match=message) as raised:
        child.call(how, 60)
    assert raised.value.crashed and raised.value.mark == 3


def test_a_mistake_in_the_function_is_no_crash(child: Child[str, tuple[str, int]]) -> None:
    with pytest.raises(RuntimeError, match="a mistake"):
        child.call("raise", 60)


def test_a_process_that_the_operating_system_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(process: multiprocessing.process.BaseProcess) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with Child(work) as child:
        with monkeypatch.context() as patch:
            patch.setattr(multiprocessing.process.BaseProcess, "start", refused)
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(RunError, match=r"starts no further process .*temporarily unavailable.*fewer --workers"):
                child.call("a", 60)
            assert len(os.listdir("/proc/self/fd")) == before
        assert child.call("a", 60)[0] == "A" and child.started == 1
