"""Image preprocessing in plain PyTorch, as the official training does it on float tensors: resize, crop, jitter.

It computes what `uwm_jax.data.images` does, from draws of torch's own generator, one for each view of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue
OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def preprocess(
    current: Sequence[Tensor],
    following: Sequence[Tensor] | None,
    *,
    resize: Sequence[int],
    crop: Sequence[int],
    augment: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Images (B, V, T, h, w, 3) float32 in [0, 1] of the current and, where there are some, of the following frames.

    Args:
      current, following: (B, T, H, W, 3) uint8 of each view; views may differ in H and W.
      resize: (height, width) of the resized frames: bilinear, antialiased.
      crop: (height, width) cut out of them, without `augment` in the centre.
      augment: `random_crop` and the half-widths of the jitter's ranges, as in `config.data.augment`. All frames of a
        view share one draw; `draw` is not read.
    """
    num_current, views = current[0].shape[1], []
    for view, frames in enumerate(current):
        if following is not None:
            frames = torch.cat([frames, following[view]], dim=1)
        x = frames.flatten(0, 1).movedim(-1, 1).float() / 255
        if tuple(x.shape[2:]) != tuple(resize):
            x = F.interpolate(x, tuple(resize), mode="bilinear", antialias=True)
        margins = [whole - part for whole, part in zip(resize, crop, strict=True)]
        if augment is not None and augment["random_crop"]:
            top, left = (int(torch.randint(margin + 1, ())) for margin in margins)
        else:
            top, left = (round(margin / 2) for margin in margins)
        x = x[:, :, top : top + crop[0], left : left + crop[1]]
        if augment is not None:
            x = color_jitter(x, draw_jitter(augment))
        views.append(x.unflatten(0, frames.shape[:2]))
    images = torch.stack(views, dim=1).movedim(3, -1)  # channels stay outermost in memory, as torch's convolutions are
    return images[:, :, :num_current], None if following is None else images[:, :, num_current:]


def draw_jitter(augment: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The operations that are switched on with their amounts, in random order: factors around 1, the hue in turns."""
    drawn = []
    for index in torch.randperm(len(OPERATIONS)).tolist():
        name = OPERATIONS[index]
        if augment[name] > 0:
            offset = augment[name] * (2 * torch.rand(()).item() - 1)
            drawn.append((name, offset if name == "hue" else max(1 + offset, 0.0)))
    return drawn


def color_jitter(images: Tensor, drawn: Sequence[tuple[str, float]]) -> Tensor:
    """Applies operations to images (N, 3, H, W) in [0, 1], one after the other; each clamps to [0, 1].

    Brightness, contrast and saturation blend an image with black, with the mean of its grey, and with its grey.
    """
    for name, amount in drawn:
        if name == "hue":
            images = shift_hue(images, amount)
            continue
        other: Tensor | float = 0.0
        if name != "brightness":
            gray = sum(weight * images[:, channel] for channel, weight in enumerate(LUMA))[:, None]
            other = gray if name == "saturation" else gray.mean(dim=(-3, -2, -1), keepdim=True)
        images = (amount * images + (1 - amount) * other).clamp(0, 1)
    return images


def shift_hue(images: Tensor, turns: float) -> Tensor:
    """Turns the hue of images (N, 3, H, W): to HSV and back, by the textbook (`colorsys`) as torchvision does."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    saturation = chroma / torch.where(value > 0, value, 1.0)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths = 6 * ((sixths / 6 + turns) % 1)
    sector = sixths.floor()
    rest = sixths - sector
    low, falling = value * (1 - saturation), value * (1 - saturation * rest)
    rising = value * (1 - saturation * (1 - rest))
    index = sector.long()[None] % 6
    sectors = (  # of red, green and blue
        (value, falling, low, low, rising, value),
        (rising, value, value, falling, low, low),
        (low, low, rising, value, value, falling),
    )
    return torch.cat([torch.stack(six).gather(0, index) for six in sectors]).movedim(0, 1)
