"""A Unified World Model between a batch and its losses or samples: the one place where its parts meet."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec
from uwm_jax.data.spec import DataSpec
from uwm_jax.diffusion import loss, sampler
from uwm_jax.diffusion.roles import Role, generated, given
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
    draw_normal,
    exact,
)
from uwm_jax.systems.uwm import objective
from uwm_jax.systems.uwm.modes import ACTING, MODALITIES, MODES, USES
from uwm_jax.systems.uwm.network import network_from_config
from uwm_jax.systems.uwm.tree import tree

SAMPLE_KEYS = {"action": "action", "next_obs": "next_obs_latent"}  # of `sample`, by modality
GAP_AT = 90  # % of T, where the shuffle gap is measured, for any sampler: little of the frames is left there


class UWM(System):
    """A Unified World Model (Zhu et al., RSS 2025).

    Parameters are {"obs_encoder", "noise_pred_net"}. What it encodes: `images` (B, V, T, h, w, 3) of the current
    observation in [0, 1], `low_dim` {key: (B, T, D)}, `text` (B, E) or None, and of `action`, `action_mask` and
    `next_obs_latent` what the batch has.
    """

    uses = USES
    acting = ACTING
    can_promise = True

    codec: Codec

    def __init__(self, config: ConfigDict, spec: DataSpec, codec: Codec | None):
        assert codec is not None, "a Unified World Model samples latents of a codec"
        super().__init__(config, spec, codec)
        self.tree = tree(config)
        self.schedule = parts.schedule(config.diffusion, hide_at=config.diffusion.hide_at)
        self.prediction = config.diffusion.prediction.to_dict()
        self.clip = config.diffusion.clip.to_dict()
        self.action_clip = self.clip["action"]
        self.num_frames = len(spec.window.obs)
        self.action_shape = (len(spec.window.action), spec.action_dim)
        self.latent_shape = fields.latent_shape(config, codec, len(self.cameras), self.num_frames)
        self.network = network_from_config(
            config.model,
            action_dim=spec.action_dim,
            action_len=self.action_shape[0],
            num_views=len(self.cameras),
            num_frames=self.num_frames,
            latent_shape=self.latent_shape,
        )
        self.probes = {"control/shuffle_gap": self.shuffle_gap}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{modality: shape} of a row's noise."""
        return {"action": self.action_shape, "next_obs": self.latent_shape}

    # --- parameters and inputs -----------------------------------------------------------------

    def init(self, key: jax.Array) -> Params:
        like = self.spec.batch_like(1)
        images = jnp.zeros((1, len(self.cameras), self.num_frames, *self.config.data.crop, 3))
        noisy = {m: jnp.zeros((1, *shape)) for m, shape in self.shapes.items()}
        timestep = {m: jnp.zeros((1,), jnp.int32) for m in MODALITIES}
        low_dim = {k: jnp.zeros(like[f"obs/{k}"].shape) for k in sorted(self.spec.low_dim)}
        text = jnp.zeros(like["obs/text"].shape) if self.spec.text_dim else None
        variables = self.network.init(key, images, low_dim, text, noisy, timestep, method="init_all")
        return variables["params"]

    @exact
    def encode(self, frozen: Params, batch: Batch, key: jax.Array | None = None) -> Encoded:
        image_keys = posterior_keys = None
        if key is not None:
            _, image_keys, posterior_keys = self.step_keys(key, batch["row"])
        if self.config.model.codec.posterior != "sample":
            posterior_keys = None
        current, following = self.images(batch, image_keys)
        encoded: Encoded = {
            "images": current,
            "low_dim": {k: batch[f"obs/{k}"] for k in sorted(self.spec.low_dim)},
            "text": batch.get("obs/text"),
            **{name: batch[name] for name in ("action", "action_mask") if name in batch},
            **self.cached_latents(batch, posterior_keys),
        }
        if "next_obs_latent" not in encoded and following is not None:
            encoded["next_obs_latent"] = self.encode_frames(frozen, following, posterior_keys)
        return encoded

    @exact
    def encode_obs(self, params: Params, encoded: Encoded) -> jax.Array:
        """`global_cond` (B, F) float32 of the current observation."""
        inputs = encoded["images"], encoded["low_dim"], encoded["text"]
        return self.network.apply({"params": params}, *inputs, method="encode_obs")

    @exact
    def predict(self, params: Params, global_cond: jax.Array, noisy: Batch, timestep: Batch) -> dict[str, jax.Array]:
        """One evaluation of the network for features (B, F): its outputs {modality: (B, ...)} float32."""
        return self.network.apply({"params": params}, global_cond, noisy, timestep)[0]

    # --- training ------------------------------------------------------------------------------

    def draws(self, key: jax.Array, rows: jax.Array) -> Draws:
        draw = functools.partial(
            objective.draw_timesteps, schedule=self.schedule, next_obs=self.config.diffusion.next_obs_timesteps
        )
        noise = draw_normal(jax.random.fold_in(key, 0), rows, self.shapes)
        return {"noise": noise, "timestep": jax.vmap(draw)(self.step_keys(key, rows).timestep)}

    def shares(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        return objective.shares(batch["action_mask"], self.config.loss.action_free)

    @exact
    def losses(self, params: Params, encoded: Encoded, draws: Draws, *, train: bool = False) -> Losses:
        timestep, mask = draws["timestep"], encoded.get("action_mask")
        if mask is None:
            mask = jnp.ones(timestep["action"].shape, bool)
        timestep = objective.hide_missing_actions(timestep, mask, self.schedule)
        global_cond = self.encode_obs(params, encoded)
        errors, output = loss.row_losses(
            functools.partial(self.predict, params, global_cond),
            self.schedule,
            {"action": encoded["action"], "next_obs": encoded["next_obs_latent"]},
            draws["noise"],
            timestep,
            self.prediction,
        )
        buckets = loss.by_timestep(
            jax.lax.stop_gradient(errors), timestep, objective.drawn(mask), self.schedule.num_train_steps
        )
        outputs = {f"noise_pred/{m}": x for m, x in output.items()}
        outputs |= {"obs_feat": global_cond, "next_obs_latent": encoded["next_obs_latent"]}
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
        roles = MODES[use]
        global_cond = self.encode_obs(params, encoded)
        variables = {"params": params}
        result = sampler.sample(
            lambda timestep: self.network.apply(variables, global_cond, timestep, method="modulation"),
            lambda noisy, modulation: self.network.apply(variables, noisy, modulation, method="predict")[0],
            self.schedule,
            roles,
            noise=noise,
            given={m: encoded[SAMPLE_KEYS[m]] for m in given(roles)},
            prediction=self.prediction,
            clip=self.clip,
            promised={"action": promised} if promised else None,
            guided=guided,
            path=trace,
        )
        return {SAMPLE_KEYS[m]: result[m] for m in generated(roles)}

    @exact
    def estimate(self, params: Params, encoded: Encoded, use: str, noise: Noise, timestep: int) -> dict[str, jax.Array]:
        """The clean data that one evaluation of the network sees in true data noised to a timestep.

        Args:
          encoded: with `action` and `next_obs_latent`.
          use: what it is given is clean, what it hides is the noise alone.
          timestep: of what the use generates, 0 to T - 1.

        Returns:
          as `sample`; not clipped.
        """
        roles = MODES[use]
        clean = {m: encoded[SAMPLE_KEYS[m]] for m in MODALITIES}
        rows = encoded["action"].shape[:1]
        level, hidden = (jnp.full(rows, t) for t in (timestep, self.schedule.sample_hidden_timestep))
        inputs = {
            Role.GENERATE: lambda m: (self.schedule.add_noise(clean[m], noise[m], level), level),
            Role.GIVEN: lambda m: (clean[m], jnp.zeros_like(level)),
            Role.HIDDEN: lambda m: (noise[m], hidden),
        }
        noisy, timesteps = ({m: inputs[roles[m]](m)[i] for m in MODALITIES} for i in range(2))
        output = self.predict(params, self.encode_obs(params, encoded), noisy, timesteps)
        return {
            SAMPLE_KEYS[m]: self.schedule.clean_and_noise(self.prediction[m], output[m], noisy[m], level)[0]
            for m in generated(roles)
        }

    def shuffle_gap(self, params: Params, encoded: Encoded, shuffled: Encoded, noise: Noise) -> jax.Array:
        """How much worse one evaluation of forward dynamics is with another window's actions, (B,), in the mean squared
        error of latents at `GAP_AT` % of the noise."""
        at = self.schedule.num_train_steps * GAP_AT // 100

        def error(given: Encoded) -> jax.Array:
            estimate = self.estimate(params, given, "forward", noise, at)["next_obs_latent"]
            return loss.row_mean(jnp.square(estimate - encoded["next_obs_latent"]))

        return error(shuffled) - error(encoded)

    # --- about -----------------------------------------------------------------------------------

    def flops(self) -> Flops:
        """`network` is the diffusion transformer, `encoder` the observation encoder on all current frames; frozen the
        codec's encoder on all next frames that are not read as latents."""
        views, frames, (rows, columns) = len(self.cameras), self.num_frames, self.config.data.crop
        encoder, network = self.network.obs_encoder, self.network.noise_pred_net
        features = encoder.num_features(views, frames, sum(self.spec.low_dim.values()))
        trained = {
            "network": network.flops(features),
            "encoder": encoder.flops(views, frames, rows, columns, self.spec.text_dim),
        }
        encoded = 0 if self.config.data.latents else views * frames
        return Flops(trained, self.codec.encode_flops(encoded, rows, columns))

    def describe_sampling(self) -> dict[str, Any]:
        return self.schedule.describe()
