"""The lines of `metrics.jsonl`, appended to a local file or kept for an object of a bucket, which is put whole."""

from __future__ import annotations

import abc
import io
from pathlib import Path

from uwm_jax.files import Place, write_bytes
from uwm_jax.training.rewritten import Rewritten


class Lines(abc.ABC):
    """Where lines go; those that cannot be written are kept in memory and written with the next ones."""

    @abc.abstractmethod
    def append(self, data: bytes) -> str:
        """Adds lines; returns the reason why lines could not be written yet, "" where there is none."""

    @property
    @abc.abstractmethod
    def behind(self) -> bool:
        """Whether lines are unwritten, which a run that continues from a checkpoint after them would lack forever."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Called before a checkpoint, which must not be durable before the lines up to it are.

        Raises:
          RunError: lines of an object cannot be written. Those of a file may still find room, once the checkpoint is
            complete and an older one deleted.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Raises OSError, with the file's name, or RunError, if lines still cannot be written."""

    @abc.abstractmethod
    def close(self) -> None:
        """Raises as `check`."""


class AppendedLines(Lines):
    """Lines of a local file, written at once."""

    def __init__(self, path: Path):
        self._path = path
        self._file: io.FileIO = path.open("ab", buffering=0)
        self._unwritten = b""

    def append(self, data: bytes) -> str:
        self._unwritten += data
        error = self._write()
        return "" if error is None else str(error.strerror)

    @property
    def behind(self) -> bool:
        return bool(self._unwritten)

    def sync(self) -> None:
        pass

    def check(self) -> None:
        error = self._write()
        if error is not None:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        try:
            self.check()
        finally:
            self._file.close()

    def _write(self) -> OSError | None:
        """Writes pending lines as far as possible; a partially written line is continued."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as e:
            return e
        return None


class RewrittenLines(Lines):
    """Lines of an object, which a thread writes within `rewritten.PUT_SECONDS`."""

    def __init__(self, place: Place, content: bytes):
        self._object = Rewritten(place, content)

    def append(self, data: bytes) -> str:
        self._object.append(data)
        return self._object.failure

    @property
    def behind(self) -> bool:
        return self._object.behind

    def sync(self) -> None:
        self._object.flush()

    def check(self) -> None:
        self._object.flush()

    def close(self) -> None:
        self._object.close()


def continue_lines(place: Place, content: bytes) -> Lines:
    """Lines that follow `content`, which takes the place of whatever a file or an object holds."""
    if not isinstance(place, Path):
        return RewrittenLines(place, content)
    if content or place.is_file():
        write_bytes(place, content)
    return AppendedLines(place)
