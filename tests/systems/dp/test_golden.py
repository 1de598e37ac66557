"""Diffusion Policy with official weights against the official code's numbers: losses, gradients and samples."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from tests.golden import reference
from uwm_jax import systems
from uwm_jax.conversion.from_torch import read_official
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.diffusion.flow import Flow
from uwm_jax.systems.base import Losses, System
from uwm_jax.torch_bridge import layout
from uwm_jax.torch_bridge.official_yaml import OfficialYaml

# One small set stays among the fast tests; a ResNet-18 takes seconds to compile.
NAMES = [pytest.param(name, marks=() if name == "dp_unet_fourier" else pytest.mark.slow) for name in reference.DP_NAMES]


@dataclasses.dataclass(frozen=True)
class Golden:
    """A golden set with its system and parameters."""

    g: dict[str, np.ndarray]
    system: System
    params: Any

    @functools.cached_property
    def encoded(self) -> dict[str, Any]:
        batch = {key: x for key, x in self.g.items() if key.startswith("obs/")}
        return self.system.encode({}, {**batch, "action": self.g["action_normalized"]})

    def draws(self, prefix: str = "") -> dict[str, dict[str, np.ndarray]]:
        time = self.g.get(f"{prefix}timestep/continuous", self.g[f"{prefix}timestep/action"].astype(np.int32))
        return {"noise": {"action": self.g[f"{prefix}noise/action"]}, "timestep": {"action": time}}


@functools.cache
def golden(name: str) -> Golden:
    weights = reference.weights(name)
    run = read_official(OfficialYaml(reference.official_yaml(name)), {key: x.shape for key, x in weights.items()})
    assert not run.conflicts
    window = WindowSpec.from_config(run.config.data.window)
    spec = DataSpec(window, run.cameras, run.low_dim, run.action_dim, run.text_dim, Normalizer({}))
    system = systems.make(run.config, spec)
    like = jax.eval_shape(system.init, jax.random.key(0))
    entries = systems.get("dp").official.entry_of(run.config)
    return Golden(reference.numbers(name), system, layout.from_official(weights, like, entries, name))


def assert_close(actual: Any, wanted: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=rtol, atol=atol)


@functools.cache
def computed(name: str) -> tuple[Losses, Losses | None, jax.Array]:
    """One evaluation, one with two draws per row, and all states of a sample: one program, which encodes once."""
    it = golden(name)
    noise = {"action": it.g["init_noise/action"]}

    def compute(params: Any, encoded: Any) -> tuple[Losses, Losses | None, jax.Array]:
        twice = None
        if "repeat2/noise/action" in it.g:  # rows r0 r0 r1 r1
            draws = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), it.draws("repeat2/"))
            twice = it.system.losses(params, encoded, draws)
        states = it.system.sample(params, encoded, "policy", noise, trace=True)["action"]
        return it.system.losses(params, encoded, it.draws()), twice, states

    return jax.jit(compute)(it.params, it.encoded)


@pytest.mark.parametrize("name", NAMES)
def test_one_evaluation(name):
    it, found = golden(name), computed(name)[0]
    images = np.moveaxis(it.g["enc/curr_imgs"], 2, -1)  # (B, V, C, T, h, w), normalised, -> channels last
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    assert_close((it.encoded["images"] - mean) / std, images, 2e-5, 2e-5)
    assert_close(found.outputs["obs_feat"], it.g["obs_feat"], 2e-5, 2e-5)
    assert_close(found.outputs["noise_pred/action"], it.g["noise_pred/action"], 2e-5, 2e-5)
    assert found.parts["action"].shape == (2,)
    assert_close(found.parts["action"].mean(), it.g["loss/action"], 2e-5, 2e-5)


@pytest.mark.parametrize("name", [param for param in NAMES if param.values[0] != "dp_flow_small"])
def test_two_draws_per_row(name):
    it, found = golden(name), computed(name)[1]
    predicted = found.outputs["noise_pred/action"]
    assert_close(predicted.reshape(4, *predicted.shape[2:]), it.g["repeat2/noise_pred/action"], 2e-5, 2e-5)
    assert_close(found.parts["action"].mean(), it.g["repeat2/loss/action"], 2e-5, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_samples(name):
    it, states = golden(name), computed(name)[2]
    assert states.shape == (11, *it.g["init_noise/action"].shape)
    np.testing.assert_array_equal(states[0], it.g["init_noise/action"])
    assert_close(states[-1], it.g["policy/action_normalized"], 1e-4)


@pytest.mark.slow
def test_flow_with_another_walk():
    it = golden("dp_flow_small")
    config = it.system.config.copy_and_resolve_references()
    config.diffusion.num_inference_steps, config.diffusion.timeshift = 5, 3.0
    system = systems.make(config, it.system.spec)
    assert system.flow == Flow(100, 5, 3.0)
    sample = jax.jit(functools.partial(system.sample, use="policy"))
    found = sample(it.params, it.encoded, noise={"action": it.g["init_noise/action"]})
    assert_close(found["action"], it.g["policy_shift3/action_normalized"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.DP_NAMES)
def test_gradients(name, request):
    if name == "dp_flow_small":
        request.getfixturevalue("optimised")  # else a rounding moves maxima in its ResNet to other pixels
    it = golden(name)

    def loss(params: Any) -> jax.Array:
        return it.system.losses(params, it.encoded, it.draws()).parts["action"].mean()

    entries = systems.get("dp").official.entry_of(it.system.config)
    grads = layout.to_official(jax.jit(jax.grad(loss))(it.params), entries)
    names = [key.removeprefix("grad/") for key in it.g if key.startswith("grad/")]
    assert len(names) >= 6
    for tensor in names:
        wanted = it.g[f"grad/{tensor}"]
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(grads[tensor] / largest, wanted / largest, rtol=0, atol=1e-3, err_msg=tensor)
