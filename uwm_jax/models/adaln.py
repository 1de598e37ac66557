"""AdaLN: from the condition of a row to the shifts, scales and gates of its tokens (Peebles and Xie, 2023).

Variants. `official`: a kernel (K, 6, D) in every block, three quarters of all parameters. `shared`: one such kernel for
all blocks, each of which adds a learned offset (6, D), its bias (adaLN-single of PixArt-alpha; Chen et al., 2023,
section 2.3). `low_rank`: in every block the kernel is a product of (K, R) and (R, 6, D). All are linear in the
activated condition, all start with modulations of zero, and the output head has a kernel (K, 2, D) of its own in all.

Where it is computed. A kernel (K, k, D) is most of a block, and a condition (K,) is one vector a row. Where the mesh
axes that cut the kernels' width D cut the rows too (`fsdp`), one of the two has to be whole on every device. With fewer
than k * D rows that is the conditions, whose rows * K numbers are then fewer than the kernel's: each device computes
its part of the width for all rows, and the results, which are small, are exchanged for whole ones of the device's own
rows. Gradients of the kernel need no sum over `fsdp` then.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models import flops
from uwm_jax.models.activations import axes, constrain, divided_axes, lay_out
from uwm_jax.models.initializers import normal
from uwm_jax.models.products import dot_general

Array = jax.Array
VARIANTS = ("official", "shared", "low_rank")
ZEROS = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Variant:
    """How blocks of width `width` come to their modulations (module docstring).

    Attributes:
        kind: of `VARIANTS`.
        rank: R of `low_rank`.

    Raises:
        ValueError: no such kind, or a rank below 1.
    """

    kind: str = "official"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind not in VARIANTS:
            raise ValueError(f"adaln must be one of {', '.join(VARIANTS)}; found {self.kind!r}")
        if self.kind == "low_rank" and self.rank < 1:
            raise ValueError(f"adaln_rank must be at least 1, found {self.rank}")

    @property
    def is_shared(self) -> bool:
        return self.kind == "shared"

    def layer(self, width: int, dtype: Any) -> nn.Module:
        """A block's own part: from conditions (B, K), or what `base` made of them, to (B, 6, width)."""
        if self.kind == "low_rank":
            return LowRank((6, width), self.rank, dtype)
        return Offset((6, width), dtype) if self.is_shared else dense_of_condition((6, width), dtype=dtype)

    def base(self, width: int, dtype: Any) -> nn.Module:
        """What all blocks of `shared` have in common: conditions (B, K) -> (B, 6, width), without a bias."""
        return dense_of_condition((6, width), use_bias=False, dtype=dtype, parent=None)

    def flops(self, cond_dim: int, width: int, depth: int) -> float:
        """Operations of the products of `depth` blocks for one condition."""
        if self.kind == "low_rank":
            return depth * (flops.dense(cond_dim, self.rank) + flops.dense(self.rank, 6 * width))
        return (1 if self.is_shared else depth) * flops.dense(cond_dim, 6 * width)


OFFICIAL = Variant()
dense_of_condition = functools.partial(nn.DenseGeneral, kernel_init=ZEROS, dot_general=dot_general)


class Offset(nn.Module):
    """Adds a learned offset `bias`, zero at initialisation, to what the blocks share (B, 6, D)."""

    features: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, base: Array) -> Array:
        return base.astype(self.dtype) + self.param("bias", ZEROS, self.features).astype(self.dtype)


class LowRank(nn.Module):
    """(B, K) -> (B, 6, D) through `rank` numbers: `down` (K, R), N(0, 1/K) at the start, `kernel` (R, 6, D), zero, and
    `bias` (6, D), zero."""

    features: tuple[int, int]
    rank: int
    dtype: Any

    @nn.compact
    def __call__(self, activated_cond: Array) -> Array:
        inputs = activated_cond.shape[-1]
        down = self.param("down", normal(1 / math.sqrt(inputs)), (inputs, self.rank))
        kernel = self.param("kernel", ZEROS, (self.rank, *self.features))
        bias = self.param("bias", ZEROS, self.features)
        cond, down, kernel, bias = nn.dtypes.promote_dtype(activated_cond, down, kernel, bias, dtype=self.dtype)
        one = (((1,), (0,)), ((), ()))
        # R numbers a row: where the kernel stays cut, they are exchanged as the conditions are.
        return dot_general(share_conditions(dot_general(cond, down, one), *self.features), kernel, one) + bias


def kernel_stays_cut(rows: int, outputs: int, width: int) -> bool:
    """Whether the conditions of `rows` rows are made whole in place of a kernel (K, outputs, width); module docstring.

    Decided while a program is traced, from the shapes and the mesh around the trace; `rows` are those of all devices
    there.
    """
    (by_rows, _), (by_width, pieces) = axes("batch"), axes("width")
    if not set(by_rows) & set(by_width) or width % pieces:
        return False
    return rows // math.prod(divided_axes()[a] for a in by_rows if a not in by_width) < outputs * width


def share_conditions(activated_cond: Array, outputs: int, width: int) -> Array:
    """Conditions (B, K), whole along the mesh axes that cut a kernel (K, outputs, width) if it stays cut."""
    return _of_all_rows(activated_cond) if kernel_stays_cut(len(activated_cond), outputs, width) else activated_cond


def to_rows(modulation: Array) -> Array:
    """What a kernel made of `share_conditions` (B, k, D), with the rows where their tokens are.

    Whole along the devices that share a row: it is small compared with the tokens that it multiplies.
    """
    if kernel_stays_cut(*modulation.shape):
        by_rows, by_width = axes("batch")[0], axes("width")[0]
        modulation = _of_all_rows(modulation, (), by_width)
        if rest := tuple(a for a in by_width if a not in by_rows):
            # One exchange along `fsdp` and one gather along `tensor`, which the partitioner does not find in one step.
            modulation = lay_out(modulation, by_rows, (), rest)
    return constrain(modulation, "batch")


def _of_all_rows(x: Array, *entries: tuple[str, ...]) -> Array:
    """`x` with its rows on every device along the axes that cut the width, and further axes over mesh axes."""
    by_width = axes("width")[0]
    return lay_out(x, tuple(a for a in axes("batch")[0] if a not in by_width), *entries)


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
