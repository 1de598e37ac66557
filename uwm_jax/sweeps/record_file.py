"""`sweep.json` of a sweep's directory, as it is read: its members, how far each has come, and which have diverged.

Each member trains in an ordinary workdir, `members/<name>`; this file is what the sweep knows besides. Reading it
does not import jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uwm_jax.errors import UserError
from uwm_jax.files import Place
from uwm_jax.reading import read_json

FILE, MEMBERS = "sweep.json", "members"
WAITING, TRAINING, STOPPED, DIVERGED, DONE = STATUSES = ("waiting", "training", "stopped", "diverged", "done")


def read(directory: Place) -> dict[str, dict[str, Any]]:
    """{member: {"overrides", "status", "last_losses", ...}} of a sweep's directory.

    Raises:
      UserError: it holds no sweep, or a damaged `sweep.json`.
    """
    file = directory / FILE
    try:
        members = read_json(file).get("members")
    except FileNotFoundError as e:
        raise UserError(f"--workdir: {str(directory)!r} holds no sweep (there is no {FILE}).") from e
    if not isinstance(members, dict) or not all(_is_member(member) for member in members.values()):
        raise UserError(
            f"{file}: expected {{'members': {{name: {{'overrides', 'status', 'last_losses'}}}}}}: "
            "restore the file from a copy, or start the sweep again in a new --workdir."
        )
    return members


def _is_member(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("overrides"), Mapping)
        and value.get("status") in STATUSES
        and isinstance(value.get("last_losses"), Mapping)
        and isinstance(value.get("saved", 0), int)
    )
