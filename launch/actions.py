"""The arguments of launchers: an action, and the name of the one thing that it is about."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from uwm_jax.errors import UserError, suggest


def read(found: Sequence[str], actions: Collection[str], thing: str) -> tuple[str, str]:
    """(action, name) of a command's arguments.

    Args:
      thing: what the name names, for messages.

    Raises:
      UserError: another action, or not one name.
    """
    if not found or found[0] not in actions:
        hint = suggest(found[0], actions) if found else ""
        raise UserError(f"expected one of {', '.join(actions)}, found {found[0] if found else 'nothing'}.{hint}")
    if len(found) != 2:
        raise UserError(f"{found[0]}: expected the name of one {thing}, found {' '.join(found[1:]) or 'none'}.")
    return found[0], found[1]


def refuse_command(command: Sequence[str], action: str) -> None:
    """Raises UserError where a command follows `--` of an action that takes none."""
    if command:
        raise UserError(f"{action}: no command after -- is expected, found {command[0]}.")
