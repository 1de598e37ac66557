"""Frames by exact time, against the numbers that the pictures show."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.sources.decoding import Video, VideoError, nearest, rgb
from tests.data_prep.clips import SIZE, number_of, picture, write_clip, write_sound


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
    (tmp_path / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(VideoError, match="is a Git LFS pointer"):
        Video(tmp_path / "pointer.mp4")
    for name, kinds in (("sound.mp4", "audio"), ("album.mp4", "audio, cover picture")):
        write_sound(tmp_path / name, cover=name == "album.mp4")
        with pytest.raises(VideoError, match=f"holds no video stream, but {kinds}$") as raised:
            Video(tmp_path / name)
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


def read(file: Path, **arguments: bool) -> list[tuple[float, int]]:
    """(time in seconds, number) of every frame."""
    with Video(file) as video:
        frames = video.frames(**arguments)
        return [(float(time), number_of(rgb(frame, video.pixel_aspect))) for time, frame in frames]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_keeps_the_order_of_display(tmp_path: Path, codec: str) -> None:
    write_clip(tmp_path / "a.avi", range(12), codec=codec)  # with B frames, whose stored times are out of order
    times, numbers = zip(*read(tmp_path / "a.avi"), strict=True)
    assert numbers == tuple(range(12))
    np.testing.assert_allclose(np.diff(times), 0.1, atol=1e-9)


@pytest.mark.parametrize(
    "name, codec, share",
    [("a.mp4", "libx264", 0.5), ("a.webm", "libvpx-vp9", 0.5), ("a.mkv", "libx264", 0.6), ("a.avi", "mpeg4", 0.14)],
)
def test_a_truncated_file_is_no_shorter_video(tmp_path: Path, name: str, codec: str, share: float) -> None:
    write_clip(tmp_path / name, range(24), codec=codec)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError) as raised:
        read(tmp_path / name)
    assert raised.value.reason in ("video cannot be opened", "video cannot be decoded", "ends early")


def test_a_raw_stream_has_no_time_stamps(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", range(6), format="h264")  # named like another container
    with pytest.raises(VideoError) as raised:
        read(tmp_path / "a.mp4")
    assert raised.value.reason == "no time stamps"
    assert [number for _, number in read(tmp_path / "a.mp4", stamped=False)] == list(range(6))


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    write_clip(tmp_path / "head.mkv", range(4), codec="mpeg4")
    (tmp_path / "head.mkv").write_bytes((tmp_path / "head.mkv").read_bytes()[:300])  # libav calls it an input error
    for name, reason in (
        ("a.mp4", "empty file"),
        ("b.mp4", "unreadable file"),
        ("folder.mp4", "unreadable file"),
        ("head.mkv", "video cannot be opened"),
    ):
        with pytest.raises(VideoError, match=name) as raised:
            Video(tmp_path / name)
        assert raised.value.reason == reason


@pytest.mark.parametrize("degrees, hflip", [(0, True), (90, False), (180, False), (-90, False), (90, True)])
def test_display_matrices(tmp_path: Path, degrees: int, hflip: bool) -> None:
    write_clip(tmp_path / "a.mp4", [0], turn={"degrees": degrees, "hflip": hflip})
    with Video(tmp_path / "a.mp4") as video:
        shown = rgb(next(video.frames())[1])
    expected = np.rot90(picture(0), degrees // 90)  # counterclockwise
    expected = expected[:, ::-1] if hflip else expected
    assert shown.shape == expected.shape
    np.testing.assert_allclose(shown.mean(axis=-1), expected.mean(axis=-1), atol=12)


def test_a_display_matrix_of_another_angle_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", [0], turn={"degrees": 45})
    with pytest.raises(VideoError, match="quarter turns") as raised:
        read(tmp_path / "a.mp4")
    assert raised.value.reason == "odd rotation"


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mkv", [3], pixel_aspect=Fraction(3, 2))
    with Video(tmp_path / "a.mkv") as video:
        image = rgb(next(video.frames())[1], video.pixel_aspect)
    assert image.shape == (48, 96, 3) and number_of(image) == 3


def test_pixels_that_are_too_wide_or_of_an_unknown_format() -> None:
    frame = av.VideoFrame(64, 48, "rgb24")
    with pytest.raises(VideoError, match="has 2097152x48 pixels") as raised:
        rgb(frame, Fraction(1 << 15))
    assert raised.value.reason == "oversized picture"
    with pytest.raises(VideoError, match="a frame of format gray32le") as raised:
        rgb(av.VideoFrame(64, 48, "gray32le"))
    assert raised.value.reason == "video cannot be decoded"


@pytest.mark.parametrize("pixels, codec, size", [("yuv420p10le", "libx265", SIZE), ("yuv444p", "libx264", (47, 61))])
def test_ten_bits_and_odd_sizes(tmp_path: Path, pixels: str, codec: str, size: tuple[int, int]) -> None:
    write_clip(tmp_path / "a.mp4", range(4), codec=codec, pixels=pixels, size=size)
    assert [number for _, number in read(tmp_path / "a.mp4")] == list(range(4))


def test_time_stamps_that_do_not_increase(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mkv", range(8), codec="mpeg4")
    with av.open(str(tmp_path / "a.mkv")) as source, av.open(str(tmp_path / "b.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts = packet.dts = min(packet.dts, 300)  # B frames at their place in the file
                packet.stream = stream
                copy.mux(packet)
    with pytest.raises(VideoError, match=r"b\.mkv: frame 3 at 0\.1000 s, the last at 0\.3000 s") as raised:
        read(tmp_path / "b.mkv")
    assert raised.value.reason == "time stamps do not increase"
