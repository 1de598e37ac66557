"""The commands of docs/scale.md for Kubernetes and SLURM run, as dry runs; XPK's names flags that XPK has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch import image, jobset, slurm
from launch.bundle import Bundle
from tests.launch import programs
from uwm_jax import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text()
MODULES = {"launch.image": image, "launch.jobset": jobset, "launch.slurm": slurm}

# Of `xpk workload create`, as its parser has them (xpk/parser/workload.py and common.py of XPK 1.16.0).
XPK_NEEDS = {"cluster", "workload", "command"}
XPK = XPK_NEEDS | {
    *("tpu-type", "device-type", "project", "zone", "num-slices", "docker-image", "base-docker-image", "script-dir"),
    *("max-restarts", "restart-on-exit-codes", "termination-grace-period-seconds", "env", "env-file", "priority"),
    *("ttl-seconds-after-finished", "spot", "reservation", "on-demand", "dry-run"),
}


def commands(language: str) -> list[list[str]]:
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("name", MODULES)
def test_commands_run_dry(name, tmp_path, monkeypatch, capsys):
    files = [tmp_path / file for file in ("a.whl", "b.tar.gz", "constraints.txt")]
    made = Bundle(*files, commit="c0ffee" * 7, version="1+gc0ffee", python="3.11")
    for module in MODULES.values():
        monkeypatch.setattr(module, "bundle", lambda root, build: made)
    found = [words for words in commands("bash") if words[:3] == ["python", "-m", name]]
    assert len(found) >= (1 if name == "launch.image" else 4)
    for words in found:
        at = words.index("--") if "--" in words else len(words)
        argv = [*words[2:at], "--dry_run", *(["--no_plan"] if name == "launch.jobset" else []), *words[at:]]
        status = cli.call(MODULES[name].main, argv, MODULES[name].define_flags)
        out, err = capsys.readouterr()
        assert status == 0, err
        known = {key.split()[0] for key in programs.FLAGS}
        calls = [line.partition(" <<'END'")[0] for line in out.splitlines() if line.split(" ")[0] in known]
        assert calls or words[3] in ("install", "tail"), out
        for call in calls:
            programs.check(shlex.split(call))


def test_xpk_knows_the_flags_and_gets_the_same_run():
    [words] = [words for words in commands("sh") if words[0] == "xpk"]
    assert words[1:3] == ["workload", "create"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert XPK_NEEDS <= flags.keys() <= XPK
    [create] = [words for words in commands("bash") if words[2:4] == ["launch.jobset", "create"]]
    command = ["python", "-m", "uwm_jax.supervise", "--", *create[create.index("--") + 1 :]]
    assert set(shlex.split(flags["command"])) == {*command, "--config.mesh.slices=2"}
    assert f"--slices={flags['num-slices']}" in create
    assert f"--image={flags['docker-image'].removesuffix(':COMMIT')}" in create
