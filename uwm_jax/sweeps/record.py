"""Writes `sweep.json` of a sweep's directory: its members, how far each has come, and which have diverged.

`record_file.py` reads it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.files import Place, is_remote, write_text
from uwm_jax.parallel import distributed
from uwm_jax.storage.errors import StorageError
from uwm_jax.sweeps.members import Member
from uwm_jax.sweeps.record_file import DIVERGED, DONE, FILE, MEMBERS, STOPPED, TRAINING, WAITING, read
from uwm_jax.training.rewritten import Rewritten

__all__ = ["DIVERGED", "DONE", "FILE", "MEMBERS", "STOPPED", "TRAINING", "WAITING", "Record", "read"]


class Record:
    """The record of a sweep; the main process writes it.

    Args:
      directory: of the sweep.
      members: all of them, of all groups.
      groups: names of the members of each program.
      command: that started it.

    Raises:
      UserError: the directory holds a sweep of other members, or a `sweep.json` that is not one.
    """

    def __init__(
        self, directory: Place, members: Sequence[Member], groups: Sequence[Sequence[str]], command: Sequence[str]
    ):
        self._file = directory / FILE
        self._object: Rewritten | None = None  # in a bucket, from the first `write` on
        self._fixed = {"command": list(command), "groups": [list(names) for names in groups]}
        before = read(directory) if self._file.exists() else {}
        self.members: dict[str, dict[str, Any]] = {}
        for member in members:
            past = before.get(member.name, {})
            if past and past["overrides"] != json.loads(json.dumps(member.overrides)):
                raise UserError(
                    f"{self._file}: the member {member.name!r} has the overrides {past['overrides']} there, and "
                    f"{member.overrides} now: use a new --workdir."
                )
            self.members[member.name] = past or {"overrides": member.overrides, "status": WAITING, "last_losses": {}}
        if before and (others := sorted(before.keys() ^ self.members.keys())):
            raise UserError(
                f"{self._file}: the sweep there has other members ({', '.join(others)} are in one of both only). It "
                "continues with those that it was started with; others need a new --workdir."
            )

    def has_diverged(self, name: str) -> bool:
        return self.members[name]["status"] == DIVERGED

    def set(self, name: str, status: str, **fields: Any) -> None:
        """Sets a member's status, one of STATUSES, and other fields, such as `step` and `last_losses`."""
        self.members[name] |= {"status": status, **fields}

    def saved(self, name: str) -> int:
        """The newest step of which this member and all others of its program had a whole checkpoint; 0 for none."""
        return self.members[name].get("saved", 0)

    def open(self, names: Sequence[str]) -> float:
        """These members have steps to train, also where they were done with fewer; written at once.

        Returns when they were first opened, Unix seconds.
        """
        before = {name: dict(self.members[name]) for name in names}
        for name in names:
            self.members[name].setdefault("began", time.time())
            if self.members[name]["status"] == DONE:
                self.members[name]["status"] = WAITING
        if any(self.members[name] != before[name] for name in names):
            self.write()
        return min(self.members[name]["began"] for name in names)

    def set_saved(self, names: Sequence[str], step: int) -> None:
        for name in names:
            self.members[name]["saved"] = step

    def write(self, durable: bool = True) -> None:
        """Writes the file; a disk that is full, or a bucket that is away, for a while does not end a sweep.

        Args:
          durable: on return. A bucket gets what may take a while from a thread.

        Raises:
          RunError: another process has written it: the sweep's directory is that process's now.
        """
        if not distributed.is_main():
            return
        text = json.dumps({**self._fixed, "members": self.members}, indent=2) + "\n"
        try:
            if not is_remote(self._file):
                write_text(self._file, text)
            elif self._object is None:
                self._object = Rewritten(self._file, text.encode())
            else:
                self._object.replace(text.encode())
                if durable:
                    self._object.flush()
        except (OSError, StorageError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            warn(f"{self._file} cannot be written ({reason}). The sweep goes on; the next line is tried again.")

    def close(self) -> None:
        """Ends what writes the file; the last `write` stays."""
        if self._object is not None:
            with contextlib.suppress(RunError):  # `write` has told it
                self._object.close()
