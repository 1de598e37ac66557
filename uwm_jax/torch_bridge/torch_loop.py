"""A plain eager PyTorch training loop and sampler of the same network: the reference of `benchmark_step`.

They are what one writes first: a forward pass, `backward`, `torch.optim.AdamW`; and a loop over the sampler's steps,
each of which evaluates the network. Images are resized, cropped and jittered as in the official code, with one draw
for each view of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uwm_jax.diffusion.roles import Role, generated
from uwm_jax.torch_bridge import torch_images
from uwm_jax.torch_bridge.torch_network import UWM

Batch = Mapping[str, Tensor]


class TorchLoop:
    """Trains and samples a `UWM` on the default device, in float32 or under bfloat16 autocast.

    Args:
      network: the module; its codec, if it has one, encodes the next frames of batches without `next_obs_latent`.
      config: `model`, `loss`, `data`, `diffusion` and `optimizer` fields of it are read, as our step reads them.
      cameras, low_dim: keys of the observations.
      diffusion: numbers of the noise schedule: `alphas_cumprod`, (T,) floats; `timesteps`, where the sampler evaluates
        the network, falling; `hidden_timestep`, of a modality that a sample hides.
    """

    def __init__(
        self, network: UWM, config: Any, cameras: Iterable[str], low_dim: Iterable[str], diffusion: Mapping[str, Any]
    ) -> None:
        self.network, self.config = network.train(), config
        self.cameras, self.low_dim = sorted(cameras), list(low_dim)
        self.abar = torch.tensor(diffusion["alphas_cumprod"], dtype=torch.float32)
        self.timesteps, self.hidden = list(diffusion["timesteps"]), diffusion["hidden_timestep"]
        self.trained = [p for p in network.parameters() if p.requires_grad]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay
        )
        self.average: list[Tensor] = []
        self.steps = 0

    # --- training ------------------------------------------------------------------------------

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
        if o.ema_decay and not self.average:
            self.average = [p.detach().clone() for p in self.trained]
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
        current, following = self.preprocess(batch)
        latents = batch.get("next_obs_latent")
        if latents is None:
            latents = self.encode_frames(following)
        clean = {"action": batch["action"], "next_obs": latents}
        noise = {m: torch.randn_like(x) for m, x in clean.items()}
        timestep = {m: torch.randint(len(self.abar), (rows,)) for m in clean}
        levels = {m: self._levels(timestep[m], clean[m].ndim) for m in clean}
        noisy = {m: signal * clean[m] + sigma * noise[m] for m, (signal, sigma) in levels.items()}
        pred = self.predict(self.encode_obs(batch, current), noisy, timestep)
        loss = torch.zeros(())
        for m, (signal, sigma) in levels.items():
            targets = {"epsilon": noise[m], "sample": clean[m], "v": signal * noise[m] - sigma * clean[m]}
            loss = loss + c.loss.weights[m] * F.mse_loss(pred[m], targets[c.diffusion.prediction[m]])
        return loss

    def _levels(self, timestep: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        abar = self.abar[timestep].reshape(-1, *[1] * (ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    # --- sampling ------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, batch: Batch, roles: Mapping[str, str | Role], noise: Batch) -> dict[str, Tensor]:
        """DDIM samples {modality: (B, ...)} of what a mode generates, each step one evaluation of the whole network.

        Args:
          batch: `obs/*`, and `action` or `next_obs_latent` where the mode is given it.
          roles: of the mode, {modality: a `Role` or its value}.
          noise: {modality: (B, ...)}, where generation starts or what stands in for what is hidden.
        """
        given = {"action": "action", "next_obs": "next_obs_latent"}
        role = {m: Role(r) for m, r in roles.items()}
        x = {m: batch[given[m]] if r is Role.GIVEN else noise[m] for m, r in role.items()}
        rows = len(x["action"])
        features = self.encode_obs(batch, self.preprocess(batch, augment=False)[0])
        for step, landing in zip(self.timesteps, [*self.timesteps[1:], -1], strict=True):
            level = {Role.GENERATE: step, Role.GIVEN: 0, Role.HIDDEN: self.hidden}
            output = self.predict(features, x, {m: torch.full((rows,), level[r]) for m, r in role.items()})
            x |= {m: self._ddim(m, output[m], x[m], step, landing) for m in generated(role)}
        return {m: x[m] for m in generated(role)}

    def _ddim(self, modality: str, output: Tensor, x: Tensor, step: int, landing: int) -> Tensor:
        """One deterministic DDIM step; the noise is estimated before the clean data is clipped."""
        abar = self.abar[step]
        next_abar = self.abar[landing] if landing >= 0 else torch.ones(())
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        prediction, clip = self.config.diffusion.prediction[modality], self.config.diffusion.clip[modality]
        if prediction == "epsilon":
            clean, noise = (x - sigma * output) / signal, output
        elif prediction == "sample":
            clean, noise = output, (x - signal * output) / sigma
        else:
            clean, noise = signal * x - sigma * output, signal * output + sigma * x
        if clip:
            clean = clean.clamp(-clip, clip)
        return next_abar.sqrt() * clean + (1 - next_abar).sqrt() * noise

    # --- parts ---------------------------------------------------------------------------------

    def preprocess(self, batch: Batch, augment: bool = True) -> tuple[Tensor, Tensor | None]:
        """Current and, where the batch has them, following images (B, V, T, h, w, 3) in [0, 1]."""
        data = self.config.data
        current = [batch[f"obs/{camera}"] for camera in self.cameras]
        has_next = f"next_obs/{self.cameras[0]}" in batch
        following = [batch[f"next_obs/{camera}"] for camera in self.cameras] if has_next else None
        return torch_images.preprocess(
            current, following, resize=data.resize, crop=data.crop, augment=data.augment if augment else None
        )

    def encode_obs(self, batch: Batch, images: Tensor) -> Tensor:
        """Features (B, F) float32 of the current images with the batch's low-dim and text keys."""
        low_dim = {key: batch[f"obs/{key}"] for key in self.low_dim}
        with _autocast(self.config.model.dtype):
            return self.network.encode_obs(images, low_dim, batch.get("obs/text")).float()

    def encode_frames(self, images: Tensor) -> Tensor:
        """Latents (B, V, T, h, w, C) float32 of the following images, as in training; no gradient."""
        codec = self.config.model.codec
        with _autocast(codec.dtype):
            return self.network.encode_frames(images, codec.posterior == "sample").float()

    def predict(self, features: Tensor, noisy: Batch, timestep: Batch) -> dict[str, Tensor]:
        """One evaluation of the network, {modality: (B, ...)} float32."""
        with _autocast(self.config.model.dtype):
            return {m: x.float() for m, x in self.network(features, noisy, timestep).items()}


def _autocast(dtype: str) -> Any:
    return (
        torch.autocast(torch.get_default_device().type, torch.bfloat16)
        if dtype == "bfloat16"
        else contextlib.nullcontext()
    )
