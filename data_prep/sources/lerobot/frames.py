"""Frames of a LeRobot dataset's videos, decoded in processes that are replaced when a decoder crashes or hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from data_prep.jobs.child import Child, ChildError
from data_prep.sources.decoding import MAX_ENCODED_BYTES, Video, VideoError, decoder_failure, nearest, rgb
from data_prep.sources.pictures import Pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The frames of one camera in one episode.

    Attributes:
        camera: its name; the file of each camera stays open, since several episodes may share it.
        times: in seconds, increasing.
        tolerance: largest distance in seconds between a frame and its time.
        size: (height, width) that the frames must have.
        pictures: how the result is stored.
        max_bytes: of the result.
    """

    file: Path
    camera: str
    times: tuple[Fraction, ...]
    tolerance: Fraction
    size: tuple[int, int]
    pictures: Pictures
    max_bytes: int = MAX_ENCODED_BYTES


@dataclasses.dataclass(frozen=True)
class Unusable:
    """The reason why a request gives no frames."""

    reason: str
    detail: str


Size = tuple[int, int]
Answer = list[bytes] | Size | Unusable


class Reader:
    """What a process does: encodes the frames of a `Request`, or tells (height, width) of a file's first frame."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[tuple[object, ...], Video]] = {}

    def __call__(self, request: Request | Path, mark: Callable[[int], None]) -> Answer:
        try:
            if isinstance(request, Path):
                with Video(request) as video:
                    return video.size()
            return self._frames(request)
        except VideoError as e:
            return Unusable(e.reason, str(e))

    def _frames(self, request: Request) -> list[bytes]:
        encoded: list[bytes] = []
        total = 0
        video = self._video(request)
        for _, frame in nearest(video.frames(request.times[0] - request.tolerance), request.times, request.tolerance):
            image = rgb(frame)
            if image.shape[:2] != request.size:
                raise VideoError("another image size", f"expected {request.size}, found {image.shape[:2]}")
            encoded.append(request.pictures.encode(image))
            total += len(encoded[-1])
            if total > request.max_bytes:
                raise VideoError("oversized episode", f"{len(encoded)} of its frames have {total / 1e9:.2f} GB")
        return encoded

    def _video(self, request: Request) -> Video:
        try:
            found = os.stat(request.file)
        except OSError as e:
            raise VideoError("unreadable file", f"{request.file.name}: {e.strerror}") from e
        version = (request.file, found.st_ino, found.st_size, found.st_mtime_ns)
        before, video = self._open.get(request.camera, ((), None))
        if before == version and video is not None:
            return video
        if video is not None:
            del self._open[request.camera]
            video.close()
        video = Video(request.file)
        self._open[request.camera] = version, video
        return video


class Decoder:
    """Decodes in a process of its own."""

    def __init__(self) -> None:
        self._child: Child[Request | Path, Answer] = Child(Reader())

    def frames(self, request: Request, seconds: float) -> list[bytes]:
        """The encoded frame that is nearest to each of the request's times.

        Raises:
            VideoError: there are none: what `decoding.nearest` raises, frames of another size, more than `max_bytes`,
                or a decoder that crashed or took more than `seconds`.
        """
        return self._ask(request, seconds)  # type: ignore[return-value]

    def size(self, file: Path, seconds: float) -> Size:
        """(height, width) in pixels of the first frame; VideoError as `frames`."""
        return self._ask(file, seconds)  # type: ignore[return-value]

    def close(self) -> None:
        self._child.close()

    def _ask(self, request: Request | Path, seconds: float) -> list[bytes] | Size:
        try:
            answer = self._child.call(request, seconds)
        except ChildError as e:
            raise decoder_failure(e) from e
        if isinstance(answer, Unusable):
            raise VideoError(answer.reason, answer.detail)
        return answer


_idle: list[Decoder] = []  # a process takes longer to start than a short episode to decode


@contextlib.contextmanager
def decoder() -> Iterator[Decoder]:
    """A decoder for this block alone, whose process is kept for later blocks."""
    try:
        taken = _idle.pop()
    except IndexError:
        taken = Decoder()
    try:
        yield taken
    except BaseException:
        taken.close()  # it may be amid an answer
        raise
    finally:
        _idle.append(taken)
