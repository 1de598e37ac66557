"""Frames by exact time, against the numbers that the pictures show."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.decoding import Video, VideoError, nearest, rgb
from tests.data_prep.clips import SIZE, number_of, write_clip


def taken(file: Path, times: list[Fraction], tolerance: Fraction = Fraction(1, 20)) -> list[int]:
    with Video(file) as video:
        return [number_of(rgb(frame)) for _, frame in nearest(video.frames(times[0]), times, tolerance)]


@pytest.mark.parametrize("codec, name", [("libx264", "a.mp4"), ("libsvtav1", "a.mp4"), ("libvpx-vp9", "a.webm")])
def test_frames_by_time_from_any_place(tmp_path: Path, codec: str, name: str) -> None:
    write_clip(tmp_path / name, range(24), codec=codec)
    for first in (0, 5, 17):
        assert taken(tmp_path / name, [Fraction(i, 10) for i in range(first, 24)]) == list(range(first, 24))


def test_one_file_is_read_from_several_places_in_turn(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", range(24))
    with Video(tmp_path / "a.mp4") as video:
        for first in (14, 3, 20, 0):
            times = [Fraction(i, 10) for i in range(first, first + 4)]
            frames = nearest(video.frames(times[0]), times, Fraction(1, 20))
            assert [number_of(rgb(frame)) for _, frame in frames] == list(range(first, first + 4))


def test_the_nearest_frame_of_a_variable_rate(tmp_path: Path) -> None:
    stamps = [0, 0.09, 0.21, 0.3, 0.34, 0.38, 0.5]
    write_clip(tmp_path / "a.mp4", range(7), stamps)
    # The nearest to 0.2 is 0.21; 0.4 lies between 0.38 and 0.5.
    assert taken(tmp_path / "a.mp4", [Fraction(i, 10) for i in range(6)]) == [0, 1, 2, 3, 5, 6]


def test_frames_that_are_too_far_or_taken_twice_are_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", range(5))
    with pytest.raises(VideoError, match="no frame at 0.5000 s: the video ends before") as raised:
        taken(tmp_path / "a.mp4", [Fraction(i, 10) for i in range(6)])
    assert raised.value.reason == "no frame at its time"
    with pytest.raises(VideoError, match="nearest to two steps") as raised:
        taken(tmp_path / "a.mp4", [Fraction(0), Fraction(1, 50)])
    assert raised.value.reason == "a frame twice"
    write_clip(tmp_path / "gap.mp4", range(3), [0, 0.1, 0.4])
    with pytest.raises(VideoError, match="no frame at 0.2000 s: the nearest is 0.1000 s away"):
        taken(tmp_path / "gap.mp4", [Fraction(i, 10) for i in range(3)])


def test_equally_near_frames_give_the_later_one() -> None:
    frames = [(Fraction(2 * i + 1, 20), i) for i in range(4)]  # half a step late
    times = [Fraction(i, 10) for i in range(4)]
    assert [frame for _, frame in nearest(frames, times, Fraction(1, 20))] == [0, 1, 2, 3]


def test_files_that_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4") as raised:
        Video(tmp_path / "text.mp4")
    assert raised.value.reason == "video cannot be opened"
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(VideoError) as raised:
        Video(tmp_path / "sound.mp4")
    assert raised.value.reason == "no video stream"


def test_damage_is_an_error_and_no_shorter_video(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    write_clip(file, range(24), key_every=6)
    data = bytearray(file.read_bytes())
    start = data.index(b"mdat") + 4
    middle = (start + data.index(b"moov")) // 2
    data[middle : middle + 200] = b"\xff" * 200
    file.write_bytes(data)
    with Video(file) as video, pytest.raises(VideoError) as raised:
        list(video.frames())
    assert raised.value.reason == "video cannot be decoded"


def test_rotation_by_metadata_is_applied(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    write_clip(file, [0])
    data = bytearray(file.read_bytes())
    # The matrix of the track header (ISO 14496-12, 8.3.2): 90 degrees clockwise.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    at = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    data[at : at + 36] = matrix
    file.write_bytes(data)
    with Video(file) as video:
        assert video.size() == (SIZE[1], SIZE[0])
        image = rgb(next(video.frames())[1])
    assert image.shape == (SIZE[1], SIZE[0], 3)
    # The bright quarter, upper left in the file, is shown upper right.
    red = image[..., 0].astype(int) - image[..., 1]
    assert red[5, -5] > 20 > red[5, 5]
