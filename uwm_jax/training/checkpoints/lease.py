"""The lock of a workdir in a bucket: an object that its holder renews, under preconditions.

`<workdir>/.lock` tells who holds it, and is rewritten every quarter of `LEASE_SECONDS`. Each write names the generation
that it replaces, so of several writers one succeeds. Another process takes the lock over when its holder has released
it, is a dead process of the same machine, or has not renewed it for a lease; clocks of machines are never compared. A
holder that was stopped or cut off for longer finds out at its next renewal, before it does anything that counts.

The holder has a nonce, which names its checkpoints (`steps.py`). Whoever takes the lock notes in it up to which step
those of earlier holders count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uwm_jax import files
from uwm_jax.errors import RunError, warn
from uwm_jax.files import Generation, Place
from uwm_jax.training.checkpoints import steps

LEASE_SECONDS = 60.0  # after which a lock that was not renewed is taken over
RENEWALS = 4  # in a lease
RELEASE_SECONDS = 10.0  # for giving the lock back; without that the next one waits for the end of the lease

_POLLS = 30  # in a lease, by a process that waits for a sign of life
_UNKNOWN = "unknown"  # when a process began that /proc does not show, as other users' where it is mounted with hidepid


class LostLock(RunError):
    """Another process has taken the lock over."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a lock object holds.

    Attributes:
      nonce: 12 random hexadecimal digits, new whenever the lock is taken.
      holder: for people: `process 12 on host`.
      machine, pid, started: tell whether the holder still lives, to processes of the same machine.
      lease_seconds: of the holder.
      renewals: so far.
      released: whether the holder has given it back.
      earlier: as `steps.Tenures.earlier`.
    """

    nonce: str
    holder: str
    machine: str
    pid: int
    started: str
    lease_seconds: float
    renewals: int = 0
    released: bool = False
    earlier: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def own(cls, earlier: Mapping[str, int | None]) -> Record:
        pid = os.getpid()
        return cls(
            nonce=secrets.token_hex(6),
            holder=f"process {pid} on {socket.gethostname()}",
            machine=_machine(),
            pid=pid,
            started=_started(pid),
            lease_seconds=LEASE_SECONDS,
            earlier=earlier,
        )

    @classmethod
    def parse(cls, data: bytes) -> Record | None:
        """None for bytes that are no record."""
        try:
            found: dict[str, Any] = json.loads(data)
            record = cls(**{field.name: found[field.name] for field in dataclasses.fields(cls)})
            return dataclasses.replace(record, lease_seconds=float(record.lease_seconds))
        except (ValueError, KeyError, TypeError):
            return None

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def is_dead(self) -> bool:
        """Whether the holder was a process of this machine, and has ended."""
        same = bool(self.machine) and self.machine == _machine()
        return same and _started(self.pid) not in (self.started, _UNKNOWN)


class Lease:
    """A lock that this process holds; a thread renews it until `release`.

    Attributes:
      nonce: of this holder.
    """

    def __init__(self, file: Place, record: Record, generation: Generation, renewed: float):
        self._file, self._record, self._generation, self._renewed = file, record, generation, renewed
        self._lost: str | None = None
        self._writing = threading.RLock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock of the workdir", daemon=True)

    @property
    def nonce(self) -> str:
        return self._record.nonce

    @classmethod
    def take(cls, workdir: Place, sleep: Callable[[float], None] = time.sleep) -> Lease | str:
        """Takes the lock of a workdir, or tells who holds it.

        A holder that shows no sign of life is waited for, at most for its lease.

        Raises:
          StorageError: the bucket cannot be read or written.
        """
        file = workdir / steps.LOCK
        found = files.read_with_generation(file)
        before = None if found is None else Record.parse(found[0])
        if found is None or before is None:  # none, or that of a local workdir which was uploaded
            record = Record.own(dict.fromkeys(steps.nonces_in(workdir / "checkpoints")))
            if found is None:
                return cls._write(file, record, lambda data: files.create(file, data))
            return cls._write(file, record, lambda data: files.replace_if(file, data, found[1]))
        freed = _wait_until_free(file, before, found[1], sleep)
        if isinstance(freed, str):
            return freed
        before, generation = freed
        record = Record.own({**before.earlier, before.nonce: None})
        return cls._write(file, record, lambda data: files.replace_if(file, data, generation))

    @classmethod
    def _write(cls, file: Place, record: Record, write: Callable[[bytes], Generation | None]) -> Lease | str:
        began = _now()
        generation = write(record.encode())
        if generation is None:  # another process was faster
            return _holder_of(file)
        lease = cls(file, record, generation, began)
        if record.earlier:  # from now on no other marker of earlier holders counts
            directory, tenures = file.parent / "checkpoints", steps.Tenures(record.nonce, record.earlier)
            lease._record = dataclasses.replace(record, earlier=steps.settled(directory, tenures))
            lease.renew()
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Raises where the lock is lost; costs nothing while it is fresh, and renews it when it is not.

        Raises:
          LostLock: another process has it.
          StorageError: it could not be renewed in time.
        """
        if self._lost is None and _now() - self._renewed > self._record.lease_seconds * (1 - 1 / RENEWALS):
            self.renew()
        if self._lost is not None:
            raise LostLock(self._lost)

    def renew(self) -> None:
        """A fresh look: writes the lock once more, if it is still as this process wrote it. Raises as `check` does."""
        with self._writing:
            if self._lost is None:
                began = _now()
                record = dataclasses.replace(self._record, renewals=self._record.renewals + 1)
                generation = self._replace(record)
                if generation is None:
                    self._lost = self._describe_loss(began)
                else:
                    self._record, self._generation, self._renewed = record, generation, began
            if self._lost is not None:
                raise LostLock(self._lost)

    def release(self) -> None:
        """Gives the lock back. Raises nothing: where the bucket cannot be reached, the lease ends by itself."""
        self._stopped.set()
        with self._writing, files.within(RELEASE_SECONDS):
            if self._lost is not None:
                return
            self._lost = f"{self._file}: this lock was given back."
            record = dataclasses.replace(self._record, released=True)
            try:
                self._replace(record)
            except (RunError, OSError) as e:
                warn(f"{e} The lock ends by itself in {self._record.lease_seconds:g} s.")

    def _replace(self, record: Record) -> Generation | None:
        """Writes the lock, if it is still as this process wrote it; None where somebody else has it.

        A renewal whose answer was lost, for which there was no time left to ask, has this process's nonce.
        """
        generation = files.replace_if(self._file, record.encode(), self._generation)
        if generation is None and (found := files.read_with_generation(self._file)) is not None:
            stored = Record.parse(found[0])
            if stored is not None and stored.nonce == record.nonce:
                return files.replace_if(self._file, record.encode(), found[1])
        return generation

    def _keep(self) -> None:
        pause = self._record.lease_seconds / RENEWALS
        while not self._stopped.wait(pause):
            try:
                with files.within(pause):
                    if not self._stopped.is_set():
                        self.renew()
            except LostLock:
                return
            except (RunError, OSError):
                pass  # `check` tries once more, and tells, when the lease comes to its end

    def _describe_loss(self, now: float) -> str:
        silent = now - self._renewed
        return (
            f"--workdir: this run has lost the lock of {str(self._file.parent)!r}, which it did not renew for "
            f"{silent:.0f} s: {_holder_of(self._file)} has it now. This process ends; nothing that it still writes "
            "counts. Wait for the end of the other run, or use another --workdir."
        )


def _wait_until_free(
    file: Place, record: Record, generation: Generation, sleep: Callable[[float], None]
) -> tuple[Record, Generation] | str:
    """The record and the generation of a lock that may be taken over; or the name of its holder, who lives."""
    if record.released or record.is_dead():
        return record, generation
    seconds, began = record.lease_seconds, _now()
    warn(f"{file}: held by {record.holder}; waiting up to {seconds:g} s for a sign of life.")
    while _now() - began < seconds and not record.is_dead():
        sleep(seconds / _POLLS)
        found = files.read_with_generation(file)
        if found is None:
            return record.holder
        if found[1] != generation:
            now = Record.parse(found[0])
            return (now, found[1]) if now is not None and now.released else _name(now)
    return record, generation


def _holder_of(file: Place) -> str:
    try:
        found = files.read_with_generation(file)
    except (RunError, OSError):
        found = None
    return _name(None if found is None else Record.parse(found[0]))


def _name(record: Record | None) -> str:
    return "another process" if record is None else record.holder


def _now() -> float:
    """Seconds that also pass while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def _machine() -> str:
    """One start of one machine, and the numbers of processes that are valid here; "" where that is unknown."""
    if sys.platform != "linux":
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, in ticks since its start; "" if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _UNKNOWN if _is_there(pid) else ""
    except OSError:
        return _UNKNOWN
    return "" if fields[0] in "ZX" else fields[19]


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True
