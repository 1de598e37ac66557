"""The noise-prediction network: a diffusion transformer over action tokens, video patches and registers.

Every block is modulated by (observation features, embedding of the two timesteps) through AdaLN-zero, as in
Peebles and Xie (2023), with one timestep for each modality as in "Unified World Models" (Zhu et al., 2025).

Where the parameters lie (shapes without the leading `depth` axis of `blocks`; D = embed_dim):

* Kernels are (inputs..., outputs...): the transpose of torch's.
* A flattened patch has the axes (frame, row, column, channel), channel innermost, in `patch_encoder/kernel`
  (pt*ph*pw*C, D) as in `patch_decoder/kernel` (D, pt*ph*pw*C). Video tokens run over (view, frame, row, column).
* `blocks/qkv/kernel` is (D, 3, heads, D/heads) with q, k, v on its second axis; `blocks/proj/kernel` is
  (heads, D/heads, D): head and channel axes stay apart so that either can be sharded.
* `blocks/adaln/kernel` is (F + T, 6, D): inputs are [observation features | timestep embedding], the six are
  shift, scale, gate of the attention, then shift, scale, gate of the MLP. `head/adaln/kernel` is (F + T, 2, D):
  shift, scale.

Precision: with dtype bfloat16 the large products run in bfloat16. The residual stream, LayerNorm, modulation
arithmetic, softmax, timestep embedding and the two output projections stay in float32, as under torch autocast.
Products in float32 follow `jax_default_matmul_precision`; exact ones need "highest" on GPUs and TPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models import layers as layers_lib
from uwm_jax.models.activations import constrain
from uwm_jax.models.initializers import normal
from uwm_jax.models.products import dot_general

Array = jax.Array
INIT = normal(0.02)
ZEROS = nn.initializers.zeros

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps what the dense layers made
    "full": jax.checkpoint_policies.nothing_saveable,
}


def sinusoid(timestep: Array, dim: int) -> Array:
    """Sines then cosines of integer timesteps (...,) at dim/2 frequencies from 1 to 1/10000 -> (..., dim) float32.

    The largest period is reached at the last frequency: the exponent is divided by dim/2 - 1.
    """
    half = dim // 2
    frequency = np.exp(-np.arange(half) * np.log(10_000.0) / (half - 1)).astype(np.float32)
    phase = timestep[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def patchify(latent: Array, patch: tuple[int, int, int]) -> Array:
    """(B, V, T, h, w, C) -> (B, tokens, pt*ph*pw*C), tokens over (view, frame, row, column)."""
    b, v, t, h, w, c = latent.shape
    pt, ph, pw = patch
    x = latent.reshape(b, v, t // pt, pt, h // ph, ph, w // pw, pw, c)
    x = x.transpose(0, 1, 2, 4, 6, 3, 5, 7, 8)
    return x.reshape(b, -1, pt * ph * pw * c)


def unpatchify(tokens: Array, patch: tuple[int, int, int], latent_shape: tuple[int, ...]) -> Array:
    """The inverse of `patchify`: (B, tokens, pt*ph*pw*C) -> (B, V, T, h, w, C)."""
    v, t, h, w, c = latent_shape
    pt, ph, pw = patch
    x = tokens.reshape(-1, v, t // pt, h // ph, w // pw, pt, ph, pw, c)
    x = x.transpose(0, 1, 2, 5, 3, 6, 4, 7, 8)
    return x.reshape(-1, v, t, h, w, c)


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


def exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class Block(nn.Module):
    """One transformer block; residual stream (B, L, D) float32 in and out."""

    embed_dim: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    dtype: Any

    def setup(self) -> None:
        d, heads, dtype = self.embed_dim, self.num_heads, self.dtype
        self.adaln = dense((6, d), dtype=dtype, kernel_init=ZEROS)
        self.qkv = dense((3, heads, d // heads), use_bias=self.qkv_bias, dtype=dtype)
        self.proj = dense(d, axis=(-2, -1), dtype=dtype)
        self.fc1 = dense(int(d * self.mlp_ratio), dtype=dtype)
        self.fc2 = dense(d, dtype=dtype)

    def __call__(self, x: Array, activated_cond: Array) -> Array:
        """`activated_cond` is SiLU of the condition (B, F + T)."""
        # Gathered over the devices that share these rows: it is small beside the tokens that it multiplies.
        return self.apply_modulated(x, constrain(self.modulation(activated_cond), "batch"))

    def modulation(self, activated_cond: Array) -> Array:
        """(B, F + T) -> (B, 6, D) float32: shift, scale, gate of the attention and of the MLP."""
        return self.adaln(activated_cond).astype(jnp.float32)

    def apply_modulated(self, x: Array, modulation: Array) -> Array:
        """The block with given modulation (B, 6, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, i] for i in range(6))
        qkv = constrain(self.qkv(modulate(x, shift1, scale1)), "batch", "length", None, "heads")
        # (B, L, heads, D/heads) each; logits and softmax are float32 whatever the dtype.
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = constrain(x + gate1[:, None] * self.proj(y).astype(jnp.float32), "batch", "length")
        hidden = constrain(self.fc1(modulate(x, shift2, scale2)), "batch", "length", "hidden")
        return constrain(x + gate2[:, None] * self.fc2(exact_gelu(hidden)).astype(jnp.float32), "batch", "length")


def _apply(block: Block, params: Any, *args: Array, method: str = "__call__") -> Any:
    return block.apply({"params": params}, *args, method=method)


class Head(nn.Module):
    """The modulated final projection, zero at initialisation: (B, L, D) -> (B, L, D)."""

    embed_dim: int
    dtype: Any

    def setup(self) -> None:
        self.adaln = dense((2, self.embed_dim), dtype=self.dtype, kernel_init=ZEROS)
        self.linear = dense(self.embed_dim, dtype=self.dtype, kernel_init=ZEROS)

    def modulation(self, activated_cond: Array) -> Array:
        """(B, F + T) -> (B, 2, D) float32: shift, scale."""
        return self.adaln(activated_cond).astype(jnp.float32)

    def __call__(self, x: Array, modulation: Array) -> Array:
        return self.linear(modulate(x, modulation[:, 0], modulation[:, 1]))


class DiT(nn.Module):
    """Predicts, from noisy actions and noisy latents, what the diffusion of each modality asks for.

    Shapes: `noisy` and predictions are {"action": (B, action_len, action_dim), "next_obs": (B, V, T, h, w, C)};
    timesteps are {"action": (B,), "next_obs": (B,)} integers from 0; `global_cond` (B, F) are the observation
    features. At initialisation both predictions are exactly 0.

    Fields:
        action_dim, action_len: columns and rows of an action chunk.
        latent_shape: (V, T, h, w, C) of the next observation's latents.
        patch: latent frames, rows and columns per video token; must divide (T, h, w).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the blocks.
        num_registers: learned tokens without an output of their own.
        timestep_embed_dim: width of the joint embedding of both timesteps; even, at least 4.
        scan_blocks: one compiled block in a `lax.scan`, or `depth` of them; parameters and results are the same. Layers
            that are held apart (`layers.py`) are never scanned.
        remat: "none", "dots" (recompute all but the dense layers' products) or "full" in the backward pass.
        dtype: of the large products (module docstring); parameters and outputs are float32.
    """

    action_dim: int
    action_len: int
    latent_shape: tuple[int, ...]
    patch: tuple[int, int, int] = (2, 4, 4)
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4
    qkv_bias: bool = True
    num_registers: int = 8
    timestep_embed_dim: int = 512
    scan_blocks: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def num_video_tokens(self) -> int:
        views, *grid, _ = self.latent_shape
        return views * int(np.prod([n // p for n, p in zip(grid, self.patch, strict=True)]))

    @property
    def num_tokens(self) -> int:
        return self.action_len + self.num_video_tokens + self.num_registers

    def setup(self) -> None:
        self._check()
        d, dtype = self.embed_dim, self.dtype
        hidden = 4 * max(self.action_dim, d)
        patch_values = int(np.prod(self.patch)) * self.latent_shape[-1]
        self.action_encoder = MLP(hidden, d, dtype=dtype)
        self.patch_encoder = dense(d, dtype=dtype)
        self.timestep_embedding = MLP(4 * self.timestep_embed_dim, self.timestep_embed_dim)
        if self.num_registers:
            self.registers = self.param("registers", INIT, (1, self.num_registers, d))
        self.pos_embed = self.param("pos_embed", INIT, (1, self.num_tokens, d))
        self.head = Head(d, dtype)
        self.action_decoder = MLP(hidden, self.action_dim, dtype=dtype, out_dtype=jnp.float32)
        self.patch_decoder = dense(patch_values, dtype=jnp.float32)

    def _check(self) -> None:
        if any(n % p for n, p in zip(self.latent_shape[1:4], self.patch, strict=True)):
            raise ValueError(
                f"patch {self.patch} (frames, rows, columns) must divide the latents' {self.latent_shape[1:4]}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide embed_dim {self.embed_dim}")
        if self.timestep_embed_dim < 4 or self.timestep_embed_dim % 2:
            raise ValueError(f"timestep_embed_dim must be even and at least 4, found {self.timestep_embed_dim}")
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of none, {', '.join(REMAT_POLICIES)}; found {self.remat!r}")

    def _block(self) -> Block:
        """The body that all layers share; detached, because its parameters are slices of one stacked tree."""
        return Block(self.embed_dim, self.num_heads, self.mlp_ratio, self.qkv_bias, self.dtype, parent=None)

    def _scans(self, blocks: Any) -> bool:
        return self.scan_blocks and not layers_lib.are_apart(blocks)

    def _init_blocks(self, key: Array, cond_dim: int) -> Any:
        """`depth` independently drawn blocks as one tree with a leading axis."""
        x, cond = jnp.zeros((1, 1, self.embed_dim)), jnp.zeros((1, cond_dim))
        keys = jax.random.split(key, self.depth)
        return jax.vmap(lambda k: self._block().init(k, x, cond)["params"])(keys)

    @nn.compact
    def __call__(
        self, global_cond: Array, noisy: Mapping[str, Array], timestep: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """One evaluation, each row at its own timesteps.

        Returns the predictions (float32) and intermediates: `tokens` (B, L, D) after the positional table,
        `hidden` (depth, B, L, D) after every block, `final` (B, L, D) after the head; L runs over actions, video,
        registers. What is not used costs nothing under jit.
        """
        time = constrain(self._embed_timestep(timestep), "batch")
        cond = jnp.concatenate([global_cond.astype(jnp.float32), time], axis=-1)
        cond = constrain(nn.silu(cond), "batch")
        # The blocks' parameters depend on the width of the condition, so they are declared here, not in setup.
        # `param` would refuse layers that are held apart, whose shapes are not those of a new stack.
        blocks: Any = self.get_variable("params", "blocks")
        if blocks is None:
            blocks = self.param("blocks", self._init_blocks, cond.shape[-1])
        block = self._block()

        def body(x: Array, params: Any) -> Array:
            # The modulation belongs to the body: it is rematerialised, and its weights gathered, layer by layer.
            return _apply(block, params, x, cond)

        if self.remat != "none":
            # A scan keeps XLA from merging the recomputation with the forward pass; unrolled code needs barriers.
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=not self._scans(blocks))
        tokens = self._tokens(noisy)
        x, hidden = self._run(body, tokens, blocks)
        return self._outputs(x, constrain(self.head.modulation(cond), "batch"), {"tokens": tokens, "hidden": hidden})

    def modulation(self, global_cond: Array, timestep: Mapping[str, Array]) -> dict[str, Array]:
        """All AdaLN modulations of a sampler at once, for `predict`.

        Args:
            global_cond: (B, F).
            timestep: {"action": (S,), "next_obs": (S,)} integers, the same for all rows of the batch.

        Returns:
            {"blocks": (S, depth, B, 6, D), "head": (S, B, 2, D)} float32; slice s of both belongs to step s.
        """
        rows, features = global_cond.shape
        obs = nn.silu(global_cond.astype(jnp.float32))
        time = nn.silu(self._embed_timestep(timestep))
        # The condition is [obs | time] and the layer is linear, so B + S rows replace B * S. The rows are padded
        # with zeros because slicing the largest kernels of the network would copy them.
        cond = jnp.concatenate([jnp.pad(obs, ((0, 0), (0, time.shape[-1]))), jnp.pad(time, ((0, 0), (features, 0)))])

        def combine(out: Array, bias: Array) -> Array:
            """(..., B + S, k, D) -> (S, ..., B, k, D); both halves came with the bias, which counts once."""
            obs_part = out[..., :rows, :, :]
            time_part = jnp.moveaxis(out[..., rows:, :, :] - bias[..., None, :, :], -3, 0)
            return obs_part + time_part[..., None, :, :]

        blocks: Any = self.get_variable("params", "blocks")
        block = self._block()
        if layers_lib.are_apart(blocks):
            each = layers_lib.of_each(blocks, self.depth)
            out = jnp.stack([_apply(block, params, cond, method="modulation") for params in each])
            bias = jnp.stack([params["adaln"]["bias"] for params in each])
        else:
            # Conditions are repeated per layer so that `depth` is a batch axis of the product on both sides.
            repeated = jnp.broadcast_to(cond, (self.depth, *cond.shape))
            out = jax.vmap(lambda params, c: _apply(block, params, c, method="modulation"))(blocks, repeated)
            bias = blocks["adaln"]["bias"]
        head = self.head.modulation(cond)
        head_bias: Any = self.get_variable("params", "head")["adaln"]["bias"]
        return {"blocks": combine(out, bias), "head": combine(head, head_bias)}

    def predict(
        self, noisy: Mapping[str, Array], modulation: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """`__call__` with one step's slice of `modulation`: {"blocks": (depth, B, 6, D), "head": (B, 2, D)}."""
        block = self._block()

        def body(x: Array, layer: tuple[Any, Array]) -> Array:
            return _apply(block, layer[0], x, layer[1], method="apply_modulated")

        tokens = self._tokens(noisy)
        layers: Any = (self.get_variable("params", "blocks"), modulation["blocks"])
        x, hidden = self._run(body, tokens, layers)
        return self._outputs(x, modulation["head"], {"tokens": tokens, "hidden": hidden})

    def _embed_timestep(self, timestep: Mapping[str, Array]) -> Array:
        dim = self.timestep_embed_dim
        both = [sinusoid(timestep["action"], dim), sinusoid(timestep["next_obs"], dim)]
        return self.timestep_embedding(jnp.concatenate(both, axis=-1))

    def _tokens(self, noisy: Mapping[str, Array]) -> Array:
        """Action, video and register tokens with their positions: (B, L, D) float32."""
        action, latent = noisy["action"], noisy["next_obs"]
        batch = action.shape[0]
        expected = (batch, self.action_len, self.action_dim), (batch, *self.latent_shape)
        if (action.shape, latent.shape) != expected:
            raise ValueError(
                f"noisy action and next_obs must have the shapes {expected[0]} and {expected[1]}, "
                f"found {action.shape} and {latent.shape}"
            )
        video = self.patch_encoder(patchify(latent.astype(self.dtype), self.patch))
        parts = [constrain(p, "batch", "length") for p in (self.action_encoder(action), video)]
        if self.num_registers:
            parts.append(jnp.broadcast_to(self.registers, (batch, *self.registers.shape[1:])))
        tokens = jnp.concatenate([p.astype(jnp.float32) for p in parts], axis=1) + self.pos_embed
        return constrain(tokens, "batch", "length")

    def _run(self, body: Callable[[Array, Any], Array], x: Array, layers: Any) -> tuple[Array, Array]:
        """Applies `body` with each layer of the tree `layers`; also returns the stream after each."""
        if self._scans(layers):

            def step(x: Array, layer: Any) -> tuple[Array, Array]:
                x = body(x, layer)
                return x, x

            return jax.lax.scan(step, x, layers)
        hidden = []
        for layer in layers_lib.of_each(layers, self.depth):
            # The barrier keeps XLA from adding the stream up anew, from the first layer on, wherever it is used.
            x = jax.lax.optimization_barrier(body(x, layer))
            hidden.append(x)
        return x, jnp.stack(hidden)

    def _outputs(
        self, x: Array, head_modulation: Array, intermediates: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        x = constrain(self.head(x, head_modulation), "batch", "length")
        end = self.action_len + self.num_video_tokens
        video = self.patch_decoder(x[:, self.action_len : end])
        pred = {
            "action": self.action_decoder(x[:, : self.action_len]),
            "next_obs": unpatchify(video, self.patch, self.latent_shape),
        }
        return pred, {**intermediates, "final": x}
