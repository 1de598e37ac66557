"""Decodes video files with PyAV by exact time stamps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from uwm_jax.errors import UserError

_SLACK = Fraction(1, 1_000_000)  # seconds; times in metadata are rounded to floats


class VideoError(Exception):
    """A video that cannot be used: `reason` is a short category for counting, the message has details."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Video:
    """The first video stream of a file, open for reading; a context manager.

    Raises:
        VideoError: the file cannot be opened, or has no video stream.
    """

    def __init__(self, path: Path):
        self.path = path
        self._av = _import_av()
        self._open()

    def frames(self, start: Fraction = Fraction(0)) -> Iterator[tuple[Fraction, Any]]:
        """Yields (time in seconds, `av.VideoFrame`) in the order of display: from the last key frame at or before
        `start`, or from the first frame.

        Raises:
            VideoError: a frame cannot be decoded or has no time stamp.
        """
        if start <= 0:
            self._rewind()
            yield from self._decoded()
            return
        self._at_start = False
        with contextlib.suppress(self._av.FFmpegError):
            self._container.seek(int(start / self._stream.time_base), stream=self._stream, backward=True)
        decoded = self._decoded()
        first: tuple[Fraction, Any] | None = None
        with contextlib.suppress(VideoError):
            first = next(decoded, None)
        if first is not None and first[0] <= start:
            yield first
        else:  # a file without an index, which cannot be sought
            self._rewind()
            decoded = self._decoded()
        yield from decoded

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the first frame as it is shown.

        Raises:
            VideoError: it cannot be decoded.
        """
        for _, frame in self.frames():
            return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
        raise VideoError("no frames", f"{self.path.name} holds no frame")

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        try:
            self._container = self._av.open(str(self.path))
        except (self._av.FFmpegError, ValueError) as e:
            raise VideoError("video cannot be opened", f"{self.path.name}: {e}") from e
        streams = [s for s in self._container.streams.video if not _is_cover(s)]
        if not streams:
            self._container.close()
            raise VideoError("no video stream", f"{self.path.name} holds no video stream")
        self._stream = streams[0]
        self._stream.codec_context.thread_count = 1  # the processes of a job share the cores
        self._at_start = True

    def _rewind(self) -> None:
        if not self._at_start:
            self.close()
            self._open()

    def _decoded(self) -> Iterator[tuple[Fraction, Any]]:
        self._at_start = False
        try:
            for frame in self._container.decode(self._stream):
                if frame.pts is None or frame.time_base is None:
                    raise VideoError("no time stamps", f"{self.path.name} has frames without a time stamp")
                if frame.is_corrupt:
                    raise VideoError("video cannot be decoded", f"{self.path.name}: damaged at {frame.time:.3f} s")
                yield frame.pts * frame.time_base, frame
        except (self._av.FFmpegError, ValueError) as e:
            raise VideoError("video cannot be decoded", f"{self.path.name}: {e}") from e


def rgb(frame: Any) -> np.ndarray:
    """The pixels of an `av.VideoFrame` as it is shown, (H, W, 3) uint8 RGB; rotation by metadata is applied."""
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))) if frame.rotation else image


def nearest(
    frames: Iterable[tuple[Fraction, Any]], times: Sequence[Fraction], tolerance: Fraction
) -> Iterator[tuple[Fraction, Any]]:
    """The frame nearest to each of the increasing `times`; of two that are equally near, the later one.

    Args:
        frames: (time, frame) in increasing order, as `Video.frames` yields them.
        tolerance: largest distance in seconds between a frame and the time that it is taken for.
    Yields:
        (time, frame), one for each of `times`.
    Raises:
        VideoError: no frame is near enough, or one frame is the nearest to two times.
    """
    upcoming = iter(frames)
    before: tuple[Fraction, Any] | None = None
    after = next(upcoming, None)
    taken: Fraction | None = None
    for wanted in times:
        while after is not None and after[0] <= wanted:
            if before is not None and after[0] <= before[0]:
                raise VideoError("time stamps do not increase", f"two frames at {float(after[0]):.4f} s")
            before, after = after, next(upcoming, None)
        found = [frame for frame in (before, after) if frame is not None]
        distance = min((abs(frame[0] - wanted) for frame in found), default=None)
        if distance is None or distance > tolerance + _SLACK:
            near = "the video ends before" if after is None else f"the nearest is {float(distance or 0):.4f} s away"
            raise VideoError("no frame at its time", f"no frame at {float(wanted):.4f} s: {near}")
        chosen = [frame for frame in found if abs(frame[0] - wanted) <= distance + _SLACK][-1]
        if taken is not None and chosen[0] <= taken:
            raise VideoError("a frame twice", f"the frame at {float(taken):.4f} s is the nearest to two steps")
        taken = chosen[0]
        yield chosen


def _import_av() -> Any:
    try:
        import av
    except ImportError as e:
        raise UserError(
            "av (PyAV) is not installed. Run `pip install 'uwm_jax[lerobot]'` or `'uwm_jax[videos]'` (`-e '.[videos]'` "
            "in a clone)."
        ) from e
    return av


def _is_cover(stream: Any) -> bool:
    """Whether a stream is a picture attached to the file, such as the cover of an album."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)
