"""Provenance: command, config and code version; `run.json` of a workdir holds it of each start of a run."""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import uwm_jax
from uwm_jax.config import flatten, load
from uwm_jax.errors import UserError, warn
from uwm_jax.files import Place, local_path, move, write_text
from uwm_jax.reading import read_json

FILE = "run.json"

_USE: dict[str, type] = {"command": list, "changed": dict, "code_version": str, "time": str}
_START = _USE | {"config_file": str, "about": str, "in_file": dict}


def describe(command: Sequence[str], config_file: str, config: ConfigDict, overrides: Sequence[str]) -> dict[str, Any]:
    """One start of a run, as JSON.

    Args:
      command: the command line, one argument an entry.
      config_file: what `--config` was, `FILE.py[:argument]`.
      config: as the run uses it.
      overrides: names of the fields that flags changed on top of the file, such as `model.depth`.

    Returns:
      What `describe_use` returns, and {"config_file", "about": first paragraph of the file's docstring, "in_file":
      {field: the file's value} of the fields of "changed"}.
    """
    use = describe_use(command, config, overrides)
    in_file = _in_file(config_file) if use["changed"] else {}  # the file is run once more for it
    return use | {
        "config_file": config_file,
        "about": _about(local_path(config_file.partition(":")[0], "--config")),
        "in_file": {name: in_file[name] for name in use["changed"] if name in in_file},
    }


def describe_again(
    command: Sequence[str], workdir: Place, config: ConfigDict, overrides: Sequence[str]
) -> dict[str, Any]:
    """`describe` of a start that takes the config of its workdir: the file is that of the start before."""
    last = (read_starts(workdir) or [{}])[-1]
    kept = {name: last[name] for name in ("config_file", "about") if name in last}
    return describe_use(command, config, overrides) | kept


def describe_use(command: Sequence[str], config: ConfigDict, overrides: Sequence[str]) -> dict[str, Any]:
    """{"command", "changed": {field: value} of the fields that flags changed, "code_version", "time": UTC, ISO 8601}.

    Args: as `describe`.
    """
    flat = flatten(config)
    return {
        "command": list(command),
        "changed": {name: flat[name] for name in sorted(set(overrides)) if name in flat},
        "code_version": code_version(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def code_version() -> str:
    """`0.1.0`, or in a clone of the repository `0.1.0+g1a5a8a0`, and `.changed` where files differ from that commit."""
    root = Path(uwm_jax.__file__).parents[1]
    commit = ""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=.changed"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or one that does not trust the clone
            commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return uwm_jax.__version__ + (f"+g{commit}" if commit else "")


def _in_file(config_file: str) -> dict[str, Any]:
    try:
        return flatten(load(config_file))
    except UserError:  # a file that is complete only with flags
        return {}


def _about(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def add_start(workdir: Place, start: dict[str, Any]) -> None:
    """Appends what `describe` returned to `run.json`, which is made where there is none.

    One that cannot be read is kept as `run.json.damaged`, and a warning says so.
    """
    file = workdir / FILE
    if file.exists() and not read_starts(workdir):
        kept = file.with_name(f"{FILE}.damaged")
        move(file, kept)
        warn(f"{file} is damaged: earlier starts of this run are not known. It is kept as {kept.name}.")
    write_text(workdir / FILE, json.dumps({"starts": [*read_starts(workdir), start]}, indent=2) + "\n")


def misfit(record: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]] = _USE) -> str:
    """The first field of a record with a value of another type than it is written with, in words; "" for none.

    Args:
      kinds: {field: its types}; fields that are absent are not looked for. By default those of `describe_use`.
    """
    for name, kind in kinds.items():
        if name in record and not isinstance(record[name], kind):
            names = " or ".join(t.__name__ for t in (kind if isinstance(kind, tuple) else (kind,)))
            return f"{name}: expected {names}, found {record[name]!r:.60}"
    return ""


def read_starts(workdir: Place) -> list[dict[str, Any]]:
    """All starts of a run, the oldest first; [] where there is no `run.json`, or none that `describe` can have made."""
    try:
        starts = read_json(workdir / FILE)["starts"]
    except (OSError, UserError, KeyError):
        return []
    fit = isinstance(starts, list) and all(isinstance(s, dict) and not misfit(s, _START) for s in starts)
    return starts if fit else []
