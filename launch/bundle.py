"""What a machine elsewhere runs: one commit as a wheel, an archive of what the wheel leaves out, and constraints.

The wheel's version names the commit (`0.1.0+g1a5a8a0`), so that `run.json` and checkpoints of its runs do too. The
archive holds `configs/` and `launch/`; unpacked, it is the folder in which commands run. The constraints pin every
distribution that the package can ask for to the version that is installed here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from uwm_jax.errors import UserError
from uwm_jax.files import new_folder, write_text

LEFT_OUT = ("configs", "launch")  # of the wheel
CACHE_VARIABLE = "XDG_CACHE_HOME"

_SECONDS = 300.0  # for pip to build the wheel, and for git
_SHOWN = 5  # changed files that a message names


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The files that a machine needs to run a commit, all in one folder.

    Attributes:
      wheel: of the package.
      archive: `configs/` and `launch/`, a tar.gz.
      constraints: for `pip install --constraint`.
      commit: 40 hexadecimal digits.
      version: of the wheel, `0.1.0+g1a5a8a0`.
      python: `3.11`: the version for which the constraints hold.
    """

    wheel: Path
    archive: Path
    constraints: Path
    commit: str
    version: str
    python: str

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.wheel, self.archive, self.constraints


def bundle(repository: Path, folder: Path | None = None, build: bool = True) -> Bundle:
    """The bundle of the commit that a clone of the repository has checked out.

    Args:
      folder: bundles are kept in it by commit; by default `~/.cache/uwm_jax/bundles`.
      build: whether the files are made where they are not there yet; else only their names are told.

    Raises:
      UserError: `repository` is no clone, files differ from its commit, or the wheel cannot be built here.
    """
    commit = _git(repository, "rev-parse", "HEAD")
    _refuse_changes(repository)
    short = _git(repository, "describe", "--always", "--exclude=*")
    project = tomllib.loads(_git(repository, "show", "HEAD:pyproject.toml"))["project"]
    name, version = project["name"].replace("-", "_"), f"{project['version']}+g{short}"
    place = (default_folder() if folder is None else folder) / commit
    found = Bundle(
        wheel=place / f"{name}-{version}-py3-none-any.whl",
        archive=place / f"{name}-{short}.tar.gz",
        constraints=place / "constraints.txt",
        commit=commit,
        version=version,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
    )
    if build:
        if not place.exists():
            with new_folder(place) as made:
                _git(repository, "archive", f"--output={made / found.archive.name}", "HEAD", *LEFT_OUT)
                _build_wheel(repository, project["version"], version, made)
                if not (made / found.wheel.name).exists():
                    there = ", ".join(sorted(file.name for file in made.iterdir()))
                    raise UserError(f"pip wheel: expected {found.wheel.name}, found {there}.")
        write_text(found.constraints, constraints(project, commit))
    return found


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/uwm_jax/bundles`, by default below `~/.cache`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache") / "uwm_jax" / "bundles"


def constraints(project: Mapping[str, Any], commit: str) -> str:
    """The text of the constraints: the versions installed here of all that the project and its extras ask for.

    Args:
      project: the table `project` of pyproject.toml; its extra `dev` is left out.
      commit: for the comment above them.

    Raises:
      UserError: a requirement of the package itself is not installed here.
    """
    pinned, absent = {}, set()
    for name, extra in sorted(_requirements(project)):
        try:
            version = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if not extra:
                raise UserError(
                    f"{name}: not installed, so no version of it can be pinned for the workers. Run `pip install -e .` "
                    "in this environment, or launch from one that runs the tests."
                ) from None
            absent.add(name)
            continue
        pinned[name] = version.public  # a label such as +cpu is that of a build, not of a version
    lines = [f"# Installed where commit {commit} was launched, Python {sys.version.split()[0]}."]
    if left := sorted(absent - pinned.keys()):
        lines += [f"# Not installed there, so not pinned: {', '.join(left)}."]
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in sorted(pinned.items())), ""])


def _requirements(project: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """(name, whether an extra asks for it) of all distributions that the project asks for, at any depth."""
    own = canonicalize_name(project["name"])
    extras = {extra: lines for extra, lines in project.get("optional-dependencies", {}).items() if extra != "dev"}
    waiting = [(Requirement(line), "", False) for line in project["dependencies"]]
    waiting += [(Requirement(line), "", True) for lines in extras.values() for line in lines]
    seen: set[tuple[Any, ...]] = set()
    while waiting:
        requirement, of_extra, optional = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        if name == own:  # one extra asks for another
            continue
        if (name, optional) not in seen:
            seen.add((name, optional))
            yield name, optional
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra, optional) not in seen:
                seen.add((name, extra, optional))
                waiting += [(Requirement(line), extra, optional) for line in _requires(name)]


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _refuse_changes(repository: Path) -> None:
    changed = _git(repository, "status", "--porcelain", "--untracked-files=all").splitlines()
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        names = ", ".join(line.split(maxsplit=1)[-1] for line in changed[:_SHOWN])
        raise UserError(
            f"{repository}: {names}{more} differ from the commit, and workers run the commit alone. Commit them, or "
            "let git ignore them."
        )


def _build_wheel(repository: Path, version: str, labelled: str, output: Path) -> None:
    """Builds the wheel of the commit under another version."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"pip: not installed in {sys.prefix}, and it builds the wheel. Run `python -m ensurepip`.")
    with tempfile.TemporaryDirectory(prefix="uwm_bundle_") as temporary:
        tar = Path(temporary) / "commit.tar"
        _git(repository, "archive", f"--output={tar}", "HEAD")
        tree = Path(temporary) / "tree"
        with tarfile.open(tar) as archive:
            archive.extractall(tree, filter="data")
        for file in ("pyproject.toml", "uwm_jax/__init__.py"):
            text = (tree / file).read_text(encoding="utf-8")
            stated = f'version = "{version}"' if file == "pyproject.toml" else f'__version__ = "{version}"'
            if text.count(stated) != 1:
                raise UserError(f"{repository / file}: expected one line {stated}, found {text.count(stated)}.")
            (tree / file).write_text(text.replace(stated, stated.replace(version, labelled)), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if _has_setuptools(tree):
            command += ["--no-build-isolation", "--no-index"]
        _run("pip wheel", [*command, f"--wheel-dir={output}", str(tree)])


def _has_setuptools(tree: Path) -> bool:
    """Whether what builds the wheel is installed here; pip fetches it else."""
    for line in tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]:
        requirement = Requirement(line)
        try:
            if importlib.metadata.version(requirement.name) not in requirement.specifier:
                return False
        except importlib.metadata.PackageNotFoundError:
            return False
    return True


def _git(repository: Path, *arguments: str) -> str:
    return _run(f"git {arguments[0]}", ["git", "-C", str(repository), *arguments])


def _run(what: str, command: list[str]) -> str:
    """The stdout of a command that succeeds, without blanks at its end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError as e:
        raise UserError(f"{what}: {command[0]} is not installed.") from e
    except subprocess.TimeoutExpired as e:
        raise UserError(f"{what}: did not end within {_SECONDS:.0f} s: {' '.join(command)}") from e
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise UserError(f"{what}: status {done.returncode}: {said} (the command was: {' '.join(command)})")
    return done.stdout.rstrip()
