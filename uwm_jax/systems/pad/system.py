"""PAD between a batch and its losses or samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec
from uwm_jax.data.spec import DataSpec
from uwm_jax.diffusion import loss, sampler
from uwm_jax.diffusion.roles import Role, generated
from uwm_jax.systems import fields, parts
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
from uwm_jax.systems.pad.config import MODALITIES
from uwm_jax.systems.pad.network import PADNet
from uwm_jax.systems.pad.tree import TREE

NET = "noise_pred_net"
ROLES = dict.fromkeys(MODALITIES, Role.GENERATE)
ACTING = "joint"
USES = {ACTING: Use(generated(ROLES), question="what to do and what will be seen")}
SAMPLE_KEYS = {"action": "action", "next_obs": "next_obs_latent"}  # of `sample`, by modality


class PAD(System):
    """Prediction with Action (Guo et al., 2024), as compared with in Unified World Models (Zhu et al., RSS 2025).

    Parameters are {"noise_pred_net"}. What it encodes: `obs_latent` (B, V, T, h, w, C) of the current observation, and
    of `action`, `action_mask` and `next_obs_latent` what the batch has.
    """

    uses = USES
    acting = ACTING
    can_promise = True
    tree = TREE

    codec: Codec

    def __init__(self, config: ConfigDict, spec: DataSpec, codec: Codec | None):
        assert codec is not None, "PAD reads and samples latents of a codec"
        super().__init__(config, spec, codec)
        self.schedule = parts.schedule(config.diffusion)
        self.prediction = config.diffusion.prediction.to_dict()
        self.clip = config.diffusion.clip.to_dict()
        self.action_clip = self.clip["action"]
        m = config.model
        self.num_frames = len(spec.window.obs)
        self.action_shape = (len(spec.window.action), spec.action_dim)
        self.latent_shape = fields.latent_shape(config, codec, len(self.cameras), self.num_frames)
        self.shapes = {"action": self.action_shape, "next_obs": self.latent_shape}  # of a row's noise
        self.network = PADNet(
            action_dim=spec.action_dim,
            action_len=self.action_shape[0],
            latent_shape=self.latent_shape,
            patch=tuple(m.patch),
            timestep_embed_dim=m.timestep_embed_dim,
            **parts.transformer(m),
        )

    # --- parameters and inputs -----------------------------------------------------------------

    def init(self, key: jax.Array) -> Params:
        noisy = {m: jnp.zeros((1, *shape)) for m, shape in self.shapes.items()}
        variables = self.network.init(key, noisy["next_obs"], noisy, jnp.zeros((1,), jnp.int32))
        return {NET: variables["params"]}

    @exact
    def encode(self, frozen: Params, batch: Batch, key: jax.Array | None = None) -> Encoded:
        image_keys = posterior_keys = None
        if key is not None:
            keys = self.step_keys(key, batch["row"])
            image_keys = keys.image
            if self.config.model.codec.posterior == "sample":
                posterior_keys = keys.posterior
        encoded: Encoded = {n: batch[n] for n in ("action", "action_mask") if n in batch}
        encoded |= self.cached_latents(batch, posterior_keys)
        if "obs_latent" in encoded:
            return encoded
        current, following = self.images(batch, image_keys)
        if "next_obs_latent" in encoded or following is None:
            encoded["obs_latent"] = self.encode_frames(frozen, current, posterior_keys)
        else:  # both in one pass
            both = self.encode_frames(frozen, jnp.concatenate([current, following], axis=2), posterior_keys)
            encoded["obs_latent"], encoded["next_obs_latent"] = jnp.split(both, [self.num_frames], axis=2)
        return encoded

    # --- training ------------------------------------------------------------------------------

    def draws(self, key: jax.Array, rows: jax.Array) -> Draws:
        total = self.schedule.num_train_steps
        timestep = jax.vmap(lambda k: jax.random.randint(k, (), 0, total))(self.step_keys(key, rows).timestep)
        noise = draw_normal(jax.random.fold_in(key, 0), rows, self.shapes)
        return {"noise": noise, "timestep": dict.fromkeys(MODALITIES, timestep)}

    def shares(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        mask = batch["action_mask"]
        return {"action": share_equally(mask), "next_obs": share_equally(jnp.ones_like(mask))}

    @exact
    def losses(self, params: Params, encoded: Encoded, draws: Draws, *, train: bool = False) -> Losses:
        timestep, mask = draws["timestep"], encoded.get("action_mask")

        def network(noisy: dict[str, jax.Array], timestep: Batch) -> dict[str, jax.Array]:
            inputs = encoded["obs_latent"], noisy, timestep["action"], mask
            return self.network.apply({"params": params[NET]}, *inputs)[0]

        clean = {m: encoded[SAMPLE_KEYS[m]] for m in MODALITIES}
        errors, output = loss.row_losses(network, self.schedule, clean, draws["noise"], timestep, self.prediction)
        every = jnp.ones(timestep["action"].shape, bool)
        counted = {"action": every if mask is None else mask, "next_obs": every}
        buckets = loss.by_timestep(jax.lax.stop_gradient(errors), timestep, counted, self.schedule.num_train_steps)
        outputs = {f"noise_pred/{m}": x for m, x in output.items()}
        outputs |= {name: encoded[name] for name in ("obs_latent", "next_obs_latent")}
        return Losses(errors, {name: Bucket(*pair) for name, pair in buckets.items()}, outputs)

    # --- inference -----------------------------------------------------------------------------

    def noise(self, key: jax.Array, rows: jax.Array, use: str) -> Noise:
        return draw_normal(key, rows, self.shapes)

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
        variables, obs_latent = {"params": params[NET]}, encoded["obs_latent"]
        result = sampler.sample(
            lambda timestep: self.network.apply(variables, timestep["action"], method="modulation"),
            lambda noisy, modulation: self.network.apply(variables, obs_latent, noisy, modulation, method="predict")[0],
            self.schedule,
            ROLES,
            noise=noise,
            given={},
            prediction=self.prediction,
            clip=self.clip,
            promised={"action": promised} if promised else None,
            guided=guided,
            path=trace,
        )
        return {SAMPLE_KEYS[m]: x for m, x in result.items()}

    # --- about -----------------------------------------------------------------------------------

    def flops(self) -> Flops:
        frames = 0 if self.config.data.latents else 2 * self.num_frames * len(self.cameras)
        return Flops({"network": self.network.flops()}, self.codec.encode_flops(frames, *self.config.data.crop))

    def misfits(self, timestep: Mapping[str, np.ndarray]) -> list[str]:
        action, next_obs = (timestep[m] for m in MODALITIES)
        if np.array_equal(action, next_obs):
            return []
        return [f"timestep/next_obs: expected timestep/action, {action}, since PAD has one timestep; found {next_obs}"]

    def describe_sampling(self) -> dict[str, Any]:
        return self.schedule.describe()
