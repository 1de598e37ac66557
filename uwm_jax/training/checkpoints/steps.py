"""Which steps of a workdir have a finished checkpoint. Looking does not import jax: supervisors and pages do it."""

from __future__ import annotations

import os
from pathlib import Path

from uwm_jax.reading import again


def latest_step(workdir: str | os.PathLike[str]) -> int | None:
    """The step of the newest finished checkpoint of a workdir, None if there is none; changes nothing."""
    return max(steps_in(Path(workdir) / "checkpoints"), default=None)


def steps_in(directory: Path) -> list[int]:
    """The steps of the finished checkpoints in `<workdir>/checkpoints`, ascending."""
    names = again(lambda: os.listdir(directory) if directory.is_dir() else [], directory)
    return sorted(int(name) for name in names if name.isdigit())
