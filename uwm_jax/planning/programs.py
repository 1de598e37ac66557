"""The programs that the command of a config trains: one of a run, one of each group of members of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.sweeps import members as members_lib


def programs(
    file: str, config: ConfigDict, grid: Sequence[str] | None, say: Callable[[str], None]
) -> list[tuple[ConfigDict, tuple[str, ...]]]:
    """(config, names of members) of each program, one after another; a run has one and no members.

    Args:
      file: the flag `--config`.
      grid: the values of the flags `--grid`.
      say: prints the groups of a sweep.
    """
    if not grid and not config_lib.has_members(file):
        return [(config, ())]
    overrides = members_lib.asked_for(file, grid)
    groups = members_lib.groups(members_lib.make_members(config, overrides))
    say(members_lib.describe(groups))
    return [(group[0].config, tuple(member.name for member in group)) for group in groups]
