"""The rows of `benchmark_step` in plain eager PyTorch. Imports no JAX."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

from uwm_jax.benchmarking.names import CODEC, ENCODER, NETWORK, SAMPLES, needs
from uwm_jax.torch_bridge import torch_codecs
from uwm_jax.torch_bridge.torch_loop import TorchLoop
from uwm_jax.torch_bridge.torch_network import UWM

Inputs = Mapping[str, Tensor]


def threads() -> int:
    """The cores that this process may use: torch and XLA get as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _network(description: Mapping[str, Any], config: ConfigDict, needed: set[str]) -> UWM:
    """The network, without what costs memory of the parts that no row needs."""
    model = config.copy_and_resolve_references().model
    codec = description["codec"] if CODEC in needed else {"name": "pixels"}  # which has no arrays
    if ENCODER not in needed:
        model.encoder.update(stage_sizes=(1,), width=16)
    if NETWORK not in needed:
        model.depth = 0
    network = UWM.from_description({**description, "config": {"model": model}, "codec": codec})
    if NETWORK not in needed:
        del network.noise_pred_net
    return network


class TorchRows:
    """The counterpart in torch of each row.

    Args:
      description: the model, as `rows.Model.description` gives it.
      rows: for which the network is made.
    """

    def __init__(self, description: Mapping[str, Any], rows: Sequence[str]):
        torch.set_num_threads(threads())
        has_codec = torch_codecs.is_available(description["codec"]["name"])
        self.rows = [row for row in rows if has_codec or CODEC not in needs(row)]
        config = ConfigDict(description["config"])
        needed = {part for row in self.rows for part in needs(row)}
        shapes = description["shapes"]
        self.shapes = {"action": shapes["action"], "next_obs": shapes["next_obs_latent"]}
        self.modes = description["modes"]
        self.loop = TorchLoop(
            _network(description, config, needed),
            config,
            description["cameras"],
            description["low_dim"],
            description["diffusion"],
        )

    def call(self, row: str, arrays: Mapping[str, Any]) -> Callable[[], Any] | None:
        """One repetition of a row on copies of the arrays that ours reads; None where diffusers is missing."""
        if row not in self.rows:
            return None
        inputs = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
        part, _, stage = row.partition("/")
        if "images" in inputs:  # channels outermost in memory, as torch's own preprocessing leaves them
            images = inputs["images"].movedim(-1, 3).contiguous().movedim(3, -1)
            inputs = {**inputs, "images": images}
        if part in ("latents", "pixels"):
            return functools.partial(getattr(self.loop, stage), inputs)
        if part in SAMPLES:
            return functools.partial(self._sample, inputs, SAMPLES[part])
        return functools.partial(getattr(self, "_" + row.replace("/", "_")), inputs)

    def _network_forward(self, inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._predict(inputs, inputs["global_cond"])

    def _network_forward_backward(self, inputs: Inputs) -> Tensor:
        """Gradients are left in the network's parameters, that of the features is returned."""
        self.loop.optimizer.zero_grad()
        features = inputs["global_cond"].clone().requires_grad_()
        pred = self._predict(inputs, features)
        sum(F.mse_loss(pred[m], inputs[f"target/{m}"]) for m in pred).backward()
        return features.grad

    def _predict(self, inputs: Inputs, features: Tensor) -> dict[str, Tensor]:
        noisy, timestep = ({m: inputs[f"{name}/{m}"] for m in self.shapes} for name in ("noisy", "timestep"))
        return self.loop.predict(features, noisy, timestep)

    def _encoder_forward(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return self.loop.encode_obs(inputs, inputs["images"])

    def _encoder_forward_backward(self, inputs: Inputs) -> None:
        """Gradients are left in the encoder's parameters."""
        self.loop.optimizer.zero_grad()
        F.mse_loss(self.loop.encode_obs(inputs, inputs["images"]), inputs["target"]).backward()

    def _codec(self, inputs: Inputs) -> Tensor:
        return self.loop.encode_frames(inputs["images"])

    def _preprocessing(self, inputs: Inputs) -> Any:
        return self.loop.preprocess(inputs)

    def _sample(self, inputs: Inputs, mode: str) -> dict[str, Tensor]:
        rows = len(inputs["action"])
        noise = {m: torch.randn(rows, *shape) for m, shape in self.shapes.items()}
        return self.loop.sample(inputs, self.modes[mode], noise)
