"""The folders of results, chosen so that no result takes the place of another one.

`eval/<step>/` is the run's own held-out set, evaluated with the run's own config. `rollout/<step>/` and
`eval/<step>/few_steps.json` are a closed loop and a comparison of samplers under the run's own config: those that were
made first, since a run does not say which simulator, seeds or samplers are its own. So is the first evaluation of a
converted checkpoint, which does not tell its data. Anything else goes to a folder below, `<step>/<name>/`, named by
`--name` or by a digest of the settings that tell it apart. The same settings again replace what they made.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.config_checks import matches
from uwm_jax.errors import UserError
from uwm_jax.files import Place, is_remote, remove, write_bytes
from uwm_jax.hub.runs import origin_of
from uwm_jax.reading import read_json
from uwm_jax.storage.errors import StorageError

Settings = Mapping[str, Any]  # what tells a result apart from the run's own, JSON; {} for the run's own

# Fields that change no number of a result beyond rounding, and those that say where a dataset lies: it is told apart by
# its content.
_IMMATERIAL = (
    *(name for name in config_lib.MAY_CHANGE if not name.startswith("eval.")),
    *("eval.every", "eval.action_plane", "batch_size", "data.path", "data.sources.*.path"),
)
_NAME = re.compile(r"(?!.*\.(?:json|png|gif)$)[A-Za-z0-9][A-Za-z0-9._=-]{0,63}")  # not that of a result's file


def define_flags() -> None:
    flags.DEFINE_string("name", None, "folder for the results below that of the step; see docs/evaluation.md")
    flags.DEFINE_string("output", None, "directory for results and report.html in place of the workdir")


def differences(
    config: ConfigDict, own: ConfigDict, overrides: Iterable[str], parameters: str, default: str
) -> dict[str, Any]:
    """Differences between a result and one of the run's own config: {field: value} of overrides, and "parameters".

    Args:
      config, own: with the overrides, and as the run has it.
      overrides: names of fields.
      parameters, default: those that are used, and those that are used where no flag says which.
    """
    now, before = config_lib.flatten(config), config_lib.flatten(own)
    found = {
        name: now[name]
        for name in sorted(set(overrides))
        if name in now and now[name] != before.get(name) and not matches(name, _IMMATERIAL)
    }
    return found if parameters == default else found | {"parameters": parameters}


def root(output: Place | None, workdir: Place) -> Place:
    """The directory that `eval/`, `rollout/` and `report.html` are made in.

    Raises:
      UserError: nothing can be written there, it is another run's directory, or the cache of the hub.
    """
    place = output or workdir
    if origin := origin_of(place):
        raise UserError(
            f"--output=DIR is required: results of {origin} would go into the cache of the hub, to {place}. DIR is a "
            "directory for them and the report."
        )
    if output and place.resolve() != workdir.resolve() and (place / "config.json").exists():
        raise UserError(f"--output={output} is a run's directory itself. Choose one for the results of this run alone.")
    require_writable(place)
    return place


def of_run(root: Place, workdir: Place) -> dict[str, str]:
    """Names the run in the records of results that lie outside of its workdir; {} of those inside, which may move."""
    return {} if root.resolve() == workdir.resolve() else {"workdir": str(origin_of(workdir) or workdir.resolve())}


def require_writable(folder: Place) -> None:
    """Raises UserError where no file can be made in a folder, which need not be there yet."""
    there = folder
    try:
        if is_remote(folder):
            probe = folder / f".writable.{secrets.token_hex(4)}"
            write_bytes(probe, b"")
            remove(probe, missing_ok=True)
            return
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=str(there)):
            pass
    except (OSError, StorageError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        why = str(reason) if there == folder else f"{there}: {reason}"
        raise UserError(
            f"{folder}: results cannot be written there ({why}). --output=DIR writes them and the report to another "
            "directory; the run is only read then."
        ) from e


def choose(
    step_folder: Place,
    file: str,
    settings: Settings,
    *,
    own: bool,
    shared: bool,
    name: str | None,
    run: Mapping[str, str],
) -> Place:
    """The folder of a result, in which files can be written; a line says so where it is not the step's.

    Args:
      step_folder: `eval/<step>` or `rollout/<step>`.
      file: of the result that records, at its top or under "about", `settings` and what `of_run` gives.
      settings: of this result.
      own: whether it is of the run's own config (and held-out set).
      shared: whether several results that are `own` differ in their settings.
      name: `--name`.
      run: what `of_run` gives.

    Raises:
      UserError: an unusable name; a folder of that name holds a result with other settings, or of another run; nothing
        can be written there.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(
            f"--name={name}: expected up to 64 letters, digits and . _ = - that start with a letter or digit and do "
            "not end in .json, .png or .gif, such as --name=val."
        )
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = step_folder / (name or digest)
    if name is None and own and not (shared and _other(step_folder / file, settings)):
        folder = step_folder
    record = _record(folder / file)
    if name is not None and _other(folder / file, settings):
        raise UserError(
            f"--name={name}: {folder} holds a result with other settings, {json.dumps(record.get('settings'))}. These "
            f"are {json.dumps(settings)}. Choose another name, or leave the flag out."
        )
    if run and record and (there := record.get("workdir")) != run["workdir"]:
        raise UserError(f"{folder} holds results of another run, {there}. Choose another --output.")
    require_writable(folder)
    if folder != step_folder:
        print(f"results go to {folder}: settings {json.dumps(settings)}", flush=True)
    return folder


def _other(file: Place, settings: Settings) -> bool:
    """Whether a result lies there that was made with other settings, or records no settings."""
    return file.exists() and _record(file).get("settings") != json.loads(json.dumps(settings))


def _record(file: Place) -> dict[str, Any]:
    try:
        found = read_json(file)
    except (OSError, UserError):
        return {}
    found = found.get("about", found)
    return found if isinstance(found, dict) else {}
