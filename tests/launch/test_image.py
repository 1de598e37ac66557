"""The image of a commit: what docker is told, and what the Dockerfile does with a bundle."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import image
from launch.bundle import Bundle
from tests.launch import programs
from uwm_jax import cli
from uwm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(tmp_path):
    """A bundle in a folder of its own."""
    folder = tmp_path / "bundle"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "droid.py").write_text("x = 1\n")
    names = ("uwm_jax-1+gc0ffee-py3-none-any.whl", "uwm_jax-c0ffee.tar.gz", "constraints.txt")
    files = [folder / name for name in names]
    files[0].write_text("")
    subprocess.run(["tar", "-czf", files[1], "-C", folder, "configs"], check=True)
    files[2].write_text("numpy==2.0\n")
    return Bundle(*files, commit="c0ffee" * 7, version="1+gc0ffee", python="3.11")


def test_what_a_dry_run_shows_is_what_runs(made, tmp_path, monkeypatch, capsys):
    programs.install(tmp_path / "programs", "docker")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}/usr/bin:/bin")
    monkeypatch.setattr(image, "bundle", lambda root, build: made)
    flags = ["image", "--image=us-docker.pkg.dev/p/r/uwm_jax", "--extras=tpu,gcs,wandb"]
    assert cli.call(image.main, [*flags, "--dry_run"], image.define_flags) == 0
    shown = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert programs.calls(tmp_path / "programs") == []
    assert cli.call(image.main, flags, image.define_flags) == 0
    assert programs.calls(tmp_path / "programs") == shown
    build, push = shown
    assert build[-1] == str(made.wheel.parent) and f"--file={ROOT / 'launch' / 'Dockerfile'}" in build
    assert push == ["docker", "push", "us-docker.pkg.dev/p/r/uwm_jax:c0ffeec0ffee"]
    assert "--tag=us-docker.pkg.dev/p/r/uwm_jax:c0ffeec0ffee" in build


@pytest.mark.parametrize("name", ["uwm", "r.io/uwm:1", "R.io/uwm", "r.io/uwm/", "r.io//uwm", ""])
def test_names_that_are_none_or_have_a_tag(made, name):
    with pytest.raises(UserError, match="without a tag"):
        image.tagged(name, made)
    assert image.tagged("localhost:5000/uwm", made) == "localhost:5000/uwm:c0ffeec0ffee"


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "launch" / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_installs_the_wheel_and_leaves_configs_and_launch(made, tmp_path):
    """Its instructions are carried out in a folder, with a pip that keeps its arguments."""
    given = image.build_arguments(made, "tpu,gcs")
    root, tools = tmp_path / "image", tmp_path / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tools}/arguments\n')
    (tools / "python").chmod(0o755)
    known, folder = {}, root
    for name, value in instructions():
        if name == "ARG":
            key, _, default = value.partition("=")
            known[key] = given.get(key, default)
        elif name == "FROM":
            assert value == "python:${PYTHON}-slim" and known["PYTHON"] == "3.11"
        elif name == "WORKDIR":
            folder = root / value.lstrip("/")
            folder.mkdir(parents=True)
        elif name == "COPY":
            *patterns, target = value.split()
            found = sorted(file for pattern in patterns for file in made.wheel.parent.glob(pattern))
            assert found == sorted(made.files) and target == "./"
            subprocess.run(["cp", *found, folder], check=True)
        elif name == "RUN":
            environ = {**known, "PATH": f"{tools}:/usr/bin:/bin"}
            subprocess.run(["sh", "-euc", value], cwd=folder, env=environ, check=True)
        else:
            assert name == "ENV"
    assert set(given) <= set(known), "docker refuses arguments that the file does not name"
    pip = (tools / "arguments").read_text().splitlines()
    assert pip[:3] == ["-m", "pip", "install"] and pip[-1] == f"./{made.wheel.name}[tpu,gcs]"
    assert pip[pip.index("--constraint") + 1] == "constraints.txt"
    assert (folder / "configs" / "droid.py").exists()
    assert not list(folder.glob("*.whl")) and not list(folder.glob("*.tar.gz"))
