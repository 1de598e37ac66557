"""`.ci/run` brings the browser, lets no test go without it, and prints pytest's closing line last; `launch/test.sh`
installs again when what it installs has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAYS = 'echo "$(basename "$0") $*" >> "$CALLS"'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the scripts alone, and one of programs, `programs`, which is all that they find."""
    for name in (".ci/run", "launch/test.sh", "launch/constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "programs").mkdir()
    for name in ("bash", "env", "dirname", "basename", "cat"):
        (tmp_path / "programs" / name).symlink_to(shutil.which(name) or name)
    return tmp_path


def program(clone: Path, name: str, *lines: str) -> None:
    file = clone / "programs" / name
    file.write_text("\n".join(["#!/usr/bin/env bash", SAYS, *lines, ""]))
    file.chmod(0o755)


def run(clone: Path, script: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """How a script ended, and the calls of programs that it made."""
    calls = clone / "calls"
    calls.write_text("")
    env = {"PATH": str(clone / "programs"), "CALLS": str(calls)}
    bash = shutil.which("bash") or "bash"
    done = subprocess.run([bash, script, *arguments], cwd=clone, env=env, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


@pytest.fixture
def ci(clone: Path) -> Path:
    (clone / "launch/test.sh").write_text('echo "tests $* CI=${CI-}"\necho "1 passed in 0.01s"\n')
    return clone


def test_a_browser_that_is_there_is_used(ci: Path) -> None:
    program(ci, "chromium")
    program(ci, "apt-get")
    done, calls = run(ci, ".ci/run", "-m", "not slow")
    assert done.returncode == 0 and calls == []
    assert done.stdout.splitlines() == ["tests -m not slow CI=true", "1 passed in 0.01s"]


def test_a_missing_browser_is_installed(ci: Path) -> None:
    program(ci, "id", "echo 0")
    program(ci, "apt-get", "echo unpacking")
    done, calls = run(ci, ".ci/run")
    assert done.returncode == 0, done.stderr
    assert [call.split()[2] for call in calls if call.startswith("apt-get")] == ["update", "install"]
    assert calls[-1].endswith("chromium") and done.stdout.splitlines()[-1] == "1 passed in 0.01s"


@pytest.mark.parametrize("user", ["0", "1000"])
def test_without_a_browser_no_test_runs(ci: Path, user: str) -> None:
    program(ci, "id", f"echo {user}")
    if user != "0":
        program(ci, "apt-get")
    done, calls = run(ci, ".ci/run")
    assert done.returncode == 1 and "there is no chromium" in done.stderr and "tests" not in done.stdout
    assert not [call for call in calls if call.startswith("apt-get")]


def test_what_is_installed_follows_the_files_that_name_it(clone: Path) -> None:
    """The client comes without its requirements, so that numpy stays; the second run installs nothing."""
    packages = clone / ".venv/packages"  # of .venv and of the environments in it
    packages.mkdir(parents=True)
    for folder in (".venv", ".venv/beam"):
        python = clone / folder / "bin/python"
        python.parent.mkdir(parents=True)
        answers = f'*hashlib*) exec {shutil.which("sha256sum")} ;; *"import site"*) echo {packages} ;;'
        python.write_text(f'#!/usr/bin/env bash\n{SAYS}\ncase "$1 ${{2-}}" in {answers} esac\n')
        python.chmod(0o755)

    def installs() -> list[str]:
        done, calls = run(clone, "launch/test.sh")
        assert done.returncode == 0, done.stderr
        assert calls[-1].startswith("python -m pytest")
        return [call for call in calls if " pip install " in call]

    first = installs()
    assert "--no-deps openpi-client>=" in first[-1] and not any("openpi" in call for call in first[:-1])
    assert any("dm-tree" in call for call in first[:-1])
    assert any("apache-beam" in call for call in first[:-1]) and (packages / "below.pth").read_text().strip() == str(
        packages
    )
    assert installs() == []
    for name in ("pyproject.toml", "launch/constraints.txt", "launch/test.sh"):
        with (clone / name).open("a") as file:
            file.write("\n# another line\n")
        assert installs() == first
    assert os.path.getsize(clone / ".venv/installed-for-tests")
