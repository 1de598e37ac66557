"""An installed libtpu on a machine without TPUs: neither slower nor louder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from uwm_jax import host_tpu

DEVICES = "import jax; from uwm_jax import cli; cli.run(lambda call: print(jax.devices()))"


@pytest.mark.skipif(host_tpu.attached(), reason="there is a TPU")
def test_a_command_prints_nothing_of_libtpu():
    environment = {name: x for name, x in os.environ.items() if name not in {"JAX_PLATFORMS", *host_tpu.ABSENT}}
    result = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and result.stderr == ""


def test_what_a_person_has_set_stays(monkeypatch):
    monkeypatch.setattr(host_tpu, "find_spec", lambda name: object())
    monkeypatch.setattr(host_tpu, "attached", lambda: False)
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    host_tpu.quiet_where_absent()
    assert os.environ == {**host_tpu.ABSENT, "TPU_WORKER_HOSTNAMES": "mine"}
    monkeypatch.setattr(host_tpu, "attached", lambda: True)
    monkeypatch.setattr(os, "environ", {})
    host_tpu.quiet_where_absent()
    assert os.environ == {}
