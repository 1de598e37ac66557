"""An export folder in PyTorch: by its own `uwm_torch.py`, and as a plain eager loop. Imports no JAX.

The plain loop is what the official code does: its network, evaluated as a whole in each step of a Python loop, in
float32 or under autocast.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file

from uwm_jax.torch_bridge.torch_loop import TorchLoop
from uwm_jax.torch_bridge.torch_network import UWM

Outputs = dict[str, np.ndarray]


def program_of(folder: Path, device: str, cuda_graphs: bool) -> Any:
    """The policy of `uwm_torch.py`, the folder's own copy, as its users load it."""
    spec = importlib.util.spec_from_file_location("uwm_torch", folder / "uwm_torch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    dtype = getattr(torch, module.read_description(folder)["config"]["model"]["dtype"])
    return module.load(folder, device, dtype, cuda_graphs=cuda_graphs)


class Official:
    """The eager loop of `TorchLoop` between numpy arrays in raw units, as `uwm_torch.Policy.sample` has them."""

    def __init__(self, folder: Path, device: str):
        self._described = d = json.loads((folder / "model.json").read_text())
        self._device = device
        network = UWM.from_description({**d, "codec": {"name": "pixels"}})  # which has no arrays: nothing is encoded
        network.load_state_dict(load_file(folder / "model.safetensors"))
        torch.set_default_device(device)  # of the tensors that the loop makes
        config = ConfigDict(d["config"])
        self._loop = TorchLoop(network.to(device), config, d["cameras"], d["low_dim"], d["diffusion"])

    def sample(self, use: str, inputs: Mapping[str, np.ndarray], noise: Mapping[str, np.ndarray]) -> Outputs:
        batch, scales = {}, self._described["normalizers"]
        for name, array in inputs.items():
            batch[name] = torch.from_numpy(array).to(self._device)
            if (key := name.removeprefix("obs/")) in scales:
                scale, offset = (torch.tensor(scales[key][part]) for part in ("scale", "offset"))
                batch[name] = (batch[name] - offset) / scale
        start = {m: torch.from_numpy(x).to(self._device) for m, x in noise.items()}
        made = self._loop.sample(batch, self._described["modes"][use], start)
        out = {}
        if "action" in made:
            scale, offset = (torch.tensor(scales["action"][part]) for part in ("scale", "offset"))
            out["action"] = (made["action"] * scale + offset).cpu().numpy()
        if "next_obs" in made:
            out["next_obs_latent"] = made["next_obs"].cpu().numpy()
        return out
