"""The observation encoder: current frames, and optionally low-dim state and text, to one flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models import flops
from uwm_jax.models.activations import constrain
from uwm_jax.models.resnet import ResNet, TorchDense

Array = jax.Array


class ObsEncoder(nn.Module):
    """Features (B, F) float32 of the current observation, joined in the order images, low-dim, text.

    F = V * T * embed_dim, + T * (sum of low-dim widths) with `use_low_dim`, + embed_dim with `use_language`.

    Fields:
        stage_sizes, width, pool, dtype: the ResNet that every frame of every view goes through.
        embed_dim: features per frame, and of the text.
        use_low_dim: append the low-dim observations as they are (normalised by the caller).
        use_language: append a learned projection of a text embedding that a frozen model made.
        outermost: "view" or "frame", the outer one of the two axes over which the image features run.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    pool: str = "average"
    embed_dim: int = 768
    use_low_dim: bool = False
    use_language: bool = False
    outermost: str = "view"
    dtype: Any = jnp.float32

    def num_features(self, views: int, frames: int, low_dim: int = 0) -> int:
        """F for `frames` frames of `views` views, and `low_dim` low-dimensional columns in a frame."""
        features = views * frames * self.embed_dim + (frames * low_dim if self.use_low_dim else 0)
        return features + (self.embed_dim if self.use_language else 0)

    def flops(self, views: int, frames: int, rows: int, columns: int, text_dim: int = 0) -> float:
        """Operations of the products for `frames` frames of `views` views of `rows` x `columns`, and their text."""
        text = flops.dense(text_dim, self.embed_dim) if self.use_language else 0.0
        return views * frames * self._resnet(parent=None).flops(rows, columns) + text

    @nn.compact
    def __call__(self, images: Array, low_dim: Mapping[str, Array] | None = None, text: Array | None = None) -> Array:
        """Encodes a batch.

        Args:
            images: (B, V, T, H, W, 3) float in [0, 1], views in sorted order of camera names.
            low_dim: {key: (B, T, D)} float; joined in sorted order of keys. Ignored unless `use_low_dim`.
            text: (B, E) float. Ignored unless `use_language`.

        Returns:
            (B, F) float32; image features run over (view, frame, channel), or (frame, view, channel) by `outermost`,
            low-dim ones over (frame, column).

        Raises:
            ValueError: an input that the options ask for is missing, or `outermost` is none of its values.
        """
        if self.outermost not in ("view", "frame"):
            raise ValueError(f"outermost must be view or frame, found {self.outermost!r}")
        batch, views, frames = images.shape[:3]
        net = self._resnet(name="img_encoder")
        seen = net(images.reshape(-1, *images.shape[3:]))
        if self.outermost == "frame":
            seen = seen.reshape(batch, views, frames, -1).swapaxes(1, 2)
        features = [seen.reshape(batch, -1)]
        if self.use_low_dim:
            if not low_dim:
                raise ValueError("use_low_dim needs at least one low-dim observation, found none")
            columns = jnp.concatenate([low_dim[key] for key in sorted(low_dim)], axis=-1)
            features.append(columns.reshape(batch, -1).astype(jnp.float32))
        if self.use_language:
            if text is None:
                raise ValueError("use_language needs a text embedding (B, E), found none")
            features.append(TorchDense(self.embed_dim, name="text_head")(text))
        return constrain(jnp.concatenate(features, axis=-1), "batch")

    def _resnet(self, **options: Any) -> ResNet:
        return ResNet(self.stage_sizes, self.width, self.embed_dim, self.pool, self.dtype, **options)
