"""Floating-point operations of products, for networks that count their own.

Only products count (a multiplication and an addition are two operations), as in every published MFU; norms,
activations, softmax and image preprocessing are left out. All counts are of one forward pass.
"""

from __future__ import annotations


def dense(inputs: int, outputs: int, positions: int = 1) -> float:
    """A linear layer at `positions` places: 2 n in out."""
    return 2.0 * positions * inputs * outputs


def convolution(size: int, inputs: int, outputs: int, rows: int, columns: int) -> float:
    """A convolution of `size` x `size` with `rows` x `columns` outputs, padding included: 2 k k in out rows columns."""
    return 2.0 * size * size * inputs * outputs * rows * columns


def attention(queries: int, width: int, keys: int | None = None) -> float:
    """Logits and weighted sum of attention with all heads `width` wide, without projections: 4 Q K D.

    `keys` defaults to `queries` (self-attention).
    """
    return 4.0 * queries * (queries if keys is None else keys) * width
