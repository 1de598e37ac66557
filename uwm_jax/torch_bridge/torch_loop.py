"""A plain eager PyTorch training loop of the same network: the reference of `benchmark_step`.

It is the loop that one writes first: a forward pass, `backward`, `torch.optim.AdamW`. Images are resized and
cropped; unlike our step it draws no colour jitter, which is to its advantage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uwm_jax.torch_bridge.torch_network import UWM

Batch = Mapping[str, Tensor]


class TorchLoop:
    """Trains a `UWM` on the CPU, in float32 or under bfloat16 autocast.

    Args:
      network: the module; its codec, if it has one, encodes the next frames of batches without `next_obs_latent`.
      config: `model`, `codec`, `loss`, `data` and `optimizer` fields of it are read, as our step reads them.
      cameras, low_dim: keys of the observations.
      alphas_cumprod: (T,) float32, of the noise schedule.
    """

    def __init__(
        self, network: UWM, config: Any, cameras: Iterable[str], low_dim: Iterable[str], alphas_cumprod: np.ndarray
    ) -> None:
        self.network, self.config = network.train(), config
        self.cameras, self.low_dim = sorted(cameras), list(low_dim)
        self.abar = torch.from_numpy(alphas_cumprod.copy())
        self.trained = [p for p in network.parameters() if p.requires_grad]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay
        )
        self.average = [p.detach().clone() for p in self.trained] if o.ema_decay else []
        self.steps = 0

    def forward(self, batch: Batch) -> float:
        """The loss of a batch, without gradients."""
        with torch.no_grad():
            return self._loss(batch).item()

    def forward_backward(self, batch: Batch) -> float:
        """The loss of a batch; its gradients are left in the parameters."""
        self.optimizer.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        return loss.item()

    def step(self, batch: Batch) -> float:
        """The loss of a batch; the parameters are updated."""
        loss, o = self.forward_backward(batch), self.config.optimizer
        if o.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, o.clip_norm)
        self.optimizer.step()
        ramp = 9 / (10 + self.steps) if o.ema_warmup == "ramp" else 0.0
        for average, parameter in zip(self.average, self.trained, strict=bool(self.average)):
            average.lerp_(parameter.detach(), max(1 - o.ema_decay, ramp))
        self.steps += 1
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        c, rows = self.config, len(batch["action"])
        latents = batch.get("next_obs_latent")
        if latents is None:
            frames = self._images(batch, "next_obs")
            with _autocast(c.model.codec.dtype):
                latents = self.network.encode_frames(frames, c.model.codec.posterior == "sample").float()
        clean = {"action": batch["action"], "next_obs": latents}
        noise = {m: torch.randn_like(x) for m, x in clean.items()}
        timestep = {m: torch.randint(len(self.abar), (rows,)) for m in clean}
        levels = {m: self._levels(timestep[m], clean[m].ndim) for m in clean}
        noisy = {m: signal * clean[m] + sigma * noise[m] for m, (signal, sigma) in levels.items()}
        low_dim = {key: batch[f"obs/{key}"] for key in self.low_dim}
        with _autocast(c.model.dtype):
            features = self.network.encode_obs(self._images(batch, "obs"), low_dim, batch.get("obs/text"))
            pred = self.network(features, noisy, timestep)
        loss = torch.zeros(())
        for m, (signal, sigma) in levels.items():
            targets = {"epsilon": noise[m], "sample": clean[m], "v": signal * noise[m] - sigma * clean[m]}
            loss = loss + c.loss.weights[m] * F.mse_loss(pred[m].float(), targets[c.diffusion.prediction[m]])
        return loss

    def _levels(self, timestep: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        abar = self.abar[timestep].reshape(-1, *[1] * (ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def _images(self, batch: Batch, group: str) -> Tensor:
        """(B, V, T, h, w, 3) in [0, 1], cropped at one random place per view."""
        data, views = self.config.data, []
        for camera in self.cameras:
            frames = batch[f"{group}/{camera}"]
            x = frames.flatten(0, 1).movedim(-1, 1).float() / 255
            if tuple(x.shape[2:]) != tuple(data.resize):
                x = F.interpolate(x, tuple(data.resize), mode="bilinear", antialias=True)
            (h, w), (top, left) = (
                data.crop,
                (int(torch.randint(whole - part + 1, ())) for whole, part in zip(data.resize, data.crop, strict=True)),
            )
            x = x[:, :, top : top + h, left : left + w]
            views.append(x.movedim(1, -1).unflatten(0, frames.shape[:2]))
        return torch.stack(views, dim=1)


def _autocast(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
