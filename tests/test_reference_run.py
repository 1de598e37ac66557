"""A run whose losses and gradient norms are kept: a change that means to leave training alone leaves them alone.

The run takes what a short config leaves out: a VAE, cameras of two sizes, augmentation, low-dim and text inputs, blocks
in a loop, accumulation, a source without actions, and parameters cut over two devices.

`golden/reference_run.json` holds the metrics of each step and the names and shapes of the VAE's tensors, which the
formula of `golden/reference.py` fills. A change that means to move the numbers records them anew, and says why:

    RECORD_REFERENCE_RUN=1 python -m pytest tests/test_reference_run.py
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import quick_compile
from tests.golden.reference import filler
from uwm_jax import config as config_lib

REFERENCE = Path(__file__).parent / "golden" / "reference_run.json"
STEPS = 3  # two steps later, at this learning rate, rounding has grown to 4e-5
TOLERANCE = 1e-5  # of which XLA's optimisation levels and instruction sets take 2.3e-7

pytestmark = pytest.mark.slow


def write_vae(folder: Path, reference: dict) -> Path:
    """A folder as diffusers writes it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(reference["config"]))
    tensors = {}
    for k, (name, shape) in enumerate(sorted(reference["tensors"].items())):
        fan_in = max(math.prod(shape[1:]), 12) if len(shape) > 1 else 100
        value = filler(math.prod(shape), k).reshape(shape) * (12 / fan_in) ** 0.5
        tensors[name] = (value + (len(shape) == 1 and name.endswith(".weight"))).astype(np.float32)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def config_file(make_tiny_config, tmp_path: Path) -> Path:
    c = make_tiny_config()
    c.seed = 5
    c.total_steps, c.batch_size, c.accumulation_steps, c.log_every = STEPS, 8, 2, 1
    c.checkpoint.every = STEPS
    c.model.num_heads, c.model.scan_blocks, c.mesh.fsdp = 4, True, 2
    c.model.encoder.stage_sizes, c.model.encoder.pool = (1, 1), "average"
    c.model.encoder.use_language = True
    c.model.codec.name, c.model.codec.microbatch = "vae", 4
    c.model.codec.vae = str(write_vae(tmp_path / "vae", json.loads(REFERENCE.read_text())["vae"]))
    c.data.cameras, c.data.low_dim, c.data.text = ("exterior", "wrist"), ("state", "gripper"), "embedding"
    c.data.sources.robot = config_lib.source(weight=0.75)
    c.data.sources.video = config_lib.source(weight=0.25, use_actions=False)
    c.data.resize, c.data.crop = (20, 18), (16, 16)  # of frames of 24 x 32 and of 16 x 16
    c.optimizer.learning_rate, c.optimizer.schedule = 1e-2, "cosine"  # so that the zeros of the start are left soon
    c.optimizer.weight_decay, c.optimizer.clip_norm = 1e-2, 1.0
    file = tmp_path / "config.py"
    file.write_text(
        "from uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(c)!r}, 'test')\n"
    )
    return file


def is_compared(name: str) -> bool:
    return name.split("/")[0] in ("loss", "grad_norm")


def test_losses_and_gradient_norms_are_those_of_before(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uwm_jax.train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    environ = os.environ | {"XLA_FLAGS": quick_compile.with_devices(2)}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [{name: value for name, value in line.items() if is_compared(name)} for line in lines]
    reference = json.loads(REFERENCE.read_text())
    if os.environ.get("RECORD_REFERENCE_RUN"):
        REFERENCE.write_text(json.dumps(reference | {"steps": found}, indent=1) + "\n")
        pytest.skip(f"recorded in {REFERENCE}")

    assert len(found) == len(reference["steps"]) == STEPS
    for step, (ours, expected) in enumerate(zip(found, reference["steps"], strict=True), start=1):
        assert ours.keys() == expected.keys(), f"step {step}"
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=TOLERANCE), f"step {step}: {name}"
