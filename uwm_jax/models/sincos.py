"""The fixed two-dimensional table of sines and cosines that marks positions of image patches."""

from __future__ import annotations

import math

import numpy as np


def sincos_table(rows: int, columns: int, dim: int) -> np.ndarray:
    """(rows * columns, dim) float32: the first half of the channels from the row's index, the second from the column's.

    Each half is [sin(p w_k) | cos(p w_k)] with w_k = 10000^(-k/n), k = 0..n-1, n = ceil(dim/4); where 4 does not
    divide dim, the last channels are left out.
    """
    n = math.ceil(dim / 4)
    frequency = 10_000.0 ** (-np.arange(n) / n)
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    phases = [axis.reshape(-1, 1) * frequency for axis in (row, column)]
    return np.concatenate([f(p) for p in phases for f in (np.sin, np.cos)], axis=1)[:, :dim].astype(np.float32)
