"""A Diffusion Policy between a batch and its losses or samples: the one place where its parts meet."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec
from uwm_jax.data.spec import DataSpec
from uwm_jax.diffusion import loss, sampler
from uwm_jax.diffusion.flow import Flow
from uwm_jax.diffusion.roles import Role
from uwm_jax.systems import parts
from uwm_jax.systems.base import (
    Batch,
    Bucket,
    Draws,
    Encoded,
    Flops,
    Losses,
    Noise,
    Params,
    Promised,
    System,
    Use,
    draw_normal,
    exact,
    share_equally,
)
from uwm_jax.systems.dp.network import network_from_config
from uwm_jax.systems.dp.tree import tree

ACTION = "action"  # the one modality, and the one part of the loss
USES = {"policy": Use((ACTION,), question="what to do, seeing now")}
ACTING = "policy"


class DP(System):
    """A Diffusion Policy (Chi et al. 2023), by DDIM or flow matching, for comparison with world models.

    Parameters are {"obs_encoder", "noise_pred_net"}. What it encodes: `images` (B, V, T, h, w, 3) of the current
    observation in [0, 1], `low_dim` {key: (B, T, D)}, `text` (B, E) or None, and of `action` and `action_mask` what the
    batch has. With `diffusion.num_train_noise_samples` n > 1, draws have an axis of n after the rows'. Of flow, the
    draws' `timestep` is the continuous time in [0, 1).
    """

    uses = USES
    acting = ACTING
    can_promise = True

    def __init__(self, config: ConfigDict, spec: DataSpec, codec: Codec | None = None):
        super().__init__(config, spec, codec)
        d = config.diffusion
        self.tree = tree(config)
        self.schedule = parts.schedule(d)
        self.flow = Flow(d.num_train_steps, d.num_inference_steps, d.timeshift) if d.kind == "flow" else None
        self.action_clip = 0.0 if self.flow else d.clip.action
        self.num_frames = len(spec.window.obs)
        self.action_shape = (len(spec.window.action), spec.action_dim)
        self.network = network_from_config(config.model, action_dim=spec.action_dim, action_len=self.action_shape[0])

    # --- parameters and inputs -----------------------------------------------------------------

    def init(self, key: jax.Array) -> Params:
        like = self.spec.batch_like(1)
        images = jnp.zeros((1, len(self.cameras), self.num_frames, *self.config.data.crop, 3))
        low_dim = {k: jnp.zeros(like[f"obs/{k}"].shape) for k in sorted(self.spec.low_dim)}
        text = jnp.zeros(like["obs/text"].shape) if self.spec.text_dim else None
        inputs = images, low_dim, text, jnp.zeros((1, *self.action_shape)), jnp.zeros((1,), jnp.int32)
        return self.network.init(key, *inputs, method="init_all")["params"]

    def encode(self, frozen: Params, batch: Batch, key: jax.Array | None = None) -> Encoded:
        image_keys = None if key is None else self.step_keys(key, batch["row"]).image
        return {
            "images": self.images(batch, image_keys)[0],
            "low_dim": {k: batch[f"obs/{k}"] for k in sorted(self.spec.low_dim)},
            "text": batch.get("obs/text"),
            **{name: batch[name] for name in (ACTION, "action_mask") if name in batch},
        }

    @exact
    def encode_obs(self, params: Params, encoded: Encoded) -> jax.Array:
        """`global_cond` (B, F) float32 of the current observation."""
        inputs = encoded["images"], encoded["low_dim"], encoded["text"]
        return self.network.apply({"params": params}, *inputs, method="encode_obs")

    # --- training ------------------------------------------------------------------------------

    def draws(self, key: jax.Array, rows: jax.Array) -> Draws:
        count = self.config.diffusion.num_train_noise_samples
        return self._draw(key, rows, (count,) if count > 1 else ())

    def one_draw(self, key: jax.Array, rows: jax.Array) -> Draws:
        return self._draw(key, rows, ())

    def _draw(self, key: jax.Array, rows: jax.Array, lead: tuple[int, ...]) -> Draws:
        """Draws with the axes `lead` after the rows'."""

        def draw_time(key: jax.Array) -> jax.Array:
            if self.flow:
                return jax.random.uniform(key, lead)
            return jax.random.randint(key, lead, 0, self.schedule.num_train_steps)

        noise = draw_normal(jax.random.fold_in(key, 0), rows, {ACTION: (*lead, *self.action_shape)})
        return {"noise": noise, "timestep": {ACTION: jax.vmap(draw_time)(self.step_keys(key, rows).timestep)}}

    def shares(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        return {ACTION: share_equally(batch["action_mask"])}

    @exact
    def losses(self, params: Params, encoded: Encoded, draws: Draws, *, train: bool = False) -> Losses:
        noise, time = draws["noise"][ACTION], draws["timestep"][ACTION]
        count = math.prod(time.shape[1:])  # draws per row, which share the encoded observation
        clean, features = encoded[ACTION], self.encode_obs(params, encoded)
        noise, time = noise.reshape(-1, *self.action_shape), time.reshape(-1)
        clean, cond = (jnp.repeat(x, count, axis=0) if count > 1 else x for x in (clean, features))
        if self.flow:
            noisy, timestep = self.flow.add_noise(clean, noise, time), self.flow.timestep(time)
            target = self.flow.target(clean, noise)
        else:
            noisy, timestep = self.schedule.add_noise(clean, noise, time), time
            target = self.schedule.target(self.config.diffusion.prediction.action, clean, noise, time)
        output = self.network.apply({"params": params}, cond, noisy, timestep)
        errors = loss.row_mean(jnp.square(output - target))
        every = {ACTION: jnp.ones(errors.shape, bool)}
        steps = self.config.diffusion.num_train_steps
        buckets = loss.by_timestep({ACTION: jax.lax.stop_gradient(errors)}, {ACTION: timestep}, every, steps)
        return Losses(
            {ACTION: errors.reshape(-1, count).mean(axis=1)},
            {name: Bucket(*pair) for name, pair in buckets.items()},
            {"noise_pred/action": output.reshape(draws["noise"][ACTION].shape), "obs_feat": features},
        )

    # --- inference -----------------------------------------------------------------------------

    def noise(self, key: jax.Array, rows: jax.Array, use: str) -> Noise:
        return draw_normal(key, rows, {ACTION: self.action_shape})

    @exact
    def sample(
        self,
        params: Params,
        encoded: Encoded,
        use: str,
        noise: Noise,
        *,
        promised: Promised | None = None,
        guided: bool = False,
        trace: bool = False,
    ) -> dict[str, jax.Array]:
        features, variables = self.encode_obs(params, encoded), {"params": params}

        def modulation(timestep: jax.Array) -> Any:
            return self.network.apply(variables, features, timestep, method="modulation")

        def predict(noisy: jax.Array, modulation: Any) -> jax.Array:
            return self.network.apply(variables, noisy, modulation, method="predict")

        if self.flow:
            made = sampler.integrate(
                modulation, predict, self.flow, noise[ACTION], promised=promised, guided=guided, path=trace
            )
            return {ACTION: made}
        return sampler.sample(
            lambda timestep: modulation(timestep[ACTION]),
            lambda noisy, modulation: {ACTION: predict(noisy[ACTION], modulation)},
            self.schedule,
            {ACTION: Role.GENERATE},
            noise=noise,
            given={},
            prediction=self.config.diffusion.prediction.to_dict(),
            clip=self.config.diffusion.clip.to_dict(),
            promised={ACTION: promised} if promised else None,
            guided=guided,
            path=trace,
        )

    # --- about -----------------------------------------------------------------------------------

    def flops(self) -> Flops:
        encoder, net = self.network.obs_encoder, self.network.noise_pred_net
        views, (rows, columns) = len(self.cameras), self.config.data.crop
        features = encoder.num_features(views, self.num_frames, sum(self.spec.low_dim.values()))
        return Flops(
            {
                "network": net.flops(features) * self.config.diffusion.num_train_noise_samples,
                "encoder": encoder.flops(views, self.num_frames, rows, columns, self.spec.text_dim),
            }
        )

    def describe_sampling(self) -> dict[str, Any]:
        if self.flow:
            return self.flow.describe()
        return {key: x for key, x in self.schedule.describe().items() if key != "sampler_hidden_timestep"}
