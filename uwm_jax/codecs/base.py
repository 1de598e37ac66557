"""Shapes that all codecs share."""

from __future__ import annotations

LatentShape = tuple[int, int, int, int, int]


def grid(height: int, width: int, step: int, what: str) -> tuple[int, int]:
    """Rows and columns of latents that stand `step` pixels apart; `what` names the step in the error.

    Raises:
        ValueError: the image is not divisible.
    """
    if height % step or width % step:
        raise ValueError(f"images of {height} x {width} cannot be cut into steps of {step} pixels ({what})")
    return height // step, width // step
