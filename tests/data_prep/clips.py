"""Small video files whose frames tell which they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

SIZE = (48, 64)
_STEP = 8  # grey levels between two frames
_OPTIONS = {
    "libx264": {"preset": "ultrafast", "bf": "2"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx": {"deadline": "realtime"},
    "libvpx-vp9": {"deadline": "realtime"},
    "libsvtav1": {"preset": "12"},
    "mpeg4": {"bf": "2", "b": "20000000"},
}


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W, 3) uint8: grey by the frame's number, with a bright upper left quarter, so that flips show."""
    image = np.full((*size, 3), 16 + _STEP * (number % 24), np.uint8)
    image[: size[0] // 2, : size[1] // 2, 0] += 40
    return image


def number_of(image: np.ndarray) -> int:
    """The number of a picture that was encoded and decoded; of the first 24."""
    return round((float(np.median(image[-8:, -8:])) - 16) / _STEP)


def write_clip(
    path: Path,
    numbers: Sequence[int],
    times: Sequence[Fraction | float] | None = None,
    *,
    fps: int = 10,
    codec: str = "libx264",
    size: tuple[int, int] = SIZE,
    key_every: int = 12,
    pixels: str = "yuv420p",
    turn: Mapping[str, Any] | None = None,
    pixel_aspect: Fraction | None = None,
    format: str | None = None,
) -> None:
    """Writes the pictures `numbers` with the time stamps `times` in seconds; None: one every 1 / fps.

    `turn` are arguments of PyAV's `set_display_rotation`; `format` is the container, by default that of the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps, options=_OPTIONS.get(codec, {}))
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        if turn:
            stream.set_display_rotation(**turn)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.gop_size = key_every
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts = round(1000 * (times[i] if times is not None else Fraction(i, fps)))
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path: Path, cover: bool = False) -> None:
    """Writes a file with sound alone, or with a cover picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover:
            album = container.add_stream("mjpeg", rate=1)
            (album.height, album.width), album.pix_fmt = SIZE, "yuvj420p"
            album.disposition = Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(picture(0), format="rgb24")
            container.mux([*album.encode(image), *album.encode()])
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux([*stream.encode(frame), *stream.encode()])
