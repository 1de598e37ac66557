"""Errors of the training command on impossible input: one message, status 2, no traceback."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from uwm_jax import cli, train
from uwm_jax import config as config_lib


@pytest.fixture
def run(tiny_config, tmp_path, capsys):
    """Calls the command on the tiny config with more arguments: (status, what it wrote to stderr)."""
    file = tmp_path / "tiny.py"
    file.write_text(
        "from uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(tiny_config)!r}, 'test')\n"
    )

    def call(*arguments: str) -> tuple[int, str]:
        argv = ["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", *arguments]
        status = cli.call(train.main, argv, train.define_flags)
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def copied(tiny_dataset, tmp_path) -> Path:
    """A dataset of one's own to damage."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copied"))


def refused(result: tuple[int, str], *expected: str) -> None:
    status, message = result
    assert status == 2, message
    assert "Traceback" not in message and message.count("error:") == 1, message
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.data.path=nowhere"], ["nowhere"]),
        (["--config.data.cameras=wrst"], ["wrst", "wrist"]),
        (["--config.data.low_dim=stat"], ["stat", "state"]),
        (['--config.data.action=(("action_dict/gripper_position","xyz_euler_to_rot6d"),)'], ["gripper_position", "6"]),
        (["--config.data.window.next_obs=90,91"], ["config.data.window", "longest", "92"]),
        (["--config.model.dpth=3"], ["config.model.dpth", "Did you mean model.depth"]),
        (["--config.model.depth=many"], ["config.model.depth", "integer", "many"]),
        (["--config.model.codec.name=vqgan"], ["config.model.codec.name", "vae, pixels, pca", "vqgan"]),
        (["--config.data.action=3"], ["config.data.action", "pairs (step key, transform)", "(3,)"]),
        (["--config.data.low_dim=((1,2),)"], ["config.data.low_dim", "a list of strings", "((1, 2),)"]),
        (["--config.data.cameras=1"], ["camera '1'", "wrist"]),
        (["--config.batch_size=6", "--config.accumulation_steps=4"], ["accumulation_steps=4", "batch_size=6"]),
        (["--config.mesh.data=3"], ["config.mesh.data=3", "device"]),
        (["--config.mesh.tensor=5"], ["config.mesh.tensor=5", "device"]),
        (["--config.mesh.rules=umw"], ["config.mesh.rules", "uwm"]),
        (["--config.data.path=s3://bucket/set"], ["config.data.path=s3://bucket/set: s3:// is not supported"]),
        (["--config.init_from=s3://bucket/run"], ["config.init_from=s3://bucket/run: s3:// is not supported"]),
        (["--config.compilation_cache_dir=s3://b/c"], ["config.compilation_cache_dir=s3://b/c: s3:// is not"]),
        (["--config.mesh.rules=s3://bucket/rules.py"], ["config.mesh.rules=s3://bucket/rules.py: s3:// is not"]),
        (["--workdir=s3://bucket/run"], ["--workdir=s3://bucket/run: s3:// is not supported"]),
        (["--config.total_steps=" + "9" * 23], ["config.total_steps", "63 bits"]),
        (["--config.init_from=nowhere"], ["config.init_from='nowhere'"]),
        (["--profile=soon"], ["--profile=soon", "START:STEPS"]),
        (["--num-processes=2"], ["--coordinator-address", "--process-id"]),
        (["--wrkdir=x"], ["wrkdir"]),
        (["word"], ["word"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_impossible_wishes(run, tmp_path, arguments, expected):
    refused(run(*arguments), *expected)
    assert not (tmp_path / "run").exists(), "nothing may be written before a run is known to be possible"


def test_a_workdir_of_a_run_that_has_not_saved_yet_is_left_as_it_is(run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("config.json", "run.json"):
        (workdir / name).write_text("theirs")
    with (workdir / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, message = run("--config.eval.every=0")
    assert status == 1 and "another run is at work" in message and "Traceback" not in message, message
    assert sorted(p.name for p in workdir.iterdir()) == [".lock", "config.json", "run.json"]
    assert {(workdir / name).read_text() for name in ("config.json", "run.json")} == {"theirs"}


def test_a_shard_that_was_cut_short(run, copied):
    shard = max(copied.rglob("*.array_record*"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(run(f"--config.data.path={copied}"), shard.name, "bytes")


@pytest.mark.slow
def test_a_shard_with_a_flipped_bit(run, copied, tmp_path):
    """Found when it is read, in the middle of the run: what was saved before stays."""
    shard = max(copied.rglob("*.array_record*"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    for i in range(1000, len(data), 2000):
        data[i] ^= 1
    shard.write_bytes(data)
    refused(run(f"--config.data.path={copied}"), shard.name)


def test_a_manifest_that_is_not_ours(run, copied):
    (copied / "manifest.json").write_text("{")
    refused(run(f"--config.data.path={copied}"), "manifest.json", "JSON")
    (copied / "manifest.json").write_text(json.dumps({"format": "zarr"}))
    refused(run(f"--config.data.path={copied}"), "manifest.json", "zarr")
