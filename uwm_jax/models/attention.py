"""Attention of all transformers: softmax(q k^T / sqrt(channels)) v, by XLA or by cuDNN's fused kernels.

XLA makes the logits as an array, in float32. cuDNN (flash attention, through `jax.nn.dot_product_attention`) keeps them
on the chip; it runs on NVIDIA GPUs, takes bfloat16 and float16, and rounds otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from uwm_jax.errors import UserError
from uwm_jax.models import target

Array = jax.Array
KINDS = ("xla", "cudnn")  # values of `config.model.attention`


def attend(q: Array, k: Array, v: Array, mask: Array | None = None, kind: str = "xla") -> Array:
    """Values (B, queries, heads, channels) in the dtype of q.

    Args:
        q: (B, queries, heads, channels).
        k, v: (B, keys, heads, channels).
        mask: boolean, of shape (B, queries, keys) or (B, 1, keys), the same for all heads: True where a query sees a
            key. Every query must see at least one. None: all see all.
        kind: one of `KINDS`.

    Raises:
        UserError: cuDNN cannot do it: no NVIDIA GPU, another dtype, or too many channels.
    """
    if kind == "cudnn":
        return _by_cudnn(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None], implementation="xla")


def _by_cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    cannot = "config.model.attention='cudnn' "
    instead = "Use config.model.attention='xla'."
    if (platform := target.platform()) != "gpu":
        raise UserError(f"{cannot}needs an NVIDIA GPU, but this program is for devices of kind {platform!r}. {instead}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"{cannot}takes bfloat16 or float16, found {q.dtype}: set config.model.dtype='bfloat16'.")
    rows, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    # Gradients are there for even lengths alone (jax 0.10, also without a mask).
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    if mask is not None:
        hidden: dict[str, Any] = {"mask": _with_even_lengths(jnp.broadcast_to(mask, (rows, queries, keys)))[:, None]}
    elif queries % 2 or keys % 2:
        lengths = {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
        hidden = {name: jnp.full(rows, length, jnp.int32) for name, length in lengths.items()}
    else:
        hidden = {}
    try:
        y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **hidden)
    except (NotImplementedError, RuntimeError, ValueError) as e:  # also of a machine without cuDNN
        raise UserError(f"{cannot}cannot be used for {q.shape} queries and {k.shape} keys: {e} {instead}") from e
    return y[:, :queries]


def _with_even_lengths(mask: Array) -> Array:
    """A mask (B, queries, keys), with a query more that sees all keys, and a key more that no other query sees."""
    _, queries, keys = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, keys % 2)))
    return jnp.pad(mask, ((0, 0), (0, queries % 2), (0, 0)), constant_values=True)
