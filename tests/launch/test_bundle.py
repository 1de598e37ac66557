"""A bundle holds one commit: a wheel that names it, an archive of what the wheel leaves out, and constraints."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from launch import bundle as bundle_lib
from launch.bundle import bundle, constraints
from uwm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def git(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A clone with little in it."""
    folder = tmp_path_factory.mktemp("bundle") / "clone"
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "uwm_jax/__init__.py", "configs/droid.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("data_prep/__init__.py", "launch/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=All")
    return folder


@pytest.fixture(scope="module")
def made(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    names = bundle(repository, folder, build=False)
    assert not list(folder.iterdir()), "only the names were asked for"
    found = bundle(repository, folder)
    assert found == names
    return found


def test_the_wheel_names_the_commit(made, repository):
    short = git(repository, "rev-parse", "--short", "HEAD")
    assert made.commit == git(repository, "rev-parse", "HEAD")
    assert made.version == f"{PROJECT['version']}+g{short}"
    with zipfile.ZipFile(made.wheel) as wheel:
        assert f'__version__ = "{made.version}"' in wheel.read("uwm_jax/__init__.py").decode()
        metadata = wheel.read(f"uwm_jax-{made.version}.dist-info/METADATA").decode()
        assert not [name for name in wheel.namelist() if name.startswith(("configs", "launch"))]
    assert f"\nVersion: {made.version}\n" in metadata


def test_the_archive_has_what_the_wheel_leaves_out(made):
    with tarfile.open(made.archive) as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {"configs/droid.py", "launch/__init__.py"}


def test_a_commit_is_built_once_but_pinned_anew(made, repository, monkeypatch):
    monkeypatch.setattr(bundle_lib, "_build_wheel", lambda *_: pytest.fail("built again"))
    made.constraints.unlink()
    assert bundle(repository, made.wheel.parents[1]) == made and made.constraints.exists()


def test_constraints_are_the_versions_installed_here(made):
    pins = dict(line.split("==") for line in made.constraints.read_text().splitlines() if not line.startswith("#"))
    for name in ("jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore"):  # the last two by way of others
        assert pins[name] == importlib.metadata.version(name).partition("+")[0]
    assert "uwm-jax" not in pins and "pytest" not in pins and not any("+" in version for version in pins.values())
    assert made.python == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_what_only_an_extra_asks_for_may_be_absent():
    project = {
        "name": "x",
        "dependencies": ["numpy>=2"],
        "optional-dependencies": {"e": ["no-such-thing"], "dev": ["no-2"]},
    }
    text = constraints(project, "c0ffee")
    assert "commit c0ffee" in text and "not pinned: no-such-thing.\n" in text and "no-2" not in text
    with pytest.raises(UserError, match="no-such-thing: not installed.*pip install -e"):
        constraints({"name": "x", "dependencies": ["no-such-thing"]}, "c0ffee")


@pytest.mark.parametrize("name", ["configs/droid.py", "configs/mine.py"])
def test_a_dirty_tree_is_refused(repository, name, tmp_path):
    file = repository / name
    before = file.read_text() if file.exists() else None
    try:
        file.write_text("# changed\n")
        with pytest.raises(UserError, match=rf"{name} differ from the commit"):
            bundle(repository, tmp_path)
    finally:
        file.write_text(before) if before else file.unlink()
    assert not list(tmp_path.iterdir())


def test_files_that_git_ignores_do_not_count(repository, tmp_path):
    (repository / "runs").mkdir(exist_ok=True)
    (repository / "runs/metrics.jsonl").write_text("{}\n")
    assert bundle(repository, tmp_path, build=False).commit


def test_no_clone_is_refused(tmp_path):
    with pytest.raises(UserError, match="git rev-parse: status 128"):
        bundle(tmp_path)


def test_a_wheel_that_cannot_be_built_leaves_nothing(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="pip wheel: status"):
        bundle(repository, tmp_path)
    assert not list(tmp_path.iterdir())
