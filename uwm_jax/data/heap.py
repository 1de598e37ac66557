"""The heap of a process that reads records."""

from __future__ import annotations

import ctypes
import functools

TRIM = 64 << 20  # bytes at the end of the heap that malloc keeps
MAPPED = 8 << 20  # bytes from which it maps an allocation by itself; records are smaller, batches larger


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc's malloc keep some megabytes that are freed, in this process; does nothing elsewhere.

    Reading a record allocates and frees about three times its size. By default that memory may go back to the system
    each time, depending on what else lies in the heap, and the faults of its pages then cost several times the read.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(-1, TRIM)  # M_TRIM_THRESHOLD
    mallopt(-3, MAPPED)  # M_MMAP_THRESHOLD
