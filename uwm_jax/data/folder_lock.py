"""The lock on a folder that one process fills, or several that do a share of the work each."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from uwm_jax.errors import UserError, warn

LOCK = ".lock"  # the file in the folder
_PATIENCE = 30.0  # seconds that a share of the work waits for another one to prepare the folder


def hold(directory: Path, alone: bool) -> tuple[int, bool]:
    """The descriptor of the folder's lock, which this process holds until it closes it, and whether no other holds it.

    Args:
        alone: False if other shares of the work may hold it too; even then the first one holds it alone.
    Raises:
        UserError: another process holds it.
    """
    file = directory / LOCK
    deadline = time.monotonic() + (0 if alone else _PATIENCE)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            exclusive = _lock(descriptor, fcntl.LOCK_EX)
            if not exclusive and (alone or not _lock(descriptor, fcntl.LOCK_SH)):
                if time.monotonic() >= deadline:
                    raise in_use(directory, descriptor)
                time.sleep(0.05)
                os.close(descriptor)
                continue
        except OSError as e:
            warn(f"{directory}: this file system has no locks ({e.strerror}): nothing keeps a second job out.")
            return descriptor, True
        except UserError:
            os.close(descriptor)
            raise
        # A job that has just ended may have removed the file that was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                if exclusive:
                    os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_END)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor, exclusive
        os.close(descriptor)


def share(descriptor: int) -> None:
    """Lets other shares hold a lock as well that `hold` took alone."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def _lock(descriptor: int, how: int) -> bool:
    """Whether the lock could be taken; raises OSError on a file system without locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def in_use(directory: Path, descriptor: int) -> UserError:
    """The error that names who holds the lock."""
    holders = ", ".join(os.pread(descriptor, 500, 0).decode(errors="replace").split("\n")[:-1])
    return UserError(f"{directory} is being written by {holders or 'another process'}. Wait for it, or end it first.")
