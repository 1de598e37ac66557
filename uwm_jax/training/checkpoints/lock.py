"""One writer for one workdir: a second start next to a live run would delete what that is saving.

Locally the kernel keeps the lock and frees it with the process. In a bucket it is an object (`lease.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from uwm_jax import files
from uwm_jax.errors import warn
from uwm_jax.files import Place
from uwm_jax.training.checkpoints import steps
from uwm_jax.training.checkpoints.lease import Lease

# By this process: {workdir: (a descriptor, or the lease, and how many times)}.
_held: dict[Place, tuple[int | Lease, int]] = {}


def hold(workdir: Place) -> str | None:
    """Takes the lock `<workdir>/.lock` for this process, which may take it more than once.

    It ends with `release`, or with the process: in a bucket a lease after that. Where the file system has no locks it
    always succeeds.

    Returns:
        who holds it, where that is another process; None when it was taken.

    Raises:
        StorageError: the bucket cannot be read or written.
    """
    workdir = workdir.absolute()
    if workdir in _held:
        lock, times = _held[workdir]
        _held[workdir] = lock, times + 1
        return None
    taken = Lease.take(workdir) if files.is_remote(workdir) else _take_local(Path(str(workdir / steps.LOCK)))
    if isinstance(taken, str):
        return taken
    _held[workdir] = taken, 1
    return None


def check(workdir: Place) -> None:
    """Raises LostLock where another process has taken over a lock that this one held; cheap: call it every step.

    Does nothing where this process holds none. In a bucket it may renew the lock, and then raises StorageError where
    that fails.
    """
    if lease := lease_of(workdir):
        lease.check()


def lease_of(workdir: Place) -> Lease | None:
    """What this process holds in a bucket; None for a local workdir, or where it holds nothing."""
    lock, _ = _held.get(workdir.absolute(), (None, 0))
    return lock if isinstance(lock, Lease) else None


def release(workdir: Place) -> None:
    """Gives back what `hold` took; the file stays."""
    workdir = workdir.absolute()
    lock, times = _held.pop(workdir)
    if times > 1:
        _held[workdir] = lock, times - 1
    elif isinstance(lock, Lease):
        lock.release()
    else:
        os.close(lock)


def _take_local(file: Path) -> int | str:
    """The descriptor of the locked file, or who holds it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 500).decode(errors="replace").strip()
        os.close(descriptor)
        return holder or "another process"
    except OSError as e:
        warn(f"{file.parent}: this file system has no locks ({e.strerror}): nothing keeps a second run out.")
    else:
        with contextlib.suppress(OSError):  # a full disk; the words are for people, the lock is the kernel's
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
