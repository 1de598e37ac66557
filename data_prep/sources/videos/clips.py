"""Clips of synchronous video files: frames chosen in time, resized, cropped and encoded as JPEG."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_prep.sources.decoding import MAX_ENCODED_BYTES, Nearest, Video, VideoError, rgb
from uwm_jax.data.cover import cover
from uwm_jax.data.episodes import JPEG_QUALITY, encode_jpeg

Row = list[tuple[Fraction, Any]]  # a step: (time, frame) of each camera


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The choice of frames that become steps, and how they are stored.

    Attributes:
        size: (height, width) in pixels of the stored images.
        fps: steps per second; None: every `every`-th frame.
        every: used without `fps`: one step for each complete group of so many frames, its first. 2 is the official
            rule, by which a clip of 38 frames has 19 steps.
        min_steps: shortest episode.
        quality: of the JPEGs, 1 to 100.
    """

    size: tuple[int, int]
    fps: Fraction | None = None
    every: int = 1
    min_steps: int = 19
    quality: int = JPEG_QUALITY


@dataclasses.dataclass(frozen=True)
class Request:
    """Synchronous video files, one per camera, to be read as one episode."""

    files: tuple[Path, ...]
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Clip:
    """An episode: JPEGs (cameras, T), times in seconds since the first step (T,), and remarks about the files."""

    frames: list[list[bytes]]
    times: list[float]
    remarks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unusable:
    """The reason why a request gives no clip, and the number of the file that is to blame."""

    reason: str
    detail: str
    file: int


def read_clip(request: Request, mark: Callable[[int], None]) -> Clip | Unusable:
    """Reads an episode; `mark` is told the number of the file that is being decoded.

    With several files, the episode lasts from the latest first frame to the earliest last one on their common clock.
    """
    sampling = request.sampling
    current = 0

    def reading(number: int) -> None:
        nonlocal current
        current = number
        mark(number)

    frames: list[list[bytes]] = [[] for _ in request.files]
    times: list[Fraction] = []
    encoded = 0
    try:
        with contextlib.ExitStack() as stack:
            videos = []
            for i, file in enumerate(request.files):
                reading(i)
                videos.append(stack.enter_context(Video(file)))
            last: list[Fraction] = []
            for row in _rows(videos, sampling, reading):
                for i, (time, frame) in enumerate(row):
                    reading(i)
                    if last and time <= last[i]:
                        raise VideoError("too slow", f"the frame at {float(time):.3f} s is nearest to two steps")
                    image = cover(rgb(frame, videos[i].pixel_aspect), sampling.size)
                    frames[i].append(encode_jpeg(image, sampling.quality))
                    encoded += len(frames[i][-1])
                if encoded > MAX_ENCODED_BYTES:
                    raise VideoError("oversized episode", f"{len(times) + 1} steps have {encoded / 1e9:.2f} GB")
                last = [time for time, _ in row]
                times.append(last[0])
            remarks = sorted({remark for video in videos for remark in video.remarks})
    except VideoError as e:
        return Unusable(e.reason, str(e), current)
    if not times and len(videos) > 1:
        return Unusable("cameras do not overlap in time", "no time at which all files have a frame", 0)
    if len(times) < sampling.min_steps:
        return Unusable("too short", f"{len(times)} steps; --min_steps={sampling.min_steps}", 0)
    return Clip(frames, [float(time - times[0]) for time in times], tuple(remarks))


def _rows(videos: Sequence[Video], sampling: Sampling, reading: Callable[[int], None]) -> Iterator[Row]:
    """The frames of each step, one per video."""

    def frames(number: int) -> Iterator[tuple[Fraction, Any]]:
        decoded = videos[number].frames(stamped=sampling.fps is not None or len(videos) > 1)
        while True:
            reading(number)
            item = next(decoded, None)
            if item is None:
                return
            yield item

    if sampling.fps is not None:
        yield from _at_rate([Nearest(frames(i)) for i in range(len(videos))], sampling.fps)
    else:
        yield from _every(frames(0), [Nearest(frames(i)) for i in range(1, len(videos))], sampling.every)


def _at_rate(tracks: Sequence[Nearest], fps: Fraction) -> Iterator[Row]:
    """Frames nearest to times that are 1 / fps apart."""
    start = max(track.start or Fraction(0) for track in tracks)
    for step in itertools.count():
        time = start + step / fps
        row = [frame for track in tracks if (frame := track.at(time)) is not None]
        if len(row) < len(tracks) or any(track.ends_before(time) for track in tracks):
            return
        yield row


def _every(frames: Iterator[tuple[Fraction, Any]], others: Sequence[Nearest], every: int) -> Iterator[Row]:
    """The first of every `every` frames, and those of the other tracks that are nearest to its time."""
    if others:
        start = max(track.start or Fraction(0) for track in others)
        frames = _beginning(frames, start)
    while len(group := list(itertools.islice(frames, every))) == every:
        time = group[0][0]
        row = [frame for track in others if (frame := track.at(time)) is not None]
        if len(row) < len(others) or any(track.ends_before(time) for track in others):
            return
        yield [group[0], *row]


def _beginning(frames: Iterator[tuple[Fraction, Any]], start: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """The frames from the one nearest to `start` on; none if they end before."""
    held, interval, before = next(frames, None), Fraction(0), True
    for frame in frames:
        assert held is not None
        interval = frame[0] - held[0]
        before = before and abs(frame[0] - start) < abs(held[0] - start)
        if not before:
            yield held
        held = frame
    if held is not None and (not before or start - held[0] <= interval / 2):
        yield held
