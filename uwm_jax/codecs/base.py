"""The interface of an image codec."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

LatentShape = tuple[int, int, int, int, int]


class Codec(abc.ABC):
    """Turns frames into latents and back; its arrays are arguments of the methods, never constants of a program.

    A codec is a frozen, hashable value. Codecs get their arrays in one of three ways: none are needed; they are
    *fitted* to a dataset and travel in the checkpoints (`arrays`); or they are *pretrained*, and a workdir keeps a
    copy of the files (`pretrained`).

    Attributes:
        name: the value of `config.model.codec.name`.
        arrays: {name: names of its axes} of what a fitted codec keeps in a checkpoint; an array whose first axis is
            `view` has one entry per camera, in sorted order. Empty for other codecs.
        pretrained: whether the arrays are read from a folder or the hub, which `config.model.codec.<name>` names.
        clip: range to which samplers clip predicted latents by default, [-clip, clip].
        smallest_clip: a smaller range than this cuts off what the decoder needs; 0 where no such bound is known.
        latent_rms: root mean square of latents of frames that the codec suits; None where it suits all frames.
        has_posterior: whether a frame has a distribution of latents, and the codec `moments`.
    """

    name: ClassVar[str]
    arrays: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    pretrained: ClassVar[bool] = False
    clip: ClassVar[float] = 1.0
    smallest_clip: ClassVar[float] = 0.0
    latent_rms: ClassVar[float | None] = None
    has_posterior: ClassVar[bool] = False

    # --- how one is made ---------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def from_config(cls, fields: ConfigDict) -> Self:
        """The codec as the fields of `config.model.codec` describe it, in its usual size where arrays decide that."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
        """The codec that the arrays of a fitted one belong to."""
        raise NotImplementedError(f"{cls.__name__} is not fitted to data")

    @classmethod
    def fitted_on(cls, arrays: Mapping[str, Any]) -> tuple[int, int, int]:
        """(views, height, width) of the frames that the arrays of a fitted codec are for."""
        raise NotImplementedError(f"{cls.__name__} is not fitted to data")

    # --- arithmetic --------------------------------------------------------------------------------

    @abc.abstractmethod
    def latent_shape(self, num_views: int, num_frames: int, height: int, width: int) -> LatentShape:
        """(V, T, h, w, C) of the latents of `num_frames` frames of `num_views` views of `height` x `width`.

        Raises:
            ValueError: images of this size have no latents.
        """

    @abc.abstractmethod
    def encode(self, params: Any, frames: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Latents of frames.

        Args:
            params: the codec's arrays.
            frames: (B, V, T, H, W, 3) float in [0, 1].
            rng: (B,) keys, one per row, for codecs with a posterior: row i is a sample that depends on key i alone;
                None takes the posterior's mode. Codecs without randomness do not read it.

        Returns:
            (B, V, T, h, w, C) float32.
        """

    def moments(self, params: Any, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean, which is the mode too, and the logarithm of the variance of the latents of frames, each as `encode`
        returns latents and in their units."""
        raise NotImplementedError(f"latents of {type(self).__name__} have no distribution")

    @abc.abstractmethod
    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """(B, V, T, h, w, C) -> (B, V, T, H, W, 3) float32 in [0, 1] units, not clipped."""

    def for_views(self, params: Any, views: Sequence[int]) -> Any:
        """The arrays for some of the views, in this order, as `params` of the methods."""
        if not self.arrays:
            return params
        chosen = np.asarray(views)
        return {name: x[chosen] if self.arrays[name][:1] == ("view",) else x for name, x in params.items()}

    def encoder_arrays(self, params: Any) -> Any:
        """Those arrays that decide latents."""
        return params

    # --- about it ----------------------------------------------------------------------------------

    @property
    def dtype(self) -> Any:
        """The dtype of the encoder's products."""
        return jnp.dtype(jnp.float32)

    def encode_flops(self, num_frames: int, height: int, width: int) -> float:
        """Operations of the products that encode `num_frames` frames of one view."""
        return 0.0

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON values that say what the latents are: `name`, `latents` (the formula), and the codec's numbers."""

    def synthetic_arrays(self, num_views: int, height: int, width: int) -> Any:
        """Random arrays of the codec's shapes for frames of this size, as `params` of the methods."""
        return {}


def sample_posterior(mean: jax.Array, logvar: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples of Gaussians (B, ...), with keys (B,): row i depends on key i alone."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    return mean + jnp.exp(0.5 * logvar) * noise


def grid(height: int, width: int, step: int, what: str) -> tuple[int, int]:
    """Rows and columns of latents that stand `step` pixels apart; `what` names the step in the error.

    Raises:
        ValueError: the image is not divisible.
    """
    if height % step or width % step:
        raise ValueError(f"images of {height} x {width} cannot be cut into steps of {step} pixels ({what})")
    return height // step, width // step
