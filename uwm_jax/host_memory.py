"""Memory of the host: how much is free, and what becomes of that which XLA frees on CPUs.

XLA takes a CPU's buffers from the C library. glibc gives large ones back to the system as soon as they are free, so
that every step would fault them in again, page by page (docs/benchmarks.md): commands tell it to keep them. What is
never needed again, such as what the compiler worked with, is given back by `give_back`.
"""

from __future__ import annotations

import contextlib
import ctypes
from importlib.metadata import entry_points
from pathlib import Path

from uwm_jax import host_tpu

_kept: list[ctypes.CDLL] = []  # the C library, once it has been told


def keep_freed() -> None:
    """Keeps the memory that a step frees with the process for the next one, if JAX has CPUs only.

    In one arena that all threads share, so this is called before they start. Other C libraries than glibc are left as
    they are.
    """
    if entry_points(group="jax_plugins") or host_tpu.attached():
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        for parameter, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            library.mallopt(parameter, value)
        _kept[:] = [library]


def give_back() -> None:
    """Gives what is free now back to the system, where `keep_freed` keeps it: after a compilation, before the steps."""
    for library in _kept:
        library.malloc_trim(0)


def available() -> int | None:
    """Bytes that the system can give to programs without swapping; None where it does not say (other than Linux)."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None
