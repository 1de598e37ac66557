"""Video latents cut into patches, one for each token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

Array = jax.Array


def count(latent_shape: Sequence[int], patch: tuple[int, int, int]) -> int:
    """Tokens of latents (V, T, h, w, C).

    Raises:
        ValueError: the patch does not divide (T, h, w).
    """
    views, *grid, _ = latent_shape
    if any(n % p for n, p in zip(grid, patch, strict=True)):
        raise ValueError(f"patch {patch} (frames, rows, columns) must divide the latents' {tuple(grid)}")
    return views * math.prod(n // p for n, p in zip(grid, patch, strict=True))


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
