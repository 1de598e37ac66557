"""What the command of a run says: `python -m uwm_jax.train --config=... --workdir=...`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from uwm_jax.errors import UserError
from uwm_jax.supervision import flag_of

TRAINS = ("uwm_jax.train", "launch.sweep")  # commands with a config that trains


@dataclasses.dataclass(frozen=True)
class TrainingCommand:
    """The parts of a command that launchers read.

    Attributes:
      module: after `python -m`.
      config, workdir: values of these flags, the last of each; "" without one.
      overrides: (field, value) of `--config.FIELD=VALUE`, in order.
      grid: values of `--grid`.
    """

    module: str
    config: str
    workdir: str
    overrides: tuple[tuple[str, str], ...]
    grid: tuple[str, ...]


def read(command: Sequence[str]) -> TrainingCommand:
    """The parts of a command, one argument an entry.

    Raises:
      UserError: it is not `python -m MODULE ...`.
    """
    if tuple(command[:2]) != ("python", "-m") or len(command) < 3:
        raise UserError(
            f"expected a command after --, such as: -- python -m uwm_jax.train --config=FILE --workdir=gs://..., found "
            f"{' '.join(command) or 'nothing'}."
        )
    overrides, grid = [], []
    for word, after in zip(command, [*command[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        name, value = flag.lstrip("-"), value if equals else after
        if not word.startswith("-"):
            continue
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        elif name == "grid":
            grid.append(value)
    config, workdir = (flag_of(command, name) or "" for name in ("config", "workdir"))
    return TrainingCommand(command[2], config, workdir, tuple(overrides), tuple(grid))


def with_slices(command: Sequence[str], slices: int) -> list[str]:
    """The command of a run on several slices, told how many where it does not say so itself."""
    asked = read(command)
    told = "mesh.slices" in dict(asked.overrides)
    more = [f"--config.mesh.slices={slices}"] if slices > 1 and asked.module in TRAINS and not told else []
    return [*command, *more]
