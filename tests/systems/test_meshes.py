"""Every system learns the same on meshes and in parts as on one device."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("meshes") / "runs.json"
    command = [sys.executable, "-m", "tests.systems.meshes", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["accumulated", "data 8", "fsdp 4, tensor 2"])
@pytest.mark.parametrize("variant", ["dp", "dp_unet", "dp_flow", "pad", "gr1"])
def test_losses_and_gradient_norms_agree_with_one_device(runs, variant, mesh):
    one, found = runs[variant]["one"], runs[variant][mesh]
    assert len(one) == len(found) == 10 and one[0]["grad_norm"] != one[9]["grad_norm"]
    for step, bar in ((0, 1e-6), (9, 1e-5)):
        for name in ("loss", "grad_norm"):
            assert found[step][name] == pytest.approx(one[step][name], rel=bar), (step, name)
    # None is lost: groups that hold formula parameters have gradients on every mesh.
    assert all(0 < found[0][name] < math.inf for name in one[0]) and found[0].keys() == one[0].keys()
