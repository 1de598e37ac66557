"""Writes `sweep.json` of a sweep's directory: its members, how far each has come, and which have diverged.

`record_file.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uwm_jax.errors import UserError, warn
from uwm_jax.files import write_text
from uwm_jax.parallel import distributed
from uwm_jax.sweeps.members import Member
from uwm_jax.sweeps.record_file import DIVERGED, DONE, FILE, MEMBERS, STOPPED, TRAINING, WAITING, read

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
        self, directory: Path, members: Sequence[Member], groups: Sequence[Sequence[str]], command: Sequence[str]
    ):
        self._file = directory / FILE
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

    def set_saved(self, names: Sequence[str], step: int) -> None:
        for name in names:
            self.members[name]["saved"] = step

    def write(self) -> None:
        """Writes the file; a disk that is full for a while does not end a sweep."""
        if distributed.is_main():
            try:
                write_text(self._file, json.dumps({**self._fixed, "members": self.members}, indent=2) + "\n")
            except OSError as e:
                warn(f"{self._file} cannot be written ({e.strerror}). The sweep goes on; the next line is tried again.")
