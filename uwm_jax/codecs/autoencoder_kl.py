"""The convolutional image autoencoder whose latents the model predicts (frozen; SDXL's in the paper).

The network of diffusers' `AutoencoderKL` (Rombach et al. 2022, arXiv:2112.10752), channels last. Fields carry
diffusers' configuration names, and parameter paths are diffusers' tensor names with `down_blocks.0` written
`down_blocks_0`, so weights map one to one (`uwm_jax.torch_bridge.diffusers_vae`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.codecs.convolution import convolution
from uwm_jax.models import flops
from uwm_jax.models.normalization import GroupNorm

LOGVAR_RANGE = (-30.0, 20.0)


class _Layers(nn.Module):
    """Shared by all parts: group count, compute dtype, and the three parametrised layers."""

    groups: int
    dtype: Any

    def _is_float32(self) -> bool:
        return jnp.dtype(self.dtype) == jnp.float32

    def _precision(self) -> jax.lax.Precision:
        # float32 promises exact products; accelerators would otherwise round inputs to TF32 or bfloat16
        return jax.lax.Precision.HIGHEST if self._is_float32() else jax.lax.Precision.DEFAULT

    def _conv(self, channels: int, name: str, kernel: int = 3, strides: int = 1, padding: Any = None) -> nn.Conv:
        return nn.Conv(
            channels,
            (kernel, kernel),
            strides,
            kernel // 2 if padding is None else padding,
            dtype=self.dtype,
            precision=self._precision(),
            conv_general_dilated=convolution,
            name=name,
        )

    def _dense(self, channels: int, name: str) -> nn.Dense:
        return nn.Dense(channels, dtype=self.dtype, precision=self._precision(), name=name)

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        """GroupNorm in float32 for any compute dtype; the caller casts back after the nonlinearity."""
        # E[x^2] - E[x]^2 reads memory once but cancels: its error drowns in bfloat16's, not in float32's
        fast = not self._is_float32()
        return GroupNorm(self.groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=fast, name=name)(x)

    def _norm_silu(self, x: jax.Array, name: str) -> jax.Array:
        return jax.nn.silu(self._norm(x, name)).astype(self.dtype)


class _ResnetBlock(_Layers):
    channels: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self._conv(self.channels, "conv1")(self._norm_silu(x, "norm1"))
        h = self._conv(self.channels, "conv2")(self._norm_silu(h, "norm2"))
        if x.shape[-1] != self.channels:
            x = self._conv(self.channels, "conv_shortcut", kernel=1)(x)
        return x + h


class _Attention(_Layers):
    """Single-head self-attention over the pixels of a feature map, with its residual."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        h = self._norm(x, "group_norm").astype(self.dtype).reshape(n, height * width, channels)
        query, key, value = (self._dense(channels, name)(h) for name in ("to_q", "to_k", "to_v"))
        logits = jnp.einsum("nqc,nkc->nqk", query, key, precision=self._precision(), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(self.dtype)
        h = jnp.einsum("nqk,nkc->nqc", weights, value, precision=self._precision())
        return x + self._dense(channels, "to_out_0")(h).reshape(x.shape)


class _MidBlock(_Layers):
    attention: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = _ResnetBlock(self.groups, self.dtype, channels, name="resnets_0")(x)
        if self.attention:
            x = _Attention(self.groups, self.dtype, name="attentions_0")(x)
        return _ResnetBlock(self.groups, self.dtype, channels, name="resnets_1")(x)


class _Downsample(_Layers):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # zeros on the right and bottom only
        return self._conv(x.shape[-1], "conv", strides=2, padding=((0, 1), (0, 1)))(x)


class _Upsample(_Layers):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self._conv(x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class _Level(_Layers):
    """One resolution of the pyramid: resnets, then the change of resolution unless it is the last level."""

    channels: int = 0
    layers: int = 0
    resample: str = ""  # "", "downsamplers_0" or "upsamplers_0"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = _ResnetBlock(self.groups, self.dtype, self.channels, name=f"resnets_{i}")(x)
        if self.resample:
            sampler = _Downsample if self.resample == "downsamplers_0" else _Upsample
            x = sampler(self.groups, self.dtype, name=self.resample)(x)
        return x


class _Encoder(_Layers):
    levels: tuple[int, ...] = ()
    layers: int = 0
    out_channels: int = 0
    attention: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self._conv(self.levels[0], "conv_in")(x)
        for i, channels in enumerate(self.levels):
            resample = "downsamplers_0" if i + 1 < len(self.levels) else ""
            x = _Level(self.groups, self.dtype, channels, self.layers, resample, name=f"down_blocks_{i}")(x)
        x = _MidBlock(self.groups, self.dtype, self.attention, name="mid_block")(x)
        return self._conv(self.out_channels, "conv_out")(self._norm_silu(x, "conv_norm_out"))


class _Decoder(_Layers):
    levels: tuple[int, ...] = ()  # from the coarsest, which is the widest
    layers: int = 0
    out_channels: int = 0
    attention: bool = True

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = self._conv(self.levels[0], "conv_in")(z)
        x = _MidBlock(self.groups, self.dtype, self.attention, name="mid_block")(x)
        for i, channels in enumerate(self.levels):
            resample = "upsamplers_0" if i + 1 < len(self.levels) else ""
            x = _Level(self.groups, self.dtype, channels, self.layers, resample, name=f"up_blocks_{i}")(x)
        return self._conv(self.out_channels, "conv_out")(self._norm_silu(x, "conv_norm_out"))


class AutoencoderKL(nn.Module):
    """Encoder to a Gaussian over latents, and decoder; the defaults are stabilityai/sdxl-vae's.

    `encode` and `decode` are the methods to `apply`; calling the module does both and serves `init`.
    `scaling_factor` and `shift_factor` describe the latents' scale; the codec applies them, not this module.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.13025
    shift_factor: float = 0.0
    dtype: Any = jnp.float32  # of convolutions and products; norms, softmax and outputs are float32

    @property
    def downsampling(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode_flops(self, rows: int, columns: int) -> float:
        """Operations of the products that encode one image of `rows` x `columns`."""
        conv, inputs = flops.convolution, self.block_out_channels[0]
        total = conv(3, self.in_channels, inputs, rows, columns)
        for level, outputs in enumerate(self.block_out_channels):
            for _ in range(self.layers_per_block):
                total += conv(3, inputs, outputs, rows, columns) + conv(3, outputs, outputs, rows, columns)
                if inputs != outputs:
                    total += conv(1, inputs, outputs, rows, columns)
                inputs = outputs
            if level + 1 < len(self.block_out_channels):
                rows, columns = rows // 2, columns // 2
                total += conv(3, outputs, outputs, rows, columns)
        total += 4 * conv(3, inputs, inputs, rows, columns)  # the two resnets in the middle
        if self.mid_block_add_attention:
            total += 4 * conv(1, inputs, inputs, rows, columns) + flops.attention(rows * columns, inputs)
        moments = 2 * self.latent_channels
        total += conv(3, inputs, moments, rows, columns)
        return total + (conv(1, moments, moments, rows, columns) if self.use_quant_conv else 0.0)

    def diffusers_config(self) -> dict[str, Any]:
        """The module's fields as diffusers' `config.json` has them."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("dtype", "parent", "name")]
        levels = len(self.block_out_channels)
        return {
            **{name: getattr(self, name) for name in names},
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    def setup(self) -> None:
        shared = {"groups": self.norm_num_groups, "dtype": self.dtype, "attention": self.mid_block_add_attention}
        self.encoder = _Encoder(
            levels=tuple(self.block_out_channels),
            layers=self.layers_per_block,
            out_channels=2 * self.latent_channels,
            **shared,
        )
        self.decoder = _Decoder(
            levels=tuple(self.block_out_channels)[::-1],
            layers=self.layers_per_block + 1,
            out_channels=self.out_channels,
            **shared,
        )
        # the moments and the latents pass these two tiny products in float32: they cost nothing
        exact = {"kernel_size": (1, 1), "dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * self.latent_channels, **exact)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(self.latent_channels, **exact)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Posterior of images.

        Args:
            x: (N, H, W, in_channels) float in [-1, 1]; H and W divisible by `downsampling`.
        Returns:
            mean and logvar, each (N, H/d, W/d, latent_channels) float32, logvar clamped to [-30, 20].
        """
        moments = self.encoder(x.astype(self.dtype)).astype(jnp.float32)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: jax.Array) -> jax.Array:
        """Images of unscaled latents: (N, h, w, latent_channels) -> (N, h*d, w*d, out_channels) float32,
        about [-1, 1] but not clipped."""
        z = z.astype(jnp.float32)
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z.astype(self.dtype)).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x)[0])
