"""A run, or an export folder, becomes a repository of the hub; nothing is sent before all of it is ready."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uwm_jax import config as config_lib
from uwm_jax import files
from uwm_jax.conversion.export_folder import to_folder
from uwm_jax.errors import UserError, warn
from uwm_jax.files import Place
from uwm_jax.hub import upload
from uwm_jax.reading import read_json
from uwm_jax.reporting.card import card
from uwm_jax.reporting.results import Run
from uwm_jax.torch_bridge.description import DESCRIPTION, FORMAT, PROBE, PROGRAM, WEIGHTS

CARD = "README.md"


@dataclass(frozen=True)
class Repository:
    """Where something is uploaded to.

    Attributes:
      name: owner/name; made where there is none.
      licence: of the weights, by the hub's identifier.
      private: whether a new repository is private.
      dry_run: all is made and shown, and nothing is sent.
    """

    name: str
    licence: str
    private: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Raises UserError for a name that is none, and where nobody is logged in who could write."""
        upload.check_repository(self.name)
        if not self.dry_run:
            upload.require_token(self.name)


def push_run(
    workdir: Place,
    to: Repository,
    step: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    parameters: str | None = None,
    uses: Sequence[str] = (),
    limits: str | None = None,
) -> None:
    """Uploads the export folder of a checkpoint, with the results that lie in its workdir.

    Args:
      step, overrides, parameters, uses, limits: as in `to_folder`.

    Raises:
      UserError: as `Repository.check`, `to_folder` and `upload.upload`.
    """
    to.check()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "export"
        to_folder(workdir, folder, step, overrides, parameters, uses, limits)
        _send(folder, to, Run.read(workdir))


def push_export(export: Place, to: Repository) -> None:
    """Uploads an export folder as it is; its card has no results.

    Raises:
      UserError: it is none; or as `Repository.check` and `upload.upload`.
    """
    to.check()
    missing = [name for name in (WEIGHTS, DESCRIPTION) if not (export / name).is_file()]
    if missing or read_json(export / DESCRIPTION).get("format") != FORMAT:
        raise UserError(
            f"--export={export}: expected a folder of `python -m uwm_jax.convert to-torch --output=DIR/`; "
            f"{f'{missing[0]} is missing' if missing else f'{DESCRIPTION} is of another format'}."
        )
    with tempfile.TemporaryDirectory() as temporary:
        for name in (WEIGHTS, DESCRIPTION, PROBE, PROGRAM):
            if (export / name).is_file():
                (Path(temporary) / name).symlink_to(files.local_copy(export / name).resolve())
        _send(Path(temporary), to, None)


def _send(folder: Path, to: Repository, run: Run | None) -> None:
    described = read_json(folder / DESCRIPTION)
    text = card(to.name, described, to.licence, run, program=(folder / PROGRAM).is_file())
    files.write_text(folder / CARD, text)
    for field in _local_paths(described["config"]):
        warn(f"{DESCRIPTION} names a path of this machine: config.{field}.")
    upload.refuse_tokens(folder)
    print(text, flush=True)
    for path in sorted(folder.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    if to.dry_run:
        print(f"nothing was sent to {to.name} (--dry_run)")
        return
    message = f"Step {described['step']}, exported by uwm_jax {described['code_version']}"
    print(f"uploaded: {upload.upload(folder, to.name, private=to.private, message=message)}")


def _local_paths(config: Mapping[str, Any]) -> list[str]:
    """The fields of a config that hold an absolute path, each as `name=value`."""
    flat = config_lib.flatten(config_lib.ConfigDict(dict(config)))
    return [f"{name}={value}" for name, value in flat.items() if isinstance(value, str) and os.path.isabs(value)]
