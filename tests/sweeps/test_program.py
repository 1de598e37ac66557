"""Members of one program against runs of their own, on eight simulated devices in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

MESHES = ("one device", "4x2x1x1", "2x2x2x1", "1x4x1x2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "runs.json"
    subprocess.run([sys.executable, "-m", "tests.sweeps.eight_devices", str(output)], check=True, env=os.environ)
    return json.loads(output.read_text())


def of_member(metrics, name, i):
    return [step[name][i] for step in metrics]


@pytest.mark.parametrize("mesh", MESHES)
def test_members_train_as_alone(runs, mesh):
    """In float32: losses over twenty steps; norms of gradients and buckets of a few rows over ten, before training has
    multiplied the rounding."""
    for i, alone in enumerate(runs["alone"]):
        for name in alone[0]:
            steps = 20 if name in ("loss", "loss/action", "loss/next_obs") else 10
            expected = [step[name] for step in alone][:steps]
            found = of_member(runs[mesh]["metrics"], name, i)[:steps]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=f"{name} of member {i}")


@pytest.mark.parametrize("variant", ["dp", "gr1"])
def test_members_of_other_systems_train_as_alone(runs, variant):
    for i, alone in enumerate(runs[variant]["alone"]):
        for name in alone[0]:
            found = of_member(runs[variant]["metrics"], name, i)
            np.testing.assert_allclose(found, [step[name] for step in alone], rtol=1e-5, atol=1e-7, err_msg=name)


def test_members_differ_from_each_other(runs):
    last = [alone[-1]["loss"] for alone in runs["alone"]]
    assert len({round(loss, 3) for loss in last}) == 4


@pytest.mark.parametrize("mesh", MESHES)
def test_a_member_is_taken_out_bit_for_bit(runs, mesh):
    assert runs[mesh]["exact"] and runs["bits"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_member_that_is_not_finite_is_frozen_within_the_step(runs, mesh):
    assert runs[mesh]["frozen"] == dict.fromkeys(runs[mesh]["frozen"], True)


def test_the_codec_runs_once_a_step(runs):
    """Operations that the compiler counts: a second member adds its network and nothing of the encoding."""
    one, two = runs["flops"]
    np.testing.assert_allclose(one - (two - one), runs["codec_flops"], rtol=0.05)
