"""`run.json` of a workdir: with which command, config file and code each start of a run was made."""

from __future__ import annotations

import ast
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import uwm_jax
from uwm_jax.config import flatten, load
from uwm_jax.errors import UserError
from uwm_jax.files import write_text

FILE = "run.json"


def describe(command: Sequence[str], config_file: str, config: ConfigDict, overrides: Sequence[str]) -> dict[str, Any]:
    """One start of a run, as JSON.

    Args:
      command: the command line, one argument an entry.
      config_file: what `--config` was, `FILE.py[:argument]`.
      config: as the run uses it.
      overrides: names of the fields that flags changed on top of the file, such as `model.depth`.

    Returns:
      {"command", "config_file", "about": first paragraph of the file's docstring, "changed": {field: the run's value},
      "in_file": {field: the file's value} of the same fields, "code_version", "time": UTC, ISO 8601}.
    """
    names, flat = sorted(set(overrides)), flatten(config)
    in_file = _in_file(config_file) if names else {}  # the file is run once more for it
    return {
        "command": list(command),
        "config_file": config_file,
        "about": _about(Path(config_file.partition(":")[0])),
        "changed": {name: flat[name] for name in names},
        "in_file": {name: in_file[name] for name in names if name in in_file},
        "code_version": uwm_jax.__version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _in_file(config_file: str) -> dict[str, Any]:
    try:
        return flatten(load(config_file))
    except UserError:  # a file that is complete only with flags
        return {}


def _about(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def add_start(workdir: Path, start: dict[str, Any]) -> None:
    """Appends what `describe` returned to `run.json`, which is made where there is none."""
    write_text(workdir / FILE, json.dumps({"starts": [*read_starts(workdir), start]}, indent=2) + "\n")


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """All starts of a run, the oldest first; [] where there is no `run.json`, or none that can be read."""
    try:
        return list(json.loads((workdir / FILE).read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
