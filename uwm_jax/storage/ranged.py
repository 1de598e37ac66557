"""Ranges of bytes of the objects in a folder, with many reads in flight.

A read takes a round trip to the bucket, some 50 ms, in which nothing else needs to wait: `begin` starts it, `read`
takes what came. tensorstore's key-value stores do the reading, which also read local folders.
"""

from __future__ import annotations

import collections
import errno
import functools
import os
import threading
from pathlib import Path
from typing import Any

from uwm_jax.storage import client, environment
from uwm_jax.storage.errors import StorageError, is_passing
from uwm_jax.storage.remote_path import RemotePath

IN_FLIGHT = 64  # requests of this process at a time; more wait for their turn
MOST_BYTES = 1 << 29  # that are begun and not taken; beyond them the oldest are given up, to be read again if needed
RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "8s"}

_Range = tuple[str, int, int]


class RangedFolder:
    """Reads ranges of the files in a folder; safe to use from many threads.

    Args:
        place: of the folder.
    """

    def __init__(self, place: Path | RemotePath):
        self._place = place
        self._store: Any = None
        self._lock = threading.Lock()
        self._begun: collections.OrderedDict[_Range, tuple[Any, int]] = collections.OrderedDict()  # (future, takers)
        self._bytes = 0

    def begin(self, name: str, start: int, stop: int) -> None:
        """Starts to read bytes [start, stop) of a file, which one `read` of the same takes."""
        wanted = name, start, stop
        with self._lock:
            if wanted in self._begun:
                future, takers = self._begun[wanted]
                self._begun[wanted] = future, takers + 1
                return
            self._begun[wanted] = self._start(wanted), 1
            self._bytes += stop - start
            while self._bytes > MOST_BYTES and len(self._begun) > 1:
                (_, first, last), _ = self._begun.popitem(last=False)
                self._bytes -= last - first

    def read(self, name: str, start: int, stop: int, seconds: float = 0.0) -> bytes:
        """The bytes [start, stop) of a file.

        Args:
            seconds: to wait for them; 0 for `environment.SILENCE_SECONDS`.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it ends before `stop`.
            TimeoutError: they did not come in time.
            StorageError: they cannot be read, and trying again does not help; a login was refreshed once.
            OSError: a passing failure, with `errno` EIO.
        """
        wanted, seconds = (name, start, stop), seconds or environment.SILENCE_SECONDS
        with self._lock:
            future = self._taken(wanted) or self._start(wanted)
        try:
            found = future.result(timeout=seconds)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(errno.ETIMEDOUT, f"no answer in {seconds:g} s", self._where(name)) from None
        except Exception as e:
            if isinstance(self._place, RemotePath) and _is_refused(e):  # by our own login, or told in its words
                return client.read_range(self._place.bucket, (self._place / name).key, start, stop)
            raise _told(e, self._where(name)) from e
        if found.state == "missing":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._where(name))
        if len(data := found.value) != stop - start:
            raise OSError(errno.EIO, f"{len(data)} of {stop - start} bytes came", self._where(name))
        return data

    def forget(self) -> None:
        """Gives up what is begun and not taken."""
        with self._lock:
            for future, _ in self._begun.values():
                future.cancel()
            self._begun.clear()
            self._bytes = 0

    def _where(self, name: str) -> str:
        return str(self._place / name)

    def _taken(self, wanted: _Range) -> Any:
        if wanted not in self._begun:
            return None
        future, takers = self._begun[wanted]
        if takers > 1:
            self._begun[wanted] = future, takers - 1
        else:
            del self._begun[wanted]
            self._bytes -= wanted[2] - wanted[1]
        return future

    def _start(self, wanted: _Range) -> Any:
        if self._store is None:
            self._store = _open(self._place)
        name, start, stop = wanted
        return self._store.read(name, byte_range=slice(start, stop))


def _open(place: Path | RemotePath) -> Any:
    import tensorstore

    if isinstance(place, RemotePath):
        environment.prepare()
        spec = {"driver": "gcs", "bucket": place.bucket, "path": f"{place.key}/" if place.key else ""}
    else:
        spec = {"driver": "file", "path": f"{place.absolute()}/"}
    return tensorstore.KvStore.open(spec, context=_context()).result()


@functools.cache
def _context() -> Any:
    """What all folders share: connections and their limits."""
    import tensorstore

    limits = {"gcs_request_concurrency": {"limit": IN_FLIGHT}, "gcs_request_retries": RETRIES}
    return tensorstore.Context(limits)


def _is_refused(error: Exception) -> bool:
    """Whether the bucket refused the login, which tensorstore does not refresh then."""
    return any(word in str(error)[:600] for word in ("UNAUTHENTICATED", "PERMISSION_DENIED"))


def _told(error: Exception, where: str) -> Exception:
    """tensorstore's error, a ValueError whose text begins with absl's status, as ours."""
    cause = str(error).strip().splitlines()[0][:300].rstrip(".") if str(error).strip() else type(error).__name__
    if "OUT_OF_RANGE" in cause:
        return ValueError("the file ends before the last byte that was asked for")
    if is_passing(error):
        return OSError(errno.EIO, cause, where)
    return StorageError("reading", where, cause)
