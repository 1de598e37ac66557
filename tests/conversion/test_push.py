"""Uploads to a hub of loopback: the export folder and its card, all at once, and no word of the token anywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.hub import small_run
from tests.hub.conftest import environment
from tests.hub.stub import TOKEN, Stub
from uwm_jax import cli, convert
from uwm_jax.conversion.export_folder import to_folder
from uwm_jax.hub import runs

REPO = "me/robot"
FILES = {runs.WEIGHTS, runs.DESCRIPTION, runs.PROBE, runs.PROGRAM}


def interval(mean: float, lo: float | None, hi: float | None, n: int, episodes: int) -> dict[str, float | None]:
    return {"mean": mean, "lo": lo, "hi": hi, "n": n, "episodes": episodes}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with an evaluation of its step, one of another step, and a closed loop of few episodes."""
    workdir = small_run.make(tmp_path_factory.mktemp("run") / "run", path="/home/somebody/robot")
    for file, content in {
        f"eval/{small_run.STEP}/metrics.json": {"policy/action_mse": interval(0.1234, 0.1, 0.15, 64, 8)},
        f"eval/{small_run.STEP}/about.json": {"windows": 64, "episodes": 8},
        f"eval/{small_run.STEP - 1}/metrics.json": {"policy/action_mse": interval(0.9, 0.8, 1.0, 64, 8)},
        f"rollout/{small_run.STEP}/metrics.json": {"policy/success": interval(0.75, None, None, 4, 4)},
        f"rollout/{small_run.STEP}/episodes.json": {"env": "pusht"},
    }.items():
        (workdir / file).parent.mkdir(parents=True, exist_ok=True)
        (workdir / file).write_text(json.dumps(content))
    return workdir


@pytest.fixture(scope="module")
def export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "export"
    to_folder(run, folder)
    return folder


def command(*flags: object) -> int:
    return cli.call(convert.main, ["convert", "push", *map(str, flags)], convert.define_flags)


@pytest.mark.slow
def test_a_run_becomes_a_repository_with_its_card(
    stub: Stub, run: Path, export: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command(f"--workdir={run}", f"--repo={REPO}", "--license=mit", "--private") == 0
    files = stub.newest(REPO)
    assert files.keys() == FILES | {"README.md"} and REPO in stub.private
    for name in (runs.WEIGHTS, runs.PROGRAM):
        assert files[name] == (export / name).read_bytes()
    out, err = capfd.readouterr()
    assert "warning: model.json names a path of this machine: config.data.path=/home/somebody/robot." in err
    assert all(TOKEN.encode() not in data for data in (out.encode(), err.encode(), *files.values()))

    _, header, text = files["README.md"].decode().split("---\n", 2)
    told = yaml.safe_load(header)
    assert (told["license"], told["library_name"], told["tags"]) == ("mit", "uwm_jax", ["robotics", "uwm_jax", "dp"])
    assert text.strip() in out and "/home/somebody" not in text
    for line in (
        "| policy: action error (MSE) | actions from -1 to 1 | 0.1234 [0.1, 0.15] |",
        "Step 300, 64 held-out windows, from 8 episodes. In brackets: 95 % intervals, clustered by episode.",
        "Step 300, 4 episodes of pusht. In brackets: 95 % intervals, clustered by episode.",
        "| policy: success | share of episodes | 0.75 (too few episodes) |",
        "| `obs/front` | (2, 16, 16, 3) | uint8 RGB |",
        "| `obs/state` | (2, 3) | float32, raw units |",
        "What it was trained on is not recorded.",
        f"python -m uwm_jax.serve --export={REPO}",
        f"python -m uwm_jax.train --config=FILE.py --config.init_from={REPO} --workdir=DIR",
        'action = policy.act({"front": ..., "state": ...})[0]',
        "`mit`, of the weights.",
    ):
        assert line in text.splitlines() or line in text, line
    assert "0.9" not in text, "another step's"

    folder = runs.export(REPO, "--export")
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / runs.WEIGHTS).read_bytes() == files[runs.WEIGHTS]


@pytest.mark.slow
def test_a_dry_run_shows_all_and_sends_nothing(stub: Stub, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"--export={export}", f"--repo={REPO}", "--dry_run") == 0
    out = capsys.readouterr().out
    assert stub.requests == [] and f"nothing was sent to {REPO} (--dry_run)" in out
    assert "license: unknown" in out and "Step 300 was not evaluated before it was uploaded." in out
    for name in FILES:
        assert f"{name}: {(export / name).stat().st_size:,} bytes" in out
    assert {path.name for path in export.iterdir()} == FILES


@pytest.mark.slow
def test_no_output_of_a_process_shows_the_token(stub: Stub, export: Path, tmp_path: Path) -> None:
    """Not even of one that the hub repeats: of a token that it refuses, then of one that it takes."""
    stub.echo = True
    line = [sys.executable, "-m", "uwm_jax.convert", "push", f"--export={export}", f"--repo={REPO}", "--debug"]
    for token, status, says in (
        (TOKEN[::-1], 2, "the hub does not accept your token (401 for me/robot). No file was committed"),
        (TOKEN, 0, f"uploaded: {stub.endpoint}/{REPO}/commit/"),
    ):
        env = os.environ | environment(stub, tmp_path / "hf", HF_TOKEN=token, HF_HUB_VERBOSITY="debug")
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stderr
        assert says in done.stdout + done.stderr and token not in done.stdout + done.stderr
        assert not [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    assert stub.newest(REPO).keys() == FILES | {"README.md"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--repo is required|expected --workdir=DIR or --export=DIR"),
        (("--repo=me/robot",), "expected --workdir=DIR or --export=DIR, one of them"),
        (("--repo=me/robot", "--workdir=a", "--export=b"), "expected --workdir=DIR or --export=DIR, one of them"),
        (("--repo=robot", "--export=here"), "--repo=robot: expected owner/name"),
        (("--repo=me/robot", "--export=here"), "the hub asks for a token that may write there"),
        (("--repo=me/robot", "--export=here", "--dry_run"), "--export=here: .* model.safetensors is missing"),
        (("--repo=me/robot", "--export=here", "--step=3"), "--step: an export folder is uploaded as it is"),
        (("--repo=me/robot", "--export=here", "--config.model.depth=3"), "--config.model.depth: an export folder is"),
        (("--repo=me/robot", "--export=here", "--output=x"), "--output is a flag of to-torch; push does not take it"),
    ],
)
def test_what_cannot_be_uploaded_is_named(
    stub: Stub, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str
) -> None:
    assert command(*flags) == 2
    assert re.search(says, capsys.readouterr().err)
    assert stub.requests == []
