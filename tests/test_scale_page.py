"""The commands of the runbook of docs/scale.md, in the order of the page: in tiny form on an emulated bucket, or dry.

gcloud's calls are held against the table of its reference. Of the launcher's, `create` runs with a stand-in for gcloud,
so that a TPU is known to the others, which run with --dry_run; what they would train on workers trains here, on configs
of the page's names that are tiny; a sweep is planned.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from launch import gcloud_stub, tpu
from launch.bundle import Bundle
from launch.gcloud_stub import Cloud
from uwm_jax import cli
from uwm_jax.files import as_place
from uwm_jax.training.checkpoints.steps import latest_step

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text()
RUNBOOK = PAGE[PAGE.index("## Runbook\n") : PAGE.index("## Plan before you pay\n")]
ZONE = "us-west4-a"

DROID = """
from tests.conftest import tiny_config_of

def get_config():
    c = tiny_config_of("droid")
    c.total_steps, c.batch_size, c.checkpoint.every = 2, 16, 1  # a batch for v5e-16
    return c
"""
SWEEP = f"""{DROID}
def get_members():
    return [{{"loss.weights.action": weight}} for weight in (0.5, 1.0)]
"""


def commands() -> list[list[str]]:
    """The page's commands in order, as words."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", RUNBOOK, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(part) for line in text.splitlines() if line for part in line.split(" && ")]


@pytest.fixture
def machine(tmp_path, monkeypatch, tiny_dataset):
    """A clone in which the page's configs are tiny and its dataset is there, a bundle of a commit, and a cloud."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("UWM_DATA_DIR", raising=False)
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    (tmp_path / "configs" / "droid.py").write_text(DROID)
    (tmp_path / "configs" / "sweeps" / "loss_weights.py").write_text(SWEEP)
    shutil.copytree(tiny_dataset, tmp_path / "data" / "droid")
    for name in ("uwm_jax-1-py3-none-any.whl", "uwm_jax-1.tar.gz", "constraints.txt"):
        (tmp_path / name).touch()
    files = [tmp_path / name for name in ("uwm_jax-1-py3-none-any.whl", "uwm_jax-1.tar.gz", "constraints.txt")]
    made = Bundle(*files, commit="c0ffee" * 7, version="1", python="3.11")
    monkeypatch.setattr(tpu, "bundle", lambda root, build: made)
    cloud = Cloud(tmp_path / "cloud", {"PATH": "/usr/bin:/bin"})
    monkeypatch.setenv("PATH", cloud.environ["PATH"])
    yield tmp_path
    cloud.end()


def run(words: list[str]) -> None:
    assert words[:2] == ["python", "-m"], words
    name, arguments = words[2], words[3:]
    module = importlib.import_module(name)
    if name == "launch.tpu":
        how = "--poll_seconds=0.1" if arguments[0] == "create" else "--dry_run"
        arguments = [*arguments[:2], how, *arguments[2:]]
    if name == "uwm_jax.plan":
        arguments = ["--cache=", *arguments]
    status = cli.call(module.main, [name, *arguments], module.define_flags)
    assert status == 0, shlex.join(words)
    if name == "launch.tpu" and "uwm_jax.train" in arguments:
        run(arguments[arguments.index("--") + 1 :])


@pytest.mark.slow
def test_every_command_of_the_runbook(machine, bucket, monkeypatch, capfd):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    values = {"gs://BUCKET": bucket, "ZONE": ZONE, "REGION": ZONE.rpartition("-")[0], "v5e-16": "here"}
    ran = []
    for words in commands():
        program = words[0]
        topology = program == "python" and words[2] == "uwm_jax.plan"  # of a TPU's: tests/planning
        for name, value in values.items():
            if name != "v5e-16" or topology:
                words = [word.replace(name, value) for word in words]
        if program == "gcloud":
            gcloud_stub.check(words[1:])
        elif program == "pip":
            assert set(re.search(r"\[(.*)\]", words[-1])[1].split(",")) <= set(extras)
        elif program == "export":
            monkeypatch.setenv(*words[1].split("=", 1))
        elif program == "tensorboard":
            folder = as_place(words[1].removeprefix("--logdir="))
            assert [place for place in folder.rglob("*") if "tfevents" in place.name]
        else:
            run(words)
            ran.append(words[2])
    said = capfd.readouterr().out
    assert ran.count("launch.tpu") == 8 and set(ran) > {"data_prep.copy", "uwm_jax.report", "uwm_jax.convert"}
    assert latest_step(as_place(f"{bucket}/runs/droid")) == 2 and "nothing to do" in said  # started again
    assert "2 members in 1 program" in said
    assert list(as_place(f"{bucket}/runs/droid/eval").glob("*/metrics.json"))
    assert {"model.safetensors", "uwm_torch.py"} <= {file.name for file in (machine / "exports" / "droid").iterdir()}
