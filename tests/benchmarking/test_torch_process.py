"""Torch in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from uwm_jax import config as config_lib  # noqa: E402
from uwm_jax.benchmarking.rows import Model  # noqa: E402
from uwm_jax.benchmarking.torch_process import TorchProcess  # noqa: E402
from uwm_jax.errors import RunError  # noqa: E402

pytestmark = pytest.mark.torch


def description() -> dict:
    c = config_lib.base()
    c.batch_size = 2
    c.model.update(embed_dim=16, depth=1, num_heads=2, num_registers=1, timestep_embed_dim=8, patch=(2, 2, 2))
    c.model.encoder.update(stage_sizes=(1,), width=16)
    c.model.codec.name = "pixels"
    c.data.update(cameras=("camera",), resize=(16, 16), crop=(16, 16))
    return Model(c, 5, []).description()


@pytest.mark.slow
def test_it_answers_until_it_is_closed_and_tells_why_it_ended() -> None:
    frames = {f"{group}/camera": np.zeros((2, 2, 16, 16, 3), np.uint8) for group in ("obs", "next_obs")}
    with TorchProcess(description(), ["preprocessing"]) as torch:
        assert torch.threads >= 1
        assert not torch.load("policy", {})  # was not asked for
        assert torch.load("preprocessing", {"row": np.arange(2), **frames})
        wall, cpu = torch.block(2)
        assert 0 < wall < 60 and 0 < cpu < 60
        assert torch.load("preprocessing", {"row": np.arange(2)})
        with pytest.raises(RunError, match=r"^--torch: the process that runs torch ended with status 1: KeyError: "):
            torch.block(1)
    assert torch._process.returncode == 1


def test_it_imports_no_jax() -> None:
    code = "import sys, uwm_jax.benchmarking.torch_process; assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
