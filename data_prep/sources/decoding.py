"""Decodes video files with PyAV by exact time stamps.

Decoders may crash or hang on damaged files; `data_prep.jobs.child` runs them in a process that can be replaced.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from data_prep.jobs.child import ChildError
from uwm_jax.data.names import not_the_data
from uwm_jax.errors import UserError

MAX_PIXELS = 1 << 26  # of a frame; 8K video has half of that
MAX_ENCODED_BYTES = 1 << 30  # of an episode's images; a tf.Example must stay below 2 GiB
MAX_SECONDS = 86_400  # for decoding one file
_SLACK = Fraction(1, 1_000_000)  # seconds; times in metadata are rounded to floats
_VARIABLE = Fraction(3, 2)  # ratio of two intervals between frames that rounding cannot explain
_UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16)  # the first numbers of a display matrix that changes nothing
_MISSING = Fraction(1, 20)  # of the declared duration, which containers round; at least two frames


class VideoError(Exception):
    """A video that cannot be used: `reason` is a short category for counting, the message has details."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def decoder_failure(error: ChildError) -> VideoError:
    """The reason for a file whose decoder was replaced."""
    return VideoError("decoder crashed" if error.crashed else "decoder exceeded the time limit", str(error))


def time_limit(seconds: float) -> float:
    """The value of `--seconds`; UserError if it is no time limit."""
    if not 0 < seconds <= MAX_SECONDS:
        raise UserError(f"--seconds={seconds:g}: expected a time limit of at most {MAX_SECONDS} s.")
    return seconds


class Video:
    """The first video stream of a file, open for reading; a context manager.

    Attributes:
        pixel_aspect: width of a stored pixel over its height.
        remarks: properties that are taken into account, found while reading: rotation, a variable rate, and so on.
    Raises:
        VideoError: the file cannot be read or opened, or has no video stream.
    """

    def __init__(self, path: Path):
        self.path = path
        self.remarks: set[str] = set()
        self._av = import_av()
        self._open()
        self.pixel_aspect = Fraction(self._stream.sample_aspect_ratio or 1)

    def frames(self, start: Fraction = Fraction(0), *, stamped: bool = True) -> Iterator[tuple[Fraction, Any]]:
        """Yields (time in seconds, `av.VideoFrame`) in the order of display, with increasing times: from the last key
        frame at or before `start`, or from the first frame.

        Args:
            stamped: False: frames without time stamps are spaced by the frame rate that the file declares, else by 1 s.
        Raises:
            VideoError: a frame cannot be decoded, or has no time stamp; times do not increase; the video ends early.
        """
        if start <= 0:
            self._rewind()
            yield from self._timed(stamped)
            return
        self._at_start = False
        with contextlib.suppress(self._av.FFmpegError):
            self._container.seek(int(start / self._stream.time_base), stream=self._stream, backward=True)
        decoded = self._timed(stamped)
        first: tuple[Fraction, Any] | None = None
        with contextlib.suppress(VideoError):
            first = next(decoded, None)
        if first is not None and first[0] <= start:
            yield first
        else:  # a file without an index, which cannot be sought
            self._rewind()
            decoded = self._timed(stamped)
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
            with self.path.open("rb") as f:
                empty = not f.read(1)
        except (OSError, ValueError) as e:
            raise VideoError("unreadable file", f"{self.path.name}: {e}") from e
        if empty:
            raise VideoError("empty file", f"{self.path.name} has no bytes")
        try:
            self._container = self._av.open(str(self.path), metadata_errors="replace")
        except (self._av.FFmpegError, ValueError, MemoryError, OSError) as e:
            raise VideoError("video cannot be opened", f"{self.path.name}: {not_the_data(self.path) or e}") from e
        streams = [s for s in self._container.streams.video if not _is_cover(s)]
        if not streams:
            found = ("cover picture" if s.type == "video" else s.type for s in self._container.streams)
            kinds = ", ".join(sorted(found)) or "nothing"
            self._container.close()
            raise VideoError("no video stream", f"{self.path.name} holds no video stream, but {kinds}")
        self._stream = streams[0]
        self._check_whole()
        if self._stream.codec_context is None:
            self._container.close()
            raise VideoError("unknown codec", f"{self.path.name}: libav has no decoder for its video")
        try:
            _check_size(self._stream.codec_context.width, self._stream.codec_context.height)
        except VideoError:  # before its frames take memory
            self._container.close()
            raise
        self._stream.codec_context.thread_count = 1  # the processes of a job share the cores
        self._at_start = True

    def _check_whole(self) -> None:
        """Raises VideoError for an AVI file that is shorter than it says; libav scales what it declares to its size."""
        if self._container.format.name != "avi":
            return
        with self.path.open("rb") as f:
            kind, size = struct.unpack("<4sI", f.read(8).ljust(8, b"\0"))
        found = os.stat(self.path).st_size - 8
        if kind == b"RIFF" and found < size < 0xFFFFFFFF:
            self._container.close()
            raise VideoError("ends early", f"{self.path.name} has {found} of the {size} bytes that its header declares")

    def _rewind(self) -> None:
        if not self._at_start:
            self.close()
            self._open()

    def _timed(self, stamped: bool) -> Iterator[tuple[Fraction, Any]]:
        """Frames with their times, as `frames`."""
        last: Fraction | None = None
        interval = shortest = Fraction(0)
        spacing = 1 / Fraction(self._stream.average_rate or self._stream.guessed_rate or 1)
        for number, (time, frame) in enumerate(self._decoded()):
            if last is None:
                self._remark(time, frame)
            if time is None:
                if stamped:
                    raise VideoError("no time stamps", f"{self.path.name} has frames without a time stamp")
                time = Fraction(0) if last is None else last + spacing
            if last is not None:
                interval = time - last
                shortest = min(shortest or interval, interval)
                if interval <= 0:
                    raise VideoError(
                        "time stamps do not increase",
                        f"{self.path.name}: frame {number} at {float(time):.4f} s, the last at {float(last):.4f} s",
                    )
                if interval > _VARIABLE * shortest:
                    self.remarks.add("variable rate")
            last, duration = time, frame.duration
            yield time, frame
        if last is None:
            raise VideoError("no frames", f"{self.path.name} holds no frame that can be decoded")
        declared = self._declared_end()
        interval = max(interval, (duration or 0) * self._stream.time_base)
        end = last + interval
        if declared is not None and declared - end > max(2 * interval, _MISSING * declared):
            raise VideoError("ends early", f"{self.path.name} ends at {float(end):.2f} of {float(declared):.2f} s")

    def _remark(self, time: Fraction | None, frame: Any) -> None:
        """Adds the remarks that the first frame gives reason for."""
        remarks = {
            "no time stamps": time is None,
            "rotated or mirrored by metadata": any(struct.unpack("=9i", m)[:5] != _UPRIGHT for m in _matrices(frame)),
            "pixels not square": self.pixel_aspect != 1,
            "more than 8 bits a channel": any(component.bits > 8 for component in frame.format.components),
            "odd size": frame.width % 2 == 1 or frame.height % 2 == 1,
        }
        self.remarks |= {remark for remark, applies in remarks.items() if applies}

    def _decoded(self) -> Iterator[tuple[Fraction | None, Any]]:
        """Frames with the times that the file stores."""
        self._at_start = False
        # AVI has no times of display: its n-th frame is shown at the time of its n-th packet.
        by_packet = self._container.format.name == "avi"
        times: collections.deque[Fraction | None] = collections.deque()
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise VideoError("video cannot be decoded", f"{self.path.name}: a packet is incomplete")
                if by_packet and packet.size:
                    times.append(None if packet.dts is None else packet.dts * self._stream.time_base)
                for frame in packet.decode():
                    stored = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
                    if by_packet:
                        stored = times.popleft() if times else None
                    if frame.is_corrupt:
                        where = f" at {float(stored):.3f} s" if stored is not None else ""
                        raise VideoError("video cannot be decoded", f"{self.path.name}: damaged{where}")
                    yield stored, frame
        except (self._av.FFmpegError, ValueError, MemoryError, EOFError) as e:
            raise VideoError("video cannot be decoded", f"{self.path.name}: {e}") from e

    def _declared_end(self) -> Fraction | None:
        """The time at which the stream ends, by its headers, or less; None if they do not say."""
        if self._stream.duration:
            return self._stream.duration * self._stream.time_base
        tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", str(self._stream.metadata.get("DURATION", "")))
        if tag:  # Matroska and WebM
            return int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])
        if self._container.duration and len(self._container.streams) == 1:
            return Fraction(self._container.duration, 1_000_000)
        return None


def rgb(frame: Any, pixel_aspect: Fraction = Fraction(1)) -> np.ndarray:
    """The pixels of an `av.VideoFrame` as it is shown, (H, W, 3) uint8 RGB: rotated and mirrored by its display matrix.

    Args:
        pixel_aspect: width of a stored pixel over its height; the result has square pixels.
    Raises:
        VideoError: a picture of more than `MAX_PIXELS`, of a pixel format that libav cannot convert, or rotated by
            another angle than quarter turns.
    """
    size = max(1, round(frame.width * pixel_aspect)), frame.height
    _check_size(max(size[0], frame.width), frame.height)
    try:
        image = frame.to_ndarray(format="rgb24", threads=1)
    except (import_av().FFmpegError, ValueError, MemoryError) as e:
        raise VideoError("video cannot be decoded", f"a frame of format {frame.format.name}: {e}") from e
    if pixel_aspect != 1:
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    for matrix in _matrices(frame):
        image = turned(image, struct.unpack("=9i", matrix))
    return np.ascontiguousarray(image)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise VideoError("oversized picture", f"a frame has {width}x{height} pixels")


def _matrices(frame: Any) -> list[bytes]:
    """The display matrices of a frame: none or one."""
    return [bytes(item) for item in frame.side_data if item.type.name == "DISPLAYMATRIX"]


def turned(image: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
    """An image (H, W, 3) mapped by a display matrix of quarter turns and mirrorings.

    Args:
        matrix: a, b, u, c, d, v, x, y, w of ISO/IEC 14496-12: the pixel in column p and row q is shown in column
            a p + c q and row b p + d q, apart from a translation.
    Raises:
        VideoError: another matrix.
    """
    linear = np.asarray([matrix[i] for i in (0, 1, 3, 4)], np.float64)
    a, b, c, d = (linear / (np.abs(linear).max() or 1)).tolist()
    if max(abs(b), abs(c)) < 0.01 < 0.99 < min(abs(a), abs(d)):
        return image[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
    if max(abs(a), abs(d)) < 0.01 < 0.99 < min(abs(b), abs(c)):
        return image.transpose(1, 0, 2)[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1]
    raise VideoError("odd rotation", f"expected quarter turns, found the display matrix {[n / 65536 for n in matrix]}")


class Nearest:
    """Finds the frames nearest to times that increase; keeps two frames in memory.

    Args:
        frames: (time, frame) in increasing order, as `Video.frames` yields them.

    Attributes:
        start: time of the first frame; None if there is none.
    """

    def __init__(self, frames: Iterable[tuple[Fraction, Any]]):
        self._upcoming = iter(frames)
        self._before: tuple[Fraction, Any] | None = None
        self._after = next(self._upcoming, None)
        self._interval = Fraction(0)  # between the two frames before
        self.start = self._after[0] if self._after else None

    def at(self, time: Fraction) -> tuple[Fraction, Any] | None:
        """The nearest (time, frame), of two that are equally near the later one; None if there are no frames."""
        while self._after is not None and self._after[0] <= time:
            if self._before is not None:
                self._interval = self._after[0] - self._before[0]
            self._before, self._after = self._after, next(self._upcoming, None)
        found = [frame for frame in (self._before, self._after) if frame is not None]
        distance = min((abs(frame[0] - time) for frame in found), default=Fraction(0))
        return next((frame for frame in reversed(found) if abs(frame[0] - time) <= distance + _SLACK), None)

    def ends_before(self, time: Fraction) -> bool:
        """Whether the last frame is over at a time that `at` was just given: half a frame after its own time."""
        return self._after is None and (self._before is None or time >= self._before[0] + self._interval / 2 - _SLACK)


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
    track = Nearest(frames)
    taken: Fraction | None = None
    for wanted in times:
        chosen = track.at(wanted)
        if chosen is None or abs(chosen[0] - wanted) > tolerance + _SLACK:
            away = "there is none" if chosen is None else f"the nearest is {float(abs(chosen[0] - wanted)):.4f} s away"
            near = "the video ends before" if track.ends_before(wanted) else away
            raise VideoError("no frame at its time", f"no frame at {float(wanted):.4f} s: {near}")
        if taken is not None and chosen[0] <= taken:
            raise VideoError("a frame twice", f"the frame at {float(taken):.4f} s is the nearest to two steps")
        taken = chosen[0]
        yield chosen


def import_av() -> Any:
    """The module `av`; UserError if it is not installed."""
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
