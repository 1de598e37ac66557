"""How converters store pictures that they encode themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from uwm_jax.data.episodes import JPEG_QUALITY, encode_jpeg, encode_png, resize_image

ENCODINGS = ("jpeg", "png")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Size and encoding.

    Attributes:
        encoding: one of `ENCODINGS`.
        quality: of JPEG, 1 to 100.
        resize: (height, width) to which pictures are resized first; None: their own.
    """

    encoding: str = "jpeg"
    quality: int = JPEG_QUALITY
    resize: tuple[int, int] | None = None

    def encode(self, image: np.ndarray) -> bytes:
        """An image (H, W, 3), uint8, as a file."""
        if self.resize not in (None, image.shape[:2]):
            image = resize_image(image, self.resize)
        return encode_png(image) if self.encoding == "png" else encode_jpeg(image, self.quality)

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"encoding": self.encoding} | ({"quality": self.quality} if self.encoding == "jpeg" else {})

    @property
    def options(self) -> dict[str, Any]:
        """The flags of which a killed job continues only with the same; `--resize` is one of every converter."""
        return {"encoding": self.encoding, "quality": self.quality}


JPEG = Pictures()
