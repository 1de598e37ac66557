"""A run on the hub as a local folder: a workdir for JAX, an export folder for PyTorch.

A repository holds an export folder (`python -m uwm_jax.convert to-torch --output=DIR/`, which `push` uploads) or a
workdir. Its files lie in huggingface_hub's cache, `$HF_HOME/hub`, and are only read. What is made of an export folder
lies next to it, in `$HF_HOME/assets/uwm_jax/<owner>--<name>/<commit>/`: `workdir`, which `convert from-torch` makes,
and `export`, with this package's own `uwm_torch.py`. No program of a repository is downloaded, let alone run.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uwm_jax.errors import UserError
from uwm_jax.files import Place, local_copy, place
from uwm_jax.hub import download
from uwm_jax.hub.names import HubName, parse

WEIGHTS, DESCRIPTION, PROBE, PROGRAM = "model.safetensors", "model.json", "probe.npz", "uwm_torch.py"
_OF_EXPORT = (WEIGHTS, DESCRIPTION, PROBE)
_OF_WORKDIR = ("config.json", "run.json", "metrics.jsonl", "checkpoints/*", "frozen/*")

_CACHED = re.compile(
    r".*/models--(?P<a>[^/]+?)--(?P<b>[^/]+)/snapshots/(?P<ab>[0-9a-f]{40})"
    r"|.*/uwm_jax/(?P<c>[^/]+?)--(?P<d>[^/]+)/(?P<cd>[0-9a-f]{40})/(?:workdir|export)"
)


def workdir(value: str, flag: str) -> Place:
    """The workdir that a flag names: the path, which need not be there, or that of a hub repository.

    Args:
      value: DIR, `owner/name` or `owner/name@revision`.
      flag: the flag or config field, for messages.

    Raises:
      UserError: as `files.place` and `download.snapshot`; the repository holds neither a workdir nor an export folder.
    """
    name = parse(value)
    return of_repository(name, flag) if name else place(value, flag)


def of_repository(name: HubName, flag: str) -> Path:
    """The workdir of a repository, as `workdir`."""
    folder = download.snapshot(name, (*_OF_EXPORT, *_OF_WORKDIR), flag)
    if _is_export(folder):
        return _made(name, folder, flag, "workdir")
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return folder
    raise UserError(f"{flag}={name}: {_nothing(folder)} or a workdir (config.json and checkpoints/).")


def export(value: str, flag: str) -> Path:
    """The export folder that a flag names, as `workdir`; of a repository with this package's own `uwm_torch.py`."""
    name = parse(value)
    if not name:
        return local_copy(place(value, flag))
    folder = download.snapshot(name, _OF_EXPORT, flag)
    if not _is_export(folder):
        raise UserError(f"{flag}={name}: {_nothing(folder)}.")
    return _made(name, folder, flag, "export")


def spelled(folder: Place) -> str:
    """`owner/name@commit` of a folder that `workdir` or `export` gave for a repository; else the absolute path."""
    name = origin_of(folder)
    return str(name or folder.absolute())


def origin_of(folder: Place) -> HubName | None:
    """The repository and commit whose copy in the cache a folder is; None for any other folder."""
    found = _CACHED.fullmatch(str(folder.absolute()))
    if not found:
        return None
    owner, repo, commit = (found[k] for k in (("a", "b", "ab") if found["ab"] else ("c", "d", "cd")))
    return HubName(f"{owner}/{repo}", commit)


def _is_export(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / DESCRIPTION).is_file()


def _nothing(folder: Path) -> str:
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
    return (
        f"the repository at commit {folder.name} holds {found or 'none of the files of a run'}. Expected an export "
        f"folder ({WEIGHTS} and {DESCRIPTION}, as `python -m uwm_jax.convert push` uploads it)"
    )


def _made(name: HubName, folder: Path, flag: str, what: str) -> Path:
    """What is made of an export folder, `workdir` or `export`, once for a commit; all of it or nothing."""
    from huggingface_hub import cached_assets_path, constants

    try:
        place = cached_assets_path(
            "uwm_jax", namespace=name.repo, subfolder=folder.name, assets_dir=constants.HF_ASSETS_CACHE
        )
        with _alone(place):
            if not (place / what).exists():
                temporary = place / f".{what}.{secrets.token_hex(4)}.tmp"
                try:
                    make = _make_workdir if what == "workdir" else _make_export
                    make(f"{name.repo}@{folder.name}", folder, temporary, flag)
                    os.replace(temporary, place / what)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        raise UserError(
            f"{flag}={name}: {e.filename or place}: the cache cannot be written ({e.strerror}). HF_HOME=DIR moves it."
        ) from e
    return place / what


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds off other processes that make something in `folder`; a file system without locks lets them in."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _make_workdir(commit: str, folder: Path, output: Path, flag: str) -> None:
    """Calls `convert from-torch` in its own process: this one may have yet to join others, or hold accelerators."""
    print(f"making a workdir of {commit} in the cache...", flush=True)
    command = [sys.executable, "-m", "uwm_jax.convert", "from-torch", f"--workdir={output}"]
    command += [f"--input={folder / WEIGHTS}", f"--official-config={folder / DESCRIPTION}"]
    child = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if child.returncode:
        told = child.stderr.strip().splitlines()
        why = next((line.removeprefix("error: ") for line in told if line.startswith("error: ")), "".join(told[-1:]))
        raise UserError(f"{flag}={commit}: its export folder cannot be read: {why}")
    for line in child.stderr.splitlines():
        if line.startswith(("note: ", "warning: ")):
            print(line, file=sys.stderr, flush=True)


def _make_export(commit: str, folder: Path, output: Path, flag: str) -> None:
    """Links to the files, and a copy of our own program."""
    output.mkdir()
    for name in _OF_EXPORT:
        if (folder / name).is_file():
            (output / name).symlink_to((folder / name).resolve())
    shutil.copyfile(Path(__file__).parents[1] / "torch_bridge" / PROGRAM, output / PROGRAM)
