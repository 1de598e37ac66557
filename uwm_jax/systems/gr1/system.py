"""GR1 between a batch and its losses or predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec
from uwm_jax.data.spec import DataSpec
from uwm_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from uwm_jax.systems.base import (
    Batch,
    Draws,
    Encoded,
    Flops,
    Losses,
    Noise,
    Params,
    Promised,
    System,
    Use,
    exact,
    share_equally,
)
from uwm_jax.systems.gr1.network import network_from_config
from uwm_jax.systems.gr1.tree import TREE

MEAN, STD = np.array([IMAGENET_MEAN, IMAGENET_STD], np.float32)

USES = {
    "joint": Use(
        makes=("action", "next_obs"), question="the actions and the frames after them, given the current frames"
    )
}
ACTING = "joint"


class GR1(System):
    """GR-1 in the form of the UWM paper's baseline (`network.py`): a regression of actions and next frames.

    The loss of both is the mean squared error, of the frames in ImageNet-normalised units. Rows without actions train
    the frames alone, and nothing attends to their action queries. What it encodes: `images`, `next_images`
    (B, V, T, h, w, 3) ImageNet-normalised, and of `action` and `action_mask` what the batch has.
    """

    uses = USES
    acting = ACTING
    tree = TREE

    def __init__(self, config: ConfigDict, spec: DataSpec, codec: Codec | None = None):
        super().__init__(config, spec, codec)
        self.num_views, self.num_frames = len(spec.cameras), len(spec.window.obs)
        self.action_shape = (len(spec.window.action), spec.action_dim)
        self.network = network_from_config(
            config.model,
            action_dim=spec.action_dim,
            action_len=self.action_shape[0],
            num_views=self.num_views,
            crop=config.data.crop,
        )

    def init(self, key: jax.Array) -> Params:
        images = jnp.zeros((1, self.num_views, self.num_frames, *self.config.data.crop, 3))
        return self.network.init(key, images)["params"]

    @exact
    def encode(self, frozen: Params, batch: Batch, key: jax.Array | None = None) -> Encoded:
        keys = self.step_keys(key, batch["row"]).image if key is not None else None
        current, following = ((x - MEAN) / STD if x is not None else None for x in self.images(batch, keys))
        encoded: Encoded = {"images": current}
        if following is not None:
            encoded["next_images"] = following
        return encoded | {name: batch[name] for name in ("action", "action_mask") if name in batch}

    def draws(self, key: jax.Array, rows: jax.Array) -> Draws:
        return {}

    def shares(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        mask = batch["action_mask"]
        return {"action": share_equally(mask), "next_obs": share_equally(jnp.ones_like(mask))}

    @exact
    def predict(
        self, params: Params, encoded: Encoded, action_mask: jax.Array | None = None
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """One evaluation of the network: {"action": (B, Ta, Da) normalised, "next_obs": (B, V, T, h, w, 3)
        ImageNet-normalised}, and the observation's tokens (B, n, D). Nothing attends to the action queries of rows in
        which the mask (B,) is False."""
        variables = {"params": params}
        tokens = self.network.apply(variables, encoded["images"], method="encode")
        return self.network.apply(variables, tokens, action_mask, method="predict"), tokens

    def losses(self, params: Params, encoded: Encoded, draws: Draws, *, train: bool = False) -> Losses:
        made, tokens = self.predict(params, encoded, encoded.get("action_mask"))
        targets = {"action": encoded["action"], "next_obs": encoded["next_images"]}
        errors = {m: jnp.square(made[m] - target) for m, target in targets.items()}
        parts = {m: error.mean(axis=tuple(range(1, error.ndim))) for m, error in errors.items()}
        return Losses(parts, {}, {"obs_feat": tokens})

    def noise(self, key: jax.Array, rows: jax.Array, use: str) -> Noise:
        return {}

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
        if promised is not None:
            raise ValueError("GR1 does not sample in steps, so it cannot hold promised actions: see `can_promise`")
        made, _ = self.predict(params, encoded)
        sample = {"action": made["action"], "next_obs_float": made["next_obs"] * STD + MEAN}
        return {name: x[None] for name, x in sample.items()} if trace else sample

    def flops(self) -> Flops:
        return Flops(self.network.flops(self.num_views * self.num_frames))
