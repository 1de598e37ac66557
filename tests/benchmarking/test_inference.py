"""The model that latencies are measured with: what its callers answer, and what keeps PyTorch's sides from running."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.systems.small import SYSTEMS, small_config
from uwm_jax.backend import JaxBackend
from uwm_jax.benchmarking.inference import Model, obstacle
from uwm_jax.errors import UserError


def test_callers_answer_uses_from_raw_arrays_to_raw_arrays(tiny: ConfigDict) -> None:
    model = Model(tiny, 1, 5, (20, 30))
    system = model.with_steps(3)
    assert system.config.diffusion.num_inference_steps == 3 and system.cameras == ("b",)
    inputs = model.inputs("inverse")
    assert inputs["obs/b"].shape == (1, 2, 20, 30, 3) and inputs["obs/b"].dtype == np.uint8
    assert set(inputs) == {"obs/b", "obs/state", "next_obs_latent"} and "action" in model.inputs("forward")
    made = model.caller("policy")()
    scale, offset = system.spec.normalizer.entries["action"]
    np.testing.assert_allclose(made["action"], made["action_normalized"] * scale + offset, rtol=0, atol=1e-6)
    joint = model.caller("joint")()
    assert joint["action"].shape == (1, 4, 5) and set(joint) == {"action", "next_obs_latent"}
    wanted = JaxBackend(system, model._params, {}).sample(
        "joint", model.inputs("joint"), model.noise("joint"), actions_only=True
    )
    np.testing.assert_allclose(joint["action"], wanted["action"], rtol=0, atol=1e-5)


def test_a_config_has_to_have_the_cameras_and_the_steps(tiny: ConfigDict) -> None:
    with pytest.raises(UserError, match=r"--views=3: config.data.cameras has 2: \('b', 'a'\)"):
        Model(tiny, 3, 5)
    with pytest.raises(UserError, match="config.diffusion.num_inference_steps=101"):
        Model(tiny, 2, 5).with_steps(101)


@pytest.mark.parametrize(
    ("side", "variant", "device", "reason"),
    [
        ("jax", "gr1", "tpu", ""),
        ("uwm_torch", "uwm", "tpu", "PyTorch does not run on devices of kind 'tpu' here"),
        ("uwm_torch_graphs", "uwm", "cpu", "CUDA graphs need an NVIDIA GPU"),
        ("uwm_torch", "gr1", "cpu", "uwm_torch.py does not run gr1"),
        ("uwm_torch", "pad", "cpu", "uwm_torch.py does not run pad"),
        ("official", "dp_unet", "cpu", "there is no eager loop of a dp network"),
        ("uwm_torch", "dp_unet", "cpu", None),
        ("official", "uwm", "gpu", None),
    ],
)
def test_what_does_not_run_has_a_reason(side: str, variant: str, device: str, reason: str | None) -> None:
    assert variant in SYSTEMS
    without_torch = "torch is not installed: pip install 'uwm-jax[torch]'"
    expected = ("" if importlib.util.find_spec("torch") else without_torch) if reason is None else reason
    assert obstacle(side, small_config(variant), device) == expected


def test_another_adaln_is_not_in_the_official_code() -> None:
    config = small_config("uwm")
    config.model.adaln = "shared"
    assert obstacle("uwm_torch", config, "cpu") == "config.model.adaln='shared' is not in the official code"


def test_the_process_of_torch_imports_no_jax() -> None:
    code = "import sys, uwm_jax.benchmarking.torch_inference; assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
