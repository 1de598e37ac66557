"""The whole model between a batch and its losses or samples: the one place where the parts meet.

`System` joins the trainable network, the frozen image codec, the noise schedule and the preprocessing.
Everything is a pure function of arrays, so training, sampling, evaluation and serving jit what they need.
Randomness of a row is a function of a key and the row's index in the global batch, so neither the mesh
nor accumulation changes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec
from uwm_jax.data.images import preprocess
from uwm_jax.data.spec import DataSpec
from uwm_jax.diffusion import loss as losses
from uwm_jax.diffusion import sampler
from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.errors import UserError
from uwm_jax.models import layers
from uwm_jax.systems.uwm.modes import MODALITIES, MODES, Role, generated, given
from uwm_jax.systems.uwm.network import network_from_config

Batch = Mapping[str, jax.Array]
Params = Any

_SAMPLE_KEYS = {"action": "action", "next_obs": "next_obs_latent"}  # how samples of a modality are called


def _exact(method: Callable[..., Any]) -> Callable[..., Any]:
    """Traces `method` with exact float32 products when the config says float32 (no TF32, no bf16 passes)."""

    @functools.wraps(method)
    def wrapped(self: System, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest" if self.config.model.dtype == "float32" else "default"):
            return method(self, *args, **kwargs)

    return wrapped


class System:
    """A Unified World Model as functions of (params, frozen, batch).

    `params` are the trainable parameters {"obs_encoder", "noise_pred_net"}; `frozen` those of the codec.
    Batches are flat: `obs/<camera>`, `next_obs/<camera>` uint8 (B, T, H, W, 3), `obs/<low-dim>` float32
    (B, T, D) normalised, `obs/text` (B, E), `action` (B, Ta, Da) normalised, `action_mask` (B,) bool,
    `row` (B,) int32.
    """

    def __init__(self, config: ConfigDict, spec: DataSpec, codec: Codec):
        self.config, self.spec, self.codec = config, spec, codec
        self.cameras = tuple(sorted(spec.cameras))
        self.schedule = Schedule(
            num_train_steps=config.diffusion.num_train_steps,
            num_inference_steps=config.diffusion.num_inference_steps,
            beta_schedule=config.diffusion.beta_schedule,
            spacing=config.diffusion.spacing,
            hide_at=config.diffusion.hide_at,
        )
        self.prediction = config.diffusion.prediction.to_dict()
        self.clip = config.diffusion.clip.to_dict()
        window = spec.window
        self.num_frames = len(window.obs)
        self.action_shape = (len(window.action), spec.action_dim)
        crop, patch = config.data.crop, config.model.patch
        try:
            self.latent_shape = codec.latent_shape(len(self.cameras), self.num_frames, *crop)
        except ValueError as e:
            raise UserError(f"config.data.crop={crop} does not suit the codec: {e}.") from e
        if any(n % p for n, p in zip(self.latent_shape[1:4], patch, strict=True)):
            raise UserError(
                f"config.model.patch={patch} does not divide the latents' (frames, rows, columns) "
                f"{self.latent_shape[1:4]}, which follow from config.data.crop={crop} and the codec."
            )
        self.network = network_from_config(
            config.model,
            action_dim=spec.action_dim,
            action_len=len(window.action),
            num_views=len(self.cameras),
            num_frames=self.num_frames,
            latent_shape=self.latent_shape,
        )
        self.augment = config.data.augment.to_dict()

    # --- parameters and inputs -----------------------------------------------------------------

    def init(self, rng: jax.Array) -> Params:
        """Fresh trainable parameters, float32."""
        batch = jax.tree.map(jnp.asarray, self.spec.zeros(1))
        images = jnp.zeros((1, len(self.cameras), self.num_frames, *self.config.data.crop, 3))
        noisy = {m: jnp.zeros(shape) for m, shape in self.noise_shapes(1).items()}
        timestep = {m: jnp.zeros((1,), jnp.int32) for m in MODALITIES}
        low_dim, text = self._conditions(batch)
        variables = self.network.init(rng, images, low_dim, text, noisy, timestep, method="init_all")
        return variables["params"]

    def held(self, tree: Any) -> Any:
        """Parameters, or whatever holds parameters, in the form that the programs of this process run on fastest.

        Args:
          tree: arrays or shapes. Arrays that the result holds in another form are deleted: use the result alone.
        """
        loops = self.network.noise_pred_net.scan_blocks
        return tree if loops or jax.device_count() > 1 else layers.apart(tree)

    def noise_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """{modality: shape} of a batch's noise."""
        return {"action": (batch_size, *self.action_shape), "next_obs": (batch_size, *self.latent_shape)}

    def draw_noise(self, key: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
        """N(0, 1) noise {modality: (B, ...)}; row i depends on the key and `rows[i]` alone."""

        shapes = {m: shape[1:] for m, shape in self.noise_shapes(1).items()}

        def one(row: jax.Array) -> dict[str, jax.Array]:
            keys = jax.random.split(jax.random.fold_in(key, row), len(MODALITIES))
            # Drawn flat: the same numbers, but counters over many axes take XLA tens of seconds to compile on CPUs.
            flat = {m: jax.random.normal(k, (math.prod(shapes[m]),)) for m, k in zip(MODALITIES, keys, strict=True)}
            return {m: x.reshape(shapes[m]) for m, x in flat.items()}

        return jax.vmap(one)(rows)

    def preprocess(self, batch: Batch, keys: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Current and, where the batch has them, following images (B, V, T, h, w, 3) in [0, 1].

        With keys (B,) the images are augmented, with one draw for current and following frames.
        """
        current = {c: batch[f"obs/{c}"] for c in self.cameras}
        has_next = all(f"next_obs/{c}" in batch for c in self.cameras)
        following = {c: batch[f"next_obs/{c}"] for c in self.cameras} if has_next else None
        return preprocess(
            current,
            following,
            resize=self.config.data.resize,
            crop=self.config.data.crop,
            augment=self.augment,
            keys=keys,
        )

    def _conditions(self, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array | None]:
        return {k: batch[f"obs/{k}"] for k in sorted(self.spec.low_dim)}, batch.get("obs/text")

    @_exact
    def encode_obs(self, params: Params, batch: Batch, current: jax.Array) -> jax.Array:
        """`global_cond` (B, F) float32 of the current observation."""
        low_dim, text = self._conditions(batch)
        return self.network.apply({"params": params}, current, low_dim, text, method="encode_obs")

    @_exact
    def predict(self, params: Params, global_cond: jax.Array, noisy: Batch, timestep: Batch) -> dict[str, jax.Array]:
        """One evaluation of the network for features (B, F): its outputs {modality: (B, ...)} float32."""
        return self.network.apply({"params": params}, global_cond, noisy, timestep)[0]

    @_exact
    def encode_frames(self, frozen: Params, frames: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Latents (B, V, T, h, w, C) of images; the posterior is sampled with keys (B,), else its mode."""
        return jax.lax.stop_gradient(self.codec.encode(frozen, frames, keys))

    @_exact
    def decode(self, frozen: Params, latents: jax.Array) -> jax.Array:
        """Images (B, V, T, h, w, 3) of latents, float32, [0, 1] up to the codec's overshoot."""
        return self.codec.decode(frozen, latents)

    # --- training ------------------------------------------------------------------------------

    @_exact
    def row_losses(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, *, augment: bool = True
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The training objective of each row: {modality: (B,) mean squared error} and {modality: (B,) timestep}.

        Args:
          batch: with `next_obs/<camera>`, or the codec's `next_obs_latent` (B, V, T, h, w, C) in their place.
          key: one key a step; every row folds its global index into it.
          augment: False for the loss on held-out data (centre crop, no jitter, posterior mode).
        """
        noise = self.draw_noise(jax.random.fold_in(key, 0), batch["row"])
        row_keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, 1)))(batch["row"])
        time_keys, image_keys, posterior_keys = jax.vmap(functools.partial(jax.random.split, num=3))(row_keys).T
        draw = functools.partial(
            losses.draw_timesteps, schedule=self.schedule, next_obs=self.config.diffusion.next_obs_timesteps
        )
        timestep = losses.hide_missing_actions(jax.vmap(draw)(time_keys), batch["action_mask"], self.schedule)
        if self.augment["draw"] == "batch":  # one draw for the step, whichever of its rows are at hand
            image_keys = jnp.broadcast_to(jax.random.fold_in(key, 2), image_keys.shape)

        current, following = self.preprocess(batch, image_keys if augment else None)
        sample_posterior = augment and self.config.model.codec.posterior == "sample"
        latents = self._latents_of(frozen, batch, following, posterior_keys if sample_posterior else None)
        global_cond = self.encode_obs(params, batch, current)

        network = functools.partial(self.predict, params, global_cond)
        clean = {"action": batch["action"], "next_obs": latents}
        errors, _ = losses.row_losses(network, self.schedule, clean, noise, timestep, self.prediction)
        return errors, timestep

    # --- inference -----------------------------------------------------------------------------

    def _latents_of(
        self, frozen: Params, batch: Batch, following: jax.Array | None, keys: jax.Array | None = None
    ) -> jax.Array:
        if "next_obs_latent" in batch:
            return batch["next_obs_latent"]
        return self.encode_frames(frozen, following, keys)

    @_exact
    def denoise(
        self, params: Params, frozen: Params, batch: Batch, noise: Batch, timestep: Batch
    ) -> dict[str, jax.Array]:
        """One evaluation of the network at given noise and timesteps (B,).

        Returns `noise_pred/*` (the network's outputs), `loss/*` (unweighted means), `obs_feat` (B, F) and
        `next_obs_latent` (posterior mode, or the batch's own).
        """
        current, following = self.preprocess(batch)
        latents = self._latents_of(frozen, batch, following)
        global_cond = self.encode_obs(params, batch, current)
        errors, output = losses.row_losses(
            functools.partial(self.predict, params, global_cond),
            self.schedule,
            {"action": batch["action"], "next_obs": latents},
            noise,
            timestep,
            self.prediction,
        )
        return {
            **{f"noise_pred/{m}": output[m] for m in MODALITIES},
            **{f"loss/{m}": errors[m].mean() for m in MODALITIES},
            "obs_feat": global_cond,
            "next_obs_latent": latents,
        }

    @_exact
    def estimate(
        self, params: Params, frozen: Params, batch: Batch, mode: str, noise: Batch, timestep: int
    ) -> dict[str, jax.Array]:
        """The clean data that one evaluation of the network sees in true data noised to a timestep.

        Args:
          batch: `obs/*`, `action` (normalised) and `next_obs/*` (or `next_obs_latent`).
          mode: what it is given is clean, what it hides is the noise alone.
          noise: {modality: array}.
          timestep: of what the mode generates, 0 to T - 1.

        Returns:
          as `sample`; not clipped.
        """
        current, following = self.preprocess(batch)
        clean = {"action": batch["action"], "next_obs": self._latents_of(frozen, batch, following)}
        rows = batch["action"].shape[:1]
        level, hidden = (jnp.full(rows, t) for t in (timestep, self.schedule.sample_hidden_timestep))
        inputs = {
            Role.GENERATE: lambda m: (self.schedule.add_noise(clean[m], noise[m], level), level),
            Role.GIVEN: lambda m: (clean[m], jnp.zeros_like(level)),
            Role.HIDDEN: lambda m: (noise[m], hidden),
        }
        noisy, timesteps = ({m: inputs[MODES[mode][m]](m)[i] for m in MODALITIES} for i in range(2))
        cond = self.encode_obs(params, batch, current)
        output = self.predict(params, cond, noisy, timesteps)
        return {
            _SAMPLE_KEYS[m]: self.schedule.clean_and_noise(self.prediction[m], output[m], noisy[m], level)[0]
            for m in generated(mode)
        }

    @_exact
    def sample(
        self, params: Params, frozen: Params, batch: Batch, mode: str, noise: Batch, *, path: bool = False
    ) -> dict[str, jax.Array]:
        """Samples a mode of the table for a batch.

        Args:
          batch: `obs/*`, and of `action` (normalised) and `next_obs/*` (or `next_obs_latent`) what the mode is given.
          noise: {modality: array}, where generation starts or what stands in for what is hidden.
          path: whether to return all that the samples were on their way.

        Returns:
          `action` (B, Ta, Da), normalised, and `next_obs_latent`, of these what the mode generates; with `path`
          (S + 1, B, ...), from the noise to the sample.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        current, following = self.preprocess(batch)
        global_cond = self.encode_obs(params, batch, current)
        known = given(mode)
        clean = {}
        if "action" in known:
            clean["action"] = batch["action"]
        if "next_obs" in known:
            clean["next_obs"] = self._latents_of(frozen, batch, following)
        variables = {"params": params}
        result = sampler.sample(
            lambda timestep: self.network.apply(variables, global_cond, timestep, method="modulation"),
            lambda noisy, modulation: self.network.apply(variables, noisy, modulation, method="predict")[0],
            self.schedule,
            mode,
            noise=noise,
            given=clean,
            prediction=self.prediction,
            clip=self.clip,
            path=path,
        )
        return {_SAMPLE_KEYS[m]: result[m] for m in generated(mode)}
