"""A disk that is full."""

from __future__ import annotations

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(size):
    """Writes of a process beyond `size` of any file fail with EFBIG, as a full disk does with ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
