"""A short run of the official code's optimizer on golden weights, saved as that code saves it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import reference

BUFFERS = ("obs_encoder.vae.shift", "obs_encoder.vae.scale")
FROZEN = "obs_encoder.vae."
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def gradients(names: list[str], shapes: dict[str, tuple[int, ...]], step: int) -> dict[str, np.ndarray]:
    """Gradients of a step, float32, of sizes that differ from tensor to tensor."""
    rng = np.random.default_rng(step)
    return {name: (rng.normal(size=shapes[name]) * 10.0 ** rng.integers(-6, 1)).astype(np.float32) for name in names}


class OfficialRun:
    """`torch.optim.AdamW(model.parameters())` over the tensors of a golden set, as the official trainer makes it.

    Args:
      name: of the golden set.
      without_gradient: what the names of tensors begin with that are not trained.
    """

    def __init__(self, name: str, without_gradient: tuple[str, ...] = (FROZEN,)):
        import torch

        # Modules are registered in another order than that of their names.
        tensors = reference.weights(name)
        order = sorted(tensors, key=lambda key: (not key.startswith("obs_encoder.vae."), key[::-1]))
        self.model = OrderedDict((key, torch.nn.Parameter(torch.from_numpy(tensors[key].copy()))) for key in order)
        self.parameters = {key: value for key, value in self.model.items() if key not in BUFFERS}
        self.trained = [key for key in self.parameters if not key.startswith(without_gradient)]
        self.shapes = {key: tuple(value.shape) for key, value in self.model.items()}
        self.restart()

    def restart(self) -> None:
        """A fresh optimizer, before its first step."""
        import torch

        self.optimizer = torch.optim.AdamW(self.parameters.values(), **ADAMW)
        self.finished = 0

    def steps(self, count: int) -> None:
        import torch

        for _ in range(count):
            for key, gradient in gradients(self.trained, self.shapes, self.finished).items():
                self.parameters[key].grad = torch.from_numpy(gradient)
            self.optimizer.step()
            self.finished += 1

    def checkpoint(self, **changes: Any) -> dict[str, Any]:
        """What the official trainer saves after its last step, whose number counts from 0."""
        return {
            "model": OrderedDict((key, value.detach().clone()) for key, value in self.model.items()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.finished, "_last_lr": [ADAMW["lr"]]},
            "scaler": {},
            "action_normalizer": None,
            "lowdim_normalizer": None,
            "step": self.finished - 1,
            **changes,
        }

    def save(self, path: Path, **changes: Any) -> Path:
        import torch

        torch.save(self.checkpoint(**changes), path)
        return path

    def weights(self) -> dict[str, np.ndarray]:
        return {key: value.detach().numpy() for key, value in self.parameters.items()}
