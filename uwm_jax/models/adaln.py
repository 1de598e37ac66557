"""AdaLN: from the condition of a row to the shifts, scales and gates of its tokens (Peebles and Xie, 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StepConditions:
    """The activated conditions of all rows at all steps of a sampler, for the layers that are linear in them.

    A condition joins features of a row (B, F) and an embedding of a step (S, T). The layer of the joined halves is the
    sum of those of each half, so B + S rows, each with zeros in place of the other half, replace B * S. (Zeros, because
    slicing the largest kernels of the network would copy them.)

    Attributes:
        activated: (B + S, F + T).
        rows: B; 0 where the steps alone make the condition, whose modulations then have a batch axis of 1.
    """

    activated: Array
    rows: int

    @classmethod
    def join(
        cls,
        features: Array | None,
        time: Array,
        *,
        activation: Callable[[Array], Array] = nn.silu,
        time_first: bool = False,
    ) -> StepConditions:
        """Features (B, F), or none, and embeddings (S, T) before their activation; [features | time] unless told.

        The activation takes 0 to 0.
        """
        if features is None:
            return cls(activation(time), 0)
        of_rows, of_steps = activation(features.astype(jnp.float32)), activation(time)
        before, after = (time.shape[-1], 0), (0, time.shape[-1])
        of_rows = jnp.pad(of_rows, ((0, 0), before if time_first else after))
        before, after = (features.shape[-1], 0), (0, features.shape[-1])
        of_steps = jnp.pad(of_steps, ((0, 0), after if time_first else before))
        return cls(jnp.concatenate([of_rows, of_steps]), len(features))

    def combine(self, out: Array, bias: Array) -> Array:
        """A layer's outputs (..., B + S, k, D) for `activated`, and its bias (..., k, D) -> (S, ..., B, k, D)."""
        if not self.rows:
            return jnp.moveaxis(out, -3, 0)[..., None, :, :]
        row_part = out[..., : self.rows, :, :]
        # Both halves came with the bias, which counts once.
        step_part = jnp.moveaxis(out[..., self.rows :, :, :] - bias[..., None, :, :], -3, 0)
        return row_part + step_part[..., None, :, :]
