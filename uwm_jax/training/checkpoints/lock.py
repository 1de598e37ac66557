"""One writer for one workdir: a second start next to a live run would delete what that is saving."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from uwm_jax.errors import warn

_held: dict[Path, tuple[int, int]] = {}  # by this process: {file: (descriptor, how many times)}


def hold(workdir: Path) -> str | None:
    """Takes the lock `<workdir>/.lock` for this process, which may take it more than once.

    It ends with `release` or with the process. Where the file system has no locks it always
    succeeds.

    Returns:
        who holds it, where that is another process; None when it was taken.
    """
    file = workdir.absolute() / ".lock"
    if file in _held:
        descriptor, times = _held[file]
        _held[file] = descriptor, times + 1
        return None
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 500).decode(errors="replace").strip()
        os.close(descriptor)
        return holder or "another process"
    except OSError as e:
        warn(f"{workdir}: this file system has no locks ({e.strerror}): nothing keeps a second run out.")
    else:
        with contextlib.suppress(OSError):  # a full disk; the words are for people, the lock is the kernel's
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[file] = descriptor, 1
    return None


def release(workdir: Path) -> None:
    """Gives back what `hold` took; the file stays."""
    file = workdir.absolute() / ".lock"
    descriptor, times = _held.pop(file)
    if times > 1:
        _held[file] = descriptor, times - 1
    else:
        os.close(descriptor)
