"""Memory of batches that is used again: fresh memory costs a fault for every page, a fifth of reading a batch."""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping

import jax
import numpy as np

from uwm_jax.data.spec import Batch

WORTH = 1 << 20  # bytes from which an array is worth keeping
KEPT = 4  # idle arrays of a size, or those of one batch if it has more; others are given back to the system


class Buffers:
    """Makes arrays, whose memory it takes again when nothing refers to an array or a part of it any more.

    JAX refers to an array for as long as it copies from it, or uses its memory as that of a device.
    """

    def __init__(self) -> None:
        # Taken again by the same thread where the collection of garbage, at any allocation, frees an array.
        self._lock = threading.RLock()
        self._idle: dict[int, list[np.ndarray]] = {}
        self._kept: dict[int, int] = {}

    def empty(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> Batch:
        """Arrays of these shapes and dtypes, with any content."""
        for size, count in collections.Counter(map(_size, like.values())).items():
            self._kept[size] = max(self._kept.get(size, KEPT), count)
        return {key: self._array(one) for key, one in like.items()}

    def _array(self, like: jax.ShapeDtypeStruct) -> np.ndarray:
        size = _size(like)
        if size < WORTH:
            return np.empty(like.shape, like.dtype)
        with self._lock:
            idle = self._idle.get(size)
            memory = idle.pop() if idle else None
        if memory is None:
            memory = np.empty(size, np.uint8)
        return np.asarray(_Lease(self, memory)).view(like.dtype).reshape(like.shape)

    def _back(self, memory: np.ndarray) -> None:
        with self._lock:
            idle = self._idle.setdefault(memory.nbytes, [])
            if len(idle) < self._kept[memory.nbytes]:
                idle.append(memory)


def _size(like: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(like.shape)) * np.dtype(like.dtype).itemsize


class _Lease:
    """The owner of an array's memory, as numpy sees it: it lives for as long as any part of the array."""

    def __init__(self, buffers: Buffers, memory: np.ndarray):
        self._buffers, self._memory = buffers, memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._buffers._back(self._memory)
