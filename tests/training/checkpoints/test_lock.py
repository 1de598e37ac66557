"""One writer for one workdir, as far as the file system can tell."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from uwm_jax.training.checkpoints import lock


def test_a_lock_is_held_until_it_is_released_as_often_as_it_was_taken(tmp_path):
    assert lock.hold(tmp_path) is None and lock.hold(tmp_path) is None
    lock.release(tmp_path)
    with (tmp_path / ".lock").open("r+") as other:  # another descriptor is as another process
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("the lock was free")
        except BlockingIOError:
            pass
        lock.release(tmp_path)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.write("process 1 on elsewhere")
        other.flush()
        assert lock.hold(tmp_path) == "process 1 on elsewhere"
        assert lock.hold(tmp_path) == "process 1 on elsewhere", "being refused takes nothing"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert lock.hold(tmp_path) is None
    assert "has no locks (No locks available): nothing keeps a second run out" in capsys.readouterr().err
    lock.release(tmp_path)


def test_a_full_disk_takes_no_lock_away(tmp_path, monkeypatch):
    """The name of the holder is for people; what a run cannot write is told with its name where it matters."""

    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    assert lock.hold(tmp_path) is None
    monkeypatch.undo()
    with (tmp_path / ".lock").open("r+") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release(tmp_path)
