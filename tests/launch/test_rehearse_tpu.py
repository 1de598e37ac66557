"""A run on a pretended TPU that is taken away half-way: it goes on on a new one, with the same losses to the bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from launch import rehearse_tpu
from tests.launch.test_bundle import git
from uwm_jax import config as config_lib
from uwm_jax.train import train

ROOT = Path(__file__).resolve().parents[2]

LINES = """
import json
from uwm_jax.config import from_dict

def get_config():
    return from_dict(json.loads({config!r}), "")
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """The working tree as a commit."""
    folder = tmp_path / "clone"
    for name in ("uwm_jax", "data_prep", "configs", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=All")
    return folder


@pytest.mark.slow
def test_a_run_whose_tpu_is_taken_away_goes_on_with_the_same_losses(
    clone, tiny_config, tmp_path, storage_emulator, monkeypatch, capsys
):
    tiny_config.total_steps, tiny_config.log_every, tiny_config.checkpoint.every = 8, 1, 2
    config = tmp_path / "tiny.py"
    config.write_text(LINES.format(config=config_lib.to_json(tiny_config)))
    monkeypatch.setattr(rehearse_tpu, "ROOT", clone)
    monkeypatch.setattr(rehearse_tpu, "BUCKET", "bkt")
    command = ["python", "-m", "uwm_jax.train", f"--config={config}"]
    rehearsal = rehearse_tpu.Rehearsal(tmp_path / "rehearsal", storage_emulator.environ, command, "v4-8")
    try:
        rehearsal.train("preempted", preempt=True)
        rehearsal.check("preempted")
    finally:
        rehearsal.cloud.end()
    said = capsys.readouterr().out
    assert "preempted: SUSPENDED; deleting it and creating it anew" in said
    versions = re.findall(r"uwm_jax worker: installed (\S+)", said)
    assert len(versions) == 2
    starts = json.loads((rehearsal.workdir("preempted") / "run.json").read_text())["starts"]
    assert {start["code_version"] for start in starts} == set(versions)  # which name the commit
    train(tiny_config, tmp_path / "alone")
    lines = map(json.loads, (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines())
    assert rehearsal.losses("preempted") == [(line["step"], line["loss"]) for line in lines]
