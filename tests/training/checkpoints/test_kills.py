"""Processes that save into a bucket and are killed or stopped there: what they leave, and what they do afterwards."""

from __future__ import annotations

import collections
import itertools
import os
import random
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch.rehearse import Processes
from tests.training import small_run
from uwm_jax.benchmarking.fault_proxy import fault_proxy
from uwm_jax.files import as_place
from uwm_jax.training.checkpoints import steps
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step

pytestmark = pytest.mark.slow

# Saves one step after the other, and keeps two.
SAVES = """
import sys
import numpy as np
from tests.training import small_run
from uwm_jax.errors import RunError
from uwm_jax.files import as_place
from uwm_jax.storage import environment
from uwm_jax.training.checkpoints import lease
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.checkpoints.retention import Retention

environment.SILENCE_SECONDS = 2.0
lease.LEASE_SECONDS = float(sys.argv[2])
workdir = as_place(sys.argv[1])
try:
    checkpoints = Checkpoints(workdir, Retention(2))
    begins = latest_step(workdir) or 0
    for step in range(begins + 2, begins + 2 + 2 * int(sys.argv[3]), 2):
        checkpoints.save(small_run.state_at(step), {"position": step}, small_run.CODEC, small_run.assets_of())
        checkpoints.wait()
        print("durable", step, flush=True)
    checkpoints.close()
    state, stored = Checkpoints(workdir, read_only=True).restore_latest(small_run.like())
    small_run.assert_is_step(state, step)
except RunError as e:
    sys.exit(f"error: {e}")
"""


class Saving:
    """The program behind a proxy.

    Args:
      on_request: gets (this, method, path with the query, number from 1) of each; as `fault_proxy` takes faults.
      lease: seconds; saves: how many.
    """

    def __init__(self, target: str, workdir, on_request, lease: float = 60.0, saves: int = 9, **environ: str):
        self._proxy = fault_proxy(target, faults=lambda *request: on_request(self, *request))
        proxy = self._proxy.__enter__()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SAVES, str(workdir), str(lease), str(saves)],
            env=os.environ | proxy.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self._proxy.__exit__(None, None, None)


def signal_at(number: int, at: int, of: str = ""):
    """Sends a signal at the at-th request that writes or deletes something, and has `of` in its path."""
    seen = itertools.count(1)

    def on_request(saving: Saving, method: str, path: str, _: int) -> None:
        if method != "GET" and of in path and next(seen) == at:
            saving.process.send_signal(number)

    return on_request


def test_a_process_killed_at_any_request_leaves_its_durable_checkpoints(storage_emulator, bucket):
    """The same workdir again and again, so each start meets what the kills before it left."""
    workdir, newest, draw = as_place(bucket), 0, random.Random(17)
    for _ in range(3):
        # A save writes some 60 objects, and from the third on as many are deleted.
        with Saving(storage_emulator.url, workdir, signal_at(signal.SIGKILL, draw.randrange(100, 400))) as saving:
            output, errors = saving.process.communicate(timeout=300)
        assert saving.process.returncode == -signal.SIGKILL, errors
        durable = [int(step) for step in re.findall(r"durable (\d+)", output)]
        assert durable and durable[0] == newest + 2, "it goes on where the last one was killed, without waiting for it"
        newest = latest_step(workdir)
        assert newest - durable[-1] in (0, 2), "the kill came before or after the marker of the next one"
        state, stored = Checkpoints(workdir, read_only=True).restore_latest(small_run.like())
        assert stored.step == newest
        small_run.assert_is_step(state, newest)
    Checkpoints(workdir).close()
    folders = steps.folders_among(steps.names_in(workdir / "checkpoints"))
    assert sorted(f.step for f in folders) == steps.steps_in(workdir / "checkpoints"), "the remains are cleared"


def test_a_holder_stopped_in_the_middle_of_a_save_loses_its_lock_and_changes_nothing(storage_emulator, bucket):
    workdir = as_place(bucket)

    def objects_of(nonce):
        found = (workdir / "checkpoints").objects()
        return {str(path): about.generation for path, about in found if nonce in str(path)}

    on_request = signal_at(signal.SIGSTOP, 5, of="checkpoints%2F4-")
    with Saving(storage_emulator.url, workdir, on_request, lease=2.0) as stopped:
        assert os.WIFSTOPPED(os.waitpid(stopped.process.pid, os.WUNTRACED)[1])
        assert latest_step(workdir) == 2
        other = Checkpoints(workdir)
        _, stored = other.restore_latest(small_run.like())
        assert stored.step == 2
        state = small_run.state_at(100).replace(step=np.int32(4))
        other.save(state, {"position": 4}, small_run.CODEC, small_run.assets_of())
        other.wait()
        nonce = steps.finished_in(workdir / "checkpoints")[4].nonce
        before = objects_of(nonce)
        stopped.process.send_signal(signal.SIGCONT)
        output, errors = stopped.process.communicate(timeout=300)
        assert stopped.process.returncode == 1 and output == "durable 2\n"
        assert f"error: --workdir: this run has lost the lock of '{workdir}'" in errors, errors
        assert f"process {os.getpid()} on " in errors and "Traceback" not in errors
    assert len(before) > 20 and objects_of(nonce) == before
    assert {step: folder.nonce for step, folder in steps.finished_in(workdir / "checkpoints").items()}[4] == nonce
    found, stored = Checkpoints(workdir, read_only=True).restore_latest(small_run.like())
    assert stored.step == 4
    jax.tree.map(np.testing.assert_array_equal, found.params, small_run.state_at(100).params)
    other.check()
    other.close()


KINDS = ("503", "reset", "429", "lost", "truncate", "hang")


def test_requests_that_fail_are_repeated_and_what_counts_is_whole(storage_emulator, bucket):
    """Those of saves, of the lock, and of reading it all again; each limit for requests that hang is 2 s here."""
    seen = collections.Counter()

    def on_request(saving: Saving, method: str, path: str, number: int) -> str | None:
        if number % 19:
            return None
        kind = KINDS[number // 19 % len(KINDS)]
        if kind in ("lost", "truncate") and "upload_id=" in path:
            return None  # the emulator forgets an upload that has ended; the service answers again
        seen[kind] += 1
        return kind

    limit = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2"}
    with Saving(storage_emulator.url, as_place(bucket), on_request, saves=2, **limit) as saving:
        output, errors = saving.process.communicate(timeout=300)
    assert saving.process.returncode == 0, errors
    assert output == "durable 2\ndurable 4\n" and min(seen[kind] for kind in KINDS) > 1
    state, stored = Checkpoints(bucket, read_only=True).restore_latest(small_run.like())
    assert stored.step == 4
    small_run.assert_is_step(state, 4)


# Two processes with the shards of one state, which save it three times, keep one, and end.
TOGETHER = """
import jax
import numpy as np
from absl import flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.training import small_run
from uwm_jax import cli
from uwm_jax.parallel import distributed as d
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.retention import Retention

def spread(x):
    x = np.asarray(x)
    spec = P("data") if x.ndim and x.shape[0] % 2 == 0 else P()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

def main(call):
    with d.session():
        checkpoints = Checkpoints(flags.FLAGS.workdir, Retention(1), first_start=True)
        for step in (2, 4, 6):
            state = jax.tree.map(spread, small_run.state_at(step))
            checkpoints.save(state, {"position": step}, None, small_run.assets_of())
        checkpoints.wait()
        checkpoints.close()

def define_flags():
    d.define_flags()
    flags.DEFINE_string("workdir", None, "")

cli.run(main, define_flags)
"""


@pytest.mark.multihost
def test_two_processes_save_into_a_bucket_together_and_end(storage_emulator, bucket):
    command = [sys.executable, "-c", TOGETHER, f"--workdir={bucket}"]
    with Processes(2, command, os.environ) as processes:
        assert processes.wait(300) == [0, 0], processes.lines
    directory = as_place(bucket) / "checkpoints"
    folder = steps.finished_in(directory)[6].name
    assert steps.names_in(directory) == {folder, f"{folder}.commit"}, "one folder for both; 2 and 4 are gone"
    state, _ = Checkpoints(bucket, read_only=True).restore_latest(small_run.like())
    small_run.assert_is_step(state, 6)
