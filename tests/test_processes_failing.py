"""Several processes of which one meets something that the others do not: all end, each with one message."""

from __future__ import annotations

import os
import sys

import pytest

from launch.rehearse import Processes

pytestmark = [pytest.mark.slow, pytest.mark.multihost]

UNSHARED = """
import sys
from pathlib import Path
from absl import flags
from uwm_jax import cli
from uwm_jax.config import base
from uwm_jax.parallel import distributed as d
from uwm_jax.training import checkpoint

def main(argv):
    checkpoint.SHARED_SECONDS = 2.0
    with d.session():
        for workdir in ("shared", f"own{flags.FLAGS.process_id}"):
            workdir = Path(sys.argv[1]) / workdir
            if d.is_main():
                checkpoint.write_config(workdir, base())
            checkpoint.require_shared(workdir, base())
            d.say("shared by all:", workdir.name)

cli.run(main, d.define_flags)
"""


def run(program, *arguments, count=2, environ=None):
    with Processes(count, [sys.executable, "-c", program, *arguments], os.environ | (environ or {})) as processes:
        statuses = processes.wait(120)
    return statuses, ["\n".join(lines) for lines in processes.lines]


def test_a_workdir_that_not_all_hosts_share_is_refused(tmp_path):
    statuses, output = run(UNSHARED, str(tmp_path))
    assert statuses == [2, 2], output
    assert "shared by all: shared" in output[0] and "shared by all: own" not in output[0]
    for process, text in enumerate(output):
        assert text.count("error:") == 1 and "Traceback" not in text
        assert f"process 1 does not see in '{tmp_path}/own{process}' what process 0 wrote there" in text
