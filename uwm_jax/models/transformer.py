"""Transformer blocks that a condition modulates through AdaLN-zero, as in Peebles and Xie (2023), and what goes around
them: sinusoidal timesteps, MLPs, the modulated output projection.

Where the parameters lie (shapes without the leading `depth` axis of `blocks`; D = embed_dim, K = width of the
condition):

* Kernels are (inputs..., outputs...): the transpose of torch's.
* `blocks/qkv/kernel` is (D, 3, heads, D/heads) with q, k, v on its second axis; `blocks/proj/kernel` is
  (heads, D/heads, D): head and channel axes stay apart so that either can be sharded.
* `blocks/adaln/kernel` is (K, 6, D): shift, scale, gate of the attention, then shift, scale, gate of the MLP.
  `head/adaln/kernel` is (K, 2, D): shift, scale. Of the variants of AdaLN (`adaln.py`), `shared` has one kernel
  (K, 6, D) in `adaln/kernel`, next to `blocks`; `low_rank` has `blocks/adaln/down` (K, R) and `blocks/adaln/kernel`
  (R, 6, D).

Precision: with dtype bfloat16 the large products run in bfloat16. The residual stream, LayerNorm, modulation
arithmetic, softmax and everything that a module is told to keep stay in float32, as under torch autocast. Products in
float32 follow `jax_default_matmul_precision`; exact ones need "highest" on GPUs and TPUs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models import flops
from uwm_jax.models import layers as layers_lib
from uwm_jax.models.activations import constrain
from uwm_jax.models.adaln import OFFICIAL, StepConditions, Variant, share_conditions, to_rows
from uwm_jax.models.attention import attend
from uwm_jax.models.initializers import normal
from uwm_jax.models.products import dot_general

Array = jax.Array
INIT = normal(0.02)
ZEROS = nn.initializers.zeros


def sinusoid(timestep: Array, dim: int) -> Array:
    """Sines then cosines of integer timesteps (...,) at dim/2 frequencies from 1 to 1/10000 -> (..., dim) float32.

    The largest period is reached at the last frequency: the exponent is divided by dim/2 - 1.

    Raises:
        ValueError: dim is odd or less than 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"timestep_embed_dim must be even and at least 4, found {dim}")
    half = dim // 2
    frequency = np.exp(-np.arange(half) * np.log(10_000.0) / (half - 1)).astype(np.float32)
    phase = timestep[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def layer_norm(x: Array) -> Array:
    """LayerNorm over the last axis in float32, biased variance, eps 1e-6, without parameters."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """LayerNorm of tokens (B, L, D), scaled and shifted by (B, D) each; float32."""
    return layer_norm(x) * (1.0 + scale[:, None]) + shift[:, None]


dense = functools.partial(nn.DenseGeneral, kernel_init=INIT, dot_general=dot_general)


class MLP(nn.Module):
    """Linear, activation, Linear. `out_dtype` is that of the second product, for the network's outputs."""

    hidden: int
    features: int
    activation: Callable[[Array], Array] = jax.nn.mish
    dtype: Any = jnp.float32
    out_dtype: Any = None

    def setup(self) -> None:
        self.fc1 = dense(self.hidden, dtype=self.dtype)
        self.fc2 = dense(self.features, dtype=self.out_dtype or self.dtype)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))

    def flops(self, inputs: int, positions: int = 1) -> float:
        """Operations of the products on `positions` vectors of `inputs` values."""
        return flops.dense(inputs, self.hidden, positions) + flops.dense(self.hidden, self.features, positions)


def exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class Block(nn.Module):
    """One transformer block; residual stream (B, L, D) float32 in and out.

    `mask` is boolean, True where a query may see a key: (B, L) of keys alone, or (B, L, L) of queries and keys. Every
    query must see at least one key.
    """

    embed_dim: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    dtype: Any
    attention: str = "xla"
    variant: Variant = OFFICIAL

    def setup(self) -> None:
        d, heads, dtype = self.embed_dim, self.num_heads, self.dtype
        self.adaln = self.variant.layer(d, dtype)
        self.qkv = dense((3, heads, d // heads), use_bias=self.qkv_bias, dtype=dtype)
        self.proj = dense(d, axis=(-2, -1), dtype=dtype)
        self.fc1 = dense(int(d * self.mlp_ratio), dtype=dtype)
        self.fc2 = dense(d, dtype=dtype)

    def __call__(self, x: Array, cond: Array, mask: Array | None = None) -> Array:
        """`cond` is what `modulation` takes, laid out by `share_conditions`, or by rows if it is what blocks share."""
        modulation = self.modulation(cond)
        return self.apply_modulated(x, modulation if self.variant.is_shared else to_rows(modulation), mask)

    def modulation(self, cond: Array) -> Array:
        """(B, 6, D) float32: shift, scale, gate of the attention and of the MLP.

        Args:
            cond: SiLU of the condition (B, K), or, with `shared`, what the kernel of all blocks made of it (B, 6, D).
        """
        return self.adaln(cond).astype(jnp.float32)

    def apply_modulated(self, x: Array, modulation: Array, mask: Array | None = None) -> Array:
        """The block with given modulation (B, 6, D), or (1, 6, D) of all rows."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, i] for i in range(6))
        qkv = constrain(self.qkv(modulate(x, shift1, scale1)), "batch", "length", None, "heads")
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None]
        # (B, L, heads, D/heads) each; logits and softmax are float32 for any dtype.
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask, self.attention)
        x = constrain(x + gate1[:, None] * self.proj(y).astype(jnp.float32), "batch", "length")
        hidden = constrain(self.fc1(modulate(x, shift2, scale2)), "batch", "length", "hidden")
        return constrain(x + gate2[:, None] * self.fc2(exact_gelu(hidden)).astype(jnp.float32), "batch", "length")


class Head(nn.Module):
    """The modulated final projection, zero at initialisation: (B, L, D) -> (B, L, D)."""

    embed_dim: int
    dtype: Any

    def setup(self) -> None:
        self.adaln = dense((2, self.embed_dim), dtype=self.dtype, kernel_init=ZEROS)
        self.linear = dense(self.embed_dim, dtype=self.dtype, kernel_init=ZEROS)

    def modulation(self, activated_cond: Array) -> Array:
        """(B, K) -> (B, 2, D) float32: shift, scale."""
        return self.adaln(activated_cond).astype(jnp.float32)

    def row_modulation(self, activated_cond: Array) -> Array:
        """`modulation` in training: one condition a row, laid out over devices as `adaln.py` describes."""
        return to_rows(self.modulation(share_conditions(activated_cond, 2, self.embed_dim)))

    def step_modulation(self, conditions: StepConditions) -> Array:
        """(S, B, 2, D) float32: `modulation` of all rows at all steps."""
        bias: Any = self.get_variable("params", "adaln")["bias"]
        return conditions.combine(self.modulation(conditions.activated), bias)

    def __call__(self, x: Array, modulation: Array) -> Array:
        return self.linear(modulate(x, modulation[:, 0], modulation[:, 1]))

    def flops(self, length: int, cond_dim: int) -> float:
        """Operations of the products on `length` tokens of one sample, with a condition of `cond_dim`."""
        return flops.dense(self.embed_dim, self.embed_dim, length) + flops.dense(cond_dim, 2 * self.embed_dim)


@dataclasses.dataclass(frozen=True)
class BlockStack:
    """`depth` equal blocks one after the other, as functions of their parameters.

    The module that uses it owns the parameters (`params_of`): {"blocks": one tree with a leading axis of layers,
    stacked or held apart (`layers.py`)}, and with `shared` AdaLN {"adaln": {"kernel"}} of all blocks.

    Attributes:
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the blocks.
        scan: one compiled block in a `lax.scan`, or `depth` of them; parameters and results are the same. Layers that
            are held apart are never scanned.
        remat: "none", "dots" (recompute all but the dense layers' products) or "full" in the backward pass.
        dtype: of the large products (module docstring).
        attention: one of `attention.KINDS`.
        variant: of AdaLN.

    Raises:
        ValueError: heads do not divide the width, or remat is none of its values.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4
    qkv_bias: bool = True
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: str = "xla"
    variant: Variant = OFFICIAL

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide embed_dim {self.embed_dim}")
        layers_lib.check_remat(self.remat)

    def init(self, key: Array, cond_dim: int) -> Any:
        """`depth` independently drawn blocks as one tree with a leading axis."""
        x, cond = jnp.zeros((1, 1, self.embed_dim)), jnp.zeros((1, cond_dim))
        cond = jnp.zeros((1, 6, self.embed_dim)) if self.variant.is_shared else cond
        keys = jax.random.split(key, self.depth)
        return jax.vmap(lambda k: self._block().init(k, x, cond)["params"])(keys)

    def params_of(self, module: nn.Module, cond_dim: int | None = None) -> dict[str, Any]:
        """The parameters of the blocks of `module`, which declares them here if they are new.

        Args:
            module: called from a compact method of it, because the parameters depend on the width of the condition.
            cond_dim: K; not needed where the parameters are there.
        """

        def of(name: str, init: Callable[..., Any]) -> Any:
            # `param` would refuse layers that are held apart, whose shapes are not those of a new stack.
            found: Any = module.get_variable("params", name)
            return module.param(name, init, cond_dim) if found is None else found

        params = {layers_lib.BLOCKS: of(layers_lib.BLOCKS, self.init)}
        if self.variant.is_shared:
            params["adaln"] = of("adaln", lambda key, k: self._base().init(key, jnp.zeros((1, k)))["params"])
        return params

    def __call__(
        self, params: Mapping[str, Any], x: Array, activated_cond: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """Tokens (B, L, D) float32 through all blocks, for SiLU of the condition (B, K); `mask` as in `Block`.

        Returns the stream after the last block (B, L, D) and after every block (depth, B, L, D).
        """
        block, blocks = self._block(), params[layers_lib.BLOCKS]
        cond = share_conditions(activated_cond, 6, self.embed_dim)  # once for all layers
        if self.variant.is_shared:
            cond = to_rows(self._base().apply({"params": params["adaln"]}, cond))

        def body(x: Array, params: Any) -> Array:
            # The modulation belongs to the body: it is rematerialised, and its weights gathered, layer by layer.
            return _apply(block, params, x, cond, mask)

        blocks = layers_lib.in_dtype(blocks, self.dtype, scan=self.scan)
        layer = layers_lib.rematerialized(body, self.remat, blocks, scan=self.scan)
        return layers_lib.run(layer, x, blocks, self.depth, scan=self.scan)

    def modulation(self, params: Mapping[str, Any], conditions: StepConditions) -> Array:
        """(S, depth, B, 6, D) float32: slice s is the `modulation` that `apply_modulated` takes at step s."""
        block, blocks = self._block(), params[layers_lib.BLOCKS]
        apart = layers_lib.are_apart(blocks)
        each = layers_lib.of_each(blocks, self.depth) if apart else []
        bias = jnp.stack([layer["adaln"]["bias"] for layer in each]) if apart else blocks["adaln"]["bias"]
        if self.variant.is_shared:
            out = self._base().apply({"params": params["adaln"]}, conditions.activated).astype(jnp.float32)
            return conditions.combine(out, jnp.zeros_like(bias[0]))[:, None] + bias[:, None]
        if apart:
            out = jnp.stack([_apply(block, layer, conditions.activated, method="modulation") for layer in each])
        else:
            # Conditions are repeated per layer so that `depth` is a batch axis of the product on both sides.
            repeated = jnp.broadcast_to(conditions.activated, (self.depth, *conditions.activated.shape))
            out = jax.vmap(lambda params, c: _apply(block, params, c, method="modulation"))(blocks, repeated)
        return conditions.combine(out, bias)

    def apply_modulated(
        self, params: Mapping[str, Any], x: Array, modulation: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """`__call__` with one step's modulations (depth, B, 6, D), or (depth, 1, 6, D) of all rows."""
        block = self._block()

        def body(x: Array, layer: tuple[Any, Array]) -> Array:
            return _apply(block, layer[0], x, layer[1], mask, method="apply_modulated")

        return layers_lib.run(body, x, (params[layers_lib.BLOCKS], modulation), self.depth, scan=self.scan)

    def flops(self, length: int, cond_dim: int) -> float:
        """Operations of the products of all blocks on `length` tokens of one sample, with a condition of `cond_dim`."""
        d, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        # qkv is 3 D wide, and one product of the condition modulates all tokens of a block.
        products = flops.dense(d, 4 * d, length) + 2 * flops.dense(d, hidden, length)
        modulations = self.variant.flops(cond_dim, d, self.depth)
        return self.depth * (products + flops.attention(length, d)) + modulations

    def _block(self) -> Block:
        """The body that all layers share; detached, because its parameters are slices of one stacked tree."""
        return Block(
            self.embed_dim,
            self.num_heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.dtype,
            self.attention,
            self.variant,
            parent=None,
        )

    def _base(self) -> nn.Module:
        return self.variant.base(self.embed_dim, self.dtype)


def _apply(block: Block, params: Any, *args: Array | None, method: str = "__call__") -> Any:
    return block.apply({"params": params}, *args, method=method)
