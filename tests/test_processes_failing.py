"""Several processes of which one meets something that the others do not: all end, each with one message."""

from __future__ import annotations

import os
import sys

import pytest

from launch.rehearse import Processes
from uwm_jax import config

pytestmark = [pytest.mark.slow, pytest.mark.multihost]

UNSHARED = """
import os
from pathlib import Path
from absl import flags
from uwm_jax import cli
from uwm_jax.config import base
from uwm_jax.parallel import distributed as d
from uwm_jax.training import workdir as workdir_lib

def main(argv):
    workdir_lib.SHARED_SECONDS = 2.0
    with d.session():
        for workdir in ("shared", f"own{flags.FLAGS.process_id}"):
            workdir = Path(os.environ["UNSHARED"]) / workdir
            if d.is_main():
                workdir_lib.write_config(workdir, base())
            workdir_lib.require_shared(workdir, base())
            d.say("shared by all:", workdir.name)

cli.run(main, d.define_flags)
"""


def run(program, *arguments, count=2, environ=None):
    with Processes(count, [sys.executable, "-c", program, *arguments], os.environ | (environ or {})) as processes:
        statuses = processes.wait(120)
    return statuses, ["\n".join(lines) for lines in processes.lines]


def test_a_workdir_that_not_all_hosts_share_is_refused(tmp_path):
    statuses, output = run(UNSHARED, environ={"UNSHARED": str(tmp_path)})
    assert statuses == [2, 2], output
    assert "shared by all: shared" in output[0] and "shared by all: own" not in output[0]
    for process, text in enumerate(output):
        assert text.count("error:") == 1 and "Traceback" not in text
        assert f"process 1 does not see in '{tmp_path}/own{process}' what process 0 wrote there" in text


# The training command, of which one process can write no file from its first save on: its disk is full.
FULL_DISK = """
import resource, sys
import jax
from uwm_jax import cli, train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints

def save(self, *args, original=Checkpoints.save):
    if jax.process_index() == int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    return original(self, *args)

Checkpoints.save = save
sys.exit(cli.call(train.main, ["train", *sys.argv[2:]], train.define_flags))
"""


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_one_process_ends_all_with_its_message(full, tmp_path, tiny_config):
    tiny_config.total_steps, tiny_config.batch_size = 1000, 4
    tiny_config.mesh.data, tiny_config.mesh.fsdp = 1, 2
    tiny_config.checkpoint.every, tiny_config.log_every = 200, 1000  # for 200 steps nothing but the first is written
    file = tmp_path / "config.py"
    text = config.to_json(tiny_config)
    file.write_text(f"from uwm_jax import config\ndef get_config():\n    return config.from_json({text!r}, 'test')\n")
    arguments = [str(full), f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    # Without the cache of programs, in which a full disk would leave half an entry for others.
    environ = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    statuses, output = run(FULL_DISK, *arguments, environ=environ)
    assert statuses == [1, 1], output
    for text in output:
        assert text.count("error:") == 1 and "could not be saved" in text and "Traceback" not in text, "\n".join(output)
    assert f"process {full} of 2 failed" in output[1 - full]


# What a start does between processes before its barrier, on a backend whose programs cannot talk to each other.
NO_COLLECTIVES = """
import jax, numpy as np
from absl import flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from uwm_jax import cli
from uwm_jax.parallel import distributed as d
from uwm_jax.training.checkpoints.reader import array_digests
from uwm_jax.training.checkpoints.writer import make_writer

def main(argv):
    jax.config.update("jax_cpu_collectives_implementation", None)
    with d.session():
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        host = np.arange(12, dtype=np.float32).reshape(4, 3)
        spread = {
            name: jax.make_array_from_callback((4, 3), NamedSharding(mesh, spec), lambda i: host[i])
            for name, spec in (("rows", P("data")), ("whole", P()))
        }
        assert array_digests(spread) == array_digests({"rows": host, "whole": host})
        d.require_same("the config", {"seed": 0})
        make_writer().close()
        print("no collective needed")

cli.run(main, d.define_flags)
"""


def test_a_start_needs_no_collective_before_all_wait_for_each_other():
    """On a busy host one process may start or compile for a minute longer, and a collective waits for half a one."""
    statuses, output = run(NO_COLLECTIVES)
    assert statuses == [0, 0], output
    assert all("no collective needed" in text for text in output), output
