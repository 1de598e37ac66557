"""Checkpoints that cannot be read just now, that vanish, or that another run is writing; digests by size."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.training import small_run
from uwm_jax import config, reading
from uwm_jax.errors import RunError, UserError
from uwm_jax.training import inference
from uwm_jax.training import workdir as workdir_lib
from uwm_jax.training.checkpoints import reader
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint, digests_on_host


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(reading, "AGAIN_SECONDS", (0.0, 0.0, 0.0))


def failing(monkeypatch, error: Exception, times: int) -> list[int]:
    """Makes the first `times` readings of JSON fail; the list gets an entry for each reading."""
    calls: list[int] = []

    def restore(self, *args, original=ocp.JsonCheckpointHandler.restore):
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return original(self, *args)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "restore", restore)
    return calls


@pytest.fixture
def saved(tmp_path):
    return small_run.save_steps(tmp_path / "run", 2, 4)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/runs/x/assets"),
        OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        ValueError('INTERNAL: Error reading "/runs/x/d/0": [OS error 104: ECONNRESET Connection reset by peer]'),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs/x/assets"),
    ],
    ids=lambda error: str(getattr(error, "errno", "message")),
)
def test_what_may_pass_is_no_damage(saved, monkeypatch, error):
    calls = failing(monkeypatch, error, times=99)
    checkpoints = Checkpoints(saved)
    with pytest.raises(RunError, match="Nothing was changed; fix this and rerun"):
        checkpoints.newest_readable()
    checkpoints.close()
    assert checkpoints.steps() == [2, 4] and not (saved / "corrupt").exists()
    assert len(calls) == (1 if isinstance(error, PermissionError) else 4), "again where it may help"


def test_a_disk_that_does_better_the_second_time_is_no_error(saved, monkeypatch):
    failing(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)), times=3)
    assert CheckpointReader(saved / "checkpoints", 4).assets["code_version"]


def test_the_name_of_a_directory_is_no_reason(tmp_path):
    for name in ("permission_study", "timed out, peer unavailable"):
        workdir = small_run.save_steps(tmp_path / name, 2, 4)
        shutil.rmtree(workdir / "checkpoints" / "4" / "data_iter")
        for file in (workdir / "checkpoints" / "4" / "assets").iterdir():
            file.write_text("{")
        with pytest.raises(CorruptCheckpoint):
            _ = CheckpointReader(workdir / "checkpoints", 4).assets
        checkpoints = Checkpoints(workdir)
        assert checkpoints.newest_readable().step == 2
        checkpoints.close()


def test_a_checkpoint_that_is_replaced_while_it_is_read(saved, monkeypatch, capfd):
    """A run that trains and keeps one: what a reader has begun to read is gone, and a newer one is there."""
    workdir_lib.write_config(saved, config.base())
    monkeypatch.setattr(config, "validate", lambda c: None)
    monkeypatch.setattr(inference, "_load", lambda c, w, stored, _: (stored.assets, stored.step, None))

    def restore(self, *args, original=ocp.JsonCheckpointHandler.restore):
        if (saved / "checkpoints" / "4").exists():
            shutil.rmtree(saved / "checkpoints" / "4")
            if not (saved / "checkpoints" / "6").exists():
                small_run.save_steps(saved, 6)
        return original(self, *args)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "restore", restore)
    assert inference.load_for_inference(saved)[-1] == 6
    message = capfd.readouterr().err
    assert "checkpoint 4 was replaced while it was read; step 6 is used instead" in message
    assert "damaged" not in message

    small_run.save_steps(saved, 4)
    with pytest.raises(UserError, match=r"4: this checkpoint was deleted while.*those of steps \[2, 6\]"):
        inference.load_for_inference(saved, step=4)


HOLD = """
import sys
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_cannot_write_one_workdir(saved):
    unfinished = saved / "checkpoints" / "6.orbax-checkpoint-tmp"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(saved)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        unfinished.mkdir()
        with pytest.raises(RunError, match=rf"another run is at work in '{saved}' \(process {other.pid} on"):
            Checkpoints(saved)
        assert unfinished.is_dir(), "what the other is saving is left alone"
        assert Checkpoints(saved, read_only=True).newest_readable().step == 4
        other.kill()
    for _ in range(2):  # close frees it, and so does the end of a process
        checkpoints = Checkpoints(saved)
        assert not unfinished.exists()
        again = Checkpoints(saved)  # one process may
        again.close()
        checkpoints.close()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(saved)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        assert p.stdout.readline() == b"held\n"
        p.kill()


def test_digests_of_small_and_large_arrays_are_those_of_the_host():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rng = np.random.default_rng(0)
    arrays = [
        jax.device_put(value, NamedSharding(mesh, PartitionSpec()))
        for value in (
            rng.normal(size=(200, 100)).astype(np.float32),  # large
            rng.normal(size=(20, 10)).astype(np.float32),
            jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16),
            np.float32(0.5),
            rng.integers(0, 9, (3, 4)).astype(np.uint8),
            np.array([True, False, True]),
            np.zeros((0, 3), np.float32),
            rng.integers(0, 9, (300, 100)).astype(np.int32),  # large
        )
    ]
    assert reader._digests_by_size(arrays) == digests_on_host(arrays)


def test_warming_up_prepares_every_program_of_a_save(monkeypatch, tmp_path):
    """As on an accelerator: nothing is compiled any more when a state is saved."""
    monkeypatch.setattr(reader, "_SMALL_BYTES", 1)
    monkeypatch.setattr(reader, "on_cpus", lambda tree: False)
    reader._compiled_digest.cache_clear()
    codec = jax.device_put(small_run.CODEC)
    Checkpoints.warm_up(small_run.state_at(2), codec)
    programs = reader._compiled_digest(None)
    compiled = programs._cache_size()
    assert compiled > 3
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small_run.state_at(4), {"position": 8}, codec, small_run.assets_of())
    checkpoints.close()
    assert programs._cache_size() == compiled
