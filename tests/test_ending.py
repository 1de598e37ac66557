"""The last words of a process, also where nobody can hear them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from uwm_jax.ending import last_words


def test_last_words_are_said(capsys):
    last_words("error: all is lost")
    last_words()
    assert capsys.readouterr() == ("", "error: all is lost\n")


@pytest.mark.parametrize("how", ["pipe", "closed", "none"])
def test_a_process_ends_although_nobody_hears_why(monkeypatch, how):
    """A thread that ends the process says why before it does: an error there would leave the process for ever."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = [os.fdopen(os.dup(writer), "w") for _ in range(2)]
    os.close(writer)
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        stream.write("not flushed yet")
        monkeypatch.setattr(sys, name, None if how == "none" else stream)
    if how != "pipe":
        for stream in streams:
            with pytest.raises(BrokenPipeError):
                stream.close()
    last_words("error: all is lost")
    monkeypatch.undo()
    if how == "pipe":
        for stream in streams:
            with pytest.raises(BrokenPipeError):
                stream.close()


def test_a_process_ends_with_its_parent(ends):
    child = "from uwm_jax.ending import end_with; import os, time; end_with(os.getppid()); print(1, flush=True)"
    child += "; time.sleep(99)"
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(99)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert ends(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's end")
def test_a_process_whose_parent_has_ended_before_ends():
    command = [sys.executable, "-c", "from uwm_jax.ending import end_with; end_with(1)"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run(command, env=environment, timeout=60).returncode == -signal.SIGKILL
