"""Transformer blocks with LayerNorm before attention and MLP, without conditioning.

    x += attention(LN(x));  x += MLP(LN(x))

`qkv/kernel` is (D, 3, heads, D/heads) and `proj/kernel` (heads, D/heads, D), as in the AdaLN blocks (`transformer.py`).
The residual stream, LayerNorm and softmax are float32; the products run in `dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uwm_jax.models import flops
from uwm_jax.models.activations import constrain
from uwm_jax.models.attention import attend
from uwm_jax.models.initializers import normal, torch_linear
from uwm_jax.models.products import dot_general
from uwm_jax.models.transformer import exact_gelu

Array = jax.Array
Initializer = Callable[..., Array]
# (name of the layer, number of its inputs) -> initialisers of kernel and bias
Start = Callable[[str, int], tuple[Initializer, Initializer]]


def normal_start(layer: str, inputs: int) -> tuple[Initializer, Initializer]:
    """Kernels N(0, 0.02^2), biases 0."""
    return normal(0.02), nn.initializers.zeros


def torch_start(layer: str, inputs: int) -> tuple[Initializer, Initializer]:
    """The default of torch's Linear."""
    return torch_linear(inputs), torch_linear(inputs)


def layer_norm(epsilon: float, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis in float32, with scale and bias."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


class Block(nn.Module):
    """One block: (B, L, D) float32 in and out.

    Fields:
        num_heads: must divide D.
        mlp_dim: hidden units of the MLP (exact GELU).
        epsilon: of both LayerNorms.
        qkv_bias: whether the projections to q, k and v have biases.
        start: initialisers of the dense layers `qkv`, `proj`, `fc1`, `fc2`.
        dtype: of the products.
        attention: one of `attention.KINDS`.
    """

    num_heads: int
    mlp_dim: int
    epsilon: float = 1e-5
    qkv_bias: bool = True
    start: Start = torch_start
    dtype: Any = jnp.float32
    attention: str = "xla"

    def flops(self, length: int, width: int) -> float:
        """Operations of the products on `length` tokens of `width` channels."""
        products = flops.dense(width, 4 * width, length) + 2 * flops.dense(width, self.mlp_dim, length)
        return products + flops.attention(length, width)

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """`mask` (B, L, L) or (B, 1, L), boolean: True where a query (second axis) attends to a key (third axis)."""
        d, heads = x.shape[-1], self.num_heads

        def dense(features: Any, name: str, inputs: int = d, **options: Any) -> nn.DenseGeneral:
            kernel, bias = self.start(name, inputs)
            fields = {"kernel_init": kernel, "bias_init": bias, "dot_general": dot_general, "dtype": self.dtype}
            return nn.DenseGeneral(features, name=name, **fields, **options)

        norm = partial(layer_norm, self.epsilon)
        qkv = dense((3, heads, d // heads), "qkv", use_bias=self.qkv_bias)(norm("norm1")(x))
        qkv = constrain(qkv, "batch", "length", None, "heads")
        # (B, L, heads, D/heads) each; logits and softmax are float32 for any dtype.
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask, self.attention)
        y = dense(d, "proj", axis=(-2, -1))(y)
        x = constrain(x + y.astype(jnp.float32), "batch", "length")
        hidden = constrain(dense(self.mlp_dim, "fc1")(norm("norm2")(x)), "batch", "length", "hidden")
        y = dense(d, "fc2", inputs=self.mlp_dim)(exact_gelu(hidden))
        return constrain(x + y.astype(jnp.float32), "batch", "length")
