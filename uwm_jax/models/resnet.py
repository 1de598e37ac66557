"""ResNet with basic blocks (He et al., 2016) and GroupNorm in place of BatchNorm, as an image encoder.

Padding, strides and parameter names are torchvision's, with "_" for ".": `conv1`, `bn1`, `layer2_0/conv1`,
`layer2_0/downsample_0`, `layer2_0/downsample_1`, `fc`. A `bn*` holds GroupNorm `scale` and `bias`; convolution
kernels are (rows, columns, in, out).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models import flops
from uwm_jax.models.activations import constrain
from uwm_jax.models.initializers import kaiming_fan_out, torch_linear
from uwm_jax.models.normalization import GroupNorm

Array = jax.Array
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHANNELS_PER_GROUP = 16


class TorchDense(nn.Module):
    """Linear layer in float32 with torch's default start (`initializers.torch_linear`)."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = torch_linear(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return x.astype(jnp.float32) @ kernel + bias


def _conv(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    # Explicit symmetric padding: "SAME" would pad strided convolutions on the right and bottom only.
    pad = size // 2
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        dtype=dtype,
        kernel_init=kaiming_fan_out,
        name=name,
    )


def _norm(features: int, dtype: Any, name: str) -> GroupNorm:
    return GroupNorm(
        num_groups=features // CHANNELS_PER_GROUP,
        epsilon=1e-5,
        dtype=dtype,
        use_fast_variance=False,
        name=name,
    )


def max_pool(x: Array) -> Array:
    """3x3 maximum at stride 2, padded by 1, of (N, H, W, C), as pairwise maxima.

    The gradient of XLA's own pooling (select-and-scatter) took eight times as long on CPU. Among equal largest
    values of a window it goes to all in shares instead of to the first.
    """
    for axis in (1, 2):
        odd_end = [(0, 0)] * 4
        odd_end[axis] = (0, x.shape[axis] % 2)
        x = jnp.pad(x, odd_end, constant_values=-jnp.inf)
        pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
        even = jax.lax.index_in_dim(pairs, 0, axis + 1, keepdims=False)
        odd = jax.lax.index_in_dim(pairs, 1, axis + 1, keepdims=False)
        shift = [(0, 0)] * 4
        shift[axis] = (1, 0)
        before = jnp.pad(odd, shift, constant_values=-jnp.inf)
        before = jax.lax.slice_in_dim(before, 0, odd.shape[axis], axis=axis)
        x = jnp.maximum(jnp.maximum(before, even), odd)
    return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is projected where the shape changes."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, dtype=self.dtype)
        y = conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(self.features, name="bn1")(y))
        y = conv(self.features, 3, 1, name="conv2")(y)
        y = norm(self.features, name="bn2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, self.stride, name="downsample_0")(x)
            x = norm(self.features, name="downsample_1")(x)
        return constrain(nn.relu(x + y), "batch")


class ResNet(nn.Module):
    """Images (N, H, W, 3) float in [0, 1] -> (N, embed_dim) float32.

    Fields:
        stage_sizes: basic blocks per stage; (2, 2, 2, 2) is ResNet-18. Every stage but the first halves the map.
        width: channels of the first stage, doubled per stage; a multiple of 16 (GroupNorm has width/16 groups).
        embed_dim: outputs of `fc`.
        pool: "average" over the map, or "flatten" (row, column, channel), which keeps where things are and ties
            `fc` to the image size.
        dtype: of the convolutions and of what lies between them; normalisation and `fc` compute in float32.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    embed_dim: int = 768
    pool: str = "average"
    dtype: Any = jnp.float32

    def flops(self, rows: int, columns: int) -> float:
        """Operations of the products for one image of `rows` x `columns`."""
        rows, columns = -(-rows // 2), -(-columns // 2)
        total = flops.convolution(7, 3, self.width, rows, columns)
        rows, columns, inputs = -(-rows // 2), -(-columns // 2), self.width  # after the pooling
        for stage, blocks in enumerate(self.stage_sizes):
            outputs = self.width * 2**stage
            for index in range(blocks):
                if stage > 0 and index == 0:
                    rows, columns = -(-rows // 2), -(-columns // 2)
                total += flops.convolution(3, inputs, outputs, rows, columns)
                total += flops.convolution(3, outputs, outputs, rows, columns)
                if inputs != outputs:
                    total += flops.convolution(1, inputs, outputs, rows, columns)
                inputs = outputs
        return total + flops.dense(inputs * (rows * columns if self.pool == "flatten" else 1), self.embed_dim)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        if self.width % CHANNELS_PER_GROUP or self.width <= 0:
            raise ValueError(f"width must be a positive multiple of {CHANNELS_PER_GROUP}, found {self.width}")
        if self.pool not in ("average", "flatten"):
            raise ValueError(f"pool must be average or flatten, found {self.pool!r}")
        mean, std = np.array([IMAGENET_MEAN, IMAGENET_STD], np.float32)
        x = ((images.astype(jnp.float32) - mean) / std).astype(self.dtype)
        x = _conv(self.width, 7, 2, self.dtype, "conv1")(x)
        x = nn.relu(_norm(self.width, self.dtype, "bn1")(x))
        x = constrain(max_pool(x), "batch")
        for stage, blocks in enumerate(self.stage_sizes):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                x = BasicBlock(self.width * 2**stage, stride, self.dtype, name=name)(x)
        x = x.astype(jnp.float32)
        x = x.mean(axis=(1, 2)) if self.pool == "average" else x.reshape(x.shape[0], -1)
        return TorchDense(self.embed_dim, name="fc")(x)
